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
from gradflow.runs.methods import scheduled

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
    assert "FAILED: The descent went up instead" in str(path)
    with pytest.raises(RuntimeError, match="learning_rate` is likely above 2/L"):
        run(True)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_large_numbers_are_in_the_finite_range(dtype):
    """What is large is no failure: it may be the unit, or growth that is exact."""
    x = jnp.linspace(-1.0, 1.0, 7, dtype=dtype)
    fit = gf.SquaredError(x, 3e6 * x)
    rule = dict(weight_decay=0.0, learning_rate=0.5, saves=3)
    start = Linear1(jnp.zeros((), dtype))
    path = gf.descent(gf.GradientFlow(fit), start, steps=200, **rule)
    assert path.result == gf.RESULTS.successful
    assert_allclose(path[-1].w, 3e6, rtol=1e-5)
    # A loss without a minimiser, F = −10⁸w: a straight line.
    down = gf.GradientFlow(gf.Loss(lambda m: -1e8 * m.w))
    path = gf.descent(down, start, steps=1000, **rule)
    assert path.result == gf.RESULTS.successful
    assert_allclose(path[-1].w, 5e10, rtol=1e-4 if dtype == jnp.float32 else 1e-12)
    # One that is left in three steps.
    up = gf.GradientFlow(gf.Loss(lambda m: 1e30 * m.w**2 / 2))
    far = dtype(1e20) if dtype == jnp.float32 else dtype(1e290)
    path = gf.descent(up, Linear1(jnp.asarray(far)), steps=3, throw=False, **rule)
    assert path.result == gf.RESULTS.overshot


def test_what_goes_up_is_named_in_any_unit():
    """1.2 times as far from the minimum in each step; and at a lower rate, down."""
    for unit in (1e-9, 1.0, 1e9):
        flow = gf.GradientFlow(gf.Loss(lambda m, u=unit: 0.5 * jnp.sum((m.w / u) ** 2)))
        run = lambda h, flow=flow, u=unit: gf.descent(
            flow, Linear1(jnp.array(0.3 * u)), weight_decay=0.0,
            learning_rate=h * u**2, steps=60, saves=3, throw=False,
        )  # fmt: skip
        up = run(2.2)
        assert_allclose(up[-1].w, 0.3 * unit * 1.2**60, rtol=1e-9)
        assert up.result == gf.RESULTS.overshot
        assert run(1.8).result == gf.RESULTS.successful


class Linear1(eqx.Module):
    w: jax.Array

    def __call__(self, x):
        return self.w * x


def quadratic():
    """F = ½ Σ aᵢwᵢ², and where from."""
    a = jnp.array([1.0, 3.0, 10.0])
    loss = gf.Loss(lambda m: 0.5 * jnp.sum(a * m.w**2))
    return gf.GradientFlow(loss), Linear(jnp.array([1.0, -2.0, 0.5])), np.asarray(a)


def test_optimisers_that_ask_for_the_value():
    flow, model, a = quadratic()
    lam = 0.2
    rule = dict(weight_decay=lam, learning_rate=0.3, steps=6, saves=3)
    value = lambda w: 0.5 * ((a + lam) * w**2).sum()
    # Polyak's step, F/‖∇F‖², at most h.
    w = np.asarray(model.w)
    for _ in range(6):
        g = (a + lam) * w
        w = w - min(value(w) / (g @ g), 0.3) * g
    path = gf.descent(flow, model, optimiser=optax.polyak_sgd, **rule)
    assert_allclose(path[-1].w, w, rtol=1e-10)
    # With the decay apart, it is that of F alone.
    w = np.asarray(model.w)
    for _ in range(6):
        g = a * w
        step = min((w @ g) / 2 / (g @ g), 0.3)
        w = w - step * g - 0.3 * lam * w
    apart = dict(method="decoupled", optimiser=optax.polyak_sgd)
    assert_allclose(gf.descent(flow, model, **apart, **rule)[-1].w, w, rtol=1e-10)


@pytest.mark.parametrize(
    "optimiser",
    [
        optax.lbfgs(),
        optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(20)),
    ],
    ids=["zoom", "backtracking"],
)
def test_line_searches_come_down(optimiser):
    flow, model, a = quadratic()
    path = gf.descent(
        flow, model, weight_decay=0.2, learning_rate=0.3, steps=60, saves=3,
        optimiser=optimiser,
    )  # fmt: skip
    assert abs(path[-1].w).max() < 1e-3 * abs(model.w).max()


