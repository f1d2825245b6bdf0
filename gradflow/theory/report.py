"""What comparing theory with simulation gives: errors, rates and times, as a table."""

import os
from pathlib import Path as File
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Bool, Float

from ..results import among, RESULTS
from ..sweeps.result import Sweep
from .labelled import of_report
from .prediction import TwoPhase

# Of each order: how the lanes that its rate is fitted to are marked in the table.
_MARKS = {1: "*", 2: "°"}


class Rate(eqx.Module):
    """The exponent p of an error C λᵖ, by least squares in the logarithms."""

    exponent: float
    """p."""
    stderr: float
    """Its standard error; NaN for two points."""
    used: Bool[np.ndarray, " L"]
    """Which λ were used."""
    why: str
    """Why these; or why there is no rate."""

    def __str__(self) -> str:
        if not np.isfinite(self.exponent):
            return f"no rate: {self.why}"
        if not np.isfinite(self.stderr):
            return f"{self.exponent:.3f} over {self.why}, too few to tell its error"
        return f"{self.exponent:.3f} ± {self.stderr:.3f} over {self.why}"


class Order(eqx.Module):
    """The prediction of one order against the flow, for L weight decays. Errors are
    ‖θ_λ(t) − prediction‖/‖Φ(θ₀)‖, and NaN for a lane that failed."""

    error: Float[np.ndarray, "L n"]
    """At every saved time."""
    sup_all: Float[np.ndarray, " L"]
    """The largest over all times."""
    sup: Float[np.ndarray, " L"]
    """The largest over s ≤ `regular_until`: what the rate is fitted to."""
    next_term: Float[np.ndarray, " L"]
    """The error bar: what the next term would add, over s ≤ `regular_until`. At order 1
    it is known, λ‖e₁ + w₁ + h‖ (NaN where order 2 was not computed); at order 2 it is
    that times λρ, the ratio of the two terms normal to the manifold."""
    rate: Rate
    """The rate at which `sup` falls with λ."""


class DriftAlone(eqx.Module):
    """The drift w°(λt) against the flow, without the fast phase."""

    error: Float[np.ndarray, "L n"]
    """‖θ_λ(t) − w°(λt)‖/‖Φ(θ₀)‖ at every saved time."""
    sup: Float[np.ndarray, " L"]
    """The largest over s ≥ `after`."""
    after: float
    """ε, a slow time by which the fast phase is over."""


class Times(eqx.Module):
    """When a metric passes its threshold for good, for L weight decays: times t, NaN
    where it does not."""

    measured: Float[np.ndarray, " L"]
    """As simulated."""
    predicted: Float[np.ndarray, " L"]
    """By theory; NaN where it is not within `valid_until`, too."""
    error: Float[np.ndarray, " L"]
    """The estimated error of `predicted`, a time; NaN at order 1."""
    measured_error: Float[np.ndarray, " L"] | None = None
    """That of `measured`; `None` unless `compare` was asked for `error_bars`."""

    def words(self, i: int) -> str:
        """What was measured on lane `i`, and its error where that is estimated."""
        time, error = _time(self.measured[i]), self.measured_error
        return time if error is None else f"{time} {_number(error[i])}"


class Curves(eqx.Module):
    """The metrics of the prediction, of the highest order known."""

    t: Float[np.ndarray, "L k"]
    """Times up to `valid_until`; NaN where that is 0."""
    metrics: dict[str, Float[np.ndarray, "L k ..."]]
    """By name, at these times."""


