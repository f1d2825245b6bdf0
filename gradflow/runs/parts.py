"""Runs in parts, each of so many steps, that go on where the last one ended."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

FIRST = 256
"""Steps of the first part."""
ALL = 2**30
"""More steps than any run takes; twice as many are more than 32 bits hold."""


def in_part() -> Any:
    """A context in which NaN is no error (`jax_debug_nans`): in the path so far it is
    what is not reached yet."""
    return jax.debug_nans(False)


def strong(tree: PyTree) -> PyTree:
    """Numbers as arrays, without weak types: a loop, and a file, keeps neither."""

    def array(x):
        x = jnp.asarray(x)
        return jax.lax.convert_element_type(x, x.dtype)

    return jax.tree.map(array, tree)