def test_the_rate_falls_on_a_plateau():
    """From ±h to ∓h and back: F stays, so the rate is halved after two steps each."""
    slow = optax.contrib.reduce_on_plateau(factor=0.5, patience=2, cooldown=0)
    path = gf.descent(
        gf.GradientFlow(gf.Loss(lambda m: jnp.abs(m.w))), Linear1(jnp.array(0.05)),
        weight_decay=0.0, learning_rate=0.1, at=list(range(7)),
        optimiser=optax.chain(optax.sgd(0.1), slow),
    )  # fmt: skip
    moves = abs(np.diff(np.asarray(path.params.w)))
    assert moves[0] == pytest.approx(0.1) and (np.diff(moves) <= 1e-12).all()
    assert moves[-1] <= 0.025 * (1 + 1e-9)


RATES = optax.linear_schedule(0.2, 0.05, 8)


def test_schedules_of_learning_rates(linear):
    flow, model = linear
    run = lambda **kwargs: gf.descent(
        flow, model, weight_decay=0.3, learning_rate=RATES, **kwargs
    )
    rates = [float(RATES(k)) for k in range(12)]
    assert rates[0] == 0.2 and rates[-1] == 0.05
    w, apart, saved = np.asarray(model.w), np.asarray(model.w), [0, 3, 12]
    x, y = np.asarray(flow.loss.x), np.asarray(flow.loss.y)
    slope = lambda w: x.T @ (x @ w - y) / len(y)
    path = run(at=saved)
    other = run(at=saved, method="decoupled", optimiser=optax.sgd(0.1))
    for k, rate in enumerate(rates):
        if k in saved:
            assert_allclose(path[saved.index(k)].w, w, rtol=1e-10)
        w = w - rate * (slope(w) + 0.3 * w)
        apart = apart - 0.1 * slope(apart) - rate * 0.3 * apart
    assert_allclose(path[-1].w, w, rtol=1e-10)
    assert_allclose(other[-1].w, apart, rtol=1e-10)
    assert_allclose(path.t, [0, sum(rates[:3]), sum(rates)], rtol=1e-12)
    assert "descent (subgradient, on a schedule), 12 steps of 0.106" in str(path)


def test_a_long_schedule_has_exact_times():
    decay = optax.exponential_decay(1e-2, 1000, 0.99)
    numbers = np.array([0, 1, 65536, 65537, 200_000])
    times = scheduled(decay, numbers, jnp.float64).times
    q = 0.99**1e-3
    assert_allclose(times, 1e-2 * (1 - q**numbers) / (1 - q), rtol=1e-9)


def test_a_sweep_on_a_schedule(linear):
    flow, model = linear
    steps = gf.Descent(RATES, steps=12)
    lanes = gf.sweep(flow, model, weight_decay=[0.1, 0.3], run=steps, saves=4)
    one = gf.descent(
        flow, model, weight_decay=0.3, learning_rate=RATES, steps=12, saves=4
    )
    assert_allclose(lanes[1].params.w, one.params.w, rtol=1e-12)
    assert_allclose(lanes[1].t, one.t)
    lanes.to_xarray()
    with pytest.raises(ValueError, match="steps, at: give one with a schedule"):
        gf.sweep(flow, model, weight_decay=[0.1], run=gf.Descent(RATES), t1=1.0)


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
    "no batches": (
        dict(steps=3, key=jr.key(0)),
        "key: it is for minibatches and noise",
    ),
    "batch": (dict(steps=3, batch_size=9, key=jr.key(0)), "from 1 to 3, got 9"),
    "schedule": (dict(t1=1.0, learning_rate=RATES), "t1: give steps or at where"),
    "no schedule": (
        dict(steps=3, learning_rate=optax.sgd),
        "schedule that gives one for each step, got a ",
    ),
    "negative": (
        dict(steps=3, learning_rate=lambda k: -1.0),
        "schedule that gives one for each step, got -1.0",
    ),
    "optimiser": (dict(steps=3, optimiser="adam"), "optimiser: expected .* got .adam."),
    "no rate": (
        dict(steps=3, optimiser=optax.scale_by_zoom_linesearch),
        "optimiser: optax.scale_by_zoom_linesearch is no function of a learning rate",
    ),
    "asks for more": (
        dict(
            steps=3,
            optimiser=optax.contrib.differentially_private_aggregate(
                1.0, 1.0, key=jr.key(0)
            ),
        ),
        "optimiser: expected one that makes updates",
    ),
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
