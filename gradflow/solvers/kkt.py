"""KKT-ESDIRK: stiff solvers for the gradient flow of a composite loss."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TYPE_CHECKING

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from diffrax import AbstractTerm, ThirdOrderHermitePolynomialInterpolation
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import cho_factor, cho_solve, lu_factor, lu_solve
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from .._controllers import lasting, tolerance
from .._norms import norm
from ..flow import (
    FlatLoss,
    FlatOpaqueLoss,
    flatten,
    FlowTerm,
    may_have_kinks,
    Tracked,
    TrackedFlowTerm,
)
from ..losses import AbstractCompositeLoss, Huber
from ..penalties import AbstractPenalty, Moreau

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
    factor: "_Factor"
    rate: Float[Array, ""]  # contraction of the last iteration
    lasting: Float[Array, ""]  # see `lasting`
    work: dict[str, Int[Array, ""]]  # see `AbstractKKT.work`


class _Factor(eqx.Module):
    """The matrix of the chord iteration: factorised, or inverted where it is small."""

    matrix: Float[Array, "m m"]  # L; or L and U packed; or the inverse
    pivots: Int[Array, " m"]
    shift: Float[Array, ""]
    smallest: Float[Array, ""]  # pivot: about the smallest eigenvalue


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
    factor: _Factor
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
    diffrax.AbstractImplicitSolver[_State], diffrax.AbstractAdaptiveSolver[_State]
):
    """Common part of the KKT-ESDIRK methods; see `KKT4` and `KKT5`."""

    term_structure: ClassVar = FlowTerm
    interpolation_cls: ClassVar = ThirdOrderHermitePolynomialInterpolation.from_k
    tableau: AbstractClassVar[diffrax.ButcherTableau]

    def track(self, term: FlowTerm, params: PyTree) -> tuple[TrackedFlowTerm, Tracked]:
        """The term and the initial state with which `diffeqsolve` saves the multiplier
        beside the parameters; see `loss_of`."""
        theta, loss = _flat(term, params)
        tracked = TrackedFlowTerm(term.loss, term.penalty, term.static)
        return tracked, Tracked(params, loss.residuals(theta))

    def loss_of(self, term: FlowTerm, y: Tracked) -> Scalar:
        """F, through the multiplier: its relative error is that of the parameters, even
        where F itself is tiny."""
        theta, loss = _flat(term, y.params)
        return loss.outer_from(y.multiplier, loss.outputs(theta))

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
        term, params = _unwrap(terms, y0)
        theta, loss = _flat(term, params)
        residuals = loss.residuals(theta)
        (m,) = residuals.shape
        return _State(
            slope=ravel_pytree(FlowTerm.vf(term, t0, params, args))[0],
            multiplier=residuals,
            kernel=jnp.zeros((m, m), theta.dtype),
            stale=jnp.array(True),
            curved=jnp.array(False),
            factor=_Factor(
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
        term, params = _unwrap(terms, y0)
        theta, loss = _flat(term, params)
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
        plain = lambda: _curved_kernel(loss, theta, weights)
        small = _small(loss, theta, solver_state.multiplier)

        def whole() -> tuple[Array, Array]:
            alpha = 1 + pull * jnp.broadcast_to(rho, theta.shape)
            matrix = jnp.diag(alpha)
            # (One along whose kinks coordinates are held has the curvature of that.)
            held = isinstance(term.penalty, OnOrthant)
            if not (held or term.penalty.separable):
                matrix = jnp.eye(theta.size, dtype=theta.dtype) + pull * jax.jacfwd(
                    decay
                )(theta)
            inverse = _inverse(loss, theta, solver_state.multiplier, matrix, c)
            return _curved_kernel(loss, theta, inverse), inverse

        def attempt(effort: Int[Array, ""]) -> _Step:
            kernel = jax.lax.cond(
                effort == _RENEWED, plain, lambda: solver_state.kernel
            )
            inverse = None
            if small:
                unused = jnp.zeros((theta.size, theta.size), theta.dtype)
                kernel, inverse = jax.lax.cond(
                    effort == _WHOLE, whole, lambda: (kernel, unused)
                )
            return self._stages(
                term, loss, theta, h, args, rho, solver_state, kernel, inverse, effort
            )

        # A kernel that has served too long is no reason to shorten the step: the second
        # attempt renews it; and where that fails, since the outputs are curved, a third
        # one takes their curvature in, as all later steps then do. (Diffrax forgets
        # what a rejected step has learnt.)
        most = _WHOLE if small else _RENEWED

        def retry(carry):
            effort, _, out, tried = carry
            out = attempt(effort)
            made = (effort >= _RENEWED).astype(int)
            return effort + 1, out.ok | (effort == most), out, tried + made

        reusable = not uneven or _only_holds(term.penalty, params)
        renew = solver_state.stale if reusable else jnp.array(True)
        effort = jnp.where(renew, _RENEWED, _KEPT)
        # What grows may be far below the tolerance of the iteration, which the whole
        # matrix leaves behind.
        growing = small & (solver_state.lasting > 2)
        effort = jnp.where(solver_state.curved | growing, _WHOLE, effort)
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
        whole_used = effort > _WHOLE
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
        size = _JUMPED * high
        return size * jnp.minimum(ratio, 1) ** (self.order(None) - 3)  # pyright: ignore[reportArgumentType]

    @property
    def _gamma(self) -> float:
        return _matrix(self.tableau)[1]

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
        a = jnp.asarray(_matrix(self.tableau)[0], y0.dtype)
        p = jnp.asarray(_predictor(self.tableau), y0.dtype)
        c = self._gamma * h
        pull = c * weight_decay
        alpha = 1 + pull * rho
        fresh, whole = effort >= _RENEWED, effort == _WHOLE
        shift = (alpha if jnp.ndim(alpha) == 0 else 1) / c
        definite = loss.outer_curvature is not None
        make = lambda: _factorise(loss, shift, kernel, definite)
        damp = lambda v: v / alpha
        if inverse is not None:
            shift = jnp.where(whole, 1 / c, shift)
            damp = lambda v: jax.lax.cond(whole, lambda: inverse @ v, lambda: v / alpha)
            make = lambda: jax.lax.cond(
                whole,
                lambda: _factorise(loss, shift, kernel, False),
                lambda: _factorise(loss, shift, kernel, definite),
            )
        factor = jax.lax.cond(
            fresh | _drifted(state.factor, shift), make, lambda: state.factor
        )
        solve = _solver(loss, shift, factor, definite)
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
                jumps = _jumps(loss, it.y, it.y + dy, it.mu + dmu, starting)
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


# Up to this size the inverse is cheaper than to solve by a factor in each iteration.
_INVERTED = 128
_DRIFT = 0.1  # contraction that a factor made for another shift may cost
_SLOW = 3  # iterations a stage above which the tangent kernel is renewed
DENSE_LIMIT = 5000  # parameters up to which the Hessian of an opaque loss is factorised
SLIDING_RTOL = 1e-3  # what is resolved, relatively, while the flow slides along a kink
_AGREED = 0.02  # how far μ may be from ∇ℓ(z), relatively, where a stage is solved
_SLIDE = 0.2  # tolerances by which the mean may still move when a sliding stage ends


HELD = 1e30  # the curvature that stands for a coordinate held at zero


class OnOrthant(AbstractPenalty):
    """A penalty R = S + Σ wᵢ|θᵢ| where each coordinate has a known sign σᵢ, which makes
    it smooth, S + Σ wᵢσᵢθᵢ; where σᵢ = 0 the coordinate is held at zero."""

    penalty: AbstractPenalty
    sign: Float[Array, " d"]

    def __call__(self, params: PyTree) -> Scalar:
        return self.penalty(params)

    def smooth_gradient(self, params: PyTree) -> PyTree:
        """∇S."""
        return self.penalty.smooth_gradient(params)

    def gradient(self, params: PyTree) -> PyTree:
        smooth, unravel = ravel_pytree(self.smooth_gradient(params))
        weights, _ = ravel_pytree(self.penalty.absolute_weights(params))
        free = jnp.abs(self.sign)
        return unravel(free * (smooth + weights * self.sign))

    def curvature(self, params: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(params)
        rho = ravel_pytree(self.penalty.curvature(params))[0].astype(flat.dtype)
        rho = jnp.broadcast_to(rho, flat.shape)
        return unravel(jnp.where(self.sign == 0, HELD, rho))


def _only_holds(penalty: AbstractPenalty, params: PyTree) -> bool:
    """Whether its curvature is that of the coordinates held at zero and nothing else:
    then it is the same for all step sizes."""
    if not isinstance(penalty, OnOrthant):
        return False
    rest = penalty.penalty.curvature(params)
    return isinstance(rest, float) and rest == 0.0


def _unwrap(terms: AbstractTerm, y: PyTree) -> tuple[FlowTerm, PyTree]:
    """The flow's own term, and the parameters in its state."""
    term: Any = terms
    while not isinstance(term, FlowTerm):  # Diffrax wraps terms
        term = term.term
    return term, y.params if isinstance(y, Tracked) else y


