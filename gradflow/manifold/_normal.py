"""The normal space of the critical manifold at a point, in two forms.

Everything in this folder comes down to an orthonormal basis N of the normal space and
the step that leads back to M, to first order. They are had from J where the loss is
composite and interpolated (*Jacobian form*), and from ∇²F otherwise (*Hessian form*).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..flow.flat import FlatLoss

# Between the last value kept and the first one dropped.
GAP = 1e3
# What a force is off by at the start, in roundings of its terms. Until the flow is
# close to M that may have grown as much as the distance has shrunk, by 1/`close`.
_ROUNDINGS = 32


class NormalSpace(eqx.Module):
    """The normal space of M at θ, and the way back to M."""

    basis: Float[Array, "d k"]  # orthonormal columns; zero ones where rank is lacking
    step: Float[Array, " d"]  # the displacement to M, to first order: −A⁺ρ or −H⁺∇F
    force: Float[Array, ""]  # ‖ρ‖/‖A‖ or ‖∇F‖/‖∇²F‖, seen by `step` or not; a length
    # Whether θ would move on along what `step` does not lead back from, by more than
    # rounding; false where it was not asked.
    leaving: Bool[Array, ""] | bool = False

    def tangential(self, v: Float[Array, " d"]) -> Float[Array, " d"]:
        """P v."""
        return v - self.basis @ (self.basis.T @ v)


def outer_root(
    loss: FlatLoss, theta: Float[Array, " d"]
) -> tuple[Callable[[Array], Array], Float[Array, " m"]]:
    """Multiplication by (ℓ'')^½, of a vector or of the columns of a matrix, and
    ρ = (ℓ'')^{−½}∇ℓ. ℓ'' may be singular, as it is for a softmax."""
    residuals = loss.residuals(theta)
    w = loss.composite.outer_curvature
    if w is not None:
        return lambda x: math.sqrt(w) * x, residuals / math.sqrt(w)
    curvature, basis = jnp.linalg.eigh(
        jax.hessian(loss.composite.outer)(loss.outputs(theta))
    )
    kept = curvature > curvature.size * jnp.finfo(theta.dtype).eps * curvature[-1]
    root = jnp.sqrt(jnp.where(kept, curvature, 0))
    rho = basis @ jnp.where(kept, (basis.T @ residuals) / jnp.where(kept, root, 1), 0)
    scale = lambda x: root.reshape(-1, *[1] * (x.ndim - 1)) * x
    return lambda x: basis @ scale(basis.T @ x), rho


def weighted_jacobian(
    loss: FlatLoss, theta: Float[Array, " d"]
) -> tuple[Float[Array, "m d"], Float[Array, " m"]]:
    """A = (ℓ'')^½ J and ρ = (ℓ'')^{−½}∇ℓ.

    AᵀA is the Gauss–Newton part of ∇²F, all of it where ∇ℓ = 0; Aᵀρ = ∇F; and −A⁺ρ is
    the least-norm Gauss–Newton step.
    """
    root, rho = outer_root(loss, theta)
    return root(loss.jacobian(theta)), rho


def ridge(dtype: np.dtype) -> float:
    """The ridge ε of the Jacobian form, relative to ‖A‖.

    A singular value σ is projected out with weight σ²/(σ² + ε²). Rounding leaves
    σ ~ eps where the rank is lacking; ε = eps^⅔ lies far above it and yet alters the
    projection by less than 1e-9 for every σ > 1e-6 (in float64).
    """
    return float(jnp.finfo(dtype).eps) ** (2 / 3)


def jacobian_normal(loss: FlatLoss, theta: Float[Array, " d"]) -> NormalSpace:
    """From the QR decomposition of [Aᵀ; εI], smooth in θ even where the rank drops.

    With [Aᵀ; εI] = [N; ·] R, N Nᵀ = Aᵀ(AAᵀ + ε²)⁻¹A. The Gram matrix AAᵀ, whose
    condition number is squared, is never formed; so ε can be tiny.
    """
    a, rho = weighted_jacobian(loss, theta)
    m, d = a.shape
    # The Frobenius norm, at least ‖A‖; the constant lets A = 0 through.
    scale = jnp.linalg.norm(a) + jnp.finfo(a.dtype).tiny
    eye = ridge(a.dtype) * scale * jnp.eye(m, dtype=a.dtype)
    q, r = jnp.linalg.qr(jnp.concatenate([a.T, eye]))
    back = jax.scipy.linalg.solve_triangular(r, rho, trans=1)
    return NormalSpace(q[:d], -(q[:d] @ back), jnp.linalg.norm(rho) / scale)


def exact_jacobian_normal(
    loss: FlatLoss,
    theta: Float[Array, " d"],
    rank: Int[Array, ""] | None = None,
    rtol: float | None = None,
) -> NormalSpace:
    """From singular values, the `rank` largest (the numerical rank unless given): P is
    a projection exactly, and the residuals out of reach of J leave no trace in `step`;
    but neither is smooth in θ.

    Singular values below the gap may be those of directions that are yet to grow, such
    as 2u of u² at a tiny u: the force Aᵀρ along them, far below that along others, is
    no rounding if it is more than that of its terms, coordinate by coordinate.
    """
    a, rho = weighted_jacobian(loss, theta)
    left, values, rows = jnp.linalg.svd(a, full_matrices=False)
    if rank is None:
        rank = numerical_rank(values, theta.size, rtol).rank
    kept = jnp.arange(values.size) < rank
    basis = jnp.where(kept, rows.T, 0)
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    scale = jnp.linalg.norm(values) + jnp.finfo(a.dtype).tiny
    step = -(basis @ (inverse * (left.T @ rho)))
    gradient = a.T @ rho
    hidden = jnp.abs(gradient - basis @ (basis.T @ gradient))
    terms = jnp.abs(a).T @ jnp.abs(rho) / close(a.dtype) + jnp.linalg.norm(gradient)
    leaving = jnp.any(hidden > _ROUNDINGS * jnp.finfo(a.dtype).eps * terms)
    return NormalSpace(basis, step, jnp.linalg.norm(rho) / scale, leaving)


def hessian_normal(
    loss: FlatLoss,
    theta: Float[Array, " d"],
    rank: Int[Array, ""] | None = None,
    rtol: float | None = None,
    damping: float = 0.0,
    time: float | Float[Array, ""] = 0.0,
) -> NormalSpace:
    """From the eigenvectors of ∇²F whose |eigenvalue| is among the `rank` largest (the
    numerical rank unless given).

    At a distance δ from M the kernel of ∇²F is gone: its eigenvalues are O(δ), as is
    μ = `damping` ‖∇F‖/‖θ‖. With the weights κ²/(κ² + μ²) a Newton step leaves these
    directions alone, and its convergence is quadratic all the same.

    Where the curvature κ is negative the flow leaves, unless it is at rest to rounding:
    that of θ, moved along the eigenvector, and what e^{|κ|t} has made of it in the
    `time` t since the start.
    """
    eigenvalues, vectors = jnp.linalg.eigh(jax.hessian(loss)(theta))
    order = jnp.argsort(-jnp.abs(eigenvalues))
    eigenvalues, vectors = eigenvalues[order], vectors[:, order]
    if rank is None:
        rank = numerical_rank(jnp.abs(eigenvalues), theta.size, rtol).rank
    kept = jnp.arange(theta.size) < rank
    gradient = loss.gradient(theta)
    tiny = jnp.finfo(theta.dtype).tiny
    mu = damping * jnp.linalg.norm(gradient) / (jnp.linalg.norm(theta) + tiny)
    weight = jnp.where(kept, 1 / (1 + (mu / jnp.where(kept, eigenvalues, 1)) ** 2), 0)
    inverse = weight / jnp.where(kept, eigenvalues, 1)
    along = vectors.T @ gradient
    force = jnp.linalg.norm(gradient)
    grown = jnp.exp(
        jnp.minimum(jnp.abs(eigenvalues) * time, -math.log(close(theta.dtype)))
    )
    terms = jnp.abs(eigenvalues[0]) * (jnp.abs(vectors).T @ jnp.abs(theta)) * grown
    noise = _ROUNDINGS * jnp.finfo(theta.dtype).eps * (terms + force)
    moving = jnp.abs(along) > noise
    return NormalSpace(
        vectors * jnp.sqrt(weight)[None, :],
        -(vectors @ (inverse * along)),
        force / (jnp.linalg.norm(eigenvalues) + tiny),
        jnp.any(kept & (eigenvalues < 0) & moving),
    )


def normal_space(
    loss: FlatLoss,
    theta: Float[Array, " d"],
    form: str,
    rank: Int[Array, ""] | None = None,
    damping: float = 0.0,
) -> NormalSpace:
    """The normal space in the form asked for, smooth in θ where the rank is given;
    `rank` and `damping` matter to the Hessian form."""
    if form == "jacobian":
        return jacobian_normal(loss, theta)
    return hessian_normal(loss, theta, rank, damping=damping)


class Ranked(NamedTuple):
    """The rank that a list of values shows."""

    rank: Int[Array, ""]
    gap: Float[Array, ""]
    """The last value kept over the first one dropped."""
    ambiguous: Bool[Array, ""]
    """Whether the gap is below 1000, or less than 10 times larger than the next one."""


def numerical_rank(
    values: Float[Array, " k"], size: int, rtol: float | None = None
) -> Ranked:
    """The rank that the largest gap in `values` (descending, none negative) shows.

    Values below eps·√size·max are rounding and count as equal to that floor; so does
    what would follow the last value, and nothing needs to be dropped. With `rtol`, the
    values above rtol·max are counted, whatever the gap.
    """
    top = values[0]
    floor = jnp.finfo(values.dtype).eps * math.sqrt(size) * top
    tiny = jnp.finfo(values.dtype).tiny
    lower = jnp.maximum(jnp.append(values[1:], 0), floor)
    gaps = jnp.maximum(values, floor) / jnp.maximum(lower, tiny)
    if rtol is None:
        rank = jnp.argmax(gaps) + 1
        gap = jnp.max(gaps)
        others = jnp.where(jnp.arange(gaps.size) == rank - 1, 0, gaps)
        ambiguous = (gap < GAP) | (gap < 10 * jnp.max(others))
    else:
        rank = jnp.sum(values > rtol * top)
        gap = gaps[rank - 1]
        ambiguous = gap < GAP
    nothing = top == 0
    return Ranked(
        jnp.where(nothing, 0, rank),
        jnp.where(nothing, jnp.inf, gap),
        ambiguous & ~nothing,
    )


def close(dtype: np.dtype) -> float:
    """The relative distance to M within which its linearisation is exact to rounding:
    the square of eps^0.4 is 3e-13 in float64."""
    return float(jnp.finfo(dtype).eps) ** 0.4
