"""tr Diag(∇²F)^½, which Adam brings down under noise on the labels."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

from .._checks import check_positive
from .._host import as_array
from ..flow.flat import in_blocks, summed
from ..flow.flow import GradientFlow
from ..losses import AbstractLoss
from ..penalties import AbstractPenalty
from .curvature import check_products, Curvature, Form


class RootDiagonal(AbstractPenalty):
    """R(θ) = Σᵢ φ(∂ᵢ²F(θ)), φ(a) = √a − ε log(1 + √a/ε), φ'(a) = 1/(2(√a + ε)): for
    ε → 0 it is tr Diag(∇²F)^½.

    Of a composite loss it is the diagonal of Jᵀℓ''J unless asked otherwise, see
    [`gradflow.drifts.Trace`][]: the same on the manifold of perfect fits, and never
    negative. (In the other form what is negative counts as zero.) All of the diagonal
    is computed, as no estimate of it by random vectors has a root without bias: sample
    by sample, or by one product with each of up to 1000 basis vectors.

    Source: Li, Wen, Lyu, arXiv 2511.02773.
    """

    curvature_of: Curvature
    eps: float | Scalar

    def __init__(
        self,
        loss: AbstractLoss | GradientFlow,
        model: PyTree,
        *,
        eps: float | Scalar = 1e-6,
        form: Form = "auto",
        trainable: PyTree = eqx.is_inexact_array,
    ):
        """**Arguments:** as [`gradflow.drifts.Trace`][], and

        - `eps`: ε > 0, in units of √(∂²F). It rounds the root off where a ∂ᵢ²F comes to
            zero, as for 4u² it does where u changes its sign.

        **Raises:** `ValueError` as that, and unless ε is positive.
        """
        check_positive(eps, "eps")
        self.curvature_of, params = Curvature.of(loss, model, form, trainable)
        self.eps = eps
        check_products(self.curvature_of, params, "model", "give a smaller one")

    def diagonal(self, params: PyTree) -> Float[Array, " d"]:
        """∂ᵢ²F(θ) at the parameters `params`, as one vector."""
        at = self.curvature_of.at(params)
        if not self.curvature_of.sampled:
            basis = jnp.eye(at.theta.size, dtype=at.theta.dtype)
            return in_blocks(at.quadratic, basis, at.theta.size)
        rows, row, size = at.rows()

        def of_sample(one):
            jac, curved = row(one)
            return jnp.sum(jac * curved, axis=0)

        return summed(of_sample, rows, size)

    def __call__(self, params: PyTree) -> Scalar:
        a = self.diagonal(params)
        eps = as_array(self.eps).astype(a.dtype)
        return jnp.sum(_rounded_root(a, jnp.broadcast_to(eps, a.shape)))

    def gradient(self, params: PyTree) -> PyTree:
        return jax.grad(self)(params)


@jax.custom_jvp
def _rounded_root(a: Float[Array, " d"], eps: Float[Array, " d"]) -> Float[Array, " d"]:
    """φ(a)."""
    root = _root(a)
    return root - eps * jnp.log1p(root / eps)


@_rounded_root.defjvp
def _(primals, tangents):
    # That of the root is infinite at zero, where that of φ is not.
    (a, eps), (change, other) = primals, tangents
    root = _root(a)
    by_eps = root / (root + eps) - jnp.log1p(root / eps)
    slope = jnp.where(a >= 0, 0.5 / (root + eps), 0.0)
    return _rounded_root(a, eps), slope * change + by_eps * other


def _root(a: Float[Array, " d"]) -> Float[Array, " d"]:
    """√a, with no derivative where it is zero."""
    return jnp.where(a > 0, jnp.sqrt(jnp.where(a > 0, a, 1.0)), 0.0)
