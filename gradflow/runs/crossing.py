"""When a metric passes its threshold for good: memorisation and grokking times."""

import numpy as np
from jaxtyping import Array, Float
from scipy.interpolate import PchipInterpolator

from ..metrics import Metric


def crossing_time(
    t: Float[Array | np.ndarray, " n"],
    values: Float[Array | np.ndarray, "n ..."],
    metric: Metric,
) -> float:
    """The first time from which `metric` stays on the good side of its threshold.

    Between the saved times it is interpolated by a monotone cubic in log t (from t = 0
    to the next by a line in t), and in the log of the value where all are positive.

    **Arguments:**

    - `t`: n increasing times. (Where a run ended early and the last is repeated, the
        first of these counts.)
    - `values`: the metric at these times.
    - `metric`: for its threshold, and which side is good.

    **Returns:** the time; 0 if the metric is good throughout, NaN if it is not good at
    the last time, if a value is missing, or if there is no threshold.

    **Raises:** `ValueError` for a metric that is no single number.
    """
    t, v = np.asarray(t, float), np.asarray(values, float)
    if metric.threshold is None:
        return np.nan
    if v.ndim != 1:
        raise ValueError(
            "values: a threshold is for one number, got an array of shape "
            f"{v.shape[1:]} at each time."
        )
    if not np.isfinite(v).all():
        return np.nan
    level = float(metric.threshold)
    new = np.diff(t, prepend=-np.inf) != 0
    t, v = t[new], v[new]
    good = is_good(v, metric)
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
    values: Float[Array | np.ndarray, "n ..."],
    metric: Metric,
) -> float:
    """How far `crossing_time` may be off because it interpolates: what leaving out
    every second time would change, a time. NaN where that leaves no crossing.

    **Arguments:** `t`, `values`, `metric`: as for `crossing_time`.

    **Raises:** `ValueError` as that.
    """
    thin = crossing_time(t[::-2][::-1], values[::-2][::-1], metric)
    return abs(crossing_time(t, values, metric) - thin)


def is_good(values: np.ndarray, metric: Metric) -> np.ndarray:
    assert metric.threshold is not None
    level = float(metric.threshold)
    return values >= level if metric.higher_is_better else values <= level
