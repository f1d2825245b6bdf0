"""Arithmetic on the host, where values are known.

An operation of `jax.numpy` outside a compiled function is a program of its own, for
which the first time in a process takes 20 to 100 ms; `jnp.asarray` of a NumPy array is
one for each shape. What NumPy does takes microseconds.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from ._checks import is_concrete, is_key
from ._norms import norm_in
from ._typing import Given


def platform() -> str:
    """That of the device on which JAX runs what is not placed elsewhere."""
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def numpy_of(*values: Given) -> Any:
    """NumPy where all values are known, `jax.numpy` where one is being traced."""
    return np if all(map(is_concrete, values)) else jnp


def known(x: Given) -> Any:
    """An array of NumPy's, where the value is known."""
    return np.asarray(x) if is_concrete(x) else x


def as_array(x: Given, dtype: DTypeLike | None = None) -> Array:
    """`jnp.asarray` without a program."""
    if not is_concrete(x):
        return jnp.asarray(x, dtype)
    if isinstance(x, jax.Array) and not x.weak_type and dtype in (None, x.dtype):
        return x
    return jax.device_put(np.asarray(x, dtype))


def size(tree: PyTree) -> Any:
    """‖v‖ of all leaves together."""
    leaves = [known(v) for v in jax.tree.leaves(tree)]
    return norm_in(numpy_of(*leaves), leaves)


def taken(x: Given, index: Given) -> Array:
    """x[index], without a program where the array is in the memory of the host. (From
    that of another device nothing else is to be copied.)"""
    if not eqx.is_array_like(x) or not is_concrete(x) or is_key(x):
        return x[index]
    if isinstance(x, jax.Array) and jax.default_backend() != "cpu":
        return x[index]
    return as_array(np.asarray(x)[index])
