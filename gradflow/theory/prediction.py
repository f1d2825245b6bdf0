"""The two-phase prediction: what it says of every small weight decay, and how far."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from .._checks import (
    check_arguments,
    check_choice,
    check_numbers,
    check_positive,
    is_concrete,
)
from .._host import as_array, taken
from ..manifold import Drift, Spectrum
from ..precision import exact_products
from ..results import among, is_known, RESULTS
from ..runs.interpolate import DEGREE, holds_until, interpolate, place
from ..runs.path import Path
from ..runs.stacked import stacked
from ..runs.times import even_times
from .labelled import of_theory
from .predicted_time import bracket, predicted_time, PredictedTime
from .second_order import SecondOrder

_TIMES = 400  # at which a predicted metric is evaluated

# Where theory is claimed to hold: λ at most a tenth of η, and no term more than a
# quarter of the one before it, along the drift and along the fast path. There the
# estimate of the next term was right to a factor of 2.5 on five tasks.
_CURVATURE_SHARE = 0.1
_TERM_RATIO = 0.25

# Results with which a prediction stands; with the first three validity is claimed too.
_CLAIMED = (RESULTS.successful, RESULTS.rank_lost, RESULTS.second_order_lost)
_STANDING = (*_CLAIMED, RESULTS.slid, RESULTS.ambiguous_rank)


class Predicted(NamedTuple):
    """The metrics of a prediction at n times."""

    t: Float[Array | np.ndarray, " n"]
    """These times t."""
    curves: list[dict[str, Float[Array | np.ndarray, "n ..."]]]
    """The metrics by name, at order 1 and, if known, at 2 and with the next term."""
    delay: Float[Array | np.ndarray, " n"]
    """The time in which it moves by what its runs and the interpolation are off."""

    @property
    def best(self) -> dict[str, Float[Array | np.ndarray, "n ..."]]:
        """The metrics at the highest order that is known as a whole."""
        return self.curves[:2][-1]


class TwoPhase(eqx.Module):
    """The prediction for every small weight decay at once.

    θ_λ(t) ≈ θ_GF(t) + w°(λt) − Φ(θ₀), uniformly in t with an error of O(λ), as long as
    λ is small against the smallest normal curvature of F along the drift. Convergence:
    Boursier, Pesme, Dragomir, arXiv 2505.20172, propositions 1 and 2.
    """

    limit: PyTree
    """The model Φ(θ₀) at which the fast phase ends and the drift begins."""
    fast: Path
    """θ_GF, the flow without weight decay, in time t."""
    drift: Drift
    """w°, the Riemannian flow of R on the critical manifold, in slow time s."""
    spectrum: Spectrum
    """The curvature of F at Φ(θ₀): rank, dimension of the manifold, gap."""
    fast_scale: Float[Array, ""]
    """τ: the fast path is saved evenly in log(1 + t/τ)."""
    interpolation_error: Float[Array, ""]
    """An estimate of what interpolating the two paths adds to the error, relative to
    ‖Φ(θ₀)‖: at most 60 `rtol`, unless 1025 points are too few for that. Where the
    penalty has kinks the drift has at most 257 points, and straight lines between
    them."""
    drift_interpolation_error: Float[Array, ""]
    """The part of it that remains when the fast phase has ended."""
    fast_shift: Float[Array, ""]
    """An estimate of sup ‖θ₁‖/‖Φ(θ₀)‖ over the fast phase, θ_λ = θ_GF + λθ₁ there. Near
    a saddle weight decay delays the escape by λc, c = ∫|⟨∇R, θ'⟩|/‖θ'‖² dt, and
    θ₁ = −cθ'."""
    second: SecondOrder | None
    """The terms of order λ, for predictions of order 2; `None` where not asked for."""
    result: RESULTS
    """Whether theory applies, and why not."""
    drift_degree: int = eqx.field(static=True, default=DEGREE)
    """The degree of the interpolation of the drift: 1 where the penalty has kinks."""
    where: str = ""
    """Where it failed: the phase, how far that came, and the curvatures there."""

    @property
    def smallest_curvature(self) -> Float[Array, " n"]:
        """η(s) along the drift; theory needs λ ≪ η."""
        return self.drift.smallest_curvature

    @property
    def regular_until(self) -> float:
        """The slow time at which η has fallen to a tenth of what it was at the start of
        the drift, or the end of the drift."""
        s, eta = np.asarray(self.drift.s), np.asarray(self.smallest_curvature)
        flat = np.isinf(eta)  # no normal directions at all
        share = np.where(flat, 10.0, eta / np.where(flat, 1, 0.1 * eta[0]))
        return holds_until(s, share)

    @property
    def orders(self) -> tuple[int, ...]:
        """The orders of the prediction that are known: (1,) or (1, 2)."""
        return (1,) if self.second is None else (1, 2)

    @exact_products
    def predict(
        self,
        t: Float[Array, " *n"] | float,
        weight_decay: float | Float[Array, ""] | None = None,
        *,
        slow_time: Float[Array, " *n"] | float | None = None,
        order: int = 1,
    ) -> PyTree:
        """The composite prediction θ_GF(t) + w°(λt) − Φ(θ₀), with an error of O(λ); at
        order 2, with + λ(e₁(t) + w₁(λt) + h(λt)), of O(λ²). See
        [`gradflow.SecondOrder`][].

        **Arguments:**

        - `t`: one time or a vector of n, in time t (not λt).
        - `weight_decay`: λ.
        - `slow_time`: in place of λ the slow time s at each t, such as the
            `path.slow_time` of a weight decay on a schedule. At order 1.
        - `order`: 1 or 2. The second is better wherever theory is asymptotic (see
            `valid_until`), and worse beyond.

        **Returns:** a model; for a vector `t` they are stacked along it as one, see
        `Path.models`. NaN beyond the slow time to which the terms were computed.

        **Raises:** `ValueError` for another order, or one that was not computed; and
        unless one of λ and `slow_time` is given.
        """
        self._check_order(order)
        check_numbers(t, "t", "one time from 0 on, or a vector", lambda v: v >= 0)
        t = jnp.asarray(t, self.fast.t.dtype)
        if (weight_decay is None) == (slow_time is None):
            raise ValueError("weight_decay, slow_time: give one of them.")
        if slow_time is None:
            check_arguments(weight_decay=weight_decay)
            lam = jnp.asarray(weight_decay, t.dtype)
            s = lam * t
        else:
            if order != 1:
                raise ValueError("slow_time: at order 1 only; λ itself enters order 2.")
            expected = "the slow times at t, from 0 on"
            check_numbers(slow_time, "slow_time", expected, lambda v: v >= 0)
            lam, s = jnp.zeros((), t.dtype), jnp.asarray(slow_time, t.dtype)
            if s.shape != t.shape:
                raise ValueError(
                    f"slow_time: expected {expected}, got shape {s.shape}."
                )

        def at_once(at: tuple[Float[Array, ""], Float[Array, ""]]) -> PyTree:
            return self.predict_params(at[0], lam, s=at[1], order=order)

        if t.ndim == 0:
            return eqx.combine(at_once((t, s)), self.drift.static)
        return stacked(jax.lax.map(at_once, (t, s)), self.drift.static, t.shape)

    def valid_until(self, weight_decay: float) -> float:
        """The slow time up to which theory is claimed to hold for this λ.

        That is where λ ≤ η(s)/10 for the smallest normal curvature η; where λρ(s) ≤ 1/4
        for the estimated ratio ρ of the terms of order λ² and λ; and where all terms
        are known. The fast phase comes first: no λ for which the ratio of the terms is
        larger than 1/4 anywhere on its path (at order 1, where that is not known, λθ₁
        against the solution: `fast_shift`) has any validity. Near saddles, which weight
        decay leaves later, that asks for far smaller λ than the drift does.

        **Arguments:** `weight_decay`: λ > 0.

        **Returns:** s; 0 where λ is too large for the fast phase or from the start of
        the drift, the rank is a guess, or a path slid along kinks.

        **Raises:** `ValueError` unless λ > 0.
        """
        check_positive(weight_decay, "weight_decay")
        if self._doubt() or self._fast_ratio(weight_decay) > _TERM_RATIO:
            return 0.0
        s, lam = np.asarray(self.drift.s), float(weight_decay)
        share = _CURVATURE_SHARE * np.asarray(self.smallest_curvature) / lam
        end = holds_until(s, share)
        if self.second is None:
            return end
        ratio = np.asarray(self.second.ratio)
        fall = np.divide(
            _TERM_RATIO / lam, ratio, out=np.full_like(ratio, np.inf), where=ratio != 0
        )
        return min(end, holds_until(s[: ratio.size], fall))

    def _fast_ratio(self, weight_decay: float) -> float:
        """The largest ratio of the terms along the fast path."""
        second = self.second
        worst = self.fast_shift if second is None else second.fast_ratio
        return float(np.nan_to_num(weight_decay * np.asarray(worst).max(), nan=np.inf))

    def _doubt(self) -> str:
        """Why nothing is claimed, for whatever λ; empty where something is."""
        return "" if among(self.result, *_CLAIMED) else RESULTS[self.result]

    def grokking_time(self, weight_decay: float) -> PredictedTime:
        """When the metric `"test"` will have passed its threshold for good; from the
        same fast path and drift for every λ.

        **Arguments:**

        - `weight_decay`: λ > 0.

        **Returns:** a [`gradflow.PredictedTime`][]: the time t, with an error from the
        terms of the second order where they are known. NaN, with the reason, where it
        is not crossed while theory holds (see `valid_until`).

        **Raises:** `ValueError` where no metric has that name, or unless λ > 0.
        """
        return self.crossing_time("test", weight_decay)

    def memorisation_time(self, weight_decay: float) -> PredictedTime:
        """The same for the metric `"train"`; see `grokking_time`.

        **Arguments:** `weight_decay`: λ > 0.

        **Raises:** `ValueError` as that.
        """
        return self.crossing_time("train", weight_decay)

    def crossing_time(self, name: str, weight_decay: float) -> PredictedTime:
        """The same for any metric; see `grokking_time`.

        **Arguments:**

        - `name`: of the metric.
        - `weight_decay`: λ > 0.

        **Raises:** `ValueError` as that.
        """
        watched = self.drift.watched
        if name not in watched:
            raise ValueError(
                f"name: no metric is named {name!r}; two_phase was given "
                f"{list(watched) or 'none'}."
            )
        return self.time_from(weight_decay, name, self.predicted(weight_decay))

    def time_from(
        self, weight_decay: float, name: str, found: Predicted
    ) -> PredictedTime:
        """`crossing_time` of metric `name` at λ = `weight_decay`, from what `predicted`
        gave: `found`.

        **Raises:** `ValueError` where no metric has that name, or unless λ > 0.
        """
        check_choice(name, "name", tuple(self.drift.watched))
        metric = self.drift.watched[name]
        curves = [curve[name] for curve in found.curves]
        until = self.valid_until(weight_decay)
        doubt = self._doubt()
        if not doubt and until <= 0:
            doubt = "λ is too large for the theory, " + (
                "in the fast phase: its terms do not fall"
                if self._fast_ratio(weight_decay) > _TERM_RATIO
                else "from the start of the drift on"
            )
        if doubt:
            return PredictedTime(np.nan, np.nan, self.orders[-1], doubt)
        if (near := bracket(found.t, curves, metric)) is not None:
            # Once more in between, where they cross.
            found = self._along(weight_decay, np.linspace(*near, found.t.size))
            curves = [curve[name] for curve in found.curves]
        ratio = self._ratio(weight_decay, found.t)
        return predicted_time(found.t, curves, metric, until, ratio, found.delay)

    def _ratio(self, weight_decay: float, t: np.ndarray) -> np.ndarray:
        """The ratio of the next term to that of order λ at times t, the largest so
        far; NaN where it is not known."""
        if self.second is None:
            return np.full_like(t, np.nan)
        second, drift = self.second, np.asarray(self.drift.s)
        known = np.asarray(second.ratio)
        along = np.maximum.accumulate(known)
        slow = np.interp(weight_decay * t, drift[: known.size], along)
        fast = np.maximum.accumulate(np.asarray(second.fast_ratio))
        x = np.linspace(0, 1, fast.size)
        nodes = np.asarray(even_times(x, taken(self.fast.t, -1), self.fast_scale))
        ratio = weight_decay * np.maximum(slow, np.interp(t, nodes, fast))
        inside = max(float(second.fast_mismatch), float(second.mismatch))
        return ratio + np.where(t < nodes[-1], inside, float(second.mismatch))

    def predicted(self, weight_decay: float) -> Predicted:
        """The metrics along the prediction, as far as theory holds: at zero, and at
        times evenly spaced in log t up to `valid_until`. NaN where λ is too large from
        the start.

        **Arguments:** `weight_decay`: λ > 0.

        **Raises:** `ValueError` for any other λ.
        """
        check_positive(weight_decay, "weight_decay")
        until = self.valid_until(weight_decay)
        if until <= 0:
            none = np.full(_TIMES + 1, np.nan)
            known = self.drift.metrics.items()
            curves = {k: np.full((none.size, *v.shape[1:]), np.nan) for k, v in known}
            return Predicted(none, [curves] * len(_evaluated(self)), none)
        end = until / float(weight_decay)
        start = min(0.05 * float(self.fast_scale), 0.1 * end)
        t = np.append(0.0, np.geomspace(start, end, _TIMES))
        return self._along(weight_decay, t)

    @exact_products
    def _along(self, weight_decay: float, t: np.ndarray) -> Predicted:
        dtype = self.fast.t.dtype
        found = _metrics_along(self, as_array(weight_decay, dtype), as_array(t, dtype))
        return Predicted(t, *jax.tree.map(np.asarray, found))

    def _check_order(self, order: int) -> None:
        check_choice(order, "order", (1, 2))
        if order == 2 and self.second is None:
            raise ValueError(
                "order: the second was not computed; call two_phase with order=2"
                " (or see `result`, where that was done)."
            )

    def predict_params(
        self,
        t: Float[Array, ""],
        lam: Float[Array, ""],
        *,
        s: Float[Array, ""] | None = None,
        order: int = 1,
    ) -> PyTree:
        """As `predict`, for one time `t`, λ = `lam`, and s = λt unless `s` is given:
        the trainable parameters alone. An `order` of 3 is what is known of it: the term
        of order λ² as it is at the end of the fast phase."""
        end_s = self.drift.s[-1]
        s = lam * t if s is None else s
        # Beyond its last time the fast path has arrived.
        arrived = t >= self.fast.t[-1]
        fast = self._along_fast(self.fast.params, t)
        out = jax.tree.map(
            lambda w, th, ths: w + jnp.where(arrived, 0.0, th - ths[-1]),
            self._along_drift(self.drift.params, s),
            fast,
            self.fast.params,
        )
        if order > 1 and self.second is not None:
            end_s = self.second.until
            change = self._second_term(t, s)
            if order == 3:
                more = self._along_fast(self.second.next, t)
                change = jax.tree.map(lambda c, m: c + lam * m, change, more)
            out = jax.tree.map(lambda w, c: w + lam * c, out, change)
        known = s <= end_s * (1 + 8 * jnp.finfo(s.dtype).eps)
        return jax.tree.map(lambda w: jnp.where(known, w, jnp.nan), out)

    def _second_term(self, t: Float[Array, ""], s: Float[Array, ""]) -> PyTree:
        assert self.second is not None
        arrived = t >= self.fast.t[-1]
        return jax.tree.map(
            lambda e, w, h: jnp.where(arrived, 0.0, e) + w + h,
            self._along_fast(self.second.inner, t),
            self._along_drift(self.second.tangent, s),
            self._along_drift(self.second.offset, s),
        )

    def _along_fast(self, values: PyTree, t: Float[Array, ""]) -> PyTree:
        """`values` at even times of the fast path, at time t."""
        count = jax.tree.leaves(values)[0].shape[0]
        return interpolate(values, place(t, self.fast.t[-1], self.fast_scale, count))

    def _along_drift(self, values: PyTree, s: Float[Array, ""]) -> PyTree:
        """`values` at the nodes of the drift, at slow time s."""
        at = place(s, self.drift.s[-1], 1.0, len(self.drift))
        return interpolate(values, at, self.drift_degree)

    @property
    def stands(self) -> bool:
        """Whether there is a prediction: `result` is no failure."""
        return bool(among(self.result, *_STANDING))

    def __str__(self) -> str:
        t, s, eta = map(
            np.asarray, (self.fast.t, self.drift.s, self.smallest_curvature)
        )
        lines = [
            f"Two-phase theory: {self.spectrum}",
            f"  fast phase to t = {t[-1]:.3g}, drift to "
            f"s = {s[-1]:.3g}; smallest normal curvature η = "
            f"{eta[0]:.2g} at its start, {eta[-1]:.2g} at its end",
        ]
        if self.second is not None:
            lines.append(f"  {self.second}")
        if float(self.interpolation_error) > 1e-6:
            why = "a phase changes abruptly, late in its course"
            if self.drift_degree == 1:
                why = "the penalty has kinks, and with it the drift"
            lines.append(
                "  interpolated with a relative error of about "
                f"{float(self.interpolation_error):.1g}: {why}"
            )
        if not among(self.result, RESULTS.successful):
            word = "WARNING" if self.stands else "FAILED"
            lines.append(f"  {word}: {self.where}{RESULTS[self.result]}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        fast, slow = self.fast.t, self.drift.s
        if not (is_concrete(fast) and is_concrete(slow) and is_known(self.result)):
            return "<TwoPhase of what is traced>"
        ended = "successful"
        if not among(self.result, RESULTS.successful):
            ended = "WARNING" if self.stands else "FAILED"
        return (
            f"<TwoPhase of order {self.orders[-1]}, fast phase to "
            f"t = {np.asarray(fast)[-1]:.3g}, drift to s = {np.asarray(slow)[-1]:.3g}: "
            f"{ended}>"
        )

    def _repr_html_(self) -> str:
        from .. import plot

        return plot.as_html(str(self), lambda ax: plot.drift(self.drift, ax))

    def to_xarray(self) -> Any:
        """An `xarray.Dataset` of the two phases: what is recorded along the fast path
        by names `fast_…`, along `fast_time`, and along the drift by `drift_…`, along
        `drift_time`; see `Path.to_xarray` and `Drift.to_xarray`.

        And `fast_scale` (a time t), `interpolation_error` and `fast_shift` (relative to
        ‖Φ(θ₀)‖), `rank` and `dimension` of the manifold, `drift_ratio` at order 2 (the
        `ratio` of the [`gradflow.SecondOrder`][]; NaN where it is not known), and
        `result`.
        """
        return of_theory(self)


def _evaluated(theory: TwoPhase) -> tuple[int, ...]:
    """The orders that metrics are evaluated at; 3 with what is known of it."""
    return (1,) if theory.second is None else (1, 2, 3)


@eqx.filter_jit
def _metrics_along(
    theory: TwoPhase, lam: Float[Array, ""], t: Float[Array, " n"]
) -> tuple[list[dict[str, Float[Array, "n ..."]]], Float[Array, " n"]]:
    """The curves and the delay of `Predicted`."""
    size = optax.tree.norm(jax.tree.map(lambda w: w[0], theory.drift.params))
    rtol = theory.fast.stats.rtol
    assert rtol is not None

    def at(t: Float[Array, ""]) -> PyTree:
        return theory.predict_params(t, lam)

    def metrics(t, order):
        params = theory.predict_params(t, lam, order=order)
        model = eqx.combine(params, theory.drift.static)
        return {name: metric(model) for name, metric in theory.drift.watched.items()}

    def delay(t):
        speed = optax.tree.norm(jax.jvp(at, (t,), (jnp.ones_like(t),))[1])
        both, one = theory.interpolation_error, theory.drift_interpolation_error
        off = jnp.where(t < theory.fast.t[-1], both, one)
        off = size * (off + 10 * rtol)
        return off / jnp.maximum(speed, jnp.finfo(t.dtype).tiny)

    orders = _evaluated(theory)
    curves = [jax.lax.map(lambda t, k=k: metrics(t, k), t) for k in orders]
    return curves, jax.lax.map(delay, t)
