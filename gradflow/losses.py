"""Training losses F(model): composite ones, F = ℓ(z(θ)), and any other scalar."""

import abc
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, Scalar

from ._checks import check_finite, check_loss_data, is_concrete


def predict_each(model: Callable, x: PyTree) -> Array:
    """Applies `model` to every sample: `jax.vmap(model)(x)`."""
    return jax.vmap(model)(x)


class AbstractLoss(eqx.Module):
    """A training loss: a function of the model that returns a scalar."""

    @abc.abstractmethod
    def __call__(self, model: PyTree) -> Scalar:
        """The loss F(model)."""


class AbstractCompositeLoss(AbstractLoss):
    """A loss F(θ) = ℓ(z(θ)): outputs z: ℝᵈ → ℝᵐ of the model, ℓ convex.

    This is the structure that the KKT solvers and the theory of the critical manifold
    are made for: where ∇ℓ(z) = 0 the kernel of J = ∂z/∂θ is the tangent space.
    """

    @abc.abstractmethod
    def outputs(self, model: PyTree) -> Float[Array, " m"]:
        """All outputs z(θ) on the training data, as one vector of m numbers."""

    @abc.abstractmethod
    def outer(self, z: Float[Array, " m"]) -> Scalar:
        """The convex outer loss ℓ(z)."""

    @property
    @abc.abstractmethod
    def outer_curvature(self) -> float | None:
        """w where ℓ'' = w I everywhere (squared error), `None` otherwise."""

    def __call__(self, model: PyTree) -> Scalar:
        """The loss F(model) = ℓ(z(θ))."""
        return self.outer(self.outputs(model))

    def residuals(self, model: PyTree) -> Float[Array, " m"]:
        """∇ℓ(z(θ)), the residuals: zero where the model interpolates the data.

        For the mean squared error they are (z − y)/n, for the cross-entropy
        (softmax(z) − onehot)/n.
        """
        return jax.grad(self.outer)(self.outputs(model))

    def jvp(self, model: PyTree, tangent: PyTree) -> Float[Array, " m"]:
        """J v: the change of the outputs along `tangent`, a pytree shaped as the
        model's inexact-array leaves (`None` on a leaf that is held fixed)."""
        params, static = eqx.partition(
            model, jax.tree.map(lambda v: v is not None, tangent, is_leaf=_is_none)
        )
        return jax.jvp(
            lambda p: self.outputs(eqx.combine(p, static)), (params,), (tangent,)
        )[1]

    def vjp(self, model: PyTree, cotangent: Float[Array, " m"]) -> PyTree:
        """Jᵀ u: a pytree shaped as the model's inexact-array leaves."""
        params, static = eqx.partition(model, eqx.is_inexact_array)
        _, pullback = jax.vjp(lambda p: self.outputs(eqx.combine(p, static)), params)
        return pullback(cotangent)[0]


def _is_none(x: Any) -> bool:
    return x is None


class SquaredError(AbstractCompositeLoss):
    """F(model) = ½ meanᵢ ‖f(xᵢ) − yᵢ‖², the mean over samples; or the sum.

    With `reduction="mean"`, ℓ(z) = ‖z − y‖²/(2n); with `"sum"`, ℓ(z) = ½‖z − y‖².
    """

    x: PyTree
    y: Float[Array, "n ..."]
    reduction: Literal["mean", "sum"] = eqx.field(static=True)
    predict: Callable[[Any, PyTree], Array] = eqx.field(static=True)

    def __init__(
        self,
        x: PyTree,
        y: Float[Array, "n ..."],
        *,
        reduction: Literal["mean", "sum"] = "mean",
        predict: Callable[[Any, PyTree], Array] = predict_each,
    ):
        """**Arguments:**

        - `x`: inputs, an array or a pytree of arrays with a leading axis of n samples.
        - `y`: targets, of the same shape as the predictions.
        - `reduction`: `"mean"` or `"sum"` over the n samples (outputs of one sample are
            always summed).
        - `predict`: `predict(model, x)`, the predictions for all samples. The default
            is `jax.vmap(model)(x)`; with one that ignores it, `x` may be `None`.

        **Raises:** `ValueError` where `x` and `y` differ in length, are empty, or hold
        a NaN or an infinity.
        """
        self.x = jax.tree.map(jnp.asarray, x)
        self.y = jnp.asarray(y)
        self.reduction = reduction
        self.predict = predict
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}.")
        check_loss_data(self.x, self.y, "y")
        check_finite(self.y, "y")

    def outputs(self, model: PyTree) -> Float[Array, " m"]:
        z = self.predict(model, self.x)
        if z.shape != self.y.shape:
            raise ValueError(
                f"y: the model's predictions have shape {z.shape}, the targets "
                f"{self.y.shape}; give targets of the predictions' shape."
            )
        return z.reshape(-1)

    @property
    def outer_curvature(self) -> float:
        return 1.0 if self.reduction == "sum" else 1.0 / self.y.shape[0]

    def outer(self, z: Float[Array, " m"]) -> Scalar:
        r = z - self.y.reshape(-1)
        return 0.5 * self.outer_curvature * jnp.sum(r * r)


