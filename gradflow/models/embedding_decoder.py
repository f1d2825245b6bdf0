"""Two symbols, added in the space that they are embedded in."""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ._checks import check_sizes


def _leaky_relu(x: Array) -> Array:
    # The slope is a weak scalar: of the precision of the weights, whatever that is.
    return jnp.where(x >= 0, x, 0.2 * x)


_ACTIVATIONS = {"relu": jax.nn.relu, "leaky_relu": _leaky_relu}


class EmbeddingDecoder(eqx.Module):
    """f(i, j) = D(Eᵢ + Eⱼ), with embeddings E and a decoder D of two hidden layers.

    The network of Liu, Michaud, Tegmark, arXiv 2210.01117, figure 6, after Liu et al.,
    arXiv 2205.10343. The paper has ReLUs, its code leaky ones of slope 0.2. Weights and
    biases of the decoder start uniform within ±1/√(inputs of the layer).
    """

    embedding: Float[Array, "*batch p d"]
    decoder: eqx.nn.MLP

    def __init__(
        self,
        embedding: Float[Array, "p d"],
        *,
        outputs: int = 30,
        width: int = 200,
        activation: Literal["relu", "leaky_relu"] = "leaky_relu",
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `embedding`: E, of shape (symbols, dimension).
        - `outputs`: numbers that are decoded.
        - `width`: of both hidden layers.
        - `activation`: `"relu"` or `"leaky_relu"`.
        - `key`: of the decoder's initial weights.

        **Raises:** `ValueError` where a size makes no sense, or for another activation.
        """
        check_sizes(outputs=outputs, width=width)
        if embedding.ndim != 2:
            raise ValueError(f"embedding: expected 2 axes, got {embedding.shape}.")
        if activation not in _ACTIVATIONS:
            expected = " or ".join(map(repr, _ACTIVATIONS))
            raise ValueError(f"activation: expected {expected}, got {activation!r}.")
        bend = _ACTIVATIONS[activation]
        size = embedding.shape[1]
        self.embedding = embedding
        self.decoder = eqx.nn.MLP(size, outputs, width, 2, bend, key=key)

    def __call__(self, pair: Int[Array, "2"]) -> Float[Array, " outputs"]:
        """f(i, j)."""
        return self.decoder(jnp.sum(self.embedding[pair], axis=0))

    def only_decoder(self) -> PyTree[bool]:
        """The filter for `GradientFlow(trainable=...)` that holds the embedding
        fixed."""
        chosen = jax.tree.map(eqx.is_inexact_array, self)
        return eqx.tree_at(lambda m: m.embedding, chosen, False)


def messy_embedding(
    key: PRNGKeyArray,
    *,
    symbols: int = 10,
    dimension: int = 2,
    messiness: float | Float[Array, ""] = 0.0,
) -> Float[Array, "symbols dimension"]:
    """E = m E_random + (1 − m) E_linear, for the messiness m.

    The linear embedding has the symbols evenly from −1 to 1 along the first coordinate,
    which makes sums of symbols sums of vectors, and other coordinates uniform in
    ±0.3; the random one is uniform in ±1.

    **Arguments:**

    - `key`: of both; the same for all m.
    - `symbols`, `dimension`: the shape.
    - `messiness`: m, from 0 to 1.

    **Returns:** E.

    **Raises:** `ValueError` where a size makes no sense.
    """
    check_sizes(symbols=symbols, dimension=dimension)
    random_key, linear_key = jr.split(key)

    def uniform(k, n):
        return jr.uniform(k, (symbols, n), minval=-1.0)

    line = jnp.linspace(-1, 1, symbols)[:, None]
    linear = jnp.concatenate([line, 0.3 * uniform(linear_key, dimension - 1)], axis=1)
    return messiness * uniform(random_key, dimension) + (1 - messiness) * linear
