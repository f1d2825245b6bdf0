"""What a run gives: the models along a path in time, and what was watched."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree, Scalar

from .._checks import check_choice, is_concrete, word
from .._host import as_array, known, size, taken
from .._typing import Given
from ..metrics import Metric
from ..results import among, in_words, is_known, is_success, RESULTS
from .columns import one_dataset
from .crossing import crossing_error, crossing_time, is_good
from .stacked import stacked
from .stats import Stats
from .until import passing

_PASSES = 20  # at most: each narrows the time down to a share of 1/8 or less


def landed_crossing_time(
    path: "Path", name: str, metric: Metric, *, within: float = 0.1
) -> float:
    """`crossing_time` of metric `name` of a path, with the threshold of `metric`: to
    the tolerance of the run, where the path can be run again.

    From the last saved model that is on the bad side the flow is run again to the next
    saved time, through as many times as the path has (for which it is compiled
    already); and so on, from the last of these, until interpolating between them
    changes the time by less than `within` of `rtol`. Where that fails it warns, and
    interpolates. A run that ended at that threshold has landed on the time already.
    """
    t, values = (np.asarray(x, float) for x in (path.t, path.metrics[name]))
    if _ended_at(path, name, metric):
        return float(t[-1])
    time = crossing_time(t, values, metric)
    if path.again is None or not time > 0:
        return time
    assert path.stats.rtol is not None  # it is a flow, if it can be run again
    enough = within * float(path.stats.rtol)
    params, count = path.params, max(len(t), 9)
    for _ in range(_PASSES):
        # The cubic's error falls as the third power of the spacing, or faster.
        if crossing_error(t, values, metric) / 8 <= enough * time:
            break
        i = int(np.flatnonzero(~is_good(values, metric))[-1])
        start, width = t[i], t[i + 1] - t[i]
        if width <= enough * time:
            break
        params = jax.tree.map(lambda p, i=i: taken(p, i), params)
        local = np.linspace(0.0, width, count)
        piece = path.again(params, as_array(local, path.t.dtype), float(start))
        t, values = start + local, np.asarray(piece.metrics[name], float)
        if not np.isfinite(values).all():
            told = piece.verdict if not bool(piece.succeeded) else "not finite there"
            warnings.warn(
                f"crossing_time: {name} at λ = {float(path.weight_decay):.3g} is "
                f"interpolated, for the flow from t = {start:.6g} on could not be run "
                f"again: {told}",
                stacklevel=3,
            )
            break
        params, good = piece.params, is_good(values, metric)
        # Within the tolerance either end may have come out on the other side.
        if good.all() or not good[-1]:
            return float(start if good.all() else start + width)
        time = crossing_time(t, values, metric)
    return time


def _ended_at(path: "Path", name: str, metric: Metric) -> bool:
    """Whether the run ended because metric `name` passed the threshold of `metric`."""
    own = path.watched.get(name)
    same = own is not None and (own.threshold, own.higher_is_better) == (
        metric.threshold,
        metric.higher_is_better,
    )
    return same and path.stats.until == passing(name) and bool(path.met)


NOT_AGAIN = (
    "error: there is none for what can't be run again; a flow can be that simulate or "
    "sweep ran in this process, with its results in memory, not under jit, and without "
    "a learning_rate."
)


def again_of(path: "Path") -> Callable[..., "Path"]:
    """What runs a path again, for its errors.

    **Raises:** `ValueError` where there is none, or nothing to compare.
    """
    if path.again is None:
        raise ValueError(NOT_AGAIN)
    if not bool(path.succeeded):
        raise ValueError(f"error: expected a path that did not fail: {path.verdict}")
    return path.again


def crossing_time_error(path: "Path", name: str, metric: Metric, time: float) -> float:
    """How far off the `time` of `landed_crossing_time` is, by that of a finer run; NaN
    where one of them is.

    **Raises:** as `Path.error`.
    """
    again = again_of(path)
    if not np.isfinite(time):
        return np.nan
    if _ended_at(path, name, metric):
        finer = again()  # until then
        exact = float(np.asarray(finer.t)[-1]) if bool(finer.met) else np.nan
    else:
        exact = landed_crossing_time(again(None, path.t), name, metric, within=_WITHIN)
    return abs(time - exact)


_WITHIN = 0.01  # of its tolerance, to which the time of a finer run is landed on


def check_path(path: Given) -> None:
    """Raises unless it is one path."""
    if not isinstance(path, Path):
        raise ValueError(f"path: expected a gradflow.Path, got {word(path)}.")


class Path(eqx.Module):
    """A path θ(t) of a gradient flow, or of a descent, saved at n times.

    Every array has the n times as its first axis (after that of the lanes, inside a
    `Sweep`). Where a run failed, what comes after its end is NaN. Where it ended early
    as asked, by `until`, its end is the last of its times; where the number of times
    can't depend on that (under `jit` and `vmap`, in the arrays of a `Sweep`) the end is
    repeated, time and all. `path[i]` is the model at `path.t[i]`.
    """

    t: Float[Array, "*lanes n"]
    """The times, in the units of the flow (time t)."""
    weight_decay: Float[Array, " *lanes"]
    """λ; on a schedule, its mean over the run."""
    params: PyTree
    """The trainable parameters, stacked along the times."""
    static: PyTree
    """All the rest of the model."""
    metrics: dict[str, Float[Array, "..."]]
    """The metrics asked for, by name: of shape (*lanes, n), and more axes where a
    metric is an array."""
    train_loss: Float[Array, "*lanes n"]
    """F at the saved times."""
    penalty: Float[Array, "*lanes n"]
    """R at the saved times."""
    result: RESULTS
    """How the run ended."""
    stats: Stats
    """The solver, its tolerance, and the steps it took."""
    watched: dict[str, Metric]
    """The metrics themselves, with their thresholds."""
    again: Callable[..., "Path"] | None = eqx.field(
        default=None, metadata={"saved": False}
    )
    """`again(params, ts, start=0.0)` runs the same flow from given parameters through
    given times, from 0 on, which count from the time `start` of this path.
    `again(None, ts)` runs it from its own start, to one or two more digits, through
    the given times and one more before each; `again()` so until it ends, with what it
    was to run `until`. `None` for a descent and the flow of one, for paths made under
    `jit`, and where results were read from disk."""
    clock: Float[Array, "*lanes n"] | None = None
    """s at each time, where λ is on a schedule."""

    @property
    def slow_time(self) -> Float[Array, "*lanes n"]:
        """s = λt; on a schedule ∫λ dt."""
        if self.clock is not None:
            return self.clock
        return as_array(known(self.weight_decay)[..., None] * known(self.t))

    @property
    def models(self) -> PyTree:
        """The models as one, every array stacked along the times (what is frozen is
        repeated), so that `jax.vmap(f)(path.models)` is f of each. What else a model
        holds is no leaf of it, but does what it did."""
        return stacked(self.params, self.static, self.t.shape)

    def __getitem__(self, index: int | np.integer) -> PyTree:
        """The model at `t[index]`."""
        params = jax.tree.map(lambda p: taken(p, index), self.params)
        return eqx.combine(params, self.static)

    def __len__(self) -> int:
        return self.t.shape[0]

    @property
    def _decay(self) -> str:
        """λ, in words."""
        mean = "" if self.clock is None else " on average"
        return f"λ = {float(self.weight_decay):.3g}{mean}"

    def told(self, **more: Any) -> "Path":
        """The same path, with `more` in its `stats`, fields by their names."""
        stats = dataclasses.replace(self.stats, **more)
        return eqx.tree_at(lambda path: path.stats, self, stats)

    @property
    def succeeded(self) -> Array:
        """Whether the run reached its last time, or ended before as asked. (It may have
        `slid`: see `result`.)"""
        return is_success(self.result)

    @property
    def met(self) -> Array:
        """Whether it ended because what it was to run `until` has come."""
        return among(self.result, RESULTS.criterion_met)

    def to_its_end(self) -> "Path":
        """The path of one run without the times that repeat its end."""
        known = is_concrete(self.t) and is_known(self.result)
        if not known or not bool(self.met):
            return self
        t = np.asarray(self.t)
        ends = np.flatnonzero(t == t[-1])
        if ends.size < 2:
            return self
        rows = slice(1 + int(ends[0]))
        names = ("t", "params", "metrics", "train_loss", "penalty", "clock")
        along = {name: getattr(self, name) for name in names}

        def cut(x):  # unless it is what stands for parameters that were not stored
            return taken(x, rows) if hasattr(x, "shape") else x

        return dataclasses.replace(self, **jax.tree.map(cut, along))

    @property
    def verdict(self) -> str:
        """How the run ended, and what to do about it, in words."""
        of_descent = self.stats.deviation is not None
        solver = str(self.stats.solver)
        return in_words(self.result, solver, self.t.dtype, of_descent=of_descent)

    def crossing_time(self, name: str) -> float:
        """When metric `name` has passed its threshold for good, to about `rtol`: the
        flow is run again between the two saved times around the crossing. (Where it
        can't be, see `again`, it is interpolated: `gradflow.crossing_time`, to about
        `gradflow.crossing_error`.)

        **Returns:** a time t, as [`gradflow.crossing_time`][].

        **Raises:** `ValueError` where no metric has that name, or it is no single
        number.
        """
        check_choice(name, "name", tuple(self.watched))
        return landed_crossing_time(self, name, self.watched[name])

    def error(self, name: str) -> Float[np.ndarray, "n ..."]:
        """The error of what was recorded, m(θ(t)) − m(θ⋆(t)) with θ⋆ the exact path, at
        each of the saved times. Its size is the error bar.

        It is an estimate, by a finer run in the place of the exact one: from the same
        start, by the same solver, to a hundredth of `rtol` (more where that is beyond
        its order or the digits, a tenth at most), with two steps or more from
        each saved time to the next. That takes two to three times the steps of the run
        (RKC2 seven to eleven times), and with gradflow's solvers no new program. It is
        made once, for all names.

        In 289 runs, by four solvers of five problems to rtol from 1e-7 to 1e-3, it was
        within [½, 2] of the true error of a test loss in 99.3 % at the end, and at all
        saved times. What is known least is an error that happens to be a hundredth of
        its usual size, as where it changes sign; and nothing is known of one that both
        runs have in common, as over a pulse of λ that no step of either has seen.

        **Arguments:** `name`: of a metric; or `"train_loss"`, `"penalty"`.

        **Returns:** an array like what was recorded, on the host.

        **Raises:** `ValueError` for another name, for a path that failed or can't be
        run again (see `again`), and where no `rtol` is small enough that is not beyond
        the digits of the parameters; `RuntimeError` if the finer run fails.

        What becomes of the errors of single steps the linearised flow tells, backwards
        in time: ψ' = (∇²F + λ∇²R)ψ from ψ(T) = ∇m, ΣₖψₖᵀΔₖ (Cao, Petzold, SIAM J. Sci.
        Comput. 26, 2004). It has no use here. By the estimates that control the steps,
        made for their size alone, that was off by up to 400 times (within [½, 2] in 7
        of 24 runs). With Δₖ from finer runs of each piece it was right, as often as
        the difference of two runs is, and dearer than that.
        """
        own = {"train_loss": self.train_loss, "penalty": self.penalty}
        check_choice(name, "name", (*self.metrics, *own))
        recorded = (own | self.metrics)[name]
        finer = again_of(self)(None, self.t)
        exact = finer.metrics.get(name)
        exact = getattr(finer, name) if exact is None else exact
        return np.asarray(recorded) - np.asarray(exact)[1::2]

    def crossing_error(self, name: str) -> float:
        """How far `crossing_time` of metric `name` is off, a time: it is measured on
        the finer run of `error` as well, whatever the metric, which may jump. NaN where
        either has no crossing. (In 266 of those runs it was within [½, 2] of the true
        error in 99.6 %.)

        **Raises:** `ValueError` and `RuntimeError` as `error`.
        """
        time = self.crossing_time(name)
        again_of(self)
        metric = self.watched[name]
        return crossing_time_error(self, name, metric, time)

    @property
    def slow_speed(self) -> Scalar:
        """‖dθ/ds‖/‖θ‖ over the last two saved times: how fast the drift still is, in
        units of slow time. Scaled by λ on purpose: the plain speed ‖θ'‖ is small from
        the moment the data are fitted, long before the drift begins."""
        return relative_speed(self.params, self.slow_time)

    @property
    def stationary(self) -> Array:
        """Whether the drift has come to rest: `slow_speed` below 1e-3."""
        return as_array(known(self.slow_speed) < 1e-3)

    def __str__(self) -> str:
        d = sum(p.size for p in jax.tree.leaves(self.params)) // len(self)
        t, s = (float(np.asarray(x)[-1]) for x in (self.t, self.slow_time))
        lines = [
            f"Path of {d} parameters, {self._decay}, t = 0 … {t:.3g} "
            f"(s = {s:.3g}), {len(self)} times",
            f"  {self.stats}",
            f"  {trend('train loss', self.train_loss)}"
            + "".join(f", {trend(k, v)}" for k, v in self.metrics.items()),
        ]
        if not bool(self.succeeded):
            lines.append(f"  FAILED: {self.verdict}")
        elif bool(slid(self)):
            lines.append(f"  WARNING: {RESULTS[RESULTS.slid]}")
        if self.stats.until and bool(self.succeeded):
            come = f"met at t = {t:.6g}" if bool(self.met) else "not met"
            lines.append(f"  criterion {come}: {self.stats.until}")
            lower = [
                passing(k) for k, m in self.watched.items() if not m.higher_is_better
            ]
            if bool(self.met) and t == 0 and self.stats.until in lower:
                lines.append(
                    "  It held from the start. What is better where it is higher, as "
                    "an accuracy of yours, takes "
                    "gradflow.Metric(…, higher_is_better=True)."
                )
        if bool(self.succeeded) and not bool(slid(self)) and self._drifts:
            state = "at rest" if bool(self.stationary) else "still drifting"
            lines.append(f"  {state}: ‖dθ/ds‖/‖θ‖ = {float(self.slow_speed):.2g}")
        eps = float(np.finfo(self.t.dtype).eps)
        least = self.stats.conditioning
        if least is not None and float(least) < max(_SINGULAR, 100 * eps):
            size = f"at most about {float(least):.1g}"
            size = size if float(least) > eps else "below rounding"
            lines += [
                f"  the Jacobian is losing rank, σ_min²/σ_max² is {size}:",
                "    the path stands, theory may not; see gf.manifold.spectrum",
            ]
        return "\n".join(lines)

    @property
    def _drifts(self) -> bool:
        """Whether there is a drift, and its speed is known."""
        return float(self.weight_decay) > 0 and len(self) > 1

    def __repr__(self) -> str:
        if not is_concrete(self.t) or self.t.ndim != 1 or not is_known(self.result):
            return f"<Path of times {self.t.shape}>"
        return (
            f"<Path by {self.stats.solver}, {self._decay}, {len(self)} times to "
            f"t = {float(np.asarray(self.t)[-1]):.3g}: {ended(self)}>"
        )

    def _repr_html_(self) -> str:
        from .. import plot

        return plot.as_html(str(self), lambda ax: plot.path(self, ax))

    def to_xarray(self) -> Any:
        """An `xarray.Dataset` along `time`: `t`, `slow_time`, `train_loss`, `penalty`,
        `metric_NAME` (where that is an array, along dimensions `metric_NAME_0`, … of
        its own) and `threshold_NAME`, what the solver counted (`steps`, …), and
        `result`, whose attributes give the meanings of its values."""
        lam = float(self.weight_decay)
        return one_dataset(self, "t", "slow_time", weight_decay=lam)

    def plot(self, **kwargs: Any) -> Any:
        """The figure of losses, metrics and penalty against time, as
        [`gradflow.plot.path`][] draws it; `kwargs` are its options."""
        from .. import plot

        return plot.path(self, **kwargs)


_SINGULAR = 1e-6


def slid(paths: Any) -> Bool[Array, "*lanes"]:
    """Whether a path, or each of many, slid along kinks of the loss, and is exact to
    three digits only. The result says so, unless it is `criterion_met`."""
    told, met = (
        np.asarray(among(paths.result, one))
        for one in (RESULTS.slid, RESULTS.criterion_met)
    )
    count = paths.stats.sliding
    more = False if count is None else met & (np.asarray(count) > 0)
    return as_array(told | more)


def ended(path: Any) -> str:
    """How a path, or what is saved like one, ended, in one word."""
    if among(path.result, RESULTS.slid):
        return "slid"
    if among(path.result, RESULTS.criterion_met):
        return "criterion met"
    return "successful" if bool(path.succeeded) else "FAILED"


def trend(name: str, values: Array) -> str:
    """From the first to the last of the values that there are; of arrays, the smallest
    and the largest number."""
    v = np.asarray(values)
    rows = v.reshape(len(v), -1)
    finite = rows[np.isfinite(rows).all(axis=1)]
    ends = (rows[0], finite[-1] if len(finite) else np.full_like(rows[0], np.nan))
    if v.ndim == 1:
        return f"{name} " + " → ".join(f"{x[0]:.3g}" for x in ends)
    return f"{name} " + " → ".join(f"({x.min():.3g} … {x.max():.3g})" for x in ends)


def relative_speed(params: PyTree, times: Array) -> Scalar:
    """‖Δθ‖/(‖θ‖ Δt) over the last two of stacked parameters at these times."""
    leaves, times = jax.tree.leaves(params), known(times)
    if times.size < 2:
        return as_array(np.nan, times.dtype)
    last, before = ([known(taken(p, i)) for p in leaves] for i in (-1, -2))
    # Where θ is zero, or did not come that far, there is no speed.
    with np.errstate(divide="ignore", invalid="ignore"):
        step = size([a - b for a, b in zip(last, before, strict=True)])
        return as_array(step / (size(last) * (times[-1] - times[-2])))
