"""Training losses F(model): composite ones, F = ℓ(z(θ)), and any other scalar."""

import abc
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, Scalar

from ._checks import (
    as_data,
    as_level,
    as_weights,
    check_callable,
    check_choice,
    check_finite,
    check_labels,
    check_logits,
    check_loss_data,
    check_probabilities,
    is_concrete,
    word,
)
from ._logits import entropy, from_miss, logistic, logistic_from
from ._typing import Given


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
        """All outputs z(θ) of `model` on the training data, as one vector of m
        numbers."""

    @abc.abstractmethod
    def outer(self, z: Float[Array, " m"]) -> Scalar:
        """The convex outer loss ℓ(`z`)."""

    @property
    @abc.abstractmethod
    def outer_curvature(self) -> float | None:
        """w where ℓ'' = w I everywhere (squared error), `None` otherwise."""

    def __call__(self, model: PyTree) -> Scalar:
        """The loss F(model) = ℓ(z(θ))."""
        return self.outer(self.outputs(model))

    def residuals(self, model: PyTree) -> Float[Array, " m"]:
        """∇ℓ(z(θ)), the residuals: zero where `model` interpolates the data.

        For the mean squared error they are (z − y)/n, for the cross-entropy
        (softmax(z) − onehot)/n.
        """
        return jax.grad(self.outer)(self.outputs(model))

    def jvp(self, model: PyTree, tangent: PyTree) -> Float[Array, " m"]:
        """J v: the change of the outputs of `model` along `tangent`, a pytree shaped as
        its inexact-array leaves (`None` on a leaf that is held fixed)."""
        params, static = eqx.partition(
            model, jax.tree.map(lambda v: v is not None, tangent, is_leaf=_is_none)
        )
        return jax.jvp(
            lambda p: self.outputs(eqx.combine(p, static)), (params,), (tangent,)
        )[1]

    def vjp(self, model: PyTree, cotangent: Float[Array, " m"]) -> PyTree:
        """Jᵀ u, u the `cotangent`: a pytree shaped as the inexact-array leaves of
        `model`."""
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


class AbstractByClasses(AbstractCompositeLoss):
    """A composite loss of classes, which the outputs tell apart by a margin."""

    @abc.abstractmethod
    def margins(self, z: Float[Array, " m"]) -> Float[Array, " k"]:
        """How far what the outputs say is on the right side, of each sample (or each
        output that is a class by itself): positive where it is right. Infinite where a
        sample has no side, or the weight zero."""

    @property
    @abc.abstractmethod
    def positive(self) -> bool:
        """Whether F > 0 everywhere, so that a loss of zero is one that underflows."""


