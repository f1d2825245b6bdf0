"""RKC2: an explicit solver for stiff flows that asks for the velocity and its
derivative along a vector, and for no matrix."""

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from diffrax import AbstractTerm, ThirdOrderHermitePolynomialInterpolation
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree, Scalar

from .._norms import as_vector
from .._typing import BoolScalarLike, RealScalarLike
from ..flow.flat import linearized
from ..flow.term import FlowTerm
from ..results import RESULTS
from .base import AbstractOnParams, Followed, Saved
from .controllers import lasting, Step

_DAMPING = 2 / 13  # ε; inside the stability interval |P| stays below 1 − ε/3
_INTERVAL = 0.653  # s stages are stable for h ρ ≤ 0.653 (s² − 1)
_CAUTION = 6  # by which the error estimate is taken larger than it is
_SAFETY = 1.1  # by which ρ is taken larger than it was found
_DECAY = 0.04  # what the decay of θ counts for against the growth of its speed
_FALL = 0.8  # the least ratio of ρ to that of the step before
_SETTLED = 0.01  # relative change at which the power iteration ends
_LONGER = 10  # by how much the next step may be longer
_COLD, _WARM = 50, 20  # products the power iteration may take, at the start and later


class _State(eqx.Module):
    slope: PyTree  # the velocity where the last step ended (FSAL)
    vector: PyTree  # of norm one, near the eigenvector of the largest |eigenvalue|
    radius: Float[Array, ""]  # that |eigenvalue|, the spectral radius ρ
    evaluations: Int[Array, ""]  # of the velocity, so far
    products: Int[Array, ""]  # of its Jacobian with a vector, so far


