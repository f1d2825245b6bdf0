"""The largest curvature of the loss, which is what makes a flow stiff."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree, Scalar

from ..flow.flat import linearized
from ..flow.term import AbstractFlowTerm


@eqx.filter_jit
def hessian_norm(term: AbstractFlowTerm, params: PyTree) -> Float[Array, ""]:
    """L = ‖∇²F(θ₀)‖₂, from below, by power iteration until it changes by less than 1 %,
    20 times at most."""
    theta, unravel = ravel_pytree(params)
    gradient = jax.grad(lambda th: term.loss(term.model(unravel(th))))
    _, hvp, _ = linearized(gradient, theta)

    def iterate(carry):
        v, last, _, count = carry
        w = hvp(v)
        size = jnp.linalg.norm(w)
        v = w / jnp.maximum(size, jnp.finfo(w.dtype).tiny)
        return v, size, last, count + 1

    def unsettled(carry):
        _, size, last, count = carry
        return (jnp.abs(size - last) > 0.01 * size) & (count < 20)

    v = jr.normal(jr.key(0), theta.shape, theta.dtype)
    none = jnp.zeros((), theta.dtype)
    first = (v / jnp.linalg.norm(v), none + 1, none, 0)
    return jax.lax.while_loop(unsettled, iterate, first)[1]


def steps_at_the_limit(
    term: AbstractFlowTerm, models: PyTree, ts: Float[Array, " n"]
) -> Scalar:
    """∫L dt along n saved models, about the number of steps that an explicit method
    takes at its stability limit. L may change a lot from one to the next: its geometric
    mean is taken."""
    logs = jnp.log(jax.lax.map(lambda p: hessian_norm(term, p), models))
    steps = jnp.diff(ts, prepend=0.0)
    before = jnp.concatenate([logs[:1], logs[:-1]])
    return jnp.sum(steps * jnp.exp(0.5 * (before + logs)))
