"""The same flow for many weight decays, seeds, initial scales: along any axes."""

import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import diffrax
import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from ._axes import Axes, make_axes, short
from ._checks import check_arguments, check_choice, check_given, is_concrete, word
from ._descent_methods import Method, Optimiser, Schedule
from ._lanes import (
    Owned,
    placed,
    placed_problem,
    Problem,
    Ragged,
    Recipe,
    RECORDED,
    RUN,
)
from ._programs import Batch
from ._runs import Bars, fitting, run_stored, Runner
from .flow import check_flow, GradientFlow
from .losses import AbstractLoss
from .metrics import Metric
from .path import Path
from .results import RESULTS
from .simulate import as_metrics, fail_unless_reached, run_again

Numbers: TypeAlias = float | int | Array | np.ndarray | Sequence[float]

_SHOWN = 24  # lanes that are printed one by one


class Sweep(eqx.Module):
    """The paths of L lanes, one for each combination of values of the axes.

    Lanes are numbered in C order of the dimensions: `sweep[i]` is the `Path` of lane i,
    and so is `sweep[j, k]` by its position in each dimension. One that failed is marked
    in `result`, and is NaN after its end; one that raised an error is NaN throughout,
    and `causes` has the words. The others are as if it had not been there.
    """

    paths: Path
    """All paths as one: its arrays have the lanes as their first axis. (But `static`
    and `watched`, which the lanes of one problem share: where there are many, they are
    those of `sweep[i]`. Parameters of differing shapes are theirs too.)"""
    axes: Axes
    """The axes, and the dimensions along which they run."""
    owned: tuple[Owned, ...] = ()
    """`static` and `watched` of each lane, where there are many problems."""
    causes: dict[int, str] = eqx.field(default_factory=dict)
    """The error of each lane that raised one."""
    fixed: dict[str, float] = eqx.field(default_factory=dict)
    """What is the same for all lanes: those of `weight_decay`, `init_scale`, `rtol` and
    `learning_rate` that are no axes."""
    recipe: Any = None
    """How to make a lane, to run it again (see `Path.again`); `None` where results were
    read from disk."""

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
        """The values of each axis."""
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
    def metrics(self) -> dict[str, Float[Array, "L n"]]:
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
        """How each lane ended."""
        return self.paths.result

    @property
    def succeeded(self) -> Bool[Array, " L"]:
        """Whether each lane did what was asked."""
        return self.paths.succeeded

    @property
    def stats(self) -> dict[str, Any]:
        """Steps and other counts of each lane; see `Path`."""
        return self.paths.stats

    def __len__(self) -> int:
        return self.weight_decay.shape[0]

    def __getitem__(self, index: int | np.integer | tuple[int, ...]) -> Path:
        """The path of one lane, by its number or its position in each dimension."""
        i = self.axes.lane(index)
        paths = self.paths
        ragged = isinstance(paths.params, Ragged)
        bare = dataclasses.replace(paths, static=None, watched={}, stats={})
        bare = dataclasses.replace(bare, params=None) if ragged else bare
        lane = jax.tree.map(lambda x: x[i] if eqx.is_array(x) else x, bare)
        static, watched = self.owned[i] if self.owned else (paths.static, paths.watched)
        again = None
        if self.recipe is not None and not self.recipe.descends:
            again = functools.partial(_run_again, self.recipe, i, self._why(i))
        return dataclasses.replace(
            lane,
            params=paths.params.lanes[i] if ragged else lane.params,
            stats={
                k: v if isinstance(v, str) else v[i] for k, v in paths.stats.items()
            },
            static=static,
            watched=watched,
            again=again,
        )

    def _why(self, i: int) -> str:
        """The reason for the solver of lane i."""
        why = self.stats["why"]
        return why if isinstance(why, str) else why[i]

    def __iter__(self) -> Iterator[Path]:
        return (self[i] for i in range(len(self)))

    def crossing_time(self, name: str) -> Float[np.ndarray, "..."]:
        """When metric `name` has passed its threshold for good, in the shape of the
        dimensions; see `Path.crossing_time`."""
        times = [path.crossing_time(name) for path in self]
        return np.array(times).reshape(self.shape)

    def to_xarray(self) -> Any:
        """An `xarray.Dataset` with a dimension for each of `dims`, and `time`.

        It has `t`, `slow_time`, `train_loss`, `penalty`, `metric_NAME` and
        `threshold_NAME`, what the solver counted (`steps`, …), and `result`, whose
        attributes give the meanings of its values.
        """
        from ._labelled import dataset

        return dataset(self)

    def __str__(self) -> str:
        stats = self.stats
        solver = stats["solver"]
        if not isinstance(solver, str):
            solver = " or ".join(sorted(set(solver)))
        accuracy = ""
        if "rtol" in stats:
            accuracy = f", rtol {float(np.nanmin(stats['rtol'])):.1g}"
        if self.dims == ("weight_decay",):
            count = f"{len(self)} weight decays"
        else:
            sizes = zip(self.dims, self.shape, strict=True)
            product = " × ".join(f"{n} {short(dim)}" for dim, n in sizes)
            count = f"{product} = {len(self)} lanes"
        lines = [f"Sweep of {count}, {solver}{accuracy}"]
        many = len(self) > _SHOWN
        return "\n".join(lines + (self._summary() if many else self._table()))

    def _table(self) -> list[str]:
        names = [name for name in self.axes.along if name != "weight_decay"]
        lines = [
            "  "
            + "".join(f"{short(name):>9} " for name in names)
            + f"{'λ':>9} {'steps':>6} {'rejected':>8} {'train loss':>10}"
            + "".join(f" {name:>10}" for name in self.metrics)
        ]
        alone = self.dims == ("weight_decay",)
        lams = np.asarray(self.weight_decay)
        for i in np.argsort(-lams) if alone else range(len(self)):
            labels = self.axes.labels(int(i))
            own = [labels[name] for name in names]
            rejected = self.stats.get("rejected", np.full(len(self), np.nan))[i]
            row = (
                "  "
                + "".join(f"{_cell(v):>9} " for v in own)
                + f"{float(lams[i]):9.2e} {_count(self.stats['steps'][i]):>6} "
                f"{_count(rejected):>8} {float(self.train_loss[i, -1]):10.3g}"
                + "".join(f" {float(v[i, -1]):10.3g}" for v in self.metrics.values())
            )
            lines.append(row + self._mark(int(i)))
        return lines

    def _mark(self, i: int) -> str:
        if i in self.causes:
            return f"  RAISED: {self.causes[i].splitlines()[0]}"
        path = self[i]
        if not bool(path.succeeded):
            return f"  FAILED: {path.verdict}"
        if bool(path.result == RESULTS.slid):
            return f"  slid along kinks in {int(self.stats['sliding'][i])} steps"
        return ""

    def _summary(self) -> list[str]:
        good = np.asarray(self.succeeded)
        lines = [f"  {int(good.sum())} succeeded, {int((~good).sum())} failed"]
        marks = {i: self._mark(int(i)).strip() for i in np.flatnonzero(~good).tolist()}
        for mark, number in Counter(marks.values()).most_common():
            where = [self.axes.words(i) for i, m in marks.items() if m == mark]
            shown = "; ".join(where[:3]) + ("; …" if len(where) > 3 else "")
            lines.append(f"  {number} × {mark}\n      at {shown}")
        steps = np.asarray(self.stats["steps"], float)
        if np.isfinite(steps).any():
            worst = int(np.nanargmax(steps))
            lines.append(
                f"  steps: {np.nanmedian(steps):.0f} (median), {steps[worst]:.0f} "
                f"(most, at {self.axes.words(worst)})"
            )
        for name, values in {"train loss": self.train_loss, **self.metrics}.items():
            last = np.asarray(values)[:, -1]
            if np.isfinite(last).any():
                low, middle, high = np.nanquantile(last, (0, 0.5, 1))
                lines.append(
                    f"  {name} at the end: {low:.3g} … {middle:.3g} … {high:.3g}"
                )
        return lines

    def plot(self, **kwargs: Any) -> Any:
        """Every lane in time t and slow time λt; see `gradflow.plot.sweep`."""
        from . import plot

        return plot.sweep(self, **kwargs)