class RKC2(AbstractOnParams, diffrax.AbstractAdaptiveSolver[_State]):
    """Runge-Kutta-Chebyshev of order 2: explicit, with as many stages as it takes.

    For y' = f(t, y) whose Jacobian has eigenvalues on or near the negative real axis,
    as a gradient flow has near a minimum (a few positive ones do no harm). A step h of
    s stages is stable where

        h ρ ≤ 0.653 (s² − 1),        ρ the spectral radius of the Jacobian.

    So it costs s ≈ 1.3 √(h ρ) evaluations of f, and mostly one product of the Jacobian
    with a vector, where a classical explicit method needs evaluations in proportion to
    h ρ. It forms no matrix, and holds some ten vectors like y.

    **When to choose it.** For an opaque loss of more than 5000 parameters, to which
    `KKT4` and `KKT5` do not fit; for a composite one with more than 10 000 outputs and
    parameters, on which they do without a matrix, as long as λ is moderate; or where
    gradients are cheap. The cost of a drift grows as λ^(−1/2), that of the KKT methods
    with a matrix hardly. It is made for rtol 1e-3 to 1e-5: the steps are controlled by
    their local error, and the error of the path falls as rtol^(2/3). So the estimate is
    taken six times larger than it is: then the error is mostly below 5 rtol down to
    1e-6. In a gradient flow errors along the step count for more while it speeds up,
    and some while all of θ decays, for they are not damped; out of a saddle 4 rtol were
    seen at 1e-3, 20 at 1e-5 and 45 at 1e-6. Not for oscillations.

    **At kinks**, as of ReLU, the velocity jumps. What of the error estimate is too
    large for a third derivative, by ρ, is a jump; it is not taken larger than it is,
    and a jump of the speed is no growth.

    **The spectral radius** is found at the end of every step by power iteration, which
    goes on from the eigenvector of the step before; the next step takes it 10 % larger.
    (Where two stages will do for that one in any case, by a single product.)
    The last two stages give a witness for nothing: ‖f(Yₛ) − f(Yₛ₋₁)‖ / ‖Yₛ − Yₛ₋₁‖ ≤ ρ.
    A direction in which the step is unstable grows, and soon is all of that difference;
    so where the witness exceeds the ρ known, the iteration starts from it. A step that
    ends where ρ is too large for its stages is rejected; and one that was unstable on
    the way rejects itself, as the error estimate holds h f(y₁).

    **Arguments:**

    - `max_stages`: the most stages of a step, 2 or more. A step that needs more is
        rejected, so that the next is shorter; it is never taken with fewer.

    **Raises:** `ValueError` for fewer.

    **Source:** Sommeijer, Shampine, Verwer (J. Comput. Appl. Math. 88, 1998), damping
    ε = 2/13, error estimate 0.8 (y₀ − y₁) + 0.4 h (f₀ + f₁). Here the recurrence is
    written in differences of stages, and its coefficients in series without
    cancellation: rounding errors grow with s, where in the usual form they grow with s²
    (at 5000 stages they are 1e-11 of y, against 7e-6).
    """

    differentiable: ClassVar[bool] = False
    sees_growth: ClassVar[bool] = True
    sees_jumps: ClassVar[bool] = False
    term_structure: ClassVar = AbstractTerm
    interpolation_cls: ClassVar = ThirdOrderHermitePolynomialInterpolation.from_k
    max_stages: int = 10_000

    def __check_init__(self):
        if self.max_stages < 2:
            raise ValueError(f"max_stages: expected 2 or more, got {self.max_stages}.")

    def order(self, terms: PyTree[AbstractTerm]) -> int:
        return 2

    def error_order(self, terms: PyTree[AbstractTerm]) -> int:
        return 3  # the estimate is of the order of the local error

    @property
    def name(self) -> str:
        return type(self).__name__

    def follow(self, term: FlowTerm, params: PyTree, weight_decay: Scalar) -> Followed:
        return Followed(self, term, params)

    def tolerance_share(self, rtol: Scalar) -> Scalar | float:
        # Its error falls as the 2/3 power of what it is told.
        return jnp.minimum(1, rtol / 1e-6) ** 0.5

    def reservation(self, saved: Saved) -> RESULTS:
        return RESULTS.successful

    def work(self, term: AbstractTerm, state: _State, end: PyTree) -> dict[str, Array]:
        """What the accepted steps took, from the final `state`
        (`SaveAt(solver_state=True)`): `evaluations` of the velocity, and `products` of
        its Jacobian with a vector, whatever `term` and `end`. (Diffrax forgets what a
        rejected step has done.)"""
        return {"evaluations": state.evaluations, "products": state.products}

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
        dtype = jnp.asarray(terms.contr(t0, t1)).dtype
        slope, push, _ = linearized(lambda y: terms.vf(t0, y, args), y0)
        # Stiff components stand out in the slope; noise has something of all.
        start = jax.tree.map(jnp.add, _unit(_noise(y0), dtype), _unit(slope, dtype))
        none = jnp.zeros((), dtype)
        vector, radius, products = _power_iteration(push, start, none, _COLD)
        return _State(slope, vector, radius, jnp.ones((), int), products)

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
        h = jnp.asarray(terms.contr(t0, t1))
        state = solver_state
        if made_jump is not False:
            state = jax.lax.cond(
                made_jump,
                lambda: _add_counts(self.init(terms, t0, t1, y0, args), state),
                lambda: state,
            )
        f0 = state.slope

        reach = _SAFETY * jnp.abs(h) * state.radius
        fits = reach <= _INTERVAL * (self.max_stages**2 - 1)
        stages = jnp.floor(jnp.sqrt(1 + jnp.where(fits, reach, 0) / _INTERVAL))
        stages = jnp.clip(1 + stages.astype(int), 2, self.max_stages)
        scheme = _Chebyshev(stages, h.dtype)

        # Y_j = y₀ + b_j Z_j and Z_j = Z_{j−1} + G_j, with F_j = f(Y_j).
        def stage(j, carry):
            z, g, _, _ = carry
            b, a = scheme.b(j - 1), scheme.a(j - 1)
            t = t0 + scheme.c(j - 1) * (t1 - t0)
            f = terms.vf(t, _combine((1, y0), (b, z)), args)
            pull = 2 * scheme.w1 / b * h
            g = _combine((1, g), (2 * scheme.w, z), (pull, f), (-pull * a, f0))
            return _combine((1, z), (1, g)), g, z, f

        first = _combine((scheme.w1 * h, f0))
        z, _, z_before, f_before = jax.lax.fori_loop(
            2, jnp.where(fits, stages, 1) + 1, stage, (first, first, first, f0)
        )
        move = _combine((scheme.b(stages), z))
        y1 = jax.tree.map(jnp.add, y0, move)
        f1, push, _ = linearized(lambda y: terms.vf(t1, y, args), y1)
        dy = _combine((1, move), (-scheme.b(stages - 1), z_before))
        df = _combine((1, f1), (-1, f_before))
        # Below this, and twice this, the next step takes two stages, however long.
        idle = 0.5 * 3 * _INTERVAL / (_SAFETY * _LONGER * jnp.abs(h))
        steep, short = _norm(df, h.dtype), _norm(dy, h.dtype)
        overlooked = steep > (1 + _SETTLED) * state.radius * short
        start = jax.tree.map(lambda u, v: jnp.where(overlooked, u, v), df, state.vector)
        vector, found, products = _power_iteration(
            push, start, state.radius, _WARM, jnp.where(overlooked, 0, idle)
        )

        error = _combine((-0.8, move), (0.4 * h, f0), (0.4 * h, f1))
        caution = _CAUTION
        flow = getattr(terms, "term", terms)
        if isinstance(flow, FlowTerm):
            sizes = [as_vector(y) for y in (y0, y1, error, f0, f1)]
            step, (slow, fast) = Step.of(*sizes)
            # Where f is smooth the error is about h³y‴/15, of which ρ limits the size.
            # What is larger are jumps of f, at kinks, which say nothing of growth.
            largest = reach * (2 + reach) / 15 * step.length
            least = jnp.where(step.missed > 0, step.missed, 1)
            smooth = jnp.clip(2 * largest / least - 1, 0, 1)
            caution = 1 + (_CAUTION - 1) * smooth
            if (roots := flow.chart.roots) is not None:
                step, _ = Step.of(*sizes[:3], roots=roots)
            # A gradient flow speeds up only where something in it grows. And steps are
            # so many that errors add up where all of θ decays, too.
            decay = _DECAY * jnp.log(step.size / step.left)
            growth = jnp.maximum(jnp.log(fast / slow), jnp.nan_to_num(decay))
            rounding = jnp.finfo(h.dtype).eps * (1 + reach) / caution
            caution = caution * lasting(smooth * growth, step, rounding)
        error = _combine((caution, error))

        stable = jnp.abs(h) * found <= _INTERVAL * (stages.astype(h.dtype) ** 2 - 1)
        error = jax.tree.map(lambda e: jnp.where(fits & stable, e, jnp.inf), error)

        new = _State(
            slope=f1,
            vector=vector,
            radius=jnp.maximum(found, _FALL * state.radius),
            evaluations=jnp.where(fits, stages, 1),
            products=products,
        )
        k = jax.tree.map(lambda *f: h.astype(f[0].dtype) * jnp.stack(f), f0, f1)
        info = dict(y0=y0, y1=y1, k=k)
        return y1, error, info, _add_counts(new, state), diffrax.RESULTS.successful


