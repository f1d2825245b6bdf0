"""`simulate`: what it saves, how it fails, and what it refuses."""

import json
import os
import subprocess
import sys
import textwrap

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import flat_paths, Linear, linear_problem, sup_error
from make_references import DATA, make_task
from numpy.testing import assert_allclose

import gradflow as gf
from gradflow import tasks


@pytest.fixture(scope="module")
def linear():
    """The flow of a linear regression, its model and its closed form."""
    loss, model = linear_problem(jr.key(1), samples=3, features=6)
    truth = tasks.LinearTruth(loss.x, loss.y, model.w, model.w, curvature=1 / 3)
    return gf.GradientFlow(loss), model, truth


@pytest.mark.slow
def test_times_and_what_is_saved(linear):
    flow, model, truth = linear
    norm = gf.Metric(lambda m: jnp.sum(m.w**2), threshold=1.0)
    metrics = {"norm": norm, "first": lambda m: m.w[0]}
    path = gf.simulate(flow, model, weight_decay=1e-3, slow_time=3.0, metrics=metrics)
    assert len(path) == 65 and path.t.shape == (65,)
    assert path.t[0] == 0 and path.t[-1] == 3.0 / 1e-3
    assert np.all(np.diff(path.t) > 0)
    assert_allclose(path.slow_time, 1e-3 * path.t)
    # Evenly in log t, from when θ would have moved by 1 %.
    steps = np.diff(np.log(np.asarray(path.t[1:])))
    assert_allclose(steps, steps[0], rtol=1e-6)
    moved = np.linalg.norm(path[1].w - model.w) / np.linalg.norm(model.w)
    assert 0.005 < moved < 0.02

    assert eqx.tree_equal(path[0], model)
    exact = np.asarray(truth.path(path.t, 1e-3))
    assert sup_error(flat_paths(path), exact) < 5e-6
    assert_allclose(path.models.w, path.params.w)
    assert_allclose(path.metrics["norm"], (path.params.w**2).sum(axis=1), rtol=1e-12)
    assert_allclose(path.metrics["first"], path.params.w[:, 0])
    assert path.watched["norm"].threshold == 1.0
    assert_allclose(path.penalty, 0.5 * (path.params.w**2).sum(axis=1), rtol=1e-12)
    assert_allclose(path.train_loss[7], flow.loss(path[7]), rtol=1e-6)
    assert path.stats.steps == path.stats.accepted + path.stats.rejected
    assert path.succeeded and path.result == gf.RESULTS.successful

    text = str(path)
    for part in ("6 parameters", "λ = 0.001", "s = 3", "KKT4", "train loss", "norm"):
        assert part in text
    assert len(text.splitlines()) == 4 and "FAILED" not in text


@pytest.mark.slow
def test_given_times_and_t1(linear):
    flow, model, truth = linear
    ts = jnp.array([0.5, 1.0, 40.0])
    path = gf.simulate(flow, model, weight_decay=0.0, ts=ts)
    assert path.t.tolist() == [0.5, 1.0, 40.0]
    assert sup_error(flat_paths(path), np.asarray(truth.path(ts, 0.0))) < 5e-6
    path = gf.simulate(flow, model, weight_decay=0.0, t1=0.3, saves=5)
    assert len(path) == 5 and path.t[0] == 0 and path.t[-1] == 0.3
    assert path.stats.solver == "Tsit5"


@pytest.mark.slow
def test_train_loss_where_it_is_tiny():
    """The solver lands on every time: interpolation would leave the manifold, where F
    is O(λ²), and saved losses would be larger by orders of magnitude."""
    task = make_task("diagonal")
    with np.load(DATA / "radau_diagonal.npz") as file:
        ts, reference = file["ts_1e-04"], file["theta_1e-04"]
    path = gf.simulate(task.flow, task.model, weight_decay=1e-4, ts=jnp.asarray(ts))
    unravel = jax.flatten_util.ravel_pytree(task.model)[1]
    exact = jax.vmap(lambda theta: task.loss(unravel(theta)))(jnp.asarray(reference))
    assert exact[-3] < 1e-5 * exact[0]
    assert_allclose(path.train_loss, exact, rtol=0.05)


