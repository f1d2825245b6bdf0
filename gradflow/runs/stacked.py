"""Models along a path as one, for `jax.vmap`: all that is no array is kept apart."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial, register_pytree_node
from jaxtyping import Array, PyTree

from .._checks import is_concrete, is_key
from .._host import as_array


def stacked(params: PyTree, static: PyTree, shape: tuple[int, ...]) -> PyTree:
    """The models whose trainable parameters are `params`, which have axes of `shape`
    before their own: one pytree whose leaves are arrays that all have these.

    So it can be mapped over and compiled as it is, where JAX takes arrays only. What is
    frozen is repeated along the axes. What is no array is no leaf any more, but does
    what it did: a function is a `jax.tree_util.Partial`, a number or a text of a
    subclass of its type.
    """

    def kept(leaf: Any) -> Any:
        array = eqx.is_array(leaf) or isinstance(leaf, np.ndarray | np.generic)
        return repeated(leaf, shape) if array else constant(leaf)

    return eqx.combine(params, jax.tree.map(kept, static))


def repeated(x: Any, shape: tuple[int, ...]) -> Array:
    """An array once for each place of `shape`."""
    goal = (*shape, *x.shape)
    if is_key(x) or not is_concrete(x):
        return jnp.broadcast_to(x, goal)
    return as_array(np.broadcast_to(np.asarray(x), goal))


class Bool(int):
    """True or false. (`bool` has no subclasses.)"""

    def __jax_array__(self) -> Array:
        return jnp.asarray(bool(self))

    def __repr__(self) -> str:
        return str(bool(self))


class Int(int):
    """A number, for JAX too one whose precision is that of others."""

    def __jax_array__(self) -> Array:
        return jnp.asarray(int(self))


class Float(float):
    """The same."""

    def __jax_array__(self) -> Array:
        return jnp.asarray(float(self))


class Complex(complex):
    """The same."""

    def __jax_array__(self) -> Array:
        return jnp.asarray(complex(self))


class Text(str):
    """Some words."""


class Constant:
    """Anything else, to which it passes on what it is asked."""

    def __init__(self, value: Any):
        self.value = value

    def __getattr__(self, name: str) -> Any:
        if name == "value":  # of one that is yet to be filled, as by `copy`
            raise AttributeError(name)
        return getattr(self.value, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.value(*args, **options)

    def __eq__(self, other: object) -> bool:
        return self.value == (other.value if isinstance(other, Constant) else other)

    def __hash__(self) -> int:
        return hash(self.value)

    def __repr__(self) -> str:
        return repr(self.value)


# Nodes without leaves. What tells two apart are their bits: NaN is the same as NaN, and
# −0 is not 0.
_NODES: dict[type, tuple[Callable, Callable]] = {
    Bool: (int, Bool),
    Int: (int, Int),
    Float: (float.hex, Float.fromhex),
    Complex: (lambda z: (z.real.hex(), z.imag.hex()),
              lambda z: Complex(float.fromhex(z[0]), float.fromhex(z[1]))),
    Text: (str, Text),
    Constant: (lambda x: x.value, Constant),
}  # fmt: skip
_OF = {bool: Bool, int: Int, float: Float, complex: Complex, str: Text}


def _register(kind: type, told: Callable, made: Callable) -> None:
    register_pytree_node(kind, lambda x: ((), told(x)), lambda x, _: made(x))


for _kind, _both in _NODES.items():
    _register(_kind, *_both)


def constant(leaf: Any) -> Any:
    """What does as `leaf`, which is no array, and is no leaf of a pytree."""
    if type(leaf) in _OF:
        return _OF[type(leaf)](leaf)
    if callable(leaf) and not isinstance(leaf, type | functools.partial):
        return Partial(leaf)
    return Constant(leaf)


def plain(value: Any) -> Any:
    """The leaf that `constant` was made of; any other value as it is."""
    for kind, own in _OF.items():
        if type(value) is own:
            return kind(value)
    if isinstance(value, Constant):
        return value.value
    return value