def _flat(term: FlowTerm, params: PyTree) -> tuple[Float[Array, " d"], FlatLoss]:
    """θ, and its loss: a composite one, or one taken as such."""
    theta, loss = flatten(term.loss, params, term.static)
    if isinstance(term.loss, AbstractCompositeLoss):
        return theta, loss
    if theta.size > DENSE_LIMIT:
        raise ValueError(
            f"solver: KKT needs a composite loss for {theta.size} parameters, got "
            f"{type(term.loss).__name__}, whose Hessian it would factorise (up to "
            f"{DENSE_LIMIT} parameters); give it as SquaredError, CrossEntropy or other"
            " composite losses, or take RKC2."
        )
    return theta, FlatOpaqueLoss(loss.loss, loss.static, loss.unravel)


def curvature_jumps(term: FlowTerm) -> bool:
    """Whether ∇²F or ∇²R has jumps, of which the flow crosses many."""
    parts = (part for _, part in term.penalty.terms())
    return isinstance(term.loss, Huber) or any(isinstance(p, Moreau) for p in parts)


_JUMPED = 2.0  # by which errors at a jump of the curvature may exceed what is seen

# Halvings after which a difference that is left is a jump; what is left of it then; and
# by how much it stands out from the differences beside it, as rounding does not.
_HALVINGS = 20
_JUMP = 2.0**-10
_ABOVE = 10.0
_RESOLVED = 64  # the roundings of θ to which the way is halved at most


