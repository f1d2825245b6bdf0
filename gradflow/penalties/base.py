"""What a penalty R is; sums and multiples of penalties."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Scalar

from .._checks import is_concrete


class AbstractPenalty(eqx.Module):
    """A penalty R: a function of the trainable parameters θ, a pytree.

    Penalties add up and scale: `L1() + 0.5 * L2()`. One of your own that is smooth and
    not stiff has a value and a gradient, no more. What else may be known of one is
    declared by the classes below: `AbstractCurved`, `AbstractKinked`,
    `AbstractProximal`, `AbstractLipschitz`.
    """

    @abc.abstractmethod
    def __call__(self, params: PyTree) -> Scalar:
        """R(θ) at θ = `params`."""

    @abc.abstractmethod
    def gradient(self, params: PyTree) -> PyTree:
        """∇R(θ), a pytree like `params`; where R has a kink, the subgradient of least
        norm."""

    @property
    def smooth(self) -> bool:
        """Whether R is differentiable everywhere."""
        return not (isinstance(self, AbstractKinked) and self.kinked)

    @property
    def separable(self) -> bool:
        """Whether R is known to be a sum of functions of one coordinate each."""
        return isinstance(self, AbstractCurved) and self.diagonal

    def terms(self) -> list[tuple[float | Scalar, "AbstractPenalty"]]:
        """R as a weighted sum: weights, and penalties that are not sums."""
        if not isinstance(self, AbstractComposite):
            return [(1.0, self)]
        return [
            (weight * inner, part)
            for weight, whole in self.weighted()
            for inner, part in whole.terms()
        ]

    def __add__(self, other: "AbstractPenalty") -> "Sum":
        return Sum(self, other)

    def __mul__(self, scale: int | float | Scalar) -> "Scaled":
        return Scaled(scale, self)

    def __rmul__(self, scale: int | float | Scalar) -> "Scaled":
        return self * scale


class AbstractCurved(AbstractPenalty):
    """A penalty that tells its curvature, as one must that is stiff."""

    @property
    @abc.abstractmethod
    def diagonal(self) -> bool:
        """Whether R is a sum of functions of one coordinate each, and `curvature` all
        of ∇²R. Where not, the solvers differentiate `gradient` when they need ∇²R."""

    @abc.abstractmethod
    def curvature(self, params: PyTree) -> float | PyTree:
        """What the KKT solvers put for ∇²R(θ) in the stage equation: a number ρ where
        ∇²R ≈ ρ I, or the diagonal of ∇²R, a pytree like `params`, where it is large and
        uneven (then the tangent kernel is made anew every step). It changes how fast
        they converge, never what they converge to."""


class AbstractKinked(AbstractPenalty):
    """A penalty that is not differentiable everywhere."""

    @property
    @abc.abstractmethod
    def kinked(self) -> bool:
        """Whether this one has kinks: a sum of smooth penalties has none."""

    @abc.abstractmethod
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


class AbstractAbsolute(AbstractKinked):
    """A penalty R = S + Σ wᵢ|θᵢ|, w ≥ 0, S smooth: its kinks are at coordinates that
    are zero, and the KKT solvers follow a flow along them."""

    @abc.abstractmethod
    def absolute_weights(self, params: PyTree) -> PyTree | None:
        """w, a pytree like `params`; `None` where this one has no kinks, or others."""

    @abc.abstractmethod
    def smooth_gradient(self, params: PyTree) -> PyTree:
        """∇S at `params`; ∇R where there are no weights."""


class AbstractProximal(AbstractPenalty):
    """A penalty with a proximal map in closed form."""

    @abc.abstractmethod
    def prox(self, params: PyTree, step: float | Scalar) -> PyTree:
        """The proximal map, argmin_u R(u) + ‖u − θ‖²/(2h): an implicit step of size h
        along −∂R (Parikh and Boyd, Proximal Algorithms, 2014).

        **Arguments:**

        - `params`: θ.
        - `step`: h > 0.
        """


class AbstractByLeaf(AbstractProximal):
    """A penalty Σ r(leaf), each term with a proximal map."""

    @abc.abstractmethod
    def acts_on(self, params: PyTree) -> list[bool]:
        """Which of the leaves of `params`, in JAX's order, R depends on."""

    @abc.abstractmethod
    def leaf_prox(self, x: Array, step: float | Scalar) -> Array:
        """argmin_u r(u) + ‖u − `x`‖²/(2 `step`), an array like `x`."""


