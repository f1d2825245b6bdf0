"""The right-hand side of the flow, as a Diffrax term."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree, Scalar

from .._typing import RealScalarLike
from ..losses import AbstractLoss
from ..penalties import AbstractPenalty


class Sphere(eqx.Module):
    """What is not trained of a model whose parameters are held at a norm w: those of a
    state φ are θ = wφ/‖φ‖.

    The plain flow of φ ↦ F(wφ/‖φ‖) from ‖φ‖ = w is the flow on the sphere itself: its
    gradient is tangent, so ‖φ‖ never changes. Every solver serves it as it is.
    """

    static: PyTree
    norm: Scalar

    def place(self, params: PyTree) -> PyTree:
        """θ."""
        scale = self.norm / optax.tree.norm(params)
        return jax.tree.map(lambda p: scale * p, params)


def place(params: PyTree, static: PyTree) -> tuple[PyTree, PyTree]:
    """The parameters of a model, and all the rest of it, from those of a state."""
    if isinstance(static, Sphere):
        return static.place(params), static.static
    return params, static


class Tangential(AbstractPenalty):
    """φ ↦ R(wφ/‖φ‖), whose gradient is tangent to the sphere."""

    penalty: AbstractPenalty
    sphere: Sphere

    @property
    def smooth(self) -> bool:
        return self.penalty.smooth

    def __call__(self, params: PyTree) -> Scalar:
        return self.penalty(self.sphere.place(params))

    def gradient(self, params: PyTree) -> PyTree:
        theta, pull = jax.vjp(self.sphere.place, params)
        return pull(self.penalty.gradient(theta))[0]

    def curvature(self, params: PyTree) -> float | PyTree:
        return self.penalty.curvature(self.sphere.place(params))

    def terms(self):
        return self.penalty.terms()


class FlowTerm(diffrax.AbstractTerm):
    """θ' = −∇F(θ) − λ∇R(θ) as a Diffrax term that knows its loss.

    The state is the pytree of trainable parameters; `args` is the weight decay λ. Made
    by `GradientFlow.term`.
    """

    loss: AbstractLoss
    penalty: AbstractPenalty
    static: PyTree

    def model(self, params: PyTree) -> PyTree:
        """The model with parameters `params`."""
        return eqx.combine(*place(params, self.static))

    def velocity(self, params: PyTree, weight_decay: float | Scalar) -> PyTree:
        """θ' = −∇F(θ) − λ∇R(θ), a pytree like the parameters."""
        force = jax.grad(lambda p: self.loss(self.model(p)))(params)
        decay = self.penalty.gradient(params)
        return jax.tree.map(lambda f, r: -f - weight_decay * r, force, decay)

    def vf(self, t: RealScalarLike, y: PyTree, args: PyTree) -> PyTree:
        return self.velocity(y, args)

    def contr(self, t0: Any, t1: Any, **kwargs: PyTree) -> Any:
        return t1 - t0

    def prod(self, vf: PyTree, control: RealScalarLike) -> PyTree:
        return jax.tree.map(lambda v: v * control, vf)


class Tracked(eqx.Module):
    """A state that carries the multiplier μ = ∇ℓ(z(θ)) along, found by a KKT solver
    together with θ. On the critical manifold μ is a small difference of large numbers,
    which θ alone gives with a far larger relative error."""

    params: PyTree
    multiplier: Float[Array, "*times m"]


class TrackedFlowTerm(FlowTerm):
    """The same flow with a `Tracked` state."""

    def vf(self, t: RealScalarLike, y: Tracked, args: PyTree) -> Tracked:
        return Tracked(super().vf(t, y.params, args), jnp.zeros_like(y.multiplier))
