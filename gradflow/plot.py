"""Figures of paths, sweeps and reports, with Matplotlib.

Every function draws into the axes it is given and returns them; without any it makes a
figure of its own with `pyplot`.
"""

from typing import Any, Literal, TYPE_CHECKING, TypeAlias

import jax
import numpy as np

from .compare import Report
from .landscape import Landscape
from .path import Path
from .sweep import Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:  # Matplotlib is imported by the first figure, not by the library.
    Axes: TypeAlias = Any
    Figure: TypeAlias = Any

Clock = Literal["t", "s"]

LABELS = {"t": "time $t$", "s": "slow time $s = \\lambda t$"}
TRAIN, TEST, PENALTY = "#0072B2", "#D55E00", "#009E73"
THEORY = "#FF4D2E"  # dashed, over all colours of λ
SIZE = 11  # of all text, in points


def path(path: Path, ax: Axes | None = None, *, clock: Clock = "t") -> Axes:
    """Train loss, metrics and penalty of one path against time.

    **Arguments:**

    - `path`: from `gradflow.simulate` or `gradflow.manifold.riemannian_flow`.
    - `ax`: where to draw; a new figure unless given.
    - `clock`: time `"t"` or slow time `"s"` = λt.

    **Returns:** the axes, logarithmic both ways. Thresholds are dotted lines, in the
    colour of their metric.
    """
    x = _time(path, clock)
    ax = _axes(ax)
    ax.plot(*_positive(x, path.train_loss), color=TRAIN, lw=2, label="train loss")
    colours = {"train": TRAIN, "test": TEST}
    others = iter(("#CC79A7", "#E69F00", "#56B4E9"))
    for name, values in path.metrics.items():
        if name == "train" and np.array_equal(values, path.train_loss, equal_nan=True):
            colour = TRAIN
        else:
            colour = colours.get(name) or next(others, "grey")
            ax.plot(*_positive(x, values), color=colour, lw=2, label=name)
        threshold = path.watched[name].threshold if name in path.watched else None
        if threshold is not None and threshold > 0:
            ax.axhline(threshold, color=colour, ls=":", lw=1.2)
    ax.plot(*_positive(x, path.penalty), color=PENALTY, lw=2, label="penalty $R$")
    lam = float(path.weight_decay)
    title = f"$\\lambda$ = {power(lam)}" if clock == "t" else ""
    _finish(ax, LABELS[clock], "loss, penalty", title)
    _log(ax)
    _legend(ax)
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
    """One metric of every lane against time, coloured by weight decay or another axis.

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

    **Raises:** `ValueError` for a metric or an axis that the sweep does not have.
    """
    values = _curves(sweep, metric)
    known = list(sweep.coords)
    if by is None:
        by = "weight_decay" if "weight_decay" in known else known[-1]
    if by not in known:
        raise ValueError(f"by: expected one of {known}, got {by!r}.")
    ax = _axes(ax)
    if by == "weight_decay":
        colours = Colours(np.asarray(sweep.weight_decay))
    else:
        along = sweep.dims.index(sweep.axes.along[by])
        place = np.unravel_index(np.arange(len(sweep)), sweep.shape)[along]
        colours = Colours(sweep.coords[by][place], by)
    x = np.asarray(sweep.t if clock == "t" else sweep.slow_time)
    if clock not in LABELS:
        raise ValueError(f"clock: expected 't' or 's', got {clock!r}.")
    width = 1.8 if len(sweep) <= 24 else 0.8
    for i in range(len(sweep)):
        ax.plot(*_positive(x[i], values[i]), color=colours(i), lw=width)
    watched = sweep.paths.watched
    levels = {own.watched[metric].threshold for own in sweep.owned if metric in watched}
    if metric in watched and (watched[metric].threshold or 0) > 0 and len(levels) < 2:
        ax.axhline(watched[metric].threshold, color="grey", ls=":", lw=1.2)
    _finish(ax, LABELS[clock], _NAMES.get(metric, metric))
    _log(ax)
    if colorbar:
        colours.bar(ax.figure, ax)
    return ax


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
        words = "no metric is named “test”"
        axes[0, 1].text(0.5, 0.5, words, ha="center", fontsize=SIZE)
        _finish(axes[0, 1], LABELS["s"], "")
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
    return "test" in report.sweep.metrics and "test" in report.predicted_metrics


