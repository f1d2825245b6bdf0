"""Steps that follow what grows, however small it is beside θ."""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._controllers import AbstractWrapped
from .._norms import norm
from ..flow import FlowTerm


class FollowGrowth(AbstractWrapped):
    """Refuses steps longer than 2 rtol^⅙/μ, where μ = d ln‖θ'‖/dt > 0 at their end.

    A flow that leaves a saddle starts below any tolerance relative to ‖θ‖, and there
    an implicit method damps whatever grows, in steps much longer than 1/μ: it would
    stay. In shorter ones a method of order five errs by about `rtol` of what grows.
    """

    controller: diffrax.AbstractAdaptiveStepSizeController
    term: FlowTerm

    def init(self, *args):
        return self.controller.init(*args)

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        keep, next_t0, next_t1, jump, state, result = self.controller.adapt_step_size(
            t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
        )
        unit, change, _ = change_of_speed(self.term, y1_candidate)
        rate = jnp.maximum(jnp.vdot(unit, change), 0).astype(t1.dtype)
        most = 2 * jnp.asarray(self.rtol, t1.dtype) ** (1 / 6)
        far = keep & ((t1 - t0) * rate > most)
        next_t0 = jnp.where(far, t0, next_t0)
        # A bit shorter, so that the next one passes though μ has risen.
        longest = 0.8 * most / jnp.where(rate > 0, rate, 1)
        limited = jnp.isfinite(longest) & (rate > 0)
        next_t1 = jnp.where(limited, jnp.minimum(next_t1, next_t0 + longest), next_t1)
        return keep & ~far, next_t0, next_t1, jump & ~far, state, result


def change_of_speed(
    term: FlowTerm, params: PyTree
) -> tuple[Float[Array, " d"], Float[Array, " d"], Float[Array, ""]]:
    """v = θ'/‖θ'‖ and −∇²F v, zero at rest; and ‖θ'‖."""
    velocity = lambda y: term.velocity(y, 0.0)
    slope = velocity(params)
    speed = norm(slope)
    moving = (speed > 0) & jnp.isfinite(speed)
    unit = jax.tree.map(
        lambda v: jnp.where(moving, v / jnp.where(moving, speed, 1), 0), slope
    )
    _, change = jax.jvp(velocity, (params,), (unit,))
    flat = lambda tree: jnp.concatenate([v.reshape(-1) for v in jax.tree.leaves(tree)])
    return flat(unit), flat(change), speed


def first_step(term: FlowTerm, params: PyTree, end: Any) -> Float[Array, ""]:
    """A thousandth of the time in which θ, or its velocity, changes by its own size; a
    millionth of `end` at rest."""
    _, change, speed = change_of_speed(term, params)
    fastest = jnp.maximum(
        jnp.where(norm(params) > 0, speed / norm(params), 0), norm(change)
    )
    known = (fastest > 0) & jnp.isfinite(fastest)
    step = 1e-3 / jnp.where(known, fastest, 1)
    return jnp.where(known, jnp.minimum(step, 1e-3 * end), 1e-6 * end)
