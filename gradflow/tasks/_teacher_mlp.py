"""A deep tanh network that learns from another of its own sizes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PRNGKeyArray, Scalar

from .._checks import check_positive
from ..flow.flow import scaled
from ..losses import SquaredError
from ..metrics import Metric
from ._checks import check_count
from ._task import Task


def teacher_mlp(
    key: PRNGKeyArray,
    *,
    inputs: int = 5,
    outputs: int = 5,
    width: int = 100,
    hidden_layers: int = 2,
    samples: int = 100,
    test_samples: int = 100,
    init_scale: float = 2.0,
    tolerance: float = 1e-3,
) -> Task:
    """A tanh network with biases that learns a few samples of another one of the same
    sizes (Liu, Michaud, Tegmark, arXiv 2210.01117, figure 2).

    F = (1/2n) Σᵢ ‖f(xᵢ) − f⋆(xᵢ)‖², standard Gaussian inputs; the paper's loss, a mean
    over outputs too, is 2/`outputs` of it. Weights and biases are uniform within
    ±1/√(inputs of the layer): the teacher's as they are, the student's are others,
    times `init_scale`. Where that is 1 the student generalises at once; from larger
    ones it has to come down to the teacher's norm.

    The metrics `"train"` and `"test"` are shares of samples that are right, both with
    threshold 0.95: those whose squared error, a mean over outputs, is below
    `tolerance`. (0.001 is that of the authors' code, the paper says 0.01.) A third,
    `"test_loss"`, is F on the test samples, with threshold where the mean of that error
    is `tolerance`.

    **Arguments:**

    - `key`: of the data and both networks.
    - `inputs`, `outputs`, `width`, `hidden_layers`: sizes of both networks.
    - `samples`, `test_samples`: how many.
    - `init_scale`: α.
    - `tolerance`: of a sample that counts as right.

    **Returns:** a task whose truth is a `TeacherMLPTruth`.

    **Raises:** `ValueError` where an argument is out of range.
    """
    sizes = dict(inputs=inputs, outputs=outputs, width=width)
    sizes |= dict(hidden_layers=hidden_layers, samples=samples)
    for name, value in {**sizes, "test_samples": test_samples}.items():
        check_count(value, name)
    check_positive(init_scale, "init_scale")
    check_positive(tolerance, "tolerance")
    x_key, test_key, teacher_key, init_key = jr.split(key, 4)
    network = lambda key: eqx.nn.MLP(
        inputs, outputs, width, hidden_layers, jnp.tanh, key=key
    )
    teacher = network(teacher_key)
    x = jr.normal(x_key, (samples, inputs))
    x_test = jr.normal(test_key, (test_samples, inputs))
    loss = SquaredError(x, jax.vmap(teacher)(x))
    test_loss = SquaredError(x_test, jax.vmap(teacher)(x_test))
    share = lambda loss: Metric(
        ShareWithin(loss, tolerance), threshold=0.95, higher_is_better=True
    )
    return Task(
        name="teacher_mlp",
        model=scaled(network(init_key), init_scale),
        loss=loss,
        metrics={
            "train": share(loss),
            "test": share(test_loss),
            "test_loss": Metric(test_loss, threshold=outputs * tolerance / 2),
        },
        truth=TeacherMLPTruth(teacher),
        codimension=None,
        slow_time=2.0,
    )


class ShareWithin(eqx.Module):
    """The share of samples whose squared error, a mean over outputs, is below
    `tolerance`.

    **Arguments:**

    - `loss`: with the samples.
    - `tolerance`: of the squared error, in the unit of y².
    """

    loss: SquaredError
    tolerance: float = eqx.field(static=True)

    def __call__(self, model: eqx.nn.MLP) -> Scalar:
        y = self.loss.y
        away = self.loss.outputs(model).reshape(y.shape) - y
        return jnp.mean(jnp.mean(away**2, axis=1) < self.tolerance, dtype=y.dtype)


class TeacherMLPTruth(eqx.Module):
    """The network that made the data: `teacher`."""

    teacher: eqx.nn.MLP
