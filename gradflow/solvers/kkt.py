"""KKT-ESDIRK: stiff solvers for the gradient flow of a composite loss."""

import abc
from typing import ClassVar, NamedTuple, TYPE_CHECKING

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from diffrax import AbstractTerm, ThirdOrderHermitePolynomialInterpolation
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import cho_factor
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from .._typing import BoolScalarLike, RealScalarLike
from ..flow.decay import decay_at, DecaySchedule
from ..flow.flat import AbstractFlatLoss
from ..flow.nonsmooth import may_have_kinks
from ..flow.term import AbstractFlowTerm, Tracked, TrackedFlowTerm
from ..penalties import curvature
from ..results import RESULTS
from .base import AbstractFlowSolver, Controller, Followed, Saved
from .controllers import lasting, Step
from .jumps import curvature_jumps, JUMPED
from .kernel import (
    curved_kernel,
    Factor,
    fits,
    is_small,
    is_thin,
    KEPT,
    Kernel as DenseKernel,
    no_factor,
    no_kernel,
    RENEWED,
    stage_curvature,
    StageMatrix,
    Thin,
    WHOLE,
)
from .lockstep import where_needed
from .matrix_free import check_free, FreeMatrix, Nystrom
from .orthant import flat_problem, only_holds, OnOrthant, tracked_gradient, unwrap
from .stages import ChordIteration, Stages
from .tableaus import end_slope, jump_rules, kencarp5, predictor, tableau_matrix

if TYPE_CHECKING:
    from typing import ClassVar as AbstractClassVar
else:
    from equinox import AbstractClassVar

Kernel = DenseKernel | Nystrom

_SLOW = 3  # iterations a stage above which the tangent kernel is renewed


class _State(eqx.Module):
    slope: Float[Array, " d"]  # the last stage's, first of the next step (FSAL)
    multiplier: Float[Array, " m"]  # ∇ℓ(z) where the last step ended
    kernel: Kernel  # J Jᵀ; ℓ'' J Jᵀ where ℓ'' is not a multiple of I
    stale: Bool[Array, ""]  # whether the next step is to renew it
    curved: Bool[Array, ""]  # whether it takes the curvature of the outputs in
    factor: Factor
    rate: Float[Array, ""]  # contraction of the last iteration
    lasting: Float[Array, ""]  # see `lasting`
    work: dict[str, Int[Array, ""]]  # see `AbstractKKT.work`


class _Problem(eqx.Module):
    """What one step solves."""

    term: AbstractFlowTerm
    loss: AbstractFlatLoss
    theta: Float[Array, " d"]
    h: Scalar
    weight_decay: Scalar
    """λ at the end of the step."""
    decays: Float[Array, " stages"] | None
    """λ at each stage, where it is not the same."""
    c: Scalar
    """γh."""
    rho: Scalar | Float[Array, " d"]
    """The curvature of R: a number, or uneven."""
    kinked: bool = eqx.field(static=True)
    """Whether the loss may have kinks."""

    @property
    def uneven(self) -> bool:
        return self.rho.ndim > 0

    @property
    def alpha(self) -> Scalar | Float[Array, " d"]:
        return 1 + self.c * self.weight_decay * self.rho

    def kernel(self, old: Kernel) -> Kernel:
        """The tangent kernel, with (1 + cλ∇²R)⁻¹ inside where that is not a number; or
        what stands for it where the `old` one is such."""
        if isinstance(old, Nystrom):
            return old.renewed(self.loss, self.theta, self.alpha, self.c)
        weights = 1 / self.alpha if self.uneven else None
        return curved_kernel(self.loss, self.theta, weights)

    def whole_kernel(
        self, multiplier: Float[Array, " m"]
    ) -> tuple[Kernel, Float[Array, "d d"]]:
        """The kernel with the curvature of R and of the outputs inside, and what stands
        inside; or the factors of one, and the inverse of that."""
        theta, penalty = self.theta, self.term.penalty
        pull = self.c * self.weight_decay
        matrix = jnp.diag(1 + pull * jnp.broadcast_to(self.rho, theta.shape))
        # (One along whose kinks coordinates are held has the curvature of that.)
        held = isinstance(penalty, OnOrthant)
        if not (held or penalty.separable):

            def decay(th):
                return ravel_pytree(penalty.gradient(self.loss.unravel(th)))[0]

            matrix = jnp.eye(theta.size, dtype=theta.dtype) + pull * jax.jacfwd(decay)(
                theta
            )
        matrix = stage_curvature(self.loss, theta, multiplier, matrix, self.c)
        if is_thin(theta, multiplier):
            return curved_kernel(self.loss, theta, None), matrix
        inverse = jnp.linalg.inv(matrix)
        return curved_kernel(self.loss, theta, inverse), inverse


