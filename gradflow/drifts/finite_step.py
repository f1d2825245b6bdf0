"""tr ∇²F for steps that are not small."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree, Scalar

from .._checks import check_positive
from .._host import as_array
from ..flow.flow import GradientFlow
from ..losses import AbstractLoss
from ..penalties import AbstractPenalty
from .curvature import Curvature, Form

_LARGEST = 3000  # rows of a matrix that is factorised


class LogTrace(AbstractPenalty):
    """R(θ) = −(2/h) tr log(I − ½h ∇²F(θ)) = tr ∇²F + ¼h tr (∇²F)² + …, for
    steps h < 2/λ₁, the largest with which descent is stable; NaN beyond.

    Of a composite loss ∇²F is Jᵀℓ''J unless asked otherwise, see
    [`gradflow.drifts.Trace`][]: the same on the manifold of perfect fits. By one
    factorisation of a matrix of m rows for the squared error of m outputs (without
    weights of samples), otherwise of d rows, of at most 3000.

    Source: Damian, Ma, Lee, arXiv 2106.06530.
    """

    curvature_of: Curvature
    learning_rate: float | Scalar
    by_outputs: bool = eqx.field(static=True)

    def __init__(
        self,
        loss: AbstractLoss | GradientFlow,
        model: PyTree,
        *,
        learning_rate: float | Scalar,
        form: Form = "auto",
        trainable: PyTree = eqx.is_inexact_array,
    ):
        """**Arguments:** as [`gradflow.drifts.Trace`][], and

        - `learning_rate`: h > 0.

        **Raises:** `ValueError` as that, and where the matrix has more than 3000 rows.
        """
        check_positive(learning_rate, "learning_rate")
        self.learning_rate = learning_rate
        self.curvature_of, params = Curvature.of(loss, model, form, trainable)
        at = self.curvature_of.at(params)
        rows = at.theta.size
        self.by_outputs = False
        if self.curvature_of.form == "jacobian":
            outputs = jax.eval_shape(at.loss.outputs, at.theta).size
            known = at.loss.outer_curvature is not None
            self.by_outputs = known and outputs <= rows
            rows = outputs if self.by_outputs else rows
        if rows > _LARGEST:
            raise ValueError(
                f"model: log(I − ½h∇²F) takes a matrix of {rows} rows here, up to "
                f"{_LARGEST} are factorised; gradflow.drifts.Trace takes any."
            )

    def __call__(self, params: PyTree) -> Scalar:
        at = self.curvature_of.at(params)
        h = as_array(self.learning_rate).astype(at.theta.dtype)
        weight = at.loss.outer_curvature
        if self.by_outputs and weight is not None:
            # det(I − XY) = det(I − YX)
            matrix = weight * at.loss.tangent_kernel(at.theta, at.scale**2)
        else:
            matrix = at.matrix()
        eye = jnp.eye(matrix.shape[0], dtype=matrix.dtype)
        root = jnp.linalg.cholesky(eye - 0.5 * h * matrix)
        return -4 / h * jnp.sum(jnp.log(jnp.diagonal(root)))

    def gradient(self, params: PyTree) -> PyTree:
        return jax.grad(self)(params)
