"""Functions of the singular values of a matrix, and their derivatives."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Scalar

Shape = Callable[[Float[Array, " k"], Scalar], Float[Array, " k"]]


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def spectral(
    phi: Shape, slope: Shape, w: Float[Array, "m n"], parameter: Scalar
) -> Float[Array, "m n"]:
    """U φ(Σ) Vᵀ, for W = UΣVᵀ and an odd function φ.

    Its derivative in the direction H is, with A = UᵀHV split into a symmetric and an
    antisymmetric part,

        U (Γ⁻ ∘ sym A + Γ⁺ ∘ skew A) Vᵀ + U D UᵀH(I − VVᵀ) + (I − UUᵀ)HV D Vᵀ,

    Γ∓ᵢⱼ = (φᵢ ∓ φⱼ)/(σᵢ ∓ σⱼ) and D = diag(φᵢ/σᵢ), which has no pole where singular
    values meet or vanish (Daleckii and Krein; Lewis and Sendov, 2005). One through the
    derivatives of U and V has both. Singular values that the precision can't tell from
    zero count as zero, with φ(0) = 0; H may turn the subspace of the others, but not
    fill theirs unless φ'(0) does.

    **Arguments:**

    - `phi`, `slope`: φ and φ', functions of the vector of singular values and of
        `parameter`; the same objects at each call, as JAX compares them.
    - `w`: W.
    - `parameter`: a number that φ depends on.

    **Returns:** a matrix like W.
    """
    del slope
    u, sigma, vt, _ = kept_svd(w)
    return (u * _row(phi(sigma, parameter))) @ vt


@spectral.defjvp
def _(phi, slope, primals, tangents):
    (w, parameter), (h, change) = primals, tangents
    u, sigma, vt, kept = kept_svd(w)
    values, slopes = phi(sigma, parameter), slope(sigma, parameter)
    a, b = _column(sigma), _row(sigma)
    fa, fb = _column(values), _row(values)
    # Where two are close, their mean slope is more exact than a quotient.
    gap, close = a - b, jnp.abs(a - b) < jnp.cbrt(jnp.finfo(w.dtype).eps) * (a + b)
    close = close | (a + b == 0)
    mean = 0.5 * (_column(slopes) + _row(slopes))
    minus = jnp.where(close, mean, (fa - fb) / jnp.where(close, 1, gap))
    zero = a + b == 0
    plus = jnp.where(zero, mean, (fa + fb) / jnp.where(zero, 1, a + b))
    ratio = jnp.where(kept, values / jnp.where(kept, sigma, 1), slopes)
    hv = h @ vt.T
    inner = u.T @ hv
    core = minus * (inner + inner.T) / 2 + plus * (inner - inner.T) / 2
    uh = u.T @ h
    turned = (u @ core) @ vt
    turned = turned + (u * _row(ratio)) @ (uh - inner @ vt)
    turned = turned + ((hv - u @ inner) * _row(ratio)) @ vt
    by_parameter = jax.jvp(lambda p: phi(sigma, p), (parameter,), (change,))[1]
    turned = turned + (u * _row(by_parameter)) @ vt
    return (u * _row(values)) @ vt, turned


def kept_svd(w: Float[Array, "m n"]) -> tuple[Array, Array, Array, Array]:
    """U, σ, Vᵀ of the thin decomposition, and which σ are above rounding: those below
    max(m, n) ε σ₁ are set to zero."""
    u, sigma, vt = jnp.linalg.svd(w, full_matrices=False)
    kept = sigma > rounding(w) * sigma[:1]
    return u, jnp.where(kept, sigma, 0), vt, kept


def rounding(w: Float[Array, "m n"]) -> float:
    """max(m, n) ε: what singular values are not known better than, relative to σ₁."""
    return max(w.shape) * float(np.finfo(w.dtype).eps)


def _row(v: Float[Array, " k"]) -> Float[Array, "1 k"]:
    return v[None, :]


def _column(v: Float[Array, " k"]) -> Float[Array, "k 1"]:
    return v[:, None]
