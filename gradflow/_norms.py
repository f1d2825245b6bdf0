"""Sizes of pytrees that neither underflow nor overflow, in whatever unit they are."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import PyTree, Scalar


def norm(tree: PyTree) -> Scalar:
    """‖v‖ of all leaves together; squares of 1e-200, or of 1e-30 in float32, would be
    zero."""
    leaves = [jnp.abs(v) for v in jax.tree.leaves(tree)]
    largest = functools.reduce(jnp.maximum, [jnp.max(v, initial=0) for v in leaves])
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return unit * jnp.sqrt(sum(jnp.sum((v / unit) ** 2) for v in leaves))


def rms(tree: PyTree) -> Scalar:
    """The root of the mean square of all numbers in the leaves together."""
    size = norm(tree)
    count = sum(v.size for v in jax.tree.leaves(tree))
    return size / jnp.asarray(max(count, 1), size.dtype) ** 0.5
