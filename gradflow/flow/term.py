"""The right-hand side of the flow, as a Diffrax term."""

import abc

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree, Scalar

from .._typing import RealScalarLike
from ..losses import AbstractLoss
from ..penalties import AbstractPenalty, curvature
from ..penalties.base import AbstractComposite, AbstractCurved, AbstractKinked, pushed
from .decay import decay_at


class AbstractChart(eqx.Module):
    """How the parameters θ of a model are had from those of a state, and what of the
    model is not trained."""

    static: eqx.AbstractVar[PyTree]

    @abc.abstractmethod
    def place(self, params: PyTree) -> PyTree:
        """θ."""


class Flat(AbstractChart):
    """The state is θ itself."""

    static: PyTree

    def place(self, params: PyTree) -> PyTree:
        return params


class Sphere(AbstractChart):
    """Of parameters that are held at a norm w: those of a state φ are θ = wφ/‖φ‖.

    The plain flow of φ ↦ F(wφ/‖φ‖) from ‖φ‖ = w is the flow on the sphere itself: its
    gradient is tangent, so ‖φ‖ never changes. Every solver serves it as it is.
    """

    static: PyTree
    norm: Scalar

    def place(self, params: PyTree) -> PyTree:
        scale = self.norm / optax.tree.norm(params)
        return jax.tree.map(lambda p: scale * p, params)


class Tangential(AbstractComposite, AbstractCurved, AbstractKinked):
    """φ ↦ R(wφ/‖φ‖), whose gradient is tangent to the sphere."""

    penalty: AbstractPenalty
    sphere: Sphere

    def weighted(self) -> list[tuple[float | Scalar, AbstractPenalty]]:
        return [(1.0, self.penalty)]

    @property
    def kinked(self) -> bool:
        return not self.penalty.smooth

    @property
    def diagonal(self) -> bool:
        return False

    def __call__(self, params: PyTree) -> Scalar:
        return self.penalty(self.sphere.place(params))

    def gradient(self, params: PyTree) -> PyTree:
        theta, pull = jax.vjp(self.sphere.place, params)
        return pull(self.penalty.gradient(theta))[0]

    def least_norm(
        self, params: PyTree, force: PyTree, strength: float | Scalar
    ) -> PyTree:
        """That off the kinks of R, along which nothing is held at a norm."""
        return pushed(force, strength, self.gradient(params))

    def curvature(self, params: PyTree) -> float | PyTree:
        return curvature(self.penalty, self.sphere.place(params))


class AbstractFlowTerm(diffrax.AbstractTerm):
    """θ' = −∇F(θ) − λ∇R(θ) as a Diffrax term that knows its loss; `args` is the weight
    decay λ, or one on a schedule. What the state carries beside the parameters is for
    subclasses to say."""

    loss: eqx.AbstractVar[AbstractLoss]
    penalty: eqx.AbstractVar[AbstractPenalty]
    chart: eqx.AbstractVar[AbstractChart]

    @property
    def static(self) -> PyTree:
        """What of the model is not trained."""
        return self.chart.static

    def model(self, params: PyTree) -> PyTree:
        """The model with parameters `params`."""
        return eqx.combine(self.chart.place(params), self.chart.static)

    def velocity(self, params: PyTree, weight_decay: float | Scalar) -> PyTree:
        """θ' = −∇F(θ) − λ∇R(θ), a pytree like the parameters."""
        force = jax.grad(lambda p: self.loss(self.model(p)))(params)
        decay = self.penalty.gradient(params)
        return jax.tree.map(lambda f, r: -f - weight_decay * r, force, decay)

    def contr(
        self, t0: RealScalarLike, t1: RealScalarLike, **kwargs: PyTree
    ) -> RealScalarLike:
        return t1 - t0

    def prod(self, vf: PyTree, control: RealScalarLike) -> PyTree:
        return jax.tree.map(lambda v: v * control, vf)


class FlowTerm(AbstractFlowTerm):
    """The flow with the pytree of trainable parameters as its state. Made by
    `GradientFlow.term`."""

    loss: AbstractLoss
    penalty: AbstractPenalty
    chart: AbstractChart

    def vf(self, t: RealScalarLike, y: PyTree, args: PyTree) -> PyTree:
        return self.velocity(y, decay_at(args, t))


class Tracked(eqx.Module):
    """A state that carries the multiplier μ = ∇ℓ(z(θ)) along, found by a KKT solver
    together with θ. On the critical manifold μ is a small difference of large numbers,
    which θ alone gives with a far larger relative error."""

    params: PyTree
    multiplier: Float[Array, "*times m"]


class TrackedFlowTerm(AbstractFlowTerm):
    """The same flow with a `Tracked` state."""

    loss: AbstractLoss
    penalty: AbstractPenalty
    chart: AbstractChart

    def vf(self, t: RealScalarLike, y: Tracked, args: PyTree) -> Tracked:
        still = jnp.zeros_like(y.multiplier)
        return Tracked(self.velocity(y.params, decay_at(args, t)), still)
