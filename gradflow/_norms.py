"""Sizes of pytrees that neither underflow nor overflow, in whatever unit they are."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree, Scalar


def norm(tree: PyTree) -> Scalar:
    """‖v‖ of all leaves together; squares of 1e-200, or of 1e-30 in float32, would be
    zero."""
    return norm_in(jnp, tree)


def norm_in(xp: Any, tree: PyTree) -> Any:
    """The same by NumPy or by `jax.numpy`."""
    leaves = [xp.abs(v) for v in jax.tree.leaves(tree)]
    largest = functools.reduce(xp.maximum, [xp.max(v, initial=0) for v in leaves])
    unit = xp.where((largest > 0) & xp.isfinite(largest), largest, 1)
    return unit * xp.sqrt(sum(xp.sum((v / unit) ** 2) for v in leaves))


def rms(tree: PyTree) -> Scalar:
    """The root of the mean square of all numbers in the leaves together."""
    size = norm(tree)
    count = sum(v.size for v in jax.tree.leaves(tree))
    return size / jnp.asarray(max(count, 1), size.dtype) ** 0.5
