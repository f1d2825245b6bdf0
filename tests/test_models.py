"""Every model against NumPy, its stacks, and its checks."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from numpy.testing import assert_allclose

import gradflow as gf
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


# Centred models


def centred(alpha, outputs=()):
    return models.Centred(
        models.TwoLayer(normal(0, 5, 3), normal(1, 5), normal(2, *outputs, 5)), alpha
    )


def test_a_centred_model_is_zero_at_its_start(tmp_path):
    """And its start is not trained, scaled, or given a derivative; it is kept by files
    and stacks."""
    model, x = centred(3.0, (2,)), normal(7, 4, 3)
    assert_allclose(jax.vmap(model)(x), np.zeros((4, 2)))
    params = eqx.filter(model, eqx.is_inexact_array)
    assert sum(p.size for p in jax.tree.leaves(params)) == 5 * 3 + 5 + 10
    moved = gf.scaled(model, 2.0)
    g, h = model.model, moved.model
    assert_allclose(moved.initial.inner, g.inner)
    assert_allclose(jax.vmap(moved)(x), 3 * jax.vmap(lambda x: h(x) - g(x))(x))
    slope = eqx.filter_grad(lambda m: jnp.sum(jax.vmap(m)(x) * x[:, :2]))(model)
    right = eqx.filter_grad(lambda g: 3 * jnp.sum(jax.vmap(g)(x) * x[:, :2]))(g)
    assert_allclose(slope.model.inner, right.inner, rtol=1e-12)
    assert len(jax.tree.leaves(slope)) == 3
    gf.save(tmp_path / "one.npz", moved)
    assert_allclose(jax.vmap(gf.load(tmp_path / "one.npz"))(x), jax.vmap(moved)(x))
    many = eqx.filter_vmap(lambda a: models.Centred(g, a))(jnp.array([1.0, 5.0]))
    assert_allclose(many.alpha, [1, 5])
    # In another precision, as users cast a model.
    half = jax.tree.map(
        lambda p: p.astype(jnp.float32) if eqx.is_inexact_array(p) else p, moved
    )
    seen = jax.vmap(half)(x.astype(jnp.float32))
    assert seen.dtype == jnp.float32
    assert_allclose(seen, jax.vmap(moved)(x), rtol=1e-4)
    for wrong in (0.0, -1.0, jnp.ones(2), jnp.nan):
        with pytest.raises((ValueError, TypeError), match="alpha"):
            models.Centred(g, wrong)
    with pytest.raises(ValueError, match="^model"):
        models.Centred(jnp.ones(3))


@pytest.mark.slow
def test_a_lazy_model_is_kernel_regression():
    """f(t) = (I − e^{−Kt/n})y, K = J₀J₀ᵀ, for the flow of F/α²: as α → ∞, with an error
    of O(1/α); and α²JJᵀ is the clock of the flow of F."""
    x, y, ts = normal(3, 4, 3), normal(4, 4), np.linspace(0, 20, 9)
    errors = []
    for alpha in (1e2, 1e3, 1e4):
        model, loss = centred(alpha), gf.SquaredError(x, y)
        theta, unravel = jax.flatten_util.ravel_pytree(model.model)
        jac = jax.jacrev(lambda th, back=unravel: jax.vmap(back(th))(x))(theta)
        values, basis = np.linalg.eigh(np.asarray(jac @ jac.T) / 4)
        decay = 1 - np.exp(-values * ts[:, None])
        right = (decay * (basis.T @ np.asarray(y))) @ basis.T
        path = gf.simulate(
            gf.GradientFlow(loss), model, weight_decay=0.0,
            ts=jnp.asarray(ts / alpha**2), rtol=1e-9,
        )  # fmt: skip
        found = np.stack([jax.vmap(path[i])(x) for i in range(9)])
        assert_allclose(path[8].initial.inner, model.model.inner)
        moved = np.abs(
            np.asarray(path.models.model.inner[-1] - model.model.inner)
        ).max()
        errors.append((np.abs(found - right).max(), moved))
    for (one, far), (two, near) in zip(errors, errors[1:], strict=False):
        assert_allclose([one / two, far / near], 10, rtol=0.2)
    assert errors[-1][0] < 1e-3
