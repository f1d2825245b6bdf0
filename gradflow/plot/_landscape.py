"""The landscape of losses over norms."""

import jax
import numpy as np

from ._drawn import Landscape, Path
from ._style import Axes, finish, legend, new_axes, PENALTY, TEST, TRAIN, unknown


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

    **Raises:** `ValueError` for a metric that the landscape does not have.
    """
    if metric not in landscape.metrics:
        raise unknown("metric", metric, list(landscape.metrics))
    ax = new_axes(ax)
    w = np.median(landscape.norm, axis=0)
    floor = max(float(np.min(landscape.metrics[metric])) * 1e-6, 1e-12)
    drawn = (("train loss", landscape.train_loss, TRAIN),
             (metric, landscape.metrics[metric], TEST))  # fmt: skip
    for name, values, colour in drawn:
        ax.plot(
            w,
            np.median(values, axis=0),
            "o-",
            color=colour,
            lw=2,
            ms=4,
            label=name.replace("_", " "),
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
    words = metric.replace("_", " ")
    finish(ax, "norm of the parameters $w$", f"train loss, {words}")
    ax.set_xscale("log")
    ax.set_yscale("log")
    # What is fitted to rounding would leave the rest no room: it goes out at the foot.
    if ax.get_ylim()[0] < floor:
        ax.set_ylim(bottom=floor)
    legend(ax)
    return ax


def _norms(path: Path) -> np.ndarray:
    squares = [
        np.sum(np.asarray(p).reshape(len(path), -1) ** 2, axis=1)
        for p in jax.tree.leaves(path.params)
    ]
    return np.sqrt(sum(squares))
