"""Figures: panels, their titles and marks."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "black")
SIZE = 11  # of all text, in points, as in gradflow's figures


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
    if ax.has_data():  # lines of which no point is finite leave no limits
        if "x" in log and not np.isfinite(ax.dataLim.minposx):
            ax.set_xlim(1, 10)
        if "y" in log and not np.isfinite(ax.dataLim.minposy):
            ax.set_ylim(1, 10)
    ax.set_title(title, fontsize=SIZE, loc="left")
    ax.set_xlabel(x, fontsize=SIZE)
    ax.set_ylabel(y, fontsize=SIZE)
    ax.grid(alpha=0.25, lw=0.5)
    if legend and ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=SIZE - 2, frameon=False)


def label_few(figure: Figure) -> None:
    """1, 2 and 5 on the logarithmic axes of a decade or two, where by default most
    digits have a label in powers of ten, one over the other. For a figure that is
    ready: it goes by the limits."""
    for ax in figure.axes:
        for axis, limits in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
            low, high = sorted(limits)
            few = 1e-4 <= low and high <= 1e5 and high < 100 * low
            if axis.get_scale() == "log" and few:
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter(StrMethodFormatter("{x:g}"))
                axis.set_minor_formatter(NullFormatter())


def marks(ax: Axes, times: dict[str, float]) -> None:
    """Dotted verticals with names at their foot: on the left, the last on the right if
    there is room before the end of the axis, which is to be drawn before. A name close
    to the one before stands above it."""
    shown = {k: v for k, v in times.items() if np.isfinite(v) and v > 0}
    last = max(shown.values(), default=0.0)
    ax.get_xlim()  # the limits of what is drawn, which are found when asked for
    before, height = -1.0, 0.02
    for label, at in sorted(shown.items(), key=lambda item: item[1]):
        ax.axvline(at, color="grey", ls=":", lw=1)
        place, _ = ax.transAxes.inverted().transform(ax.transData.transform((at, 1.0)))
        right = at == last and place <= 0.8
        height = height + 0.06 if place - before < 0.2 and not right else 0.02
        before = place
        ax.text(
            at, height, f" {label} ", transform=ax.get_xaxis_transform(),
            ha="left" if right else "right", fontsize=SIZE - 3, color="grey",
        )  # fmt: skip


def between(x: Sequence[float] | np.ndarray) -> np.ndarray:
    """The sides of cells around some numbers, half way between them in the logarithm.
    (Of one alone, a factor of two away.)"""
    logs = np.log(np.asarray(x, float))
    gaps = np.diff(logs) / 2 if len(logs) > 1 else np.array([np.log(2)])
    middle = logs[:-1] + gaps[: len(logs) - 1]
    return np.exp([logs[0] - gaps[0], *middle, logs[-1] + gaps[-1]])


def cells(
    ax: Axes, x: Any, y: Any, values: np.ndarray, label: str = "", **style: Any
) -> Any:
    """A map of values over x and y, with a bar of its own if it has a label."""
    mesh = ax.pcolormesh(x, y, values, **style)
    if label:
        ax.figure.colorbar(mesh, ax=ax).set_label(label)
    return mesh
