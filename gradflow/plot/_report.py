"""Figures of paths, sweeps and reports, with Matplotlib.

Every function draws into the axes it is given and returns them; without any it makes a
figure of its own with `pyplot`.
"""

import numpy as np

from ._drawn import Report
from ._paths import curves, sweep
from ._style import (
    Axes,
    Colours,
    each,
    Figure,
    finish,
    LABELS,
    legend,
    log_axes,
    lowest,
    marker_of,
    new_axes,
    positive,
    SIZE,
    TEST,
    THEORY,
    TRAIN,
    unknown,
)

ORDERS = (TRAIN, TEST)  # the colours of orders 1 and 2


def report(report: Report, fig: Figure | None = None) -> Figure:
    """The two-phase theory against simulation, in six panels.

    (a) train and test loss in time t, with the theory's test loss dashed, memorisation
    times as squares and grokking times as circles; theory is drawn as far as it is
    claimed to hold. (b) The test loss on the slow clock,
    where it falls on the drift's own curve. (c) The penalty on the slow clock. (d) The
    largest error against λ at orders 1 and 2, with the fitted rates; the λ that they
    were fitted to are filled, dashes are the estimated errors. (e) Measured against
    predicted grokking times. (f) The smallest normal curvature along the drift: theory
    asks for λ far below it. Triangles on the slow clock: where the validity of that λ
    ends.

    **Arguments:**

    - `report`: from `gradflow.compare`.
    - `fig`: an empty figure to draw into; a new one unless given.

    **Returns:** the figure.
    """
    if fig is None:
        import matplotlib.pyplot as plt

        fig = plt.figure(figsize=(15, 8.6), layout="constrained")
    axes = fig.subplots(2, 3)
    losses(report, axes[0, 0])
    if _has_test(report):
        collapse(report, axes[0, 1])
    else:
        words = "no single number is named “test”"
        axes[0, 1].text(0.5, 0.5, words, ha="center", fontsize=SIZE)
        finish(axes[0, 1], LABELS["s"], "")
    collapse(report, axes[0, 2], metric="penalty")
    error(report, axes[1, 0])
    grokking(report, axes[1, 1])
    curvature(report, axes[1, 2])
    titles = (
        "train and test loss in time",
        "test loss on the slow clock",
        "the penalty on the slow clock",
        "error of the theory against $\\lambda$",
        "grokking time",
        "where theory holds: $\\lambda \\ll \\eta$",
    )
    for letter, ax, title in zip("abcdef", axes.flat, titles, strict=True):
        ax.set_title(f"({letter}) {title}", fontsize=SIZE, loc="left")
    Colours(report.weight_decay).bar(fig, list(axes.flat))
    return fig


def _has_test(report: Report) -> bool:
    """As one number, whose drop can be seen."""
    both = report.sweep.metrics, report.curves.metrics
    return all("test" in found and np.ndim(found["test"]) == 2 for found in both)


def losses(report: Report, ax: Axes | None = None) -> Axes:
    """Train and test loss of every lane in time t, and the predicted test loss.

    **Arguments:**

    - `report`: from `gradflow.compare`.
    - `ax`: where to draw; a new figure unless given.

    **Returns:** the axes.
    """
    ax = new_axes(ax)
    paths, colours = report.sweep, Colours(report.weight_decay)
    t, train = np.asarray(paths.t), np.asarray(paths.train_loss)
    thresholds = {k: m.threshold for k, m in paths.paths.watched.items()}
    for i in range(len(paths)):
        ax.plot(*positive(t[i], train[i]), color=colours(i), lw=1.0)
        if not _has_test(report):
            continue
        test = np.asarray(paths.metrics["test"])[i]
        ax.plot(*positive(t[i], test), color=colours(i), lw=2.2)
        x, y = positive(report.curves.t[i], report.curves.metrics["test"][i])
        ax.plot(x, y, color=THEORY, lw=1.4, ls=(0, (4, 3)))
        for times, name, marker in (
            (report.memorised, "train", "s"),
            (report.grokked, "test", "o"),
        ):
            if (time := times.measured[i]) > 0:
                level = thresholds[name]
                ax.plot(time, level, marker, color=colours(i), mec="black", ms=7)
    from matplotlib.lines import Line2D

    entries = [
        Line2D([], [], color="grey", lw=2.2, label="test loss"),
        Line2D([], [], color=THEORY, lw=1.4, ls=(0, (4, 3)), label="test, theory"),
        Line2D([], [], color="grey", lw=1.0, label="train loss"),
        marker_of("s", "memorised"),
        marker_of("o", "grokked"),
    ]
    finish(ax, LABELS["t"], "loss")
    log_axes(ax, floor=lowest(train) / 3)
    ax.legend(handles=entries, fontsize=SIZE - 1, frameon=False, loc="lower left")
    return ax