class _Chebyshev:
    """The coefficients of the scheme with s stages, as functions of the stage j.

    With w₀ = 1 + ε/s² = cosh θ the Chebyshev polynomial is T_j(w₀) = cosh jθ, and
    b_j = T_j''/T_j'². The textbook's formulas lose the digits of w₀ − 1 as s grows;
    those here are equal, and lose none in any precision.
    """

    def __init__(self, s: Int[Array, ""], dtype: DTypeLike):
        s = s.astype(dtype)
        self.dtype = dtype
        self.w = _DAMPING / s**2  # w₀ − 1
        self.theta = 2 * jnp.arcsinh((_DAMPING / 2) ** 0.5 / s)
        self.sinhc, self.series = _hyperbolic(self.theta)
        self.w1 = 1 / (self.b(s) * self._derivative(s))

    def b(self, j: Scalar) -> Scalar:
        j = jnp.maximum(j, 2).astype(self.dtype)  # b₀ = b₁ = b₂
        sinhc, series = _hyperbolic(j * self.theta)
        return (series - sinhc * self.series / (self.sinhc * j**2)) / (3 * sinhc**2)

    def a(self, j: Scalar) -> Scalar:
        x = j.astype(self.dtype) * self.theta
        sinhc, series = _hyperbolic(x)
        return 1 - self.b(j) * (sinhc + x * x * series / 3)

    def c(self, j: Scalar) -> Scalar:
        """The time of the stage; 1 for the last."""
        return self.w1 * self.b(j) * self._derivative(j)

    def _derivative(self, j: Scalar) -> Scalar:
        """T_j'(w₀) = j sinh jθ / sinh θ."""
        j = j.astype(self.dtype)
        return j**2 * _hyperbolic(j * self.theta)[0] / self.sinhc


