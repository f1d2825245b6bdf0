"""Flows with a penalty whose kinks are coordinates at zero, such as ℓ1: exact sliding.

θ' ∈ −∇F(θ) − λ∂R(θ) with R = S + Σ wᵢ|θᵢ|, S smooth. Between events each coordinate is
positive, negative or held at zero, and the flow is smooth. A held one stays while
|∂ᵢ(F + λS)| ≤ λwᵢ, for then 0 is the element of least norm of its part of the right
side. Steps end on the events: where a coordinate reaches zero, and where a held one is
let go (Filippov, Differential Equations with Discontinuous Righthand Sides, 1988).
"""

from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree, Scalar

from .._norms import rms
from .._typing import BoolScalarLike, RealScalarLike
from ..flow.decay import decay_at, DecaySchedule
from ..flow.term import AbstractChart, AbstractFlowTerm, Tracked, TrackedFlowTerm
from ..losses import AbstractLoss
from ..penalties import absolute_weights, AbstractPenalty, smooth_gradient
from ..results import RESULTS
from .base import AbstractFlowSolver, Controller, Followed, Saved
from .controllers import Landing
from .kkt import AbstractKKT
from .orthant import OnOrthant, tracked_gradient, unwrap
from .stages import ChordIteration

# An event may be missed by this share of the tolerance of a step.
_SHARE = 0.1


class Signed(eqx.Module):
    """A `Tracked` state, with the sign of each coordinate: 0 where it is held at zero,
    1 where |θᵢ| has no part in R."""

    tracked: Tracked
    sign: Float[Array, "*times d"]
    landing: Float[Array, " *times"]
    """The part of the step at which it should have ended, negative if for a release;
    1 where it need not be shortened."""

    @property
    def params(self) -> PyTree:
        """θ, with zeros that are zeros to the bit."""
        theta, unravel = ravel_pytree(self.tracked.params)
        return unravel(jnp.where(jnp.abs(self.sign) > 0.5, theta, 0.0))

    @property
    def multiplier(self) -> Float[Array, " m"]:
        return self.tracked.multiplier


class _State(eqx.Module):
    inner: Any
    force: Float[Array, " d"]  # ∇(F + λS) where the last step ended


class SignedFlowTerm(AbstractFlowTerm):
    """The flow with a `Signed` state."""

    loss: AbstractLoss
    penalty: AbstractPenalty
    chart: AbstractChart

    def vf(self, t: RealScalarLike, y: Signed, args: PyTree) -> Signed:
        inner = _on_orthant(self, y.sign).vf(t, y.tracked, args)
        return Signed(inner, jnp.zeros_like(y.sign), jnp.zeros_like(y.landing))


