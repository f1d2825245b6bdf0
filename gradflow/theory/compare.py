"""How far theory and simulation are apart, for every weight decay."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool, Float

from .._checks import check_arguments, word
from ..results import RESULTS
from ..runs.interpolate import holds_until
from ..runs.path import landed_crossing_time, Path
from ..sweeps.result import Sweep
from .predicted_time import PredictedTime
from .two_phase import TwoPhase


class Rate(eqx.Module):
    """The exponent p of an error C λᵖ, by least squares in the logarithms."""

    exponent: float
    stderr: float
    """Its standard error; NaN for two points."""
    used: Bool[np.ndarray, " L"]
    """Which λ were used, a vector of booleans."""
    why: str
    """Why these; or why there is no rate."""

    def __str__(self) -> str:
        if not np.isfinite(self.exponent):
            return f"no rate: {self.why}"
        return f"{self.exponent:.3f} ± {self.stderr:.3f} over {self.why}"


class Report(eqx.Module):
    """The two-phase prediction against the true flow, lane by lane.

    Errors are ‖θ_λ(t) − prediction‖/‖Φ(θ₀)‖ and NaN for a lane that failed. Print it
    for a table; `report.plot()` draws it.
    """

    sweep: Sweep
    theory: TwoPhase
    weight_decay: Float[np.ndarray, " L"]
    error: Float[np.ndarray, "L n"]
    """At every saved time."""
    drift_error: Float[np.ndarray, "L n"]
    """The same against the drift alone: ‖θ_λ − w°(λt)‖."""
    sup_error: Float[np.ndarray, " L"]
    """Over all times."""
    sup_error_slow: Float[np.ndarray, " L"]
    """Over s ≥ ε, against the drift alone: ‖θ_λ − w°(λt)‖."""
    sup_error_regular: Float[np.ndarray, " L"]
    """Over s ≤ `regular_until`: what the rate is fitted to."""
    regular_until: float
    """The slow time at which the smallest normal curvature of F along the drift has
    fallen to a tenth of its initial value (or the end of the drift)."""
    after: float
    """ε."""
    rate: Rate
    second_error: Float[np.ndarray, "L n"] | None
    """`error` of the prediction of order 2; `None` where it was not computed."""
    sup_second_error: Float[np.ndarray, " L"]
    """Over s ≤ `regular_until`, as `sup_error_regular`; NaN where not computed."""
    next_term: Float[np.ndarray, "2 L"]
    """The error bars: what the next term would add, at order 1 and at order 2, over
    s ≤ `regular_until`. At order 1 it is known, λ‖e₁ + w₁ + h‖; at order 2 it is that
    times λρ, the ratio of the two terms normal to the manifold."""
    second_rate: Rate
    valid_until: Float[np.ndarray, " L"]
    """The slow time up to which theory is claimed to hold."""
    memorisation_time: Float[np.ndarray, " L"]
    grokking_time: Float[np.ndarray, " L"]
    predicted_memorisation_time: Float[np.ndarray, " L"]
    """NaN where it is not within `valid_until`."""
    predicted_grokking_time: Float[np.ndarray, " L"]
    """NaN where it is not within `valid_until`."""
    predicted_grokking_error: Float[np.ndarray, " L"]
    """Its estimated error, a time; NaN at order 1."""
    predicted_t: Float[np.ndarray, "L k"]
    """Times up to `valid_until`, at which the metrics of the prediction were
    evaluated; NaN where that is 0."""
    predicted_metrics: dict[str, Float[np.ndarray, "L k"]]
    """Of the highest order known."""

    @property
    def delay(self) -> Float[np.ndarray, " L"]:
        """Grokking time minus memorisation time."""
        return self.grokking_time - self.memorisation_time

    def __str__(self) -> str:
        curvature = np.asarray(self.theory.smallest_curvature)
        lines = [
            "Two-phase theory against simulation "
            f"({self.sweep.stats['solver']}, {len(self.weight_decay)} weight decays)",
            f"  critical manifold of dimension {int(self.theory.spectrum.dimension)}, "
            f"rank {int(self.theory.spectrum.rank)}"
            + (" (rank ambiguous)" if bool(self.theory.spectrum.ambiguous) else ""),
            f"  smallest normal curvature η: {curvature[0]:.2g} at the start of the "
            f"drift, {curvature[-1]:.2g} at s = {float(self.theory.drift.t[-1]):.3g}; "
            "theory asks for λ ≪ η",
            f"  error relative to ‖Φ‖: at all t; at orders 1 and 2 over "
            f"s ≤ {self.regular_until:.2g}; of the",
            f"  drift alone over s ≥ {self.after:.2g}. Next term: estimated error of "
            "order 2. Valid: up to this s",
            f"  {'λ':>9} {'all t':>9} {'order 1':>9} {'order 2':>9} {'next term':>9} "
            f"{'drift':>9} {'valid':>7}",
        ]
        lanes = np.argsort(-self.weight_decay)
        for i in lanes:
            row = (
                f"  {self.weight_decay[i]:9.2e} {self.sup_error[i]:9.2e} "
                f"{self.sup_error_regular[i]:9.2e} {_number(self.sup_second_error[i])} "
                f"{_number(self.next_term[1, i])} {self.sup_error_slow[i]:9.2e} "
                f"{self.valid_until[i]:7.3g} "
                f"{'*' if self.rate.used[i] else ''}"
                f"{'°' if self.second_rate.used[i] else ''}"
            )
            lane = self.sweep[i]
            if not bool(lane.succeeded):
                row += f"  FAILED: {RESULTS[lane.result]}"
            lines.append(row.rstrip())
        lines.append(f"  rate of the error in λ: {self.rate}, marked * (theory: 1)")
        if self.second_error is not None:
            rate = f"{self.second_rate}, marked °"
            lines.append(f"  of order 2: {rate} (theory: 2)")
        lines += self._times(lanes) if self.theory.drift.watched else []
        if not bool(self.theory.result == RESULTS.successful):
            lines.append(f"  theory: {RESULTS[self.theory.result]}")
        return "\n".join(lines)

    def _times(self, lanes: np.ndarray) -> list[str]:
        predicted = self.predicted_grokking_time
        lines = [
            f"  {'λ':>9} {'memorised':>10} {'grokked':>10} {'predicted':>10} "
            f"{'± about':>9} {'delay':>10}"
        ]
        lines += [
            f"  {self.weight_decay[i]:9.2e} {_time(self.memorisation_time[i])} "
            f"{_time(self.grokking_time[i])} {_time(predicted[i])} "
            f"{_number(self.predicted_grokking_error[i])} {_time(self.delay[i])}"
            for i in lanes
        ]
        if (np.isfinite(self.grokking_time) & ~np.isfinite(predicted)).any():
            lines.append(
                "  no time is predicted where theory does not hold until the crossing"
            )
        return lines

    def plot(self, **kwargs: Any) -> Any:
        """The report as a figure; see `gradflow.plot.report`."""
        from .. import plot

        return plot.report(self, **kwargs)


def compare(sweep: Sweep, theory: TwoPhase, *, after: float = 0.1) -> Report:
    """Measures the two-phase prediction against the simulated paths.

    The rate p of error ~ λᵖ is fitted where theory is asymptotic: to the error up to
    the slow time at which the manifold is still regular (η fell to a tenth), over the
    lanes with λ at most a twentieth of η there, and with an error at least ten times
    the tolerances'. For order 2 likewise, over the lanes in which no term is more than
    a tenth of the one before it, too.

    **Arguments:**

    - `sweep`: simulated with the same flow, model and metrics as
    - `theory`: the prediction.
    - `after`: ε; the drift alone is compared over s ≥ ε.

    **Returns:** a `Report`.

    **Raises:** `ValueError` where the two do not belong together.
    """
    if not isinstance(sweep, Sweep):
        raise ValueError(f"sweep: expected a gradflow.Sweep, got {word(sweep)}.")
    if not isinstance(theory, TwoPhase):
        raise ValueError(f"theory: expected a gradflow.TwoPhase, got {word(theory)}.")
    check_arguments(after=after)
    same = jax.tree.structure(sweep.paths.params) == jax.tree.structure(
        theory.drift.params
    ) and all(
        a.shape[2:] == b.shape[1:]
        for a, b in zip(
            jax.tree.leaves(sweep.paths.params),
            jax.tree.leaves(theory.drift.params),
            strict=True,
        )
    )
    if not same:
        raise ValueError("theory: made for a model of another structure than sweep's.")
    begins = zip(
        jax.tree.leaves(sweep.paths.params),
        jax.tree.leaves(theory.fast.params),
        strict=True,
    )
    at_start = np.asarray(sweep.t[:, 0]) == 0
    for a, b in begins:
        if at_start.any() and not np.allclose(np.asarray(a)[at_start, 0], b[0]):
            raise ValueError("theory: made for another initial model than sweep's.")
    until = _regular_until(theory)
    lams = np.asarray(sweep.weight_decay)
    bare = (dataclasses.replace(path, again=None) for path in sweep)
    found = [jax.tree.map(np.asarray, _errors(theory, path)) for path in bare]
    if theory.second is None:
        unknown = lambda each: (*each[:2], *2 * (np.full_like(each[0], np.nan),))
        found = [unknown(each) for each in found]
    errors, drift_errors, second_errors, second_terms = (
        np.stack(each) for each in zip(*found, strict=True)
    )
    slow = np.asarray(sweep.slow_time)
    last = float(theory.drift.t[-1]) * (1 + 8 * np.finfo(slow.dtype).eps)
    regular = _sup_until(errors, slow, until)
    known_to = (sweep.stats["rtol"], theory.fast.stats["rtol"])
    floor = 10 * max(float(np.max(e)) for e in (*known_to, theory.interpolation_error))
    curvature = np.interp(until, theory.drift.t, theory.smallest_curvature)
    measured = [_times(path, theory) for path in sweep]
    curves = [theory._predicted(lam) for lam in lams]
    predicted = [
        {
            name: theory._time_from(lam, name, t, values)
            for name in ("train", "test")
            if name in theory.drift.watched
        }
        for lam, (t, values) in zip(lams, curves, strict=True)
    ]
    never = PredictedTime(np.nan, np.nan, 1, "")
    get = lambda name: [p.get(name, never) for p in predicted]
    sup_second = _sup_until(second_errors, slow, until)
    # A lane that slid along kinks is exact to three digits only.
    exact = np.asarray(sweep.result == RESULTS.successful)
    fitted = lambda values: np.where(exact, values, np.nan)
    ratio = _ratio(theory, slow) * lams[:, None]
    largest = float(curvature) / 20
    steepest = _sup(ratio, slow <= until)
    return Report(
        sweep=sweep,
        theory=theory,
        weight_decay=lams,
        error=errors,
        drift_error=drift_errors,
        sup_error=_sup(errors, slow <= last),
        sup_error_slow=_sup(drift_errors, (slow >= after) & (slow <= last)),
        sup_error_regular=regular,
        regular_until=until,
        after=after,
        rate=fit_rate(lams, fitted(regular), largest, floor),
        second_error=None if theory.second is None else second_errors,
        sup_second_error=sup_second,
        next_term=np.stack(
            [
                _sup(s, slow <= until)
                for s in (second_terms, second_terms * (ratio + _mismatch(theory)))
            ]
        ),
        second_rate=fit_rate(
            lams, np.where(steepest <= 0.1, sup_second, np.nan), largest, floor
        ),
        valid_until=np.array([theory.valid_until(lam) for lam in lams]),
        memorisation_time=np.array([m["train"] for m in measured]),
        grokking_time=np.array([m["test"] for m in measured]),
        predicted_memorisation_time=np.array([p.time for p in get("train")]),
        predicted_grokking_time=np.array([p.time for p in get("test")]),
        predicted_grokking_error=np.array([p.error for p in get("test")]),
        predicted_t=np.stack([t for t, _ in curves]),
        predicted_metrics={
            name: np.stack([found.curves[:2][-1][name] for _, found in curves])
            for name in theory.drift.watched
        },
    )


def fit_rate(
    weight_decay: Float[np.ndarray, " L"],
    error: Float[np.ndarray, " L"],
    largest: float,
    floor: float,
) -> Rate:
    """Fits error = C λᵖ over the lanes with λ ≤ `largest` and error ≥ `floor`."""
    used = (weight_decay > 0) & (weight_decay <= largest)
    used = used & (error >= floor) & np.isfinite(error)
    if used.sum() < 2:
        why = f"fewer than two λ ≤ {largest:.1e} have an error above {floor:.0e}"
        return Rate(np.nan, np.nan, np.zeros_like(used), why)
    x, y = np.log(weight_decay[used]), np.log(error[used])
    x0 = x - x.mean()
    slope = float(x0 @ y / (x0 @ x0))
    rest = y - y.mean() - slope * x0
    n = used.sum()
    stderr = np.sqrt(rest @ rest / (n - 2) / (x0 @ x0)) if n > 2 else np.nan
    lo, hi = weight_decay[used].min(), weight_decay[used].max()
    why = f"{n} λ from {lo:.1e} to {hi:.1e}"
    return Rate(slope, float(stderr), used, why)


def _mismatch(theory: TwoPhase) -> float:
    return 0.0 if theory.second is None else float(theory.second.mismatch)


def _regular_until(theory: TwoPhase) -> float:
    """Where η has fallen to a tenth."""
    s, eta = np.asarray(theory.drift.t), np.asarray(theory.smallest_curvature)
    flat = np.isinf(eta)  # no normal directions at all
    return holds_until(s, np.where(flat, 10.0, eta / np.where(flat, 1, 0.1 * eta[0])))


@eqx.filter_jit
def _errors(theory: TwoPhase, path: Path) -> tuple[Any, Any, Any, Any]:
    """‖θ_λ − prediction‖, ‖θ_λ − w°(λt)‖, ‖θ_λ − prediction of order 2‖ and ‖term of
    order λ‖, all relative to ‖Φ‖, at the saved times."""
    norm = optax.tree.norm
    size = norm(jax.tree.map(lambda w: w[0], theory.drift.params))
    minus = lambda a, b: jax.tree.map(lambda a, b: a - b, a, b)
    order = 1 if theory.second is None else 2

    def at(t, params):
        predict = lambda lam, order: theory._predict_params(t, lam, order=order)
        composite, better = (predict(path.weight_decay, k) for k in (1, order))
        fast = predict(jnp.zeros_like(path.weight_decay), 1)
        still_fast = jax.tree.map(lambda f, w: f - w[0], fast, theory.drift.params)
        off = minus(params, composite)
        off_drift = jax.tree.map(lambda a, b: a + b, off, still_fast)
        second = (minus(params, better), minus(better, composite))
        return tuple(norm(x) / size for x in (off, off_drift, *second))

    return jax.lax.map(lambda tp: at(*tp), (path.t, path.params))


def _ratio(theory: TwoPhase, slow: np.ndarray) -> np.ndarray:
    """ρ, the ratio of the terms of order λ² and λ over λ, at the saved slow times."""
    if theory.second is None:
        return np.full_like(slow, np.nan)
    ratio = np.asarray(theory.second.ratio)
    return np.interp(slow, np.asarray(theory.drift.t)[: ratio.size], ratio)


def _sup(errors: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The largest error in each lane; NaN if one in range is, or none is in range."""
    largest = np.where(where, errors, -np.inf).max(axis=1)
    return np.where(where.any(axis=1), largest, np.nan)


def _sup_until(errors: np.ndarray, slow: np.ndarray, until: float) -> np.ndarray:
    """The supremum over s ≤ `until`, that end included: errors grow with s, and where
    the last saved time before it lies must not matter from lane to lane."""
    inside = _sup(errors, slow <= until)
    # In logarithms, where the error is a power of s; it may vanish at s = 0.
    logs = np.log(np.maximum(errors, np.finfo(float).tiny))
    pairs = zip(slow, logs, strict=True)
    at_end = np.exp([np.interp(until, s, e) for s, e in pairs])
    return np.maximum(inside, at_end)


def _times(path: Path, theory: TwoPhase) -> dict[str, float]:
    watched = theory.drift.watched
    return {
        name: landed_crossing_time(path, name, watched[name])
        if name in path.metrics and name in watched
        else np.nan
        for name in ("train", "test")
    }


def _number(x: Any) -> str:
    return f"{x:9.2e}" if np.isfinite(x) else f"{'–':>9}"


def _time(t: Any) -> str:
    return f"{t:10.4g}" if np.isfinite(t) else f"{'–':>10}"
