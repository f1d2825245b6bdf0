"""KKT-ESDIRK: stiff solvers for the gradient flow of a composite loss."""

import dataclasses
from typing import Any, ClassVar, NamedTuple, TYPE_CHECKING

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from diffrax import AbstractTerm, ThirdOrderHermitePolynomialInterpolation
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import cho_factor
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from .._norms import norm
from ..flow.flat import FlatLoss, FlatOpaqueLoss
from ..flow.nonsmooth import may_have_kinks
from ..flow.term import FlowTerm, Tracked, TrackedFlowTerm
from ..results import RESULTS
from .base import AbstractFlowSolver, Controller, Followed, Saved
from .controllers import lasting, tolerance
from .jumps import curvature_jumps, find_jumps, JUMPED
from .kernel import (
    curved_kernel,
    drifted,
    Factor,
    factorise,
    is_small,
    KEPT,
    RENEWED,
    stage_inverse,
    stage_solver,
    tableau_matrix,
    WHOLE,
)
from .orthant import flat_problem, HELD, only_holds, OnOrthant, unwrap

if TYPE_CHECKING:
    from typing import ClassVar as AbstractClassVar
else:
    from equinox import AbstractClassVar


class ChordIteration(eqx.Module):
    """How the stages are solved: until the estimated error left in a stage is below
    `kappa` tolerances (below a fifth of one, of the mean of the iterates, where the
    flow slides along a kink). Tolerances and norm are the step size controller's."""

    rtol: Any
    atol: Any
    norm: Any
    kappa: float = 0.03

    def scale(
        self, start: Float[Array, " d"], stage: Float[Array, " d"]
    ) -> Float[Array, " d"]:
        """The tolerance of each coordinate, in a step from `start`."""
        size = jnp.maximum(jnp.abs(start), jnp.abs(stage))
        return tolerance(size, self.rtol, self.atol)


class _State(eqx.Module):
    slope: Float[Array, " d"]  # the last stage's, first of the next step (FSAL)
    multiplier: Float[Array, " m"]  # ∇ℓ(z) where the last step ended
    kernel: Float[Array, "m m"]  # J Jᵀ; ℓ'' J Jᵀ where ℓ'' is not a multiple of I
    stale: Bool[Array, ""]  # whether the next step is to renew it
    curved: Bool[Array, ""]  # whether it takes the curvature of the outputs in
    factor: "Factor"
    rate: Float[Array, ""]  # contraction of the last iteration
    lasting: Float[Array, ""]  # see `lasting`
    work: dict[str, Int[Array, ""]]  # see `AbstractKKT.work`


class _Step(eqx.Module):
    """One attempt at a step."""

    slopes: Float[Array, "stages d"]
    stage: Float[Array, " d"]
    multiplier: Float[Array, " m"]
    rate: Float[Array, ""]
    error: Float[Array, " d"]
    iterations: Int[Array, ""]
    slid: Bool[Array, ""]
    kernel: Float[Array, "m m"]
    factor: Factor
    ok: Bool[Array, ""]


_GOING, _SOLVED, _SLID, _LOST = range(4)


class _Iterate(NamedTuple):
    """One iterate of a stage."""

    y: Float[Array, " d"]
    mu: Float[Array, " m"]
    status: Int[Array, ""]
    rate: Float[Array, ""]  # of contraction
    size: Float[Array, ""]  # of the last change, in tolerances
    count: Int[Array, ""]
    off: Float[Array, ""]  # ‖∇ℓ(z) − μ‖ before the last change
    weight: Float[Array, ""]  # of the next iterate in the mean; 1 where there is none
    drift: Float[Array, " d"]  # a running mean of the changes
    anchor: Float[Array, ""]  # `size` where the mean began


