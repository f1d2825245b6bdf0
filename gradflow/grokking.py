"""When a metric passes its threshold for good: memorisation and grokking times."""

import warnings
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.interpolate import PchipInterpolator

from .metrics import Metric

if TYPE_CHECKING:
    from .path import Path

_PASSES = 20  # at most: each narrows the time down to a share of 1/8 or less


def crossing_time(
    t: Float[Array | np.ndarray, " n"],
    values: Float[Array | np.ndarray, " n"],
    metric: Metric,
) -> float:
    """The first time from which `metric` stays on the good side of its threshold.

    Between the saved times it is interpolated by a monotone cubic in log t (from t = 0
    to the next by a line in t), and in the log of the value where all are positive.

    **Arguments:**

    - `t`: n increasing times.
    - `values`: the metric at these times.
    - `metric`: for its threshold, and which side is good.

    **Returns:** the time; 0 if the metric is good throughout, NaN if it is not good at
    the last time, if a value is missing, or if there is no threshold.
    """
    t, v = np.asarray(t, float), np.asarray(values, float)
    if metric.threshold is None or not np.isfinite(v).all():
        return np.nan
    level = float(metric.threshold)
    good = _good(v, metric)
    if not good[-1]:
        return np.nan
    bad = np.flatnonzero(~good)
    if bad.size == 0:
        return 0.0
    i = bad[-1]
    near = slice(i - 1 if i > 0 and t[i - 1] > 0 else i, i + 3)
    t, v = t[near], v[near]
    i = 1 if near.start < i else 0
    if v.min() > 0 and level > 0:
        v, level = np.log(v), np.log(level)
    if t[0] == 0:
        return float((level - v[0]) / (v[1] - v[0]) * t[1])
    x = np.log(t)
    roots = PchipInterpolator(x, v).solve(level, extrapolate=False)
    inside = roots[(roots >= x[i]) & (roots <= x[i + 1])]
    return float(np.exp(inside[-1] if inside.size else x[i + 1]))


def crossing_error(
    t: Float[Array | np.ndarray, " n"],
    values: Float[Array | np.ndarray, " n"],
    metric: Metric,
) -> float:
    """How far `crossing_time` may be off because it interpolates: what leaving out
    every second time would change, a time. NaN where that leaves no crossing."""
    thin = crossing_time(t[::-2][::-1], values[::-2][::-1], metric)
    return abs(crossing_time(t, values, metric) - thin)


def landed_crossing_time(path: "Path", name: str, metric: Metric) -> float:
    """`crossing_time` of metric `name` of a path, with the threshold of `metric`: to
    the tolerance of the run, where the path can be run again.

    From the last saved model that is on the bad side the flow is run again to the next
    saved time, through as many times as the path has (for which it is compiled
    already); and so on, from the last of these, until interpolating between them
    changes the time by less than a tenth of `rtol`. Where that fails it warns, and
    interpolates.
    """
    t, values = (np.asarray(x, float) for x in (path.t, path.metrics[name]))
    time = crossing_time(t, values, metric)
    if path.again is None or not time > 0:
        return time
    enough = 0.1 * float(path.stats["rtol"])
    params, count = path.params, max(len(t), 9)
    for _ in range(_PASSES):
        # The cubic's error falls as the third power of the spacing, or faster.
        if crossing_error(t, values, metric) / 8 <= enough * time:
            break
        i = int(np.flatnonzero(~_good(values, metric))[-1])
        start, width = t[i], t[i + 1] - t[i]
        if width <= enough * time:
            break
        params = jax.tree.map(lambda p, i=i: jnp.asarray(p)[i], params)
        local = np.linspace(0.0, width, count)
        piece = path.again(params, jnp.asarray(local, path.t.dtype))
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
        params, good = piece.params, _good(values, metric)
        # Within the tolerance either end may have come out on the other side.
        if good.all() or not good[-1]:
            return float(start if good.all() else start + width)
        time = crossing_time(t, values, metric)
    return time


def _good(values: np.ndarray, metric: Metric) -> np.ndarray:
    assert metric.threshold is not None
    level = float(metric.threshold)
    return values >= level if metric.higher_is_better else values <= level