def losses(report: Report, ax: Axes | None = None) -> Axes:
    """Train and test loss of every lane in time t, and the predicted test loss."""
    ax = _axes(ax)
    paths, colours = report.sweep, Colours(report.weight_decay)
    t, train = np.asarray(paths.t), np.asarray(paths.train_loss)
    thresholds = {k: m.threshold for k, m in paths.paths.watched.items()}
    for i in range(len(paths)):
        ax.plot(*_positive(t[i], train[i]), color=colours(i), lw=1.0)
        if not _has_test(report):
            continue
        test = np.asarray(paths.metrics["test"][i])
        ax.plot(*_positive(t[i], test), color=colours(i), lw=2.2)
        predicted = report.predicted_metrics["test"][i]
        x, y = _positive(report.predicted_t[i], predicted)
        ax.plot(x, y, color=THEORY, lw=1.4, ls=(0, (4, 3)))
        for time, name, marker in (
            (report.memorisation_time[i], "train", "s"),
            (report.grokking_time[i], "test", "o"),
        ):
            if time > 0:
                level = thresholds[name]
                ax.plot(time, level, marker, color=colours(i), mec="black", ms=7)
    from matplotlib.lines import Line2D

    entries = [
        Line2D([], [], color="grey", lw=2.2, label="test loss"),
        Line2D([], [], color=THEORY, lw=1.4, ls=(0, (4, 3)), label="test, theory"),
        Line2D([], [], color="grey", lw=1.0, label="train loss"),
        _marker("s", "memorised"),
        _marker("o", "grokked"),
    ]
    _finish(ax, LABELS["t"], "loss")
    _log(ax, floor=_lowest(train) / 3)
    ax.legend(handles=entries, fontsize=SIZE - 1, frameon=False, loc="lower left")
    return ax


def collapse(report: Report, ax: Axes | None = None, *, metric: str = "test") -> Axes:
    """One metric of every lane on the slow clock s = λt, and the drift's own curve."""
    drift = report.theory.drift
    curve = drift.penalty if metric == "penalty" else drift.metrics[metric]
    values = np.asarray(_curves(report.sweep, metric))
    slow = np.asarray(report.sweep.slow_time)
    ax = sweep(report.sweep, ax, metric=metric, clock="s", colorbar=False)
    x, y = _positive(drift.t, curve)
    ax.plot(x, y, color=THEORY, lw=1.4, ls=(0, (4, 3)), label="drift $w^\\circ(s)$")
    _horizons(report, ax)
    # The fast phase, which is at smaller and smaller s, is not of interest here.
    left = 1e-4 * float(drift.t[-1])
    shown = values[(slow >= left) & np.isfinite(values)]
    shown = np.append(shown, np.asarray(curve))
    shown = shown[shown > 0]
    ax.set_xlim(left, float(drift.t[-1]) * 1.3)
    ax.set_ylim(shown.min() / 1.3, shown.max() * 1.3)
    if shown.max() < 30 * shown.min():
        ax.set_yscale("linear")
        ax.set_ylim(0, shown.max() * 1.05)
    _legend(ax, loc="lower left")
    return ax


def error(report: Report, ax: Axes | None = None) -> Axes:
    """The largest error of the prediction against λ, at order 1 and 2, with lines of
    these slopes. Filled: used to fit. Dashes: the error as estimated."""
    ax = _axes(ax)
    order = np.argsort(report.weight_decay)
    lams = report.weight_decay[order]
    series = [(1, report.sup_error_regular, report.rate, TRAIN)]
    if report.second_error is not None:
        series.append((2, report.sup_second_error, report.second_rate, TEST))
    whole = report.sup_error[order]
    ax.plot(lams, whole, "^--", color="grey", ms=5, lw=1, label="order 1, all times")
    for slope, values, rate, colour in series:
        values, used = values[order], rate.used[order]
        estimate = report.next_term[slope - 1][order]
        ax.plot(lams, estimate, "--", color=colour, lw=1.2)
        ax.plot(lams, values, "o", mfc="white", mec=colour, ms=7)
        label = f"order {slope}: " + (
            f"rate {rate.exponent:.3f}" if used.any() else "no rate"
        )
        ax.plot(lams[used], values[used], "o", color=colour, ms=7, label=label)
        if used.any():
            anchor = np.flatnonzero(used)[-1]
            guide = values[anchor] * (lams / lams[anchor]) ** slope
            ax.plot(lams, 0.4 * guide, ":", color="black", lw=1.5)
    if len(series) == 2:
        ax.plot([], [], "--", color="grey", lw=1.2, label="next term, estimated")
    slopes = "slope 1" if len(series) == 1 else "slopes 1 and 2"
    ax.plot([], [], ":", color="black", lw=1.5, label=slopes)
    _finish(ax, "weight decay $\\lambda$", "error relative to $\\|\\Phi\\|$")
    _log(ax)
    _legend(ax, loc="lower right")
    return ax