class AbstractRidge(AbstractByLeaf):
    """A penalty ½‖·‖² of some leaves, which any other with a proximal map can be added
    to."""


class AbstractLipschitz(AbstractPenalty):
    """A penalty that tells its Lipschitz constant."""

    @abc.abstractmethod
    def lipschitz(self, params: PyTree) -> float:
        """L with |R(θ) − R(θ')| ≤ L‖θ − θ'‖ for all parameters shaped as `params`;
        infinite where there is none, or none is known."""


class AbstractComposite(AbstractPenalty):
    """A penalty that is made of others."""

    @abc.abstractmethod
    def weighted(self) -> list[tuple[float | Scalar, AbstractPenalty]]:
        """What it is made of, and with which weights."""


# Of any penalty, whatever it declares.

_DECLARED = {
    "curvature": AbstractCurved,
    "absolute_weights": AbstractAbsolute,
    "prox": AbstractProximal,
    "lipschitz": AbstractLipschitz,
}


def check_declared(penalty: AbstractPenalty) -> None:
    """Raises where a penalty has a method that nobody would ask it for, since its class
    does not say so."""
    for _, part in penalty.terms():
        for method, base in _DECLARED.items():
            if hasattr(part, method) and not isinstance(part, base):
                raise ValueError(
                    f"penalty: {type(part).__name__} has `{method}`, which counts only "
                    f"in a subclass of gradflow.penalties.{base.__name__}."
                )


def least_norm(
    penalty: AbstractPenalty, params: PyTree, force: PyTree, strength: float | Scalar
) -> PyTree:
    """The element of least norm of v + c∂R(θ), see `AbstractKinked`."""
    if isinstance(penalty, AbstractKinked):
        return penalty.least_norm(params, force, strength)
    return pushed(force, strength, penalty.gradient(params))


def pushed(force: PyTree, strength: float | Scalar, slope: PyTree) -> PyTree:
    """v + c∇R, where R has no kink."""
    return jax.tree.map(lambda v, g: v + strength * g, force, slope)


def absolute_weights(penalty: AbstractPenalty, params: PyTree) -> PyTree | None:
    """Where all kinks of R come from a part Σᵢ wᵢ|θᵢ|, its weights w ≥ 0; `None` where
    R has no kinks, or others."""
    if isinstance(penalty, AbstractAbsolute):
        return penalty.absolute_weights(params)
    return None


def smooth_gradient(penalty: AbstractPenalty, params: PyTree) -> PyTree:
    """∇S(θ), S = R − Σ wᵢ|θᵢ| with the weights of `absolute_weights`; ∇R where it has
    none."""
    if isinstance(penalty, AbstractAbsolute):
        return penalty.smooth_gradient(params)
    return penalty.gradient(params)


def curvature(penalty: AbstractPenalty, params: PyTree) -> float | PyTree:
    """What stands for ∇²R(θ), see `AbstractCurved`; 0 where that is not told."""
    return penalty.curvature(params) if isinstance(penalty, AbstractCurved) else 0.0


def lipschitz(penalty: AbstractPenalty, params: PyTree) -> float:
    """The Lipschitz constant of R, infinite where that is not told."""
    if isinstance(penalty, AbstractLipschitz):
        return penalty.lipschitz(params)
    return float("inf")


def prox(penalty: AbstractPenalty, params: PyTree, step: float | Scalar) -> PyTree:
    """The proximal map of R, see `AbstractProximal`.

    **Raises:** `NotImplementedError` where none is known in closed form.
    """
    if isinstance(penalty, AbstractProximal):
        return penalty.prox(params, step)
    raise NotImplementedError(
        f"penalty: {type(penalty).__name__} has no proximal map in closed form."
    )


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


class _AbstractAlgebra(
    AbstractComposite,
    AbstractAbsolute,
    AbstractCurved,
    AbstractProximal,
    AbstractLipschitz,
):
    """Penalties made of others know of themselves what those do."""

    @property
    def kinked(self) -> bool:
        return any(not part.smooth for _, part in self.weighted())

    @property
    def diagonal(self) -> bool:
        return all(part.separable for _, part in self.weighted())


