"""Paths as labelled columns of an xarray dataset."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import numpy as np

from ..plot import _drawn
from ..results import codes, flags, RESULTS
from .stats import NUMBERS, Stats


@runtime_checkable
class _Paths(_drawn.Path, Protocol):
    @property
    def result(self) -> RESULTS: ...
    @property
    def stats(self) -> Stats: ...


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


def columns(paths: _Paths, watched: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """What is kept of the paths of some lanes, by name: arrays with the lanes as first
    axis and, where they have two, the times as second.

    `watched` are the metrics of each lane, for their thresholds.
    """
    levels = {
        name: [lane[name].threshold if name in lane else None for lane in watched]
        for name in paths.metrics
    }
    known = {name: getattr(paths.stats, name) for name in NUMBERS}
    numbers = {k: np.asarray(v) for k, v in known.items() if v is not None}
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
        **{k: v for k, v in numbers.items() if v.ndim == 1},
        "result": codes(paths.result),
    }


def one_dataset(path: Any) -> Any:
    """One path, along `time`; see `Path.to_xarray`."""
    bare = dataclasses.replace(path, static=None, watched={}, again=None)
    lanes = jax.tree.map(lambda x: x[None] if eqx.is_array(x) else x, bare)
    kept = columns(lanes, [path.watched])
    variables = {k: (("time",) * (v.ndim - 1), v[0]) for k, v in kept.items()}
    attributes = {
        "weight_decay": float(path.weight_decay),
        "solver": path.stats.solver,
        "why": path.stats.why,
    }
    return described(xarray().Dataset(variables, attrs=attributes))


def described(dataset: Any) -> Any:
    """With the meanings of times and results."""
    dataset["t"].attrs["long_name"] = "time t"
    dataset["slow_time"].attrs["long_name"] = "slow time s = lambda t"
    dataset["result"].attrs.update(flags())
    return dataset.set_coords(["t", "slow_time"])
