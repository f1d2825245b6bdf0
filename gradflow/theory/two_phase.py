"""The two-phase theory: fast flow to the critical manifold, then a slow drift on it."""

from collections.abc import Callable
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
    resolvable,
)
from ..flow.flow import check_free, GradientFlow
from ..flow.term import FlowTerm
from ..losses import AbstractCompositeLoss
from ..manifold import (
    Limit,
    limit_map,
    riemannian_flow,
    Spectrum,
    spectrum,
)
from ..metrics import Metric
from ..results import RESULTS
from ..runs.interpolate import DEGREE, holds_until, interpolate, place
from ..runs.path import Path
from ..runs.problem import as_metrics, check_problem
from ..runs.refine import FEWEST, MOST, refined
from ..runs.simulate import simulate
from ..runs.times import even_times
from ..solvers import KKT5, sharpness
from .predicted_time import bracket, predicted_time, PredictedTime
from .second_order import check_second_order, second_order, SecondOrder

_LOOSE = 1e-8  # tolerance of the limit map
_TIMES = 400  # at which a predicted metric is evaluated

# Where theory is claimed to hold: λ at most a tenth of η, and no term more than a
# quarter of the one before it, along the drift and along the fast path. There the
# estimate of the next term was right to a factor of 2.5 on five tasks.
_CURVATURE_SHARE = 0.1
_TERM_RATIO = 0.25