class AbstractKKT(
    AbstractFlowSolver,
    diffrax.AbstractImplicitSolver[_State],
    diffrax.AbstractAdaptiveSolver[_State],
):
    """Common part of the KKT-ESDIRK methods; see `KKT4` and `KKT5`."""

    differentiable: ClassVar[bool] = False
    sees_growth: ClassVar[bool] = True
    sees_jumps: ClassVar[bool] = True
    follows_kinks: ClassVar[bool] = True
    term_structure: ClassVar = FlowTerm
    interpolation_cls: ClassVar = ThirdOrderHermitePolynomialInterpolation.from_k
    tableau: AbstractClassVar[diffrax.ButcherTableau]

    @property
    def name(self) -> str:
        return type(self).__name__

    def follow(self, term: FlowTerm, params: PyTree, weight_decay: Scalar) -> Followed:
        """With the multiplier saved beside the parameters; see `loss_of`."""
        theta, loss = flat_problem(term, params)
        tracked = TrackedFlowTerm(term.loss, term.penalty, term.static)
        return Followed(self, tracked, Tracked(params, loss.residuals(theta)))

    def controlled(self, controller: Controller) -> Controller:
        return controller

    @staticmethod
    def coordinates(y: PyTree) -> PyTree:
        # The stages, too, are measured by the norm of the controller.
        return y.params if isinstance(y, Tracked) else y

    def params_of(self, y: Tracked) -> PyTree:
        return y.params

    def loss_of(self, term: FlowTerm, y: Tracked) -> Scalar:
        """F, through the multiplier: its relative error is that of the parameters, even
        where F itself is tiny."""
        theta, loss = flat_problem(term, y.params)
        return loss.outer_from(y.multiplier, loss.outputs(theta))

    def tolerance_share(self, rtol: Scalar) -> Scalar | float:
        return 1.0

    def reservation(self, saved: Saved) -> RESULTS:
        return RESULTS.successful

    def work(self, term: FlowTerm, state: _State) -> dict[str, Array]:
        """What the accepted steps took, from the final state
        (`SaveAt(solver_state=True)`): `iterations`, each at the cost of the outputs,
        one Jacobian-vector and two vector-Jacobian products; tangent `kernels` made;
        steps `sliding` along a kink of the loss. And, where ℓ'' is a multiple of I and
        m ≤ d, `conditioning`: the smallest pivot of the last kernel over its largest
        diagonal entry, which falls to rounding level as J loses rank."""
        outputs, parameters = state.multiplier.size, state.slope.size
        known = getattr(term.loss, "outer_curvature", None) is not None
        if not known or outputs > parameters:
            return state.work
        pivots = jnp.diag(cho_factor(state.kernel, lower=True)[0]) ** 2
        smallest = jnp.nan_to_num(jnp.min(pivots))
        return {
            **state.work,
            "conditioning": smallest / jnp.max(jnp.diag(state.kernel)),
        }

    def func(self, terms: AbstractTerm, t0: Any, y0: PyTree, args: Any) -> PyTree:
        return terms.vf(t0, y0, args)

    def init(
        self, terms: AbstractTerm, t0: Any, t1: Any, y0: PyTree, args: Any
    ) -> _State:
        term, params = unwrap(terms, y0)
        theta, loss = flat_problem(term, params)
        residuals = loss.residuals(theta)
        (m,) = residuals.shape
        return _State(
            slope=ravel_pytree(FlowTerm.vf(term, t0, params, args))[0],
            multiplier=residuals,
            kernel=jnp.zeros((m, m), theta.dtype),
            stale=jnp.array(True),
            curved=jnp.array(False),
            factor=Factor(
                jnp.zeros((m, m), theta.dtype),
                jnp.zeros(m, jnp.int32),
                jnp.zeros((), theta.dtype),
                jnp.zeros((), theta.dtype),
            ),
            rate=jnp.asarray(0.5, theta.dtype),
            lasting=jnp.ones((), theta.dtype),
            work={k: jnp.zeros((), int) for k in ("iterations", "kernels", "sliding")},
        )

    @eqx.filter_jit  # Diffrax traces a step several times
    def step(
        self,
        terms: AbstractTerm,
        t0: Any,
        t1: Any,
        y0: PyTree,
        args: Any,
        solver_state: _State,
        made_jump: Any,
    ) -> tuple[PyTree, PyTree, dict, _State, diffrax.RESULTS]:
        del made_jump  # the flow is autonomous
        term, params = unwrap(terms, y0)
        theta, loss = flat_problem(term, params)
        h = jnp.asarray(terms.contr(t0, t1), theta.dtype)
        args = jnp.asarray(args, theta.dtype)
        rho = term.penalty.curvature(params)
        leaves = jax.tree.leaves(rho)
        uneven = len(leaves) > 1 or jnp.ndim(leaves[0]) > 0
        rho = ravel_pytree(rho)[0] if uneven else jnp.asarray(rho, theta.dtype)
        c = self._gamma * h
        pull = c * args
        decay = lambda th: ravel_pytree(term.penalty.gradient(loss.unravel(th)))[0]

        # (1 + cλ∇²R)⁻¹ stands inside the kernel where it is not a number.
        weights = 1 / (1 + pull * rho) if uneven else None
        plain = lambda: curved_kernel(loss, theta, weights)
        small = is_small(loss, theta, solver_state.multiplier)

        def whole() -> tuple[Array, Array]:
            alpha = 1 + pull * jnp.broadcast_to(rho, theta.shape)
            matrix = jnp.diag(alpha)
            # (One along whose kinks coordinates are held has the curvature of that.)
            held = isinstance(term.penalty, OnOrthant)
            if not (held or term.penalty.separable):
                matrix = jnp.eye(theta.size, dtype=theta.dtype) + pull * jax.jacfwd(
                    decay
                )(theta)
            inverse = stage_inverse(loss, theta, solver_state.multiplier, matrix, c)
            return curved_kernel(loss, theta, inverse), inverse

        def attempt(effort: Int[Array, ""]) -> _Step:
            kernel = jax.lax.cond(effort == RENEWED, plain, lambda: solver_state.kernel)
            inverse = None
            if small:
                unused = jnp.zeros((theta.size, theta.size), theta.dtype)
                kernel, inverse = jax.lax.cond(
                    effort == WHOLE, whole, lambda: (kernel, unused)
                )
            return self._stages(
                term, loss, theta, h, args, rho, solver_state, kernel, inverse, effort
            )

        # A kernel that has served too long is no reason to shorten the step: the second
        # attempt renews it; and where that fails, since the outputs are curved, a third
        # one takes their curvature in, as all later steps then do. (Diffrax forgets
        # what a rejected step has learnt.)
        most = WHOLE if small else RENEWED

        def retry(carry):
            effort, _, out, tried = carry
            out = attempt(effort)
            made = (effort >= RENEWED).astype(int)
            return effort + 1, out.ok | (effort == most), out, tried + made

        reusable = not uneven or only_holds(term.penalty, params)
        renew = solver_state.stale if reusable else jnp.array(True)
        effort = jnp.where(renew, RENEWED, KEPT)
        # What grows may be far below the tolerance of the iteration, which the whole
        # matrix leaves behind.
        growing = small & (solver_state.lasting > 2)
        effort = jnp.where(solver_state.curved | growing, WHOLE, effort)
        stages = len(self.tableau.b_sol) - 1
        no = jnp.array(False)
        none = _Step(
            slopes=jnp.zeros((stages + 1, theta.size), theta.dtype),
            stage=theta,
            multiplier=solver_state.multiplier,
            rate=solver_state.rate,
            error=theta,
            iterations=jnp.array(0),
            slid=no,
            kernel=solver_state.kernel,
            factor=solver_state.factor,
            ok=no,
        )
        effort, _, out, kernels = jax.lax.while_loop(
            lambda carry: ~carry[1], retry, (effort, no, none, 0)
        )
        whole_used = effort > WHOLE
        curved = solver_state.curved | (whole_used & ~growing)
        kernel = out.kernel
        if small:  # for `work`
            kernel = jax.lax.cond(whole_used, plain, lambda: kernel)
        # (It may rise tenfold in a step: the iteration of the next is then as much more
        # exact, so that what it leaves is not taken for an error.)
        growth = jnp.log(norm(out.slopes[-1]) / norm(out.slopes[0]))
        lasts = lasting(growth, theta, out.stage, out.error)
        lasts = jnp.minimum(lasts, 10 * solver_state.lasting)
        # What sliding leaves is no error that lasts, along the step or not.
        lasts = jnp.where(out.slid, 1.0, lasts)
        new = dict(iterations=out.iterations, kernels=kernels, sliding=out.slid)
        state = _State(
            slope=out.slopes[-1],
            multiplier=out.multiplier,
            kernel=kernel,
            factor=out.factor,
            curved=curved,
            stale=(out.iterations > _SLOW * stages) | whole_used,
            rate=out.rate,
            lasting=lasts,
            work={
                k: n + jnp.asarray(new[k], int) for k, n in solver_state.work.items()
            },
        )
        result = diffrax.RESULTS.where(
            out.ok,
            diffrax.RESULTS.successful,
            diffrax.RESULTS.promote(optx.RESULTS.nonlinear_divergence),
        )
        free = 1.0
        if isinstance(term.penalty, OnOrthant):
            free = jnp.abs(term.penalty.sign)
        y1 = loss.unravel(free * out.stage)
        gone = (out.stage - theta) / jnp.maximum(
            norm(out.stage - theta), jnp.finfo(theta.dtype).tiny
        )
        across = out.error - jnp.vdot(out.error, gone) * gone
        error = jnp.where(out.slid, across, out.error * lasts)
        error = loss.unravel(jnp.where(out.ok, free * error, jnp.inf))
        k = jax.vmap(loss.unravel)(h * out.slopes[np.array([0, -1])])
        if isinstance(term, TrackedFlowTerm):
            # The multiplier follows from θ: it has no error of its own to control.
            still = jnp.zeros_like(out.multiplier)
            y1 = Tracked(y1, out.multiplier)
            error = Tracked(error, still)
            k = Tracked(k, jnp.stack([still, still]))
        return y1, error, dict(y0=y0, y1=y1, k=k), state, result

    def _unsmooth(self, slopes: Float[Array, "stages d"]) -> Float[Array, " d"]:
        """What a jump of θ'' within the step makes of it, to which the embedded formula
        can be blind: true errors of 40 (KKT4) and 190 (KKT5) times its estimate.

        Combinations of the slopes that vanish for polynomials of a lower and of a
        higher degree are of one size at a jump, and fall by h from one to the next
        where θ is smooth (Berntsen and Espelid, Numer. Math. 58, 1990)."""
        times = np.concatenate([[0.0], np.asarray(self.tableau.c)])
        rules = np.linalg.qr(np.vander(times, len(times), increasing=True))[0].T
        two, three, four = jnp.asarray(rules[2:5], slopes.dtype) @ slopes
        low, high = jnp.hypot(two, three), jnp.hypot(three, four)
        ratio = high / jnp.where(low > 0, low, 1)
        size = JUMPED * high
        return size * jnp.minimum(ratio, 1) ** (self.order(None) - 3)  # pyright: ignore[reportArgumentType]

    @property
    def _gamma(self) -> float:
        return tableau_matrix(self.tableau)[1]

    def _stages(
        self,
        term: FlowTerm,
        loss: FlatLoss,
        y0: Float[Array, " d"],
        h: Scalar,
        weight_decay: float | Scalar,
        rho: Scalar | Float[Array, " d"],
        state: _State,
        kernel: Float[Array, "m m"],
        inverse: Float[Array, "d d"] | None,
        effort: Int[Array, ""],
    ) -> _Step:
        a = jnp.asarray(tableau_matrix(self.tableau)[0], y0.dtype)
        p = jnp.asarray(_predictor(self.tableau), y0.dtype)
        c = self._gamma * h
        pull = c * weight_decay
        alpha = 1 + pull * rho
        fresh, whole = effort >= RENEWED, effort == WHOLE
        shift = (alpha if jnp.ndim(alpha) == 0 else 1) / c
        definite = loss.outer_curvature is not None
        make = lambda: factorise(loss, shift, kernel, definite)
        damp = lambda v: v / alpha
        if inverse is not None:
            shift = jnp.where(whole, 1 / c, shift)
            damp = lambda v: jax.lax.cond(whole, lambda: inverse @ v, lambda: v / alpha)
            make = lambda: jax.lax.cond(
                whole,
                lambda: factorise(loss, shift, kernel, False),
                lambda: factorise(loss, shift, kernel, definite),
            )
        factor = jax.lax.cond(
            fresh | drifted(state.factor, shift), make, lambda: state.factor
        )
        solve = stage_solver(loss, shift, factor, definite)
        decay = lambda y: ravel_pytree(term.penalty.gradient(loss.unravel(y)))[0]
        kappa = self.root_finder.kappa  # pyright: ignore[reportAttributeAccessIssue]
        # What the iteration leaves is part of the error estimate, see `lasting`; but
        # rounding stays.
        rounding = 4 * jnp.finfo(y0.dtype).eps / self.root_finder.rtol
        kappa = jnp.minimum(kappa, jnp.maximum(kappa / state.lasting, rounding))
        # A coordinate held at zero is none to resolve.
        held = isinstance(term.penalty, OnOrthant)
        free = jnp.abs(term.penalty.sign) if held else 1.0
        size_of = lambda v, y: self.root_finder.norm(
            free * v / self.root_finder.scale(y0, free * y)
        )
        most = self.root_find_max_steps
        blur = jnp.maximum(1, SLIDING_RTOL / self.root_finder.rtol)

        kinked = may_have_kinks(loss, y0)

        def iterate(base: Array, last: Array, it: _Iterate) -> _Iterate:
            z, push, pullback = loss.linearize(it.y)
            force = jax.grad(loss.outer)(z)
            lack = base - it.y - pull * decay(it.y) - c * pullback(it.mu)
            off = force - it.mu
            dmu = solve(push(damp(lack)), off, z)
            dy = damp(lack - c * pullback(dmu))
            drift = 0.75 * it.drift + 0.25 * dy  # small where iterates go to and fro
            new, drifting = size_of(dy, it.y + dy), size_of(drift, it.y + dy)
            # The first iteration has no rate of its own: the last stage's, never
            # trusted below 0.3, lets an excellent guess pass after one. Later ones may
            # contract by chance, until what contracts slowly is all that is left.
            measured = jnp.maximum(new / it.size, 0.2 * it.rate)
            first = jnp.maximum(it.rate, 0.3)
            rate = jnp.where(it.count > 0, measured, first)
            left = new * rate / (1 - jnp.minimum(rate, 0.95))
            growing = (it.count > 0) & (rate > 2)
            failing = fresh & (growing | ((it.count > 3) & (rate > 0.9)))
            # Where ∇F jumps, as at the kinks of a ReLU, the flow may slide along the
            # jump. Then the stage has a solution only with a mean of the gradients on
            # both sides (Filippov), and the iteration goes to and fro between them even
            # with a fresh kernel. The mean of its iterates converges, as 1/n, while the
            # changes stay as large as they were. Without a jump the step is too long.
            starting = failing & (it.weight == 1)
            jumps = jnp.array(False)
            if kinked:
                jumps = find_jumps(loss, it.y, it.y + dy, it.mu + dmu, starting)
            averaging = jumps | (it.weight < 1)
            anchor = jnp.where(jumps, new, it.anchor)
            weight = jnp.where(averaging, it.weight / (1 + it.weight), it.weight)
            bounded = (new > 0.3 * anchor) & (new < 3 * anchor) & (weight < 0.2)
            slid = averaging & bounded & (drifting < 0.5 * new)
            slid = slid & (weight * new < _SLIDE * blur)
            agreed = agrees(force, off, it.off, it.mu, z) | ~last
            converged = jnp.where(
                averaging, slid | (new < kappa), (left < kappa) & agreed
            )
            lost = jnp.where(averaging, new > 30 * anchor, growing | failing)
            status = jnp.where(converged, jnp.where(slid, _SLID, _SOLVED), _GOING)
            status = jnp.where(~jnp.isfinite(new) | lost, _LOST, status)
            return _Iterate(
                it.y + weight * dy, it.mu + weight * dmu, status, rate, new,
                it.count + 1, norm(off), weight, drift, anchor,
            )  # fmt: skip

        # θ may be known to its tolerance, and the force not: where ℓ'' has changed by
        # orders of magnitude since the kernel was made, the changes are small since the
        # matrix is too stiff, and where the outputs are as steep as α² they mean a lot
        # to ∇ℓ. So at the end of a step μ must be ∇ℓ(z) too, to a few percent. (Where
        # ℓ'' = w I neither can be.)
        def agrees(force, off, before, mu, z):
            if loss.outer_curvature is not None:
                return jnp.array(True)
            eps = jnp.finfo(z.dtype).eps
            if isinstance(loss, FlatOpaqueLoss):
                resolved = norm(kernel @ z)
                settled = norm(off) < 0.5 * before
            else:
                resolved = norm(loss.outer_hvp(z, z))
                settled = jnp.array(False)
            small = norm(off) <= _AGREED * norm(mu) + 100 * eps * resolved
            return small | settled

        def stage(i, carry):
            slopes, mus, rate, ok, count, slid = carry
            base = y0 + h * (a[i] @ slopes)
            guess = base + c * (p[i] @ slopes)
            one = jnp.ones_like(rate)
            start = _Iterate(
                guess, p[i] @ mus, jnp.array(_GOING), rate, one, jnp.array(0),
                jnp.zeros_like(one), one, jnp.zeros_like(y0), one,
            )  # fmt: skip
            # Means converge slowly.
            allowed = lambda it: jnp.where(it.weight < 1, 4, 1) * most
            it = jax.lax.while_loop(
                lambda it: (it.status == _GOING) & (it.count < allowed(it)) & ok,
                lambda it: iterate(base, i == len(a) - 1, it),
                start,
            )
            slopes = slopes.at[i].set((it.y - base) / c)
            mus = mus.at[i].set(it.mu)
            ok = ok & ((it.status == _SOLVED) | (it.status == _SLID))
            return (
                slopes,
                mus,
                it.rate,
                ok,
                count + it.count,
                slid | (it.status == _SLID),
            )

        slopes = jnp.zeros((len(a), y0.size), y0.dtype).at[0].set(state.slope)
        mus = jnp.zeros((len(a), state.multiplier.size), y0.dtype)
        mus = mus.at[0].set(state.multiplier)
        yes = jnp.array(True)
        first = (slopes, mus, state.rate, yes, 0, ~yes)
        slopes, mus, rate, ok, n, slid = jax.lax.fori_loop(1, len(a), stage, first)
        y1 = y0 + h * (a[-1] @ slopes) + c * slopes[-1]
        mu = mus[-1]
        ok = ok & jnp.all(jnp.isfinite(y1))
        held = isinstance(term.penalty, OnOrthant)
        if isinstance(term, TrackedFlowTerm) and (held or jnp.ndim(alpha) == 0):
            # θ fixes cμ, and c may be small: μ is less exact than θ. But it also obeys
            # μ' = −ℓ''J(Jᵀμ + λ∇R), to whose stiff part μ' adds little.
            rates = jnp.asarray(_end_slope(self.tableau), y0.dtype) / h
            z, push, pull_back = loss.linearize(y1)
            free = jnp.where(alpha < HELD**0.5, 1.0, 0.0) if held else 1.0
            pullback = lambda u: free * pull_back(u)
            pulled = push(weight_decay * decay(y1))
            past = rates[:-1] @ mus[:-1]

            def polish(_, mu):
                force = pulled + push(pullback(mu))
                return mu + solve(-force / shift, -(past + rates[-1] * mu) / shift, z)

            change = jax.lax.fori_loop(0, 2, polish, mus[-1]) - mus[-1]
            # What is not stiff was exact before.
            change = change - solve(jnp.zeros_like(z), change, z)
            # Nor is it right where μ changes fast against ℓ'', as on the way out of a
            # steep start: there it stays what ∇ℓ(z) is.
            far = norm(change) > 0.01 * norm(mu)
            far = far if loss.outer_curvature is None else jnp.array(False)
            mu = jnp.where(slid | far, mu, mu + change)
        error = h * (jnp.asarray(self.tableau.b_error, y0.dtype) @ slopes)
        if curvature_jumps(term):
            least = jnp.abs(h) * self._unsmooth(slopes)
            error = jnp.copysign(jnp.maximum(jnp.abs(error), least), error)
        # What sliding leaves of the iteration is no reason for a shorter step.
        error = jnp.where(slid, error / blur, error)
        return _Step(slopes, y1, mu, rate, error, n, slid, kernel, factor, ok)


