"""Penalties R(θ) on the trainable parameters."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree, Scalar


class AbstractPenalty(eqx.Module):
    """A smooth penalty R: a function of the trainable parameters, a pytree."""

    @abc.abstractmethod
    def __call__(self, params: PyTree) -> Scalar:
        """R(θ)."""

    @abc.abstractmethod
    def gradient(self, params: PyTree) -> PyTree:
        """∇R(θ), a pytree like `params`."""

    def curvature(self, params: PyTree) -> float | PyTree:
        """What the KKT solvers put for ∇²R(θ) in the stage equation: a number ρ where
        ∇²R ≈ ρ I, or the diagonal of ∇²R, a pytree like `params`, where it is large and
        uneven (then the tangent kernel is made anew every step). It changes how fast
        they converge, never what they converge to. The default is 0: not stiff."""
        del params
        return 0.0


class L2(AbstractPenalty):
    """R(θ) = ½‖θ‖², the sum over all trainable leaves; ∇R(θ) = θ."""

    def __call__(self, params: PyTree) -> Scalar:
        return 0.5 * jnp.asarray(sum(jnp.sum(p * p) for p in jax.tree.leaves(params)))

    def gradient(self, params: PyTree) -> PyTree:
        return params

    def curvature(self, params: PyTree) -> float:
        return 1.0
