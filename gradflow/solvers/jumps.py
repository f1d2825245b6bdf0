"""Where the curvature of a loss jumps, as that of Huber's and of a hinge does."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._norms import norm
from ..flow.flat import AbstractFlatLoss
from ..flow.term import AbstractFlowTerm
from ..losses import Huber
from ..margin_losses import Hinge
from ..penalties import Moreau


def curvature_jumps(term: AbstractFlowTerm) -> bool:
    """Whether ∇²F or ∇²R has jumps, of which the flow crosses many."""
    parts = (part for _, part in term.penalty.terms())
    jumps = isinstance(term.loss, Huber | Hinge)
    return jumps or any(isinstance(p, Moreau) for p in parts)


JUMPED = 2.0  # by which errors at a jump of the curvature may exceed what is seen

# Halvings after which a difference that is left is a jump; what is left of it then; and
# by how much it stands out from the differences beside it, as rounding does not.
_HALVINGS = 20
_JUMP = 2.0**-10
_ABOVE = 10.0
_RESOLVED = 64  # the roundings of θ to which the way is halved at most


def find_jumps(
    loss: AbstractFlatLoss,
    one: Float[Array, " d"],
    two: Float[Array, " d"],
    mu: Float[Array, " m"],
    asked: Bool[Array, ""],
) -> Bool[Array, ""]:
    """Whether J or ∇ℓ has a jump between two points: halving the way between them, on
    the side where most changes, leaves as much of the change. Of a smooth loss it
    leaves 2⁻²⁰, or rounding: that is as large on the way before and behind. Nothing is
    computed unless `asked`."""

    def slopes(y):
        z, pull = jax.vjp(loss.outputs, y)
        return pull(mu)[0], jax.grad(loss.outer)(z)

    def apart(a, b):
        def share(u, v):
            return norm(u - v) / jnp.maximum(norm(u), norm(v))

        return sum(jnp.nan_to_num(share(u, v)) for u, v in zip(a, b, strict=True))

    def halve(carry):
        count, low, high, at_low, at_high, first, _ = carry
        middle = 0.5 * (low + high)
        at = slopes(middle)
        below, above = apart(at_low, at), apart(at, at_high)
        left = below > above

        def pick(a, b):
            return jax.tree.map(lambda a, b: jnp.where(left, a, b), a, b)

        low, high = pick((low, middle), (middle, high))
        at_low, at_high = pick((at_low, at), (at, at_high))
        change = jnp.maximum(below, above)
        first = jnp.where(count == 0, change, first)
        return count + 1, low, high, at_low, at_high, first, change

    zero = jnp.zeros((), one.dtype)
    nothing = (jnp.zeros_like(one), jnp.zeros_like(mu))
    ends = jax.lax.cond(
        asked, lambda: (slopes(one), slopes(two)), lambda: (nothing, nothing)
    )
    count = jnp.where(asked, 0, _HALVINGS)
    start = (count, one, two, *ends, zero, zero)
    # Between neighbouring numbers rounding is all there is, and jumps.
    resolved = _RESOLVED * jnp.finfo(one.dtype).eps * norm(one)

    def apart_yet(s):
        return (s[0] < _HALVINGS) & (norm(s[2] - s[1]) > resolved)

    out = jax.lax.while_loop(apart_yet, halve, start)
    _, low, high, _, _, first, change = out
    left = asked & (change > _JUMP * first)

    def stands_out():
        """The change between the ends, from those on equal lengths to either side."""
        at = jnp.array([-3.0, -1.0, 0.0, 1.0, 2.0, 4.0], low.dtype)[:, None]
        points = jax.lax.map(slopes, low[None] + at * (high - low)[None])
        near = [jax.tree.map(lambda s, i=i: s[i], points) for i in range(6)]
        changes = [apart(u, v) for u, v in zip(near, near[1:], strict=False)]
        beside = jnp.max(jnp.stack(changes[:2] + changes[3:]))
        return changes[2] > _ABOVE * beside

    return jax.lax.cond(left, stands_out, lambda: left)
