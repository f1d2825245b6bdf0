"""`descent`: its steps, its clocks, what it saves, what it refuses."""

import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import oracles
import pytest
from helpers import flat_paths, Linear, linear_problem, sup_error
from numpy.testing import assert_allclose

import gradflow as gf

ALPHA, LAM = 0.1, 1e-2


@pytest.fixture(scope="module")
def sparse():
    """A sparse recovery, its flow and its arrays."""
    task = gf.tasks.sparse_recovery(
        jr.key(3), features=12, samples=6, sparsity=1, scale=0.1
    )
    arrays = [np.asarray(task.truth.features), np.asarray(task.truth.targets)]
    return task, arrays, np.asarray(task.model.weights)


@pytest.fixture(scope="module")
def linear():
    loss, model = linear_problem(jr.key(1), samples=3, features=6)
    return gf.GradientFlow(loss), model


@pytest.mark.parametrize(
    "method, loop",
    [
        ("subgradient", oracles.subgradient_loop),
        ("proximal", oracles.ista_loop),
        ("projected", oracles.projected_loop),
    ],
)
def test_each_step_is_that_of_a_numpy_loop(sparse, method, loop):
    task, (x, y), start = sparse
    path = gf.descent(
        task.flow,
        task.model,
        weight_decay=LAM,
        learning_rate=ALPHA,
        at=[0, 1, 7, 40],
        method=method,
        metrics=task.metrics,
    )
    for i, steps in enumerate([0, 1, 7, 40]):
        a = loop(x, y, start, ALPHA, LAM, steps)
        assert_allclose(path.params.weights[i], a, rtol=1e-10, atol=1e-14)
        assert_allclose(path.train_loss[i], 0.5 * ((x @ a - y) ** 2).sum(), atol=1e-14)
        assert_allclose(path.penalty[i], np.abs(a).sum())
        miss = np.linalg.norm(x @ a - y) / np.linalg.norm(y)
        assert_allclose(path.metrics["train"][i], miss, atol=1e-13)
    assert_allclose(path.t, ALPHA * np.array([0, 1, 7, 40]))
    assert_allclose(path.slow_time, LAM * path.t)
    if method == "projected":
        assert (path.metrics["train"][1:] < 1e-13).all() and path.metrics["train"][
            0
        ] > 1


def test_proximal_steps_end_at_the_lasso_and_projected_ones_at_basis_pursuit(sparse):
    task, (x, y), _ = sparse
    run = lambda **kwargs: gf.descent(
        task.flow, task.model, learning_rate=ALPHA, metrics=task.metrics, **kwargs
    )
    path = run(weight_decay=LAM, slow_time=200.0, method="proximal")
    end = np.asarray(path[-1].weights)
    assert oracles.lasso_violation(x, y, LAM, end) < 1e-10
    assert_allclose(end, oracles.lasso(x, y, LAM), atol=1e-10)
    # Constant steps hover at a distance of order αλ from where they lead.
    path = run(weight_decay=1e-4, slow_time=20.0, method="projected")
    assert_allclose(path[-1].weights, oracles.basis_pursuit(x, y), atol=1e-4)
    assert path.metrics["train"][-1] < 1e-13


def test_gradient_descent_is_the_flow_to_first_order(linear):
    flow, model = linear
    truth = gf.tasks.LinearTruth(
        flow.loss.x, flow.loss.y, model.w, model.w, curvature=1 / 3
    )
    errors = []
    for alpha in (4e-3, 2e-3):
        path = gf.descent(
            flow, model, weight_decay=0.1, learning_rate=alpha, t1=10.0, saves=9
        )
        assert path.t[-1] == pytest.approx(10.0)
        exact = np.asarray(truth.path(path.t, 0.1))
        errors.append(sup_error(flat_paths(path), exact))
    assert np.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.05)


def test_decoupled_adam_is_adamw(linear):
    flow, model = linear
    make = lambda: optax.adamw(1e-2, weight_decay=0.5)
    path = gf.descent(
        flow,
        model,
        weight_decay=0.5,
        learning_rate=1e-2,
        steps=20,
        method="decoupled",
        optimiser=optax.adam,
    )
    optimiser, w = make(), model.w
    state = optimiser.init(w)
    for _ in range(20):
        force = jax.grad(lambda w: flow.loss(Linear(w)))(w)
        with jax.numpy_dtype_promotion("standard"):
            update, state = optimiser.update(force, state, w)
        w = optax.apply_updates(w, update)
    assert_allclose(path[-1].w, w, rtol=1e-10)
    # lr · γ · steps
    assert path.slow_time[-1] == pytest.approx(1e-2 * 0.5 * 20)
    assert "decoupled with adam" in str(path)


