"""Rates G of the parameters, as users write them: numbers for parts of a model."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._checks import check_numbers
from .._host import as_array
from .._typing import Given
from ..penalties import absolute_weights, AbstractPenalty
from ..penalties.base import AbstractByLeaf

Rates = PyTree | Callable[[PyTree], PyTree]


def as_rates(rates: Given) -> Rates:
    """Numbers as arrays; a function of the parameters as it is.

    **Raises:** `ValueError` for what is not positive.
    """
    return rates if callable(rates) and not _is_tree(rates) else _numbers(rates)


def _is_tree(x: Given) -> bool:
    """A model may be callable as well."""
    leaves = jax.tree.leaves(x)
    return not (len(leaves) == 1 and leaves[0] is x)


def _numbers(rates: Given) -> PyTree:
    leaves, tree = jax.tree_util.tree_flatten_with_path(rates)
    expected = "positive numbers (`trainable` leaves out what is not to move)"
    if not leaves:
        raise ValueError(f"rates: expected {expected}, got none.")
    for at, x in leaves:
        flat = x.reshape(-1) if isinstance(x, jax.Array | np.ndarray) else x
        place = f"rates{jax.tree_util.keystr(at)}"
        check_numbers(flat, place, expected, lambda v: v > 0)
    return tree.unflatten([as_array(x) for _, x in leaves])


def of_leaves(rates: Rates, params: PyTree) -> PyTree:
    """A rate for each leaf of the parameters, a number or an array of its shape.

    **Raises:** `ValueError` where they do not fit.
    """
    if callable(rates) and not _is_tree(rates):
        shapes = jax.tree.map(
            lambda p: jax.ShapeDtypeStruct(jnp.shape(p), jnp.result_type(p)), params
        )
        rates = _numbers(rates(shapes))
    try:
        whole = jax.tree.broadcast(rates, params)
    except ValueError as error:
        raise ValueError(
            "rates: expected a pytree that begins as that of the trainable parameters; "
            f"{str(error).partition(chr(10))[0].rstrip('.')}."
        ) from error

    def check(at: tuple, p: Given, rate: Given) -> None:
        if jnp.shape(rate) not in ((), jnp.shape(p)):
            raise ValueError(
                f"rates{jax.tree_util.keystr(at)}: expected a number, or an array of "
                f"shape {jnp.shape(p)}, got one of shape {jnp.shape(rate)}."
            )

    jax.tree_util.tree_map_with_path(check, params, whole)
    return whole


def roots_of(rates: Rates, params: PyTree) -> PyTree:
    """√G, like the parameters."""
    return _roots(of_leaves(rates, params), params)


@jax.jit
def _roots(rates: PyTree, params: PyTree) -> PyTree:
    def root(p, rate):
        return jnp.broadcast_to(jnp.sqrt(rate.astype(p.dtype)), p.shape)

    return jax.tree.map(root, params, rates)


def check_kinks(penalty: AbstractPenalty, rates: Rates, params: PyTree) -> None:
    """Raises where a kink of the penalty couples parameters that may have more than one
    rate: there the element of least norm is another one in each metric."""
    kinked = [part for _, part in penalty.terms() if not part.smooth]
    for part in kinked:
        if absolute_weights(part, params) is not None:
            continue
        whole = of_leaves(rates, params)
        uneven = any(jnp.ndim(rate) > 0 for rate in jax.tree.leaves(whole))
        if uneven or not isinstance(part, AbstractByLeaf):
            raise ValueError(
                f"rates: the kinks of {type(part).__name__} couple the numbers of an "
                "array, so that it has one rate; give a number for each."
            )