class Sum(_AbstractAlgebra):
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

    def weighted(self) -> list[tuple[float | Scalar, AbstractPenalty]]:
        return [(1.0, part) for part in self.parts]

    def __call__(self, params: PyTree) -> Scalar:
        return jnp.asarray(sum(part(params) for part in self.parts))

    def gradient(self, params: PyTree) -> PyTree:
        return self.least_norm(params, jax.tree.map(jnp.zeros_like, params), 1.0)

    def least_norm(
        self, params: PyTree, force: PyTree, strength: float | Scalar
    ) -> PyTree:
        # What is smooth is a force to what has kinks.
        for part in sorted(self.parts, key=lambda part: not part.smooth):
            force = least_norm(part, params, force, strength)
        return force

    def prox(self, params: PyTree, step: float | Scalar) -> PyTree:
        """The proximal map at θ = `params` with h = `step`, where each leaf has at most
        one part beside multiples of `L2`: prox of R + ½b‖·‖² with step h is that of R
        at θ/(1 + hb), with step h/(1 + hb).

        **Raises:** `NotImplementedError` otherwise.
        """
        leaves, tree = jax.tree.flatten(params)
        ridge: list[float | Scalar] = [0.0] * len(leaves)
        others: list[list[tuple[float | Scalar, AbstractByLeaf]]] = [[] for _ in leaves]
        for weight, part in self.terms():
            if not isinstance(part, AbstractByLeaf):
                raise NotImplementedError(
                    "penalty: Sum has no proximal map in closed form."
                )
            for i, on in enumerate(part.acts_on(params)):
                if on and isinstance(part, AbstractRidge):
                    ridge[i] = ridge[i] + weight
                elif on:
                    others[i].append((weight, part))
        if any(len(here) > 1 for here in others):
            names = sorted({type(part).__name__ for here in others for _, part in here})
            raise NotImplementedError(
                "penalty: two parts act on the same leaves, and their sum has no "
                f"proximal map in closed form: {', '.join(names)}."
            )
        out = []
        for x, b, here in zip(leaves, ridge, others, strict=True):
            shrink = 1 + step * b
            x = x / shrink
            for weight, part in here:
                x = part.leaf_prox(x, weight * step / shrink)
            out.append(x)
        return tree.unflatten(out)

    def absolute_weights(self, params: PyTree) -> PyTree | None:
        kinked = [part for part in self.parts if not part.smooth]
        weights = [absolute_weights(part, params) for part in kinked]
        if not weights or any(w is None for w in weights):
            return None
        return jax.tree.map(lambda *w: sum(w), *weights)

    def smooth_gradient(self, params: PyTree) -> PyTree:
        # Not from the gradient: where a coordinate is zero, what is left of ∇S there
        # has been taken out by the kink.
        parts = [smooth_gradient(part, params) for part in self.parts]
        return jax.tree.map(lambda *g: sum(g), *parts)

    def curvature(self, params: PyTree) -> float | PyTree:
        return _add([curvature(part, params) for part in self.parts], params)

    def lipschitz(self, params: PyTree) -> float:
        return sum(lipschitz(part, params) for part in self.parts)


class Scaled(_AbstractAlgebra):
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

    def weighted(self) -> list[tuple[float | Scalar, AbstractPenalty]]:
        return [(self.scale, self.penalty)]

    def __call__(self, params: PyTree) -> Scalar:
        return self.scale * self.penalty(params)

    def gradient(self, params: PyTree) -> PyTree:
        return jax.tree.map(lambda g: self.scale * g, self.penalty.gradient(params))

    def least_norm(
        self, params: PyTree, force: PyTree, strength: float | Scalar
    ) -> PyTree:
        return least_norm(self.penalty, params, force, self.scale * strength)

    def prox(self, params: PyTree, step: float | Scalar) -> PyTree:
        return prox(self.penalty, params, self.scale * step)

    def absolute_weights(self, params: PyTree) -> PyTree | None:
        weights = absolute_weights(self.penalty, params)
        return jax.tree.map(lambda w: self.scale * w, weights)

    def smooth_gradient(self, params: PyTree) -> PyTree:
        slope = smooth_gradient(self.penalty, params)
        return jax.tree.map(lambda g: self.scale * g, slope)

    def curvature(self, params: PyTree) -> float | PyTree:
        return jax.tree.map(lambda c: self.scale * c, curvature(self.penalty, params))

    def lipschitz(self, params: PyTree) -> float:
        return float(self.scale) * lipschitz(self.penalty, params)


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
