"""What the methods of `descent` are made of: optimisers, and the projection."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree, Scalar

from ._checks import is_concrete
from .flow import FlatLoss, flatten, FlowTerm
from .losses import SquaredError

Method = Literal["subgradient", "decoupled", "proximal", "projected"]
Optimiser: TypeAlias = (
    Callable[[Any], optax.GradientTransformation] | optax.GradientTransformation
)


def as_optimiser(
    optimiser: Optimiser, learning_rate: Scalar
) -> optax.GradientTransformation:
    """An optimiser that is given as a function of its learning rate, or ready."""
    return optimiser(learning_rate) if callable(optimiser) else optimiser


class Projection(eqx.Module):
    """The orthogonal projection onto {z(θ) = y}, where z is affine:
    θ − J⁺(z(θ) − y)."""

    flat: FlatLoss
    targets: Float[Array, " m"]
    inverse: Float[Array, "d m"]

    def __call__(self, params: PyTree) -> PyTree:
        theta, _ = ravel_pytree(params)
        away = self.flat.outputs(theta) - self.targets
        return self.flat.unravel(theta - self.inverse @ away)


def projection(term: FlowTerm, params: PyTree) -> Projection:
    """The projection onto the interpolants of a squared error.

    **Raises:** `ValueError` for another loss.
    """
    if not isinstance(term.loss, SquaredError):
        kind = type(term.loss).__name__
        raise ValueError(f"method: 'projected' needs a SquaredError, got {kind}.")
    theta, flat = flatten(term.loss, params, term.static)
    inverse = jnp.linalg.pinv(flat.jacobian(theta))
    return Projection(flat, term.loss.y.reshape(-1), inverse)


def check_projection(
    term: FlowTerm, params: PyTree, optimiser: Any, batch_size: int | None
) -> None:
    """Raises where there is nothing to project onto."""
    if optimiser is not None or batch_size is not None:
        raise ValueError("method: 'projected' takes no optimiser and no minibatches.")
    theta, _ = ravel_pytree(params)
    miss = _miss(term, params)
    if is_concrete(miss) and not miss <= 1e5 * jnp.finfo(theta.dtype).eps:
        raise ValueError(
            "method: 'projected' needs outputs that are affine in the parameters, and "
            f"data that they can fit; the projection misses by {float(miss):.1g}."
        )


@eqx.filter_jit
def _miss(term: FlowTerm, params: PyTree) -> Scalar:
    """‖z(Πθ) − y‖/‖y‖, from a θ that is not the one at which J was taken."""
    theta, unravel = ravel_pytree(params)
    away = jnp.cos(jnp.arange(theta.size, dtype=theta.dtype))
    project = projection(term, params)
    on = project(unravel(theta + away * (1 + jnp.max(jnp.abs(theta)))))
    left = project.flat.outputs(ravel_pytree(on)[0]) - project.targets
    size = jnp.linalg.norm(project.targets)
    return jnp.linalg.norm(left) / jnp.where(size > 0, size, 1.0)
