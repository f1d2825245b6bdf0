"""A loss seen from one orthant of θ, on which ℓ1 is linear."""

from typing import Any

import jax
import jax.numpy as jnp
from diffrax import AbstractTerm
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree, Scalar

from ..flow.flat import AbstractFlatLoss, FlatOpaqueLoss, flatten_on
from ..flow.term import AbstractFlowTerm, Tracked
from ..losses import AbstractCompositeLoss
from ..penalties import (
    absolute_weights,
    AbstractCurved,
    AbstractPenalty,
    curvature,
    smooth_gradient,
)
from .kernel import DENSE_LIMIT

HELD = 1e30  # the curvature that stands for a coordinate held at zero


class OnOrthant(AbstractCurved):
    """A penalty R = S + Σ wᵢ|θᵢ| where each coordinate has a known sign σᵢ, which makes
    it smooth, S + Σ wᵢσᵢθᵢ; where σᵢ = 0 the coordinate is held at zero."""

    penalty: AbstractPenalty
    sign: Float[Array, " d"]

    def __call__(self, params: PyTree) -> Scalar:
        return self.penalty(params)

    @property
    def diagonal(self) -> bool:
        return False

    def gradient(self, params: PyTree) -> PyTree:
        smooth, unravel = ravel_pytree(smooth_gradient(self.penalty, params))
        weights, _ = ravel_pytree(absolute_weights(self.penalty, params))
        free = jnp.abs(self.sign)
        return unravel(free * (smooth + weights * self.sign))

    def curvature(self, params: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(params)
        rho = ravel_pytree(curvature(self.penalty, params))[0].astype(flat.dtype)
        rho = jnp.broadcast_to(rho, flat.shape)
        return unravel(jnp.where(self.sign == 0, HELD, rho))


def only_holds(penalty: AbstractPenalty, params: PyTree) -> bool:
    """Whether its curvature is that of the coordinates held at zero and nothing else:
    then it is the same for all step sizes."""
    if not isinstance(penalty, OnOrthant):
        return False
    rest = curvature(penalty.penalty, params)
    return isinstance(rest, float) and rest == 0.0


def unwrap(terms: AbstractTerm, y: PyTree) -> tuple[AbstractFlowTerm, PyTree]:
    """The flow's own term, and the parameters in its state."""
    term: Any = terms
    while not isinstance(term, AbstractFlowTerm):  # Diffrax wraps terms
        term = term.term
    return term, y.params if isinstance(y, Tracked) else y


def flat_problem(
    term: AbstractFlowTerm, params: PyTree
) -> tuple[Float[Array, " d"], AbstractFlatLoss]:
    """θ, and its loss: a composite one, or one taken as such."""
    theta, loss = flatten_on(term.loss, params, term.chart)
    if isinstance(term.loss, AbstractCompositeLoss):
        return theta, loss
    if theta.size > DENSE_LIMIT:
        raise ValueError(
            f"solver: KKT needs a composite loss for {theta.size} parameters, got "
            f"{type(term.loss).__name__}, whose Hessian it would factorise (up to "
            f"{DENSE_LIMIT} parameters); give it as SquaredError, CrossEntropy or other"
            " composite losses, or take RKC2."
        )
    return theta, FlatOpaqueLoss(loss.loss, loss.chart, loss.unravel)


def tracked_gradient(term: AbstractFlowTerm, y: Tracked) -> PyTree:
    """∇F, by the multiplier: on the critical manifold it is as small as λ."""
    theta, loss = flat_problem(term, y.params)
    _, pull = jax.vjp(loss.outputs, theta)
    return loss.unravel(pull(y.multiplier)[0])