def _hyperbolic(x: Scalar) -> tuple[Scalar, Scalar]:
    """sinh x / x and 3 (cosh x − sinh x / x)/x², by their series; here |x| < 0.6."""
    sinhc, series, term = jnp.ones_like(x), jnp.ones_like(x), jnp.ones_like(x)
    for k in range(1, 8):
        term = term * x * x / ((2 * k) * (2 * k + 1))  # x²ᵏ/(2k + 1)!
        sinhc = sinhc + term
        series = series + term * (6 * (k + 1) / ((2 * k + 2) * (2 * k + 3)))
    return sinhc, series


def _power_iteration(
    push: Callable, start: PyTree, guess: Scalar, most: int, idle: Scalar | float = 0.0
) -> tuple[PyTree, Scalar, Int[Array, ""]]:
    """The largest |eigenvalue| of the linear map `push`, from below if it is symmetric.
    One below `idle` need not be known: one product will do.

    **Returns:** the eigenvector, the |eigenvalue|, the number of products.
    """

    def iterate(carry):
        v, last, largest, count, _ = carry
        w = push(v)
        size = _norm(w, guess.dtype)
        w = jax.tree.map(lambda w, v: jnp.where(size > 0, w, v), w, v)
        settled = ~(jnp.abs(size - last) > _SETTLED * size)  # or not a number
        settled = settled | (size < idle)
        largest = jnp.maximum(largest, size)
        return _unit(w, guess.dtype), size, largest, count + 1, settled

    first = (
        _unit(start, guess.dtype),
        guess,
        jnp.zeros_like(guess),
        jnp.zeros((), int),
        jnp.array(False),
    )
    vector, _, radius, count, _ = jax.lax.while_loop(
        lambda carry: ~carry[4] & (carry[3] < most), iterate, first
    )
    return vector, radius, count


def _add_counts(new: _State, old: _State) -> _State:
    return eqx.tree_at(
        lambda s: (s.evaluations, s.products),
        new,
        (new.evaluations + old.evaluations, new.products + old.products),
    )


def _noise(tree: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(tree)
    keys = jr.split(jr.key(0), len(leaves))
    noise = [jr.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, noise)


def _combine(*terms: tuple[Any, PyTree]) -> PyTree:
    """Σ c x over the given pairs of a number and a pytree."""
    numbers, trees = zip(*terms, strict=True)

    def leaf(*xs):
        return sum(
            jnp.asarray(c, x.dtype) * x for c, x in zip(numbers, xs, strict=True)
        )

    return jax.tree.map(leaf, *trees)


def _norm(tree: PyTree, dtype: DTypeLike) -> Scalar:
    return jnp.sqrt(sum(jnp.sum(x * x).astype(dtype) for x in jax.tree.leaves(tree)))


def _unit(tree: PyTree, dtype: DTypeLike) -> PyTree:
    size = _norm(tree, dtype)
    return _combine((1 / jnp.where(size > 0, size, 1), tree))
