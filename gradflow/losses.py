"""Training losses F(model): composite ones, F = ℓ(z(θ)), and any other scalar."""

import abc
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from ._checks import (
    as_data,
    as_level,
    check_callable,
    check_choice,
    check_finite,
    check_labels,
    check_logits,
    check_loss_data,
    is_concrete,
    word,
)


def predict_each(model: Callable, x: PyTree) -> Array:
    """Applies `model` to every sample: `jax.vmap(model)(x)`."""
    return jax.vmap(model)(x)


def predicted(
    predict: Callable[[Any, PyTree], Array], model: PyTree, x: PyTree
) -> Array:
    """`predict(model, x)`.

    **Raises:** `ValueError` where the model cannot take x.
    """
    try:
        return predict(model, x)
    except jax.errors.ConcretizationTypeError:
        raise  # of a model that cannot be traced, whatever x is
    except (TypeError, ValueError) as error:
        shapes = ", ".join(f"{a.dtype}{list(a.shape)}" for a in jax.tree.leaves(x))
        cause = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"x: {type(model).__name__} cannot take {shapes or x}: {cause}"
        ) from error


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


def _is_none(x: object) -> bool:
    return x is None


class AbstractSampled(AbstractCompositeLoss):
    """A composite loss over samples, each of which has outputs of its own."""

    @property
    @abc.abstractmethod
    def samples(self) -> PyTree | None:
        """Inputs x with `outputs(model) = jax.vmap(model)(x)` flattened, where each
        output depends on one sample; `None` where that is not known. It makes the
        Jacobian as cheap as one gradient."""


class AbstractByResiduals(AbstractCompositeLoss):
    """A composite loss that can be told by its residuals."""

    @abc.abstractmethod
    def outer_from(
        self, residuals: Float[Array, " m"], z: Float[Array, " m"]
    ) -> Scalar:
        """ℓ(z) where `residuals` = ∇ℓ(z) are known better than z itself, as they are on
        the critical manifold: z − y is a small difference of large numbers there, and
        the residuals are what the KKT solvers solve for."""


def samples(loss: AbstractCompositeLoss) -> PyTree | None:
    """Those of `AbstractSampled`; `None` for any other loss."""
    return loss.samples if isinstance(loss, AbstractSampled) else None


def outer_from(
    loss: AbstractCompositeLoss, residuals: Float[Array, " m"], z: Float[Array, " m"]
) -> Scalar:
    """ℓ(z), by the residuals where the loss is `AbstractByResiduals`."""
    if isinstance(loss, AbstractByResiduals):
        return loss.outer_from(residuals, z)
    return loss.outer(z)


class AbstractTargetLoss(AbstractSampled, AbstractByResiduals):
    """What losses against targets of the predictions' shape have in common:
    ℓ(z) = c Σᵢ ρ(zᵢ, yᵢ), with c = 1/n, or 1 for the sum."""

    x: eqx.AbstractVar[PyTree]
    y: eqx.AbstractVar[Float[Array, "n ..."]]
    reduction: eqx.AbstractVar[Literal["mean", "sum"]]
    predict: eqx.AbstractVar[Callable[[Any, PyTree], Array]]

    def outputs(self, model: PyTree) -> Float[Array, " m"]:
        z = predicted(self.predict, model, self.x)
        if z.shape != self.y.shape:
            raise ValueError(
                f"y: the model's predictions have shape {z.shape}, the targets "
                f"{self.y.shape}; give targets of the predictions' shape."
            )
        return z.reshape(-1)

    @property
    def samples(self) -> PyTree | None:
        return self.x if self.predict is predict_each else None

    @property
    def scale(self) -> float:
        """c."""
        return 1.0 if self.reduction == "sum" else 1.0 / self.y.shape[0]


def _checked_targets(
    x: PyTree, y: Array, reduction: str, predict: Callable[[Any, PyTree], Array]
) -> tuple[PyTree, Array]:
    """`x` and `y` as arrays.

    **Raises:** `ValueError` as `SquaredError`.
    """
    x, y = as_data(x, "x"), as_data(y, "y")
    check_choice(reduction, "reduction", ("mean", "sum"))
    check_callable(predict, "predict", "the model and x")
    check_loss_data(x, y, "y")
    check_finite(y, "y")
    return x, y


class SquaredError(AbstractTargetLoss):
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
        y: Array,
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
        self.x, self.y = _checked_targets(x, y, reduction, predict)
        self.reduction, self.predict = reduction, predict

    @property
    def outer_curvature(self) -> float:
        return self.scale

    def outer(self, z: Float[Array, " m"]) -> Scalar:
        r = z - self.y.reshape(-1)
        return 0.5 * self.scale * jnp.sum(r * r)

    def outer_from(
        self, residuals: Float[Array, " m"], z: Float[Array, " m"]
    ) -> Scalar:
        return 0.5 / self.scale * jnp.sum(residuals * residuals)


