"""KKT-ESDIRK: stiff solvers for the gradient flow of a composite loss."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, TYPE_CHECKING

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

from ..flow import FlatLoss, flatten, FlowTerm
from ..losses import AbstractCompositeLoss

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
    kappa: float = 0.02


class _State(eqx.Module):
    slope: Float[Array, " d"]  # the last stage's, first of the next step (FSAL)
    multiplier: Float[Array, " m"]  # ∇ℓ(z) where the last step ended
    gram: Float[Array, "m m"]  # J Jᵀ; ℓ'' J Jᵀ where ℓ'' is not a multiple of I
    stale: Bool[Array, ""]  # whether the next step is to renew it
    rate: Float[Array, ""]  # contraction of the last iteration


class _Step(eqx.Module):
    """One attempt at a step."""

    slopes: Float[Array, "stages d"]
    stage: Float[Array, " d"]
    multiplier: Float[Array, " m"]
    rate: Float[Array, ""]
    error: Float[Array, " d"]
    iterations: Int[Array, ""]
    gram: Float[Array, "m m"]
    ok: Bool[Array, ""]


class AbstractKKT(
    diffrax.AbstractImplicitSolver[_State], diffrax.AbstractAdaptiveSolver[_State]
):
    """Common part of the KKT-ESDIRK methods; see `KKT3` and `KKT5`."""

    term_structure: ClassVar = FlowTerm
    interpolation_cls: ClassVar = ThirdOrderHermitePolynomialInterpolation.from_k
    tableau: AbstractClassVar[diffrax.ButcherTableau]

    def func(self, terms: AbstractTerm, t0: Any, y0: PyTree, args: Any) -> PyTree:
        return terms.vf(t0, y0, args)

    def init(
        self, terms: AbstractTerm, t0: Any, t1: Any, y0: PyTree, args: Any
    ) -> _State:
        term = _flow_term(terms)
        theta, loss = flatten(term.loss, y0, term.static)
        residuals = loss.residuals(theta)
        (m,) = residuals.shape
        return _State(
            slope=ravel_pytree(term.vf(t0, y0, args))[0],
            multiplier=residuals,
            gram=jnp.zeros((m, m), theta.dtype),
            stale=jnp.array(True),
            rate=jnp.asarray(0.5, theta.dtype),
        )

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
        term = _flow_term(terms)
        theta, loss = flatten(term.loss, y0, term.static)
        h = terms.contr(t0, t1)

        def attempt(renew: Bool[Array, ""]) -> _Step:
            gram = jax.lax.cond(
                renew, lambda: _gram(loss, theta), lambda: solver_state.gram
            )
            return self._stages(
                term.penalty, loss, theta, h, args, solver_state, gram, renew
            )

        def retry(carry):
            renew, _, _ = carry
            out = attempt(renew)
            return jnp.array(True), out.ok | renew, out

        # A Gram matrix that has served too long is no reason to shorten the step: the
        # second attempt renews it. (Diffrax forgets what a rejected step has learnt.)
        none = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype),
            eqx.filter_eval_shape(attempt, solver_state.stale),
        )
        _, _, out = jax.lax.while_loop(
            lambda carry: ~carry[1], retry, (solver_state.stale, jnp.array(False), none)
        )
        stages = len(self.tableau.b_sol) - 1
        y1 = loss.unravel(out.stage)
        state = _State(
            slope=out.slopes[-1],
            multiplier=out.multiplier,
            gram=out.gram,
            stale=out.iterations > _SLOW * stages,
            rate=out.rate,
        )
        result = diffrax.RESULTS.where(
            out.ok,
            diffrax.RESULTS.successful,
            diffrax.RESULTS.promote(optx.RESULTS.nonlinear_divergence),
        )
        error = loss.unravel(jnp.where(out.ok, out.error, jnp.inf))
        k = jax.vmap(loss.unravel)(h * out.slopes[np.array([0, -1])])
        return y1, error, dict(y0=y0, y1=y1, k=k), state, result

    def _stages(
        self,
        penalty: Any,
        loss: FlatLoss,
        y0: Float[Array, " d"],
        h: Scalar,
        weight_decay: float | Scalar,
        state: _State,
        gram: Float[Array, "m m"],
        fresh: Bool[Array, ""],
    ) -> _Step:
        lower, gamma = _matrix(self.tableau)
        a = jnp.asarray(lower, y0.dtype)
        p = jnp.asarray(_predictor(self.tableau), y0.dtype)
        c = gamma * h
        pull = c * weight_decay
        alpha = 1 + pull * penalty.curvature
        solve = _factorise(loss, alpha / c, gram)
        decay = lambda y: ravel_pytree(penalty.gradient(loss.unravel(y)))[0]
        scale = self.root_finder.atol + self.root_finder.rtol * jnp.abs(y0)
        kappa = self.root_finder.kappa  # pyright: ignore[reportAttributeAccessIssue]
        norm = lambda v: self.root_finder.norm(v / scale)
        most = self.root_find_max_steps

        def iterate(base, carry):
            y, mu, _, rate, size, count, weight, drift = carry
            z, push = jax.linearize(loss.outputs, y)
            pullback = lambda u: jax.linear_transpose(push, y)(u)[0]
            force = jax.grad(loss.composite.outer)(z)
            lack = base - y - pull * decay(y) - c * pullback(mu)
            dmu = solve(push(lack), alpha * (force - mu), z) / c
            dy = (lack - c * pullback(dmu)) / alpha
            new = norm(dy)
            # The first iteration has no rate of its own: the last stage's, never
            # trusted below 0.3, lets an excellent guess pass after one.
            rate = jnp.where(count > 0, new / size, jnp.maximum(rate, 0.3))
            left = new * rate / (1 - jnp.minimum(rate, 0.95))
            # Where ∇F jumps, as at the kinks of a ReLU, the flow may slide along the
            # jump. Then the stage has a solution only with a mean of the gradients on
            # both sides (Filippov), and the iteration goes to and fro between them even
            # with a fresh Gram matrix. The mean of its iterates converges, as 1/n.
            growing = (count > 0) & (rate > 2)
            cycling = fresh & (growing | ((count > 3) & (rate > 0.9)))
            weight = jnp.where(cycling | (weight < 1), weight / (1 + weight), weight)
            sliding = weight < 1
            drift = 0.75 * drift + 0.25 * dy  # small where they do go to and fro
            settled = (weight * new < _SLIDE) & (norm(drift) < 0.5 * new)
            converged = jnp.where(sliding, settled, left < kappa)
            diverging = ~jnp.isfinite(new) | (growing & ~sliding)
            status = jnp.where(diverging, 2, jnp.where(converged, 1, 0))
            y, mu = y + weight * dy, mu + weight * dmu
            return y, mu, status, rate, new, count + 1, weight, drift

        def stage(i, carry):
            slopes, y, mu, rate, ok, count = carry
            base = y0 + h * (a[i] @ slopes)
            guess = base + c * (p[i] @ slopes)
            one = jnp.ones_like(rate)
            y1, mu, status, rate, _, n, _, _ = jax.lax.while_loop(
                lambda s: (s[2] == 0) & (s[5] < jnp.where(s[6] < 1, 4, 1) * most) & ok,
                lambda s: iterate(base, s),
                (guess, mu, 0, rate, one, 0, one, jnp.zeros_like(y0)),
            )
            slopes = slopes.at[i].set((y1 - base) / c)
            return slopes, y1, mu, rate, ok & (status == 1), count + n

        slopes = jnp.zeros((len(a), y0.size), y0.dtype).at[0].set(state.slope)
        first = (slopes, y0, state.multiplier, state.rate, jnp.array(True), 0)
        slopes, y1, mu, rate, ok, count = jax.lax.fori_loop(1, len(a), stage, first)
        ok = ok & jnp.all(jnp.isfinite(y1))
        error = h * (jnp.asarray(self.tableau.b_error, y0.dtype) @ slopes)
        return _Step(slopes, y1, mu, rate, error, count, gram, ok)


_SLOW = 4  # iterations a stage above which the Gram matrix is renewed
_SLIDE = 0.2  # tolerances by which the mean may still move when a sliding stage ends


def _flow_term(terms: AbstractTerm) -> FlowTerm:
    term: Any = terms
    while not isinstance(term, FlowTerm):  # Diffrax wraps terms
        term = term.term
    if not isinstance(term.loss, AbstractCompositeLoss):
        raise ValueError(
            f"solver: KKT needs a composite loss, got {type(term.loss).__name__}; give "
            "the loss as SquaredError or CrossEntropy, or pass a Diffrax solver."
        )
    return term


def _gram(loss: FlatLoss, theta: Float[Array, " d"]) -> Float[Array, "m m"]:
    jac = loss.jacobian(theta)
    gram = jac @ jac.T
    if loss.composite.outer_curvature is None:
        z = loss.outputs(theta)
        hvp = lambda u: jax.jvp(jax.grad(loss.composite.outer), (z,), (u,))[1]
        gram = jax.vmap(hvp, in_axes=1, out_axes=1)(gram)
    return gram


def _factorise(loss: FlatLoss, shift: Scalar, gram: Float[Array, "m m"]) -> Callable:
    """A function that solves (shift I + ℓ''JJᵀ) u = ℓ''p + q, given p, q and z."""
    # Rounding may make a singular Gram matrix indefinite; the ridge moves only how fast
    # the multiplier converges where it has no bearing on the parameters.
    shift = shift + jnp.finfo(gram.dtype).eps * jnp.trace(gram)
    eye = jnp.eye(gram.shape[0], dtype=gram.dtype)
    w = loss.composite.outer_curvature
    if w is not None:
        factor = cho_factor(shift / w * eye + gram, lower=True)
        return lambda p, q, z: cho_solve(factor, p + q / w)
    lu = lu_factor(shift * eye + gram)

    def solve(p, q, z):
        hp = jax.jvp(jax.grad(loss.composite.outer), (z,), (p,))[1]
        return lu_solve(lu, hp + q)

    return solve


def _matrix(tableau: diffrax.ButcherTableau) -> tuple[np.ndarray, float]:
    """The strictly lower part of A, and γ."""
    n = len(tableau.b_sol)
    a = np.zeros((n, n))
    for i, row in enumerate(tableau.a_lower):
        a[i + 1, : i + 1] = row
    return a, float(np.asarray(tableau.a_diagonal)[-1])


def _predictor(tableau: diffrax.ButcherTableau) -> np.ndarray:
    """Weights that extrapolate the slope of a stage linearly from those before it.
    (Higher degrees amplify the iteration error of earlier stages, and cost more.)"""
    n = len(tableau.b_sol)
    times = np.concatenate([[0.0], np.asarray(tableau.c)])
    p = np.zeros((n, n))
    for i in range(1, n):
        degree = min(i - 1, 1)
        powers = np.arange(degree + 1)
        p[i, :i] = times[i] ** powers @ np.linalg.pinv(times[:i, None] ** powers)
    return p


class KKT3(AbstractKKT):
    """KKT-ESDIRK of order 3: for loose tolerances and losses that are barely smooth.

    Kvaernø's 3/2 method (BIT 44, 2004), L-stable and stiffly accurate, 4 stages with
    FSAL. A Diffrax solver for the term of `GradientFlow.term`; see `KKT5` for how a
    stage is solved.
    """

    # It takes many small steps: what each leaves of the iteration must not add up.
    root_finder: ChordIteration = diffrax.with_stepsize_controller_tols(ChordIteration)(
        kappa=0.002
    )
    root_find_max_steps: int = 12
    tableau: ClassVar[diffrax.ButcherTableau] = diffrax.Kvaerno3.tableau

    def order(self, terms: PyTree[AbstractTerm]) -> int:
        return 3


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


class KKT5(AbstractKKT):
    """KKT-ESDIRK of order 5: the default for a composite loss, unless the run is short.

    For θ' = −Jᵀ∇ℓ(z(θ)) − λ∇R(θ) a stage with c = γh solves

        Y + cλ∇R(Y) + c J(Y)ᵀμ = b,        μ = ∇ℓ(z(Y)),

    for Y and the multiplier μ, by chord iteration with J = J(Y) and the frozen m × m
    matrix (α/c) I + ℓ''JJᵀ, α = 1 + cλρ (ρ the curvature of R). In the drift along the
    critical manifold μ = O(λ) and c = O(1/λ), but cμ is neither small nor large:
    nothing cancels, accuracy does not depend on λ, and cost hardly. JJᵀ, the empirical
    tangent kernel, serves many steps; it is renewed when the iteration grows slow, or
    fails. No Hessian of the loss is formed. Where ∇F jumps and the flow slides along
    the jump, as at the kinks of a ReLU, the iteration goes to and fro, and the mean of
    its iterates is taken: at rtol 1e-3 to 1e-4 that works well, below it takes many
    steps. A step whose iteration fails all the same is rejected.

    The method is the implicit part of ARK5(4)8L[2]SA of Kennedy and Carpenter (Appl.
    Numer. Math. 44, 2003): L-stable, stiffly accurate, stage order 2, 8 stages with
    FSAL. Its error estimate holds on the manifold, where the problem is one of index 2;
    that of Kvaernø's method of order 5 is too small there by a factor that grows as the
    tolerance falls (24 at 1e-6, 59 at 1e-7 on a diagonal network with λ = 1e-4). One
    term is added to it, for plain decay, to which the published estimate is blind.

    Use it with `diffrax.diffeqsolve` on the term of `GradientFlow.term`, a
    `diffrax.PIDController`, and `args=weight_decay`.
    """

    root_finder: ChordIteration = diffrax.with_stepsize_controller_tols(
        ChordIteration
    )()
    root_find_max_steps: int = 12
    tableau: ClassVar[diffrax.ButcherTableau] = _kencarp5()

    def order(self, terms: PyTree[AbstractTerm]) -> int:
        return 5
