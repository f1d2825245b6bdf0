"""A ReLU network that learns a piecewise linear function of one variable."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_positive
from ..losses import SquaredError
from ..models import TwoLayer
from ._checks import check_count
from ._task import at_zero, Task, train_and_test
from ._teacher_student import neuron_balance


def relu_1d(
    key: PRNGKeyArray,
    *,
    width: int = 100,
    samples: int = 10,
    teacher_width: int = 3,
    init_scale: float = 2.0,
) -> Task:
    """f(x) = Σⱼ uⱼ relu(vⱼ x + bⱼ), from a few points of a sum of a few ReLUs.

    F = (1/2n) Σᵢ (f(xᵢ) − f⋆(xᵢ))², inputs uniform on [−2, 2], all initial weights
    N(0, `init_scale`²): the setting of figure 3 of Boursier, Pesme, Dragomir, arXiv
    2505.20172 (n = 10, width 100, variance 4, three teacher neurons; λ = 1e-3), which
    leaves the teacher open. Here its kinks are spread over [−1.5, 1.5], its slopes ±1.

    ReLU networks are outside the theory: the critical manifold has corners where a kink
    passes a data point. Nor is its codimension known: where three data points have no
    kink between them, J is not of full rank.

    The test loss is on a grid of 201 points of [−2, 2]; its threshold is 10% of its
    value at f = 0.

    **Arguments:**

    - `key`: of the inputs, the teacher and the initial weights.
    - `width`, `samples`, `teacher_width`: sizes; fewer samples than neurons.
    - `init_scale`: the standard deviation of the initial weights.

    **Returns:** a task whose truth is a `ReLU1dTruth`.

    **Raises:** `ValueError` where an argument is out of range.
    """
    check_count(width, "width", least=2)
    check_count(samples, "samples", most=width - 1)
    check_count(teacher_width, "teacher_width")
    check_positive(init_scale, "init_scale")
    x_key, kink_key, side_key, sign_key, init_key = jr.split(key, 5)
    x = jr.uniform(x_key, (samples,), minval=-2.0, maxval=2.0)
    # One kink in each of `teacher_width` equal cells, so that none coincide.
    cells = jnp.arange(teacher_width, dtype=x.dtype)
    offset = jr.uniform(kink_key, (teacher_width,), minval=0.25, maxval=0.75)
    kinks = -1.5 + 3.0 * (cells + offset) / teacher_width
    side = jr.rademacher(side_key, (teacher_width,), x.dtype)
    teacher = TwoLayer(
        side[:, None],
        -side * kinks,
        jr.rademacher(sign_key, (teacher_width,), x.dtype),
        "relu",
    )
    inner_key, bias_key, outer_key = jr.split(init_key, 3)
    model = TwoLayer(
        init_scale * jr.normal(inner_key, (width, 1)),
        init_scale * jr.normal(bias_key, (width,)),
        init_scale * jr.normal(outer_key, (width,)),
        "relu",
    )
    grid = jnp.linspace(-2.0, 2.0, 201)
    loss = SquaredError(x, jax.vmap(teacher)(x))
    test_loss = SquaredError(grid, jax.vmap(teacher)(grid))
    grokked = 0.1 * at_zero(test_loss, model)
    return Task(
        name="relu_1d",
        model=model,
        loss=loss,
        metrics=train_and_test(model, loss, test_loss, grokked=grokked),
        truth=ReLU1dTruth(teacher),
        codimension=None,
        slow_time=5.0,
    )


class Kinks(NamedTuple):
    """Where a network of one variable bends: `positions`, and `jumps`, by how much its
    slope changes there. A neuron without input weight has no kink: its position is not
    finite."""

    positions: Float[Array, " h"]
    jumps: Float[Array, " h"]


class ReLU1dTruth(eqx.Module):
    """The network that made the data, and what is known of the student's flow."""

    teacher: TwoLayer
    """f⋆."""

    def invariant(self, model: TwoLayer) -> Float[Array, " h"]:
        """uⱼ² − vⱼ² − bⱼ² for each neuron of `model`, which decays as e^{−2λt} (Du, Hu,
        Lee, arXiv 1806.00900, for λ = 0)."""
        return neuron_balance(model)

    def kinks(self, model: TwoLayer) -> Kinks:
        """The kink of each neuron of `model`: at −bⱼ/vⱼ the slope jumps by uⱼ|vⱼ|."""
        slope = model.inner[:, 0]
        return Kinks(-model.biases / slope, model.outer * jnp.abs(slope))
