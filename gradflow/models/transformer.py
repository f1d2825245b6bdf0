"""A small decoder-only transformer without layer normalisation."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ._checks import check_sizes


class Attention(eqx.Module):
    """Causal self-attention of h heads, without biases: Σ_heads O softmax(QKᵀ/√k) V,
    where a position sees itself and those before."""

    query: Float[Array, "h k d"]
    key: Float[Array, "h k d"]
    value: Float[Array, "h k d"]
    output: Float[Array, "h d k"]

    def project(self, x: Float[Array, "*n d"]) -> "Projections":
        """Q, K and V of each x."""
        of = lambda weights: jnp.einsum("hkd,...d->...hk", weights, x)
        return of(self.query), of(self.key), of(self.value)

    def mix(self, projections: "Projections", m: int) -> Float[Array, "m d"]:
        """The attention at the last m of n positions, from Q, K and V at all."""
        q, k, v = projections
        n, size = k.shape[0], k.shape[2]
        scores = jnp.einsum("nhk,mhk->nmh", q[-m:], k) / size**0.5
        seen = jnp.tril(jnp.ones((n, n), bool))[-m:, :, None]
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=1)
        mixed = jnp.einsum("nmh,mhk->nhk", weights, v)
        # One product of matrices, which on a CPU is faster than a sum over heads.
        output = jnp.moveaxis(self.output, 1, 2).reshape(-1, self.output.shape[1])
        return mixed.reshape(m, -1) @ output


Projections = tuple[
    Float[Array, "*n h k"], Float[Array, "*n h k"], Float[Array, "*n h k"]
]


class Block(eqx.Module):
    """x + attention(x), then the same with a ReLU network of one hidden layer; at the
    last m positions."""

    attention: Attention
    inner: Float[Array, "w d"]
    inner_bias: Float[Array, " w"]
    outer: Float[Array, "d w"]
    outer_bias: Float[Array, " d"]

    def __call__(
        self, x: Float[Array, "n d"], projections: Projections, m: int
    ) -> Float[Array, "m d"]:
        x = x[-m:] + self.attention.mix(projections, m)
        hidden = jax.nn.relu(x @ self.inner.T + self.inner_bias[None])
        return x + hidden @ self.outer.T + self.outer_bias[None]


class Transformer(eqx.Module):
    """Logits for the symbol that follows a few others.

    Learned embeddings of symbols and of positions; blocks of causal attention and of a
    ReLU layer, each added to its input; no layer normalisation; an unembedding that is
    not tied. It is the network of Liu, Michaud, Tegmark, arXiv 2210.01117, figure 7,
    and before them of Nanda et al., arXiv 2301.05217.

    Initial weights are Gaussian with standard deviation 1/√width, the unembedding's
    1/√symbols, and biases are zero.
    """

    embedding: Float[Array, "symbols d"]
    positions: Float[Array, "n d"]
    blocks: tuple[Block, ...]
    unembedding: Float[Array, "symbols d"]

    def __init__(
        self,
        *,
        symbols: int,
        length: int = 3,
        layers: int = 1,
        width: int = 128,
        heads: int = 4,
        hidden: int = 512,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `symbols`: how many there are, in and out.
        - `length`: at most so many are read.
        - `layers`: blocks.
        - `width`: numbers at each position; a multiple of `heads`.
        - `heads`: of each attention, of `width`/`heads` numbers each.
        - `hidden`: ReLU neurons of each block.
        - `key`: of the initial weights.

        **Raises:** `ValueError` where a size makes no sense.
        """
        check_sizes(
            symbols=symbols, length=length, layers=layers, width=width, heads=heads,
            hidden=hidden,
        )  # fmt: skip
        if width % heads:
            raise ValueError(f"heads: expected a divisor of {width}, got {heads}.")
        keys = iter(jr.split(key, 3 + 6 * layers))
        normal = lambda *shape, fan: jr.normal(next(keys), shape) / fan**0.5
        size = width // heads
        self.embedding = normal(symbols, width, fan=width)
        self.positions = normal(length, width, fan=width)
        self.unembedding = normal(symbols, width, fan=symbols)
        self.blocks = tuple(
            Block(
                Attention(
                    query=normal(heads, size, width, fan=width),
                    key=normal(heads, size, width, fan=width),
                    value=normal(heads, size, width, fan=width),
                    output=normal(heads, width, size, fan=width),
                ),
                normal(hidden, width, fan=width),
                jnp.zeros(hidden),
                normal(width, hidden, fan=width),
                jnp.zeros(width),
            )
            for _ in range(layers)
        )

    def at_each(self, symbols: Int[Array, " n"]) -> Float[Array, "n symbols"]:
        """The logits at every position, each of which depends on the symbols up to it
        alone."""
        return self._last(symbols, symbols.shape[0])

    def __call__(self, symbols: Int[Array, " n"]) -> Float[Array, " symbols"]:
        """The logits at the last position."""
        return self._last(symbols, 1)[0]

    def _last(self, symbols: Int[Array, " n"], m: int) -> Float[Array, "m symbols"]:
        """Of the last block only what is asked for is computed: a third of it, for
        three symbols. What the first block reads depends on a symbol and its place
        alone: Q, K and V are those of all symbols at all places, once for all
        sequences, of which each takes its own."""
        n = symbols.shape[0]
        places = jnp.arange(n)
        every = self.embedding[:, None] + self.positions[None, :n]
        x = every[symbols, places]
        projections = tuple(
            z[symbols, places] for z in self.blocks[0].attention.project(every)
        )
        for block, following in itertools.pairwise(self.blocks):
            x = block(x, projections, n)
            projections = following.attention.project(x)
        return self.blocks[-1](x, projections, m) @ self.unembedding.T
