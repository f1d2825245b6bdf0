"""The paths of a sweep."""

import dataclasses
import functools
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path as File
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from .._host import taken
from .._typing import RealScalarLike
from ..metrics import Metric
from ..results import among, RESULTS
from ..runs.again import Again
from ..runs.columns import columns, described, xarray
from ..runs.path import crossing_time_error, NOT_AGAIN, Path, slid
from ..runs.solve import Solve
from ..runs.stats import Stats, Words
from .axes import Axes, short
from .lanes import AbstractLanes, FlowLanes
from .on_disk import StoredPaths, StoredProblems
from .stack import OfProblem, Ragged

_SHOWN = 24  # lanes that are printed one by one


class Sweep(eqx.Module):
    """The paths of L lanes, one for each combination of values of the axes.

    Lanes are numbered in C order of the dimensions: `sweep[i]` is the `Path` of lane i,
    and so is `sweep[j, k]` by its position in each dimension. One that ended early, as
    asked by `until`, has its end in all rows from there on, time and all; `sweep[i]`
    has it once, and `padded(i)` as often as the arrays. One that failed is marked
    in `result`, and is NaN after its end; one that raised an error is NaN throughout,
    and `causes` has the words. The others are as if it had not been there.

    It is the same whether results are in memory or in a store. Of a store nothing is
    read but what is asked for: arrays, lanes, `to_xarray()`; `load()` reads all.
    """

    paths: Path | StoredPaths
    """All paths as one: its arrays have the lanes as their first axis. (But `static`
    and `watched`, which the lanes of one problem share: where there are many, they are
    those of `sweep[i]`. Parameters of differing shapes are theirs too.) Of a store, an
    array is read when it is asked for."""
    axes: Axes
    """The axes, and the dimensions along which they run."""
    owned: tuple[OfProblem, ...] | StoredProblems = ()
    """`static` and `watched` of each lane, where there are many problems."""
    causes: dict[int, str] = eqx.field(default_factory=dict)
    """The error of each lane that raised one."""
    fixed: dict[str, float] = eqx.field(default_factory=dict)
    """What is the same for all lanes: those of `weight_decay`, `init_scale`, `rtol` and
    `learning_rate` that are no axes."""
    lanes: AbstractLanes | None = eqx.field(default=None, metadata={"saved": False})
    """What makes the lanes, to run one again (see `Path.again`); `None` where results
    were read from disk."""

    @property
    def dims(self) -> tuple[str, ...]:
        """The names of the dimensions."""
        return self.axes.dims

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of values along each dimension."""
        return self.axes.shape

    @property
    def coords(self) -> dict[str, np.ndarray]:
        """The values of each axis, by its name."""
        return {name: values for name, (_, values) in self.axes.coords.items()}

    @property
    def weight_decay(self) -> Float[Array, " L"]:
        """λ of each lane."""
        return self.paths.weight_decay

    @property
    def t(self) -> Float[Array, "L n"]:
        """The saved times of each lane."""
        return self.paths.t

    @property
    def slow_time(self) -> Float[Array, "L n"]:
        """s = λt at the saved times."""
        return self.paths.slow_time

    @property
    def metrics(self) -> dict[str, Float[Array, "L n ..."]]:
        """What was watched, at the saved times."""
        return self.paths.metrics

    @property
    def train_loss(self) -> Float[Array, "L n"]:
        """F at the saved times."""
        return self.paths.train_loss

    @property
    def penalty(self) -> Float[Array, "L n"]:
        """R at the saved times."""
        return self.paths.penalty

    @property
    def result(self) -> RESULTS:
        """How each lane ended, L results as one."""
        return self.paths.result

    @property
    def succeeded(self) -> Bool[Array, " L"]:
        """Whether each lane did what was asked."""
        return self.paths.succeeded

    @property
    def stats(self) -> Stats:
        """The steps and other counts of each lane."""
        return self.paths.stats

    def __len__(self) -> int:
        return self.weight_decay.shape[0]

    def load(self) -> "Sweep":
        """The same, with all that is stored in memory."""
        if isinstance(self.paths, Path):
            return self
        return dataclasses.replace(
            self, paths=self.paths.load(), owned=tuple(self.owned)
        )

    def __getitem__(self, index: int | np.integer | tuple[int, ...]) -> Path:
        """The path of one lane, by its number or its position in each dimension."""
        return self.padded(index).to_its_end()

    def padded(self, index: int | np.integer | tuple[int, ...]) -> Path:
        """The path of lane `index`, a number or a position in each dimension, with as
        many times as there are in the arrays."""
        i = self.axes.lane(index)
        paths = self.paths
        if isinstance(paths, StoredPaths):
            return paths.lane(i)
        ragged = isinstance(paths.params, Ragged)
        bare = dataclasses.replace(paths, static=None, watched={})
        bare = dataclasses.replace(bare, params=None) if ragged else bare
        lane = jax.tree.map(lambda x: taken(x, i) if eqx.is_array(x) else x, bare)
        stats = paths.stats.lane(i)
        static, watched = self.owned[i] if self.owned else (paths.static, paths.watched)
        again = None
        if isinstance(self.lanes, FlowLanes):
            again = Again(functools.partial(_run, self.lanes, i, stats.why))
        return dataclasses.replace(
            lane,
            params=paths.params.lanes[i] if ragged else lane.params,
            stats=stats,
            static=static,
            watched=watched,
            again=again,
        )

    def __iter__(self) -> Iterator[Path]:
        return (self[i] for i in range(len(self)))

    def crossing_time(self, name: str) -> Float[np.ndarray, "..."]:
        """When metric `name` has passed its threshold for good, a time t, in the shape
        of the dimensions; see `Path.crossing_time`.

        **Raises:** `ValueError` where no metric has that name, or it is no single
        number.
        """
        lanes = self
        if isinstance(self.paths, StoredPaths):
            numbers = self.paths.load(parameters=False)
            lanes = dataclasses.replace(self, paths=numbers)
        times = [path.crossing_time(name) for path in lanes]
        return np.array(times).reshape(self.shape)

    def crossing_error(self, name: str) -> Float[np.ndarray, "..."]:
        """How far `crossing_time` of metric `name` is off, a time t, in the shape of
        the dimensions: see `Path.crossing_error`. Each lane is run once more for it, to
        more digits; NaN for one that failed, or fails in that, of which a warning
        tells.

        **Raises:** `ValueError` where no metric has that name, or lanes can't be run
        again, as after reading them from disk.
        """
        check_again(self)
        times = self.crossing_time(name).ravel()
        errors = [
            lane_error(path, name, path.watched[name], time)
            for path, time in zip(self, times, strict=True)
        ]
        return np.array(errors).reshape(self.shape)

    def to_xarray(self) -> Any:
        """An `xarray.Dataset` with a dimension for each of `dims`, and `time`.

        It has `t`, `slow_time`, `train_loss`, `penalty`, `metric_NAME` (where that is
        an array, along dimensions `metric_NAME_0`, … of its own) and
        `threshold_NAME`, what the solver counted (`steps`, …), and `result`, whose
        attributes give the meanings of its values. Of a store it is what
        `gradflow.open_results` gives, whose arrays are read when they are used.
        """
        if isinstance(self.paths, StoredPaths):
            return self.paths.dataset().copy()
        return _dataset(self)

    def __str__(self) -> str:
        if isinstance(self.paths, StoredPaths):
            return str(dataclasses.replace(self, paths=self.paths.numbers(), owned=()))
        stats = self.stats
        solver = stats.solver
        if not isinstance(solver, str):
            solver = " or ".join(sorted(set(solver)))
        accuracy = ""
        if stats.rtol is not None:
            accuracy = f", rtol {float(np.nanmin(stats.rtol)):.1g}"
        if self.dims == ("weight_decay",):
            count = f"{len(self)} weight decays"
        else:
            sizes = zip(self.dims, self.shape, strict=True)
            product = " × ".join(f"{n} {short(dim)}" for dim, n in sizes)
            count = f"{product} = {len(self)} lanes"
        lines = [f"Sweep of {count}, {solver}{accuracy}"]
        if self._until:
            met = int(np.sum(among(self.result, RESULTS.criterion_met)))
            lines.append(f"  criterion met in {met} of {len(self)}: {self._until}")
        many = len(self) > _SHOWN
        return "\n".join(lines + (self._summary() if many else self._table()))

    @property
    def _until(self) -> str:
        """What was to end lanes early."""
        until = self.stats.until
        return until if isinstance(until, str) else " or ".join(sorted({*until} - {""}))

    def _table(self) -> list[str]:
        names = [name for name in self.axes.along if name != "weight_decay"]
        lines = [
            "  "
            + "".join(f"{short(name):>9} " for name in names)
            + f"{'λ':>9} {'steps':>6} {'rejected':>8} {'train loss':>10}"
            + "".join(f" {name:>10}" for name in self._largest())
        ]
        alone = self.dims == ("weight_decay",)
        lams = np.asarray(self.weight_decay)
        losses = np.asarray(self.train_loss)
        watched = self._largest()
        for i in np.argsort(-lams) if alone else range(len(self)):
            labels = self.axes.labels(int(i))
            own = [labels[name] for name in names]
            stats = self.stats.lane(i)
            rejected = np.nan if stats.rejected is None else stats.rejected
            row = (
                "  "
                + "".join(f"{_cell(v):>9} " for v in own)
                + f"{float(lams[i]):9.2e} {_count(stats.steps):>6} "
                f"{_count(rejected):>8} {losses[i, -1]:10.3g}"
                + "".join(
                    f" {values[i, -1]:{max(10, len(name))}.3g}"
                    for name, values in watched.items()
                )
            )
            lines.append(row + self._mark(int(i)))
        return lines

    def _largest(self) -> dict[str, np.ndarray]:
        """The metrics; of those that are arrays the largest number."""
        out = {}
        for name, values in self.metrics.items():
            flat = np.asarray(values).reshape(*values.shape[:2], -1)
            out[name if values.ndim == 2 else f"max {name}"] = flat.max(axis=-1)
        return out

    def failure(self, index: int | np.integer | tuple[int, ...]) -> str:
        """Why a lane failed, in words; empty where it did not.

        **Arguments:** `index`: its number, or its position in each dimension.
        """
        i = self.axes.lane(index)
        if i in self.causes:
            return f"RAISED: {self.causes[i].splitlines()[0]}"
        path = self[i]
        return "" if bool(path.succeeded) else f"FAILED: {path.verdict}"

    def _mark(self, i: int) -> str:
        if failure := self.failure(i):
            return f"  {failure}"
        path, mark = self[i], ""
        if path.stats.until:
            end = float(np.asarray(path.t)[-1])
            mark = f"  met at t = {end:.4g}" if bool(path.met) else "  not met"
        if bool(slid(path)):
            assert path.stats.sliding is not None
            mark += f"  slid along kinks in {int(path.stats.sliding)} steps"
        return mark

    def _summary(self) -> list[str]:
        good = np.asarray(self.succeeded)
        lines = [f"  {int(good.sum())} succeeded, {int((~good).sum())} failed"]
        marks = {i: self._mark(int(i)).strip() for i in np.flatnonzero(~good).tolist()}
        for mark, number in Counter(marks.values()).most_common():
            where = [self.axes.words(i) for i, m in marks.items() if m == mark]
            shown = "; ".join(where[:3]) + ("; …" if len(where) > 3 else "")
            lines.append(f"  {number} × {mark}\n      at {shown}")
        steps = np.asarray(self.stats.steps, float)
        if np.isfinite(steps).any():
            worst = int(np.nanargmax(steps))
            lines.append(
                f"  steps: {np.nanmedian(steps):.0f} (median), {steps[worst]:.0f} "
                f"(most, at {self.axes.words(worst)})"
            )
        for name, values in {"train loss": self.train_loss, **self._largest()}.items():
            last = np.asarray(values)[:, -1]
            if np.isfinite(last).any():
                low, middle, high = np.nanquantile(last, (0, 0.5, 1))
                lines.append(
                    f"  {name} at the end: {low:.3g} … {middle:.3g} … {high:.3g}"
                )
        return lines

    def __repr__(self) -> str:
        return f"<{str(self).partition(chr(10))[0]}>"

    def _repr_html_(self) -> str:
        from .. import plot

        return plot.as_html(str(self), lambda ax: plot.sweep(self, ax))

    def plot(self, **kwargs: Any) -> Any:
        """The figure of every lane in time t, or in slow time s, as
        [`gradflow.plot.sweep`][] draws it; `kwargs` are its options."""
        from .. import plot

        return plot.sweep(self, **kwargs)

    def to_html(self, file: str | os.PathLike, **kwargs: Any) -> File:
        """An interactive page, of which the path is returned: see
        `gradflow.plot.sweep_page`, which takes the `file` and the `kwargs`."""
        from .. import plot

        found = self
        if isinstance(self.paths, StoredPaths):
            parameters = kwargs.get("inputs") is not None
            paths = self.paths.load(parameters=parameters)
            found = dataclasses.replace(self, paths=paths, owned=tuple(self.owned))
        return plot.sweep_page(found, file, **kwargs)


def _dataset(sweep: Sweep) -> Any:
    """All lanes, in the shape of the dimensions; see `Sweep.to_xarray`."""
    dims, shape = sweep.dims, sweep.shape
    lanes = len(sweep)
    watched = [o.watched for o in sweep.owned] or [sweep.paths.watched] * lanes
    variables = {}
    for name, (own, values) in columns(sweep.paths, watched).items():
        variables[name] = (dims + own, values.reshape(*shape, *values.shape[1:]))
    out = xarray().Dataset(variables, coords=sweep.axes.coords)
    out.attrs.update(sweep.fixed)
    return described(out)


def check_again(sweep: Sweep) -> None:
    """Raises unless its lanes can be run again."""
    stored = isinstance(sweep.paths, StoredPaths)
    if stored or not isinstance(sweep.lanes, FlowLanes):
        raise ValueError(NOT_AGAIN)


def lane_error(path: Path, name: str, metric: Metric, time: float) -> float:
    """`crossing_time_error` of one of many paths, of which none is to stop the others:
    NaN where it failed, or where the finer run does."""
    if not bool(path.succeeded):
        return np.nan
    try:
        return crossing_time_error(path, name, metric, time)
    except (RuntimeError, ValueError) as failure:
        told = f"crossing_error: of {name} at λ = {float(path.weight_decay):.3g} it is "
        warnings.warn(f"{told}not known; {failure}", stacklevel=3)
        return np.nan


def _run(lanes: FlowLanes, i: int, why: Words) -> Solve:
    """Lane i, by the solver that was chosen for the reason `why`."""
    lane = lanes.lane(i)
    if lane.again is not None and lane.why != why:
        lane = lane.again
    assert isinstance(lane.run, Solve)
    return lane.run


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)[:9]


def _count(value: RealScalarLike | np.generic) -> str:
    return f"{int(value)}" if np.isfinite(float(value)) else "–"
