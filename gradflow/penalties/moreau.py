"""The Moreau envelope: a penalty with its kinks rounded off."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree, Scalar

from .._checks import is_concrete
from .base import (
    AbstractCurved,
    AbstractLipschitz,
    AbstractOwnGradient,
    AbstractPenalty,
    AbstractProximal,
    lipschitz,
    prox,
)


class Moreau(AbstractOwnGradient, AbstractCurved, AbstractProximal, AbstractLipschitz):
    """R_ε(θ) = min_u R(u) + ‖u − θ‖²/(2ε), the smooth envelope of a convex penalty R.

    Its gradient is (θ − prox_{εR}(θ))/ε, of Lipschitz constant 1/ε. Where R itself has
    the Lipschitz constant L, 0 ≤ R − R_ε ≤ εL²/2 (Bauschke and Combettes, Convex
    Analysis and Monotone Operator Theory, chapter 12). The flow with R_ε is stiff, at a
    rate of λ/ε; what R sets to zero, it leaves at a distance of order ε.
    """

    penalty: AbstractPenalty
    epsilon: float | Scalar

    def __init__(self, penalty: AbstractPenalty, epsilon: float | Scalar):
        """**Arguments:**

        - `penalty`: R, with a proximal map in closed form.
        - `epsilon`: ε > 0, in units of ‖θ‖²/R: for ℓ1, the half width of the zone in
            which |θᵢ| is rounded off.

        **Raises:** `ValueError` where ε is not positive, or R has no proximal map.
        """
        if is_concrete(epsilon):
            value = np.asarray(epsilon)
            if value.shape != () or not 0 < value < float("inf"):
                raise ValueError(
                    f"epsilon: expected a positive number, got {epsilon!r}."
                )
        for _, part in penalty.terms():
            if not isinstance(part, AbstractProximal):
                raise ValueError(
                    "penalty: expected one with a proximal map, got "
                    f"{type(part).__name__}."
                )
        self.penalty = penalty
        self.epsilon = epsilon

    @property
    def diagonal(self) -> bool:
        return self.penalty.separable

    def value(self, params: PyTree) -> Scalar:
        nearest = prox(self.penalty, params, self.epsilon)
        away = jax.tree.map(lambda x, u: jnp.sum((x - u) ** 2), params, nearest)
        total = sum(jax.tree.leaves(away))
        return self.penalty(nearest) + total / (2 * self.epsilon)

    def gradient(self, params: PyTree) -> PyTree:
        nearest = prox(self.penalty, params, self.epsilon)
        return jax.tree.map(lambda x, u: (x - u) / self.epsilon, params, nearest)

    def prox(self, params: PyTree, step: float | Scalar) -> PyTree:
        """θ + h/(h + ε) (prox_{(h+ε)R}(θ) − θ), of the parameters `params` with h the
        `step`."""
        total = step + self.epsilon
        far = prox(self.penalty, params, total)
        return jax.tree.map(lambda x, u: x + step / total * (u - x), params, far)

    def curvature(self, params: PyTree) -> float | PyTree:
        """The diagonal of ∇²R_ε at `params` where R is separable (for ℓ1, 1/ε where
        |θᵢ| < ε, zero elsewhere). Otherwise 1/(2ε), half way between the least and the
        most it can be: with it the solvers' iteration contracts whatever ∇²R_ε is."""
        if not self.diagonal:
            return 0.5 / self.epsilon
        ones = jax.tree.map(jnp.ones_like, params)
        return jax.jvp(self.gradient, (params,), (ones,))[1]

    def lipschitz(self, params: PyTree) -> float:
        return lipschitz(self.penalty, params)

    def error(self, params: PyTree) -> float | Scalar:
        """εL²/2, which R − R_ε never exceeds for parameters shaped as `params`;
        infinite where R has no Lipschitz constant."""
        return 0.5 * self.epsilon * self.lipschitz(params) ** 2
