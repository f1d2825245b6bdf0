"""Sizes of pytrees that neither underflow nor overflow, in whatever unit they are."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar


def as_vector(tree: PyTree) -> Float[Array, " d"]:
    """All leaves in one: what is computed of one vector is a smaller program than what
    is computed of many."""
    return _vector_in(jnp, tree)


def norms(rows: Float[Array, "k d"]) -> Float[Array, " k"]:
    """‖v‖ of each row; squares of 1e-200, or of 1e-30 in float32, would be zero."""
    return _norms_in(jnp, rows)


def norm(tree: PyTree) -> Scalar:
    """‖v‖ of all leaves together, as safe."""
    return norm_in(jnp, tree)


def norm_in(xp: Any, tree: PyTree) -> Any:
    """The same by NumPy or by `jax.numpy`."""
    return _norms_in(xp, _vector_in(xp, tree)[None])[0]


def rms(tree: PyTree) -> Scalar:
    """The root of the mean square of all numbers in the leaves together."""
    v = as_vector(tree)
    return norm(v) / jnp.asarray(max(v.size, 1), v.dtype) ** 0.5


def relative_rms(tree: PyTree) -> Scalar:
    """The same of numbers relative to a tolerance: those whose squares underflow are as
    good as zero, and those whose squares overflow as infinite."""
    v = as_vector(tree)
    return jnp.sqrt(jnp.sum(v * v) / max(v.size, 1))


def _vector_in(xp: Any, tree: PyTree) -> Any:
    leaves = [xp.reshape(v, -1) for v in jax.tree.leaves(tree)]
    return leaves[0] if len(leaves) == 1 else xp.concatenate(leaves)


def _norms_in(xp: Any, rows: Any) -> Any:
    largest = xp.max(xp.abs(rows), axis=-1, initial=0)
    unit = xp.where((largest > 0) & xp.isfinite(largest), largest, 1)
    return unit * xp.sqrt(xp.sum((rows / unit[..., None]) ** 2, axis=-1))
