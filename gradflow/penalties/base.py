"""What a penalty R is; sums and multiples of penalties."""

import abc
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Scalar

from .._checks import is_concrete

LeafMap = tuple[float, Callable[[Array, float | Scalar], Array] | None]
"""Of a function of one leaf, ½b‖x‖² + r(x): b, and the proximal map of r (of x and a
step), `None` where r = 0."""


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

    def leaf_maps(self, params: PyTree) -> list[LeafMap] | None:
        """Where R is a sum of functions of one leaf each, with proximal maps known:
        these, for each leaf of `params` in JAX's order; otherwise `None`."""
        del params
        return None

    def terms(self) -> list[tuple[float | Scalar, "AbstractPenalty"]]:
        """R as a weighted sum: weights, and penalties that are not sums."""
        return [(1.0, self)]

    def __add__(self, other: "AbstractPenalty") -> "Sum":
        return Sum(self, other)

    def __mul__(self, scale: int | float | Scalar) -> "Scaled":
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


class Sum(AbstractPenalty):
    """R(θ) = R₁(θ) + R₂(θ) + …, made by `R1 + R2`.

    Its `gradient` and `least_norm` are those of least norm where no leaf has two parts
    with a kink; where one has, they are elements of the sum of the subdifferentials.
    """

    parts: tuple[AbstractPenalty, ...]

    def __init__(self, *parts: AbstractPenalty):
        """**Arguments:**

        - `parts`: R₁, R₂, …, one or more.

        **Raises:** `ValueError` where there is none, or one is no penalty.
        """
        if not parts:
            raise ValueError("parts: expected one penalty or more, got none.")
        for part in parts:
            if not isinstance(part, AbstractPenalty):
                raise ValueError(
                    f"parts: expected penalties, got {type(part).__name__}."
                )
        self.parts = parts

    @property
    def smooth(self) -> bool:
        return all(part.smooth for part in self.parts)

    @property
    def separable(self) -> bool:
        return all(part.separable for part in self.parts)

    def __call__(self, params: PyTree) -> Scalar:
        return jnp.asarray(sum(part(params) for part in self.parts))

    def gradient(self, params: PyTree) -> PyTree:
        return self.least_norm(params, jax.tree.map(jnp.zeros_like, params), 1.0)

    def least_norm(
        self, params: PyTree, force: PyTree, strength: float | Scalar
    ) -> PyTree:
        # What is smooth is a force to what has kinks.
        for part in sorted(self.parts, key=lambda part: not part.smooth):
            force = part.least_norm(params, force, strength)
        return force

    def prox(self, params: PyTree, step: float | Scalar) -> PyTree:
        """The proximal map, where each leaf has at most one part beside multiples of
        `L2`: prox of R + ½b‖·‖² with step h is that of R at θ/(1 + hb), with step
        h/(1 + hb).

        **Raises:** `NotImplementedError` otherwise.
        """
        leaves, tree = jax.tree.flatten(params)
        ridge: list = [0.0] * len(leaves)
        others: list[list] = [[] for _ in leaves]
        for weight, part in self.terms():
            maps = part.leaf_maps(params)
            if maps is None:
                return super().prox(params, step)
            for i, (b, prox) in enumerate(maps):
                ridge[i] = ridge[i] + weight * b
                if prox is not None:
                    others[i].append((weight, prox, type(part).__name__))
        if any(len(here) > 1 for here in others):
            names = sorted({name for here in others for *_, name in here})
            raise NotImplementedError(
                "penalty: two parts act on the same leaves, and their sum has no "
                f"proximal map in closed form: {', '.join(names)}."
            )
        out = []
        for x, b, here in zip(leaves, ridge, others, strict=True):
            shrink = 1 + step * b
            x = x / shrink
            for weight, prox, _ in here:
                x = prox(x, weight * step / shrink)
            out.append(x)
        return tree.unflatten(out)

    def absolute_weights(self, params: PyTree) -> PyTree | None:
        kinked = [part for part in self.parts if not part.smooth]
        weights = [part.absolute_weights(params) for part in kinked]
        if not weights or any(w is None for w in weights):
            return None
        return jax.tree.map(lambda *w: sum(w), *weights)

    def smooth_gradient(self, params: PyTree) -> PyTree:
        # Not from the gradient: where a coordinate is zero, what is left of ∇S there
        # has been taken out by the kink.
        parts = [part.smooth_gradient(params) for part in self.parts]
        return jax.tree.map(lambda *g: sum(g), *parts)

    def curvature(self, params: PyTree) -> float | PyTree:
        return _add([part.curvature(params) for part in self.parts], params)

    def lipschitz(self, params: PyTree) -> float:
        return sum(part.lipschitz(params) for part in self.parts)

    def terms(self):
        return [term for part in self.parts for term in part.terms()]


class Scaled(AbstractPenalty):
    """c R(θ), made by `c * R`."""

    scale: float | Scalar
    penalty: AbstractPenalty

    def __init__(self, scale: int | float | Scalar, penalty: AbstractPenalty):
        """**Arguments:**

        - `scale`: c, a number that is not negative.
        - `penalty`: R.

        **Raises:** `ValueError` for any other c.
        """
        if is_concrete(scale):
            value = np.asarray(scale)
            if value.shape != () or not np.isfinite(value) or value < 0:
                raise ValueError(f"scale: expected a number from 0 on, got {scale!r}.")
        self.scale = float(scale) if isinstance(scale, int) else scale
        self.penalty = penalty

    @property
    def smooth(self) -> bool:
        return self.penalty.smooth

    @property
    def separable(self) -> bool:
        return self.penalty.separable

    def __call__(self, params: PyTree) -> Scalar:
        return self.scale * self.penalty(params)

    def gradient(self, params: PyTree) -> PyTree:
        return jax.tree.map(lambda g: self.scale * g, self.penalty.gradient(params))

    def least_norm(
        self, params: PyTree, force: PyTree, strength: float | Scalar
    ) -> PyTree:
        return self.penalty.least_norm(params, force, self.scale * strength)

    def prox(self, params: PyTree, step: float | Scalar) -> PyTree:
        return self.penalty.prox(params, self.scale * step)

    def absolute_weights(self, params: PyTree) -> PyTree | None:
        weights = self.penalty.absolute_weights(params)
        return jax.tree.map(lambda w: self.scale * w, weights)

    def smooth_gradient(self, params: PyTree) -> PyTree:
        slope = self.penalty.smooth_gradient(params)
        return jax.tree.map(lambda g: self.scale * g, slope)

    def curvature(self, params: PyTree) -> float | PyTree:
        return jax.tree.map(lambda c: self.scale * c, self.penalty.curvature(params))

    def lipschitz(self, params: PyTree) -> float:
        return float(self.scale) * self.penalty.lipschitz(params)

    def terms(self):
        return [(self.scale * c, part) for c, part in self.penalty.terms()]


def _add(curvatures: list, params: PyTree) -> float | PyTree:
    """Their sum: a number where all are, otherwise a pytree like `params`."""
    tree = jax.tree.structure(params)
    uneven = [c for c in curvatures if jax.tree.structure(c) == tree and not _number(c)]
    even = sum(c for c in curvatures if _number(c))
    if not uneven:
        return even
    return jax.tree.map(lambda x, *c: sum(c, jnp.zeros_like(x)) + even, params, *uneven)


def _number(curvature: PyTree) -> bool:
    return eqx.is_array_like(curvature) and jnp.ndim(curvature) == 0
