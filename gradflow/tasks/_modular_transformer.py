"""Arithmetic modulo a prime number by a transformer."""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from .._checks import check_choice, check_positive
from ..flow.flow import scaled
from ..losses import CrossEntropy
from ..models import Transformer
from ._checks import check_count, check_part
from ._task import accuracies, Task

_SIGNS = {"addition": "+", "division": "/"}
_ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu}


def modular_transformer(
    key: PRNGKeyArray,
    *,
    modulus: int = 113,
    fraction: float = 0.3,
    operation: Literal["addition", "division"] = "addition",
    layers: int = 1,
    width: int = 128,
    heads: int = 4,
    hidden: int = 512,
    activation: Literal["relu", "gelu"] = "relu",
    init_scale: float = 1.0,
) -> Task:
    """a + b or a / b mod p from a part of all pairs, read as the three symbols a, b
    and "=", by a `Transformer`; the mean cross-entropy at the last of them.

    The default is the experiment behind figures 7, 9 and 10 of Liu, Michaud, Tegmark,
    arXiv 2210.01117; their code has runs of division too, with p = 97, two layers and
    60% of the pairs. There are p + 1 symbols and logits.

    The metrics are the accuracies on the pairs that are seen, with threshold 0.99, and
    on the others, with threshold 0.99. The loss has no minimiser without penalty.

    **Arguments:**

    - `key`: of the choice of pairs, and of the initial weights.
    - `modulus`: p, a prime number where the operation is division.
    - `fraction`: of the pairs that are seen, rounded down to a number of pairs.
    - `operation`: `"addition"`, or `"division"`, of which b = 0 is left out.
    - `layers`, `width`, `heads`, `hidden`: of the transformer.
    - `activation`: of its hidden layers: the paper's ReLU, or GELU, which is smooth.
    - `init_scale`: α, by which the initial weights are multiplied.

    **Returns:** a task whose truth is an `OperationTruth`.

    **Raises:** `ValueError` where an argument is out of range.
    """
    check_count(modulus, "modulus", least=2)
    check_part(fraction, "fraction")
    check_choice(operation, "operation", tuple(_SIGNS))
    check_choice(activation, "activation", tuple(_ACTIVATIONS))
    check_positive(init_scale, "init_scale")
    truth = OperationTruth(modulus, operation)
    split_key, init_key = jr.split(key)
    a, b = np.divmod(np.arange(modulus**2), modulus)
    pairs = np.stack([a, b, np.full_like(a, modulus)], axis=1)
    if operation == "division":
        pairs = pairs[b > 0]
    seen = int(fraction * len(pairs))
    if not 0 < seen < len(pairs):
        raise ValueError(
            f"fraction: expected some pairs seen and some not, got {fraction} of "
            f"{len(pairs)}."
        )
    pairs = jnp.asarray(pairs[np.asarray(jr.permutation(split_key, len(pairs)))])
    model = Transformer(
        symbols=modulus + 1, layers=layers, width=width, heads=heads, hidden=hidden,
        activation=_ACTIVATIONS[activation], key=init_key,
    )  # fmt: skip
    x, x_test = pairs[:seen], pairs[seen:]
    y, y_test = truth.labels(x), truth.labels(x_test)
    return Task(
        name="modular_transformer",
        model=scaled(model, init_scale),
        loss=CrossEntropy(x, y),
        metrics=accuracies(x, y, x_test, y_test),
        truth=truth,
        codimension=None,
        slow_time=10.0,
    )


class OperationTruth(eqx.Module):
    """The rule a + b or a / b mod `modulus`.

    **Arguments:**

    - `modulus`: p, a prime number where the operation is division.
    - `operation`: `"addition"` or `"division"`.

    **Raises:** `ValueError` for another p.
    """

    modulus: int = eqx.field(static=True)
    operation: Literal["addition", "division"] = eqx.field(static=True)

    def __check_init__(self):
        p = self.modulus
        if self.operation == "division" and any(p % n == 0 for n in range(2, p)):
            raise ValueError(f"modulus: expected a prime number, got {p}.")

    @property
    def title(self) -> str:
        """The rule, for figures."""
        return f"a {_SIGNS[self.operation]} b mod {self.modulus}"

    def labels(self, symbols: Int[Array, "n 3"]) -> Int[Array, " n"]:
        """The result for each row a, b, "=" of `symbols`."""
        a, b = np.asarray(symbols)[:, :2].T
        if self.operation == "addition":
            return jnp.asarray((a + b) % self.modulus)
        inverse = [0, *(pow(n, -1, self.modulus) for n in range(1, self.modulus))]
        return jnp.asarray(a * np.array(inverse)[b] % self.modulus)