def collapse(report: Report, ax: Axes | None = None, *, metric: str = "test") -> Axes:
    """One metric of every lane on the slow clock s = λt, and the drift's own curve.

    **Arguments:**

    - `report`: from `gradflow.compare`.
    - `ax`: where to draw; a new figure unless given.
    - `metric`: its name, or `"penalty"`.

    **Returns:** the axes.

    **Raises:** `ValueError` for a metric that the theory or the sweep does not have.
    """
    drift = report.theory.drift
    if metric not in (known := ["penalty", *drift.metrics]):
        raise unknown("metric", metric, known)
    curve = drift.penalty if metric == "penalty" else drift.metrics[metric]
    values = np.asarray(curves(report.sweep, metric))
    slow = np.asarray(report.sweep.slow_time)
    ax = sweep(report.sweep, ax, metric=metric, clock="s", colorbar=False)
    label = "drift $w^\\circ(s)$"
    for one in each(curve):
        x, y = positive(drift.s, one)
        ax.plot(x, y, color=THEORY, lw=1.4, ls=(0, (4, 3)), label=label)
        label = None
    _horizons(report, ax)
    # The fast phase, which is at smaller and smaller s, is not of interest here.
    end = float(np.asarray(drift.s)[-1])
    left = 1e-4 * end
    shown = values[slow >= left]
    shown = np.append(shown[np.isfinite(shown)], np.asarray(curve))
    shown = shown[shown > 0]
    ax.set_xlim(left, end * 1.3)
    ax.set_ylim(shown.min() / 1.3, shown.max() * 1.3)
    if shown.max() < 30 * shown.min():
        ax.set_yscale("linear")
        ax.set_ylim(0, shown.max() * 1.05)
    legend(ax, loc="lower left")
    return ax


def error(report: Report, ax: Axes | None = None) -> Axes:
    """The largest error of the prediction against λ, at order 1 and 2, with lines of
    these slopes. Filled: used to fit. Dashes: the error as estimated.

    **Arguments:**

    - `report`: from `gradflow.compare`.
    - `ax`: where to draw; a new figure unless given.

    **Returns:** the axes.
    """
    ax = new_axes(ax)
    rising = np.argsort(report.weight_decay)
    lams = report.weight_decay[rising]
    whole = report.orders[1].sup_all[rising]
    ax.plot(lams, whole, "^--", color="grey", ms=5, lw=1, label="order 1, all times")
    # The slope in λ that theory gives an order is its number.
    for (slope, order), colour in zip(report.orders.items(), ORDERS, strict=False):
        values, used = order.sup[rising], order.rate.used[rising]
        ax.plot(lams, order.next_term[rising], "--", color=colour, lw=1.2)
        ax.plot(lams, values, "o", mfc="white", mec=colour, ms=7)
        label = f"order {slope}: " + (
            f"rate {order.rate.exponent:.3f}" if used.any() else "no rate"
        )
        ax.plot(lams[used], values[used], "o", color=colour, ms=7, label=label)
        if used.any():
            anchor = np.flatnonzero(used)[-1]
            guide = values[anchor] * (lams / lams[anchor]) ** slope
            ax.plot(lams, 0.4 * guide, ":", color="black", lw=1.5)
    if len(report.orders) == 2:
        ax.plot([], [], "--", color="grey", lw=1.2, label="next term, estimated")
    slopes = "slope 1" if len(report.orders) == 1 else "slopes 1 and 2"
    ax.plot([], [], ":", color="black", lw=1.5, label=slopes)
    finish(ax, "weight decay $\\lambda$", "error relative to $\\|\\Phi\\|$")
    log_axes(ax)
    legend(ax, loc="lower right")
    return ax