_SLOW = 3  # iterations a stage above which the tangent kernel is renewed
SLIDING_RTOL = 1e-3  # what is resolved, relatively, while the flow slides along a kink
_AGREED = 0.02  # how far μ may be from ∇ℓ(z), relatively, where a stage is solved
_SLIDE = 0.2  # tolerances by which the mean may still move when a sliding stage ends


def _predictor(tableau: diffrax.ButcherTableau) -> np.ndarray:
    """Weights that extrapolate a stage, its slope and its multiplier, from those before
    it, by the parabola of least squares."""
    n = len(tableau.b_sol)
    times = np.concatenate([[0.0], np.asarray(tableau.c)])
    p = np.zeros((n, n))
    for i in range(1, n):
        degree = min(i - 1, 2)
        powers = np.arange(degree + 1)
        p[i, :i] = times[i] ** powers @ np.linalg.pinv(times[:i, None] ** powers)
    return p


def _end_slope(tableau: diffrax.ButcherTableau) -> np.ndarray:
    """Weights that give the slope at the end of a step, of length one, of the cubic of
    least squares through the stages."""
    times = np.concatenate([[0.0], np.asarray(tableau.c)])
    powers = np.arange(4)
    return powers @ np.linalg.pinv(times[:, None] ** powers)


def _kencarp5() -> diffrax.ButcherTableau:
    """The implicit part of KenCarp5, with an error estimate that sees plain decay.

    On y' = −y the embedded formula is of order 5 as well (its z⁵ coefficient is 2e-8):
    the estimate is O(z⁶) and 9 times smaller than the error, so that what decays as
    e^{−s} in the drift was wrong by 30 tolerances. Added is the combination e of least
    norm that keeps order 4, e·1 = e·c = e·c² = e·c³ = e·Ac² = 0 (the stage order is 2),
    with e·A⁴1 = 3e-5: then the estimate bounds the error for z up to about 0.6.
    """
    tableau = diffrax.KenCarp5.tableau.tableaus[1]  # the pair is (explicit, implicit)
    a, gamma = tableau_matrix(tableau)
    a[1:, 1:] += gamma * np.eye(len(a) - 1)
    one = np.ones(len(a))
    c = a @ one
    conditions = [one, c, c**2, c**3, a @ c**2, np.linalg.matrix_power(a, 4) @ one]
    added = np.linalg.pinv(np.stack(conditions)) @ [0, 0, 0, 0, 0, 3e-5]
    return dataclasses.replace(tableau, b_error=tableau.b_error + added)


