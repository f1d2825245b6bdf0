"""More problems, of other shapes than P1–P4: losses that are not squares or are opaque,
many outputs, few parameters, data that cannot be fitted."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, PyTree

import gradflow as gf


class Shape(NamedTuple):
    """A flow, and where it starts."""

    flow: gf.GradientFlow
    model: PyTree


def deep_linear() -> Shape:
    """Squared error, d = 210, m = 10."""
    task = gf.tasks.deep_linear(jr.key(0))
    return Shape(task.flow, task.model)


def matrix_recovery() -> Shape:
    """Squared error, cheap gradients, d = 100, m = 70."""
    task = gf.tasks.matrix_recovery(jr.key(0))
    return Shape(task.flow, task.model)


def logistic() -> Shape:
    """Which quadrant, d = 1185, m = 100."""
    x = np.random.default_rng(0).normal(size=(100, 2))
    y = (x[:, 0] * x[:, 1] > 0).astype(float)
    return _network(gf.Logistic(x, y), [2, 32, 32, "scalar"], key=1)


def vectors() -> Shape:
    """Four outputs of a sample, d = 420, m = 200."""
    draw = np.random.default_rng(1)
    x = draw.normal(size=(50, 8))
    y = np.sin(x @ draw.normal(size=(8, 4)))
    return _network(gf.SquaredError(x, y), [8, 32, 4], key=2, activation=jax.nn.gelu)


def opaque() -> Shape:
    """A loss of which nothing is known, d = 57."""
    x = np.random.default_rng(2).normal(size=(40, 5))
    squares = gf.SquaredError(x, np.sin(x.sum(axis=1)))
    return _network(gf.Loss(lambda model: squares(model)), [5, 8, "scalar"], key=3)


def many_samples() -> Shape:
    """More outputs than parameters, d = 51, m = 1000."""
    return _noisy(1000, [3, 10, "scalar"], noise=0.1)


def classes() -> Shape:
    """Three classes at random, d = 227, m = 180."""
    draw = np.random.default_rng(4)
    x, y = draw.normal(size=(60, 10)), draw.integers(0, 3, 60)
    return _network(gf.CrossEntropy(x, y), [10, 16, 3], key=5)


def noisy_tanh() -> Shape:
    """Noise that cannot be fitted, d = 17, m = 60."""
    return _noisy(60, [2, 4, "scalar"], noise=0.03)


def noisy_silu() -> Shape:
    """Noise that can be fitted, d = 161, m = 60."""
    return _noisy(60, [2, 40, "scalar"], noise=0.2, activation=jax.nn.silu)


class Attention(eqx.Module):
    """One head, read off at the last of some tokens."""

    query: Array
    value: Array

    def __call__(self, x: Array) -> Array:
        weights = jax.nn.softmax(x @ self.query @ x.T / 2, axis=-1)
        return weights[-1] @ (x @ self.value)


def attention(samples: int = 40, size: int = 12) -> Shape:
    """Sequences of 4 tokens, d = 156 for tokens of that size."""
    keys = jr.split(jr.key(3), 4)
    x = jr.normal(keys[0], (samples, 4, size))
    y = jnp.sin(x[:, -1, 0]) + 0.3 * jr.normal(keys[1], (samples,))
    query, value = jr.normal(keys[2], (size, size)), jr.normal(keys[3], (size,))
    model = Attention(query, value)
    return Shape(gf.GradientFlow(gf.SquaredError(x, y)), model)


def digits() -> Shape:
    """Thirty handwritten digits of ten classes, d = 385, m = 300."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return _network(gf.CrossEntropy(x[:30] / 16, y[:30]), [64, 5, 10], key=0)


def _noisy(samples: int, sizes: list, *, noise: float, activation=jnp.tanh) -> Shape:
    draw = np.random.default_rng(3)
    x = draw.normal(size=(samples, sizes[0]))
    y = np.tanh(x.sum(axis=1)) + noise * draw.normal(size=samples)
    return _network(gf.SquaredError(x, y), sizes, key=4, activation=activation)


def _network(loss, sizes: list, *, key: int, activation: Callable = jnp.tanh) -> Shape:
    depth = len(sizes) - 2
    model = eqx.nn.MLP(
        sizes[0], sizes[-1], sizes[1], depth, activation, key=jr.key(key)
    )
    return Shape(gf.GradientFlow(loss), model)


SHAPES: dict[str, Callable[[], Shape]] = {
    make.__name__: make
    for make in (
        deep_linear, matrix_recovery, logistic, vectors, opaque, many_samples, classes,
        noisy_tanh, noisy_silu, attention, digits,
    )
}  # fmt: skip
