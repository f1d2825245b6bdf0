"""Lanes that run in lockstep under `jax.vmap`, of which few need what is dear."""

import functools
from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, PyTree

Tree = TypeVar("Tree", bound=PyTree)

# Into how many groups lanes are divided: what is made at once, and up to so much more
# than is needed.
_GROUPS = 16


def where_needed(
    condition: Bool[Array, ""], make: Callable[[], Tree], old: Tree
) -> Tree:
    """`make()` where the condition holds, else `old`.

    In lockstep a `jax.lax.cond` that differs between lanes makes it for all of them,
    always. Here it is made for those that need it, a sixteenth of all lanes at a time:
    each lane pays for itself, and none depends on others.
    """
    made = eqx.filter_closure_convert(make)
    arrays, rest = eqx.partition((made, old), eqx.is_array)

    def one(arrays: PyTree) -> list[Array]:
        made, _ = eqx.combine(arrays, rest)
        return [jnp.asarray(x) for x in jax.tree.leaves(made())]

    def kept(arrays: PyTree) -> list[Array]:
        return jax.tree.leaves(arrays[1])

    @custom_vmap
    def chosen(condition: Bool[Array, ""], arrays: PyTree) -> list[Array]:
        return jax.lax.cond(condition, one, kept, arrays)

    @chosen.def_vmap
    def chosen_of_lanes(lanes: int, batched: list, condition: Array, arrays: PyTree):
        varies, along = batched
        if not varies:
            each = jax.vmap(one, (_axes(along),), axis_size=lanes)
            olds = functools.partial(_spread, along[1], lanes)
            out = jax.lax.cond(
                condition, each, lambda arrays: jax.tree.leaves(olds(arrays[1])), arrays
            )
        else:
            out = _in_groups(one, condition, arrays, along, lanes)
        return out, [True] * len(out)

    leaves = chosen(condition, arrays)
    return jax.tree.unflatten(jax.tree.structure(old), leaves)


def _axes(along: PyTree) -> PyTree:
    return jax.tree.map(lambda batched: 0 if batched else None, along)


def _spread(along: PyTree, lanes: int, values: PyTree) -> PyTree:
    """`values` with a leading axis for the lanes, `along` which some have one."""

    def spread(batched: bool, value: Array) -> Array:
        return value if batched else jnp.broadcast_to(value, (lanes, *value.shape))

    return jax.tree.map(spread, along, values)


def _in_groups(
    one: Callable, condition: Array, arrays: PyTree, along: PyTree, lanes: int
) -> list[Array]:
    """`one` of the lanes where the condition holds, group by group."""
    size = -(-lanes // _GROUPS)
    needy = jnp.sum(condition)
    # Those that need it first; what follows stands for no lane.
    order = jnp.argsort(~condition, stable=True)
    order = jnp.concatenate([order, jnp.full(size, lanes, order.dtype)])
    each = jax.vmap(one, (_axes(along),), axis_size=size)

    def group(carry: tuple[Array, list[Array]]) -> tuple[Array, list[Array]]:
        begin, out = carry
        picked = jax.lax.dynamic_slice_in_dim(order, begin, size)
        real = begin + jnp.arange(size) < needy

        def pick(batched: bool, value: Array) -> Array:
            return value[jnp.minimum(picked, lanes - 1)] if batched else value

        new = each(jax.tree.map(pick, along, arrays))
        to = jnp.where(real, picked, lanes)
        out = [o.at[to].set(n, mode="drop") for o, n in zip(out, new, strict=True)]
        return begin + size, out

    old = jax.tree.leaves(_spread(along[1], lanes, arrays[1]))
    start = (jnp.zeros_like(needy), old)
    return jax.lax.while_loop(lambda carry: carry[0] < needy, group, start)[1]
