"""Penalties on the singular values of the weight matrices."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Scalar

from ._spectral import kept_svd, spectral
from .base import AbstractKinked
from .leafwise import (
    AbstractLeafwise,
    AbstractLeafwiseLipschitz,
    soft_threshold,
    Where,
)


class Nuclear(AbstractLeafwiseLipschitz, AbstractKinked):
    """R(θ) = Σ_W ‖W‖⁎, the sum of the singular values of weight matrices.

    It sets singular values to zero: it asks for low rank. With W = UΣVᵀ over the
    singular values above rounding, the subgradient of least norm is UVᵀ; those below
    max(m, n) ε σ₁ count as zero. The proximal map soft-thresholds the singular values
    (Cai, Candès and Shen, 2010).

    **Arguments:**

    - `where`: the matrices; unless given, all leaves of two axes.
    """

    where: Where = eqx.field(static=True, default=None, kw_only=True)

    @property
    def kinked(self) -> bool:
        return True

    def takes(self, x: Array) -> bool:
        return x.ndim == 2

    def leaf_value(self, x: Array) -> Scalar:
        return jnp.sum(jnp.linalg.svd(x, compute_uv=False))

    def leaf_least_norm(
        self, x: Array, force: Array, strength: float | Scalar
    ) -> Array:
        u, _, vt, kept = kept_svd(x)
        u, vt = jnp.where(kept[None, :], u, 0), jnp.where(kept[:, None], vt, 0)
        # ∂‖W‖⁎ = UVᵀ + {Z : UᵀZ = 0, ZV = 0, ‖Z‖ ≤ 1}; Z takes up what it can of v.
        free = force - u @ (u.T @ force)
        free = free - (free @ vt.T) @ vt
        unit = spectral(_ones, _zeros, x, jnp.zeros((), x.dtype))
        return force - free + strength * unit + self.leaf_prox(free, strength)

    def leaf_prox(self, x: Array, step: float | Scalar) -> Array:
        return spectral(soft_threshold, _step, x, jnp.asarray(step, x.dtype))

    def leaf_lipschitz(self, x: Array) -> float:
        return min(x.shape) ** 0.5


class Schatten(AbstractLeafwise):
    """R(θ) = (1/p) Σ_W Σᵢ σᵢ(W)ᵖ, the p-th power of the Schatten norm divided by p.

    With p = 1 it would be `Nuclear`; Schatten(2) is `L2` on matrices. It is smooth
    once, ∇R = U Σᵖ⁻¹ Vᵀ, and twice for p ≥ 2. The proximal map applies that of uᵖ/p to
    each singular value: the root of u + h uᵖ⁻¹ = σ, by Newton's method, monotone from
    the point where it is begun.

    **Arguments:**

    - `p`: the exponent, above 1.
    - `where`: the matrices; unless given, all leaves of two axes.

    **Raises:** `ValueError` for any other p.
    """

    p: float = eqx.field(static=True)
    where: Where = eqx.field(static=True, default=None, kw_only=True)

    def __check_init__(self):
        if not 1 < self.p < float("inf"):
            raise ValueError(
                f"p: expected a number above 1, got {self.p}; for 1 there is Nuclear."
            )

    def takes(self, x: Array) -> bool:
        return x.ndim == 2

    def leaf_value(self, x: Array) -> Scalar:
        return jnp.sum(jnp.linalg.svd(x, compute_uv=False) ** self.p) / self.p

    def leaf_least_norm(
        self, x: Array, force: Array, strength: float | Scalar
    ) -> Array:
        slope = spectral(_power, _power_slope, x, jnp.asarray(self.p - 1, x.dtype))
        return force + strength * slope

    def leaf_prox(self, x: Array, step: float | Scalar) -> Array:
        u, sigma, vt, _ = kept_svd(x)
        return (u * _power_prox(sigma, step, self.p - 1)[None, :]) @ vt


def _ones(sigma, _):
    return jnp.where(sigma > 0, jnp.ones_like(sigma), 0)


def _zeros(sigma, _):
    return jnp.zeros_like(sigma)


def _step(sigma, threshold):
    return jnp.where(sigma > threshold, jnp.ones_like(sigma), 0)


def _power(sigma, q):
    safe = jnp.where(sigma > 0, sigma, 1)
    return jnp.where(sigma > 0, safe**q, 0)


def _power_slope(sigma, q):
    # At zero: 1 for q = 1, 0 above; below it is infinite, and what is null stays so.
    safe = jnp.where(sigma > 0, sigma, 1)
    at_zero = jnp.where(q == 1, jnp.ones_like(sigma), 0)
    return jnp.where(sigma > 0, q * safe ** (q - 1), at_zero)


def _power_prox(sigma, step, q: float):
    """u ≥ 0 with u + h u^q = σ, entry by entry, for q > 0."""
    # In x = u where q ≥ 1, in x = u^q where it is below: both sides are convex.
    exponent, outer, inner = (q, 1.0, step) if q >= 1 else (1 / q, step, 1.0)
    # outer x + inner x^e = σ: the root is below the roots of each term alone.
    x = jnp.minimum(sigma / outer, (sigma / inner) ** (1 / exponent))
    for _ in range(_NEWTON_STEPS):
        excess = outer * x + inner * x**exponent - sigma
        x = x - excess / (outer + inner * exponent * x ** (exponent - 1))
        x = jnp.maximum(x, 0)
    return x if q >= 1 else x ** (1 / q)


_NEWTON_STEPS = 20
