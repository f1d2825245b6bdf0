"""Runs in parts, each of so many steps, that go on where the last one ended."""

from typing import Any

import jax
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
    """Without weak types, which a file does not keep."""
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), tree)