class KKT4(AbstractKKT):
    """KKT-ESDIRK of order 4: the default for a composite loss down to rtol 1e-6.

    For θ' = −Jᵀ∇ℓ(z(θ)) − λ∇R(θ) a stage with c = γh solves

        Y + cλ∇R(Y) + c J(Y)ᵀμ = b,        μ = ∇ℓ(z(Y)),

    for Y and the multiplier μ, by chord iteration with J = J(Y) and the frozen m × m
    matrix (α/c) I + ℓ''JJᵀ, α = 1 + cλρ (ρ the curvature of R). In the drift along the
    critical manifold μ = O(λ) and c = O(1/λ), but cμ is neither small nor large:
    nothing cancels, accuracy does not depend on λ, and cost hardly. JJᵀ, the empirical
    tangent kernel, serves many steps; it is renewed when the iteration grows slow, or
    fails; its factorisation is kept while the step size changes what matters of it by
    less than a tenth. Stages are predicted, Y and μ, from those before. No Hessian of
    the loss is formed; but where the iteration fails with a new kernel, for the
    curvature of the outputs, Σ μᵢ∇²zᵢ is taken into the matrix from then on (up to 100
    parameters and 128 outputs). A loss that is not composite is taken as one with
    z(θ) = θ, and then its Hessian is formed (up to 5000 parameters).

    A stage is solved when the changes of Y are below its tolerance, and the last one
    when μ is ∇ℓ(z(Y)) to 2 % as well (but for squared error). Errors along the step
    count for more while the flow speeds up, for they are not damped.

    Where ∇F jumps and the flow slides along the jump, as at the kinks of a ReLU, the
    iteration goes to and fro, and the mean of its iterates is taken: where halving the
    way between two of them shows a jump. There no more than three digits are resolved
    (`SLIDING_RTOL`), and the steps that slid are counted. A step whose iteration fails
    is rejected.

    The method is the implicit part of ARK4(3)6L[2]SA of Kennedy and Carpenter (Appl.
    Numer. Math. 44, 2003): L-stable, stiffly accurate, stage order 2, 6 stages with
    FSAL.

    Use it with `diffrax.diffeqsolve` on the term of `GradientFlow.term`, a
    `diffrax.PIDController`, and `args=weight_decay`.
    """

    root_finder: ChordIteration = diffrax.with_stepsize_controller_tols(
        ChordIteration
    )()
    root_find_max_steps: int = 12
    tableau: ClassVar[diffrax.ButcherTableau] = diffrax.KenCarp4.tableau.tableaus[1]

    def order(self, terms: PyTree[AbstractTerm]) -> int:
        return 4


class KKT5(AbstractKKT):
    """KKT-ESDIRK of order 5: for more than six digits. See `KKT4`.

    The method is the implicit part of ARK5(4)8L[2]SA of Kennedy and Carpenter (Appl.
    Numer. Math. 44, 2003): L-stable, stiffly accurate, stage order 2, 8 stages with
    FSAL. Its error estimate holds on the manifold, where the problem is one of index 2;
    that of Kvaernø's method of order 5 is too small there by a factor that grows as the
    tolerance falls (24 at 1e-6, 59 at 1e-7 on a diagonal network with λ = 1e-4). One
    term is added to it, for plain decay, to which the published estimate is blind.
    """

    root_finder: ChordIteration = diffrax.with_stepsize_controller_tols(
        ChordIteration
    )()
    root_find_max_steps: int = 12
    tableau: ClassVar[diffrax.ButcherTableau] = _kencarp5()

    def order(self, terms: PyTree[AbstractTerm]) -> int:
        return 5