class _Step(eqx.Module):
    """One attempt at a step."""

    slopes: Float[Array, "stages d"]
    stage: Float[Array, " d"]
    multiplier: Float[Array, " m"]
    rate: Float[Array, ""]
    error: Float[Array, " d"]
    iterations: Int[Array, ""]
    products: Int[Array, ""]
    slid: Bool[Array, ""]
    kernel: Kernel
    factor: Factor
    ok: Bool[Array, ""]


class _Tried(NamedTuple):
    """The attempts at a step so far."""

    effort: Int[Array, ""]
    """Of the next one."""
    done: Bool[Array, ""]
    out: _Step
    kernels: Int[Array, ""]
    """How many were made."""
    iterations: Int[Array, ""]
    products: Int[Array, ""]
    """Of all attempts."""


class AbstractKKT(
    AbstractFlowSolver,
    diffrax.AbstractImplicitSolver[_State],
    diffrax.AbstractAdaptiveSolver[_State],
):
    """Common part of the KKT-ESDIRK methods; see `KKT4` and `KKT5`."""

    differentiable: ClassVar[bool] = False
    sees_growth: ClassVar[bool] = True
    sees_jumps: ClassVar[bool] = True
    term_structure: ClassVar = AbstractFlowTerm
    interpolation_cls: ClassVar = ThirdOrderHermitePolynomialInterpolation.from_k
    tableau: AbstractClassVar[diffrax.ButcherTableau]
    root_finder: eqx.AbstractVar[ChordIteration]
    matrix_free: eqx.AbstractVar[bool]

    @abc.abstractmethod
    def order(self, terms: PyTree[AbstractTerm]) -> int:
        """Of the method, whatever the terms."""

    @property
    def name(self) -> str:
        return type(self).__name__

    def follow(
        self, term: AbstractFlowTerm, params: PyTree, weight_decay: Scalar
    ) -> Followed:
        """With the multiplier saved beside the parameters; see `loss_of`."""
        theta, loss = flat_problem(term, params)
        tracked = TrackedFlowTerm(term.loss, term.penalty, term.chart)
        return Followed(self, tracked, Tracked(params, loss.residuals(theta)))

    def controlled(self, controller: Controller) -> Controller:
        return controller

    @staticmethod
    def coordinates(y: PyTree) -> PyTree:
        # The stages, too, are measured by the norm of the controller.
        return y.params if isinstance(y, Tracked) else y

    def params_of(self, y: Tracked) -> PyTree:
        return y.params

    def points(self, y: Tracked) -> tuple[PyTree, ...]:
        return (y.params,)

    def loss_of(self, term: AbstractFlowTerm, y: Tracked) -> Scalar:
        """F, through the multiplier: its relative error is that of the parameters, even
        where F itself is tiny."""
        theta, loss = flat_problem(term, y.params)
        return loss.outer_from(y.multiplier, loss.outputs(theta))

    def gradient_of(self, term: AbstractFlowTerm, y: Tracked) -> PyTree:
        """∇F, through the multiplier."""
        return tracked_gradient(term, y)

    def tolerance_share(self, rtol: Scalar) -> Scalar | float:
        return 1.0

    def reservation(self, saved: Saved) -> RESULTS:
        return RESULTS.successful

    def work(
        self, term: AbstractFlowTerm, state: _State, end: Tracked
    ) -> dict[str, Array]:
        """What the accepted steps took, from the final state
        (`SaveAt(solver_state=True)`): `iterations`, each at the cost of the outputs,
        one Jacobian-vector and two vector-Jacobian products (one of the latter only,
        where parameters are fewer than outputs); tangent `kernels` made, or what
        preconditions without; without a matrix `products`, with JJᵀ, for both; steps
        `sliding` along a kink of the loss. And, where ℓ'' is a multiple of I and
        m ≤ d, `conditioning`: the smallest pivot of the last kernel over its largest
        diagonal entry, which falls to rounding level as J loses rank."""
        known = getattr(term.loss, "outer_curvature", None) is not None
        if not known or isinstance(state.kernel, (Thin, Nystrom)):
            return state.work
        pivots = jnp.diag(cho_factor(state.kernel, lower=True)[0]) ** 2
        smallest = jnp.nan_to_num(jnp.min(pivots))
        return {
            **state.work,
            "conditioning": smallest / jnp.max(jnp.diag(state.kernel)),
        }

    def func(
        self, terms: AbstractTerm, t0: RealScalarLike, y0: PyTree, args: PyTree
    ) -> PyTree:
        return terms.vf(t0, y0, args)

    def init(
        self,
        terms: AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: PyTree,
        args: PyTree,
    ) -> _State:
        term, params = unwrap(terms, y0)
        theta, loss = flat_problem(term, params)
        residuals = loss.residuals(theta)
        free = self.matrix_free or not fits(theta.size, residuals.size)
        names = ("iterations", "kernels", "sliding")
        if free:
            check_free(term, loss)
            names += ("products",)
            kernel = Nystrom.none(loss, theta, residuals.size)
            factor = no_factor(len(kernel.rows), theta.dtype)
        else:
            kernel, factor = no_kernel(loss, theta, residuals)
        return _State(
            slope=ravel_pytree(term.velocity(params, decay_at(args, t0)))[0],
            multiplier=residuals,
            kernel=kernel,
            stale=jnp.array(not free),
            curved=jnp.array(False),
            factor=factor,
            rate=jnp.asarray(0.5, theta.dtype),
            lasting=jnp.ones((), theta.dtype),
            work={k: jnp.zeros((), int) for k in names},
        )

    @eqx.filter_jit  # a loop of Diffrax traces a step several times
    def step(
        self,
        terms: AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: PyTree,
        args: PyTree,
        solver_state: _State,
        made_jump: BoolScalarLike,
    ) -> tuple[PyTree, PyTree, dict, _State, diffrax.RESULTS]:
        del made_jump  # the first slope is that of the last step's end
        term, params = unwrap(terms, y0)
        theta, loss = flat_problem(term, params)
        h = jnp.asarray(terms.contr(t0, t1), theta.dtype)
        rho = curvature(term.penalty, params)
        leaves = jax.tree.leaves(rho)
        uneven = len(leaves) > 1 or jnp.ndim(leaves[0]) > 0
        problem = _Problem(
            term=term,
            loss=loss,
            theta=theta,
            h=h,
            weight_decay=jnp.asarray(decay_at(args, t1), theta.dtype),
            decays=self._decays(t0, t1, args),
            c=tableau_matrix(self.tableau)[1] * h,
            rho=ravel_pytree(rho)[0] if uneven else jnp.asarray(rho, theta.dtype),
            kinked=may_have_kinks(loss, theta),
        )
        out, state, step = self._attempts(problem, params, solver_state)
        result = diffrax.RESULTS.where(
            out.ok,
            diffrax.RESULTS.successful,
            diffrax.RESULTS.nonlinear_divergence,  # pyright: ignore[reportArgumentType]
        )
        free = 1.0
        if isinstance(term.penalty, OnOrthant):
            free = jnp.abs(term.penalty.sign)
        y1 = loss.unravel(free * out.stage)
        error = out.error * state.lasting
        if problem.kinked:
            gone = step.gone / jnp.maximum(step.length, jnp.finfo(theta.dtype).tiny)
            across = step.error - jnp.vdot(step.error, gone) * gone
            roots = term.chart.roots
            across = across if roots is None else across / roots
            error = jnp.where(out.slid, across, error)
        error = loss.unravel(jnp.where(out.ok, free * error, jnp.inf))
        k = jax.vmap(loss.unravel)(h * out.slopes[np.array([0, -1])])
        if isinstance(term, TrackedFlowTerm):
            # The multiplier follows from θ: it has no error of its own to control.
            still = jnp.zeros_like(out.multiplier)
            y1 = Tracked(y1, out.multiplier)
            error = Tracked(error, still)
            k = Tracked(k, jnp.stack([still, still]))
        return y1, error, dict(y0=y0, y1=y1, k=k), state, result

    def _decays(
        self, t0: RealScalarLike, t1: RealScalarLike, args: PyTree
    ) -> Float[Array, " stages"] | None:
        if not isinstance(args, DecaySchedule):
            return None
        h = jnp.asarray(t1 - t0)
        nodes = jnp.asarray(np.append(0.0, self.tableau.c), h.dtype)
        return jax.vmap(args)(t0 + nodes * h)

    def _attempts(
        self, problem: _Problem, params: PyTree, state: _State
    ) -> tuple[_Step, _State, Step]:
        """A step, by as much effort as it takes, the state after it, and its sizes.

        A kernel that has served too long is no reason to shorten the step: the second
        attempt renews it; and where that fails, since the outputs are curved, a third
        one takes their curvature in, as all later steps then do. (Diffrax forgets what
        a rejected step has learnt.)"""
        theta, loss = problem.theta, problem.loss
        free = isinstance(state.kernel, Nystrom)
        small = is_small(loss, theta) and not free
        live = problem.h != 0  # a lane that has ended waits for the others
        most = WHOLE if small else RENEWED

        def attempt(effort: Int[Array, ""], live: Bool[Array, ""]) -> _Step:
            kernel = where_needed(
                live & (effort == RENEWED),
                lambda: problem.kernel(state.kernel),
                state.kernel,
            )
            curvature = None
            if small:
                unused = jnp.zeros((theta.size, theta.size), theta.dtype)
                kernel, curvature = where_needed(
                    live & (effort == WHOLE),
                    lambda: problem.whole_kernel(state.multiplier),
                    (kernel, unused),
                )
            return self._attempt(problem, state, kernel, curvature, effort, live)

        def retry(tried: _Tried) -> _Tried:
            effort = tried.effort
            out = attempt(effort, live & ~tried.done)
            made = (effort >= RENEWED).astype(int)
            done = out.ok | (effort == most) | ~live
            return _Tried(
                effort=effort + 1,
                done=done,
                out=out,
                kernels=tried.kernels + made,
                iterations=tried.iterations + out.iterations,
                products=tried.products + out.products,
            )

        # (A matrix has A inside, and is to be exact; what preconditions is not.)
        reusable = free or not problem.uneven
        reusable = reusable or only_holds(problem.term.penalty, params)
        renew = state.stale if reusable else jnp.array(True)
        effort = jnp.where(renew, RENEWED, KEPT)
        # What grows may be far below the tolerance of the iteration, which the whole
        # matrix leaves behind.
        growing = small & (state.lasting > 2)
        effort = jnp.where(state.curved | growing, WHOLE, effort)
        none = self._no_step(problem, state)
        tried = jax.lax.while_loop(
            lambda tried: ~tried.done,
            retry,
            _Tried(effort, jnp.array(False), none, *(jnp.array(0) for _ in range(3))),
        )
        whole = tried.effort > WHOLE
        kernel = tried.out.kernel
        if small:  # for `work`
            kernel = where_needed(whole, lambda: problem.kernel(kernel), kernel)
        curved = state.curved | (whole & ~growing)
        after, step = self._after(problem, state, tried, kernel, whole, curved)
        return tried.out, after, step

    def _no_step(self, problem: _Problem, state: _State) -> _Step:
        theta, no = problem.theta, jnp.array(False)
        stages = len(self.tableau.b_sol)
        return _Step(
            slopes=jnp.zeros((stages, theta.size), theta.dtype),
            stage=theta,
            multiplier=state.multiplier,
            rate=state.rate,
            error=theta,
            iterations=jnp.array(0),
            products=jnp.array(0),
            slid=no,
            kernel=state.kernel,
            factor=state.factor,
            ok=no,
        )

    def _after(
        self,
        problem: _Problem,
        state: _State,
        tried: _Tried,
        kernel: Kernel,
        whole: Bool[Array, ""],
        curved: Bool[Array, ""],
    ) -> tuple[_State, Step]:
        """What the next step is to know of this one, and the sizes of this one."""
        out, stages = tried.out, len(self.tableau.b_sol) - 1
        # (It may rise tenfold in a step: the iteration of the next is then as much more
        # exact, so that what it leaves is not taken for an error.)
        slopes = out.slopes[0], out.slopes[-1]
        sizes = problem.theta, out.stage, out.error
        step, (slow, fast) = Step.of(*sizes, *slopes, roots=problem.term.chart.roots)
        lasts = lasting(jnp.log(fast / slow), step)
        lasts = jnp.minimum(lasts, 10 * state.lasting)
        # What sliding leaves is no error that lasts, along the step or not.
        lasts = jnp.where(out.slid, 1.0, lasts)
        stale = (out.iterations > _SLOW * stages) | whole
        products = tried.products
        if isinstance(kernel, Nystrom):
            products = products + tried.kernels * kernel.price
            kernel, stale = kernel.served(out.iterations, out.products)
        new = dict(
            iterations=tried.iterations,
            products=products,
            kernels=tried.kernels,
            sliding=out.slid,
        )
        after = _State(
            slope=out.slopes[-1],
            multiplier=out.multiplier,
            kernel=kernel,
            factor=out.factor,
            curved=curved,
            stale=stale,
            rate=out.rate,
            lasting=lasts,
            work={k: n + jnp.asarray(new[k], int) for k, n in state.work.items()},
        )
        return after, step

    def _attempt(
        self,
        problem: _Problem,
        state: _State,
        kernel: Kernel,
        curvature: Float[Array, "d d"] | None,
        effort: Int[Array, ""],
        live: Bool[Array, ""],
    ) -> _Step:
        """The stages with one matrix; the multiplier and the error at their end."""
        term, loss, y0, h = problem.term, problem.loss, problem.theta, problem.h
        if isinstance(kernel, Nystrom):
            matrix = FreeMatrix.of(loss, kernel, y0, problem.alpha, problem.c)
        else:
            matrix = StageMatrix.of(
                loss, kernel, curvature, problem.alpha, problem.c, effort,
                state.factor, live,
            )  # fmt: skip
        stages = Stages(
            term=term,
            loss=loss,
            y0=y0,
            h=h,
            c=problem.c,
            weight_decay=problem.weight_decay,
            decays=problem.decays,
            matrix=matrix,
            finder=self.root_finder,
            most=self.root_find_max_steps,
            lasting=state.lasting,
            kinked=problem.kinked,
        )
        a = jnp.asarray(tableau_matrix(self.tableau)[0], y0.dtype)
        predict = jnp.asarray(predictor(self.tableau), y0.dtype)
        found = stages.solve(a, predict, state.slope, state.multiplier, state.rate)
        slopes, slid = found.slopes, found.slid
        y1 = y0 + h * (a[-1] @ slopes) + problem.c * slopes[-1]
        ok = found.ok & jnp.all(jnp.isfinite(y1))
        mu, products = found.multipliers[-1], found.products
        tracked = isinstance(term, TrackedFlowTerm)
        if tracked and (stages.held or not problem.uneven):
            rates = jnp.asarray(end_slope(self.tableau), y0.dtype) / h
            mu, more = stages.polished(y1, found.multipliers, rates, slid)
            products = products + more
        error = h * (jnp.asarray(self.tableau.b_error, y0.dtype) @ slopes)
        if curvature_jumps(term):
            least = jnp.abs(h) * self._unsmooth(slopes)
            error = jnp.copysign(jnp.maximum(jnp.abs(error), least), error)
        # What sliding leaves of the iteration is no reason for a shorter step.
        error = jnp.where(slid, error / stages.blur, error)
        return _Step(
            slopes=slopes,
            stage=y1,
            multiplier=mu,
            rate=found.rate,
            error=error,
            iterations=found.iterations,
            products=products,
            slid=slid,
            kernel=kernel,
            factor=matrix.factor,
            ok=ok,
        )

    def _unsmooth(self, slopes: Float[Array, "stages d"]) -> Float[Array, " d"]:
        """What a jump of θ'' within the step makes of it, to which the embedded formula
        can be blind: true errors of 40 (KKT4) and 190 (KKT5) times its estimate.

        Combinations of the slopes that vanish for polynomials of a lower and of a
        higher degree are of one size at a jump, and fall by h from one to the next
        where θ is smooth (Berntsen and Espelid, Numer. Math. 58, 1990)."""
        rules = jnp.asarray(jump_rules(self.tableau), slopes.dtype)
        two, three, four = rules @ slopes
        low, high = jnp.hypot(two, three), jnp.hypot(three, four)
        ratio = high / jnp.where(low > 0, low, 1)
        size = JUMPED * high
        return size * jnp.minimum(ratio, 1) ** (self.order(None) - 3)