def test_a_ready_optimiser_sees_the_penalty(linear):
    flow, model = linear
    rule = dict(weight_decay=0.5, learning_rate=1e-2, steps=5)
    ready = gf.descent(flow, model, optimiser=optax.sgd(1e-2, momentum=0.9), **rule)
    w, velocity = model.w, jnp.zeros(6)
    for _ in range(5):
        force = jax.grad(lambda w: flow.loss(Linear(w)))(w) + 0.5 * w
        velocity = force + 0.9 * velocity
        w = w - 1e-2 * velocity
    assert_allclose(ready[-1].w, w, rtol=1e-10)
    assert not np.allclose(w, gf.descent(flow, model, **rule)[-1].w)


def test_saved_steps():
    assert gf.log_spaced_steps(5).tolist() == [0, 1, 2, 3, 4, 5]
    for steps, saves in ((100, 30), (10**8, 65), (1000, 3), (70, 65)):
        numbers = gf.log_spaced_steps(steps, saves)
        assert numbers[0] == 0 and numbers[1] == 1 and numbers[-1] == steps
        assert (np.diff(numbers) > 0).all() and numbers.size <= saves
        assert numbers.size >= 0.95 * saves - 1
    far = np.diff(np.log(gf.log_spaced_steps(10**8, 65)[20:]))
    assert_allclose(far, far.mean(), rtol=0.01)


def test_vmap_over_rates_and_decays(sparse):
    task, (x, y), start = sparse

    def end(rate, lam):
        path = gf.descent(
            task.flow, task.model, weight_decay=lam, learning_rate=rate, steps=30
        )
        return path[-1].weights, path.slow_time[-1]

    rates, lams = jnp.array([0.1, 0.05]), jnp.array([1e-2, 0.1])
    ends, slow = jax.jit(jax.vmap(end))(rates, lams)
    for i in range(2):
        loop = oracles.subgradient_loop(
            x, y, start, float(rates[i]), float(lams[i]), 30
        )
        assert_allclose(ends[i], loop, rtol=1e-10)
    assert_allclose(slow, 30 * rates * lams)


def test_minibatches_visit_every_sample_once_an_epoch(linear):
    """With F = Σ ½(w·eᵢ − 1)² each sample moves a coordinate of its own."""
    _, model = linear
    eye = gf.SquaredError(jnp.eye(6), jnp.ones(6), reduction="sum")
    flow = gf.GradientFlow(eye)
    rule = dict(weight_decay=0.0, learning_rate=0.01, at=list(range(7)))
    run = lambda **kwargs: gf.descent(flow, Linear(jnp.zeros(6)), **rule, **kwargs)
    path = run(batch_size=2, key=jr.key(0))
    moved = np.diff(np.asarray(path.params.w), axis=0) != 0
    assert (moved.sum(axis=1) == 2).all()
    assert (moved[:3].sum(axis=0) == 1).all() and (moved[3:].sum(axis=0) == 1).all()
    assert (moved[:3] != moved[3:]).any()
    # An unbiased estimate: two of six samples stand for all.
    assert_allclose(path.params.w[1][moved[0]], 0.01 * 3)
    assert eqx.tree_equal(path.params, run(batch_size=2, key=jr.key(0)).params)
    # Four do not divide six: the second batch is filled up with the first two.
    filled = np.diff(np.asarray(run(batch_size=4, key=jr.key(0)).params.w), axis=0) != 0
    assert (filled.sum(axis=1) == 4).all() and filled[:2].any(axis=0).all()
    whole = run(batch_size=6, key=jr.key(0))
    assert_allclose(whole.params.w, run().params.w, rtol=1e-12)


def test_minibatches_of_labels():
    x = jr.normal(jr.key(0), (9, 2))
    loss = gf.CrossEntropy(x, jnp.arange(9) % 3)
    model = eqx.nn.Linear(2, 3, key=jr.key(1))
    path = gf.descent(
        gf.GradientFlow(loss),
        model,
        weight_decay=1e-3,
        learning_rate=1e-2,
        optimiser=optax.adam,
        steps=200,
        batch_size=4,
        key=jr.key(2),
    )
    assert path.train_loss[-1] < path.train_loss[0]
    assert_allclose(path.train_loss[-1], loss(path[-1]))


def test_what_leaves_the_finite_range_is_named(linear):
    flow, model = linear
    run = lambda throw: gf.descent(
        flow, model, weight_decay=0.0, learning_rate=1e3, steps=1000, throw=throw
    )
    path = run(False)
    assert path.result == gf.RESULTS.overshot and not path.succeeded
    lost = np.isnan(np.asarray(path.train_loss))
    assert lost[-1] and not lost[:2].any() and (np.diff(lost) >= 0).all()
    assert "FAILED: The descent left the finite range" in str(path)
    with pytest.raises(RuntimeError, match="learning rate is likely above 2/L"):
        run(True)