class Huber(AbstractTargetLoss):
    """F(model) = meanᵢ ρ(f(xᵢ) − yᵢ), or the sum: ρ(r) = ½r² for |r| ≤ δ, and
    δ(|r| − ½δ) beyond, summed over the outputs of a sample.

    Samples further than δ from the model pull with a constant force, and ℓ'' = 0 there
    (P. J. Huber, Ann. Math. Statist. 35, 1964).
    """

    x: PyTree
    y: Float[Array, "n ..."]
    reduction: Literal["mean", "sum"] = eqx.field(static=True)
    predict: Callable[[Any, PyTree], Array] = eqx.field(static=True)
    delta: float

    def __init__(
        self,
        x: PyTree,
        y: Array,
        *,
        delta: float = 1.0,
        reduction: Literal["mean", "sum"] = "mean",
        predict: Callable[[Any, PyTree], Array] = predict_each,
    ):
        """**Arguments:** as for `SquaredError`, and

        - `delta`: δ > 0, a number known before tracing.

        **Raises:** `ValueError` as `SquaredError`, and unless δ is such a number.
        """
        self.x, self.y = _checked_targets(x, y, reduction, predict)
        self.reduction, self.predict = reduction, predict
        level = as_level(delta, "delta")
        if level is None or not level > 0:
            raise ValueError(f"delta: expected a positive number, got {word(delta)}.")
        self.delta = level

    @property
    def outer_curvature(self) -> None:
        return None

    def outer(self, z: Float[Array, " m"]) -> Scalar:
        return self._of_differences(z - self.y.reshape(-1))

    def _of_differences(self, r: Float[Array, " m"]) -> Scalar:
        inner = jnp.clip(r, -self.delta, self.delta)
        return self.scale * jnp.sum(inner * (r - 0.5 * inner))

    def outer_from(
        self, residuals: Float[Array, " m"], z: Float[Array, " m"]
    ) -> Scalar:
        r = z - self.y.reshape(-1)
        quadratic = jnp.abs(r) < self.delta
        return self._of_differences(jnp.where(quadratic, residuals / self.scale, r))


class Logistic(AbstractTargetLoss):
    """F(model) = meanᵢ log(1 + exp f(xᵢ)) − yᵢ f(xᵢ), or the sum: two classes, one
    logit f(xᵢ), and targets y between 0 and 1 (the probability of the second class).

    On separable data this loss has no minimiser: without weight decay ‖θ‖ grows like
    log t.
    """

    x: PyTree
    y: Float[Array, "n ..."]
    reduction: Literal["mean", "sum"] = eqx.field(static=True)
    predict: Callable[[Any, PyTree], Array] = eqx.field(static=True)

    def __init__(
        self,
        x: PyTree,
        y: Array,
        *,
        reduction: Literal["mean", "sum"] = "mean",
        predict: Callable[[Any, PyTree], Array] = predict_each,
    ):
        """**Arguments:** as for `SquaredError`; `y` holds numbers from 0 to 1.

        **Raises:** `ValueError` as `SquaredError`, and where `y` holds others.
        """
        known = is_concrete(y)  # before JAX has it, which may be tracing
        targets, y = y, as_data(y, "y")
        if known:
            targets = np.asarray(targets)
            if not ((targets >= 0) & (targets <= 1)).all():
                raise ValueError("y: expected numbers from 0 to 1.")
        y = y if jnp.issubdtype(y.dtype, jnp.inexact) else y.astype(float)
        self.x, self.y = _checked_targets(x, y, reduction, predict)
        self.reduction, self.predict = reduction, predict

    @property
    def outer_curvature(self) -> None:
        return None

    def outer(self, z: Float[Array, " m"]) -> Scalar:
        return self.scale * jnp.sum(_logistic(z, self.y.reshape(-1)))

    def outer_from(
        self, residuals: Float[Array, " m"], z: Float[Array, " m"]
    ) -> Scalar:
        # Where y is 0 or 1 it is −log(1 − |p − y|), with p − y = n·residual.
        y = self.y.reshape(-1)
        miss = jnp.where(y == 1, -residuals, residuals) / self.scale
        hard = (y == 0) | (y == 1)
        each = _from_miss(jnp.where(hard, miss, 0), _logistic(z, y))
        return self.scale * jnp.sum(each)


# An error p − 1 of a class that is all but certain cannot be told from zero; the sum of
# the other probabilities can. So the losses below have derivatives of their own, right
# to all digits, whatever the logits: of the first, the second and the third order.


@jax.custom_jvp
def _sigmoid(z: Array) -> Array:
    """1/(1 + e⁻ᶻ)."""
    return jax.nn.sigmoid(z)


@_sigmoid.defjvp
def _sigmoid_jvp(primals, tangents):
    (z,), (dz,) = primals, tangents
    p = _sigmoid(z)
    return p, p * _sigmoid(-z) * dz


@jax.custom_jvp
def _logistic(z: Array, y: Array) -> Array:
    """log(1 + eᶻ) − yz, for 0 ≤ y ≤ 1, each."""
    return y * jax.nn.softplus(-z) + (1 - y) * jax.nn.softplus(z)


