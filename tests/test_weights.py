"""Weights of samples, and soft labels: a weight of zero is a sample left out."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from numpy.testing import assert_allclose

import gradflow as gf
from gradflow.models import LinearModel, TwoLayer

SIDES = jnp.array([1.0, -1, -1, 1, 1])
LOSSES = {
    "squared": (gf.SquaredError, jnp.array([0.3, -1.2, 0.5, 2.0, -0.4])),
    "Huber": (
        functools.partial(gf.Huber, delta=0.6),
        jnp.array([0.3, -1.2, 0.5, 2.0, -0.4]),
    ),
    "logistic": (gf.Logistic, jnp.array([1.0, 0, 0.3, 1, 0])),
    "soft margin": (gf.SoftMargin, SIDES),
    "exponential": (gf.Exponential, SIDES),
    "hinge": (gf.Hinge, SIDES),
    "entropy": (gf.CrossEntropy, jnp.array([0, 2, 1, 1, 0])),
    "soft entropy": (
        gf.CrossEntropy,
        jax.nn.softmax(jr.normal(jr.key(9), (5, 3)), axis=1),
    ),
}
X = jr.normal(jr.key(1), (5, 3))


def network(name, key=2, width=4):
    keys = jr.split(jr.key(key), 3)
    outer = (3, width) if "entropy" in name else (width,)
    return TwoLayer(
        jr.normal(keys[0], (width, 3)), jr.normal(keys[1], (width,)),
        jr.normal(keys[2], outer),
    )  # fmt: skip


def without(name, weights):
    """The loss with weights, and that of the samples as often as they say."""
    make, y = LOSSES[name]
    times = np.repeat(np.arange(5), weights)
    whole = jnp.asarray(weights)
    return make(X, y, weights=whole), make(X[times], y[times])


@pytest.mark.parametrize("name", LOSSES)
def test_a_weight_is_how_often_a_sample_counts(name):
    """In value, forces, curvature, and where the residuals are known better."""
    weights = [1, 0, 3, 2, 1]
    one, two = without(name, weights)
    model = network(name)
    assert_allclose(one(model), two(model), rtol=1e-13)
    forces = [jax.tree.leaves(jax.grad(loss)(model)) for loss in (one, two)]
    for a, b in zip(*forces, strict=True):
        assert_allclose(a, b, rtol=1e-11, atol=1e-14)
    kept = one.outer_from(one.residuals(model), one.outputs(model))
    assert_allclose(kept, one(model), rtol=1e-12)
    k = one.outputs(model).size // 5
    curvature = jax.hessian(one.outer)(one.outputs(model))
    right = np.asarray(jax.hessian(two.outer)(two.outputs(model)))
    first = np.searchsorted(np.repeat(np.arange(5), weights), np.arange(5))
    for i in range(5):
        block = np.asarray(curvature)[i * k : i * k + k, i * k : i * k + k]
        if weights[i]:
            j = first[i] * k
            assert_allclose(
                block, weights[i] * right[j : j + k, j : j + k], rtol=1e-11, atol=1e-16
            )
        else:
            assert not block.any()


def test_the_sum_takes_weights_as_they_are():
    w = jnp.array([0.5, 0.0, 2.0, 1.0, 7.0])
    model = network("squared")
    r = np.asarray(jax.vmap(model)(X) - LOSSES["squared"][1])
    total = gf.SquaredError(X, LOSSES["squared"][1], weights=w, reduction="sum")
    assert_allclose(total(model), 0.5 * (w * r**2).sum(), rtol=1e-13)
    assert_allclose(total.residuals(model), w * r, rtol=1e-12)
    mean = gf.SquaredError(X, LOSSES["squared"][1], weights=w)
    assert_allclose(mean(model), total(model) / w.sum(), rtol=1e-13)


def test_what_has_no_weight_may_be_infinite():
    z = jnp.array([800.0, 1.0])
    w = jnp.array([0.0, 1.0])
    loss = gf.Exponential(z, jnp.array([-1.0, 1.0]), weights=w)
    assert_allclose(loss.outer(z), np.exp(-1))
    assert_allclose(jax.grad(loss.outer)(z), [0, -np.exp(-1)])
    assert_allclose(loss.outer_from(jax.grad(loss.outer)(z), z), np.exp(-1))


ERRORS = [
    jnp.ones(4), jnp.ones((5, 1)), jnp.array([1.0, -1, 1, 1, 1]), jnp.zeros(5),
    jnp.array([1.0, jnp.nan, 1, 1, 1]), jnp.ones(5, complex),
]  # fmt: skip


@pytest.mark.parametrize("weights", ERRORS)
@pytest.mark.parametrize("name", ["squared", "entropy", "hinge"])
def test_errors_name_the_weights(name, weights):
    make, y = LOSSES[name]
    with pytest.raises((ValueError, TypeError), match="weights"):
        make(X, y, weights=weights)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_a_path_without_a_sample(name):
    """Of the loss with a weight of zero, and of the loss without that sample."""
    solvers = (gf.KKT4(), gf.KKT4(matrix_free=True))
    for solver in solvers if name == "hinge" else solvers[:1]:
        found = [
            gf.simulate(
                gf.GradientFlow(loss),
                network(name),
                weight_decay=1e-2,
                t1=200.0,
                rtol=1e-8,
                solver=solver,
            )  # fmt: skip
            for loss in without(name, [1, 1, 0, 2, 1])
        ]
        for a, b in zip(*(jax.tree.leaves(p.params) for p in found), strict=True):
            assert_allclose(a, b, atol=2e-6)
        assert_allclose(found[0].train_loss, found[1].train_loss, rtol=1e-4)


@pytest.mark.slow
def test_manifold_without_a_sample():
    """Limit, rank, tangent space and drift, of the same set {r = 0}."""
    one, two = without("squared", [1, 1, 0, 2, 1])
    model = network("squared", width=6)
    limits = [gf.manifold.limit_map(loss, model) for loss in (one, two)]
    assert_allclose(limits[0].model.inner, limits[1].model.inner, atol=1e-7)
    on = limits[1].model
    r = jax.vmap(on)(X) - LOSSES["squared"][1]
    assert abs(r[2]) > 0.1 and jnp.abs(r.at[2].set(0)).max() < 1e-9
    found = [gf.manifold.spectrum(loss, on) for loss in (one, two)]
    assert int(found[0].rank) == int(found[1].rank) == 4
    assert_allclose(found[0].values[:4], found[1].values[:4], rtol=1e-6)
    v = network("squared", 5, 6)
    tangents = [gf.manifold.tangent_projection(loss, on, v) for loss in (one, two)]
    for a, b in zip(*map(jax.tree.leaves, tangents), strict=True):
        assert_allclose(a, b, atol=1e-9)
    drifts = [
        gf.manifold.riemannian_flow(gf.GradientFlow(loss), on, slow_time=1.0)
        for loss in (one, two)
    ]
    assert_allclose(drifts[0].params.inner, drifts[1].params.inner, atol=1e-7)


@pytest.mark.slow
def test_weighted_regression_in_closed_form():
    """θ' = −(XᵀWX/Σw + λ)θ + XᵀWy/Σw; and M asks nothing of a sample without
    weight."""
    rng = np.random.default_rng(0)
    x, y, w = (
        rng.normal(size=(6, 4)),
        rng.normal(size=6),
        np.array([1, 2, 0, 0.5, 3, 1]),
    )
    lam = 1e-2
    loss = gf.SquaredError(jnp.asarray(x), jnp.asarray(y), weights=jnp.asarray(w))
    path = gf.simulate(
        gf.GradientFlow(loss), LinearModel(jnp.ones(4)), weight_decay=lam, t1=300.0,
        rtol=1e-9,
    )  # fmt: skip
    h = x.T @ (w[:, None] * x) / w.sum() + lam * np.eye(4)
    end = np.linalg.solve(h, x.T @ (w * y) / w.sum())
    values, basis = np.linalg.eigh(h)
    decay = np.exp(-values * np.asarray(path.t)[:, None])
    right = end + (decay * (basis.T @ (1 - end))) @ basis.T
    assert_allclose(path.params.weights, right, atol=1e-7)
    least = 0.5 * (w * (x @ right[-1] - y) ** 2).sum() / w.sum()
    assert_allclose(path.train_loss[-1], least, rtol=1e-7)


def test_minibatches_take_weights_and_soft_labels():
    """The mean over the batches of an epoch is the whole loss."""
    from gradflow.runs.minibatch import minibatch

    w = jnp.array([0.5, 0.0, 2.0, 1.0, 3.0, 1.5])
    x = jr.normal(jr.key(3), (6, 3))
    q = jax.nn.softmax(jr.normal(jr.key(4), (6, 3)), axis=1)
    y = q[:, 0]
    losses = [
        gf.CrossEntropy(x, q, weights=w),
        gf.CrossEntropy(x, q),
        gf.SquaredError(x, y, weights=w),
        gf.SquaredError(x, y, weights=w, reduction="sum"),
    ]
    for loss in losses:
        model = network("entropy" if isinstance(loss, gf.CrossEntropy) else "squared")
        order, found = jnp.arange(6), []
        for step in range(3):
            batch, order = minibatch(loss, order, jr.key(5), jnp.array(step), 2)
            found.append(batch(model))
        assert_allclose(np.mean(found), loss(model), rtol=1e-12)
        assert np.ptp(found) > 1e-3


@pytest.mark.slow
def test_descent_on_weighted_minibatches():
    w = jnp.array([1.0, 1, 0, 2, 1])
    loss = gf.CrossEntropy(X, LOSSES["soft entropy"][1], weights=w)
    path = gf.descent(
        gf.GradientFlow(loss), network("entropy"), weight_decay=0.0,
        learning_rate=0.05, steps=2000, batch_size=2, key=jr.key(0),
    )  # fmt: skip
    assert path.train_loss[-1] < 0.7 * path.train_loss[0]


# Soft labels


def test_hard_rows_are_integer_labels():
    """To the last digit or two: value, slope and curvature, near and far."""
    z = jnp.asarray(
        np.array([[40.0, 0, -1], [-3, 700, 2], [0.1, 0.2, 0.3], [5, 5, 60]])
    )
    labels = jnp.array([0, 1, 2, 0])
    one = gf.CrossEntropy(z, labels)
    two = gf.CrossEntropy(z, jax.nn.one_hot(labels, 3, dtype=float))
    flat, u = z.ravel(), jnp.linspace(-1.0, 2, 12)
    for fn in (
        lambda loss: loss.outer(flat),
        lambda loss: jax.grad(loss.outer)(flat),
        lambda loss: jax.jvp(jax.grad(loss.outer), (flat,), (u,))[1],
        lambda loss: loss.outer_from(jax.grad(loss.outer)(flat), flat),
        lambda loss: loss.margins(flat),
    ):
        assert_allclose(fn(one), fn(two), rtol=1e-15)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_soft_labels_do_not_cancel(dtype):
    """Value, slope and curvature to all digits, where p is far from q or q is small."""
    scale = np.array([0.5, 3, 20, 60])
    z = (scale[:, None] * np.array([[1.0, -0.3, -0.5]])).astype(dtype)
    q = np.array(
        [[0.2, 0.5, 0.3], [0.9, 0.1, 0], [1e-6, 1 - 1e-6, 0], [0.5, 0.25, 0.25]]
    )
    loss = gf.CrossEntropy(jnp.asarray(z), jnp.asarray(q, dtype))
    big, q = z.astype(np.longdouble), np.asarray(loss.labels).astype(np.longdouble)
    weights = np.exp(big - big.max(axis=1, keepdims=True))
    p = weights / weights.sum(axis=1, keepdims=True)
    apart = p[:, None, :] * (1 - np.eye(3))
    slope = (1 - q) * p - q * apart.sum(axis=2)
    u = np.array([0.3, -1.0, 2.0], dtype)
    curved = p * ((u[:, None] - u[None]) * p[:, None, :]).sum(axis=2)
    value = -(q * np.log(p)).sum(axis=1).mean()
    eps, flat = np.finfo(dtype).eps, jnp.asarray(z.ravel())
    assert_allclose(loss.outer(flat), float(value), rtol=20 * eps)
    found = jax.grad(loss.outer)(flat)
    assert_allclose(
        found, (slope / 4).astype(float).ravel(), rtol=100 * eps, atol=1e-37
    )
    along = jnp.asarray(np.tile(u, 4))
    found = jax.jvp(jax.grad(loss.outer), (flat,), (along,))[1]
    assert_allclose(
        found, (curved / 4).astype(float).ravel(), rtol=100 * eps, atol=1e-37
    )
    # And by the labels: −log p, less what dividing by their sum takes back.
    rows = jnp.asarray(q.astype(dtype))
    found = jax.grad(lambda q: gf.CrossEntropy(jnp.asarray(z), q).outer(flat))(rows)
    each = -(q * np.log(p)).sum(axis=1, keepdims=True)
    right = ((-np.log(p) - each) / 4).astype(float)
    assert_allclose(found, right, rtol=300 * eps, atol=300 * eps)


def test_labels_that_are_no_probabilities():
    q = jnp.full((5, 3), 1 / 3)
    for wrong, words in (
        (2 * q, "sum of 2"),
        (q.at[0].set(jnp.array([1.5, -0.5, 0.0])), "negative"),
        (q.at[0, 0].set(jnp.nan), "not finite"),
    ):
        with pytest.raises(ValueError, match=f"^labels: .*{words}"):
            gf.CrossEntropy(X, wrong)
    with pytest.raises(ValueError, match=r"^labels: .*\(5, 3\).*\(5, 2\)"):
        gf.CrossEntropy(X, jnp.full((5, 2), 0.5))(network("entropy"))


@pytest.mark.slow
def test_smoothed_labels_have_a_minimiser():
    """softmax(f) = q, the whole of M; and it is found."""
    labels = jax.nn.one_hot(LOSSES["entropy"][1], 3, dtype=float)
    q = 0.9 * labels + 0.1 / 3
    loss, model = gf.CrossEntropy(X, q), network("entropy", width=8)
    found = gf.manifold.limit_map(loss, model)
    p = jax.nn.softmax(jax.vmap(found.model)(X), axis=1)
    assert_allclose(p, q, atol=1e-9)
    assert_allclose(loss(found.model), -(q * jnp.log(q)).sum(axis=1).mean())
    # Two of three logits count for each sample.
    assert int(gf.manifold.spectrum(loss, found.model).rank) == 10
    # With a weight decay F ends above that by O(λ²).
    path = gf.simulate(gf.GradientFlow(loss), model, weight_decay=1e-5, slow_time=0.5)
    assert_allclose(path.train_loss[-1], loss(found.model), rtol=1e-6)
    # Whose limit is the drift.
    flow, off = gf.GradientFlow(loss), []
    drift = gf.manifold.riemannian_flow(flow, found.model, slow_time=0.5)
    for lam in (1e-4, 1e-5):
        run = gf.simulate(flow, found.model, weight_decay=lam, slow_time=0.5, rtol=1e-8)
        apart = ravel_pytree(run[-1])[0] - ravel_pytree(drift[-1])[0]
        off.append(jnp.linalg.norm(apart))
    assert off[1] < 1e-2 and 9 < off[0] / off[1] < 11


def test_margins_of_what_labels_may_be():
    z = jnp.array([[1.0, 4.0, 2.5], [0.0, 1.0, 2.0]])
    q = jnp.array([[0.0, 0.4, 0.6], [0.2, 0.3, 0.5]])
    assert_allclose(gf.CrossEntropy(z, q).margins(z.ravel()), [1.5, np.inf])
    assert_allclose(gf.Logistic(z, q > 0.35).margins(z.ravel())[:3], [-1, 4, 2.5])
    assert np.isinf(gf.Logistic(z, q).margins(z.ravel())[1:]).all()


def test_a_loss_from_a_file_that_knew_no_weights():
    whole = gf.SquaredError(X, LOSSES["squared"][1])
    old = object.__new__(gf.SquaredError)
    for field in ("x", "y", "reduction", "predict"):
        object.__setattr__(old, field, getattr(whole, field))
    model = network("squared")
    assert old.weights is None and old(model) == whole(model)
