"""Paths as labelled columns of an xarray dataset."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable, TypeAlias

import equinox as eqx
import jax
import numpy as np

from ..results import codes, flags, RESULTS
from .stats import NUMBERS, Stats


@runtime_checkable
class _Recorded(Protocol):
    @property
    def train_loss(self) -> Any: ...
    @property
    def penalty(self) -> Any: ...
    @property
    def metrics(self) -> Mapping[str, Any]: ...
    @property
    def result(self) -> RESULTS: ...
    @property
    def stats(self) -> Stats: ...


@runtime_checkable
class _Paths(_Recorded, Protocol):
    @property
    def t(self) -> Any: ...
    @property
    def slow_time(self) -> Any: ...


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


Columns: TypeAlias = dict[str, tuple[tuple[str, ...], np.ndarray]]
"""By name: the dimensions after that of the lanes, the first axis, and the arrays."""


def columns(paths: _Paths, watched: list[dict[str, Any]]) -> Columns:
    """What is kept of the paths of some lanes, most of it along `time`.

    `watched` are the metrics of each lane, for their thresholds.
    """
    times = {"t": np.asarray(paths.t), "slow_time": np.asarray(paths.slow_time)}
    return _along_time(times) | recorded(paths, watched)


def recorded(paths: _Recorded, watched: list[dict[str, Any]]) -> Columns:
    """The same without the times."""
    levels = {
        name: [lane[name].threshold if name in lane else None for lane in watched]
        for name in paths.metrics
    }
    known = {name: getattr(paths.stats, name) for name in NUMBERS}
    numbers = {k: np.asarray(v) for k, v in known.items() if v is not None}
    metrics = {f"metric_{k}": np.asarray(v) for k, v in paths.metrics.items()}
    out = {
        "train_loss": np.asarray(paths.train_loss),
        "penalty": np.asarray(paths.penalty),
        **metrics,
        **{
            f"threshold_{k}": np.array([np.nan if x is None else x for x in v], float)
            for k, v in levels.items()
            if any(x is not None for x in v)
        },
        **{k: v for k, v in numbers.items() if v.ndim == 1},
        "result": codes(paths.result),
    }
    return _along_time(out)


def _along_time(values: dict[str, np.ndarray]) -> Columns:
    return {k: (("time", *own_dims(k, v))[: v.ndim - 1], v) for k, v in values.items()}


def own_dims(name: str, values: Any) -> tuple[str, ...]:
    """The dimensions of a column after those of lanes and times."""
    return tuple(f"{name}_{k}" for k in range(values.ndim - 2))


def one_dataset(path: Any, *names: str, **attributes: Any) -> Any:
    """One path, or what is saved like one, along `time`: the columns of its fields by
    these names, and what is recorded."""
    bare = dataclasses.replace(path, static=None, watched={})
    lanes = jax.tree.map(lambda x: x[None] if eqx.is_array(x) else x, bare)
    variables = {name: ("time", np.asarray(getattr(path, name))) for name in names}
    found = recorded(lanes, [path.watched])
    variables |= {name: (dims, values[0]) for name, (dims, values) in found.items()}
    attributes |= {"solver": path.stats.solver, "why": path.stats.why}
    if path.stats.learning_rate is not None:
        attributes["learning_rate"] = float(path.stats.learning_rate)
    return described(xarray().Dataset(variables, attrs=attributes))


TIME = {
    "t": {"units": "time t", "long_name": "time t"},
    "slow_time": {"units": "slow time s", "long_name": "slow time s = lambda t"},
}
"""Attributes of times, by the names of their columns."""


def described(dataset: Any) -> Any:
    """With the meanings of times and results."""
    clocks = [name for name in TIME if name in dataset]
    for name in clocks:
        dataset[name].attrs.update(TIME[name])
    dataset["result"].attrs.update(flags())
    return dataset.set_coords(clocks)
