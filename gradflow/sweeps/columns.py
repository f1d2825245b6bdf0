"""Paths as labelled columns of an xarray dataset."""

from typing import Any

import jax
import numpy as np

from ..results import codes
from ..runs.path import Path
from .stack import Ragged


def xarray() -> Any:
    """The package, imported when it is first needed.

    **Raises:** `ImportError` that says how to install it.
    """
    try:
        import xarray
    except ImportError as error:
        raise ImportError(
            "labelled results need xarray: pip install xarray."
        ) from error
    return xarray


def columns(paths: Path, watched: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """What is kept of the paths of some lanes, by name: arrays with the lanes as first
    axis and, where they have two, the times as second.

    `watched` are the metrics of each lane, for their thresholds.
    """
    levels = {
        name: [lane[name].threshold if name in lane else None for lane in watched]
        for name in paths.metrics
    }
    numbers = {
        k: np.asarray(v)
        for k, v in paths.stats.items()
        if not isinstance(v, str | tuple)
    }
    return {
        "t": np.asarray(paths.t),
        "slow_time": np.asarray(paths.slow_time),
        "train_loss": np.asarray(paths.train_loss),
        "penalty": np.asarray(paths.penalty),
        **{f"metric_{k}": np.asarray(v) for k, v in paths.metrics.items()},
        **{
            f"threshold_{k}": np.array([np.nan if x is None else x for x in v], float)
            for k, v in levels.items()
            if any(x is not None for x in v)
        },
        **{k: v for k, v in numbers.items() if v.ndim == 1 and k not in _AXES},
        "result": codes(paths.result),
    }


def parameter_columns(
    paths: Path,
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """The parameters of some lanes at all times, by their places in the model, with the
    names of the dimensions after those of the lanes."""
    if isinstance(paths.params, Ragged):
        raise ValueError("parameters: their shapes differ from lane to lane.")
    out = {}
    for at, leaf in jax.tree_util.tree_leaves_with_path(paths.params):
        name = parameter_name(at)
        more = tuple(f"{name}_{k}" for k in range(leaf.ndim - 2))
        out[name] = (("time", *more), np.asarray(leaf))
    return out


def parameter_name(at: Any) -> str:
    # No folders of their own in a store.
    name = jax.tree_util.keystr(at, simple=True, separator=".").replace("/", ".")
    return f"params_{name}"


_AXES = ("rtol", "learning_rate")  # coordinates, where they vary
