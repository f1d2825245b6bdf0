"""How far theory and simulation are apart, for every weight decay."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from .._checks import check_arguments, word
from ..precision import exact_products
from ..runs.path import landed_crossing_time, Path, slid
from ..runs.progress import Bar
from ..sweeps.result import check_again, lane_error, Sweep
from .predicted_time import PredictedTime
from .prediction import Predicted, TwoPhase
from .report import Curves, DriftAlone, Order, Rate, Report, Times


@exact_products
def compare(
    sweep: Sweep,
    theory: TwoPhase,
    *,
    after: float = 0.1,
    error_bars: bool = False,
    progress: bool = False,
) -> Report:
    """Measures the two-phase prediction against the simulated paths.

    The rate p of error ~ λᵖ is fitted where theory is asymptotic: to the error up to
    the slow time at which the manifold is still regular (η fell to a tenth), over the
    lanes with λ at most a twentieth of η there, and with an error at least ten times
    the tolerances'. For order 2 likewise, over the lanes in which no term is more than
    a tenth of the one before it, too.

    **Arguments:**

    - `sweep`: the flow, simulated. A lane that ended early, as asked, counts up to its
        end.
    - `theory`: the prediction, of the same flow, model and metrics.
    - `after`: ε, a slow time; the drift alone is compared over s ≥ ε.
    - `error_bars`: whether to estimate the errors of the measured times: each lane is
        run once more for it, to more digits (see `gradflow.Path.crossing_error`).
    - `progress`: show a progress bar, over the lanes.

    **Returns:** a `Report`.

    **Raises:** `ValueError` where the two do not belong together, or where there are to
    be `error_bars` of lanes that can't be run again.
    """
    if not isinstance(sweep, Sweep):
        raise ValueError(f"sweep: expected a gradflow.Sweep, got {word(sweep)}.")
    if not isinstance(theory, TwoPhase):
        raise ValueError(f"theory: expected a gradflow.TwoPhase, got {word(theory)}.")
    check_arguments(after=after)
    check_same_model(sweep, theory)
    if error_bars:
        check_again(sweep)
    lams = np.asarray(sweep.weight_decay)
    with Bar("compare", shown=progress) as bar:
        found = errors(sweep, theory, bar)
        predicted = []
        for i, lam in enumerate(lams):
            predicted.append(theory.predicted(lam))
            bar.tell(0.5 + 0.5 * (i + 1) / lams.size, f"λ = {lam:.3g}")
        measured = measure(sweep, theory, error_bars)
    slow = np.asarray(sweep.slow_time)
    late = (slow >= after) & (slow <= _end(theory, slow.dtype))
    return Report(
        sweep=sweep,
        theory=theory,
        orders=rates(sweep, theory, found),
        drift=DriftAlone(found.drift, _sup(found.drift, late), after),
        memorised=times(sweep, theory, "train", predicted, measured["train"]),
        grokked=times(sweep, theory, "test", predicted, measured["test"]),
        curves=Curves(
            np.stack([each.t for each in predicted]),
            {
                name: np.stack([each.best[name] for each in predicted])
                for name in theory.drift.watched
            },
        ),
        valid_until=np.array([theory.valid_until(lam) for lam in lams]),
    )


def check_same_model(sweep: Sweep, theory: TwoPhase) -> None:
    """Raises `ValueError` unless both start from the same parameters."""
    many, one = sweep.paths.params, theory.drift.params
    same = jax.tree.structure(many) == jax.tree.structure(one)
    pairs = zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=same)
    if not same or any(a.shape[2:] != b.shape[1:] for a, b in pairs):
        raise ValueError("theory: made for a model of another structure than sweep's.")
    # Lanes whose first saved time is later do not tell.
    at_start = np.asarray(sweep.t)[:, 0] == 0
    fast = theory.fast.params
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(fast), strict=True):
        if at_start.any() and not np.allclose(
            np.asarray(a)[at_start, 0], np.asarray(b)[0]
        ):
            raise ValueError("theory: made for another initial model than sweep's.")


class Errors(NamedTuple):
    """All relative to ‖Φ(θ₀)‖, at the saved times of one lane, or of L."""

    orders: dict[int, Float[Array | np.ndarray, "*L n"]]
    """‖θ_λ − prediction‖ for the orders known, of 1 and 2."""
    drift: Float[Array | np.ndarray, "*L n"]
    """‖θ_λ − w°(λt)‖."""
    term: Float[Array | np.ndarray, "*L n"] | None
    """‖λ(e₁ + w₁ + h)‖, the term of order λ; `None` where it is not known."""


def errors(sweep: Sweep, theory: TwoPhase, bar: Bar) -> Errors:
    """The errors of the predictions at all saved times of all lanes."""
    found = []
    for i in range(len(sweep)):
        path = sweep.padded(i)
        # Compiled once: what is told of a path in words differs from lane to lane.
        lane = path.t, path.params, path.weight_decay
        found.append(jax.tree.map(np.asarray, _errors(theory, *lane)))
        bar.tell(0.5 * (i + 1) / len(sweep), f"λ = {float(path.weight_decay):.3g}")
    return jax.tree.map(lambda *each: np.stack(each), *found)


@eqx.filter_jit
def _errors(
    theory: TwoPhase, t: Float[Array, " n"], params: PyTree, lam: Float[Array, ""]
) -> Errors:
    """`errors` of one lane."""
    norm = optax.tree.norm
    size = norm(jax.tree.map(lambda w: w[0], theory.drift.params))

    def at(t: Float[Array, ""], params: PyTree) -> Errors:
        told = {k: theory.predict_params(t, lam, order=k) for k in theory.orders}
        fast = theory.predict_params(t, jnp.zeros_like(lam), order=1)
        still_fast = jax.tree.map(lambda f, w: f - w[0], fast, theory.drift.params)
        off = {k: _minus(params, each) for k, each in told.items()}
        off_drift = jax.tree.map(lambda a, b: a + b, off[1], still_fast)
        term = norm(_minus(told[2], told[1])) / size if 2 in told else None
        sizes = {k: norm(each) / size for k, each in off.items()}
        return Errors(sizes, norm(off_drift) / size, term)

    return jax.lax.map(lambda tp: at(*tp), (t, params))


def _minus(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: a - b, a, b)


def rates(sweep: Sweep, theory: TwoPhase, found: Errors) -> dict[int, Order]:
    """The suprema of the errors, what the next term would add to them, and the rates
    at which they fall with λ: see `compare`."""
    lams, slow = np.asarray(sweep.weight_decay), np.asarray(sweep.slow_time)
    until = theory.regular_until
    regular, whole = slow <= until, slow <= _end(theory, slow.dtype)
    known_to = (sweep.stats.rtol, theory.fast.stats.rtol, theory.interpolation_error)
    # (A descent has no tolerance.)
    floor = 10 * max(float(np.asarray(e).max()) for e in known_to if e is not None)
    curvature = np.interp(until, theory.drift.s, theory.smallest_curvature)
    largest = float(curvature) / 20
    ratio = _ratio(theory, slow) * lams[:, None]
    # A lane that slid along kinks is exact to three digits only.
    exact = {1: np.asarray(sweep.succeeded) & ~np.asarray(slid(sweep.paths))}
    terms = {1: np.full_like(slow, np.nan)}
    if theory.second is not None and found.term is not None:
        exact[2] = _sup(ratio, regular) <= 0.1
        mismatch = float(theory.second.mismatch)
        terms = {1: found.term, 2: found.term * (ratio + mismatch)}
    out = {}
    for k, error in found.orders.items():
        sup = _sup_until(error, slow, until)
        fitted = np.where(exact[k], sup, np.nan)
        out[k] = Order(
            error=error,
            sup_all=_sup(error, whole),
            sup=sup,
            next_term=_sup(terms[k], regular),
            rate=fit_rate(lams, fitted, largest, floor),
        )
    return out


Measured = list[tuple[float, float | None]]


def measure(sweep: Sweep, theory: TwoPhase, error_bars: bool) -> dict[str, Measured]:
    """When "train" and "test" pass their thresholds for good on each lane, and how far
    off that is, if asked for. NaN where there is no such metric."""
    watched, unknown = theory.drift.watched, np.nan if error_bars else None

    def of(path: Path, name: str) -> tuple[float, float | None]:
        if name not in path.metrics or name not in watched:
            return np.nan, unknown
        time = landed_crossing_time(path, name, watched[name])
        if not error_bars:
            return time, None
        return time, lane_error(path, name, watched[name], time)

    names = ("train", "test")  # one finer run serves both
    each = [{name: of(path, name) for name in names} for path in sweep]
    return {name: [lane[name] for lane in each] for name in names}


def times(
    sweep: Sweep,
    theory: TwoPhase,
    name: str,
    predicted: list[Predicted],
    measured: Measured,
) -> Times:
    """When the metric `name` passes its threshold for good: as measured on each lane,
    and from what is predicted for it."""
    watched = theory.drift.watched
    errors = [error for _, error in measured]
    told = [PredictedTime(np.nan, np.nan, 1, "")] * len(measured)
    if name in watched:
        lanes = zip(np.asarray(sweep.weight_decay), predicted, strict=True)
        told = [theory.time_from(lam, name, each) for lam, each in lanes]
    return Times(
        np.array([time for time, _ in measured]),
        np.array([each.time for each in told]),
        np.array([each.error for each in told]),
        None if None in errors else np.array(errors),
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


def _end(theory: TwoPhase, dtype: np.dtype) -> float:
    """The end of the drift, and a rounding more."""
    return float(np.asarray(theory.drift.s)[-1]) * (1 + 8 * np.finfo(dtype).eps)


def _ratio(theory: TwoPhase, slow: np.ndarray) -> np.ndarray:
    """ρ, the ratio of the terms of order λ² and λ over λ, at the saved slow times."""
    if theory.second is None:
        return np.full_like(slow, np.nan)
    ratio = np.asarray(theory.second.ratio)
    return np.interp(slow, np.asarray(theory.drift.s)[: ratio.size], ratio)


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
