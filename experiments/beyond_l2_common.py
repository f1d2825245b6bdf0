"""What the experiments of `beyond_l2.py` share: settings, outcomes, fits, figures."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from common import Row
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from tqdm.auto import tqdm

import gradflow as gf
from gradflow.plot import SIZE

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "black")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of every experiment."""

    seed: int = 0
    """Of the data and the start."""
    out: Path | None = None
    """Folder for the results; results/beyond_l2/NAME by default."""
    quick: bool = False
    """A minute or so: fewer or shorter runs, the same checks where they can be made."""


class Outcome(NamedTuple):
    """What an experiment gives."""

    numbers: dict[str, Any]
    checks: list[Row]
    data: xr.Dataset
    figures: dict[str, Figure]


def law(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """The slope of log y against log x, by least squares; NaN below two points."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    good = np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0)
    if np.unique(x[good]).size < 2:
        return np.nan
    return float(np.polyfit(np.log(x[good]), np.log(y[good]), 1)[0])


def decades(x: Iterable[float]) -> float:
    x = np.asarray(list(x))
    return float(np.log10(x.max() / x.min())) if x.size else 0.0


def spread(values: Sequence[float] | np.ndarray) -> float:
    """How far the values are from their geometric mean, at most, as a fraction."""
    logs = np.log(np.asarray(values, float))
    return float(np.exp(np.abs(logs - logs.mean()).max()) - 1)


def rank_correlation(x: Any, y: Any) -> float:
    """Spearman's; NaN where one of them is constant."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.nan
    return float(spearmanr(x, y)[0])  # pyright: ignore[reportArgumentType]


def check(name: str, value: Any, bound: str, ok: Any, sentence: str) -> Row:
    """A row; `ok` None where the criterion can't be judged here."""
    verdict = None if ok is None else bool(ok)
    return Row(name, float(value), bound, verdict, sentence)


def slope_row(name: str, slope: float, target: float, within: float, what: str) -> Row:
    ok = abs(slope - target) <= within
    return check(name, slope, f"{target:g} ± {within:g}", ok, what)


def relative(a: Any, b: Any) -> float:
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(b))


def steps_until(last: int, saves: int, dense: int = 0) -> np.ndarray:
    """Steps to save: the first `dense` ones, and some evenly in the logarithm."""
    return np.union1d(np.arange(min(dense, last) + 1), gf.log_spaced_steps(last, saves))


def bar(items: Iterable[Any], name: str) -> Iterable[Any]:
    return tqdm(list(items), desc=name, leave=False)


def timed(fn: Callable[[], gf.Path]) -> tuple[gf.Path, float, float]:
    """A path, and the seconds of a first run and of the median of three more, which
    are without compilation."""
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        path = fn()
        jax.block_until_ready(path.params)
        seconds.append(time.perf_counter() - start)
    return path, seconds[0], float(np.median(seconds[1:]))


def padded(task: gf.tasks.Task, rows: int) -> gf.tasks.Task:
    """The same task with measurements of zero added, which change nothing: tasks of
    different N then share what is compiled."""
    loss = task.loss
    if not isinstance(loss, gf.SquaredError):
        raise ValueError(f"task: expected a squared error, got {type(loss).__name__}.")
    more = rows - loss.y.shape[0]
    x, y = jnp.pad(loss.x, ((0, more), (0, 0))), jnp.pad(loss.y, (0, more))
    loss = gf.SquaredError(x, y, reduction="sum")
    train = gf.tasks.RelativeError(loss.outputs, loss.y)
    metrics = {**task.metrics, "train": eqx.tree_at(_fn, task.metrics["train"], train)}
    return dataclasses.replace(task, loss=loss, metrics=metrics)


def _fn(metric: gf.Metric) -> Any:
    return metric.fn


class Trace(NamedTuple):
    """A path of a linear model, and what the paper's panels show of it."""

    t: np.ndarray
    steps: np.ndarray
    """t/α; of a flow, what a descent of that α would take."""
    a: np.ndarray
    """Coefficients, one row a time."""
    train: np.ndarray
    test: np.ndarray
    ratio: np.ndarray
    """β‖H‖/‖G‖, of the penalty's and the data's force."""
    l1: np.ndarray
    l2: np.ndarray


def trace(
    path: gf.Path, truth: Any, alpha: float, subgradient: Callable = np.sign
) -> Trace:
    a = np.asarray(truth.coefficients(path.models))
    x, y = np.asarray(truth.features), np.asarray(truth.targets)
    pull = np.linalg.norm((a @ x.T - y) @ x, axis=1)
    push = float(path.weight_decay) * np.linalg.norm(subgradient(a), axis=1)
    with np.errstate(divide="ignore"):
        ratio = push / pull
    return Trace(
        t=np.asarray(path.t),
        steps=np.asarray(path.t) / alpha,
        a=a,
        train=np.asarray(path.metrics["train"]),
        test=np.asarray(path.metrics["test"]),
        ratio=ratio,
        l1=np.abs(a).sum(axis=1),
        l2=np.linalg.norm(a, axis=1),
    )


