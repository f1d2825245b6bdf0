"""A network on pairs of symbols."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ._checks import check_ndim


class PairProduct(eqx.Module):
    """f(a, b) = C ReLU(B vec(L_a R_b)): each of two symbols is a k × k matrix, and the
    matrices are multiplied. Nothing has a bias.

    It is the network that Notsawo, Dumas and Rabusseau (arXiv 2506.05718) train on
    modular addition, as in their code (their text has one embedding for both symbols,
    an entrywise product, and biases).

    **Arguments:**

    - `left`, `right`: the symbols' matrices, row by row, of shapes (p, k²), (q, k²).
    - `inner`: B, of shape (h, k²).
    - `outer`: C, of shape (c, h) for c logits.

    **Raises:** `ValueError` where the shapes do not fit.
    """

    left: Float[Array, "*batch _ _"]
    right: Float[Array, "*batch _ _"]
    inner: Float[Array, "*batch _ _"]
    outer: Float[Array, "*batch _ _"]

    def __check_init__(self):
        for name in ("left", "right", "inner", "outer"):
            check_ndim(getattr(self, name), name, 2)
        size = self.left.shape[1]
        if _side(size) ** 2 != size:
            raise ValueError(
                f"left: expected a square number of columns, got {size}: a row is a "
                "square matrix."
            )
        for name in ("right", "inner"):
            if getattr(self, name).shape[1] != size:
                raise ValueError(
                    f"{name}: expected {size} columns as left has, got shape "
                    f"{getattr(self, name).shape}."
                )
        if self.outer.shape[1] != self.inner.shape[0]:
            raise ValueError(
                f"outer: expected {self.inner.shape[0]} columns as inner has rows, got "
                f"shape {self.outer.shape}."
            )

    def __call__(self, pair: Int[Array, "2"]) -> Float[Array, " c"]:
        k = _side(self.left.shape[1])

        def matrix(table, symbol):
            return table[symbol].reshape(k, k)

        product = matrix(self.left, pair[0]) @ matrix(self.right, pair[1])
        hidden = jax.nn.relu(jnp.dot(self.inner, product.reshape(-1)))
        return jnp.dot(self.outer, hidden)


def _side(size: int) -> int:
    return round(size**0.5)
