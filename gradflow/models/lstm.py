"""A recurrent network that reads a text and tells one of two classes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray, Scalar

from ._checks import check_sizes


class LSTMClassifier(eqx.Module):
    """One logit from a sequence of words: embeddings, layers of long short-term memory
    (Hochreiter and Schmidhuber, 1997), and a linear map of the last state.

    The network of Liu, Michaud, Tegmark, arXiv 2210.01117, figure 4. Embeddings start
    as standard Gaussians, other weights uniform within ±1/√(numbers of the state). Each
    gate has one bias, where PyTorch adds two; there is no dropout.
    """

    embedding: Float[Array, "words e"]
    cells: tuple[eqx.nn.LSTMCell, ...]
    readout: eqx.nn.Linear
    skip_padding: bool = eqx.field(static=True)

    def __init__(
        self,
        *,
        words: int,
        embedding: int = 64,
        state: int = 128,
        layers: int = 2,
        skip_padding: bool = False,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `words`: how many there are, number 0 included, which is no word: it fills the
            sequence up, at its beginning.
        - `embedding`: numbers for each word.
        - `state`: of each layer: 128 numbers in the paper, 256 in its code.
        - `layers`: how many.
        - `skip_padding`: keep the state at rest while number 0 is read. The paper's
            network reads it as a word.
        - `key`: of the initial weights.

        **Raises:** `ValueError` where a size makes no sense.
        """
        check_sizes(words=words, embedding=embedding, state=state, layers=layers)
        word_key, readout_key, *keys = jr.split(key, 2 + layers)
        self.embedding = jr.normal(word_key, (words, embedding))
        self.cells = tuple(
            eqx.nn.LSTMCell(state if i else embedding, state, key=k)
            for i, k in enumerate(keys)
        )
        self.readout = eqx.nn.Linear(state, "scalar", key=readout_key)
        self.skip_padding = skip_padding

    def __call__(self, words: Int[Array, " n"]) -> Scalar:
        """The logit of the second class."""
        size = self.cells[0].hidden_size
        # Of the weights' precision, and a batch of states where there is one of models.
        rest = jnp.zeros_like(self.embedding, shape=(size,))
        start = tuple((rest, rest) for _ in self.cells)

        def read(states, word):
            x, moved = self.embedding[word], []
            for cell, state in zip(self.cells, states, strict=True):
                new = cell(x, state)
                if self.skip_padding:

                    def keep(a, b):
                        return jnp.where(word == 0, a, b)

                    new = jax.tree.map(keep, state, new)
                moved.append(new)
                x = new[0]
            return tuple(moved), None

        states, _ = jax.lax.scan(read, start, words)
        return self.readout(states[-1][0])