def dataset(traces: dict[str, Trace], **attrs: Any) -> xr.Dataset:
    """Every trace under its name."""
    arrays: dict[str, Any] = {}
    for name, one in traces.items():
        key = name.replace(" ", "_")
        for field, value in one._asdict().items():
            dims = (f"{key}_time", "coordinate")[: value.ndim]
            arrays[f"{key}_{field}"] = (dims, value)
    return xr.Dataset(arrays, attrs=attrs)


def panels(
    count: int, columns: int = 2, size: tuple[float, float] = (5.4, 3.8)
) -> tuple[Figure, list[Axes]]:
    rows = -(-count // columns)
    fig, axes = plt.subplots(
        rows, columns, figsize=(size[0] * columns, size[1] * rows),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for ax in axes.flat[count:]:
        ax.remove()
    return fig, list(axes.flat[:count])


def finish(
    ax: Axes,
    title: str,
    x: str = "step",
    y: str = "",
    *,
    log: str = "xy",
    legend: bool = True,
) -> None:
    if "x" in log:
        ax.set_xscale("log")
    if "y" in log:
        ax.set_yscale("log")
    ax.set_title(title, fontsize=SIZE, loc="left")
    ax.set_xlabel(x, fontsize=SIZE)
    ax.set_ylabel(y, fontsize=SIZE)
    ax.grid(alpha=0.25, lw=0.5)
    if legend and ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=SIZE - 2, frameon=False)


def marks(ax: Axes, times: dict[str, float]) -> None:
    """Dotted verticals with names at their foot, the last on the right."""
    shown = {k: v for k, v in times.items() if np.isfinite(v) and v > 0}
    last = max(shown.values(), default=0.0)
    for label, at in shown.items():
        ax.axvline(at, color="grey", ls=":", lw=1)
        ax.text(
            at, 0.02, f" {label} ", transform=ax.get_xaxis_transform(),
            ha="left" if at == last else "right", fontsize=SIZE - 3, color="grey",
        )  # fmt: skip


def story(
    traces: dict[str, Trace],
    target: np.ndarray,
    times: dict[str, float],
    title: str,
    support: np.ndarray | None = None,
) -> Figure:
    """The paper's panels: errors, the ratio of the forces, norms, components."""
    fig, axes = panels(4)
    for (name, one), colour in zip(traces.items(), COLOURS, strict=False):
        x = one.steps
        flow = name == "flow"
        style: dict[str, Any] = dict(color=colour, lw=3 if flow else 1.3)
        style["alpha"] = 0.45 if flow else 1.0
        axes[0].plot(x[1:], one.test[1:], label=f"recovery, {name}", **style)
        axes[0].plot(x[1:], np.maximum(one.train[1:], 1e-17), ls="--", **style)
        if one.ratio[-1] < 1e6:  # where data are fitted to rounding it means nothing
            axes[1].plot(x[1:], one.ratio[1:], label=name, **style)
        axes[2].plot(x[1:], one.l1[1:], label=f"$\\ell_1$, {name}", **style)
        axes[2].plot(x[1:], one.l2[1:], ls="--", **style)
    axes[0].set_ylim(bottom=1e-8)
    axes[2].axhline(np.abs(target).sum(), color="black", ls=":", lw=1)
    name, trace = next(iter(traces.items()))
    on = np.flatnonzero(target) if support is None else support
    off = np.setdiff1d(np.arange(target.size), on)
    axes[3].plot(trace.steps[1:], trace.a[1:, off], color="lightgrey", lw=0.5)
    for i, colour in zip(on, COLOURS * len(on), strict=False):
        axes[3].plot(trace.steps[1:], trace.a[1:, i], color=colour, lw=1.5)
        axes[3].axhline(target[i], color=colour, ls=":", lw=0.8)
    finish(axes[0], f"{title}: errors (dashed: train)", y="relative error")
    finish(axes[1], "ratio of forces $\\beta\\|H\\|/\\|G\\|$")
    finish(axes[2], "norms (dashed: $\\ell_2$; dotted: $\\|a^*\\|_1$)", log="x")
    finish(axes[3], f"components, {name} (grey: off the support)", log="x")
    axes[1].axhline(1, color="black", lw=0.6)
    for ax in axes:
        marks(ax, times)
    return fig