def _jumps(
    loss: FlatLoss,
    one: Float[Array, " d"],
    two: Float[Array, " d"],
    mu: Float[Array, " m"],
    asked: Bool[Array, ""],
) -> Bool[Array, ""]:
    """Whether J or ∇ℓ has a jump between two points: halving the way between them, on
    the side where most changes, leaves as much of the change. Of a smooth loss it
    leaves 2⁻²⁰, or rounding: that is as large on the way before and behind. Nothing is
    computed unless `asked`."""

    def slopes(y):
        z, pull = jax.vjp(loss.outputs, y)
        return pull(mu)[0], jax.grad(loss.outer)(z)

    def apart(a, b):
        share = lambda u, v: norm(u - v) / jnp.maximum(norm(u), norm(v))
        return sum(jnp.nan_to_num(share(u, v)) for u, v in zip(a, b, strict=True))

    def halve(carry):
        count, low, high, at_low, at_high, first, _ = carry
        middle = 0.5 * (low + high)
        at = slopes(middle)
        below, above = apart(at_low, at), apart(at, at_high)
        left = below > above
        pick = lambda a, b: jax.tree.map(lambda a, b: jnp.where(left, a, b), a, b)
        low, high = pick((low, middle), (middle, high))
        at_low, at_high = pick((at_low, at), (at, at_high))
        change = jnp.maximum(below, above)
        first = jnp.where(count == 0, change, first)
        return count + 1, low, high, at_low, at_high, first, change

    zero = jnp.zeros((), one.dtype)
    nothing = (jnp.zeros_like(one), jnp.zeros_like(mu))
    ends = jax.lax.cond(
        asked, lambda: (slopes(one), slopes(two)), lambda: (nothing, nothing)
    )
    count = jnp.where(asked, 0, _HALVINGS)
    start = (count, one, two, *ends, zero, zero)
    # Between neighbouring numbers rounding is all there is, and jumps.
    resolved = _RESOLVED * jnp.finfo(one.dtype).eps * norm(one)
    apart_yet = lambda s: (s[0] < _HALVINGS) & (norm(s[2] - s[1]) > resolved)
    out = jax.lax.while_loop(apart_yet, halve, start)
    _, low, high, _, _, first, change = out
    left = asked & (change > _JUMP * first)

    def stands_out():
        """The change between the ends, from those on equal lengths to either side."""
        at = jnp.array([-3.0, -1.0, 0.0, 1.0, 2.0, 4.0], low.dtype)[:, None]
        points = jax.lax.map(slopes, low[None] + at * (high - low)[None])
        near = [jax.tree.map(lambda s, i=i: s[i], points) for i in range(6)]
        changes = [apart(u, v) for u, v in zip(near, near[1:], strict=False)]
        beside = jnp.max(jnp.stack(changes[:2] + changes[3:]))
        return changes[2] > _ABOVE * beside

    return jax.lax.cond(left, stands_out, lambda: left)


_KEPT, _RENEWED, _WHOLE = range(3)  # the kernel; the last with all curvature
# Up to how many parameters (and outputs: `_INVERTED`) the whole is cheap.
_FEW = 100