def grokking(report: Report, ax: Axes | None = None) -> Axes:
    """Measured against predicted grokking times; a diagonal line is agreement."""
    ax = _axes(ax)
    x, y = report.predicted_grokking_time, report.grokking_time
    colours = Colours(report.weight_decay)
    shown = (x > 0) & (y > 0)
    for i in np.flatnonzero(shown).tolist():
        ax.plot(x[i], y[i], "o", color=colours(i), mec="black", ms=9, zorder=3)
    _finish(ax, "predicted time $t$", "measured time $t$")
    if shown.any():
        ends = np.array([min(x[shown].min(), y[shown].min()) / 3, x[shown].max() * 3])
        ax.plot(ends, ends, "--", color="black", lw=1, label="measured = predicted")
        off = np.abs(y[shown] / x[shown] - 1)
        text = f"median difference {100 * np.median(off):.1g} %"
        ax.text(0.97, 0.05, text, transform=ax.transAxes, ha="right", fontsize=SIZE)
        _log(ax)
        _legend(ax, loc="upper left")
    else:
        crossed = np.isfinite(y).any()
        text = "the test loss does not\ncross its threshold"
        text = "theory predicts no time" if crossed else text
        ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", fontsize=SIZE)
        ax.set(xticks=[], yticks=[])
    return ax


def curvature(report: Report, ax: Axes | None = None) -> Axes:
    """η(s), the smallest normal curvature of F along the drift, and every λ."""
    ax = _axes(ax)
    drift = report.theory.drift
    eta = np.asarray(report.theory.smallest_curvature)
    colours = Colours(report.weight_decay)
    for i, lam in enumerate(report.weight_decay):
        ax.axhline(lam, color=colours(i), lw=1.5)
    ax.plot(*_positive(drift.t, eta), color="black", lw=2.2, label="$\\eta(s)$")
    until = report.regular_until
    if until < float(drift.t[-1]):
        ax.axvline(until, color=TEST, ls=":", lw=1.8, label="$\\eta$ at a tenth")
    from matplotlib.lines import Line2D

    handles = [*ax.get_legend_handles_labels()[0]]
    handles.append(Line2D([], [], color=colours(0), lw=1.5, label="each $\\lambda$"))
    _horizons(report, ax)
    _finish(ax, LABELS["s"], "curvature, weight decay")
    ax.set_yscale("log")
    ax.legend(handles=handles, fontsize=SIZE - 1, frameon=False, loc="best")
    return ax


def _horizons(report: Report, ax: Axes) -> None:
    """On axes against slow time, where the validity of each λ ends: a triangle below,
    for those that end before the drift does."""
    colours = Colours(report.weight_decay)
    label = "theory holds up to here"
    for i, s in enumerate(report.valid_until):
        if 0 < s < float(report.theory.drift.t[-1]):
            at = ax.get_xaxis_transform()
            ax.plot(s, 0.02, "v", color=colours(i), mec="black", transform=at, ms=7,
                label=label, clip_on=False)  # fmt: skip
            label = None


_NAMES = {
    "test": "test loss",
    "train": "train loss",
    "train_loss": "train loss",
    "penalty": "penalty $R$",
}


def landscape(
    landscape: Landscape,
    ax: Axes | None = None,
    *,
    metric: str = "test",
    runs: dict[str, Path] | None = None,
) -> Axes:
    """The L and the U: train loss and a metric against the norm of the parameters, at
    the minimiser over each sphere.

    **Arguments:**

    - `landscape`: from `gradflow.landscape`. The median over its starts is drawn, with
        their range.
    - `ax`: where to draw; a new figure unless given.
    - `metric`: the name of a metric.
    - `runs`: paths to overlay, by name: train loss and metric at the norm they have at
        each time, with a dot where they end.

    **Returns:** the axes, logarithmic both ways, from a millionth of the least value of
    the metric up; the zone where the metric passes its threshold is shaded.
    """
    ax = _axes(ax)
    w = np.median(landscape.norm, axis=0)
    floor = max(float(np.min(landscape.metrics[metric])) * 1e-6, 1e-12)
    drawn = (("train loss", landscape.train_loss, TRAIN),
             (metric, landscape.metrics[metric], TEST))  # fmt: skip
    for name, values, colour in drawn:
        ax.plot(
            w, np.median(values, axis=0), "o-", color=colour, lw=2, ms=4, label=name
        )
        if len(values) > 1:
            ax.fill_between(
                w, *np.quantile(values, (0, 1), axis=0), color=colour, alpha=0.2
            )
    if landscape.watched[metric].threshold is not None:
        zones = landscape.zone(metric)
        zones = zones[np.isfinite(zones).all(axis=1)]
        if zones.size:
            low, high = np.median(zones, axis=0)
            ax.axvspan(low, high, color=PENALTY, alpha=0.12, label="Goldilocks zone")
    styles = iter(("-", "--", ":", "-."))
    for name, run in (runs or {}).items():
        style = next(styles, "-")
        norm = _norms(run)
        for values, colour in ((run.train_loss, TRAIN), (run.metrics[metric], TEST)):
            values = np.asarray(values)
            ax.plot(norm, values, style, color=colour, lw=1.2, alpha=0.8)
            ax.plot(norm[-1:], values[-1:], "o", mfc="white", color=colour)
        ax.plot([], [], style, color="grey", label=name)
    _finish(ax, "norm of the parameters $w$", f"train loss, {metric}")
    ax.set_xscale("log")
    ax.set_yscale("log")
    # What is fitted to rounding would leave the rest no room: it goes out at the foot.
    if ax.get_ylim()[0] < floor:
        ax.set_ylim(bottom=floor)
    _legend(ax)
    return ax


