"""How well a classifier tells labels: accuracy, margin."""

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree, Scalar

from .._checks import (
    as_data,
    as_level,
    check_callable,
    check_labels,
    check_logits,
    check_loss_data,
    word,
)
from ..losses import predict_each, predicted
from .matrices import Part, size, whole


class AbstractOfLogits(eqx.Module):
    """A number that the logits of samples give, and their labels. One logit f of a
    sample is that of label 1, against zero for label 0."""

    x: eqx.AbstractVar[PyTree]
    """Inputs, n samples on the first axis."""
    labels: eqx.AbstractVar[Int[Array, " n"]]
    """From 0 to k − 1."""

    def logits(self, model: PyTree) -> Float[Array, "n k"]:
        """The logits of `model`, of all samples.

        **Raises:** `ValueError` where the model cannot take `x`, or has fewer logits
        than there are labels.
        """
        logits = predicted(predict_each, model, self.x)
        if logits.ndim == 1:
            logits = jnp.stack([jnp.zeros_like(logits), logits], axis=1)
        check_logits(self.labels, logits.shape)
        return logits


def _checked(x: PyTree, labels: Array) -> tuple[PyTree, Int[Array, " n"]]:
    """`x` and `labels` as arrays.

    **Raises:** `ValueError` where they differ in length, are empty, or `labels` is no
    vector of integers from 0 on.
    """
    x, labels = as_data(x, "x"), as_data(labels, "labels")
    check_loss_data(x, labels, "labels")
    check_labels(labels)
    return x, labels


class Accuracy(AbstractOfLogits):
    """The share of samples whose largest logit is at their label, from 0 to 1.

    Watch it as `Metric(Accuracy(x, labels), threshold=0.99)`.
    """

    higher_is_better: ClassVar[bool] = True

    x: PyTree
    labels: Int[Array, " n"]

    def __init__(self, x: PyTree, labels: Int[Array, " n"]):
        """**Arguments:**

        - `x`: inputs, n samples on the first axis.
        - `labels`: integers from 0 to k − 1; from 0 to 1 for a model with one logit,
            that of label 1 against zero.

        **Raises:** `ValueError` where they differ in length, are empty, or `labels` is
        no vector of such integers.
        """
        self.x, self.labels = _checked(x, labels)

    def __call__(self, model: PyTree) -> Scalar:
        logits = self.logits(model)
        right = jnp.argmax(logits, axis=-1).astype(self.labels.dtype) == self.labels
        return jnp.mean(right, dtype=logits.dtype)


class Margin(AbstractOfLogits):
    """The least normalised margin of all samples,

        γ = minᵢ (z_{i,yᵢ} − max_{j≠yᵢ} z_{ij}) / ‖θ‖ᵖ,

    positive where all samples are told right. Where outputs are homogeneous in the
    parameters, of degree p, γ does not change with ‖θ‖; once all samples are told
    right, the flow of the cross-entropy without weight decay hardly lowers it, and its
    limits in direction are KKT points of the largest γ (Lyu and Li, arXiv 1906.05890).
    """

    higher_is_better: ClassVar[bool] = True

    x: PyTree
    labels: Int[Array, " n"]
    degree: float = eqx.field(static=True)
    where: Part = eqx.field(static=True)

    def __init__(
        self,
        x: PyTree,
        labels: Int[Array, " n"],
        *,
        degree: float | int,
        where: Part = whole,
    ):
        """**Arguments:**

        - `x`, `labels`: as for [`gradflow.metrics.Accuracy`][].
        - `degree`: p, the number of layers of a network of ReLUs without biases; 0 for
            the margin itself.
        - `where`: what ‖θ‖ is of, as for [`gradflow.metrics.Norm`][].

        **Raises:** `ValueError` as `Accuracy`, and unless p is a number from 0 on.
        """
        self.x, self.labels = _checked(x, labels)
        power = as_level(degree, "degree")
        if power is None or not 0 <= power < jnp.inf:
            raise ValueError(
                f"degree: expected a finite number, 0 or more, got {word(degree)}."
            )
        check_callable(where, "where")
        self.degree, self.where = power, where

    def __call__(self, model: PyTree) -> Scalar:
        logits = self.logits(model)
        own = self.labels[:, None] == jnp.arange(logits.shape[1])[None, :]
        right = jnp.max(jnp.where(own, logits, -jnp.inf), axis=1)
        others = jnp.max(jnp.where(own, -jnp.inf, logits), axis=1)
        return jnp.min(right - others) / size(self.where(model)) ** self.degree
