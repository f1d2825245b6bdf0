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

    @property
    @abc.abstractmethod
    def curvature(self) -> float:
        """ρ such that ∇²R ≈ ρ I: what implicit solvers put in the stage equation.
        It changes how fast they converge, never what they converge to."""


class L2(AbstractPenalty):
    """R(θ) = ½‖θ‖², the sum over all trainable leaves; ∇R(θ) = θ."""

    def __call__(self, params: PyTree) -> Scalar:
        return 0.5 * jnp.asarray(sum(jnp.sum(p * p) for p in jax.tree.leaves(params)))

    def gradient(self, params: PyTree) -> PyTree:
        return params

    @property
    def curvature(self) -> float:
        return 1.0