class ActiveSet(
    AbstractFlowSolver,
    diffrax.AbstractAdaptiveSolver[_State],
    diffrax.AbstractWrappedSolver[_State],
):
    """A KKT solver for a penalty with kinks where coordinates are zero. Use it with
    the term and the state of `follow`, and with the controller of `controlled`."""

    solver: AbstractKKT
    differentiable: ClassVar[bool] = False
    sees_growth: ClassVar[bool] = True
    sees_jumps: ClassVar[bool] = True
    term_structure: ClassVar = SignedFlowTerm
    interpolation_cls: ClassVar = (
        diffrax.ThirdOrderHermitePolynomialInterpolation.from_k
    )

    def order(self, terms: PyTree[diffrax.AbstractTerm]) -> int | None:
        return self.solver.order(terms)

    def func(
        self, terms: diffrax.AbstractTerm, t0: RealScalarLike, y0: PyTree, args: PyTree
    ) -> PyTree:
        return terms.vf(t0, y0, args)

    @property
    def name(self) -> str:
        return self.solver.name

    @property
    def root_finder(self) -> ChordIteration:
        """Of the solver within, to which Diffrax gives the tolerances."""
        return self.solver.root_finder

    def follow(
        self, term: AbstractFlowTerm, params: PyTree, weight_decay: Scalar
    ) -> Followed:
        """Coordinates that start at zero are held there if they may be."""
        tracked = self.solver.follow(term, params, weight_decay).state
        out = SignedFlowTerm(term.loss, term.penalty, term.chart)
        theta, _ = ravel_pytree(params)
        weights = _weights(term, params)
        force = _force(out, tracked, weight_decay)
        leaving = jnp.abs(force) > weight_decay * weights
        at_zero = jnp.where(leaving, -jnp.sign(force), 0.0)
        sign = jnp.where(theta == 0, at_zero, jnp.sign(theta))
        sign = jnp.where(weight_decay * weights > 0, sign, _free_sign(theta, weights))
        state = Signed(tracked, sign, jnp.ones((), theta.dtype))
        return Followed(self, out, state)

    def controlled(self, controller: Controller) -> Controller:
        return Landing(controller)

    @staticmethod
    def coordinates(y: PyTree) -> PyTree:
        y = y.tracked if isinstance(y, Signed) else y
        return AbstractKKT.coordinates(y)

    def params_of(self, y: Signed) -> PyTree:
        return y.params

    def points(self, y: Signed) -> tuple[PyTree, ...]:
        return (y.params,)

    def tolerance_share(self, rtol: Scalar) -> Scalar | float:
        return self.solver.tolerance_share(rtol)

    def reservation(self, saved: Saved) -> RESULTS:
        return self.solver.reservation(saved)

    def loss_of(self, term: AbstractFlowTerm, y: Signed) -> Scalar:
        """F, through the multiplier; see `AbstractKKT.loss_of`."""
        return self.solver.loss_of(term, y.tracked)

    def gradient_of(self, term: AbstractFlowTerm, y: Signed) -> PyTree:
        """∇F, through the multiplier."""
        return self.solver.gradient_of(term, y.tracked)

    def work(
        self, term: AbstractFlowTerm, state: _State, end: Signed
    ) -> dict[str, Array]:
        """See `AbstractKKT.work`. There is no `conditioning`: J loses rank by what is
        held at zero."""
        work = self.solver.work(term, state.inner, end.tracked)
        return {k: v for k, v in work.items() if k != "conditioning"}

    def init(
        self,
        terms: diffrax.AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Signed,
        args: PyTree,
    ) -> _State:
        term, _ = unwrap(terms, y0.tracked)
        inner_term = _on_orthant(term, y0.sign)
        inner = self.solver.init(inner_term, t0, t1, y0.tracked, args)
        # Stages are predicted from it, and what is held has no force to bring it back.
        slope = jnp.where(y0.sign == 0, 0.0, inner.slope)
        inner = eqx.tree_at(lambda s: s.slope, inner, slope)
        return _State(inner, _force(term, y0.tracked, decay_at(args, t0)))

    @eqx.filter_jit  # a loop of Diffrax traces a step several times
    def step(
        self,
        terms: diffrax.AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Signed,
        args: PyTree,
        solver_state: _State,
        made_jump: BoolScalarLike,
    ) -> tuple[Signed, Signed, dict, _State, diffrax.RESULTS]:
        term, params = unwrap(terms, y0.tracked)
        if isinstance(args, DecaySchedule):
            # Where nothing has pulled, a coordinate may have passed through zero.
            theta, weights = ravel_pytree(params)[0], _weights(term, params)
            idle = decay_at(args, t0) * weights == 0
            sign = jnp.where(idle, _free_sign(theta, weights), y0.sign)
            y0 = eqx.tree_at(lambda y: y.sign, y0, sign)
        y1, error, dense, inner, result = self.solver.step(
            _on_orthant(term, y0.sign),
            t0,
            t1,
            y0.tracked,
            args,
            solver_state.inner,
            made_jump,
        )
        theta, unravel = ravel_pytree(y1.params)
        before, sign, h = ravel_pytree(params)[0], y0.sign, t1 - t0
        slopes = jax.vmap(lambda k: ravel_pytree(k)[0])(dense["k"].params)
        start, end = slopes[0], slopes[1]
        lam = decay_at(args, t1)
        force = _force(term, y1, lam)
        weights = _weights(term, y1.params)
        pull = lam * weights
        atol, rtol = self.root_finder.atol, self.root_finder.rtol
        # Of the larger end: all of θ may reach zero.
        ends, roots = (before, theta), term.chart.roots
        if roots is not None:
            ends = roots * before, roots * theta
        size = jnp.maximum(*map(rms, ends))
        tol = _SHARE * (atol + rtol * size)
        tol = tol if roots is None else tol / roots

        height = sign * theta
        movable = (sign != 0) & (pull > 0)
        gone = movable & (height < tol) & ((height <= 0) | (sign * end < 0))
        stays = jnp.abs(force) <= pull
        curve = _Cubic(sign * before, height, sign * start, sign * end)
        bottom = curve.lowest()
        # Down through zero, and up again, within the step.
        dipped = movable & ~gone & (curve(bottom) < -tol)
        crossed = (gone & (jnp.abs(theta) > tol)) | dipped
        at = jax.lax.cond(
            jnp.any(crossed),
            lambda: curve.root(bottom),
            lambda: jnp.ones_like(theta),
        )
        # What passes through zero has had the wrong sign for the rest of the step.
        wrong = jnp.where(stays | dipped, jnp.abs(theta), 2 * pull * h * (1 - at))
        over = crossed & (wrong > tol)

        freed = (sign == 0) & (jnp.abs(force) > pull)
        excess = jnp.abs(force) - pull
        late = freed & (0.5 * h * excess > tol)
        held = jnp.abs(solver_state.force)
        pulled = decay_at(args, t0) * weights
        rise = jnp.abs(force) - held - (pull - pulled)
        then = (pulled - held) / jnp.where(rise > 0, rise, 1.0)
        then = jnp.min(jnp.where(late, jnp.clip(then, 0.01, 0.999), 1.0))
        soon = jnp.min(jnp.where(over, at, 1.0))
        landing = jnp.where(then < soon, -then, soon)
        okay = result == diffrax.RESULTS.successful
        landing = jnp.where(okay, landing, 1.0)

        changed = gone | freed
        new = jnp.where(gone & stays, 0.0, -jnp.sign(force))
        new = jnp.where(changed, new, sign)
        theta = jnp.where(gone & (new * theta <= 0), 0.0, theta)
        slope = jnp.where(changed, -force - pull * new, inner.slope)
        slope = jnp.where(new == 0, 0.0, slope)
        inner = eqx.tree_at(
            lambda s: (s.slope, s.stale), inner, (slope, inner.stale | jnp.any(changed))
        )
        rejected = jnp.where(landing < 1, jnp.inf, 0.0)
        error = jax.tree.map(lambda e: e + rejected, error.params)
        none = jnp.zeros_like(sign)
        still = jnp.zeros_like(landing)
        tracked = Tracked(unravel(theta), y1.multiplier)
        y1 = Signed(tracked, new, landing)
        error = Signed(Tracked(error, jnp.zeros_like(y0.multiplier)), none, still)
        k = Signed(dense["k"], jnp.stack([none, none]), jnp.stack([still, still]))
        return y1, error, dict(y0=y0, y1=y1, k=k), _State(inner, force), result


