"""The metrics that come with the library, against closed forms and dense matrices."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import flat, Linear
from jax.flatten_util import ravel_pytree

import gradflow as gf
from gradflow.metrics import (
    Accuracy,
    EffectiveRank,
    Margin,
    Norm,
    Sharpness,
    SingularValues,
)

SPECTRUM = np.array([5.0, 5.0, 5.0, 3.0, 1.0, 0.5, 0.0, 0.0, -7.0])


def quadratic(values):
    """½wᵀAw, A with these eigenvalues, and some w."""
    size = len(values)
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))[0]
    a = jnp.asarray(q @ np.diag(values) @ q.T)
    return gf.Loss(lambda m: 0.5 * m.w @ a @ m.w), Linear(jnp.ones(size))


def test_sharpness_of_a_quadratic():
    """Equal eigenvalues are all found, and the largest is not the largest in size."""
    loss, model = quadratic(SPECTRUM)
    np.testing.assert_allclose(gf.sharpness(loss, model), 5.0, rtol=1e-12)
    both = gf.GradientFlow(loss, penalty=3 * gf.L2())
    top = gf.sharpness(both, model, count=4, weight_decay=0.1)
    np.testing.assert_allclose(top, SPECTRUM[:4] + 0.3, rtol=1e-12)
    every = gf.sharpness(loss, model, count=9)
    np.testing.assert_allclose(every, SPECTRUM, rtol=1e-12, atol=1e-13)


def test_sharpness_of_one_of_several_outputs():
    """Each eigenvalue of XᵀX/n once for each output."""
    x = jr.normal(jr.key(0), (20, 5))
    loss = gf.SquaredError(x, jnp.zeros((20, 3)))
    model = eqx.nn.Linear(5, 3, use_bias=False, key=jr.key(1))
    values = np.repeat(np.linalg.eigvalsh(x.T @ x / 20)[::-1], 3)
    top = gf.sharpness(loss, model, count=5)
    np.testing.assert_allclose(top, values[:5], rtol=1e-8)


def tanh_net():
    x = jr.normal(jr.key(0), (10, 3))
    model = eqx.nn.MLP(3, "scalar", 30, 1, jnp.tanh, key=jr.key(1))
    return gf.SquaredError(x, jnp.sin(x[:, 0])), model


def hessian(loss, model):
    params, static = eqx.partition(model, eqx.is_inexact_array)
    theta, unravel = ravel_pytree(params)
    return jax.hessian(lambda th: loss(eqx.combine(unravel(th), static)))(theta)


def test_sharpness_of_a_network():
    """Against all eigenvalues, in a third as many products; of several models at once;
    and of those parameters alone that are trained."""
    loss, model = tanh_net()
    dense = np.linalg.eigvalsh(hessian(loss, model))[::-1]
    assert dense.size == 151
    metric = Sharpness(loss, count=3, max_steps=60)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    scales = jnp.array([1.0, 0.5, 2.0])
    many = jax.vmap(lambda s: jax.tree.map(lambda p: s * p, params))(scales)
    top = jax.jit(jax.vmap(lambda p: metric(eqx.combine(p, static))))(many)
    for found, scale in zip(top, scales, strict=True):
        own = hessian(loss, gf.scaled(model, scale))
        values = np.linalg.eigvalsh(own)[::-1]
        np.testing.assert_allclose(found, values[:3], rtol=1e-6)
    first = lambda leaf: eqx.is_inexact_array(leaf) and leaf.shape == (30, 3)
    part = gf.sharpness(loss, model, trainable=first)
    block = hessian(loss, model)[:90, :90]
    np.testing.assert_allclose(part, np.linalg.eigvalsh(block)[-1], rtol=1e-6)


def test_sharpness_that_has_not_converged():
    loss, model = quadratic(np.linspace(1.0, 2.0, 400))
    with pytest.raises(RuntimeError, match="Raise `max_steps`"):
        gf.sharpness(loss, model, max_steps=20)
    assert np.isnan(gf.sharpness(loss, model, max_steps=20, throw=False))
    fine = gf.sharpness(loss, model, max_steps=20, rtol=0.1)
    assert abs(fine - 2.0) < 0.1
    nowhere = Linear(jnp.full(400, jnp.nan))
    curved = gf.Loss(lambda m: jnp.sum(m.w**4))
    assert np.isnan(eqx.filter_jit(Sharpness(curved))(nowhere))


def test_descent_is_stable_below_two_over_the_sharpness():
    loss, model = quadratic([4.0, 1.0, 0.5])
    limit = 2 / float(gf.sharpness(loss, model))
    flow, watch = gf.GradientFlow(loss), {"sharpness": Sharpness(loss, count=2)}
    run = lambda h: gf.descent(
        flow, model, weight_decay=0.0, learning_rate=h, steps=2000, throw=False,
        saves=5, metrics=watch,
    )  # fmt: skip
    path = run(0.99 * limit)
    np.testing.assert_allclose(path.metrics["sharpness"], [[4.0, 1.0]] * 5, rtol=1e-9)
    assert path.succeeded and path.train_loss[-1] < 1e-12
    assert run(1.01 * limit).result == gf.RESULTS.overshot


def test_sharpness_in_single_precision():
    single = lambda tree: jax.tree.map(
        lambda a: a.astype(jnp.float32) if eqx.is_inexact_array(a) else a, tree
    )
    loss, model = tanh_net()
    values = gf.sharpness(*single((loss, model)), count=2, rtol=1e-9)
    assert values.dtype == jnp.float32
    dense = np.linalg.eigvalsh(hessian(loss, model))[::-1]
    np.testing.assert_allclose(values, dense[:2], rtol=1e-4)


@pytest.mark.parametrize(
    "name, options",
    [
        ("count", dict(count=0)),
        ("count", dict(count=10)),
        ("rtol", dict(rtol=0.0)),
        ("max_steps", dict(max_steps=0)),
        ("weight_decay", dict(weight_decay=-1.0)),
        ("weight_decay", dict(weight_decay=0.1, penalty=gf.L1())),
        ("trainable", dict(trainable=eqx.is_array, penalty=gf.L2())),
        ("flow", dict(hold_norm=True)),
    ],
)
def test_what_sharpness_does_not_take(name, options):
    loss, model = quadratic(SPECTRUM)
    flow = {k: options.pop(k) for k in ("penalty", "hold_norm") if k in options}
    of = gf.GradientFlow(loss, **flow) if flow else loss
    with pytest.raises(ValueError, match=f"^{name}: [^\n]*$"):
        gf.sharpness(of, model, **options)


class Relu(eqx.Module):
    """Two layers, homogeneous of degree 2."""

    first: jax.Array
    second: jax.Array

    def __call__(self, x):
        return self.second @ jax.nn.relu(self.first @ x)


def test_margin_and_accuracy():
    x, labels = jr.normal(jr.key(0), (12, 4)), jr.randint(jr.key(1), (12,), 0, 3)
    model = Relu(jr.normal(jr.key(2), (20, 4)), jr.normal(jr.key(3), (3, 20)))
    z = np.array(jax.vmap(model)(x))
    own = z[np.arange(12), labels]
    z[np.arange(12), labels] = -np.inf
    least = (own - z.max(axis=1)).min()
    margin = Margin(x, labels, degree=2)
    norm = np.linalg.norm(flat(model))
    np.testing.assert_allclose(margin(model), least / norm**2, rtol=1e-12)
    np.testing.assert_allclose(margin(gf.scaled(model, 7.0)), margin(model), rtol=1e-12)
    plain = Margin(x, labels, degree=0, where=lambda m: m.first)
    np.testing.assert_allclose(plain(model), least, rtol=1e-12)
    layer = Margin(x, labels, degree=1, where=lambda m: m.first)
    size = np.linalg.norm(model.first)
    np.testing.assert_allclose(layer(model), least / size, rtol=1e-12)
    np.testing.assert_allclose(Accuracy(x, labels)(model), (own > z.max(axis=1)).mean())
    # They know which way they are good; other functions are losses unless said.
    assert gf.Metric(Accuracy(x, labels), threshold=0.9).higher_is_better
    assert gf.Metric(margin).higher_is_better and not gf.Metric(Norm()).higher_is_better
    assert not gf.Metric(margin, higher_is_better=False).higher_is_better
    assert gf.Metric(eqx.filter_jit(Accuracy(x, labels))).higher_is_better
    assert gf.Metric(Norm(), 1.0, True).higher_is_better


def test_one_logit_is_that_of_label_one():
    x, labels = jnp.array([[1.0], [2.0], [-3.0]]), jnp.array([1, 1, 0])
    model = Linear(jnp.array([2.0]))
    assert Accuracy(x, labels)(model) == 1.0 and Margin(x, labels, degree=1)(model) == 1
    flipped = jnp.array([1, 0, 0])
    np.testing.assert_allclose(Accuracy(x, flipped)(model), 2 / 3)
    assert Margin(x, flipped, degree=0)(model) == -4.0
    with pytest.raises(ValueError, match=r"^metrics\['m'\]: labels: the largest is 2"):
        wrong = {"m": Margin(x, jnp.array([0, 1, 2]), degree=0)}
        flow = gf.GradientFlow(gf.Logistic(x, jnp.array([0.0, 1.0, 1.0])))
        gf.simulate(flow, model, weight_decay=0.1, t1=1.0, metrics=wrong)


def test_norms_singular_values_and_effective_rank():
    model = gf.models.DeepLinear(
        (jr.normal(jr.key(0), (4, 6)), jr.normal(jr.key(1), (3, 4)))
    )
    frozen = eqx.nn.Linear(2, 2, key=jr.key(2))
    np.testing.assert_allclose(
        Norm()((model, frozen, "name")), np.linalg.norm(flat((model, frozen)))
    )
    first = Norm(where=lambda m: m.weights[0])
    np.testing.assert_allclose(first(model), np.linalg.norm(model.weights[0]))
    exact = np.linalg.svd(np.asarray(model.matrix), compute_uv=False)
    product = lambda m: m.matrix
    np.testing.assert_allclose(SingularValues(product)(model), exact, rtol=1e-13)
    np.testing.assert_allclose(SingularValues(product, count=2)(model), exact[:2])
    p = exact / exact.sum()
    rank = EffectiveRank(product)
    np.testing.assert_allclose(rank(model), np.exp(-(p * np.log(p)).sum()), rtol=1e-13)
    tiny = gf.scaled(model, 1e-100)
    np.testing.assert_allclose(rank(tiny), rank(model), rtol=1e-12)
    itself = EffectiveRank(lambda m: m.w)
    of = lambda *values: float(itself(Linear(jnp.diag(jnp.array(values)))))
    np.testing.assert_allclose(of(2.0, 2.0, 2.0, 0.0), 3.0, rtol=1e-14)
    np.testing.assert_allclose(of(5.0, 0.0), 1.0, rtol=1e-14)
    assert of(0.0, 0.0) == 0.0 and np.isnan(of(np.nan, 1.0))


@pytest.mark.parametrize(
    "name, make",
    [
        ("where", lambda: SingularValues(lambda m: m.w)(Linear(jnp.ones(3)))),
        ("where", lambda: EffectiveRank(lambda m: m)(Linear(jnp.ones(3)))),
        ("count", lambda: SingularValues(lambda m: m.w, count=0)),
        ("count", lambda: SingularValues(lambda m: m.w, count=3)(Linear(jnp.eye(2)))),
        ("degree", lambda: Margin(jnp.ones((2, 1)), jnp.array([0, 1]), degree=-1.0)),
        ("labels", lambda: Margin(jnp.ones((2, 1)), jnp.array([0, -1]), degree=1.0)),
    ],
)
def test_what_metrics_do_not_take(name, make):
    with pytest.raises(ValueError, match=f"^{name}: [^\n]*$"):
        make()
