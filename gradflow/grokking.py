"""When a metric passes its threshold for good: memorisation and grokking times."""

import numpy as np
from jaxtyping import Array, Float
from scipy.interpolate import PchipInterpolator

from .metrics import Metric


def crossing_time(
    t: Float[Array | np.ndarray, " n"],
    values: Float[Array | np.ndarray, " n"],
    metric: Metric,
) -> float:
    """The first time from which `metric` stays on the good side of its threshold.

    Between the saved times it is interpolated by a monotone cubic in log t, and in the
    log of the value where all values are positive.

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
    good = v >= level if metric.higher_is_better else v <= level
    if not good[-1]:
        return np.nan
    bad = np.flatnonzero(~good)
    if bad.size == 0:
        return 0.0
    i = bad[-1]
    if t[i] == 0:
        return float(t[i + 1] * (level - v[i]) / (v[i + 1] - v[i]))
    later = t > 0
    t, v, i = t[later], v[later], i - np.sum(~later)
    if v.min() > 0 and level > 0:
        v, level = np.log(v), np.log(level)
    roots = PchipInterpolator(np.log(t), v).solve(level, extrapolate=False)
    # A constant piece at the very level is a root everywhere, and given as NaN.
    roots = np.exp(roots[np.isfinite(roots)])
    inside = (roots >= t[i] * (1 - 1e-12)) & (roots <= t[i + 1] * (1 + 1e-12))
    return float(roots[inside].max()) if inside.any() else float(t[i + 1])
