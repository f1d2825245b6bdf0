"""Memorisation and grokking times predicted from two curves of a metric."""

import equinox as eqx
import numpy as np
from jaxtyping import Float

from ..metrics import Metric
from ..runs.crossing import crossing_error, crossing_time


class PredictedTime(eqx.Module):
    """A predicted time t, and how sure it is. Print it for a sentence."""

    time: float
    """The time t; NaN where there is none, `why` then says why."""
    error: float
    """An estimate of its error, in the same units; NaN where it is not known."""
    order: int
    """Of the prediction: 2 where the terms of the second order are known."""
    why: str
    """Where the time comes from, or why there is none."""

    def __str__(self) -> str:
        if not np.isfinite(self.time):
            return f"no time: {self.why}"
        error = f" ± {self.error:.2g}" if np.isfinite(self.error) else ""
        return f"t = {self.time:.6g}{error} ({self.why})"


def bracket(
    t: Float[np.ndarray, " n"], curves: list[Float[np.ndarray, "n ..."]], metric: Metric
) -> tuple[float, float] | None:
    """From where to where all curves cross for good; `None` where one does not."""
    times = [crossing_time(t, curve, metric) for curve in curves]
    if not np.isfinite(times).all() or max(times) <= 0:
        return None
    last = np.searchsorted(t, max(times))
    return float(t[max(np.searchsorted(t, min(times)) - 1, 0)]), float(t[last])


def predicted_time(
    t: Float[np.ndarray, " n"],
    curves: list[Float[np.ndarray, "n ..."]],
    metric: Metric,
    until: float,
    ratio: Float[np.ndarray, " n"],
    delay: Float[np.ndarray, " n"],
) -> PredictedTime:
    """The time at which a predicted metric passes its threshold for good, as far as
    theory goes.

    The error of order 2 is what the next term changes: as far as it comes from the fast
    phase, where it is known, and what the second order changed, times the ratio r of
    the terms, for what the drift adds. All further ones are taken for a geometric
    series, 1/(1 − r) times that. To it come the error of the interpolation in t, and
    that of the paths. The error of order 1 is not known.

    **Arguments:**

    - `t`: n times, up to where theory holds.
    - `curves`: the metric at these times, at order 1 and, if known, at order 2 and with
        the next term.
    - `metric`: for its threshold.
    - `until`: the slow time up to which theory holds, for the words.
    - `ratio`: of the next term to the second, at these times.
    - `delay`: the time in which the prediction moves by the error of its paths.
    """
    order = min(len(curves), 2)

    def nothing(why: str) -> PredictedTime:
        return PredictedTime(np.nan, np.nan, order, why)

    if metric.threshold is None:
        return nothing("the metric has no threshold")
    times = [crossing_time(t, curve, metric) for curve in curves]
    time, best = float(times[order - 1]), curves[order - 1]
    if not np.isfinite(time):
        return nothing(f"not crossed for good while theory holds, s ≤ {until:.3g}")
    why = f"order {order}, theory holds up to s = {until:.3g}"
    if order == 1 or time == 0:
        return PredictedTime(time, np.nan if order == 1 else 0.0, order, why)
    if not np.isfinite(times).all():
        return nothing(f"the orders disagree whether it is crossed, s ≤ {until:.3g}")
    r = float(np.interp(time, t, np.maximum.accumulate(ratio)))
    if not r < 1:
        return nothing(f"the terms do not fall until it is crossed, s ≤ {until:.3g}")
    first, second = abs(time - times[0]), abs(times[2] - time)
    if second > max(0.5 * first, 0.01 * time):
        return nothing(f"the terms do not fall until it is crossed, s ≤ {until:.3g}")
    change = (second + r * first) / (1 - r)
    paths = float(np.interp(time, t, delay)) + crossing_error(t, best, metric)
    return PredictedTime(time, change + paths, order, why)