def grokking(report: Report, ax: Axes | None = None) -> Axes:
    """Measured against predicted grokking times, in time t; a diagonal line is
    agreement.

    **Arguments:**

    - `report`: from `gradflow.compare`.
    - `ax`: where to draw; a new figure unless given.

    **Returns:** the axes.
    """
    ax = new_axes(ax)
    x, y = report.grokked.predicted, report.grokked.measured
    colours = Colours(report.weight_decay)
    shown = (x > 0) & (y > 0)
    for i in np.flatnonzero(shown).tolist():
        ax.plot(x[i], y[i], "o", color=colours(i), mec="black", ms=9, zorder=3)
    finish(ax, "predicted time $t$", "measured time $t$")
    if shown.any():
        ends = np.array([min(x[shown].min(), y[shown].min()) / 3, x[shown].max() * 3])
        ax.plot(ends, ends, "--", color="black", lw=1, label="measured = predicted")
        off = np.abs(y[shown] / x[shown] - 1)
        text = f"median difference {100 * np.median(off):.1g} %"
        ax.text(0.97, 0.05, text, transform=ax.transAxes, ha="right", fontsize=SIZE)
        log_axes(ax)
        legend(ax, loc="upper left")
    else:
        crossed = np.isfinite(y).any()
        text = "the test loss does not\ncross its threshold"
        text = "theory predicts no time" if crossed else text
        ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", fontsize=SIZE)
        ax.set(xticks=[], yticks=[])
    return ax


def curvature(report: Report, ax: Axes | None = None) -> Axes:
    """η(s), the smallest normal curvature of F along the drift, and every λ.

    **Arguments:**

    - `report`: from `gradflow.compare`.
    - `ax`: where to draw; a new figure unless given.

    **Returns:** the axes.
    """
    ax = new_axes(ax)
    drift = report.theory.drift
    eta = np.asarray(report.theory.smallest_curvature)
    colours = Colours(report.weight_decay)
    for i, lam in enumerate(report.weight_decay):
        ax.axhline(lam, color=colours(i), lw=1.5)
    ax.plot(*positive(drift.s, eta), color="black", lw=2.2, label="$\\eta(s)$")
    until = report.regular_until
    if until < np.asarray(drift.s)[-1]:
        ax.axvline(until, color=TEST, ls=":", lw=1.8, label="$\\eta$ at a tenth")
    from matplotlib.lines import Line2D

    handles = [*ax.get_legend_handles_labels()[0]]
    handles.append(Line2D([], [], color=colours(0), lw=1.5, label="each $\\lambda$"))
    _horizons(report, ax)
    finish(ax, LABELS["s"], "curvature, weight decay")
    ax.set_yscale("log")
    ax.legend(handles=handles, fontsize=SIZE - 1, frameon=False, loc="best")
    return ax


def _horizons(report: Report, ax: Axes) -> None:
    """On axes against slow time, where the validity of each λ ends: a triangle below,
    for those that end before the drift does."""
    colours = Colours(report.weight_decay)
    label = "theory holds up to here"
    end = float(np.asarray(report.theory.drift.s)[-1])
    for i, s in enumerate(report.valid_until):
        if 0 < s < end:
            at = ax.get_xaxis_transform()
            ax.plot(s, 0.02, "v", color=colours(i), mec="black", transform=at, ms=7,
                label=label, clip_on=False)  # fmt: skip
            label = None
