"""What is watched along a path: a function of the model, with the level that counts."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree, Scalar

from ._checks import (
    as_data,
    as_level,
    check_callable,
    check_labels,
    check_logits,
    check_loss_data,
)
from .losses import predict_each, predicted


class Metric(eqx.Module):
    """A number that tells how good a model is, and the threshold that it is to pass.

    The time at which a metric named `"train"` passes its threshold for good is the
    memorisation time; for one named `"test"` it is the grokking time.

    It may be many numbers too, such as singular values: an array whose shape is the
    same for all models. These have no threshold.
    """

    fn: Callable[[Any], Float[Array, "..."]]
    """Of the model."""
    threshold: float | None = eqx.field(static=True, default=None, converter=as_level)
    """The level that it is to pass, a number; `None` where no level counts."""
    higher_is_better: bool = eqx.field(static=True, default=False)
    """Whether it passes from below."""

    def __check_init__(self):
        check_callable(self.fn, "fn")

    def __call__(self, model: PyTree) -> Float[Array, "..."]:
        return self.fn(model)


def without_thresholds(metrics: dict[str, Metric]) -> dict[str, Metric]:
    """The functions alone: what is compiled for one threshold serves all."""
    return {name: Metric(metric.fn) for name, metric in metrics.items()}


class Accuracy(eqx.Module):
    """The share of samples whose largest logit is at their label, from 0 to 1.

    Watch it as `Metric(Accuracy(x, labels), threshold=0.99, higher_is_better=True)`.
    """

    x: PyTree
    labels: Int[Array, " n"]

    def __init__(self, x: PyTree, labels: Int[Array, " n"]):
        """**Arguments:**

        - `x`: inputs, n samples on the first axis.
        - `labels`: integers from 0 to k − 1.

        **Raises:** `ValueError` where they differ in length, are empty, or `labels` is
        no vector of such integers.
        """
        self.x, self.labels = as_data(x, "x"), as_data(labels, "labels")
        check_loss_data(self.x, self.labels, "labels")
        check_labels(self.labels)

    def logits(self, model: PyTree) -> Float[Array, "n k"]:
        """The logits of all samples."""
        logits = predicted(predict_each, model, self.x)
        check_logits(self.labels, logits.shape)
        return logits

    def __call__(self, model: PyTree) -> Scalar:
        logits = self.logits(model)
        right = jnp.argmax(logits, axis=-1).astype(self.labels.dtype) == self.labels
        return jnp.mean(right, dtype=logits.dtype)
