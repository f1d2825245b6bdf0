"""Settings, rows and figures."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import gradflow as gf

from ..shared.command import parse_weight_decay, Settings
from ..shared.figures import SIZE
from ..shared.record import pack, unpack
from ..shared.rows import attempt, check, decades, Row

ORDERS = ("#0072B2", "#D55E00")
SCALES = ("#009E73", "#0072B2", "#CC79A7")
USUAL = 0.0  # in place of an initial scale: that of the task


class Case(NamedTuple):
    """A task, the slow time to run it to, and initial scales to compare."""

    make: Callable[..., gf.tasks.Task]
    slow_time: float
    scales: tuple[float, ...] = ()


three_layers = functools.partial(
    gf.tasks.teacher_student, hidden_layers=2, width=16, samples=8
)

CASES = {
    "linear": Case(gf.tasks.linear_regression, 3.0),
    "diagonal": Case(gf.tasks.diagonal_network, 3.0, (0.5, 0.7, 1.0)),
    "completion": Case(gf.tasks.matrix_completion, 3.0),
    "tanh": Case(gf.tasks.teacher_student, 2.0, (1.5, 2.0, 3.0)),
    "three_layer_tanh": Case(
        functools.partial(three_layers, init_scale=3.0), 1.0, (2.5, 3.0, 4.0)
    ),
}

Reports = dict[tuple[str, float], gf.Report]
"""Of each task from each initial scale."""


@dataclasses.dataclass(frozen=True)
class TheoryLimits(Settings):
    """The error of the theory, its validity, and the times it predicts.

    Quick, five minutes of a core: four λ, no initial scales but the usual ones, and no
    completion.
    """

    tasks: tuple[str, ...] = ()
    """Which of linear, diagonal, completion, tanh and three_layer_tanh; all unless
    given, and without completion if quick."""
    weight_decay: tuple[str, ...] = ("1e-2:1e-6:9",)
    """Weight decays: numbers, or ranges such as 1e-2:1e-6:9 (evenly in the logarithm);
    1e-2:1e-5:4 if quick."""

    QUICK = dict(
        tasks=tuple(name for name in CASES if name != "completion"),
        weight_decay=("1e-2:1e-5:4",),
    )

    def names(self) -> tuple[str, ...]:
        unknown = [name for name in self.tasks if name not in CASES]
        if unknown:
            raise SystemExit(f"tasks: no {unknown[0]!r} here, only {', '.join(CASES)}.")
        return self.tasks or tuple(CASES)

    def compute(self) -> xr.Dataset:
        reports: Reports = {}
        for name in self.names():
            make, slow_time, scales = CASES[name]
            reports[name, USUAL] = report = self.compare(make, slow_time)
            print(f"{name}\n{report}", flush=True)
            for scale in () if self.quick else scales:
                from_there = functools.partial(make, init_scale=scale)
                reports[name, scale] = self.compare(from_there, slow_time)
        return dataset(reports).merge(pack(reports=reports))

    def compare(self, make: Callable[..., gf.tasks.Task], s: float) -> gf.Report:
        """Theory of order 2 against simulation."""
        task = make(jr.key(self.seed))
        # The tolerance sets how finely paths are interpolated, the floor below.
        theory = gf.two_phase(
            task.flow, task.model, slow_time=s, metrics=task.metrics, rtol=1e-12,
            order=2, throw=False,
        )  # fmt: skip
        sweep = gf.sweep(
            task.flow, task.model, slow_time=s, saves=193, metrics=task.metrics,
            weight_decay=jnp.asarray(parse_weight_decay(self.weight_decay)),
            solver=gf.KKT5(), rtol=1e-10,
        )  # fmt: skip
        return gf.compare(sweep, theory)

    def judge(self, data: xr.Dataset) -> list[Row]:
        reports, rows = unpack(data, "reports"), []
        for (name, scale), report in reports.items():
            if scale == USUAL:
                rows += attempt(accuracy, name, report, self.quick)
            if scale in of_task(reports, name):
                rows += attempt(times, name, scale, report)
        return rows

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        reports: Reports = unpack(data, "reports")
        usual = {name: r for (name, scale), r in reports.items() if scale == USUAL}
        figures = {"errors": errors(usual), "horizons": horizons(usual)}
        scaled = {name: of_task(reports, name) for name in usual if CASES[name].scales}
        if scaled:
            figures["grokking_times"] = grokking_times(scaled)
        return figures


def of_task(reports: Reports, task: str) -> dict[float, gf.Report]:
    """Those from the initial scales that are compared, or else from the usual one."""
    found = {scale: r for (name, scale), r in reports.items() if name == task}
    several = {scale: r for scale, r in found.items() if scale != USUAL}
    return several or found


def accuracy(name: str, report: gf.Report, quick: bool = False) -> list[Row]:
    """The rate of order 2, and what it gains at λ = 1e-3. A rate takes three λ that are
    small enough and whose error is above that of the runs; of the few of `quick` there
    may be two, and it is not judged."""
    rate = report.orders[2].rate
    span, enough = decades(report.weight_decay[rate.used]), rate.used.sum() > 2
    told = str(rate)
    if quick and not enough:
        told += f": not judged, by {rate.used.sum()} of {rate.used.size} λ"
    i = int(np.argmin(np.abs(np.log(report.weight_decay / 1e-3))))
    gain = report.orders[1].sup[i] / report.orders[2].sup[i]
    sentence = f"error of order 1 over order 2 at λ = {report.weight_decay[i]:.1e}"
    # On the linear and the completion task the error may sink to the tolerance sooner.
    wide = check(
        f"{name}: span", span + 1e-9, "≥ 2 decades", "in λ, of that rate",
        given=CASES[name].scales and (enough or not quick),
    )  # fmt: skip
    return [
        check(f"{name}: rate", rate.exponent, "2 ± 0.15", f"error of order 2, {told}",
              given=enough or not quick, also=enough),
        wide,
        check(f"{name}: gain", gain, "≥ 10", sentence),
    ]  # fmt: skip


def times(name: str, scale: float, report: gf.Report) -> list[Row]:
    """Predicted against measured grokking times, for every λ ≤ 1e-3 whose threshold is
    crossed while theory is valid."""
    lams, measured = report.weight_decay, report.grokked.measured
    off = np.abs(report.grokked.predicted / measured - 1)
    small = (lams <= 1.001e-3) & np.isfinite(measured)
    due = small & (lams * measured <= 0.98 * report.valid_until)
    label = f"{name}: grokking" + ("" if scale == USUAL else f", scale {scale:g}")
    sentence = f"{due.sum()} λ ≤ 1e-3; {np.sum(small & ~due)} beyond validity, refused"
    # NaN, which fails, where one is missing.
    worst = off[due].max() if due.any() else np.nan
    return [check(label, worst, "≤ 0.02", sentence, given=due.any())]


def errors(reports: dict[str, gf.Report]) -> Figure:
    """Error against λ at orders 1 and 2, with their error bars."""
    fig, axes = _row(len(reports))
    for (name, report), ax in zip(reports.items(), axes, strict=True):
        lams = report.weight_decay
        for (k, order), colour in zip(report.orders.items(), ORDERS, strict=True):
            label = f"order {k}, rate {order.rate.exponent:.2f}"
            ax.loglog(lams, order.sup, "o-", color=colour, lw=1.8, label=label)
            ax.loglog(lams, order.next_term, "--", color=colour, lw=1.2)
        ax.plot([], [], "--", color="grey", lw=1.2, label="next term (error bar)")
        s, eta = report.theory.drift.s, report.theory.smallest_curvature
        limit = float(np.interp(report.regular_until, np.asarray(s), eta)) / 10
        if lams.min() < limit < 10 * lams.max():
            ax.axvline(limit, color="black", ls=":", label="validity: $\\eta/10$")
        _label(ax, name, "weight decay $\\lambda$")
    axes[0].set_ylabel("largest error over $\\|\\Phi\\|$", fontsize=SIZE)
    return fig


def horizons(reports: dict[str, gf.Report]) -> Figure:
    """Error of order 2 along the drift, and where theory stops being claimed."""
    fig, axes = _row(len(reports))
    for (name, report), ax in zip(reports.items(), axes, strict=True):
        colours = gf.plot.Colours(report.weight_decay)
        slow = np.asarray(report.sweep.slow_time)
        for i, error in enumerate(np.asarray(report.orders[2].error)):
            here = (error > 0) & (slow[i] > 1e-4)
            ax.loglog(slow[i][here], error[here], color=colours(i), lw=1.4)
            until = report.valid_until[i]
            if until > 0:
                at = np.interp(until, slow[i], error)
                ax.plot(until, at, "o", color=colours(i), mec="black", ms=6)
        ax.plot([], [], "o", color="white", mec="black", label="valid up to here")
        _label(ax, name, "slow time $s = \\lambda t$")
    axes[0].set_ylabel("error of order 2 over $\\|\\Phi\\|$", fontsize=SIZE)
    lams = next(iter(reports.values())).weight_decay
    gf.plot.colorbar(lams, fig, list(axes))
    return fig


def grokking_times(scaled: dict[str, dict[float, gf.Report]]) -> Figure:
    """Measured and predicted grokking times, and how far they are apart."""
    fig, axes = plt.subplots(
        2, len(scaled), figsize=(4.6 * len(scaled) + 0.6, 7.6), sharex=True,
        squeeze=False, height_ratios=(1.6, 1), layout="constrained",
    )  # fmt: skip
    for (name, found), (top, low) in zip(scaled.items(), axes.T, strict=True):
        for (scale, report), colour in zip(found.items(), SCALES, strict=False):
            lams, time = report.weight_decay, report.grokked.measured
            predicted = report.grokked.predicted
            label = "measured" if scale == USUAL else f"initial scale {scale:g}"
            top.loglog(lams, time, "o", color=colour, label=label)
            top.loglog(lams, predicted, "-", color=colour, lw=1.4)
            horizon = np.where(report.valid_until > 0, report.valid_until, np.nan)
            top.loglog(lams, horizon / lams, ":", color=colour, lw=1.4)
            off = np.maximum(np.abs(predicted / time - 1), 1e-9)
            low.loglog(lams, off, "o-", color=colour, lw=1.4)
            bar = report.grokked.error / time
            low.loglog(lams, bar, "--", color=colour, lw=1.2)
        top.plot([], [], "-", color="grey", label="predicted")
        top.plot([], [], ":", color="grey", label="theory valid up to here")
        low.axhline(0.02, color="black", lw=1, ls=":", label="2 %")
        low.plot([], [], "--", color="grey", label="estimated")
        _label(top, name, "")
        _label(low, "", "weight decay $\\lambda$")
    axes[0, 0].set_ylabel("grokking time $t$", fontsize=SIZE)
    axes[1, 0].set_ylabel("relative error", fontsize=SIZE)
    return fig


def _row(count: int) -> tuple[Figure, Any]:
    size = (3.9 * count + 0.6, 4.4)
    fig, axes = plt.subplots(
        1, count, squeeze=False, figsize=size, layout="constrained"
    )
    return fig, axes[0]


def _label(ax: Axes, title: str, x: str) -> None:
    ax.set_title(title.replace("_", " "), fontsize=SIZE + 1)
    ax.set_xlabel(x, fontsize=SIZE)
    ax.tick_params(labelsize=SIZE - 1)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=SIZE - 2)


def dataset(reports: Reports) -> xr.Dataset:
    """Errors and times, labelled by task, initial scale (0: the usual one) and λ."""
    found = list(reports.values())
    each = {
        "sup_error_regular": [r.orders[1].sup for r in found],
        "sup_second_error": [r.orders[2].sup for r in found],
        "valid_until": [r.valid_until for r in found],
        "grokking_time": [r.grokked.measured for r in found],
        "predicted_grokking_time": [r.grokked.predicted for r in found],
        "predicted_grokking_error": [r.grokked.error for r in found],
    }
    tasks, scales = zip(*reports, strict=True)
    lams = next(iter(reports.values())).weight_decay
    return xr.Dataset(
        {k: (("run", "weight_decay"), np.stack(v)) for k, v in each.items()},
        {"task": ("run", list(tasks)), "scale": ("run", list(scales)),
         "weight_decay": lams},
    )  # fmt: skip