def test_what_is_frozen_stays_and_it_can_be_drawn(sparse):
    task, _, _ = sparse
    model = gf.models.DiagonalNetwork(jnp.full(12, 0.3), jnp.full(12, 0.2))
    only_u = eqx.tree_at(lambda m: (m.u, m.v), model, (True, False))
    flow = gf.GradientFlow(task.loss, trainable=only_u)
    path = gf.descent(
        flow,
        model,
        weight_decay=LAM,
        learning_rate=ALPHA,
        steps=10,
        metrics={"beta": lambda m: m.beta[0]},
        progress=True,
    )
    assert (path[-1].v == 0.2).all() and (path[-1].u != 0.3).all()
    ax = path.plot()
    assert len(ax.lines) >= 3
    text = str(path)
    assert "descent (subgradient), 10 steps of 0.1" in text and "12 parameters" in text


def test_single_precision(sparse):
    task, (x, y), start = sparse
    single = lambda tree: jax.tree.map(
        lambda a: a.astype(jnp.float32) if eqx.is_inexact_array(a) else a, tree
    )
    path = gf.descent(
        single(task.flow),
        single(task.model),
        weight_decay=LAM,
        learning_rate=ALPHA,
        steps=20,
        method="proximal",
        optimiser=optax.adam,
    )
    assert path.params.weights.dtype == jnp.float32 == path.t.dtype


BAD = {
    "no length": (dict(), "give exactly one, got none"),
    "two lengths": (dict(steps=3, t1=1.0), "give exactly one"),
    "steps": (dict(steps=0), "steps: expected an integer >= 1, got 0"),
    "float steps": (dict(steps=3.0), "steps: expected an integer"),
    "t1": (dict(t1=-1.0), "t1: expected a positive"),
    "no decay": (dict(slow_time=1.0, weight_decay=0.0), "needs weight_decay > 0"),
    "at": (dict(at=[0, 3, 3]), "at: expected increasing"),
    "at of times": (dict(at=[0.0, 1.0]), "at: expected a vector of two or more integ"),
    "saves": (dict(steps=9, saves=2), "saves: expected an integer >= 3"),
    "rate": (dict(steps=3, learning_rate=0.0), "learning_rate: expected a positive"),
    "rates": (dict(steps=3, learning_rate=np.ones(2)), "learning_rate: expected one"),
    "decay": (dict(steps=3, weight_decay=-1.0), "weight_decay: expected a finite"),
    "method": (dict(steps=3, method="mirror"), "method: expected one of 'subgradient'"),
    "key": (dict(steps=3, batch_size=2), "key: expected one"),
    "no batches": (dict(steps=3, key=jr.key(0)), "key: it is for minibatches"),
    "batch": (dict(steps=3, batch_size=9, key=jr.key(0)), "from 1 to 3, got 9"),
    "projected": (
        dict(steps=3, method="projected", optimiser=optax.adam),
        "takes no optimiser",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(linear, name):
    flow, model = linear
    kwargs, message = BAD[name]
    descent = inspect.unwrap(gf.descent)  # without the checks of types
    with pytest.raises(ValueError, match=message):
        descent(flow, model, **{"weight_decay": 0.1, "learning_rate": 0.1, **kwargs})


def test_what_has_no_interpolants_to_project_on_is_refused(sparse):
    task, _, _ = sparse
    rule = dict(weight_decay=0.1, learning_rate=0.1, steps=2, method="projected")
    bent = gf.models.DiagonalNetwork(jnp.full(12, 0.3), jnp.full(12, 0.2))
    with pytest.raises(ValueError, match="affine in the parameters"):
        gf.descent(task.flow, bent, **rule)
    two = gf.SquaredError(jnp.ones((2, 1)), jnp.array([0.0, 1.0]))
    with pytest.raises(ValueError, match="data that they can fit"):
        gf.descent(gf.GradientFlow(two), Linear(jnp.ones(1)), **rule)
    with pytest.raises(ValueError, match="needs a SquaredError"):
        loss = gf.Huber(jnp.ones((1, 1)), jnp.ones(1))
        gf.descent(gf.GradientFlow(loss), Linear(jnp.ones(1)), **rule)
    opaque = gf.GradientFlow(gf.Loss(lambda m: jnp.sum(m.w**2)))
    with pytest.raises(ValueError, match="no samples known"):
        gf.descent(
            opaque,
            Linear(jnp.ones(1)),
            weight_decay=0.1,
            learning_rate=0.1,
            steps=1,
            batch_size=1,
            key=jr.key(0),
        )
