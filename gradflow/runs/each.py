"""A function of each of many states, or the mean of one over a few."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._host import platform as host_platform
from ..flow.flat import in_blocks
from ..flow.operations import numbers, operations


def mean_over(fn: Callable[[PyTree], Array], points: tuple[PyTree, ...]) -> Array:
    """The mean of a function over some points."""
    if len(points) == 1:
        return fn(points[0])
    arrays, rest = eqx.partition(points[0], eqx.is_array)
    arrays = jax.tree.map(
        lambda *x: jnp.stack(x),
        arrays,
        *(eqx.filter(p, eqx.is_array) for p in points[1:]),
    )
    return jnp.mean(jax.lax.map(lambda x: fn(eqx.combine(x, rest)), arrays), axis=0)


# What `jax.vmap` would make more of, or has no rule for.
_APART = (
    "while", "cond", "pure_callback", "io_callback",
    "cholesky", "eig", "eigh", "lu", "qr", "geqrf", "schur", "svd", "triangular_solve",
)  # fmt: skip


def of_each(
    fn: Callable[[PyTree], PyTree], states: PyTree, platform: str | None = None
) -> PyTree:
    """`fn` of each of the saved states. On an accelerator of many at once, where each
    would be too little work for a launch; one by one on a CPU, which gains nothing,
    and where `fn` has loops that end on a condition, branches, factorisations or calls
    of Python."""
    if (platform or host_platform()) == "cpu":
        return jax.lax.map(fn, states)
    first = jax.tree.map(lambda y: y[0], states)
    kinds = {e.primitive.name for e in operations(jax.make_jaxpr(fn)(first))}
    if kinds.intersection(_APART):
        return jax.lax.map(fn, states)
    return in_blocks(fn, states, numbers(fn, first))
