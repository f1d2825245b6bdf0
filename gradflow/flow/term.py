"""The right-hand side of the flow, as a Diffrax term."""

import abc

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree, Scalar

from .._norms import as_vector
from .._typing import RealScalarLike
from ..losses import AbstractLoss
from ..penalties import (
    absolute_weights,
    AbstractAbsolute,
    AbstractComposite,
    AbstractCurved,
    AbstractKinked,
    AbstractPenalty,
    curvature,
    least_norm,
    smooth_gradient,
)
from ..penalties.base import pushed
from .decay import decay_at


class AbstractChart(eqx.Module):
    """How the parameters θ of a model are had from those of a state, and what of the
    model is not trained."""

    static: eqx.AbstractVar[PyTree]

    @abc.abstractmethod
    def place(self, params: PyTree) -> PyTree:
        """θ."""

    @abc.abstractmethod
    def state(self, theta: PyTree) -> PyTree:
        """A state with the parameters θ."""

    @abc.abstractmethod
    def tangent(self, change: PyTree) -> PyTree:
        """How θ changes where a state that `state` made changes so."""

    @property
    @abc.abstractmethod
    def roots(self) -> Float[Array, " d"] | None:
        """By what each number of a state is multiplied to be that of θ; `None` where
        norms of states are those of parameters."""


class Flat(AbstractChart):
    """The state is θ itself."""

    static: PyTree

    def place(self, params: PyTree) -> PyTree:
        return params

    def state(self, theta: PyTree) -> PyTree:
        return theta

    def tangent(self, change: PyTree) -> PyTree:
        return change

    @property
    def roots(self) -> None:
        return None


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

    def state(self, theta: PyTree) -> PyTree:
        return theta

    def tangent(self, change: PyTree) -> PyTree:
        return change

    @property
    def roots(self) -> None:
        return None


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


class Stretched(AbstractChart):
    """Of parameters with rates G of their own: those of a state φ are θ = √G φ.

    The plain flow of φ ↦ F(√G φ) + λR(√G φ) is θ' = −G(∇F + λ∇R). Its curvature is
    √G ∇²F √G, its kernel J G Jᵀ; lengths and angles of φ are those of θ in the metric
    G⁻¹. Every solver serves it as it is, and all that is known of plain flows holds.
    """

    static: PyTree
    root: PyTree
    """√G, like the parameters."""

    def place(self, params: PyTree) -> PyTree:
        return _times(self.root, params)

    def state(self, theta: PyTree) -> PyTree:
        return _over(theta, self.root)

    def tangent(self, change: PyTree) -> PyTree:
        return self.place(change)

    @property
    def roots(self) -> Float[Array, " d"]:
        return as_vector(self.root)


@jax.jit
def _times(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(jnp.multiply, a, b)


@jax.jit
def _over(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(jnp.divide, a, b)


class OfStretched(AbstractComposite, AbstractAbsolute, AbstractCurved):
    """φ ↦ R(√G φ)."""

    penalty: AbstractPenalty
    chart: Stretched

    def weighted(self) -> list[tuple[float | Scalar, AbstractPenalty]]:
        return [(1.0, self.penalty)]

    @property
    def kinked(self) -> bool:
        return not self.penalty.smooth

    @property
    def diagonal(self) -> bool:
        return self.penalty.separable

    def __call__(self, params: PyTree) -> Scalar:
        return self.penalty(self.chart.place(params))

    def gradient(self, params: PyTree) -> PyTree:
        return self.chart.place(self.penalty.gradient(self.chart.place(params)))

    def least_norm(
        self, params: PyTree, force: PyTree, strength: float | Scalar
    ) -> PyTree:
        """√G times that of θ: the least in any norm, where what a kink couples has one
        rate."""
        place, force = self.chart.place, self.chart.state(force)
        return place(least_norm(self.penalty, place(params), force, strength))

    def curvature(self, params: PyTree) -> float | PyTree:
        rho = curvature(self.penalty, self.chart.place(params))
        if isinstance(rho, float) and rho == 0.0:
            return rho
        leaves, tree = jax.tree.flatten(self.chart.root)
        like = jax.tree.leaves(rho)
        if len(like) == 1 and jnp.ndim(like[0]) == 0:
            like = like * len(leaves)
        pairs = zip(leaves, like, strict=True)
        return tree.unflatten([root * root * one for root, one in pairs])

    def absolute_weights(self, params: PyTree) -> PyTree | None:
        weights = absolute_weights(self.penalty, self.chart.place(params))
        return None if weights is None else self.chart.place(weights)

    def smooth_gradient(self, params: PyTree) -> PyTree:
        slope = smooth_gradient(self.penalty, self.chart.place(params))
        return self.chart.place(slope)


class AbstractFlowTerm(diffrax.AbstractTerm):
    """θ' = −∇F(θ) − λ∇R(θ) as a Diffrax term that knows its loss; `args` is the weight
    decay λ, or one on a schedule. The state is that of a `chart`; what it carries
    beside is for subclasses to say."""

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
    """F, of the model."""
    penalty: AbstractPenalty
    """R, of the state."""
    chart: AbstractChart
    """How the parameters of the model are had from the state."""

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
