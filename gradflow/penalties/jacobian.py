"""Penalties on the derivatives of the model with respect to its inputs."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

from .._checks import check_finite
from .base import AbstractKinked, AbstractOwnGradient, pushed


class Sobolev(AbstractOwnGradient, AbstractKinked):
    """R(θ) = meanᵢ ‖∂f/∂x(xᵢ) − Jᵢ‖_F², plus meanᵢ ‖f(xᵢ) − vᵢ‖² where values v are
    given: the distance of the model from a function in the Sobolev sense (Czarnecki et
    al., 2017). With `root`, the square root of the sum over samples, in place of their
    mean, as in the code of Notsawo, Dumas and Rabusseau (arXiv 2506.05718).

    For piecewise linear networks ∂f/∂x jumps in θ where a sample crosses a kink; the
    gradient is that almost everywhere.
    """

    x: Float[Array, " n *inputs"]
    target: Array | None
    values: Array | None
    static: PyTree
    root: bool = eqx.field(static=True)

    def __init__(
        self,
        model: Callable,
        x: Float[Array, " n *inputs"],
        *,
        target: Array | None = None,
        values: Array | None = None,
        root: bool = False,
        trainable: PyTree = eqx.is_inexact_array,
    ):
        """**Arguments:**

        - `model`: f, a function of one sample. All but its parameters is kept.
        - `x`: inputs, n samples on the first axis. They need no labels.
        - `target`: Jᵢ, of shape (n, outputs…, inputs…); zero unless given.
        - `values`: vᵢ, of shape (n, outputs…); no such term unless given.
        - `root`: whether to take the square root of the sum over samples.
        - `trainable`: as given to the flow.

        **Raises:** `ValueError` where shapes do not fit, or where data are not finite.
        """
        self.static = eqx.partition(model, trainable)[1]
        self.x = jnp.asarray(x)
        self.root = root
        if self.x.ndim == 0 or self.x.shape[0] == 0:
            raise ValueError("x: expected at least one sample on the first axis.")
        check_finite(self.x, "x")
        outputs = eqx.filter_eval_shape(jax.vmap(model), self.x).shape
        self.target = _checked(target, "target", outputs + self.x.shape[1:])
        self.values = _checked(values, "values", outputs)

    @property
    def kinked(self) -> bool:
        return self.root

    def jacobian(self, params: PyTree) -> Array:
        """∂f/∂x at every sample for the parameters `params`, of shape (n, outputs…,
        inputs…)."""
        model = eqx.combine(params, self.static)
        outputs = jax.eval_shape(jax.vmap(model), self.x).size
        derivative = jax.jacrev if outputs <= self.x.size else jax.jacfwd
        return jax.vmap(derivative(model))(self.x)

    def _squares(self, params: PyTree) -> Scalar:
        """Σᵢ ‖∂f/∂x(xᵢ) − Jᵢ‖_F² + ‖f(xᵢ) − vᵢ‖²."""
        gap = self.jacobian(params)
        gap = gap if self.target is None else gap - self.target
        total = jnp.sum(gap * gap)
        if self.values is None:
            return total
        miss = jax.vmap(eqx.combine(params, self.static))(self.x) - self.values
        return total + jnp.sum(miss * miss)

    def value(self, params: PyTree) -> Scalar:
        total = self._squares(params)
        return jnp.sqrt(total) if self.root else total / self.x.shape[0]

    def gradient(self, params: PyTree) -> PyTree:
        total, slope = jax.value_and_grad(self._squares)(params)
        if not self.root:
            return jax.tree.map(lambda g: g / self.x.shape[0], slope)
        size = jnp.sqrt(total)
        half = jnp.where(size > 0, 0.5 / jnp.where(size > 0, size, 1), 0)
        return jax.tree.map(lambda g: half * g, slope)

    def least_norm(
        self, params: PyTree, force: PyTree, strength: float | Scalar
    ) -> PyTree:
        """`force` + `strength` ∇R at `params`: that off the kink, which is where
        R = 0."""
        return pushed(force, strength, self.gradient(params))


def _checked(given: Array | None, name: str, shape: tuple[int, ...]) -> Array | None:
    if given is None:
        return None
    given = jnp.asarray(given)
    if given.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {given.shape}.")
    check_finite(given, name)
    return given
