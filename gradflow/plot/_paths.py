"""Figures of a path and of a sweep."""

from typing import Any

import numpy as np

from ._drawn import Drift, Path, Sweep, Values
from ._style import (
    Axes,
    Clock,
    Colours,
    each,
    finish,
    LABELS,
    legend,
    log_axes,
    NAMES,
    new_axes,
    PENALTY,
    positive,
    power,
    TEST,
    TRAIN,
    unknown,
)


def path(path: Path, ax: Axes | None = None, *, clock: Clock = "t") -> Axes:
    """Train loss, metrics and penalty of one path against time. A metric that is an
    array has a line for each of its numbers, and one entry in the legend.

    **Arguments:**

    - `path`: from `gradflow.simulate` or `gradflow.descent`.
    - `ax`: where to draw; a new figure unless given.
    - `clock`: time `"t"` or slow time `"s"` = λt.

    **Returns:** the axes, logarithmic both ways. Thresholds are dotted lines, in the
    colour of their metric.

    **Raises:** `ValueError` for another `clock`.
    """
    title = f"$\\lambda$ = {power(float(path.weight_decay))}" if clock == "t" else ""
    return _quantities(path, _time(path, clock), LABELS[clock], title, ax)


def drift(drift: Drift, ax: Axes | None = None) -> Axes:
    """Train loss, metrics and penalty along a drift against slow time s.

    **Arguments:**

    - `drift`: from `gradflow.manifold.riemannian_flow`.
    - `ax`: where to draw; a new figure unless given.

    **Returns:** the axes, as of `gradflow.plot.path`.
    """
    return _quantities(drift, drift.s, LABELS["s"], "", ax)


def _quantities(
    path: Path | Drift, x: Values, label: str, title: str, ax: Axes | None
) -> Axes:
    """What was watched along a path or a drift, against its times `x`."""
    ax = new_axes(ax)
    ax.plot(*positive(x, path.train_loss), color=TRAIN, lw=2, label="train loss")
    colours = {"train": TRAIN, "test": TEST}
    others = iter(("#CC79A7", "#E69F00", "#56B4E9"))
    for name, values in path.metrics.items():
        if name == "train" and np.array_equal(values, path.train_loss, equal_nan=True):
            colour = TRAIN
        else:
            colour = colours.get(name) or next(others, "grey")
            count = np.size(values[0])
            width, entry = (2.0, name) if count == 1 else (1.0, f"{name} ({count})")
            for curve in each(values):
                ax.plot(*positive(x, curve), color=colour, lw=width, label=entry)
                entry = None
        threshold = path.watched[name].threshold if name in path.watched else None
        if threshold is not None and threshold > 0:
            ax.axhline(threshold, color=colour, ls=":", lw=1.2)
    ax.plot(*positive(x, path.penalty), color=PENALTY, lw=2, label="penalty $R$")
    finish(ax, label, "loss, penalty", title)
    log_axes(ax)
    legend(ax)
    return ax


def sweep(
    sweep: Sweep,
    ax: Axes | None = None,
    *,
    metric: str = "test",
    clock: Clock = "t",
    colorbar: bool = True,
    by: str | None = None,
) -> Axes:
    """One metric of every lane against time, coloured by weight decay or another axis;
    of a metric that is an array, each of its numbers.

    **Arguments:**

    - `sweep`: from `gradflow.sweep`.
    - `ax`: where to draw; a new figure unless given.
    - `metric`: the name of a metric, or `"train_loss"` or `"penalty"`.
    - `clock`: time `"t"`, where each λ has its own drop, or slow time `"s"` = λt,
        where the drift is one and the same for all.
    - `colorbar`: whether to add the scale of λ.
    - `by`: the axis that the colour shows: weight decay, or the last one if that is the
        same in all lanes.

    **Returns:** the axes, logarithmic both ways. A dotted line is the threshold.

    **Raises:** `ValueError` for a metric or an axis that the sweep does not have, and
    for another `clock`.
    """
    values = np.asarray(curves(sweep, metric))
    colours = lane_colours(sweep, by)
    ax = new_axes(ax)
    x = np.asarray(sweep.t if clock == "t" else sweep.slow_time)
    if clock not in LABELS:
        raise ValueError(f"clock: expected 't' or 's', got {clock!r}.")
    width = 1.8 if len(sweep) <= 24 else 0.8
    for i in range(len(sweep)):
        for curve in each(values[i]):
            ax.plot(*positive(x[i], curve), color=colours(i), lw=width)
    watched = sweep.paths.watched
    levels = {own.watched[metric].threshold for own in sweep.owned if metric in watched}
    if metric in watched and (watched[metric].threshold or 0) > 0 and len(levels) < 2:
        ax.axhline(watched[metric].threshold, color="grey", ls=":", lw=1.2)
    finish(ax, LABELS[clock], NAMES.get(metric, metric))
    log_axes(ax)
    if colorbar:
        colours.bar(ax.figure, ax)
    return ax


def lane_colours(sweep: Sweep, by: str | None = None) -> Colours:
    """Those of the lanes, by an axis: see `sweep`."""
    known = list(sweep.coords)
    if by is None:
        by = "weight_decay" if "weight_decay" in known else known[-1]
    if by not in known:
        raise unknown("by", by, known)
    if by == "weight_decay":
        return Colours(np.asarray(sweep.weight_decay))
    along = sweep.dims.index(sweep.axes.along[by])
    place = np.unravel_index(np.arange(len(sweep)), sweep.shape)[along]
    return Colours(sweep.coords[by][place], by)


def _time(path: Path, clock: str) -> np.ndarray:
    if clock not in LABELS:
        raise ValueError(f"clock: expected 't' or 's', got {clock!r}.")
    return np.asarray(path.t if clock == "t" else path.slow_time)


def curves(sweep: Sweep, metric: str) -> Any:
    if metric in sweep.metrics:
        return sweep.metrics[metric]
    if metric in ("train_loss", "penalty"):
        return getattr(sweep, metric)
    raise unknown("metric", metric, [*sweep.metrics, "train_loss", "penalty"])