# Results with which a prediction stands; with the first three validity is claimed too.
_CLAIMED = (RESULTS.successful, RESULTS.rank_lost, RESULTS.second_order_lost)
_STANDING = (*_CLAIMED, RESULTS.slid, RESULTS.ambiguous_rank)


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
    drift: Path
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
    drift_degree: int = eqx.field(static=True, default=DEGREE)
    """The degree of the interpolation of the drift: 1 where the penalty has kinks."""
    where: str = ""
    """Where it failed: the phase, how far that came, and the curvatures there."""

    @property
    def smallest_curvature(self) -> Float[Array, " n"]:
        """η(s) along the drift; theory needs λ ≪ η."""
        return self.drift.stats["smallest_curvature"]

    def predict(
        self,
        t: Float[Array, " *n"] | float,
        weight_decay: float | Float[Array, ""],
        *,
        order: int = 1,
    ) -> PyTree:
        """The composite prediction θ_GF(t) + w°(λt) − Φ(θ₀), with an error of O(λ); at
        order 2, with + λ(e₁(t) + w₁(λt) + h(λt)), of O(λ²). See
        [`gradflow.SecondOrder`][].

        **Arguments:**

        - `t`: one time or a vector of n, in time t (not λt).
        - `weight_decay`: λ.
        - `order`: 1 or 2. The second is better wherever theory is asymptotic (see
            `valid_until`), and worse beyond.

        **Returns:** a model; its trainable leaves are stacked along `t` if that is a
        vector. NaN beyond the slow time to which the terms were computed.

        **Raises:** `ValueError` for another order, or one that was not computed.
        """
        self._check_order(order)
        check_arguments(weight_decay=weight_decay)
        check_numbers(t, "t", "one time from 0 on, or a vector", lambda v: v >= 0)
        dtype = self.fast.t.dtype
        t, lam = jnp.asarray(t, dtype), jnp.asarray(weight_decay, dtype)
        at_once = lambda x: self._predict_params(x, lam, order=order)
        params = at_once(t) if t.ndim == 0 else jax.lax.map(at_once, t)
        return eqx.combine(params, self.drift.static)

    def valid_until(self, weight_decay: float) -> float:
        """The slow time up to which theory is claimed to hold for this λ.

        That is where λ ≤ η(s)/10 for the smallest normal curvature η; where λρ(s) ≤ 1/4
        for the estimated ratio ρ of the terms of order λ² and λ; and where all terms
        are known. The fast phase comes first: no λ for which the ratio of the terms is
        larger than 1/4 anywhere on its path (at order 1, where that is not known, λθ₁
        against the solution: `fast_shift`) has any validity. Near saddles, which weight
        decay leaves later, that asks for far smaller λ than the drift does.

        **Returns:** s; 0 where λ is too large for the fast phase or from the start of
        the drift, the rank is a guess, or a path slid along kinks.

        **Raises:** `ValueError` unless λ > 0.
        """
        check_positive(weight_decay, "weight_decay")
        if self._doubt() or self._fast_ratio(weight_decay) > _TERM_RATIO:
            return 0.0
        s, lam = np.asarray(self.drift.t), float(weight_decay)
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
        worst = self.fast_shift if second is None else jnp.max(second.fast_ratio)
        return float(np.nan_to_num(weight_decay * worst, nan=np.inf))

    @property
    def _orders(self) -> tuple[int, ...]:
        """Those known; 3 with what is known of it."""
        return (1,) if self.second is None else (1, 2, 3)

    def _doubt(self) -> str:
        """Why nothing is claimed, for whatever λ; empty where something is."""
        return "" if _among(self.result, _CLAIMED) else RESULTS[self.result]

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
        """The same for the metric `"train"`; see `grokking_time`."""
        return self.crossing_time("train", weight_decay)

    def crossing_time(self, name: str, weight_decay: float) -> PredictedTime:
        """The same for any metric; see `grokking_time`."""
        watched = self.drift.watched
        if name not in watched:
            raise ValueError(
                f"name: no metric is named {name!r}; two_phase was given "
                f"{list(watched) or 'none'}."
            )
        return self._time_from(weight_decay, name, *self._predicted(weight_decay))

    def _time_from(
        self, weight_decay: float, name: str, t: np.ndarray, found: "_Along"
    ) -> PredictedTime:
        """`crossing_time` from what `_predicted` gave."""
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
            return PredictedTime(np.nan, np.nan, 1 if self.second is None else 2, doubt)
        if (near := bracket(t, curves, metric)) is not None:
            # Once more in between, where they cross.
            t = np.linspace(*near, t.size)
            found = self._along(weight_decay, t)
            curves = [curve[name] for curve in found.curves]
        return predicted_time(
            t, curves, metric, until, self._ratio(weight_decay, t), found.delay
        )

    def _ratio(self, weight_decay: float, t: np.ndarray) -> np.ndarray:
        """The ratio of the next term to that of order λ at times t, the largest so
        far; NaN where it is not known."""
        if self.second is None:
            return np.full_like(t, np.nan)
        second, drift = self.second, np.asarray(self.drift.t)
        known = np.asarray(second.ratio)
        along = np.maximum.accumulate(known)
        slow = np.interp(weight_decay * t, drift[: known.size], along)
        fast = np.maximum.accumulate(np.asarray(second.fast_ratio))
        x = np.linspace(0, 1, fast.size)
        nodes = np.asarray(even_times(x, self.fast.t[-1], self.fast_scale))
        ratio = weight_decay * np.maximum(slow, np.interp(t, nodes, fast))
        inside = max(float(second.fast_mismatch), float(second.mismatch))
        return ratio + np.where(t < nodes[-1], inside, float(second.mismatch))

    def _predicted(self, weight_decay: float) -> "tuple[np.ndarray, _Along]":
        """The metrics along the prediction, as far as theory holds.

        **Returns:** times t, zero and evenly spaced in log t up to `valid_until`; and
        what is there. NaN where λ is too large from the start.
        """
        check_positive(weight_decay, "weight_decay")
        until = self.valid_until(weight_decay)
        if until <= 0:
            none = np.full(_TIMES + 1, np.nan)
            curves = [dict.fromkeys(self.drift.watched, none)] * len(self._orders)
            return none, _Along(curves, none)
        end = until / float(weight_decay)
        start = min(0.05 * float(self.fast_scale), 0.1 * end)
        t = np.append(0.0, np.geomspace(start, end, _TIMES))
        return t, self._along(weight_decay, t)

    def _along(self, weight_decay: float, t: np.ndarray) -> "_Along":
        dtype = self.fast.t.dtype
        found = _metrics_along(
            self, jnp.asarray(weight_decay, dtype), jnp.asarray(t, dtype)
        )
        return jax.tree.map(np.asarray, found)

    def _check_order(self, order: int) -> None:
        check_choice(order, "order", (1, 2))
        if order == 2 and self.second is None:
            raise ValueError(
                "order: the second was not computed; call two_phase with order=2"
                " (or see `result`, where that was done)."
            )

    def _predict_params(
        self, t: Float[Array, ""], lam: Float[Array, ""], *, order: int = 1
    ) -> PyTree:
        """As `predict`, for one time: the trainable parameters alone. Order 3 is what
        is known of it: the term of order λ² as it is at the end of the fast phase."""
        end_s = self.drift.t[-1]
        s = lam * t
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
        at = place(s, self.drift.t[-1], 1.0, len(self.drift))
        return interpolate(values, at, self.drift_degree)

    def __str__(self) -> str:
        eta = self.smallest_curvature
        lines = [
            f"Two-phase theory: {self.spectrum}",
            f"  fast phase to t = {float(self.fast.t[-1]):.3g}, drift to "
            f"s = {float(self.drift.t[-1]):.3g}; smallest normal curvature η = "
            f"{float(eta[0]):.2g} at its start, {float(eta[-1]):.2g} at its end",
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
        if not bool(self.result == RESULTS.successful):
            word = "WARNING" if _among(self.result, _STANDING) else "FAILED"
            lines.append(f"  {word}: {self.where}{RESULTS[self.result]}")
        return "\n".join(lines)


def two_phase(
    flow: GradientFlow,
    model: PyTree,
    *,
    slow_time: float,
    metrics: dict[str, Callable | Metric] | None = None,
    order: int = 1,
    rtol: float = 1e-9,
    t_max: float = 1e10,
    max_steps: int = 100_000,
    throw: bool = True,
) -> TwoPhase:
    """Predicts the flow from `model` for all small weight decays.

    Three runs: the limit map, the fast path on a grid fit for interpolation, and the
    Riemannian flow from its end. Both paths are saved at 65 points, and run again for
    more where interpolating them would add more than 30 `rtol` to the error: where a
    phase changes abruptly. The terms of the second order take one linear equation
    along each of the two paths: from half a run to some runs more, the more the closer
    the drift comes to a singular point.

    **Arguments:**

    - `flow`: loss and penalty.
    - `model`: the initial model θ₀.
    - `slow_time`: how far to follow the drift, s = λt.
    - `metrics`: as for `simulate`; recorded along both phases.
    - `order`: 1, or 2 to compute the terms of the second order too, which the error
        estimates come from; these need a loss and a penalty that are smooth, and in the
        Hessian form at most 5000 parameters.
    - `rtol`: the tolerance of the runs.
    - `t_max`: the time at which to give up the search for the limit.
    - `max_steps`: the budget of steps of each.
    - `throw`: raise where theory does not apply; otherwise see `result`.

    **Returns:** a `TwoPhase`.

    **Raises:** `ValueError` for arguments that make no sense; `RuntimeError` if `throw`
    and there is no limit (the loss has no minimiser, say) or the drift fails: it names
    the phase, the time that was reached, and the smallest curvatures of F there.
    """
    check_free(flow)
    check_arguments(slow_time=slow_time, rtol=rtol, max_steps=max_steps)
    check_choice(order, "order", (1, 2))
    watched = as_metrics(metrics)
    term, params = flow.term(model)
    check_problem(term, params, watched)
    rtol = resolvable(rtol, params)
    # It says whether there is a limit, when, and how curved F is there: a loose one
    # will do. The limit itself is the end of the fast path.
    limit = limit_map(
        flow.loss,
        model,
        rtol=max(rtol, _LOOSE),
        t_max=t_max,
        max_steps=max_steps,
        throw=False,
        trainable=flow.trainable,
    )
    found = bool(limit.result == RESULTS.successful)
    where = ""
    if not found:
        where = _place(flow, "limit", f"t = {float(limit.time):.3g}", limit.model)
        if throw:
            raise RuntimeError(where + RESULTS[limit.result])
    # Where there is no limit, the paths are to look at: as they come.
    most = MOST if found else FEWEST
    at_limit = spectrum(flow.loss, limit.model, trainable=flow.trainable)
    if order == 2:
        check_second_order(at_limit, flow.penalty)
    tau, until = _fast_scales(term, params, limit, at_limit.smallest_curvature)
    target = 30 * rtol * optax.tree.norm(flow.partition(limit.model)[0])
    options = dict(metrics=metrics, rtol=rtol, max_steps=max_steps, throw=False)
    fast, error = refined(
        lambda x: simulate(
            flow,
            model,
            weight_decay=0.0,
            ts=even_times(x, until, tau),
            solver=_solver(flow),
            **options,
        ),
        target,
        most=most,
    )
    if found and not bool(fast.succeeded):
        where = _end_of(flow, "fast", "t", fast)
        if throw:
            raise RuntimeError(where + RESULTS[fast.result])
    # A failed run ends in NaN: there the limit, wherever it got to, stands in.
    last = fast[-1] if bool(fast.succeeded) else limit.model
    degree = DEGREE if flow.penalty.smooth else 1
    drift, more = refined(
        lambda x: riemannian_flow(
            flow,
            last,
            slow_time=slow_time,
            ts=even_times(x, jnp.asarray(slow_time, tau.dtype), jnp.ones_like(tau)),
            **options,
        ),
        target,
        most=most,
        degree=degree,
    )
    # Retracted, so that the two phases meet to all digits.
    end = drift[0]
    size = optax.tree.norm(flow.partition(end)[0])
    errors = (error + more) / size, more / size
    result = _first_failure(limit.result, fast.result, drift.result)
    if bool(drift.succeeded):
        at_limit = spectrum(flow.loss, end, trainable=flow.trainable)
    # Past the loss of rank the drift still stands; its validity is for the report.
    if bool(result == RESULTS.successful) and bool(at_limit.ambiguous):
        result = RESULTS.ambiguous_rank
    fatal = not _among(result, _STANDING)
    if fatal and not where:
        where = _end_of(flow, "drift", "s", drift)
    if fatal and throw:
        raise RuntimeError(where + RESULTS[result])
    terms = None
    # Along kinks there are no second derivatives to go by.
    if order == 2 and not fatal and not bool(result == RESULTS.slid):
        terms = second_order(term, fast, drift, at_limit, tau)
        if terms is None and bool(result == RESULTS.successful):
            result = RESULTS.second_order_lost
    shift = _fast_shift(term, fast.t, fast.params)
    return TwoPhase(
        end, fast, drift, at_limit, tau, *errors, shift, terms, result, degree, where
    )


def _end_of(flow: GradientFlow, phase: str, unit: str, path: Path) -> str:
    """`_place` of where a run ended."""
    reached = np.flatnonzero(np.isfinite(np.asarray(path.train_loss)))
    last = int(reached[-1]) if reached.size else 0
    return _place(flow, phase, f"{unit} = {float(path.t[last]):.3g}", path[last])


def _place(flow: GradientFlow, phase: str, reached: str, model: PyTree) -> str:
    """The phase in which a prediction failed, where, and the spectrum there."""
    text = f"{phase} phase, reached {reached}"
    leaves = jax.tree.leaves(flow.partition(model)[0])
    if all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in leaves):
        at = spectrum(flow.loss, model, trainable=flow.trainable)
        values = np.asarray(at.curvatures)[: max(int(at.rank), 1)]
        smallest = ", ".join(f"{value:.2g}" for value in values[-3:])
        text += (
            f", rank {int(at.rank)}, smallest normal curvatures {smallest} (largest "
            f"{values[0]:.2g})"
        )
    return text + ": "


