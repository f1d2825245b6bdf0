"""The critical manifold from J, where the loss is composite and interpolated."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ..flow.flat import FlatLoss
from ..losses import AbstractCompositeLoss, AbstractLoss
from ._matrix_free import Operator
from ._normal import (
    close,
    NormalSpace,
    numerical_rank,
    outer_root,
    ROUNDINGS,
    weighted_jacobian,
)
from .forms import AbstractForm

# Entries of A up to which it is made: 256 MB.
_DENSE = 2**25


class JacobianForm(AbstractForm):
    """M = {r = 0} from A = (ℓ'')^½ J: ∇²F = AᵀA there, and −A⁺ρ leads back to it."""

    name: ClassVar[str] = "jacobian"
    measured: ClassVar[str] = "singular values of J"
    interpolating: ClassVar[bool] = True

    def normal(
        self,
        loss: FlatLoss,
        theta: Float[Array, " d"],
        rank: Int[Array, ""] | None = None,
        damping: float = 0.0,
    ) -> NormalSpace:
        """From the QR decomposition of [Aᵀ; εI], smooth in θ even where the rank drops.

        With [Aᵀ; εI] = [N; ·] R, N Nᵀ = Aᵀ(AAᵀ + ε²)⁻¹A. The Gram matrix AAᵀ, whose
        condition number is squared, is never formed; so ε can be tiny.
        """
        a, rho = weighted_jacobian(loss, theta)
        m, d = a.shape
        scale = _size(a)
        eye = _ridge(a.dtype) * scale * jnp.eye(m, dtype=a.dtype)
        q, r = jnp.linalg.qr(jnp.concatenate([a.T, eye]))
        back = jax.scipy.linalg.solve_triangular(r, rho, trans=1)
        force = _force(loss, theta, a, rho)
        return NormalSpace(q[:d], -(q[:d] @ back), force)

    def exact_normal(
        self,
        loss: FlatLoss,
        theta: Float[Array, " d"],
        rank: Int[Array, ""] | None = None,
        *,
        rtol: float | None = None,
        time: float | Float[Array, ""] = 0.0,
    ) -> NormalSpace:
        """From singular values: the residuals out of reach of J leave no trace in
        `step`.

        Singular values below the gap may be those of directions that are yet to grow,
        such as 2u of u² at a tiny u: the force Aᵀρ along them, far below that along
        others, is no rounding if it is more than that of its terms, coordinate by
        coordinate. So is the force of samples on which ℓ'' is zero.
        """
        a, rho = weighted_jacobian(loss, theta)
        left, values, rows = jnp.linalg.svd(a, full_matrices=False)
        if rank is None:
            rank = numerical_rank(values, theta.size, rtol).rank
        kept = jnp.arange(values.size) < rank
        basis = jnp.where(kept, rows.T, 0)
        inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
        step = -(basis @ (inverse * (left.T @ rho)))
        gradient = loss.gradient(theta)
        hidden = jnp.abs(gradient - basis @ (basis.T @ gradient))
        terms = jnp.abs(a).T @ jnp.abs(rho) / close(a.dtype) + jnp.linalg.norm(gradient)
        leaving = jnp.any(hidden > ROUNDINGS * jnp.finfo(a.dtype).eps * terms)
        return NormalSpace(basis, step, _force(loss, theta, a, rho), leaving)

    def values(
        self, loss: FlatLoss, theta: Float[Array, " d"]
    ) -> tuple[Float[Array, " k"], Float[Array, ""]]:
        a, _ = weighted_jacobian(loss, theta)
        singular = jnp.linalg.svd(a, compute_uv=False)
        return singular, jnp.zeros((), theta.dtype)

    def curvatures(
        self, values: Float[Array | np.ndarray, " k"]
    ) -> Float[Array | np.ndarray, " k"]:
        return values**2

    def told_curvatures(
        self,
        loss: FlatLoss,
        theta: Float[Array, " d"],
        rank: Int[Array, ""],
        rtol: float,
    ) -> tuple[Float[Array, " k"], Float[Array, ""]]:
        """The least is where the ridge alters P by more than 1000 `rtol`."""
        # The Gram matrix costs a fraction of a singular value decomposition; it blurs
        # curvatures below eps of the largest, where the rank has long been lost.
        a, _ = weighted_jacobian(loss, theta)
        curvatures = jnp.maximum(jnp.linalg.eigvalsh(a @ a.T)[::-1], 0)
        return curvatures, _ridge(theta.dtype) ** 2 * jnp.sum(a * a) / (1000 * rtol)

    def decomposition(
        self, loss: FlatLoss, theta: Float[Array, " d"]
    ) -> tuple[Float[Array, " k"], Float[Array, "d k"]]:
        a, _ = weighted_jacobian(loss, theta)
        _, values, rows = jnp.linalg.svd(a, full_matrices=False)
        return values**2, rows.T

    def root(
        self, loss: FlatLoss, theta: Float[Array, " d"]
    ) -> tuple[Float[Array, " k"], Float[Array, "k d"]]:
        a, _ = weighted_jacobian(loss, theta)
        values, vectors = jnp.linalg.eigh(a @ a.T)
        return values, vectors.T @ a

    def solve_shifted(
        self,
        loss: FlatLoss,
        theta: Float[Array, " d"],
        alpha: Float[Array, ""],
        h: Float[Array, ""],
        right: Float[Array, " d"],
        guess: Float[Array, " d"],
    ) -> Float[Array, " d"]:
        """∇²F = AᵀA + S, where S, from the residuals, fades along a path to M:
        conjugate gradients, preconditioned by α + hAᵀA, take a few iterations first and
        one in the end."""
        a, _ = weighted_jacobian(loss, theta)
        kernel = a @ a.T + alpha / h * jnp.eye(a.shape[0], dtype=theta.dtype)
        factor = jax.scipy.linalg.cho_factor(kernel)

        def apply(v: Float[Array, " d"]) -> Float[Array, " d"]:
            return alpha * v + h * jax.jvp(loss.gradient, (theta,), (v,))[1]

        def precondition(v: Float[Array, " d"]) -> Float[Array, " d"]:
            return (v - a.T @ jax.scipy.linalg.cho_solve(factor, a @ v)) / alpha

        return jax.scipy.sparse.linalg.cg(
            apply,
            right,
            guess,
            tol=1e4 * float(jnp.finfo(theta.dtype).eps),
            maxiter=100,
            M=precondition,
        )[0]

    def operator(self, loss: FlatLoss, theta: Float[Array, " d"]) -> Operator:
        root, _ = outer_root(loss, theta)
        z, jvp = jax.linearize(loss.outputs, theta)
        vjp = jax.linear_transpose(jvp, theta)
        return Operator(
            apply=lambda v: root(jvp(v)),
            transpose=lambda u: vjp(root(u))[0],
            rows=z.size,
            columns=theta.size,
            symmetric=False,
        )

    def fits(self, loss: AbstractLoss, params: PyTree, static: PyTree) -> bool:
        d = sum(p.size for p in jax.tree.leaves(params))
        return count_outputs(loss, params, static) * d <= _DENSE


def _size(a: Float[Array, "m d"]) -> Float[Array, ""]:
    """The Frobenius norm, at least ‖A‖; one where A = 0."""
    size = jnp.linalg.norm(a)
    return jnp.where(size > 0, size, 1)


def _force(
    loss: FlatLoss,
    theta: Float[Array, " d"],
    a: Float[Array, "m d"],
    rho: Float[Array, " m"],
) -> Float[Array, ""]:
    """‖ρ‖/‖A‖, as a length; and, over ‖A‖², the force of what ρ leaves out: samples on
    which ℓ'' is zero and ∇ℓ is not."""
    size = _size(a)
    unseen = jnp.linalg.norm(loss.gradient(theta) - a.T @ rho)
    return jnp.linalg.norm(rho) / size + unseen / size**2


def count_outputs(loss: AbstractLoss, params: PyTree, static: PyTree) -> int:
    """m, samples × outputs, of a composite loss."""
    assert isinstance(loss, AbstractCompositeLoss)

    def outputs(loss: AbstractCompositeLoss, params: PyTree, static: PyTree) -> Array:
        return loss.outputs(eqx.combine(params, static))

    return eqx.filter_eval_shape(outputs, loss, params, static).size


def _ridge(dtype: np.dtype) -> float:
    """The ridge ε, relative to ‖A‖.

    A singular value σ is projected out with weight σ²/(σ² + ε²). Rounding leaves
    σ ~ eps where the rank is lacking; ε = eps^⅔ lies far above it and yet alters the
    projection by less than 1e-9 for every σ > 1e-6 (in float64).
    """
    return float(jnp.finfo(dtype).eps) ** (2 / 3)