@pytest.mark.slow
def test_no_solver_is_special(linear):
    flow, model, truth = linear
    ts = jnp.array([0.0, 1.0, 10.0])
    exact = np.asarray(truth.path(ts, 0.1))
    for solver in (diffrax.Dopri5(), diffrax.Heun(), diffrax.Kvaerno3(), gf.KKT4()):
        path = gf.simulate(
            flow, model, weight_decay=0.1, ts=ts, solver=solver, rtol=1e-5
        )
        assert path.stats.solver == type(solver).__name__
        assert sup_error(flat_paths(path), exact) < 5e-4


@pytest.mark.slow
def test_default_solver_of_an_opaque_loss(linear):
    flow, model, truth = linear
    opaque = gf.GradientFlow(gf.Loss(flow.loss))
    path = gf.simulate(opaque, model, weight_decay=1e-3, slow_time=2.0, saves=7)
    assert path.stats.solver == "KKT4" and "opaque" in path.stats.why
    assert sup_error(flat_paths(path), np.asarray(truth.path(path.t, 1e-3))) < 1e-4


@pytest.mark.slow
def test_curvature_that_rises_is_no_trap():
    """F = ½(w³ − 1)² from w = 1e-4: flat at first, stiff at the end. Tsit5 looks cheap,
    and is given up."""
    cube = lambda model, x: model.w**3
    flow = gf.GradientFlow(gf.SquaredError(None, jnp.ones(1), predict=cube))
    model = Linear(jnp.array([1e-4]))
    settings = dict(t1=5e4, saves=3, rtol=1e-4)
    path = gf.simulate(flow, model, weight_decay=1e-6, **settings)
    assert path.succeeded and path.stats.solver == "KKT4"
    assert path.stats.why.startswith("Tsit5 was tried first")
    assert_allclose(path.params.w[-1], 1.0, rtol=1e-4)
    lams = jnp.array([1e-5, 1e-6])
    lanes = gf.sweep(flow, model, weight_decay=lams, progress=False, **settings)
    assert lanes.succeeded.all() and lanes.stats.solver == "KKT4"


@pytest.mark.slow
def test_one_compilation_serves_every_weight_decay(linear):
    flow, model, _ = linear
    traces = []

    def watch(model):
        traces.append(None)
        return model.w[0]

    def run(decay, rtol=1e-6):
        before = len(traces)
        metrics = {"watch": watch}
        gf.simulate(
            flow,
            model,
            weight_decay=decay,
            slow_time=2.0,
            rtol=rtol,
            metrics=metrics,
            solver=gf.KKT4(),
        )
        return len(traces) - before

    assert run(1e-2) > 1
    assert run(1e-3) == 0 and run(1e-5) == 0 and run(1e-5, 1e-5) == 0


@pytest.mark.slow
def test_float32(linear):
    task = make_task("diagonal")
    ts = jnp.geomspace(0.1, 5e4, 12)
    double = gf.simulate(task.flow, task.model, weight_decay=1e-4, ts=ts, rtol=1e-8)
    single = lambda tree: jax.tree.map(
        lambda x: x.astype(jnp.float32) if eqx.is_inexact_array(x) else x, tree
    )
    path = gf.simulate(
        single(task.flow), single(task.model), weight_decay=1e-4, ts=ts, rtol=1e-4
    )
    assert path.params.u.dtype == path.t.dtype == jnp.float32
    assert sup_error(flat_paths(path), flat_paths(double)) < 5e-4


@pytest.mark.slow
def test_gradient_descent_of_small_step(linear):
    """Optax with weight decay is Euler's method on the flow: O(step)."""
    task = tasks.diagonal_network(jr.key(2), samples=4, dim=10, sparsity=2)
    decay, t1 = 0.05, 4.0
    exact = gf.simulate(
        task.flow, task.model, weight_decay=decay, t1=t1, rtol=1e-9, saves=3
    )

    def descend(step, count):
        optimiser = optax.chain(optax.add_decayed_weights(decay), optax.sgd(step))

        def update(_, carry):
            model, state = carry
            force = jax.grad(task.loss)(model)
            change, state = optimiser.update(force, state, model)
            return optax.apply_updates(model, change), state

        start = task.model, optimiser.init(task.model)
        return jax.lax.fori_loop(0, count, update, start)[0]

    errors = []
    for count in (400, 800, 1600):
        model = descend(t1 / count, count)
        errors.append(np.linalg.norm(model.u - exact[-1].u))
    assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), 1.0, atol=0.1)