# Which is no root finder of Optimistix's, but given the tolerances as those are.
_FINDER: ChordIteration = diffrax.with_stepsize_controller_tols(ChordIteration)()  # pyright: ignore[reportArgumentType]


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
    parameters). A loss that is not composite is taken as one with z(θ) = θ, and then
    its Hessian is formed (up to 5000 parameters).

    With fewer parameters than outputs the matrix is the d × d one of the same system,
    (α/c) I + Jᵀℓ''J, and J is frozen too.

    Where neither fits (above 10 000 of both, or 1e8 entries of J), or with
    `matrix_free=True`, the system ((α/c) I + JJᵀℓ'') s = … for s = J δY is solved to a
    tenth by conjugate gradients with the present J, one product by J and one by Jᵀ for
    each; ℓ'' is that at the start of the step. A randomised approximation of JJᵀ by
    Nyström's method, of rank 512 at most, preconditions them (Frangella, Tropp, Udell,
    SIAM J. Matrix Anal. Appl. 44, 2023). It is renewed when the products that it did
    not save are as many as a new one takes. No array is larger than 512 vectors of
    outputs. The products number as many as the curvatures cσ² > 1 that are beyond that
    rank make it, growing as λ^(−1/2) at worst. It needs a composite loss with convex ℓ,
    and a penalty without kinks.

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

    **Arguments:**

    - `root_finder`: the iteration on the equations of a stage, with tolerances of its
        own; those of the controller unless given.
    - `root_find_max_steps`: its most steps.
    - `matrix_free`: whether to solve without a matrix, whatever the size.
    """

    root_finder: ChordIteration = _FINDER
    root_find_max_steps: int = 12
    matrix_free: bool = False
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

    **Arguments:** `root_finder`, `root_find_max_steps`, `matrix_free`: as for `KKT4`.
    """

    root_finder: ChordIteration = _FINDER
    root_find_max_steps: int = 12
    matrix_free: bool = False
    tableau: ClassVar[diffrax.ButcherTableau] = kencarp5()

    def order(self, terms: PyTree[AbstractTerm]) -> int:
        return 5