def _weights(term: AbstractFlowTerm, params: PyTree) -> Float[Array, " d"]:
    return ravel_pytree(absolute_weights(term.penalty, params))[0]


def _free_sign(
    theta: Float[Array, " d"], weights: Float[Array, " d"]
) -> Float[Array, " d"]:
    """The sign of what nothing pulls, now or at all."""
    return jnp.where((weights > 0) & (theta != 0), jnp.sign(theta), 1.0)


def _on_orthant(term: AbstractFlowTerm, sign: Float[Array, " d"]) -> TrackedFlowTerm:
    return TrackedFlowTerm(term.loss, OnOrthant(term.penalty, sign), term.chart)


def _force(
    term: AbstractFlowTerm, y: Tracked, weight_decay: Scalar
) -> Float[Array, " d"]:
    """∇(F + λS)."""
    force, _ = ravel_pytree(tracked_gradient(term, y))
    smooth, _ = ravel_pytree(smooth_gradient(term.penalty, y.params))
    return force + weight_decay * smooth


class _Cubic(eqx.Module):
    """For each coordinate the cubic on (0, 1) with these ends and slopes."""

    y0: Float[Array, " d"]
    y1: Float[Array, " d"]
    slope0: Float[Array, " d"]
    slope1: Float[Array, " d"]

    def __call__(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        rise = self.y1 - self.y0
        bend = (self.slope0 - rise) * (1 - x) + (rise - self.slope1) * x
        return (1 - x) * self.y0 + x * self.y1 + x * (1 - x) * bend

    def lowest(self) -> Float[Array, " d"]:
        """Where it turns, if it falls at 0 and rises at 1; else 1."""
        rise = self.y1 - self.y0
        b = 3 * rise - 2 * self.slope0 - self.slope1
        a = self.slope0 + self.slope1 - 2 * rise
        below = b + jnp.sqrt(jnp.maximum(b**2 - 3 * a * self.slope0, 0.0))
        turns = (self.slope0 < 0) & (self.slope1 > 0) & (below > 0)
        return jnp.where(turns, -self.slope0 / jnp.where(turns, below, 1.0), 1.0)

    def root(self, end: Float[Array, " d"]) -> Float[Array, " d"]:
        """The zero before `end`, where it is negative, by bisection."""

        def halve(_, ends):
            low, high = ends
            middle = 0.5 * (low + high)
            above = self(middle) > 0
            return jnp.where(above, middle, low), jnp.where(above, high, middle)

        low, high = jax.lax.fori_loop(0, 52, halve, (jnp.zeros_like(end), end))
        return jnp.clip(0.5 * (low + high), 0.01, 0.9999)
