"""Memorisation and grokking times predicted from two curves of a metric."""

import equinox as eqx
import numpy as np
from jaxtyping import Float

from .grokking import crossing_time
from .metrics import Metric


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


def predicted_time(
    t: Float[np.ndarray, " n"],
    curves: list[Float[np.ndarray, " n"]],
    metric: Metric,
    until: float,
    ratio: Float[np.ndarray, " n"],
) -> PredictedTime:
    """The time at which a predicted metric passes its threshold for good, as far as
    theory goes.

    The error of order 2 is what the second order changes, times the ratio of the next
    term to the second, and what leaving out every second point would change. That of
    order 1 is not known.

    **Arguments:**

    - `t`: n times, up to where theory holds.
    - `curves`: the metric at these times, at order 1 and, if known, at order 2.
    - `metric`: for its threshold.
    - `until`: the slow time up to which theory holds, for the words.
    - `ratio`: of the next term to the second, at these times.
    """
    order = len(curves)
    nothing = lambda why: PredictedTime(np.nan, np.nan, order, why)
    if metric.threshold is None:
        return nothing("the metric has no threshold")
    if until <= 0:
        return nothing("λ is too large for the theory, from the start of the drift on")
    times = [crossing_time(t, curve, metric) for curve in curves]
    if not np.isfinite(times[-1]):
        return nothing(f"not crossed for good while theory holds, s ≤ {until:.3g}")
    time = float(times[-1])
    thin = crossing_time(t[::-2][::-1], curves[-1][::-2][::-1], metric)
    change = np.nan
    if order == 2:
        change = abs(time - times[0]) * ratio[t <= time].max()
    why = f"order {order}, theory holds up to s = {until:.3g}"
    return PredictedTime(time, float(change + abs(time - thin)), order, why)