class AbstractBySamples(AbstractSampled, AbstractByResiduals):
    """A loss that is a sum over samples, ℓ(z) = c Σᵢ wᵢ ρᵢ(z): c = 1/n, or 1 for the
    sum, and weights wᵢ ≥ 0, one unless given. (Scaled to mean one, if c = 1/n: what
    ℓ is then is Σᵢ wᵢρᵢ/Σᵢwᵢ for the weights as they were.)"""

    x: eqx.AbstractVar[PyTree]
    weights: eqx.AbstractVar[Float[Array, " n"] | None]
    predict: eqx.AbstractVar[Callable[[Any, PyTree], Array]]

    @property
    @abc.abstractmethod
    def scale(self) -> float:
        """c."""

    @abc.abstractmethod
    def each(self, z: Float[Array, " m"]) -> Float[Array, " k"]:
        """ρ, of each sample, or of each of its outputs."""

    @abc.abstractmethod
    def each_from(
        self, slopes: Float[Array, " m"], z: Float[Array, " m"]
    ) -> Float[Array, " k"]:
        """ρ, where its `slopes` ∂ρ/∂z are known better than z."""

    @property
    def samples(self) -> PyTree | None:
        return self.x if self.predict is predict_each else None

    def outer(self, z: Float[Array, " m"]) -> Scalar:
        # (Where the weight is zero ρ and its derivatives might be infinite.)
        return self._total(self.each(self.counted(z, 0.0)))

    def outer_from(
        self, residuals: Float[Array, " m"], z: Float[Array, " m"]
    ) -> Scalar:
        slopes = residuals / self.scale
        if self.weights is not None:
            weights = self.counted(self._spread(z), 1.0)
            slopes = self.counted(slopes / weights, 0.0)
        return self._total(self.each_from(slopes, z))

    def counted(self, values: Float[Array, " k"], other: float) -> Float[Array, " k"]:
        """`values`, of samples or of their outputs; `other` where the weight is
        zero."""
        if self.weights is None:
            return values
        return jnp.where(self._spread(values) > 0, values, other)

    def _total(self, values: Float[Array, " k"]) -> Scalar:
        """c Σ wᵢ · `values`."""
        if self.weights is not None:
            values = self.counted(self._spread(values) * values, 0.0)
        return self.scale * jnp.sum(values)

    def _spread(self, values: Float[Array, " k"]) -> Float[Array, " k"]:
        """The weight of each of the `values`."""
        assert self.weights is not None
        weights = self.weights.astype(values.dtype)
        return jnp.repeat(weights, values.size // weights.size)


class AbstractTargetLoss(AbstractBySamples):
    """What losses against targets of the predictions' shape have in common."""

    y: eqx.AbstractVar[Float[Array, "n ..."]]
    reduction: eqx.AbstractVar[Literal["mean", "sum"]]

    def outputs(self, model: PyTree) -> Float[Array, " m"]:
        z = predicted(self.predict, model, self.x)
        if z.shape != self.y.shape:
            raise ValueError(
                f"y: the model's predictions have shape {z.shape}, the targets "
                f"{self.y.shape}; give targets of the predictions' shape."
            )
        return z.reshape(-1)

    @property
    def scale(self) -> float:
        return 1.0 if self.reduction == "sum" else 1.0 / self.y.shape[0]


def checked_targets(
    x: PyTree,
    y: Array,
    weights: Array | None,
    reduction: str,
    predict: Callable[[Any, PyTree], Array],
) -> tuple[PyTree, Array, Array | None]:
    """`x`, `y` and `weights` as arrays.

    **Raises:** `ValueError` as `SquaredError`.
    """
    x, y = as_data(x, "x"), as_data(y, "y")
    check_choice(reduction, "reduction", ("mean", "sum"))
    check_callable(predict, "predict", "the model and x")
    check_loss_data(x, y, "y")
    check_finite(y, "y")
    return x, y, as_weights(weights, y.shape[0], mean=reduction == "mean")


def check_delta(delta: Given) -> float:
    """δ as a plain number.

    **Raises:** `ValueError` unless it is one above zero, known before tracing.
    """
    level = as_level(delta, "delta")
    if level is None or not level > 0:
        raise ValueError(f"delta: expected a positive number, got {word(delta)}.")
    return level


class SquaredError(AbstractTargetLoss):
    """F(model) = ½ meanᵢ ‖f(xᵢ) − yᵢ‖², the mean over samples; or the sum.

    With `reduction="mean"`, ℓ(z) = ‖z − y‖²/(2n); with `"sum"`, ℓ(z) = ½‖z − y‖². With
    weights w, F = ½ Σᵢ wᵢ‖f(xᵢ) − yᵢ‖²/Σᵢwᵢ, or the sum alone.
    """

    x: PyTree
    y: Float[Array, "n ..."]
    reduction: Literal["mean", "sum"] = eqx.field(static=True)
    predict: Callable[[Any, PyTree], Array] = eqx.field(static=True)
    weights: Float[Array, " n"] | None = None

    def __init__(
        self,
        x: PyTree,
        y: Array,
        *,
        weights: Array | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        predict: Callable[[Any, PyTree], Array] = predict_each,
    ):
        """**Arguments:**

        - `x`: inputs, an array or a pytree of arrays with a leading axis of n samples.
        - `y`: targets, of the same shape as the predictions.
        - `weights`: of the samples, n numbers wᵢ ≥ 0 that are not all zero. The mean is
            Σwᵢℓᵢ/Σwᵢ, as scikit-learn's: a weight of two is that sample twice, and one
            of zero leaves it out. With `reduction="sum"` it is Σwᵢℓᵢ.
        - `reduction`: `"mean"` or `"sum"` over the n samples (outputs of one sample are
            always summed).
        - `predict`: `predict(model, x)`, the predictions for all samples. The default
            is `jax.vmap(model)(x)`; with one that ignores it, `x` may be `None`.

        **Raises:** `ValueError` where `x` and `y` differ in length, are empty, or hold
        a NaN or an infinity; and where `weights` are no such numbers.
        """
        self.x, self.y, self.weights = checked_targets(
            x, y, weights, reduction, predict
        )
        self.reduction, self.predict = reduction, predict

    @property
    def outer_curvature(self) -> float | None:
        return self.scale if self.weights is None else None

    def each(self, z: Float[Array, " m"]) -> Float[Array, " m"]:
        r = z - self.y.reshape(-1)
        return 0.5 * r * r

    def each_from(
        self, slopes: Float[Array, " m"], z: Float[Array, " m"]
    ) -> Float[Array, " m"]:
        return 0.5 * slopes * slopes


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
    weights: Float[Array, " n"] | None = None

    def __init__(
        self,
        x: PyTree,
        y: Array,
        *,
        delta: float = 1.0,
        weights: Array | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        predict: Callable[[Any, PyTree], Array] = predict_each,
    ):
        """**Arguments:** as for `SquaredError`, and

        - `delta`: δ > 0, a number known before tracing.

        **Raises:** `ValueError` as `SquaredError`, and unless δ is such a number.
        """
        self.x, self.y, self.weights = checked_targets(
            x, y, weights, reduction, predict
        )
        self.reduction, self.predict = reduction, predict
        self.delta = check_delta(delta)

    @property
    def outer_curvature(self) -> None:
        return None

    def each(self, z: Float[Array, " m"]) -> Float[Array, " m"]:
        return self._of_differences(z - self.y.reshape(-1))

    def _of_differences(self, r: Float[Array, " m"]) -> Float[Array, " m"]:
        inner = jnp.clip(r, -self.delta, self.delta)
        return inner * (r - 0.5 * inner)

    def each_from(
        self, slopes: Float[Array, " m"], z: Float[Array, " m"]
    ) -> Float[Array, " m"]:
        r = z - self.y.reshape(-1)
        return self._of_differences(jnp.where(jnp.abs(r) < self.delta, slopes, r))


class Logistic(AbstractTargetLoss, AbstractByClasses):
    """F(model) = meanᵢ log(1 + exp f(xᵢ)) − yᵢ f(xᵢ), or the sum: two classes, one
    logit f(xᵢ), and targets y between 0 and 1 (the probability of the second class).
    For targets −1 and 1 it is `SoftMargin`.

    On separable data this loss has no minimiser: without weight decay ‖θ‖ grows like
    log t (Soudry et al., arXiv 1710.10345).
    """

    x: PyTree
    y: Float[Array, "n ..."]
    reduction: Literal["mean", "sum"] = eqx.field(static=True)
    predict: Callable[[Any, PyTree], Array] = eqx.field(static=True)
    weights: Float[Array, " n"] | None = None

    def __init__(
        self,
        x: PyTree,
        y: Array,
        *,
        weights: Array | None = None,
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
        self.x, self.y, self.weights = checked_targets(
            x, y, weights, reduction, predict
        )
        self.reduction, self.predict = reduction, predict

    @property
    def outer_curvature(self) -> None:
        return None

    def each(self, z: Float[Array, " m"]) -> Float[Array, " m"]:
        return logistic(z, self.y.reshape(-1))

    def each_from(
        self, slopes: Float[Array, " m"], z: Float[Array, " m"]
    ) -> Float[Array, " m"]:
        return logistic_from(slopes, z, self.y.reshape(-1))

    def margins(self, z: Float[Array, " m"]) -> Float[Array, " m"]:
        y = self.y.reshape(-1)
        margins = jnp.where((y == 0) | (y == 1), (2 * y - 1) * z, jnp.inf)
        return self.counted(margins, jnp.inf)

    @property
    def positive(self) -> bool:
        return True


class CrossEntropy(AbstractBySamples, AbstractByClasses):
    """F(model) = −meanᵢ log softmax(f(xᵢ))[labelᵢ], f(xᵢ) a vector of k logits; or, for
    soft labels qᵢ, probabilities of the k classes, −meanᵢ Σⱼ qᵢⱼ log softmax(f(xᵢ))ⱼ.

    On separable data this loss has no minimiser: without weight decay ‖θ‖ grows like
    log t (Soudry et al., arXiv 1710.10345). With soft labels, none of which is 0 or 1,
    it has: softmax(f(xᵢ)) = qᵢ where the model can, and there F is the mean entropy of
    the labels.
    """

    x: PyTree
    labels: Int[Array, " n"] | Float[Array, "n k"]
    predict: Callable[[Any, PyTree], Array] = eqx.field(static=True)
    weights: Float[Array, " n"] | None = None

    def __init__(
        self,
        x: PyTree,
        labels: Int[Array, " n"] | Float[Array, "n k"],
        *,
        weights: Array | None = None,
        predict: Callable[[Any, PyTree], Array] = predict_each,
    ):
        """**Arguments:**

        - `x`: inputs, an array or a pytree of arrays with a leading axis of n samples.
        - `labels`: integers from 0 to k − 1; or n rows of k probabilities that add up
            to one (to 1e-5; they are then divided by what they do add up to).
        - `weights`: of the samples, as for `SquaredError`.
        - `predict`: `predict(model, x)`, the logits for all samples, shape (n, k). The
            default is `jax.vmap(model)(x)`.

        **Raises:** `ValueError` where `labels` are neither a vector of such integers
        nor such probabilities, or do not match `x` in length; and as `SquaredError` of
        `weights`.
        """
        self.x, labels = as_data(x, "x"), as_data(labels, "labels")
        self.predict = predict
        check_callable(predict, "predict", "the model and x")
        check_loss_data(self.x, labels, "labels")
        if labels.ndim == 2:
            check_probabilities(labels)
            labels = labels / jnp.sum(labels, axis=1, keepdims=True)
        else:
            check_labels(labels)
        self.labels = labels
        self.weights = as_weights(weights, labels.shape[0], mean=True)

    def outputs(self, model: PyTree) -> Float[Array, " m"]:
        z = predicted(self.predict, model, self.x)
        check_logits(self.labels, z.shape)
        return z.reshape(-1)

    @property
    def outer_curvature(self) -> None:
        return None

    @property
    def scale(self) -> float:
        return 1.0 / self.labels.shape[0]

    def _rows(self, z: Float[Array, " m"]) -> tuple[Array, Array]:
        """z as (n, k), and the probabilities of the labels."""
        z = z.reshape(self.labels.shape[0], -1)
        if self.labels.ndim == 2:
            return z, self.labels
        own = jnp.arange(z.shape[1])[None] == self.labels.astype(int)[:, None]
        return z, own.astype(z.dtype)

    def each(self, z: Float[Array, " m"]) -> Float[Array, " n"]:
        return entropy(*self._rows(z))

    def each_from(
        self, slopes: Float[Array, " m"], z: Float[Array, " m"]
    ) -> Float[Array, " n"]:
        # The slope at a label that is certain is p − 1.
        r, q = self._rows(slopes)
        miss = -jnp.sum(jnp.where(q == 1, r, 0), axis=1)
        return from_miss(miss, self.each(z))

    def margins(self, z: Float[Array, " m"]) -> Float[Array, " n"]:
        """The least logit of what a label may be (of one class, or several), above all
        that it is not, of each sample: from the outputs `z`, a vector of n · k."""
        z, q = self._rows(z)
        least = jnp.min(jnp.where(q > 0, z, jnp.inf), axis=1)
        others = jnp.max(jnp.where(q > 0, -jnp.inf, z), axis=1)
        return self.counted(least - others, jnp.inf)

    @property
    def positive(self) -> bool:
        return True


class Loss(AbstractLoss):
    """Any scalar function of the model: F(model) = fn(model).

    Nothing is known of its structure: the KKT solvers then factorise its Hessian, for
    up to 5000 parameters, and so does the theory. Give a composite loss where there is
    one.

    **Arguments:**

    - `fn`: a function of the model that JAX can differentiate, and that gives one
        number.

    **Raises:** `ValueError` where that is no function.
    """

    fn: Callable[[Any], Scalar]

    def __check_init__(self):
        check_callable(self.fn, "fn")

    def __call__(self, model: PyTree) -> Scalar:
        return self.fn(model)
