"""Every model against NumPy, its stacks, and its checks."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from numpy.testing import assert_allclose

from gradflow import models


def normal(seed, *shape):
    return jr.normal(jr.key(seed), shape)


def build(seed=0):
    """One model of each kind."""
    return {
        "product": models.DiagonalNetwork(normal(seed, 4), normal(seed + 1, 4)),
        "difference": models.DifferenceNetwork(normal(seed, 4), normal(seed + 1, 4)),
        "linear": models.LinearModel(normal(seed, 4)),
        "factorisation": models.MatrixFactorisation(
            normal(seed, 5, 3), normal(seed + 1, 4, 3)
        ),
        "deep": models.DeepLinear(
            (normal(seed, 3, 4), normal(seed + 1, 5, 3), normal(seed + 2, 2, 5))
        ),
        "tanh": models.TwoLayer(
            normal(seed, 6, 4), normal(seed + 1, 6), normal(seed + 2, 6)
        ),
        "relu": models.TwoLayer(
            normal(seed, 6, 4), normal(seed + 1, 6), normal(seed + 2, 2, 6), "relu"
        ),
    }


def test_diagonal_networks():
    x = np.asarray(normal(9, 4))
    for name, beta in {
        "product": lambda u, v: u * v,
        "difference": lambda u, v: u**2 - v**2,
    }.items():
        model = build()[name]
        expected = beta(np.asarray(model.u), np.asarray(model.v))
        assert_allclose(model.beta, expected, rtol=1e-15)
        assert model(jnp.asarray(x)).shape == ()
        assert_allclose(model(jnp.asarray(x)), x @ expected, rtol=1e-13)


def test_linear():
    model, x = build()["linear"], normal(9, 4)
    assert_allclose(model(x), np.asarray(model.weights) @ np.asarray(x), rtol=1e-13)


def test_factorisation_entries():
    model = build()["factorisation"]
    expected = np.asarray(model.U) @ np.asarray(model.V).T
    assert_allclose(model.matrix, expected, rtol=1e-13)
    indices = jnp.array([[0, 0], [4, 3], [2, 1]])
    got = jax.vmap(model)(indices)
    assert_allclose(got, expected[[0, 4, 2], [0, 3, 1]], rtol=1e-13)


def test_deep_linear():
    model, x = build()["deep"], normal(9, 4)
    first, second, third = map(np.asarray, model.weights)
    assert_allclose(model.matrix, third @ second @ first, rtol=1e-13)
    assert_allclose(model(x), third @ second @ first @ np.asarray(x), rtol=1e-12)


@pytest.mark.parametrize("name", ["tanh", "relu"])
def test_two_layer(name):
    model, x = build()[name], np.asarray(normal(9, 4))
    before = np.asarray(model.inner) @ x + np.asarray(model.bias)
    after = np.tanh(before) if name == "tanh" else np.maximum(before, 0)
    assert_allclose(model(jnp.asarray(x)), np.asarray(model.outer) @ after, rtol=1e-13)


def test_two_layer_takes_scalars():
    model = models.TwoLayer(normal(0, 6, 1), normal(1, 6), normal(2, 6), "relu")
    x = jnp.array([-1.0, 0.3, 2.0])
    got = jax.vmap(model)(x)
    assert got.shape == (3,)
    before = np.outer(x, model.inner[:, 0]) + np.asarray(model.bias)[None]
    assert_allclose(got, np.maximum(before, 0) @ np.asarray(model.outer), rtol=1e-13)


@pytest.mark.parametrize(
    ("name", "attribute"),
    [
        ("product", "beta"),
        ("difference", "beta"),
        ("factorisation", "matrix"),
        ("deep", "matrix"),
    ],
)
def test_products_of_a_stack_of_models(name, attribute):
    one, two = build()[name], build(seed=5)[name]
    stack = jax.tree.map(lambda a, b: jnp.stack([a, b]), one, two)
    got = getattr(stack, attribute)
    for index, model in enumerate((one, two)):
        assert_allclose(got[index], getattr(model, attribute), rtol=1e-13)


@pytest.mark.parametrize("name", build())
def test_every_leaf_is_a_trained_array(name):
    leaves = jax.tree.leaves(build()[name])
    assert leaves
    assert all(eqx.is_inexact_array(leaf) for leaf in leaves)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: models.DiagonalNetwork(normal(0, 3), normal(1, 4)), "v"),
        (lambda: models.DifferenceNetwork(normal(0, 3), normal(1, 4)), "v"),
        (lambda: models.LinearModel(normal(0, 3, 2)), "weights"),
        (lambda: models.MatrixFactorisation(normal(0, 3), normal(1, 3, 2)), "U"),
        (lambda: models.MatrixFactorisation(normal(0, 3, 2), normal(1, 3, 1)), "V"),
        (lambda: models.DeepLinear(()), "weights"),
        (lambda: models.DeepLinear((normal(0, 3, 2), normal(1, 2, 2))), "weights"),
        (lambda: models.TwoLayer(normal(0, 3, 2), normal(1, 2), normal(2, 3)), "bias"),
        (lambda: models.TwoLayer(normal(0, 3, 2), normal(1, 3), normal(2, 2)), "outer"),
        (
            lambda: models.TwoLayer(
                normal(0, 3, 2), normal(1, 3), normal(2, 3), "gelu"
            ),
            "activation",
        ),
    ],
)
def test_shape_errors_name_the_argument(make, name):
    # TypeError where annotations are checked at run time: that check comes first.
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
        make()
