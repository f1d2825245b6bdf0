"""What every penalty R(θ) can do."""

import abc
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree, Scalar

if TYPE_CHECKING:
    from .combine import Scaled, Sum


class AbstractPenalty(eqx.Module):
    """A penalty R: a function of the trainable parameters θ, a pytree.

    Penalties add up and scale: `L1() + 0.5 * L2()`.
    """

    @property
    def smooth(self) -> bool:
        """Whether R is differentiable everywhere."""
        return True

    @property
    def separable(self) -> bool:
        """Whether R is a sum of functions of one coordinate each."""
        return False

    @abc.abstractmethod
    def __call__(self, params: PyTree) -> Scalar:
        """R(θ)."""

    @abc.abstractmethod
    def gradient(self, params: PyTree) -> PyTree:
        """∇R(θ), a pytree like `params`; where R has a kink, the subgradient of least
        norm."""

    def least_norm(
        self, params: PyTree, force: PyTree, strength: float | Scalar
    ) -> PyTree:
        """The element of least norm of v + c∂R(θ).

        It is minus the velocity of the flow with forces v = ∇F: where a kink of R is
        stronger than v, the parameters stay on it.

        **Arguments:**

        - `params`: θ.
        - `force`: v, a pytree like `params`.
        - `strength`: c ≥ 0.
        """
        slope = self.gradient(params)
        return jax.tree.map(lambda v, g: v + strength * g, force, slope)

    def prox(self, params: PyTree, step: float | Scalar) -> PyTree:
        """The proximal map, argmin_u R(u) + ‖u − θ‖²/(2h): an implicit step of size h
        along −∂R (Parikh and Boyd, Proximal Algorithms, 2014).

        **Arguments:**

        - `params`: θ.
        - `step`: h > 0.

        **Raises:** `NotImplementedError` where none is known in closed form.
        """
        raise NotImplementedError(
            f"penalty: {type(self).__name__} has no proximal map in closed form."
        )

    def absolute_weights(self, params: PyTree) -> PyTree | None:
        """Where all kinks of R come from a part Σᵢ wᵢ|θᵢ|, its weights w ≥ 0, a pytree
        like `params`; `None` where R has no kinks, or others."""
        del params
        return None

    def smooth_gradient(self, params: PyTree) -> PyTree:
        """∇S(θ), S = R − Σ wᵢ|θᵢ| with the weights of `absolute_weights`; ∇R where it
        has none."""
        weights, slope = self.absolute_weights(params), self.gradient(params)
        if weights is None:
            return slope
        return jax.tree.map(lambda g, w, x: g - w * jnp.sign(x), slope, weights, params)

    def curvature(self, params: PyTree) -> float | PyTree:
        """What the KKT solvers put for ∇²R(θ) in the stage equation: a number ρ where
        ∇²R ≈ ρ I, or the diagonal of ∇²R, a pytree like `params`, where it is large and
        uneven (then the tangent kernel is made anew every step). It changes how fast
        they converge, never what they converge to. The default is 0: not stiff."""
        del params
        return 0.0

    def lipschitz(self, params: PyTree) -> float:
        """L with |R(θ) − R(θ')| ≤ L‖θ − θ'‖ for all parameters shaped as `params`;
        infinite where there is none, or none is known."""
        del params
        return float("inf")

    def terms(self) -> list[tuple[float | Scalar, "AbstractPenalty"]]:
        """R as a weighted sum: weights, and penalties that are not sums."""
        return [(1.0, self)]

    def __add__(self, other: "AbstractPenalty") -> "Sum":
        from .combine import Sum  # which is made of penalties

        return Sum(self, other)

    def __mul__(self, scale: int | float | Scalar) -> "Scaled":
        from .combine import Scaled

        return Scaled(scale, self)

    def __rmul__(self, scale: int | float | Scalar) -> "Scaled":
        return self * scale


class AbstractOwnGradient(AbstractPenalty):
    """A penalty that JAX differentiates to its `gradient`, kinks or not."""

    @abc.abstractmethod
    def value(self, params: PyTree) -> Scalar:
        """R(θ), by a formula whose derivatives are of no account."""

    def __call__(self, params: PyTree) -> Scalar:
        return _value(self, params)


@eqx.filter_custom_jvp
def _value(penalty: AbstractOwnGradient, params: PyTree) -> Scalar:
    return penalty.value(params)


@_value.def_jvp
def _(primals, tangents):
    (penalty, params), (_, change) = primals, tangents
    slopes, tree = jax.tree.flatten(penalty.gradient(params))
    changes = tree.flatten_up_to(change)
    value = _value(penalty, params)
    slope = jnp.zeros_like(value)
    for g, d in zip(slopes, changes, strict=True):
        if d is not None:
            slope = slope + jnp.sum(g * d)
    return value, slope
