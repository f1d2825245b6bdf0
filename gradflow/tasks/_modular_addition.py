"""Addition modulo a number, learnt from part of its table."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Int, PRNGKeyArray

from .._checks import check_positive
from ..losses import CrossEntropy
from ..models import PairProduct
from ..penalties import AbstractPenalty, L1
from ._checks import check_count, check_part
from ._task import accuracies, Task


def modular_addition(
    key: PRNGKeyArray,
    *,
    modulus: int = 97,
    fraction: float = 0.4,
    side: int = 8,
    width: int = 64,
    init_scale: float = 1.0,
    penalty: AbstractPenalty | None = None,
) -> Task:
    """a + b mod p from a part of all p² pairs, by `PairProduct`; the mean
    cross-entropy, under R = ‖θ‖₁.

    The experiment behind figures 1 and 2 of Notsawo, Dumas, Rabusseau, arXiv
    2506.05718. Initial weights are Gaussian with standard deviation `init_scale`/√(rows
    of the matrix, outputs of the layer), as in their code for other networks; those of
    this one are not known. From a much smaller start a penalty of the size of theirs
    takes all weights to zero before anything is learnt.

    The metrics are the accuracies on the pairs that are seen, with threshold 0.99, and
    on the others, with threshold 0.99. The loss has no minimiser without penalty.

    **Arguments:**

    - `key`: of the choice of pairs, and of the initial weights.
    - `modulus`: p.
    - `fraction`: of the pairs that are seen; ⌊fraction · p²⌋ of them.
    - `side`: k, each symbol being a k × k matrix.
    - `width`: of the hidden layer.
    - `init_scale`: of the initial weights.
    - `penalty`: R, unless it is to be the ℓ1 norm.

    **Returns:** a task whose truth is a `ModularTruth`.

    **Raises:** `ValueError` where an argument is out of range.
    """
    check_count(modulus, "modulus", least=2)
    check_part(fraction, "fraction")
    check_count(side, "side")
    check_count(width, "width")
    check_positive(init_scale, "init_scale")
    seen = int(fraction * modulus**2)
    if not 0 < seen < modulus**2:
        raise ValueError(
            f"fraction: expected some pairs seen and some not, got {fraction} of "
            f"{modulus**2}."
        )
    split_key, *keys = jr.split(key, 5)
    order = jr.permutation(split_key, modulus**2)
    pairs = jnp.stack([order // modulus, order % modulus], axis=1)
    size = side**2
    shapes = ((modulus, size), (modulus, size), (width, size), (modulus, width))
    # A table of symbols is the transpose of a layer's matrix: its outputs are columns.
    outputs = (size, size, width, modulus)
    model = PairProduct(
        *(
            init_scale / rows**0.5 * jr.normal(layer_key, shape)
            for layer_key, shape, rows in zip(keys, shapes, outputs, strict=True)
        )
    )
    truth = ModularTruth(modulus)
    x, x_test = pairs[:seen], pairs[seen:]
    return Task(
        name="modular_addition",
        model=model,
        loss=CrossEntropy(x, truth.labels(x)),
        metrics=accuracies(x, truth.labels(x), x_test, truth.labels(x_test)),
        truth=truth,
        codimension=None,
        slow_time=2e-4,
        penalty=L1() if penalty is None else penalty,
    )


class ModularTruth(eqx.Module):
    """The rule a + b mod `modulus`."""

    modulus: int = eqx.field(static=True)

    def labels(self, pairs: Int[Array, "n 2"]) -> Int[Array, " n"]:
        """a + b mod p of each of the `pairs`."""
        return (pairs[:, 0] + pairs[:, 1]) % self.modulus
