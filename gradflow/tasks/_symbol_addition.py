"""Addition of embedded symbols, to be decoded."""

from typing import Literal

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_positive
from ..flow.flow import scaled
from ..losses import SquaredError
from ..metrics import Metric
from ..models import EmbeddingDecoder, messy_embedding
from ._checks import check_count, check_part
from ._polarizability import MeanSquare
from ._task import Task


def symbol_addition(
    key: PRNGKeyArray,
    *,
    modulus: int = 10,
    train: int = 45,
    dimension: int = 2,
    messiness: float = 0.0,
    outputs: int = 30,
    width: int = 200,
    activation: Literal["relu", "leaky_relu"] = "leaky_relu",
    init_scale: float = 1.0,
) -> Task:
    """i + j mod p for i ≤ j from a part of the pairs, by an `EmbeddingDecoder` that is
    to decode the sum of two embeddings into a Gaussian vector for each result; half the
    mean squared distance (Liu, Michaud, Tegmark, arXiv 2210.01117, figures 1 and 6).

    The embedding is m E_random + (1 − m) E_linear for the messiness m, by
    `messy_embedding`. In the paper's landscapes the decoder alone is trained, at a norm
    that is held:

        flow = gf.GradientFlow(
            task.loss, trainable=task.model.only_decoder(), hold_norm=True
        )

    The metrics are mean squares over all numbers: on the pairs that are seen and on the
    others, both with threshold 0.05, where the paper draws its contours.

    **Arguments:**

    - `key`: of the pairs, the vectors, the embedding and the initial decoder.
    - `modulus`: p.
    - `train`: pairs that are seen, of all p(p + 1)/2.
    - `dimension`: of the embedding.
    - `messiness`: m, from 0 to 1.
    - `outputs`, `width`, `activation`: of the decoder.
    - `init_scale`: α, by which the decoder's initial weights are multiplied.

    **Returns:** a task whose truth is an `AdditionTruth`.

    **Raises:** `ValueError` where an argument is out of range.
    """
    check_count(modulus, "modulus", least=2)
    pairs = np.stack(np.triu_indices(modulus), axis=1)
    check_count(train, "train", most=len(pairs) - 1)
    check_part(messiness, "messiness")
    check_positive(init_scale, "init_scale")
    split_key, vector_key, table_key, init_key = jr.split(key, 4)
    pairs = jnp.asarray(pairs[np.asarray(jr.permutation(split_key, len(pairs)))])
    vectors = jr.normal(vector_key, (modulus, outputs))
    table = messy_embedding(
        table_key, symbols=modulus, dimension=dimension, messiness=messiness
    )
    model = EmbeddingDecoder(
        table, outputs=outputs, width=width, activation=activation, key=init_key
    )
    targets = vectors[jnp.sum(pairs, axis=1) % modulus]
    loss = SquaredError(pairs[:train], targets[:train])
    test_loss = SquaredError(pairs[train:], targets[train:])
    return Task(
        name="symbol_addition",
        model=scaled(model, init_scale, trainable=model.only_decoder()),
        loss=loss,
        metrics={
            "train": Metric(MeanSquare(loss), threshold=0.05),
            "test": Metric(MeanSquare(test_loss), threshold=0.05),
        },
        truth=AdditionTruth(vectors, f"i + j mod {modulus}, {train} pairs seen"),
        codimension=None,
        slow_time=3.0,
    )


class AdditionTruth(eqx.Module):
    """The vector that each result is decoded into."""

    vectors: Float[Array, "p outputs"]
    """Row k is that of the result k."""
    title: str = eqx.field(static=True)
    """The title of figures."""