def _small(
    loss: FlatLoss, theta: Float[Array, " d"], multiplier: Float[Array, " m"]
) -> bool:
    """Whether the Hessian Σ μᵢ∇²zᵢ is cheap. (Of an opaque loss it is zero.)"""
    opaque = isinstance(loss, FlatOpaqueLoss)
    few = theta.size <= _FEW and multiplier.size <= _INVERTED
    return few and not opaque


def _inverse(
    loss: FlatLoss,
    theta: Float[Array, " d"],
    multiplier: Float[Array, " m"],
    alpha: Float[Array, "d d"],
    c: Scalar,
) -> Float[Array, "d d"]:
    """(α + c Σ μᵢ∇²zᵢ)⁻¹, with α = 1 + cλ∇²R: what a change of θ does to a stage, μ
    being fixed."""
    weighted = lambda th: jnp.vdot(multiplier, loss.outputs(th))
    curvature = jax.jacrev(jax.grad(weighted))(theta)
    return jnp.linalg.inv(alpha + c * curvature)


def _curved_kernel(
    loss: FlatLoss,
    theta: Float[Array, " d"],
    weights: Float[Array, " d"] | Float[Array, "d d"] | None,
) -> Float[Array, "m m"]:
    """J W Jᵀ with the diagonal or the whole of W, times ℓ'' unless that is a number."""
    if weights is not None and weights.ndim == 2:
        jac = loss.jacobian(theta)
        kernel = jac @ weights @ jac.T
    else:
        kernel = loss.tangent_kernel(theta, weights)
    if loss.outer_curvature is None:
        z = loss.outputs(theta)
        hvp = lambda u: loss.outer_hvp(z, u)
        kernel = jax.lax.map(hvp, kernel.T, batch_size=256).T
    return kernel


def _factorise(
    loss: FlatLoss, shift: Scalar, kernel: Float[Array, "m m"], definite: bool
) -> _Factor:
    """The matrix shift I + ℓ''K, or shift/w I + K where ℓ'' = w I."""
    # Rounding may make a singular kernel indefinite; the ridge moves only how fast the
    # multiplier converges where it has no bearing on the parameters.
    ridge = shift + jnp.finfo(kernel.dtype).eps * jnp.abs(jnp.trace(kernel))
    eye = jnp.eye(kernel.shape[0], dtype=kernel.dtype)
    w = loss.outer_curvature or 1.0
    if definite:
        matrix = cho_factor(ridge / w * eye + kernel, lower=True)[0]
        pivots = jnp.zeros(kernel.shape[0], jnp.int32)
        smallest = w * jnp.min(jnp.diag(matrix)) ** 2
        solve = lambda b: cho_solve((matrix, True), b)
    else:
        matrix, pivots = lu_factor(ridge / w * eye + kernel)
        smallest = w * jnp.min(jnp.abs(jnp.diag(matrix)))
        solve = lambda b: lu_solve((matrix, pivots), b)
    if len(eye) <= _INVERTED:
        matrix = solve(eye)
    return _Factor(matrix, pivots, jnp.asarray(shift, kernel.dtype), smallest)


def _drifted(factor: _Factor, shift: Scalar) -> Bool[Array, ""]:
    """Whether a factor made for another shift would slow the iteration: its contraction
    is at most |change of the shift|/(smallest eigenvalue). On the critical manifold the
    shift is far below all eigenvalues, and one factor serves many step sizes."""
    return ~(jnp.abs(shift - factor.shift) <= _DRIFT * factor.smallest)


def _solver(loss: FlatLoss, shift: Scalar, factor: _Factor, definite: bool) -> Callable:
    """A function that solves (shift I + ℓ''K) u = shift (ℓ''p + q), given p, q, z."""
    w = loss.outer_curvature
    if len(factor.matrix) <= _INVERTED:
        apply = lambda b: factor.matrix @ b
    elif definite:
        apply = lambda b: cho_solve((factor.matrix, True), b)
    else:
        apply = lambda b: lu_solve((factor.matrix, factor.pivots), b)
    if w is not None:
        return lambda p, q, z: shift * apply(p + q / w)
    return lambda p, q, z: shift * apply(loss.outer_hvp(z, p) + q)


def _matrix(tableau: diffrax.ButcherTableau) -> tuple[np.ndarray, float]:
    """The strictly lower part of A, and γ."""
    n = len(tableau.b_sol)
    a = np.zeros((n, n))
    for i, row in enumerate(tableau.a_lower):
        a[i + 1, : i + 1] = row
    return a, float(np.asarray(tableau.a_diagonal)[-1])


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
    a, gamma = _matrix(tableau)
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
