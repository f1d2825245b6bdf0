"""Steps that follow what grows, however small it is beside θ."""

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._norms import norm
from ..flow.term import FlowTerm
from ..solvers.controllers import AbstractWrapped


class FollowGrowth(AbstractWrapped):
    """Refuses steps longer than 2 rtol^⅙/μ, where μ = d ln‖θ'‖/dt > 0 at their end.

    A flow that leaves a saddle starts below any tolerance relative to ‖θ‖, and there
    an implicit method damps whatever grows, in steps much longer than 1/μ: it would
    stay. In shorter ones a method of order five errs by about `rtol` of what grows.
    """

    controller: diffrax.AbstractAdaptiveStepSizeController
    term: FlowTerm

    def __init__(
        self, controller: diffrax.AbstractAdaptiveStepSizeController, term: FlowTerm
    ):
        self.controller, self.term = controller, term

    def init(self, *args):
        return self.controller.init(*args)

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        keep, next_t0, next_t1, jump, state, result = self.controller.adapt_step_size(
            t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
        )
        dtype = jnp.result_type(t1)
        rate = _growth(self.term, y1_candidate).astype(dtype)
        most = 2 * jnp.asarray(self.rtol, dtype) ** (1 / 6)
        far = keep & ((t1 - t0) * rate > most)
        next_t0 = jnp.where(far, t0, next_t0)
        # A bit shorter, so that the next one passes though μ has risen.
        longest = 0.8 * most / jnp.where(rate > 0, rate, 1)
        limited = jnp.isfinite(longest) & (rate > 0)
        next_t1 = jnp.where(limited, jnp.minimum(next_t1, next_t0 + longest), next_t1)
        return keep & ~far, next_t0, next_t1, jump & ~far, state, result


def _growth(term: FlowTerm, params: PyTree) -> Float[Array, ""]:
    """μ = d ln‖θ'‖/dt, or zero. Where all but rounding is at rest it is that of θ'/θ,
    to see what grows and is smaller than the rounding of other coordinates."""
    v, change, speed = change_of_speed(term, params)
    theta = jnp.abs(_flat(params))
    parts = jnp.where(theta > 0, v / jnp.where(theta > 0, theta, 1), 0)
    # Of norm one, so that no square underflows.
    parts = parts / jnp.maximum(norm(parts), jnp.finfo(v.dtype).tiny)
    weight = jnp.where(v != 0, parts / jnp.where(v != 0, v, 1), 0)
    rounding = 1000 * jnp.finfo(v.dtype).eps * norm(theta)
    resting = speed <= rounding * norm(change)
    hidden = jnp.where(resting, jnp.vdot(parts, weight * change), 0)
    return jnp.maximum(jnp.maximum(jnp.vdot(v, change), hidden), 0)


def _flat(tree: PyTree) -> Float[Array, " d"]:
    return jnp.concatenate([v.reshape(-1) for v in jax.tree.leaves(tree)])


def change_of_speed(
    term: FlowTerm, params: PyTree
) -> tuple[Float[Array, " d"], Float[Array, " d"], Float[Array, ""]]:
    """v = θ'/‖θ'‖ and −∇²F v, zero at rest; and ‖θ'‖."""

    def velocity(y: PyTree) -> PyTree:
        return term.velocity(y, 0.0)

    slope = velocity(params)
    speed = norm(slope)
    moving = (speed > 0) & jnp.isfinite(speed)
    unit = jax.tree.map(
        lambda v: jnp.where(moving, v / jnp.where(moving, speed, 1), 0), slope
    )
    _, change = jax.jvp(velocity, (params,), (unit,))
    return _flat(unit), _flat(change), speed


def timescale(term: FlowTerm, params: PyTree) -> Float[Array, ""]:
    """The time in which θ, or its velocity, changes by its own size, whichever is
    first; infinite at rest."""
    _, change, speed = change_of_speed(term, params)
    size = norm(params)
    moved = jnp.where(size > 0, speed / jnp.where(size > 0, size, 1), 0)
    fastest = jnp.maximum(moved, norm(change))
    known = (fastest > 0) & jnp.isfinite(fastest)
    return jnp.where(known, 1 / jnp.where(known, fastest, 1), jnp.inf)
