"""A wide ReLU network that learns from another of its own size."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_positive
from ..losses import SquaredError
from ..models import TwoLayer
from ..penalties import AbstractPenalty, Sobolev
from ._checks import check_count
from ._task import at_zero, Task, train_and_test


def wide_teacher(
    key: PRNGKeyArray,
    *,
    inputs: int = 100,
    width: int = 500,
    outputs: int = 2,
    samples: int = 100,
    init_scale: float = 1.0,
    test_samples: int = 1000,
    penalty: AbstractPenalty | None = None,
) -> Task:
    """A student B ReLU(A x) of the teacher's size, without biases, on few samples.

    F = (1/2n) Σᵢ ‖f(xᵢ) − f⋆(xᵢ)‖², standard Gaussian inputs; with two outputs it is
    the mean over all numbers, the loss of the code of Notsawo, Dumas, Rabusseau
    (arXiv 2506.05718, figure 10). The teacher's A⋆ has entries N(0, 1), its B⋆
    N(0, 1/`width`²); the student's are Gaussian with standard deviation
    `init_scale`/√rows.

    Unless another one is given the penalty is the Sobolev one of their figure 11,
    meanᵢ ‖∂f/∂x(xᵢ) − ∂f⋆/∂x(xᵢ)‖_F²: the teacher's derivatives at the samples, which
    tell of f⋆ what values alone do not.

    The test loss is on `test_samples` new inputs; its threshold is 10% of its value at
    f = 0, which without the derivatives few samples may not reach.

    **Arguments:**

    - `key`: of the data and both networks.
    - `inputs`, `width`, `outputs`, `samples`: sizes.
    - `init_scale`: of the student's initial weights.
    - `test_samples`: the number of test inputs.
    - `penalty`: R.

    **Returns:** a task whose truth is a `WideTeacherTruth`.

    **Raises:** `ValueError` where an argument is out of range.
    """
    sizes = dict(inputs=inputs, width=width, outputs=outputs, samples=samples)
    for name, value in {**sizes, "test_samples": test_samples}.items():
        check_count(value, name)
    check_positive(init_scale, "init_scale")
    x_key, test_key, *keys = jr.split(key, 6)
    draw = lambda k, *shape: jr.normal(k, shape)
    teacher = TwoLayer(
        draw(keys[0], width, inputs),
        None,
        draw(keys[1], outputs, width) / width,
        "relu",
    )
    model = TwoLayer(
        init_scale * draw(keys[2], width, inputs) / width**0.5,
        None,
        init_scale * draw(keys[3], outputs, width) / outputs**0.5,
        "relu",
    )
    truth = WideTeacherTruth(teacher)
    x, x_test = draw(x_key, samples, inputs), draw(test_key, test_samples, inputs)
    loss = SquaredError(x, jax.vmap(teacher)(x))
    test_loss = SquaredError(x_test, jax.vmap(teacher)(x_test))
    if penalty is None:
        penalty = Sobolev(model, x, target=truth.jacobian(x))
    return Task(
        name="wide_teacher",
        model=model,
        loss=loss,
        metrics=train_and_test(
            model, loss, test_loss, grokked=0.1 * at_zero(test_loss, model)
        ),
        truth=truth,
        codimension=None,
        slow_time=1.0,
        penalty=penalty,
    )


class WideTeacherTruth(eqx.Module):
    """The network that made the data; `teacher` interpolates them."""

    teacher: TwoLayer

    def jacobian(self, x: Float[Array, "n d"]) -> Float[Array, "n k d"]:
        """∂f⋆/∂x = B⋆ diag(1[A⋆x > 0]) A⋆ at each of the n samples `x`."""
        active = x @ self.teacher.inner.T > 0
        gates = active.astype(x.dtype)
        return jnp.einsum(
            "kh,nh,hd->nkd", self.teacher.outer, gates, self.teacher.inner
        )
