"""Paths of many lanes as one."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, PyTree

from .._host import as_array
from ..metrics import Metric
from ..results import RESULTS
from ..runs.path import Path
from ..runs.stats import Stats


class OfProblem(NamedTuple):
    """What a path has from its problem, and shares with other lanes of it."""

    static: PyTree
    watched: dict[str, Metric]


def blank(like: Path, weight_decay: float) -> Path:
    """The path of a lane that raised: NaN throughout."""

    def none(x: PyTree) -> PyTree:
        if not eqx.is_array_like(x) or isinstance(x, str):
            return x
        x = np.asarray(x)
        inexact = jnp.issubdtype(x.dtype, jnp.inexact)
        return as_array(np.full_like(x, np.nan if inexact else 0))

    path = jax.tree.map(none, like)
    return dataclasses.replace(
        path,
        weight_decay=as_array(weight_decay, like.t.dtype),
        result=RESULTS.raised,
    )


class Ragged(NamedTuple):
    """What has another shape in each lane."""

    lanes: tuple


def stack(paths: Sequence[Path]) -> Path:
    """All as one, with the lanes as the first axis. What the solvers tell of some lanes
    only is NaN in the others (0 if it is a count of steps); words that differ are a
    tuple of theirs, and parameters whose shapes differ are `Ragged`."""
    names = [field.name for field in dataclasses.fields(Stats)]
    stats = {k: _column(k, [getattr(p.stats, k) for p in paths]) for k in names}
    shapes = [jax.tree.map(jnp.shape, p.params) for p in paths]
    ragged = any(shape != shapes[0] for shape in shapes)
    params = Ragged(tuple(p.params for p in paths))
    if not ragged:
        params = jax.tree.map(_joined, *(p.params for p in paths))
    names = ("t", "weight_decay", "metrics", "train_loss", "penalty", "result")
    rest = {k: jax.tree.map(_joined, *(getattr(p, k) for p in paths)) for k in names}
    return dataclasses.replace(paths[0], stats=Stats(**stats), params=params, **rest)


def _joined(*values: ArrayLike) -> Array:
    return as_array(np.stack([np.asarray(v) for v in values]))


def _column(key: str, values: list[Any]) -> Any:
    if all(v is None or isinstance(v, str) for v in values):
        return values[0] if len(set(values)) == 1 else tuple(values)
    missing = 0 if key == "trial_steps" else np.nan
    return _joined(*(missing if v is None else v for v in values))