class Report(eqx.Module):
    """The two-phase prediction against the true flow, lane by lane.

    Print it for a table; `report.plot()` draws it.
    """

    sweep: Sweep
    """The flow, as simulated."""
    theory: TwoPhase
    """The prediction."""
    orders: dict[int, Order]
    """Of the prediction: 1, and 2 where it was computed, as in `report.orders[2]`."""
    drift: DriftAlone
    """The error of the drift without the fast phase."""
    memorised: Times
    """When the metric `"train"` passes its threshold."""
    grokked: Times
    """When the metric `"test"` does."""
    curves: Curves
    """The predicted metrics."""
    valid_until: Float[np.ndarray, " L"]
    """The slow time up to which theory is claimed to hold."""

    @property
    def weight_decay(self) -> Float[np.ndarray, " L"]:
        """λ of every lane."""
        return np.asarray(self.sweep.weight_decay)

    @property
    def regular_until(self) -> float:
        """The slow time at which the smallest normal curvature of F along the drift has
        fallen to a tenth of its initial value (or the end of the drift)."""
        return self.theory.regular_until

    @property
    def delay(self) -> Float[np.ndarray, " L"]:
        """Grokking time minus memorisation time, as measured: times t."""
        return self.grokked.measured - self.memorised.measured

    def __str__(self) -> str:
        lanes = np.argsort(-self.weight_decay).tolist()
        lines = [*self._head(), *(self._row(i) for i in lanes)]
        for k, order in self.orders.items():
            what = "rate of the error in λ" if k == 1 else f"of order {k}"
            lines.append(f"  {what}: {order.rate}, marked {_MARKS[k]} (theory: {k})")
        if self.theory.drift.watched:
            lines += self._times(lanes)
        if not among(self.theory.result, RESULTS.successful):
            lines.append(f"  theory: {RESULTS[self.theory.result]}")
        return "\n".join(lines)

    def _head(self) -> list[str]:
        theory = self.theory
        curvature, spectrum = np.asarray(theory.smallest_curvature), theory.spectrum
        return [
            "Two-phase theory against simulation "
            f"({self.sweep.stats.solver}, {len(self.weight_decay)} weight decays)",
            f"  critical manifold of dimension {int(spectrum.dimension)}, "
            f"rank {int(spectrum.rank)}"
            + (" (rank ambiguous)" if bool(spectrum.ambiguous) else ""),
            f"  smallest normal curvature η: {curvature[0]:.2g} at the start of the "
            f"drift, {curvature[-1]:.2g} at s = {np.asarray(theory.drift.s)[-1]:.3g}; "
            "theory asks for λ ≪ η",
            f"  error relative to ‖Φ‖: at all t; at orders 1 and 2 over "
            f"s ≤ {self.regular_until:.2g}; of the",
            f"  drift alone over s ≥ {self.drift.after:.2g}. Next term: estimated "
            "error of order 2. Valid: up to this s",
            f"  {'λ':>9} {'all t':>9} {'order 1':>9} {'order 2':>9} {'next term':>9} "
            f"{'drift':>9} {'valid':>7}",
        ]

    def _row(self, i: int) -> str:
        """The errors of lane i."""
        first, second = self.orders[1], self.orders.get(2)
        row = f"  {self.weight_decay[i]:9.2e} {first.sup_all[i]:9.2e} "
        row += f"{first.sup[i]:9.2e} "
        of_second = (np.nan, np.nan)
        if second is not None:
            of_second = (second.sup[i], second.next_term[i])
        row += "".join(f"{_number(x)} " for x in of_second)
        row += f"{self.drift.sup[i]:9.2e} {self.valid_until[i]:7.3g} "
        orders = self.orders.items()
        row += "".join(_MARKS[k] for k, order in orders if order.rate.used[i])
        lane = self.sweep[i]
        if not bool(lane.succeeded):
            row += f"  FAILED: {RESULTS[lane.result]}"
        return row.rstrip()

    def _times(self, lanes: list[int]) -> list[str]:
        memorised, grokked = self.memorised, self.grokked
        bar = "" if grokked.measured_error is None else f" {'±':>9}"
        lines = [
            f"  {'λ':>9} {'memorised':>10}{bar} {'grokked':>10}{bar} "
            f"{'predicted':>10} {'± about':>9} {'delay':>10}"
        ]
        lines += [
            f"  {self.weight_decay[i]:9.2e} {memorised.words(i)} {grokked.words(i)} "
            f"{_time(grokked.predicted[i])} {_number(grokked.error[i])} "
            f"{_time(self.delay[i])}"
            for i in lanes
        ]
        unpredicted = ~np.isfinite(grokked.predicted)
        if (np.isfinite(grokked.measured) & unpredicted).any():
            lines.append(
                "  no time is predicted where theory does not hold until the crossing"
            )
        return lines

    def __repr__(self) -> str:
        lams, p = self.weight_decay, self.orders[1].rate.exponent
        rate = f"error of order λ^{p:.3g}" if np.isfinite(p) else "no rate"
        return (
            f"<Report on {lams.size} weight decays from {lams.min():.3g} to "
            f"{lams.max():.3g}: {rate}>"
        )

    def _repr_html_(self) -> str:
        from .. import plot

        return plot.as_html(str(self), lambda ax: plot.losses(self, ax))

    def to_xarray(self) -> Any:
        """The `xarray.Dataset` of the sweep, and beside each lane what comparing gave.

        Along `order`: `error` (along `time` too), `sup_all`, `sup`, `next_term`, all
        relative to ‖Φ(θ₀)‖, and `rate`, `rate_stderr`, `rate_used`; of the drift alone
        `drift_error` and `drift_sup`. Times t: `memorised`, `grokked`, `delay`, and of
        the first two `…_predicted` and `…_error`, and where they are known
        `…_measured_error`. `valid_until` is a slow time s.
        Along `predicted_time`: `predicted_t` and `predicted_metric_NAME`. The fields
        say what they are; `theory.to_xarray()` gives the theory.
        """
        return of_report(self)

    def plot(self, **kwargs: Any) -> Any:
        """The report as a figure, as [`gradflow.plot.report`][] draws it; `kwargs` are
        its options."""
        from .. import plot

        return plot.report(self, **kwargs)

    def to_html(self, file: str | os.PathLike, **kwargs: Any) -> File:
        """An interactive page, of which the path is returned: see
        `gradflow.plot.report_page`, which takes the `file` and the `kwargs`."""
        from .. import plot

        return plot.report_page(self, file, **kwargs)


def _number(x: float) -> str:
    return f"{x:9.2e}" if np.isfinite(x) else f"{'–':>9}"


def _time(t: float) -> str:
    return f"{t:10.4g}" if np.isfinite(t) else f"{'–':>10}"
