"""What both forms of the critical manifold are made of: A and ρ, ranks, the normal
space."""

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
ROUNDINGS = 32


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
