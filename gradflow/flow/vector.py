"""The flow of a pytree of parameters as the flow of one vector."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree, Scalar

from ..penalties import (
    absolute_weights,
    AbstractAbsolute,
    AbstractComposite,
    AbstractCurved,
    AbstractPenalty,
    curvature,
    least_norm,
    smooth_gradient,
)
from .term import AbstractChart, FlowTerm


class Raveled(AbstractChart):
    """The state is that of another chart, as one vector."""

    static: PyTree
    chart: AbstractChart
    unravel: Callable[[Array], PyTree] = eqx.field(static=True)

    def place(self, params: Float[Array, " d"]) -> PyTree:
        return self.chart.place(self.unravel(params))

    def state(self, theta: PyTree) -> Float[Array, " d"]:
        return ravel_pytree(self.chart.state(theta))[0]

    def tangent(self, change: Float[Array, " d"]) -> PyTree:
        return self.chart.tangent(self.unravel(change))

    @property
    def roots(self) -> Float[Array, " d"] | None:
        return self.chart.roots


class OfVector(AbstractComposite, AbstractAbsolute, AbstractCurved):
    """A penalty of a pytree as one of a vector."""

    penalty: AbstractPenalty
    unravel: Callable[[Array], PyTree] = eqx.field(static=True)

    @property
    def kinked(self) -> bool:
        return not self.penalty.smooth

    @property
    def diagonal(self) -> bool:
        return self.penalty.separable

    def weighted(self) -> list[tuple[float | Scalar, AbstractPenalty]]:
        return [(1.0, self.penalty)]

    def __call__(self, params: Float[Array, " d"]) -> Scalar:
        return self.penalty(self.unravel(params))

    def gradient(self, params: Float[Array, " d"]) -> Float[Array, " d"]:
        return ravel_pytree(self.penalty.gradient(self.unravel(params)))[0]

    def curvature(self, params: Float[Array, " d"]) -> float | Array:
        rho = curvature(self.penalty, self.unravel(params))
        leaves = jax.tree.leaves(rho)
        even = len(leaves) == 1 and jnp.ndim(leaves[0]) == 0
        return leaves[0] if even else ravel_pytree(rho)[0]

    def least_norm(
        self,
        params: Float[Array, " d"],
        force: Float[Array, " d"],
        strength: float | Scalar,
    ) -> Float[Array, " d"]:
        least = least_norm(
            self.penalty, self.unravel(params), self.unravel(force), strength
        )
        return ravel_pytree(least)[0]

    def absolute_weights(self, params: Float[Array, " d"]) -> Float[Array, " d"] | None:
        weights = absolute_weights(self.penalty, self.unravel(params))
        return None if weights is None else ravel_pytree(weights)[0]

    def smooth_gradient(self, params: Float[Array, " d"]) -> Float[Array, " d"]:
        return ravel_pytree(smooth_gradient(self.penalty, self.unravel(params)))[0]


def on_vector(term: FlowTerm, params: PyTree) -> tuple[FlowTerm, Float[Array, " d"]]:
    """A flow and its start, with one vector for the state. A program is then as large
    for a model of many leaves as for one of few; with every leaf on its own, a quarter
    of the operations for a network of four leaves were their sizes alone.

    To be called inside a jitted function: it holds the closure that rebuilds the tree.
    """
    theta, unravel = ravel_pytree(params)
    chart = Raveled(term.static, term.chart, unravel)
    return FlowTerm(term.loss, OfVector(term.penalty, unravel), chart), theta
