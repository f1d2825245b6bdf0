"""A ready problem: an initial model, its loss, what to watch and what is known."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Scalar

from ..flow.flow import GradientFlow
from ..losses import AbstractLoss, SquaredError
from ..metrics import Accuracy, Metric
from ..penalties import AbstractPenalty, L2


class Task(eqx.Module):
    """A ready problem: an initial model, its loss, what to watch and what is known.

    **Arguments:**

    - `name`: of the function that made it.
    - `model`: the initial model.
    - `loss`: the training loss F.
    - `metrics`: what to watch along a path; always `"train"`, the training loss, and
        `"test"`, the error on unseen data, each with the level that counts. (Where the
        task is to recover a target: the relative errors of the fit and of the target.
        Where it is to classify: the accuracies, which are to rise.)
    - `truth`: what is known of the answer. Each kind of task has its own; wherever the
        end of the drift is known, `truth.end_point()` gives it and
        `truth.coefficients(model)` the quantity to compare with it; wherever there is
        an exact invariant, `truth.invariant(model)` is proportional to e^{−2λt} along
        the flow.
    - `codimension`: the rank of J on the critical manifold, which has dimension
        d − `codimension`; `None` where it is not known.
    - `slow_time`: how far to run, s = λt, to see the whole drift.
    - `penalty`: R, ½‖θ‖² unless the task is about another one.

    **Raises:** `ValueError` where one of the two metrics is missing, or `slow_time` is
    not positive.
    """

    name: str = eqx.field(static=True)
    model: PyTree
    loss: AbstractLoss
    metrics: dict[str, Metric]
    truth: Any
    codimension: int | None = eqx.field(static=True)
    slow_time: float = eqx.field(static=True)
    penalty: AbstractPenalty = L2()

    def __check_init__(self):
        missing = {"train", "test"} - self.metrics.keys()
        if missing:
            raise ValueError(f"metrics: {sorted(missing)} missing.")
        if not self.slow_time > 0:
            raise ValueError(f"slow_time: expected > 0, got {self.slow_time}.")

    @property
    def flow(self) -> GradientFlow:
        """The flow θ' = −∇F(θ) − λ∇R(θ) of this task's loss and penalty."""
        return GradientFlow(self.loss, penalty=self.penalty)


def train_and_test(
    model: PyTree,
    loss: AbstractLoss,
    test_loss: AbstractLoss,
    *,
    grokked: float,
) -> dict[str, Metric]:
    """The two metrics of every task.

    **Arguments:**

    - `model`: the initial model.
    - `loss`, `test_loss`: on training data and on unseen data.
    - `grokked`: the test loss below which the model counts as having generalised.

    **Returns:** `"train"`, with 1% of its value at θ = 0 for threshold, and `"test"`.
    """
    return {
        "train": Metric(loss, threshold=0.01 * at_zero(loss, model)),
        "test": Metric(test_loss, threshold=float(grokked)),
    }


def accuracies(
    x: PyTree,
    labels: Array,
    x_test: PyTree,
    test_labels: Array,
    *,
    grokked: float = 0.99,
) -> dict[str, Metric]:
    """The two metrics of a classification: `"train"`, the share of training samples
    that are right, with threshold 0.99, and `"test"`, with threshold `grokked`."""
    high = lambda fn, level: Metric(fn, threshold=level, higher_is_better=True)
    return {
        "train": high(Accuracy(x, labels), 0.99),
        "test": high(Accuracy(x_test, test_labels), grokked),
    }


class RelativeError(eqx.Module):
    """‖f(model) − target‖/‖target‖, Euclidean (of matrices, Frobenius).

    **Arguments:**

    - `of`: f, a function of the model that gives an array.
    - `target`: an array of the same shape.
    """

    of: Callable[[Any], Array]
    target: Array

    def __call__(self, model: PyTree) -> Scalar:
        away = self.of(model) - self.target
        return jnp.linalg.norm(away) / jnp.linalg.norm(self.target)


def fit_and_recovery(
    loss: SquaredError,
    coefficients: Callable[[Any], Array],
    target: Array,
    *,
    fitted: float,
    recovered: float,
) -> dict[str, Metric]:
    """The two metrics where a target is to be recovered.

    **Returns:** `"train"`, ‖z − y‖/‖y‖ with threshold `fitted`, and `"test"`, the same
    of the coefficients and the target, with threshold `recovered`.
    """
    return {
        "train": Metric(RelativeError(loss.outputs, loss.y), threshold=fitted),
        "test": Metric(RelativeError(coefficients, target), threshold=recovered),
    }


def at_zero(loss: AbstractLoss, model: PyTree) -> float:
    """F(0). A level to measure other losses by which, unlike the initial one, does not
    depend on the scale of the initial weights."""
    zero = jax.tree.map(
        lambda leaf: jnp.zeros_like(leaf) if eqx.is_inexact_array(leaf) else leaf, model
    )
    return float(loss(zero))
