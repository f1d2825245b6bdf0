"""The matrix of a KKT step: made, kept, drifted, factorised."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve, lu_factor, lu_solve
from jaxtyping import Array, Bool, Float, Int, Scalar

from ..flow.flat import AbstractFlatLoss


class Factor(eqx.Module):
    """The matrix of the chord iteration: factorised, or inverted where it is small."""

    matrix: Float[Array, "m m"]  # L; or L and U packed; or the inverse
    pivots: Int[Array, " m"]
    shift: Float[Array, ""]
    smallest: Float[Array, ""]  # pivot: about the smallest eigenvalue


# Up to this size the inverse is cheaper than to solve by a factor in each iteration.
_INVERTED = 128
_DRIFT = 0.1  # contraction that a factor made for another shift may cost
DENSE_LIMIT = 5000  # parameters up to which the Hessian of an opaque loss is factorised


KEPT, RENEWED, WHOLE = range(3)  # the kernel; the last with all curvature
# Up to how many parameters (and outputs: `_INVERTED`) the whole is cheap.
_FEW = 100


def is_small(
    loss: AbstractFlatLoss, theta: Float[Array, " d"], multiplier: Float[Array, " m"]
) -> bool:
    """Whether the Hessian Σ μᵢ∇²zᵢ is cheap. (Of an opaque loss it is zero.)"""
    opaque = loss.opaque
    few = theta.size <= _FEW and multiplier.size <= _INVERTED
    return few and not opaque


def stage_inverse(
    loss: AbstractFlatLoss,
    theta: Float[Array, " d"],
    multiplier: Float[Array, " m"],
    alpha: Float[Array, "d d"],
    c: Scalar,
) -> Float[Array, "d d"]:
    """(α + c Σ μᵢ∇²zᵢ)⁻¹, with α = 1 + cλ∇²R: what a change of θ does to a stage, μ
    being fixed."""

    def weighted(th):
        return jnp.vdot(multiplier, loss.outputs(th))

    curvature = jax.jacrev(jax.grad(weighted))(theta)
    return jnp.linalg.inv(alpha + c * curvature)


def curved_kernel(
    loss: AbstractFlatLoss,
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

        def hvp(u):
            return loss.outer_hvp(z, u)

        kernel = jax.lax.map(hvp, kernel.T, batch_size=256).T
    return kernel


def _factorise(
    loss: AbstractFlatLoss, shift: Scalar, kernel: Float[Array, "m m"], definite: bool
) -> Factor:
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
        solve = functools.partial(cho_solve, (matrix, True))
    else:
        matrix, pivots = lu_factor(ridge / w * eye + kernel)
        smallest = w * jnp.min(jnp.abs(jnp.diag(matrix)))
        solve = functools.partial(lu_solve, (matrix, pivots))
    if len(eye) <= _INVERTED:
        matrix = solve(eye)
    return Factor(matrix, pivots, jnp.asarray(shift, kernel.dtype), smallest)


def _drifted(factor: Factor, shift: Scalar) -> Bool[Array, ""]:
    """Whether a factor made for another shift would slow the iteration: its contraction
    is at most |change of the shift|/(smallest eigenvalue). On the critical manifold the
    shift is far below all eigenvalues, and one factor serves many step sizes."""
    return ~(jnp.abs(shift - factor.shift) <= _DRIFT * factor.smallest)


class StageMatrix(eqx.Module):
    """The matrix of the chord iteration of all stages of a step: shift I + ℓ''K with
    K = J α⁻¹Jᵀ, or, where the `whole` curvature is in it, K = J(α + c Σ μᵢ∇²zᵢ)⁻¹Jᵀ."""

    loss: AbstractFlatLoss
    kernel: Float[Array, "m m"]
    inverse: Float[Array, "d d"] | None
    """(α + c Σ μᵢ∇²zᵢ)⁻¹, where it is affordable."""
    alpha: Scalar | Float[Array, " d"]
    shift: Scalar
    factor: Factor
    fresh: Bool[Array, ""]
    """Whether the kernel was made for this step."""
    whole: Bool[Array, ""]

    @classmethod
    def of(
        cls,
        loss: AbstractFlatLoss,
        kernel: Float[Array, "m m"],
        inverse: Float[Array, "d d"] | None,
        alpha: Scalar | Float[Array, " d"],
        c: Scalar,
        effort: Int[Array, ""],
        factor: Factor,
    ) -> "StageMatrix":
        """With the `factor` there is, where it serves, or a new one."""
        fresh, whole = effort >= RENEWED, effort == WHOLE
        shift = (alpha if jnp.ndim(alpha) == 0 else 1) / c
        definite = loss.outer_curvature is not None
        if inverse is not None:
            shift = jnp.where(whole, 1 / c, shift)

        def make():
            if inverse is None:
                return _factorise(loss, shift, kernel, definite)
            return jax.lax.cond(
                whole,
                lambda: _factorise(loss, shift, kernel, False),
                lambda: _factorise(loss, shift, kernel, definite),
            )

        factor = jax.lax.cond(fresh | _drifted(factor, shift), make, lambda: factor)
        return cls(loss, kernel, inverse, alpha, shift, factor, fresh, whole)

    def damp(self, v: Float[Array, " d"]) -> Float[Array, " d"]:
        """(α + c Σ μᵢ∇²zᵢ)⁻¹v, or α⁻¹v: what a change of the stage equation moves θ,
        μ being fixed."""
        if self.inverse is None:
            return v / self.alpha
        inverse = self.inverse
        return jax.lax.cond(self.whole, lambda: inverse @ v, lambda: v / self.alpha)

    def solve(
        self,
        p: Float[Array, " m"],
        q: Float[Array, " m"],
        z: Float[Array, " m"],
    ) -> Float[Array, " m"]:
        """The u with (shift I + ℓ''K) u = shift (ℓ''p + q), ℓ'' at the outputs z."""
        w, factor = self.loss.outer_curvature, self.factor
        right = p + q / w if w is not None else self.loss.outer_hvp(z, p) + q
        if len(factor.matrix) <= _INVERTED:
            return self.shift * (factor.matrix @ right)
        if w is not None:
            return self.shift * cho_solve((factor.matrix, True), right)
        return self.shift * lu_solve((factor.matrix, factor.pivots), right)
