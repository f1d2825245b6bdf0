"""A small decoder-only transformer without layer normalisation."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ._checks import check_sizes

_FEW_SYMBOLS = 512  # of more, projecting all costs more than a few sequences


class Attention(eqx.Module):
    """Causal self-attention of h heads, without biases: Σ_heads O softmax(QKᵀ/√k) V,
    where a position sees itself and those before."""

    query: Float[Array, "h k d"]
    key: Float[Array, "h k d"]
    value: Float[Array, "h k d"]
    output: Float[Array, "h d k"]

    def project(self, x: Float[Array, "n d"], m: int) -> "Projections":
        """Q at the last m of n positions, K and V at all: linear in x."""

        def of(weights, x):
            return jnp.einsum("hkd,nd->nhk", weights, x)

        q = of(self.query, x[x.shape[0] - m :])
        return q, of(self.key, x), of(self.value, x)

    def mix(self, projections: "Projections") -> Float[Array, "m d"]:
        """The attention at the last m of n positions."""
        q, k, v = projections
        m, n, size = q.shape[0], k.shape[0], k.shape[2]
        scores = jnp.einsum("nhk,mhk->nmh", q, k) / size**0.5
        seen = jnp.tril(jnp.ones((m, n), bool), n - m)[:, :, None]
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=1)
        mixed = jnp.einsum("nmh,mhk->nhk", weights, v)
        # One product of matrices, which on a CPU is faster than a sum over heads.
        output = jnp.moveaxis(self.output, 1, 2).reshape(-1, self.output.shape[1])
        return mixed.reshape(m, output.shape[0]) @ output


Projections = tuple[Float[Array, "m h k"], Float[Array, "n h k"], Float[Array, "n h k"]]


class Block(eqx.Module):
    """x + attention(x), then the same with a network of one hidden layer; at the last m
    positions."""

    attention: Attention
    inner: Float[Array, "w d"]
    inner_bias: Float[Array, " w"]
    outer: Float[Array, "d w"]
    outer_bias: Float[Array, " d"]
    activation: Callable[[Array], Array] = eqx.field(static=True)

    def __call__(
        self, x: Float[Array, "m d"], projections: Projections
    ) -> Float[Array, "m d"]:
        x = x + self.attention.mix(projections)
        hidden = self.activation(x @ self.inner.T + self.inner_bias[None])
        return x + hidden @ self.outer.T + self.outer_bias[None]


class Transformer(eqx.Module):
    """Logits for the symbol that follows a few others.

    Learned embeddings of symbols and of positions; blocks of causal attention and of a
    hidden layer, each added to its input; no layer normalisation; an unembedding that
    is not tied. With ReLU it is the network of Liu, Michaud, Tegmark, arXiv 2210.01117,
    figure 7, and before them of Nanda et al., arXiv 2301.05217.

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
        activation: Callable[[Array], Array] = jax.nn.relu,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `symbols`: how many there are, in and out.
        - `length`: at most so many are read.
        - `layers`: blocks.
        - `width`: numbers at each position; a multiple of `heads`.
        - `heads`: of each attention, of `width`/`heads` numbers each.
        - `hidden`: neurons of each block.
        - `activation`: of these, elementwise.
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

        def normal(*shape, fan):
            return jr.normal(next(keys), shape) / fan**0.5

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
                activation,
            )
            for _ in range(layers)
        )

    def at_each(self, symbols: Int[Array, " n"]) -> Float[Array, "n symbols"]:
        """The logits at every position of `symbols`, integers from 0 on, each of which
        depends on the symbols up to it alone.

        **Raises:** `ValueError` for more symbols than `length`.
        """
        return self._last(symbols, symbols.shape[0])

    def __call__(self, symbols: Int[Array, " n"]) -> Float[Array, " symbols"]:
        """The logits at the last position.

        **Raises:** `ValueError` for more symbols than `length`.
        """
        return self._last(symbols, 1)[0]

    def _last(self, symbols: Int[Array, " n"], m: int) -> Float[Array, "m symbols"]:
        """Of the last block only what is asked for is computed: a third of it, for
        three symbols."""
        n, most = symbols.shape[0], self.positions.shape[0]
        if n > most:
            raise ValueError(f"symbols: at most {most} are read, got {n}.")

        def last(i):
            return m if i == len(self.blocks) - 1 else n

        x = self.embedding[symbols] + self.positions[:n]
        projections = self._projections(symbols, x, last(0))
        for i, block in enumerate(self.blocks):
            if i > 0:
                projections = block.attention.project(x, last(i))
            x = block(x[n - last(i) :], projections)
        return x @ self.unembedding.T

    def _projections(
        self, symbols: Int[Array, " n"], x: Float[Array, "n d"], m: int
    ) -> Projections:
        """What the first attention makes of x, the sum of a symbol's embedding and its
        place's: for few symbols the sum of theirs, which are the same for all sequences
        that share the weights (under `vmap`) and are computed once."""
        attention = self.blocks[0].attention
        if self.embedding.shape[0] > _FEW_SYMBOLS:
            return attention.project(x, m)
        symbol_q, symbol_k, symbol_v = attention.project(
            self.embedding, self.embedding.shape[0]
        )
        q, k, v = attention.project(self.positions[: x.shape[0]], m)
        last = symbols[x.shape[0] - m :]
        return symbol_q[last] + q, symbol_k[symbols] + k, symbol_v[symbols] + v
