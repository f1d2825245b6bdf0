"""The four problems: sizes and scales are fixed, for speed is compared on them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PyTree

import gradflow as gf
from gradflow.flow.flat import FlatLoss, flatten

gf.enable_float64()


class Problem(NamedTuple):
    """A task, and the same as a function of one vector, for solvers that want that."""

    name: str
    about: str
    task: gf.tasks.Task
    theta: Float[Array, " d"]
    """The initial parameters."""
    loss: FlatLoss
    torch_outputs: Callable[[Any], Any]
    """The outputs z(θ) for a Torch vector θ."""

    @property
    def d(self) -> int:
        return self.theta.size

    @property
    def m(self) -> int:
        return self.task.loss.y.size

    @property
    def scale(self) -> float:
        """rms(θ₀)."""
        return float(np.linalg.norm(np.asarray(self.theta))) / self.d**0.5

    def flat(self, params: PyTree) -> np.ndarray:
        """Parameters stacked along n times, as an array n × d."""
        leaves = [np.asarray(p) for p in jax.tree.leaves(params)]
        return np.concatenate([p.reshape(len(p), -1) for p in leaves], axis=1)


def diagonal() -> Problem:
    """P1: a diagonal network β = u ⊙ u − v ⊙ v from 0.5, 30 samples, d = 200."""
    task = gf.tasks.diagonal_network(jr.key(0), samples=30, dim=100)
    x = np.asarray(task.loss.x)

    def outputs(theta):
        u, v = theta.reshape(2, -1)
        return theta.new_tensor(x) @ (u * u - v * v)

    return _problem("P1", "diagonal network", task, outputs)


def completion() -> Problem:
    """P2: completion of a 20 × 20 matrix of rank 2 from 180 entries, d = 800.

    F is the sum of squares over 40, and the factors start at a scale of 0.25: the loss
    is 20 times flatter than in `gradflow.tasks.matrix_completion`.
    """
    side = 20
    draw = np.random.default_rng(1)
    target = draw.normal(size=(side, 2)) @ draw.normal(size=(2, side))
    shuffled = draw.permutation(side * side)
    seen, hidden = shuffled[:180], shuffled[180:]
    u, v = 0.25 * draw.normal(size=(2, side, side))
    values = jnp.asarray(target.reshape(-1) / side**0.5)
    part = lambda places, reduction: gf.SquaredError(
        jnp.asarray(places), values[places], reduction=reduction, predict=_entries
    )
    model = gf.models.MatrixFactorisation(jnp.asarray(u), jnp.asarray(v))
    task = _task("completion", model, part(seen, "sum"), part(hidden, "mean"))

    def outputs(theta):
        u, v = theta.reshape(2, side, side)
        return (u @ v.T).reshape(-1)[seen] / side**0.5

    return _problem("P2", "matrix completion", task, outputs)


def _entries(model: gf.models.MatrixFactorisation, places: Array) -> Array:
    """Of UVᵀ/√n, so that the sum of their squares is over 2n."""
    return model.matrix.reshape(-1)[places] / model.V.shape[0] ** 0.5


def small_tanh() -> Problem:
    """P3: a tanh network 5-100-1 on 40 samples of a teacher of 3 neurons, d = 701."""
    return _tanh("P3", 2, inputs=5, width=100, samples=40)


def large_tanh() -> Problem:
    """P4: a tanh network 20-1000-1 on 200 samples of a like teacher, d = 22 001."""
    return _tanh("P4", 3, inputs=20, width=1000, samples=200)


def _tanh(name: str, seed: int, *, inputs: int, width: int, samples: int) -> Problem:
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(samples, inputs))
    inner, outer = draw.normal(size=(3, inputs)) / inputs**0.5, draw.normal(size=3)
    data = lambda x: (jnp.asarray(x), jnp.asarray(np.tanh(2 * x @ inner.T) @ outer))
    model = eqx.nn.MLP(inputs, "scalar", width, 1, jnp.tanh, key=jr.key(seed))
    unseen = draw.normal(size=(300, inputs))
    losses = [gf.SquaredError(*data(points)) for points in (x, unseen)]

    def outputs(theta):
        weight, bias, last, shift = theta.split([width * inputs, width, width, 1])
        weight = weight.reshape(width, inputs)
        return (theta.new_tensor(x) @ weight.T + bias).tanh() @ last + shift

    task = _task("tanh_network", model, *losses)
    return _problem(name, f"tanh network {inputs}-{width}-1", task, outputs)


def _task(
    name: str, model: PyTree, loss: gf.SquaredError, test: gf.SquaredError
) -> gf.tasks.Task:
    metrics = {"train": gf.Metric(loss), "test": gf.Metric(test)}
    return gf.tasks.Task(name, model, loss, metrics, None, None, slow_time=5.0)


def _problem(name: str, about: str, task: gf.tasks.Task, torch_outputs) -> Problem:
    params, static = eqx.partition(task.model, eqx.is_inexact_array)
    theta, loss = flatten(task.loss, params, static)
    if theta.dtype != jnp.float64:
        raise ValueError(f"{name}: expected float64, got {theta.dtype}.")
    return Problem(name, about, task, theta, loss, torch_outputs)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "P1": diagonal,
    "P2": completion,
    "P3": small_tanh,
    "P4": large_tanh,
}
