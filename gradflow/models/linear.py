"""The linear model."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from ._checks import check_ndim


class LinearModel(eqx.Module):
    """f(x) = ⟨w, x⟩.

    **Arguments:**

    - `weights`: w, of shape (d,).

    **Raises:** `ValueError` where `weights` is not a vector.
    """

    weights: Float[Array, " *d"]

    def __check_init__(self):
        check_ndim(self.weights, "weights", 1)

    def __call__(self, x: Float[Array, " d"]) -> Scalar:
        return jnp.dot(self.weights, x)
