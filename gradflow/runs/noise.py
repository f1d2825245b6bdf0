"""Noise of a descent: on labels, and on gradients."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import Array, PRNGKeyArray, PyTree, Scalar

from .._checks import check_number, is_concrete, is_key, word
from .._typing import Given
from ..losses import (
    AbstractLoss,
    AbstractTargetLoss,
    CrossEntropy,
    Huber,
    Logistic,
    SquaredError,
)

# Of keys: epochs of minibatches, which fold their numbers into the key, come to none.
_APART = 2**32 - 1


class Noise(eqx.Module):
    """What is drawn anew in each step: see `gradflow.descent`. The draws of a step
    depend on the key and the number of the step alone."""

    key: PRNGKeyArray
    label: Scalar | None
    """σ of targets, or the probability that a label is another; `None` for none."""
    gradient: Scalar | None
    """σ of each number in the gradient; `None` for none."""

    def loss(self, loss: AbstractLoss, model: PyTree, step: Array) -> AbstractLoss:
        """The loss of a step, with labels of its own."""
        if self.label is None:
            return loss
        key = self._key(0, step)
        if isinstance(loss, CrossEntropy):
            labels = loss.labels.astype(int)  # narrow ones would overflow
            outputs = eqx.filter_eval_shape(loss.outputs, model)
            classes = outputs.size // labels.shape[0]
            flipped, other = jr.split(key)
            off = jr.randint(other, labels.shape, 1, max(classes, 2), labels.dtype)
            wrong = jr.bernoulli(flipped, self.label, labels.shape)
            drawn = jnp.where(wrong, (labels + off) % classes, labels)
            drawn = drawn.astype(loss.labels.dtype)
            return eqx.tree_at(lambda one: one.labels, loss, drawn)
        assert isinstance(loss, AbstractTargetLoss)
        y = loss.y
        if isinstance(loss, Logistic):
            wrong = jr.bernoulli(key, self.label, y.shape)
            drawn = jnp.where(wrong, 1 - y, y)
        else:
            drawn = y + self.label.astype(y.dtype) * jr.normal(key, y.shape, y.dtype)
        return eqx.tree_at(lambda one: one.y, loss, drawn)

    def slope(self, slope: PyTree, step: Array) -> PyTree:
        """The gradient of a step."""
        if self.gradient is None:
            return slope
        leaves, structure = jax.tree.flatten(slope)
        keys = jr.split(self._key(1, step), len(leaves))
        drawn = [
            g + self.gradient.astype(g.dtype) * jr.normal(key, g.shape, g.dtype)
            for g, key in zip(leaves, keys, strict=True)
        ]
        return structure.unflatten(drawn)

    def _key(self, kind: int, step: Array) -> PRNGKeyArray:
        return jr.fold_in(jr.fold_in(jr.fold_in(self.key, _APART), kind), step)


def as_noise(
    loss: AbstractLoss,
    key: PRNGKeyArray | None,
    label: Given,
    gradient: Given,
    dtype: DTypeLike,
) -> Noise | None:
    """The noise that is asked for, as far as numbers are none below zero.

    **Raises:** `ValueError` where it makes no sense.
    """
    if label is None and gradient is None:
        return None
    name = "gradient_noise" if label is None else "label_noise"
    if not (is_key(key) or getattr(key, "dtype", None) == jnp.uint32):
        raise ValueError(f"key: expected one, to draw {name} with, got {word(key)}.")
    assert key is not None
    if label is not None:
        if not isinstance(loss, SquaredError | Huber | Logistic | CrossEntropy):
            kind = type(loss).__name__
            raise ValueError(f"label_noise: {kind} has no labels that are known.")
        if isinstance(loss, CrossEntropy) and loss.labels.ndim > 1:
            raise ValueError("label_noise: probabilities are no labels to flip.")
        if isinstance(loss, Logistic | CrossEntropy) and is_concrete(label):
            share = "a probability, from 0 to 1"
            check_number(label, "label_noise", share, lambda p: (p >= 0) & (p <= 1))

    def array(x: Given) -> Scalar | None:
        return None if x is None else jnp.asarray(x, dtype)

    return Noise(key, array(label), array(gradient))