def _solver(flow: GradientFlow) -> KKT5 | None:
    """The one that the drift takes too, so that both compile once."""
    return KKT5() if isinstance(flow.loss, AbstractCompositeLoss) else None


def _fast_scales(
    term: Any, params: PyTree, limit: Limit, curvature: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """τ, and the end of the fast path, where e^{−ηt} has brought it from the 5e-7 of
    `limit_map` to 1e-12 of the limit."""
    # Where ∇²F vanishes at θ₀ the limit's own time is all there is to go by.
    tau = jnp.minimum(0.2 / sharpness(term, params), 1e-3 * (1 + limit.time))
    end = limit.time + 13.0 / jnp.where(jnp.isfinite(curvature), curvature, 1.0)
    return tau, jnp.maximum(end, 10 * tau)


class _Along(NamedTuple):
    """What a prediction is at n times."""

    curves: list[dict[str, Any]]
    """The metrics by name, at order 1 and, if known, at 2 and with the next term."""
    delay: Any
    """The time in which it moves by what its runs and the interpolation are off."""


@eqx.filter_jit
def _metrics_along(
    theory: TwoPhase, lam: Float[Array, ""], t: Float[Array, " n"]
) -> _Along:
    size = optax.tree.norm(jax.tree.map(lambda w: w[0], theory.drift.params))

    def metrics(t, order):
        params = theory._predict_params(t, lam, order=order)
        model = eqx.combine(params, theory.drift.static)
        return {name: metric(model) for name, metric in theory.drift.watched.items()}

    def delay(t):
        at = lambda t: theory._predict_params(t, lam)
        speed = optax.tree.norm(jax.jvp(at, (t,), (jnp.ones_like(t),))[1])
        both, one = theory.interpolation_error, theory.drift_interpolation_error
        off = jnp.where(t < theory.fast.t[-1], both, one)
        off = size * (off + 10 * theory.fast.stats["rtol"])
        return off / jnp.maximum(speed, jnp.finfo(t.dtype).tiny)

    curves = [jax.lax.map(lambda t, k=k: metrics(t, k), t) for k in theory._orders]
    return _Along(curves, jax.lax.map(delay, t))


@eqx.filter_jit
def _fast_shift(
    term: FlowTerm, t: Float[Array, " n"], path: PyTree
) -> Float[Array, ""]:
    """sup c‖θ'‖/‖Φ‖, c = ∫|⟨∇R, θ'⟩|/‖θ'‖² dt: see `TwoPhase.fast_shift`. θ' itself
    solves v' = −∇²F v, so −cθ' is the part along the path of what
    θ₁' = −∇²F θ₁ − ∇R makes."""
    end = jax.tree.map(lambda p: p[-1], path)
    size = optax.tree.norm(end)

    def at(p):
        speed = term.vf(0.0, p, 0.0)
        left = optax.tree.norm(jax.tree.map(jnp.subtract, p, end))
        along = optax.tree.vdot(term.penalty.gradient(p), speed)
        return optax.tree.norm(speed), jnp.abs(along), left

    speed, along, left = jax.lax.map(at, path)
    # Near its end what is left of the speed is rounding.
    moving = (left > 1e-6 * size) & (speed > 0)
    rate = jnp.where(moving, along / jnp.where(moving, speed, 1.0) ** 2, 0.0)
    steps = 0.5 * (rate[1:] + rate[:-1]) * jnp.diff(t)
    shift = jnp.cumsum(steps) * jnp.where(moving, speed, 0.0)[1:]
    return jnp.max(shift) / size


def _among(result: RESULTS, results: tuple[RESULTS, ...]) -> bool:
    return any(bool(result == r) for r in results)


def _first_failure(*results: RESULTS) -> RESULTS:
    out = results[-1]
    for result in reversed(results[:-1]):
        out = RESULTS.where(result == RESULTS.successful, out, result)
    return out
