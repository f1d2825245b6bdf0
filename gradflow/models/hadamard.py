"""Linear models whose coefficients are products of L vectors."""

import functools
import operator

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar


class HadamardProduct(eqx.Module):
    """f(x) = ⟨A₁ ⊙ ⋯ ⊙ A_L, x⟩, a linear model of depth L.

    Depth alone, without a penalty and from a small start, favours sparse coefficients;
    at L = 1 it is a linear model. Where two factors are equal up to their sign, no flow
    changes the sign of their product: start from factors that differ.

    **Arguments:**

    - `factors`: A, of shape (L, d).

    **Raises:** `ValueError` where there is no factor, or no vector.
    """

    factors: Float[Array, "*batch L d"]

    def __check_init__(self):
        if self.factors.ndim < 2 or self.factors.shape[-2] == 0:
            raise ValueError(
                f"factors: expected shape (L, d), L ≥ 1, got {self.factors.shape}."
            )

    @property
    def beta(self) -> Float[Array, "*batch d"]:
        """The coefficients A₁ ⊙ ⋯ ⊙ A_L."""
        depth = self.factors.shape[-2]
        each = [self.factors[..., k, :] for k in range(depth)]
        return functools.reduce(operator.mul, each)

    def __call__(self, x: Float[Array, " d"]) -> Scalar:
        return jnp.dot(self.beta, x)