def _run_again(
    recipe: Recipe, i: int, why: str, params: PyTree, ts: Float[Array, " n"]
) -> Path:
    """Lane i from elsewhere, by the solver that was chosen for the reason `why`."""
    lane = recipe.lane(i)
    if lane.again is not None and lane.why != why:
        lane = lane.again
    return run_again(lane.args[:-1], params, ts)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)[:9]


def _count(value: Any) -> str:
    return f"{int(value)}" if np.isfinite(float(value)) else "–"


def sweep(
    problem: GradientFlow | Callable[..., Any],
    model: PyTree = None,
    *,
    weight_decay: Numbers,
    init_scale: Numbers = 1.0,
    rtol: Numbers | None = None,
    learning_rate: Numbers | Schedule | None = None,
    axes: Mapping[str, Any] | None = None,
    zipped: Sequence[Sequence[str]] = (),
    slow_time: float | None = None,
    t1: float | None = None,
    ts: Float[Array | np.ndarray, " n"] | None = None,
    steps: int | None = None,
    at: Any = None,
    saves: int = 65,
    metrics: dict[str, Callable | Metric] | None = None,
    solver: diffrax.AbstractSolver | None = None,
    atol: float | None = None,
    max_steps: int = 100_000,
    method: Method | None = None,
    optimiser: Optimiser | None = None,
    batch_size: int | None = None,
    key: PRNGKeyArray | None = None,
    batch: Batch | None = None,
    store: str | os.PathLike | None = None,
    chunk: int | None = None,
    parameters: bool = False,
    checkpoint: float = 60.0,
    retry: bool = False,
    throw: bool = False,
    progress: bool = True,
) -> Sweep | Any:
    """Runs a flow, or a descent, for every combination of values along some axes, with
    one compilation for each shape of the problem.

    For one problem, its weight decays: `gf.sweep(flow, model, weight_decay=lams, ...)`.
    For fresh data and models, a function of the other axes:

        make = lambda seed: gf.tasks.diagonal_network(jr.key(seed))
        gf.sweep(make, axes={"seed": range(5)}, weight_decay=lams, init_scale=scales)

    **Arguments:** as for `simulate`, or if `learning_rate` is given `descent`, and

    - `problem`, `model`: a flow and its initial model; or a function that, called with
        one value of each of `axes` by name, returns a `Task`, or `(flow, model)`, or
        `(flow, model, metrics)`. What it gives may differ in data and in size. (A
        number that is part of a penalty or a loss is best made an array,
        `jnp.asarray(c) * gf.L1()`: for each plain number a program is compiled.)
    - `weight_decay`, `init_scale`, `rtol`, `learning_rate`: a number, or a vector: an
        axis of that name. `rtol` is for flows alone, 1e-6 unless given. (One schedule
        of learning rates serves all lanes, as for `descent`.)
    - `axes`: values for `problem`, by name: seeds, sample sizes, penalty weights, …
    - `zipped`: groups of names of axes that run together, along the dimension of the
        first, instead of making a product: `[("samples", "weight_decay")]`.
    - `slow_time`, `t1`, `ts`, `steps`, `at`: give one; that of the `Task` by default.
    - `metrics`: in addition to those that `problem` gives.
    - `batch`: `"loop"` runs lane after lane, `"vmap"` as many in lockstep as fit into
        memory. The default is to loop on a CPU, where lockstep only costs, and to vmap
        on an accelerator. Lanes are shared among all devices of this process.
    - `store`: a folder to keep the results in, such as `"sweep.zarr"`: see below.
    - `chunk`: about how many lanes are computed, and stored, together. By default 16,
        or as many as are one program, if that is more.
    - `parameters`: whether the store keeps the parameters at all saved times too.
    - `checkpoint`: a lane that takes longer than so many seconds writes its state into
        the store as often as that, to go on from there. (It holds the parameters at all
        saved times.)
    - `retry`: compute the chunks again in which a lane raised an error (as memory ran
        out, or a file was missing); by default they are finished like any other.
    - `throw`: raise if any lane fails; by default failures are marked in `result`.
    - `progress`: show a bar with the lanes done and failed.

    The dimensions are those of `axes`, then `init_scale`, `rtol`, `learning_rate` and
    `weight_decay` as far as they are vectors. A solver is chosen for each problem and
    tolerance, by its stiffest lane.

    With `store`, results go to disk chunk by chunk, each whole or not at all, and not
    into memory. Whatever ends the run, the same call goes on where it stopped: finished
    chunks are not computed again (but for those whose checksums are wrong, which are
    named), and long lanes go on from their checkpoints. Where there are many processes
    (`jax.distributed.initialize`) each computes its share of the chunks. A store of
    another configuration is refused, with the differences. What is compared are arrays
    and options, and what `problem` makes for the first lane; of functions their names,
    and what they close over. (By default JAX ends all processes five minutes after the
    first has left: give `initialize` a `shutdown_timeout_seconds` where one goes on.)

    **Returns:** a `Sweep`; with `store`, what `gf.open_results` gives.

    **Raises:** `ValueError` for arguments that make no sense, before any compute;
    `RuntimeError` if a lane fails and `throw`. If `problem` is a function, a lane for
    which it, or the run, raises an error is marked instead; the error is raised if that
    is so for all.
    """
    if learning_rate is None and rtol is None:
        rtol = 1e-6
    runs: dict[str, Any] = dict(
        init_scale=init_scale, rtol=rtol, learning_rate=learning_rate,
        weight_decay=weight_decay,
    )  # fmt: skip
    options: dict[str, Any] = dict(
        slow_time=slow_time, t1=t1, ts=ts, steps=steps, at=at, saves=saves,
        solver=solver, atol=atol, max_steps=max_steps, method=method,
        optimiser=optimiser, batch_size=batch_size, key=key,
    )  # fmt: skip
    check_choice(batch, "batch", ("loop", "vmap", None))
    check_arguments(checkpoint=checkpoint)
    check_given(chunk=chunk)
    if not isinstance(store, str | os.PathLike | None):
        raise ValueError(f"store: expected the path of a folder, got {word(store)}.")
    recipe = make_recipe(
        problem, model, runs, axes, zipped, as_metrics(metrics), options
    )
    if batch is None:
        batch = "loop" if jax.default_backend() == "cpu" else "vmap"
    if store is not None:
        if throw:
            raise ValueError("throw: a sweep with a store marks the lanes that fail.")
        return run_stored(
            recipe, batch, progress, store, chunk, parameters, checkpoint, retry
        )
    out = _run(recipe, batch, progress)
    if throw:
        worst = int(np.argmin(np.asarray(out.succeeded)))
        if worst in out.causes:
            raise RuntimeError(f"lane {worst}: {out.causes[worst]}")
        out = fail_unless_reached(out, out[worst])
    return out


