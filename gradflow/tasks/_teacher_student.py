"""A wide network that learns from a narrow one of two layers."""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_choice, check_positive
from ..flow.flow import scaled
from ..losses import SquaredError
from ..models import TwoLayer
from ._checks import check_count
from ._task import at_zero, Task, train_and_test


def teacher_student(
    key: PRNGKeyArray,
    *,
    activation: Literal["tanh", "relu"] = "tanh",
    inputs: int = 3,
    width: int = 40,
    hidden_layers: int = 1,
    samples: int = 10,
    teacher_width: int = 3,
    init_scale: float = 1.5,
    test_samples: int = 500,
) -> Task:
    """A network of `width` neurons that learns one of `teacher_width` neurons.

    F = (1/2n) Σᵢ (f(xᵢ) − f⋆(xᵢ))², standard Gaussian inputs. Hidden weights, biases
    and output weights are Gaussian: the teacher's of standard deviations 1/√inputs, 1/2
    and 3/√`teacher_width`, the student's of `init_scale` times 1/√inputs, 1 and 1. A
    student of more hidden layers is an `eqx.nn.MLP` with its usual uniform weights and
    biases, times `init_scale`.

    With tanh everything is smooth, as the theory asks, and J has full rank at almost
    every interpolating network; its least singular value falls as neurons die, so the
    run is short. With the ReLU neither is so, and the codimension is not known.

    The test loss is on `test_samples` new inputs; its threshold is 10% of its value at
    f = 0.

    **Arguments:**

    - `key`: of the data and both networks.
    - `activation`: of both networks.
    - `inputs`, `width`, `samples`, `teacher_width`: sizes; fewer samples than neurons.
    - `hidden_layers`: of the student, each of `width` neurons.
    - `init_scale`: size of the student's initial weights. Where it is small the student
        generalises at once, and there is no delay.
    - `test_samples`: the number of test inputs.

    **Returns:** a task whose truth is a `TeacherTruth`.

    **Raises:** `ValueError` where an argument is out of range.
    """
    check_choice(activation, "activation", ("tanh", "relu"))
    check_count(inputs, "inputs")
    check_count(width, "width", least=2)
    check_count(hidden_layers, "hidden_layers")
    check_count(samples, "samples", most=width - 1)
    check_count(teacher_width, "teacher_width")
    check_positive(init_scale, "init_scale")
    check_count(test_samples, "test_samples")
    x_key, test_key, teacher_key, init_key = jr.split(key, 4)
    teacher = _network(
        teacher_key,
        activation,
        (teacher_width, inputs),
        (inputs**-0.5, 0.5, 3 * teacher_width**-0.5),
    )
    if hidden_layers == 1:
        scales = (init_scale * inputs**-0.5, init_scale, init_scale)
        model = _network(init_key, activation, (width, inputs), scales)
    else:
        act = jnp.tanh if activation == "tanh" else jax.nn.relu
        deep = eqx.nn.MLP(inputs, "scalar", width, hidden_layers, act, key=init_key)
        model = scaled(deep, init_scale)
    x = jr.normal(x_key, (samples, inputs))
    x_test = jr.normal(test_key, (test_samples, inputs))
    loss = SquaredError(x, jax.vmap(teacher)(x))
    test_loss = SquaredError(x_test, jax.vmap(teacher)(x_test))
    grokked = 0.1 * at_zero(test_loss, model)
    return Task(
        name="teacher_student",
        model=model,
        loss=loss,
        metrics=train_and_test(model, loss, test_loss, grokked=grokked),
        truth=TeacherTruth(teacher),
        codimension=samples if activation == "tanh" else None,
        slow_time=2.0,
    )


def _network(key, activation, shape, scales) -> TwoLayer:
    inner_key, bias_key, outer_key = jr.split(key, 3)
    inner, bias, outer = scales
    return TwoLayer(
        inner * jr.normal(inner_key, shape),
        bias * jr.normal(bias_key, shape[:1]),
        outer * jr.normal(outer_key, shape[:1]),
        activation,
    )


def neuron_balance(model: TwoLayer) -> Float[Array, " h"]:
    """aⱼ² − ‖wⱼ‖² − bⱼ² for each neuron.

    For the ReLU, and any activation of degree one, it decays as e^{−2λt} along the
    flow, through the kinks too (Du, Hu, Lee, arXiv 1806.00900, for λ = 0).

    **Raises:** `ValueError` for another activation or a vector output.
    """
    if model.activation != "relu" or model.outer.ndim != 1:
        raise ValueError(
            "model: only a ReLU network of scalar output has this invariant, got "
            f"{model.activation} and outer weights of shape {model.outer.shape}."
        )
    return model.outer**2 - jnp.sum(model.inner**2, axis=1) - model.biases**2


class TeacherTruth(eqx.Module):
    """The network that made the data; `teacher` interpolates them."""

    teacher: TwoLayer

    def invariant(self, model: TwoLayer) -> Float[Array, " h"]:
        """aⱼ² − ‖wⱼ‖² − bⱼ² for each neuron of `model`, which decays as e^{−2λt}; for
        the ReLU only (Du, Hu, Lee, arXiv 1806.00900, for λ = 0).

        **Raises:** `ValueError` for another activation or a vector output.
        """
        return neuron_balance(model)
