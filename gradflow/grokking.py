"""When a metric passes its threshold for good: memorisation and grokking times."""

import numpy as np
from jaxtyping import Array, Float

from .metrics import Metric


def crossing_time(
    t: Float[Array | np.ndarray, " n"],
    values: Float[Array | np.ndarray, " n"],
    metric: Metric,
) -> float:
    """The first time from which `metric` stays on the good side of its threshold.

    Between two saved times it is interpolated, linearly in log t and (where both are
    positive) in the log of the value.

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
    lo, hi = v[i], v[i + 1]
    if min(lo, hi, level) > 0:
        lo, hi, level = np.log([lo, hi, level])
    fraction = (level - lo) / (hi - lo)
    if t[i] > 0:
        return float(t[i] * (t[i + 1] / t[i]) ** fraction)
    return float(fraction * t[i + 1])