def _norms(path: Path) -> np.ndarray:
    squares = [
        np.sum(np.asarray(p).reshape(len(path), -1) ** 2, axis=1)
        for p in jax.tree.leaves(path.params)
    ]
    return np.sqrt(sum(squares))


def colorbar(weight_decay: Any, fig: Figure, axes: Any) -> Any:
    """The scale of λ beside `axes`, one or a list of panels that share it."""
    return Colours(np.asarray(weight_decay)).bar(fig, axes)


class Colours:
    """A colour for each λ, on a logarithmic scale that all readers can tell apart.

    Where the values are those of another axis, by the name `label`, the scale is linear
    if they are within a factor of five, or not all positive; what are no numbers are
    counted."""

    def __init__(self, values: np.ndarray, label: str = "weight decay $\\lambda$"):
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import ListedColormap, LogNorm, Normalize

        self.label = label
        values = np.asarray(values)
        if values.dtype.kind not in "biuf":
            values = np.unique(values, return_inverse=True)[1]
        lams = values.astype(float)
        self.lams = lams
        positive = lams[lams > 0]
        low, high = (positive.min(), positive.max()) if positive.size else (1.0, 1.0)
        if low == high:
            low, high = low / 3, high * 3
        # Without the yellow end, which is hard to see on white.
        cmap = ListedColormap(colormaps["viridis"](np.linspace(0.0, 0.9, 256)))
        self.linear = "lambda" not in label and (lams.min() <= 0 or high < 5 * low)
        norm = Normalize(lams.min(), lams.max()) if self.linear else LogNorm(low, high)
        self.map = ScalarMappable(norm, cmap)

    def __call__(self, i: int) -> Any:
        lam = self.lams[i]
        return self.map.to_rgba(lam) if lam > 0 or self.linear else "black"

    def bar(self, fig: Figure, axes: Any) -> None:
        bar = fig.colorbar(self.map, ax=axes, aspect=30, pad=0.01)
        bar.set_label(self.label, fontsize=SIZE)
        bar.ax.tick_params(labelsize=SIZE - 1)


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(6.4, 4.4), layout="constrained")[1]


def _time(path: Path, clock: str) -> np.ndarray:
    if clock not in LABELS:
        raise ValueError(f"clock: expected 't' or 's', got {clock!r}.")
    return np.asarray(path.t if clock == "t" else path.slow_time)


def _curves(sweep: Sweep, metric: str) -> Any:
    if metric in sweep.metrics:
        return sweep.metrics[metric]
    if metric in ("train_loss", "penalty"):
        return getattr(sweep, metric)
    known = [*sweep.metrics, "train_loss", "penalty"]
    raise ValueError(f"metric: expected one of {known}, got {metric!r}.")


def _positive(x: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    """What can be drawn on logarithmic axes."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    where = (x > 0) & (y > 0)
    return x[where], y[where]


def _lowest(values: np.ndarray) -> float:
    values = values[np.isfinite(values) & (values > 0)]
    return float(values.min()) if values.size else 1.0


def _marker(marker: str, label: str) -> Any:
    from matplotlib.lines import Line2D

    style = {"marker": marker, "ls": "", "color": "lightgrey", "mec": "black", "ms": 7}
    return Line2D([], [], label=label, **style)


def _log(ax: Axes, floor: float | None = None) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    if floor is not None:
        ax.set_ylim(bottom=floor)


def _finish(ax: Axes, x: str, y: str, title: str = "") -> None:
    ax.set_xlabel(x, fontsize=SIZE)
    ax.set_ylabel(y, fontsize=SIZE)
    ax.set_title(title, fontsize=SIZE)
    ax.tick_params(labelsize=SIZE - 1)
    ax.spines[["top", "right"]].set_visible(False)


def _legend(ax: Axes, **kwargs: Any) -> None:
    ax.legend(fontsize=SIZE - 1, frameon=False, **kwargs)


def power(x: float) -> str:
    """x for a label, as a power of ten."""
    if x == 0:
        return "0"
    exponent = int(np.floor(np.log10(x)))
    mantissa = round(x / 10.0**exponent, 2)
    if mantissa == 10:
        exponent, mantissa = exponent + 1, 1.0
    power = f"10^{{{exponent}}}"
    return f"${power}$" if mantissa == 1 else f"${mantissa:g} \\times {power}$"