def make_recipe(
    problem: GradientFlow | Callable[..., Any],
    model: PyTree,
    runs: dict[str, Any],
    axes: Mapping[str, Any] | None,
    zipped: Sequence[Sequence[str]],
    metrics: dict[str, Metric],
    options: dict[str, Any],
) -> Recipe:
    """How to make the lanes, from the arguments of `sweep`, checked.

    **Raises:** `ValueError` for arguments that make no sense.
    """
    axes = dict(axes or {})
    for name in axes:
        if name in RUN:
            raise ValueError(f"axes: give the values of {name} as the argument itself.")
        if name in RECORDED or name.startswith(("metric_", "threshold_", "params_")):
            raise ValueError(f"axes: {name!r} is what is recorded; name it otherwise.")
    if isinstance(problem, AbstractLoss):
        check_flow(problem)
    for name, value in (runs | options).items():
        if any(not is_concrete(leaf) for leaf in jax.tree.leaves(value)):
            raise ValueError(
                f"{name}: expected numbers known before tracing; under jit or vmap "
                "take simulate or descent."
            )
    if isinstance(problem, GradientFlow):
        if model is None or axes:
            kind = "axes: they are for a function" if axes else "model: expected one"
            raise ValueError(f"{kind}, where the problem is a flow.")
        problem.term(model)
        make: Any = placed_problem(Problem(problem, model, metrics))
    elif callable(problem):
        if model is not None:
            raise ValueError("model: the function that makes the problem gives it.")
        make = problem
    else:
        kind = type(problem).__name__
        raise ValueError(f"problem: expected a GradientFlow or a function, got {kind}.")
    if runs["weight_decay"] is None:
        raise ValueError("weight_decay: expected a number or a vector, got None.")
    vectors = {k: v for k, v in runs.items() if v is not None and np.ndim(v) > 0}
    for name, v in vectors.items():
        if np.ndim(v) > 1:
            raise ValueError(f"{name}: expected a number or a vector, got {v!r}.")
        if any(map(callable, v)):
            raise ValueError(f"{name}: expected numbers, or one schedule for all.")
    fixed = {k: _number(v) for k, v in runs.items() if k not in vectors}
    options = placed(options, "ts, key")
    recipe = Recipe(make_axes(axes | vectors, zipped), make, metrics, fixed, options)
    recipe.check()
    return recipe


def _number(value: Any) -> Any:
    return value if value is None or callable(value) else np.asarray(value).item()


def _run(recipe: Recipe, batch: Batch, progress: bool) -> Sweep:
    """All lanes, in memory."""
    count = len(recipe.axes)
    with Bars(recipe.axes, count, progress) as bars:
        size = fitting(recipe, batch, count)
        lanes = Runner(recipe, batch, bars).run(range(count), size)
    if not lanes.done:
        assert lanes.error is not None
        raise lanes.error
    first = lanes.owned[0]
    paths = dataclasses.replace(
        lanes.paths,
        static=None if lanes.many else first.static,
        watched=first.watched,
    )
    owned = lanes.owned if lanes.many else ()
    fixed = {k: v for k, v in recipe.fixed.items() if isinstance(v, int | float)}
    return Sweep(paths, recipe.axes, owned, lanes.causes, fixed, recipe)
