"""Checks of the arguments: one line, naming the argument, before any compute."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree


def is_concrete(x) -> bool:
    """Whether the value of `x` is known now (it is not being traced)."""
    return not isinstance(x, jax.core.Tracer)


def check_finite(x: PyTree, name: str) -> None:
    for leaf in jax.tree.leaves(x):
        if (
            is_concrete(leaf)
            and jnp.issubdtype(leaf.dtype, jnp.inexact)
            and not np.isfinite(leaf).all()
        ):
            raise ValueError(f"{name}: holds a NaN or an infinity.")


def check_loss_data(x: PyTree, y: Array, y_name: str) -> None:
    lengths = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(x)}
    if y.ndim == 0 or y.shape[0] == 0:
        raise ValueError(f"{y_name}: expected at least one sample on the first axis.")
    if lengths and lengths != {y.shape[0]}:
        raise ValueError(
            f"x: its first axis has {sorted(map(str, lengths))} samples, {y_name} has "
            f"{y.shape[0]}."
        )
    check_finite(x, "x")


def check_model(params: PyTree) -> None:
    leaves = jax.tree.leaves(params)
    if sum(leaf.size for leaf in leaves) == 0:
        raise ValueError("model: has no trainable parameters.")
    dtypes = {str(leaf.dtype) for leaf in leaves}
    if len(dtypes) > 1 or "complex" in next(iter(dtypes)):
        raise ValueError(
            f"model: parameters must all be of one real precision, got {sorted(dtypes)}."
        )
    check_finite(params, "model")
