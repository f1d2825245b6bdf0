"""Deep linear networks."""

from functools import reduce

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._checks import check_ndim


class DeepLinear(eqx.Module):
    """f(x) = W_L ⋯ W_2 W_1 x, a product of L matrices.

    **Arguments:**

    - `weights`: (W_1, …, W_L), W_l of shape (d_l, d_{l−1}), the input's layer first.

    **Raises:** `ValueError` where there are none, or where their shapes do not chain.
    """

    weights: tuple[Float[Array, "*batch _ _"], ...]

    def __check_init__(self):
        if len(self.weights) == 0:
            raise ValueError("weights: expected at least one matrix.")
        for weight in self.weights:
            check_ndim(weight, "weights", 2)
        for before, after in zip(self.weights, self.weights[1:], strict=False):
            if after.shape[1] != before.shape[0]:
                raise ValueError(
                    f"weights: a layer of shape {after.shape} cannot follow one of "
                    f"shape {before.shape}."
                )

    @property
    def matrix(self) -> Float[Array, "*batch k d"]:
        """W_L ⋯ W_1; of a stack of models, the stack of matrices."""
        return reduce(lambda product, weight: weight @ product, self.weights)

    def __call__(self, x: Float[Array, " d"]) -> Float[Array, " k"]:
        return reduce(lambda h, weight: jnp.dot(weight, h), self.weights, x)