class CrossEntropy(AbstractCompositeLoss):
    """F(model) = −meanᵢ log softmax(f(xᵢ))[labelᵢ], f(xᵢ) a vector of k logits.

    On separable data this loss has no minimiser: without weight decay ‖θ‖ grows like
    log t.
    """

    x: PyTree
    labels: Int[Array, " n"]
    predict: Callable[[Any, PyTree], Array] = eqx.field(static=True)

    def __init__(
        self,
        x: PyTree,
        labels: Int[Array, " n"],
        *,
        predict: Callable[[Any, PyTree], Array] = predict_each,
    ):
        """**Arguments:**

        - `x`: inputs, an array or a pytree of arrays with a leading axis of n samples.
        - `labels`: integers from 0 to k − 1.
        - `predict`: `predict(model, x)`, the logits for all samples, shape (n, k). The
            default is `jax.vmap(model)(x)`.

        **Raises:** `ValueError` where `labels` are not integers, are negative, or do
        not match `x` in length.
        """
        self.x = jax.tree.map(jnp.asarray, x)
        self.labels = jnp.asarray(labels)
        self.predict = predict
        check_loss_data(self.x, self.labels, "labels")
        if not jnp.issubdtype(self.labels.dtype, jnp.integer):
            raise ValueError(
                f"labels: expected integers from 0 to k - 1, got {self.labels.dtype}."
            )
        if is_concrete(self.labels) and np.min(self.labels) < 0:
            raise ValueError("labels: expected integers from 0 to k - 1, got some < 0.")

    def outputs(self, model: PyTree) -> Float[Array, " m"]:
        z = self.predict(model, self.x)
        if z.ndim != 2 or z.shape[0] != self.labels.shape[0]:
            raise ValueError(
                f"labels: the model's logits have shape {z.shape}, expected "
                f"({self.labels.shape[0]}, classes)."
            )
        # Of a NumPy array: in a traced function jnp would trace the comparison too.
        known = is_concrete(self.labels)
        largest = np.asarray(self.labels).max() if known else 0
        if largest >= z.shape[1]:
            raise ValueError(
                f"labels: the largest is {largest}, but the model gives {z.shape[1]} "
                "logits."
            )
        return z.reshape(-1)

    @property
    def outer_curvature(self) -> None:
        return None

    def outer(self, z: Float[Array, " m"]) -> Scalar:
        log_p = jax.nn.log_softmax(z.reshape(self.labels.shape[0], -1))
        return -jnp.mean(jnp.take_along_axis(log_p, self.labels[:, None], axis=1))


class Loss(AbstractLoss):
    """Any scalar function of the model: F(model) = fn(model).

    Nothing is known of its structure, so the KKT solvers and the Jacobian form of the
    tangent projection do not apply; give a composite loss where there is one.
    """

    fn: Callable[[Any], Scalar]

    def __call__(self, model: PyTree) -> Scalar:
        return self.fn(model)