@_logistic.defjvp
def _logistic_jvp(primals, tangents):
    (z, y), (dz, dy) = primals, tangents
    # p − y. Near z = 0 it may be far smaller than p and y are, too.
    far = (1 - y) * _sigmoid(z) - y * _sigmoid(-z)
    near = 0.5 * jnp.tanh(0.5 * z) + (0.5 - y)
    slope = jnp.where(jnp.abs(z) < 1, near, far)
    return _logistic(z, y), slope * dz - z * dy


@jax.custom_jvp
def _softmax(z: Float[Array, "n k"]) -> Float[Array, "n k"]:
    return jax.nn.softmax(z)


@_softmax.defjvp
def _softmax_jvp(primals, tangents):
    (z,), (dz,) = primals, tangents
    p = _softmax(z)
    return p, _softmax_change(p, dz)


def _softmax_change(p: Float[Array, "n k"], v: Float[Array, "n k"]) -> Array:
    """(diag p − ppᵀ)v, of each sample. Only differences of v count: those to its value
    at the largest p leave nothing there that cancels."""
    first = jnp.argmax(p, axis=1, keepdims=True) == jnp.arange(p.shape[1])[None]
    v = v - jnp.sum(jnp.where(first, v, 0), axis=1, keepdims=True)
    return p * (v - jnp.sum(p * v, axis=1, keepdims=True))


@jax.custom_jvp
def _misses(z: Float[Array, "n k"], own: Bool[Array, "n k"]) -> Float[Array, "n k"]:
    """softmax(z) − 1 at the label, where `own`, and softmax(z) elsewhere."""
    others = jnp.where(own, 0, _softmax(z))
    return jnp.where(own, -jnp.sum(others, axis=1, keepdims=True), others)


@_misses.defjvp
def _misses_jvp(primals, tangents):
    (z, own), (dz, _) = primals, tangents
    return _misses(z, own), _softmax_change(_softmax(z), dz)


@jax.custom_jvp
def _entropy(z: Float[Array, "n k"], own: Bool[Array, "n k"]) -> Float[Array, " n"]:
    """log Σⱼ exp(zⱼ − z at the label), of each sample."""
    label = jnp.sum(jnp.where(own, z, 0), axis=1)
    others = jax.nn.logsumexp(jnp.where(own, -jnp.inf, z), axis=1)
    return jax.nn.softplus(others - label)


@_entropy.defjvp
def _entropy_jvp(primals, tangents):
    (z, own), (dz, _) = primals, tangents
    return _entropy(z, own), jnp.sum(_misses(z, own) * dz, axis=1)


def _from_miss(miss: Float[Array, " n"], plain: Float[Array, " n"]) -> Array:
    """−log(1 − miss) where the miss of a right class is known, else `plain`."""
    known = (miss > 0) & (miss < 0.5)
    return jnp.where(known, -jnp.log1p(-jnp.where(known, miss, 0)), plain)


class CrossEntropy(AbstractSampled, AbstractByResiduals):
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

        **Raises:** `ValueError` where `labels` are no vector of integers, are negative,
        or do not match `x` in length.
        """
        self.x, self.labels = as_data(x, "x"), as_data(labels, "labels")
        self.predict = predict
        check_callable(predict, "predict", "the model and x")
        check_loss_data(self.x, self.labels, "labels")
        check_labels(self.labels)

    def outputs(self, model: PyTree) -> Float[Array, " m"]:
        z = predicted(self.predict, model, self.x)
        check_logits(self.labels, z.shape)
        return z.reshape(-1)

    @property
    def samples(self) -> PyTree | None:
        return self.x if self.predict is predict_each else None

    @property
    def outer_curvature(self) -> None:
        return None

    def _own(self, z: Float[Array, " m"]) -> tuple[Array, Array]:
        """z as (n, k), and where the labels are in it."""
        z = z.reshape(self.labels.shape[0], -1)
        return z, jnp.arange(z.shape[1])[None] == self.labels.astype(int)[:, None]

    def outer(self, z: Float[Array, " m"]) -> Scalar:
        return jnp.mean(_entropy(*self._own(z)))

    def outer_from(
        self, residuals: Float[Array, " m"], z: Float[Array, " m"]
    ) -> Scalar:
        # The residual at the label is (p − 1)/n.
        r, own = self._own(residuals)
        miss = -self.labels.shape[0] * jnp.sum(jnp.where(own, r, 0), axis=1)
        return jnp.mean(_from_miss(miss, _entropy(*self._own(z))))


class Loss(AbstractLoss):
    """Any scalar function of the model: F(model) = fn(model).

    Nothing is known of its structure: the KKT solvers then factorise its Hessian, for
    up to 5000 parameters, and so does the theory. Give a composite loss where there is
    one.
    """

    fn: Callable[[Any], Scalar]

    def __check_init__(self):
        check_callable(self.fn, "fn")

    def __call__(self, model: PyTree) -> Scalar:
        return self.fn(model)
