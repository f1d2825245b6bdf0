"""How far theory and simulation are apart, for every weight decay."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from .grokking import crossing_time
from .path import Path
from .results import RESULTS
from .sweep import Sweep
from .theory import TwoPhase

_DENSE = 400  # times at which a predicted metric is evaluated


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
    memorisation_time: Float[np.ndarray, " L"]
    grokking_time: Float[np.ndarray, " L"]
    predicted_memorisation_time: Float[np.ndarray, " L"]
    predicted_grokking_time: Float[np.ndarray, " L"]
    predicted_t: Float[np.ndarray, "L k"]
    """Times at which the metrics of the prediction were evaluated."""
    predicted_metrics: dict[str, Float[np.ndarray, "L k"]]

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
            f"  error, relative to ‖Φ‖:  all t | s ≤ {self.regular_until:.2g} | drift "
            f"alone, s ≥ {self.after:.2g}",
            f"  {'λ':>9} {'all t':>9} {'regular':>9} {'drift':>9}"
            f" {'memorised':>10} {'grokked':>10} {'predicted':>10} {'delay':>10}",
        ]
        for i in np.argsort(-self.weight_decay):
            row = (
                f"  {self.weight_decay[i]:9.2e} {self.sup_error[i]:9.2e} "
                f"{self.sup_error_regular[i]:9.2e} {self.sup_error_slow[i]:9.2e}"
                f" {_time(self.memorisation_time[i])} {_time(self.grokking_time[i])}"
                f" {_time(self.predicted_grokking_time[i])} {_time(self.delay[i])}"
                f"{' *' if self.rate.used[i] else ''}"
            )
            lane = self.sweep[i]
            if not bool(lane.succeeded):
                row += f"  FAILED: {RESULTS[lane.result]}"
            lines.append(row)
        lines.append(f"  rate of the error in λ: {self.rate} (theory: 1)")
        if not bool(self.theory.result == RESULTS.successful):
            lines.append(f"  theory: {RESULTS[self.theory.result]}")
        return "\n".join(lines)

    def plot(self, **kwargs: Any) -> Any:
        """The report as a figure; see `gradflow.plot.report`."""
        from . import plot

        return plot.report(self, **kwargs)


def compare(sweep: Sweep, theory: TwoPhase, *, after: float = 0.1) -> Report:
    """Measures the two-phase prediction against the simulated paths.

    The rate p of error ~ λᵖ is fitted where theory is asymptotic: to the error up to
    the slow time at which the manifold is still regular (η fell to a tenth), over the
    lanes with λ at most a twentieth of η there, and with an error at least ten times
    the tolerances'.

    **Arguments:**

    - `sweep`: simulated with the same flow, model and metrics as
    - `theory`: the prediction.
    - `after`: ε; the drift alone is compared over s ≥ ε.

    **Returns:** a `Report`.

    **Raises:** `ValueError` where the two do not belong together.
    """
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
    errors, drift_errors = zip(*(_errors(theory, path) for path in sweep), strict=True)
    errors, drift_errors = np.stack(errors), np.stack(drift_errors)
    slow = np.asarray(sweep.slow_time)
    last = float(theory.drift.t[-1]) * (1 + 8 * np.finfo(slow.dtype).eps)
    regular = _sup_until(errors, slow, until)
    known_to = (
        sweep.stats["rtol"],
        theory.fast.stats["rtol"],
        theory.interpolation_error,
    )
    floor = 10 * max(float(np.max(error)) for error in known_to)
    curvature = np.interp(until, theory.drift.t, theory.smallest_curvature)
    measured = [_times(path.t, path.metrics, theory) for path in sweep]
    curves = [jax.tree.map(np.asarray, _predicted_metrics(theory, p)) for p in sweep]
    predicted = [_times(t, values, theory) for t, values in curves]
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
        rate=fit_rate(lams, regular, float(curvature) / 20, floor),
        memorisation_time=np.array([m["train"] for m in measured]),
        grokking_time=np.array([m["test"] for m in measured]),
        predicted_memorisation_time=np.array([p["train"] for p in predicted]),
        predicted_grokking_time=np.array([p["test"] for p in predicted]),
        predicted_t=np.stack([t for t, _ in curves]),
        predicted_metrics={
            name: np.stack([m[name] for _, m in curves]) for name in curves[0][1]
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
        return Rate(np.nan, np.nan, used, why)
    x, y = np.log(weight_decay[used]), np.log(error[used])
    x0 = x - x.mean()
    slope = float(x0 @ y / (x0 @ x0))
    rest = y - y.mean() - slope * x0
    n = used.sum()
    stderr = np.sqrt(rest @ rest / (n - 2) / (x0 @ x0)) if n > 2 else np.nan
    lo, hi = weight_decay[used].min(), weight_decay[used].max()
    why = f"{n} λ from {lo:.1e} to {hi:.1e}, marked *"
    return Rate(slope, float(stderr), used, why)


def _regular_until(theory: TwoPhase) -> float:
    s, eta = np.asarray(theory.drift.t), np.asarray(theory.smallest_curvature)
    fallen = np.flatnonzero(~(eta >= 0.1 * eta[0]))
    return float(s[max(fallen[0] - 1, 1)] if fallen.size else s[-1])


@eqx.filter_jit
def _errors(theory: TwoPhase, path: Path) -> tuple[Any, Any]:
    """‖θ_λ − prediction‖/‖Φ‖ and ‖θ_λ − w°(λt)‖/‖Φ‖, at the saved times."""
    norm = lambda tree: jnp.sqrt(sum(jnp.sum(x * x) for x in jax.tree.leaves(tree)))
    size = norm(jax.tree.map(lambda w: w[0], theory.drift.params))

    def at(t, params):
        composite = theory.predict_params(t, path.weight_decay)
        fast = theory.predict_params(t, jnp.zeros_like(path.weight_decay))
        still_fast = jax.tree.map(lambda f, w: f - w[0], fast, theory.drift.params)
        off = jax.tree.map(lambda a, b: a - b, params, composite)
        off_drift = jax.tree.map(lambda a, b: a + b, off, still_fast)
        return norm(off) / size, norm(off_drift) / size

    return jax.lax.map(lambda tp: at(*tp), (path.t, path.params))


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


def _times(t: Any, metrics: dict[str, Any], theory: TwoPhase) -> dict[str, float]:
    watched = theory.drift.watched
    return {
        name: crossing_time(t, metrics[name], watched[name])
        if name in metrics and name in watched
        else np.nan
        for name in ("train", "test")
    }


@eqx.filter_jit
def _predicted_metrics(theory: TwoPhase, path: Path) -> tuple[Any, dict[str, Any]]:
    end = jnp.minimum(path.t[-1], theory.drift.t[-1] / path.weight_decay)
    t = jnp.concatenate([path.t[:1], jnp.geomspace(path.t[1], end, _DENSE)])

    def at(t):
        model = eqx.combine(
            theory.predict_params(t, path.weight_decay), theory.drift.static
        )
        return {name: metric(model) for name, metric in theory.drift.watched.items()}

    return t, jax.lax.map(at, t)


def _time(t: Any) -> str:
    return f"{t:10.3g}" if np.isfinite(t) else f"{'–':>10}"