@pytest.mark.slow
def test_progress_bar(linear, capfd):
    flow, model, _ = linear
    gf.simulate(flow, model, weight_decay=0.1, t1=100.0, saves=5, progress=True)
    jax.effects_barrier()
    assert "100.00%" in capfd.readouterr().err


# Failures


FALLING = {
    "square": lambda m: -jnp.sum(m.w**2),
    "quartic": lambda m: -jnp.sum(m.w**4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FALLING)
def test_unbounded_loss_diverges(name):
    flow = gf.GradientFlow(gf.Loss(FALLING[name]))
    model = Linear(jnp.array([1.0, -0.5]))
    ts = jnp.array([0.0, 0.05, 500.0])
    run = lambda throw: gf.simulate(
        flow, model, weight_decay=0.1, ts=ts, throw=throw, solver=diffrax.Tsit5()
    )
    path = run(False)
    assert path.result == gf.RESULTS.diverged and not path.succeeded
    assert np.all(np.isfinite(path.params.w[:2]))
    for saved in (path.params.w, path.train_loss, path.penalty):
        assert np.all(np.isnan(saved[2]))
    assert path.t.tolist() == ts.tolist()
    assert "FAILED" in str(path) and "unbounded" in str(path)
    with pytest.raises(RuntimeError, match="unbounded below"):
        run(True)


@pytest.mark.slow
def test_loss_that_turns_nan():
    """F = Σ log wᵢ: w² = w₀² − 2t ends at t = 1/2."""
    flow = gf.GradientFlow(gf.Loss(lambda m: jnp.sum(jnp.log(m.w))))
    path = gf.simulate(
        flow,
        Linear(jnp.array([1.0, 2.0])),
        weight_decay=0.0,
        ts=jnp.array([0.0, 0.4, 1.0]),
        throw=False,
    )
    assert path.result == gf.RESULTS.stalled or path.result == gf.RESULTS.diverged
    assert_allclose(path.params.w[1], [0.2**0.5, 3.2**0.5], rtol=1e-4)
    assert np.all(np.isnan(path.params.w[2]))


@pytest.mark.slow
def test_out_of_steps(linear):
    flow, model, _ = linear
    run = lambda throw: gf.simulate(
        flow, model, weight_decay=1e-3, slow_time=1.0, max_steps=20, throw=throw
    )
    path = run(False)
    assert path.result == gf.RESULTS.out_of_steps
    assert np.isnan(path.train_loss[-1]) and np.isfinite(path.train_loss[1])
    assert "step budget" in str(path)
    with pytest.raises(RuntimeError, match="step budget was exhausted"):
        run(True)


# Bad input. In a process of its own: there the annotations are not checked at run time,
# as they are not for users.


_BAD = """
import json, sys
import jax, jax.numpy as jnp
sys.path.insert(0, {tests!r})
from helpers import Linear
import gradflow as gf

gf.enable_float64()

ran = []
def predict(model, x):
    jax.debug.callback(lambda: ran.append(None))
    return x @ model.w

x, y = jnp.ones((4, 3)), jnp.ones(4)
loss = gf.SquaredError(x, y, predict=predict)
flow = gf.GradientFlow(loss)
model = Linear(jnp.ones(3))

def run(flow=flow, model=model, **options):
    settings = dict(weight_decay=0.1, t1=1.0) | options
    return gf.simulate(flow, model, **settings)

def given(loss):
    return run(gf.GradientFlow(loss))

none = dict(t1=None)
cases = {{
    "weight_decay -1": lambda: run(weight_decay=-1.0),
    "weight_decay nan": lambda: run(weight_decay=float("nan")),
    "x": lambda: given(gf.SquaredError(x.at[0, 0].set(jnp.nan), y)),
    "y": lambda: given(gf.SquaredError(x, y.at[0].set(jnp.nan))),
    "model nan": lambda: run(model=Linear(jnp.array([1.0, jnp.nan, 0.0]))),
    "model empty": lambda: run(model=Linear(jnp.zeros(0))),
    "model without": lambda: run(model=dict(name="none")),
    "loss vector": lambda: given(gf.Loss(lambda m: m.w)),
    "loss pair": lambda: given(gf.Loss(lambda m: (m.w[0], m.w[1]))),
    "loss function": lambda: run(gf.GradientFlow(lambda m: m.w[0])),
    "x length": lambda: given(gf.SquaredError(x, y[:2])),
    "y shape": lambda: given(gf.SquaredError(x, jnp.ones((4, 2)), predict=predict)),
    "metrics": lambda: run(metrics=dict(test=gf.Metric(lambda m: m.w, 1.0))),
    "rtol 0": lambda: run(rtol=0.0),
    "ts equal": lambda: run(**none, ts=jnp.array([0.0, 1.0, 1.0])),
    "ts falling": lambda: run(**none, ts=jnp.array([0.0, 2.0, 1.0])),
    "ts negative": lambda: run(**none, ts=jnp.array([-1.0, 2.0])),
    "ts one": lambda: run(**none, ts=jnp.array([1.0])),
    "slow_time both": lambda: run(slow_time=1.0),
    "slow_time neither": lambda: run(**none),
    "slow_time all": lambda: run(slow_time=1.0, ts=jnp.array([0.0, 1.0])),
    "slow_time no decay": lambda: run(**none, slow_time=1.0, weight_decay=0.0),
    "slow_time -1": lambda: run(**none, slow_time=-1.0),
    "t1 0": lambda: run(t1=0.0),
    "saves": lambda: run(saves=1),
}}
answers = {{}}
for name, case in cases.items():
    try:
        case()
        answers[name] = ["no error", ""]
    except Exception as error:
        answers[name] = [type(error).__name__, str(error)]
jax.effects_barrier()
print(json.dumps([answers, len(ran)]))
"""


@pytest.mark.slow
def test_bad_input_is_named_before_any_compute():
    here = os.path.dirname(__file__)
    code = textwrap.dedent(_BAD).format(tests=here)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(here)])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    answers, ran = json.loads(done.stdout)
    wrong = {
        name: answer
        for name, answer in answers.items()
        if answer[0] != "ValueError"
        or "\n" in answer[1]
        or not answer[1].startswith(name.split()[0])
    }
    assert not wrong
    assert len(answers) == 25
    assert ran == 0


