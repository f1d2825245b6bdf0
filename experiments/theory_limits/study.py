"""Where the two-phase theory holds, and how well: its error at order 1 and 2 against
weight decay, the slow time up to which it is valid, and the grokking times it predicts.

Runs five smooth tasks for many weight decays, and three of them from three initial
scales. Writes summary.json, limits.nc and three figures.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.random as jr
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import gradflow as gf
from gradflow.plot import SIZE

from ..shared.common import attempt, Clock, near, parse_weight_decay, Row, write

ORDERS = ("#0072B2", "#D55E00")
SCALES = ("#009E73", "#0072B2", "#CC79A7")


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


@dataclasses.dataclass(frozen=True)
class Config:
    tasks: tuple[str, ...] = ()
    """Which of linear, diagonal, completion, tanh and three_layer_tanh; all unless
    given, and without completion if quick."""
    weight_decay: tuple[str, ...] = ()
    """Weight decays: numbers, or ranges such as 1e-2:1e-6:9 (evenly in the logarithm),
    the default; 1e-2:1e-5:4 if quick."""
    seed: int = 0
    """Of the data and the initial weights."""
    out: Path = Path("results/theory_limits")
    """Folder for the results."""
    quick: bool = False
    """Fewer tasks, weight decays and initial scales; the same checks."""

    def lams(self) -> np.ndarray:
        default = "1e-2:1e-5:4" if self.quick else "1e-2:1e-6:9"
        return parse_weight_decay(self.weight_decay or (default,))

    def names(self) -> tuple[str, ...]:
        unknown = [name for name in self.tasks if name not in CASES]
        if unknown:
            raise SystemExit(f"tasks: no {unknown[0]!r} here, only {', '.join(CASES)}.")
        default = tuple(n for n in CASES if not (self.quick and n == "completion"))
        return self.tasks or default


def main(config: Config) -> dict[str, Any]:
    """Runs every task; returns what is written to summary.json."""
    matplotlib.use("Agg")
    config.out.mkdir(parents=True, exist_ok=True)
    clock = Clock()
    reports, scaled, checks = {}, {}, []
    for name in config.names():
        case = CASES[name]
        with clock(name):
            reports[name] = report = compare(case.make, case.slow_time, config)
            print(f"{name}\n{report}")
            checks += attempt(accuracy, name, report)
            found = {}
            for scale in () if config.quick else case.scales:
                make = functools.partial(case.make, init_scale=scale)
                found[scale] = compare(make, case.slow_time, config)
            scaled[name] = found or {None: report}
            for scale, each in scaled[name].items():
                checks += attempt(times, name, scale, each)
    figures = {"errors": errors(reports), "horizons": horizons(reports)}
    grokking = {n: scaled[n] for n in reports if CASES[n].scales}
    if grokking:
        figures["grokking_times"] = grokking_times(grokking)
    dataset(reports).to_netcdf(config.out / "limits.nc", engine="scipy")
    numbers = {
        "reports": {
            name: {str(scale or "default"): summarise(r) for scale, r in found.items()}
            for name, found in scaled.items()
        },
        "settings": {
            "weight_decay": list(config.lams()),
            "seed": config.seed,
            "quick": config.quick,
        },
    }
    summary = write(config.out, numbers, checks, figures, clock)
    print(f"Written to {config.out}: summary.json, limits.nc and {', '.join(figures)}")
    return summary


def compare(
    make: Callable[..., gf.tasks.Task], slow_time: float, config: Config
) -> gf.Report:
    """Theory of order 2 against simulation."""
    task = make(jr.key(config.seed))
    theory = gf.two_phase(
        task.flow,
        task.model,
        slow_time=slow_time,
        metrics=task.metrics,
        rtol=1e-12,  # sets how finely its paths are interpolated, the floor below
        order=2,
        throw=False,
    )
    sweep = gf.sweep(
        task.flow,
        task.model,
        weight_decay=jnp.asarray(config.lams()),
        slow_time=slow_time,
        saves=193,
        metrics=task.metrics,
        solver=gf.KKT5(),
        rtol=1e-10,
    )
    return gf.compare(sweep, theory)


# Checks


def accuracy(name: str, report: gf.Report) -> list[Row]:
    """The rate of order 2, and what it gains at λ = 1e-3."""
    rate = report.second_rate
    span = report.weight_decay[rate.used]
    decades = float(np.log10(span.max() / span.min())) if span.size else 0.0
    # On the linear and the completion task the error may sink to the tolerance sooner.
    wide = bool(decades >= 2 - 1e-9) if CASES[name].scales else None
    rows = [
        near(f"{name}: rate", rate.exponent, 2.0, 0.15, f"error of order 2, {rate}"),
        Row(f"{name}: span", decades, "≥ 2 decades", wide, "in λ, of that rate"),
    ]
    i = int(np.argmin(np.abs(np.log(report.weight_decay / 1e-3))))
    gain = report.sup_error_regular[i] / report.sup_second_error[i]
    sentence = f"error of order 1 over order 2 at λ = {report.weight_decay[i]:.1e}"
    return [
        *rows,
        Row(f"{name}: gain", float(gain), "≥ 10", bool(gain >= 10), sentence),
    ]


def times(name: str, scale: float | None, report: gf.Report) -> list[Row]:
    """Predicted against measured grokking times, for every λ ≤ 1e-3 whose threshold is
    crossed while theory is valid."""
    lams, measured = report.weight_decay, report.grokking_time
    off = np.abs(report.predicted_grokking_time / measured - 1)
    small = (lams <= 1.001e-3) & np.isfinite(measured)
    due = small & (lams * measured <= 0.98 * report.valid_until)
    label = f"{name}: grokking" + ("" if scale is None else f", scale {scale:g}")
    sentence = f"{due.sum()} λ ≤ 1e-3; {np.sum(small & ~due)} beyond validity, refused"
    if not due.any():
        return [Row(label, np.nan, "≤ 0.02", None, sentence)]
    worst = float(off[due].max())  # NaN, which fails, where one is missing
    return [Row(label, worst, "≤ 0.02", bool(worst <= 0.02), sentence)]


# Figures


def errors(reports: dict[str, gf.Report]) -> Figure:
    """Error against λ at orders 1 and 2, with their error bars."""
    fig, axes = _row(len(reports))
    for (name, report), ax in zip(reports.items(), axes, strict=True):
        lams = report.weight_decay
        found = (report.sup_error_regular, report.sup_second_error)
        rates = (report.rate, report.second_rate)
        for k, (error, rate, colour) in enumerate(
            zip(found, rates, ORDERS, strict=True)
        ):
            label = f"order {k + 1}, rate {rate.exponent:.2f}"
            ax.loglog(lams, error, "o-", color=colour, lw=1.8, label=label)
            ax.loglog(lams, report.next_term[k], "--", color=colour, lw=1.2)
        ax.plot([], [], "--", color="grey", lw=1.2, label="next term (error bar)")
        limit = float(np.interp(report.regular_until, *_curvature(report))) / 10
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
        for i, error in enumerate(np.asarray(report.second_error)):
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


def grokking_times(scaled: dict[str, dict[float | None, gf.Report]]) -> Figure:
    """Measured and predicted grokking times, and how far they are apart."""
    fig, axes = plt.subplots(
        2,
        len(scaled),
        figsize=(4.6 * len(scaled) + 0.6, 7.6),
        sharex=True,
        squeeze=False,
        height_ratios=(1.6, 1),
        layout="constrained",
    )
    for (name, found), (top, low) in zip(scaled.items(), axes.T, strict=True):
        for (scale, report), colour in zip(found.items(), SCALES, strict=False):
            lams, time = report.weight_decay, report.grokking_time
            predicted = report.predicted_grokking_time
            label = "measured" if scale is None else f"initial scale {scale:g}"
            top.loglog(lams, time, "o", color=colour, label=label)
            top.loglog(lams, predicted, "-", color=colour, lw=1.4)
            horizon = np.where(report.valid_until > 0, report.valid_until, np.nan)
            top.loglog(lams, horizon / lams, ":", color=colour, lw=1.4)
            off = np.maximum(np.abs(predicted / time - 1), 1e-9)
            low.loglog(lams, off, "o-", color=colour, lw=1.4)
            bar = report.predicted_grokking_error / time
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
        1, count, figsize=size, squeeze=False, layout="constrained"
    )
    return fig, axes[0]


def _label(ax: Axes, title: str, x: str) -> None:
    ax.set_title(title.replace("_", " "), fontsize=SIZE + 1)
    ax.set_xlabel(x, fontsize=SIZE)
    ax.tick_params(labelsize=SIZE - 1)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=SIZE - 2)


def _curvature(report: gf.Report) -> tuple[np.ndarray, np.ndarray]:
    theory = report.theory
    return np.asarray(theory.drift.t), np.asarray(theory.smallest_curvature)


# Numbers


def summarise(report: gf.Report) -> dict[str, Any]:
    names = (
        "sup_error_regular",
        "sup_second_error",
        "next_term",
        "regular_until",
        "valid_until",
        "grokking_time",
        "predicted_grokking_time",
        "predicted_grokking_error",
    )
    return {
        **{name: getattr(report, name) for name in names},
        "rate": report.rate.exponent,
        "second_rate": report.second_rate.exponent,
        "text": str(report),
    }


def dataset(reports: dict[str, gf.Report]) -> xr.Dataset:
    """Errors and times, labelled by task and λ."""
    dims = ("task", "weight_decay")
    names = ("sup_error_regular", "sup_second_error", "valid_until", "grokking_time")
    names += ("predicted_grokking_time", "predicted_grokking_error")
    stack = lambda name: np.stack([getattr(r, name) for r in reports.values()])
    lams = next(iter(reports.values())).weight_decay
    coords = {"task": list(reports), "weight_decay": lams}
    return xr.Dataset({name: (dims, stack(name)) for name in names}, coords=coords)
