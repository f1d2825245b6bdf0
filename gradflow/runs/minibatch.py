"""Minibatches of a loss over samples."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Int, PRNGKeyArray, PyTree, Scalar

from .._checks import is_key, word
from ..losses import AbstractBySamples, AbstractLoss, AbstractTargetLoss, CrossEntropy


def _data(loss: AbstractLoss) -> tuple[PyTree, ...]:
    """Inputs, targets or labels, and weights where there are some."""
    assert isinstance(loss, AbstractTargetLoss | CrossEntropy)
    y = loss.labels if isinstance(loss, CrossEntropy) else loss.y
    return (loss.x, y) if loss.weights is None else (loss.x, y, loss.weights)


def check_batches(
    loss: AbstractLoss, batch_size: int | None, key: PRNGKeyArray | None
) -> int | None:
    """The number of samples where minibatches are asked for, else `None`.

    **Raises:** `ValueError` where they make no sense.
    """
    if batch_size is None:
        return None
    if not (is_key(key) or getattr(key, "dtype", None) == jnp.uint32):
        raise ValueError(
            f"key: expected one, to draw minibatches with, got {word(key)}."
        )
    if not isinstance(loss, AbstractBySamples):
        kind = type(loss).__name__
        raise ValueError(f"batch_size: {kind} has no samples known to draw from.")
    x, y, *_ = _data(loss)
    if not jax.tree.leaves(x):
        raise ValueError("batch_size: the loss has no inputs x to draw from.")
    whole = isinstance(batch_size, int) and not isinstance(batch_size, bool)
    if not whole or not 1 <= batch_size <= y.shape[0]:
        raise ValueError(
            f"batch_size: expected an integer from 1 to {y.shape[0]}, got "
            f"{batch_size!r}."
        )
    return y.shape[0]


def epoch_order(
    loss: AbstractLoss, key: PRNGKeyArray, epoch: Array
) -> Int[Array, " n"]:
    """The order of the samples in an epoch."""
    return jr.permutation(jr.fold_in(key, epoch), _data(loss)[1].shape[0])


def minibatch(
    loss: AbstractLoss,
    order: Int[Array, " n"],
    key: PRNGKeyArray,
    step: Array,
    size: int,
) -> tuple[Callable[[PyTree], Scalar], Int[Array, " n"]]:
    """The loss on the minibatch of a step, an unbiased estimate, and the order of the
    epoch."""
    n = order.shape[0]
    batches = -(-n // size)
    epoch, place = step // batches, step % batches
    order = jax.lax.cond(
        place == 0, lambda: epoch_order(loss, key, epoch), lambda: order
    )
    chosen = order[(place * size + jnp.arange(size)) % n]
    some = jax.tree.map(lambda a: a[chosen], _data(loss))
    some_loss = eqx.tree_at(_data, loss, some)
    total = isinstance(loss, AbstractTargetLoss) and loss.reduction == "sum"
    return (lambda model: some_loss(model) * (n / size)) if total else some_loss, order
