"""The same without a matrix: products with A = (ℓ'')^½J, or with ∇²F, alone.

Linear equations go to LSMR (Fong and Saunders, SIAM J. Sci. Comput. 33, 2011), whose
convergence follows κ(A), not its square; spectra to the Golub–Kahan process, or that of
Lanczos, with full reorthogonalisation. How far each has come is measured, and returned.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
from jaxtyping import Array, Bool, Float

from ..flow.lanczos import Lanczos, next_unit, orthogonal, random, unit

# Entries of the Krylov basis kept for a spectrum, and vectors at most: 800 MB.
_BASIS = 10**8
_VECTORS = 300


class Operator(eqx.Module):
    """A as a pair of products, ℝᵈ → ℝᵐ and back; ∇²F where it is symmetric."""

    apply: Callable[[Array], Array]
    transpose: Callable[[Array], Array]
    rows: int
    columns: int
    symmetric: bool


def frobenius(op: Operator, theta: Float[Array, " d"]) -> Float[Array, ""]:
    """‖A‖_F, to within a small factor: ‖A s‖ for random signs s has its mean square."""
    signs = jr.rademacher(jr.key(3), theta.shape, theta.dtype)
    return jnp.linalg.norm(op.apply(signs))


def least_squares(
    apply: Callable[[Array], Array],
    b: Float[Array, " k"],
    size: int,
    steps: int | None = None,
) -> tuple[Float[Array, " n"], Bool[Array, ""]]:
    """argmin ‖A x − b‖ over x ∈ ℝⁿ, the one of least norm, by LSMR, and whether it
    converged: ‖Aᵀr‖ or ‖r‖ at 4e-11 (eps^⅔) of ‖A‖‖r‖ or ‖A‖‖x‖ + ‖b‖."""
    tol = float(jnp.finfo(b.dtype).eps) ** (2 / 3)
    shape = jax.ShapeDtypeStruct((size,), b.dtype)
    linear = lx.FunctionLinearOperator(apply, shape)
    # Rounding takes the place of reorthogonalisation: more steps than dimensions.
    most = 10 * min(size, b.size) + 100 if steps is None else steps
    solver = lx.LSMR(rtol=tol, atol=0.0, max_steps=most)
    out = lx.linear_solve(linear, b, solver, throw=False)
    # A right-hand side of zero stops before it has begun.
    okay = (out.result == lx.RESULTS.successful) | (jnp.linalg.norm(b) == 0)
    return jnp.where(jnp.linalg.norm(b) == 0, 0, out.value), okay


def project(
    op: Operator, v: Float[Array, " d"], steps: int | None = None
) -> tuple[Float[Array, " d"], Bool[Array, ""]]:
    """P v = v − Aᵀ argmin ‖Aᵀy − v‖, and whether LSMR converged."""
    y, okay = least_squares(op.transpose, v, op.rows, steps)
    return v - op.transpose(y), okay


def curvature_inverse(
    op: Operator, x: Float[Array, " d"]
) -> tuple[Float[Array, " d"], Bool[Array, ""]]:
    """(∇²F)⁺x; in the Jacobian form A⁺A⁺ᵀx, so that κ(A) is not squared."""
    y, okay = least_squares(op.transpose, x, op.rows)
    if op.symmetric:
        return y, okay
    out, also = least_squares(op.apply, y, op.columns)
    return out, okay & also


class Extremes(eqx.Module):
    """What a Krylov process saw of a spectrum."""

    values: Float[Array, " k"]  # singular values, or eigenvalues with their sign
    bounds: Float[Array, " k"]  # each is that near to a true one
    rest: Float[Array, ""]  # an estimate of the norm of all that it did not see


def steps_for(op: Operator, steps: int | None) -> int:
    """As many vectors as the memory allows; all of them where there are few."""
    full = min(op.rows, op.columns)
    if steps is None:
        steps = max(20, min(_VECTORS, _BASIS // op.columns))
    return min(steps, full)


def extremes(op: Operator, dtype, steps: int | None = None) -> Extremes:
    """The ends of the spectrum. Where the rank is below the number of steps, all of it:
    what is left over then annihilates a random vector."""
    k = steps_for(op, steps)
    process = _lanczos if op.symmetric else _golub_kahan
    return process(op, jnp.dtype(dtype), k)


def _golub_kahan(op: Operator, dtype, k: int) -> Extremes:
    """A V = U B + β u eₖᵀ and AᵀU = V Bᵀ, B lower bidiagonal (Golub and Kahan, 1965).

    V lacks a vector (it is zero) where Aᵀu lies in the span of the others.
    """
    first = unit(random(0, op.rows, dtype))
    left = jnp.zeros((k + 1, op.rows), dtype).at[0].set(first)
    right = jnp.zeros((k, op.columns), dtype)

    def body(i, carry):
        left, right, alpha, beta, scale = carry
        u = left[i]
        v = orthogonal(right, op.transpose(u))
        size = jnp.linalg.norm(v)
        scale = jnp.maximum(scale, size)
        kept = size > 10 * op.columns * jnp.finfo(dtype).eps * scale
        v = jnp.where(kept, v / jnp.where(kept, size, 1), 0)
        size = jnp.where(kept, size, 0)
        right = right.at[i].set(v)
        key = jr.fold_in(jr.key(1), i)
        u, coefficient = next_unit(left, op.apply(v) - size * u, key, scale)
        left = left.at[i + 1].set(u)
        alpha, beta = alpha.at[i].set(size), beta.at[i].set(coefficient)
        return left, right, alpha, beta, scale

    none = jnp.zeros(k, dtype)
    start = (left, right, none, none, jnp.zeros((), dtype))
    left, right, alpha, beta, _ = jax.lax.fori_loop(0, k, body, start)
    b = jnp.diag(alpha) + jnp.diag(beta[:-1], -1)
    _, values, q = jnp.linalg.svd(b)
    # Of a random vector outside the span: its image has 1/√(m − k) of the norm.
    fresh = orthogonal(left, jr.normal(jr.key(2), (op.rows,), dtype))
    rest = jnp.linalg.norm(orthogonal(right, op.transpose(fresh)))
    rest = jnp.where(k < op.rows, rest, 0)
    return Extremes(values, jnp.abs(beta[-1] * q[:, -1]), rest)


def _lanczos(op: Operator, dtype, k: int) -> Extremes:
    process = Lanczos.begin(op.rows, dtype, k).onward(op.apply, k)
    basis, (values, bounds) = process.basis, process.ritz()
    fresh = orthogonal(basis, jr.normal(jr.key(2), (op.rows,), dtype))
    rest = jnp.linalg.norm(orthogonal(basis, op.apply(fresh)))
    rest = jnp.where(k < op.rows, rest, 0)
    return Extremes(values, bounds, rest)