@pytest.mark.slow
@pytest.mark.parametrize("hold", [False, True])
def test_initial_scale(hold):
    """By simulate and by descent: θ(0) = αθ₀, and held is its norm."""
    task = gf.tasks.linear_regression(jax.random.key(0), samples=3, dim=5)
    flow = gf.GradientFlow(task.loss, hold_norm=hold)
    (start,) = jax.tree.leaves(eqx.filter(task.model, eqx.is_inexact_array))
    run = dict(weight_decay=1e-2, t1=1.0, init_scale=3.0)
    flowed = gf.simulate(flow, task.model, **run)
    stepped = gf.descent(flow, task.model, learning_rate=0.1, **run)
    for path in (flowed, stepped):
        (found,) = jax.tree.leaves(path.params)
        np.testing.assert_allclose(found[0], 3 * start, rtol=1e-14)
        kept = jnp.linalg.norm(found[-1]) / jnp.linalg.norm(3 * start)
        assert (abs(kept - 1) < 1e-12) == hold
    for call, more in ((gf.simulate, {}), (gf.descent, dict(learning_rate=0.1))):
        for wrong in (0.0, -1.0, jnp.nan):
            with pytest.raises(ValueError, match="init_scale: expected one positive"):
                call(flow, task.model, **(run | more | dict(init_scale=wrong)))
