"""Under-determined regression with a deep linear network."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_positive
from ..losses import SquaredError
from ..models import DeepLinear
from ._checks import check_count
from ._task import Task, train_and_test


def deep_linear(
    key: PRNGKeyArray,
    *,
    depth: int = 2,
    width: int = 10,
    inputs: int = 20,
    outputs: int = 1,
    samples: int = 10,
    init_scale: float = 2.0,
) -> Task:
    """Regression y = W⋆x with fewer samples than inputs, by f(x) = W_L ⋯ W_1 x.

    F = (1/2n) Σᵢ ‖f(xᵢ) − yᵢ‖² with standard Gaussian inputs; W⋆ has Gaussian entries
    of variance 1/`inputs`, W_l entries of variance `init_scale`²/(columns of W_l).

    The test loss is the expected loss on new inputs, ½‖W_L ⋯ W_1 − W⋆‖². It does not go
    to zero, as W⋆ sees more than the span of the data; its threshold is the geometric
    mean of its value at the initial model and its value at the end point.

    **Arguments:**

    - `key`: of the data and the initial weights.
    - `depth`: L ≥ 2, the number of matrices.
    - `width`: of every hidden layer, at least `outputs`.
    - `inputs`, `outputs`, `samples`: `samples` < `inputs`.
    - `init_scale`: at 1 the network keeps the size of its input, on average.

    **Returns:** a task whose truth is a `DeepLinearTruth`.

    **Raises:** `ValueError` where an argument is out of range.
    """
    check_count(depth, "depth", least=2)
    check_count(outputs, "outputs")
    check_count(width, "width", least=outputs)
    check_count(inputs, "inputs", least=2)
    check_count(samples, "samples", most=inputs - 1)
    check_positive(init_scale, "init_scale")
    x_key, target_key, init_key = jr.split(key, 3)
    x = jr.normal(x_key, (samples, inputs))
    target = jr.normal(target_key, (outputs, inputs)) / inputs**0.5
    sizes = (inputs, *[width] * (depth - 1), outputs)
    model = DeepLinear(
        tuple(
            init_scale / columns**0.5 * jr.normal(layer_key, (rows, columns))
            for layer_key, columns, rows in zip(
                jr.split(init_key, depth), sizes[:-1], sizes[1:], strict=True
            )
        )
    )
    loss = SquaredError(x, x @ target.T)
    test_loss = SquaredError(None, target, reduction="sum", predict=_matrix)
    truth = DeepLinearTruth(x, loss.y, target)
    start = float(test_loss(model))
    end = float(test_loss(DeepLinear((truth.end_point(),))))
    return Task(
        name="deep_linear",
        model=model,
        loss=loss,
        metrics=train_and_test(model, loss, test_loss, grokked=(start * end) ** 0.5),
        truth=truth,
        # On M the matrix W_L ⋯ W_2 has full row rank wherever the targets have it, so
        # that W_1 alone reaches every change of the outputs.
        codimension=samples * outputs if samples >= outputs else None,
        slow_time=5.0,
    )


def _matrix(model: DeepLinear, _: None) -> Array:
    return model.matrix


class DeepLinearTruth(eqx.Module):
    """What is known of a deep linear network's flow.

    - `x`, `y`: the data, one sample a row.
    - `target`: W⋆, of shape (outputs, inputs).
    """

    x: Float[Array, "n d"]
    y: Float[Array, "n k"]
    target: Float[Array, "k d"]

    def coefficients(self, model: DeepLinear) -> Float[Array, "k d"]:
        """W_L ⋯ W_1 of `model`."""
        return model.matrix

    def invariant(self, model: DeepLinear) -> tuple[Float[Array, "h h"], ...]:
        """The layer balances W_{l+1}ᵀ W_{l+1} − W_l W_lᵀ of `model`, l = 1, …, L − 1,
        which decay as e^{−2λt} along the flow, whatever the loss (Arora, Cohen, Hazan,
        arXiv 1802.06509, for λ = 0)."""
        pairs = zip(model.weights[:-1], model.weights[1:], strict=True)
        return tuple(after.T @ after - before @ before.T for before, after in pairs)

    def end_point(self) -> Float[Array, "k d"]:
        """The interpolant of least norm, W₊ᵀ = X⁺Y, whatever the depth: at a KKT point
        W_1 = (W_L ⋯ W_2)ᵀ Λ X for some multipliers Λ, so the rows of the product
        lie in the span of the data."""
        return (jnp.linalg.pinv(self.x) @ self.y).T
