"""The KKT solvers: against closed forms and SciPy, in plain Diffrax, at every λ."""

import json
import math
from types import SimpleNamespace

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optimistix as optx
import pytest
from helpers import flat_paths, linear_problem, radau_path, sup_error
from jax.flatten_util import ravel_pytree
from make_references import DATA, DECAYS, make_task
from numpy.testing import assert_allclose

import gradflow as gf
from gradflow import tasks
from gradflow.models import DiagonalNetwork, TwoLayer
from gradflow.solvers import choose_solver
from gradflow.solvers.kkt import ChordIteration

KKT = [gf.KKT3(), gf.KKT5()]
by_name = lambda solver: type(solver).__name__


def controlled(solver, term, params, decay, t1, *, rtol=1e-6, t0=0.0, **options):
    """Plain Diffrax, with its own step size control."""
    settings = dict(
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=0.02 * rtol),
        max_steps=10_000,
    )
    return diffrax.diffeqsolve(
        term, solver, t0, t1, 1e-3, params, args=decay, **(settings | options)
    )


@pytest.fixture(scope="module")
def linear():
    """A linear regression: its term, its initial parameters, its closed form."""
    loss, model = linear_problem(jr.key(1), samples=3, features=6)
    truth = tasks.LinearTruth(loss.x, loss.y, model.w, model.w, curvature=1 / 3)
    return *gf.GradientFlow(loss).term(model), truth


# Against closed forms


@pytest.mark.parametrize("decay", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("solver", KKT, ids=by_name)
def test_linear_regression(solver, decay):
    task = tasks.linear_regression(jr.key(0))
    path = gf.simulate(
        task.flow,
        task.model,
        weight_decay=decay,
        slow_time=5.0,
        rtol=1e-9,
        solver=solver,
    )
    exact = np.asarray(task.truth.path(path.t, decay))
    assert sup_error(flat_paths(path), exact) < 1e-8


def logistic(t, start, target, decay):
    """u of the network β = u ⊙ v with u = v: w = u² obeys w' = 2w(K − w), K = y − λ."""
    k = target - decay
    return np.sqrt(k / (1 + (k / start**2 - 1) * np.exp(-2 * k * t)))


@pytest.mark.parametrize(
    ("solver", "steps"), [(gf.KKT3, (40, 80, 160)), (gf.KKT5, (9, 18, 36))]
)
def test_order(solver, steps):
    target, start = np.array([1.0, 2.0, 1.5]), np.array([0.5, 1.8, 0.3])
    decay, t1 = 0.1, 1.5
    loss = gf.SquaredError(jnp.eye(3), jnp.asarray(target), reduction="sum")
    model = DiagonalNetwork(jnp.asarray(start), jnp.asarray(start))
    term, params = gf.GradientFlow(loss).term(model)
    exact = ChordIteration(rtol=1e-13, atol=1e-13, norm=optx.rms_norm)
    solver = solver(root_finder=exact, root_find_max_steps=60)

    @jax.jit
    def end(h):
        solution = diffrax.diffeqsolve(
            term, solver, 0.0, t1, h, params, args=decay, max_steps=1000
        )
        return ravel_pytree(solution.ys)[0]

    expected = np.tile(logistic(t1, start, target, decay), 2)
    errors = [np.linalg.norm(end(t1 / n) - expected) for n in steps]
    assert errors[-1] > 1e-12  # not the rounding's slope
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    nominal = solver.order(term)
    assert np.all(np.abs(orders - nominal) < 0.2), (errors, orders)


# In plain Diffrax


@pytest.mark.parametrize("solver", KKT, ids=by_name)
def test_saving(solver, linear):
    term, params, truth = linear
    decay, t1 = 1e-2, 200.0
    ts = jnp.array([0.0, 1.0, 30.0, t1])
    saveat = diffrax.SaveAt(
        subs={
            "ts": diffrax.SubSaveAt(ts=ts),
            "t1": diffrax.SubSaveAt(t1=True),
            "steps": diffrax.SubSaveAt(steps=True),
        },
        dense=True,
    )
    solution = controlled(
        solver, term, params, decay, t1, saveat=saveat, max_steps=1000
    )
    end = np.asarray(truth.path(t1, decay))
    assert_allclose(solution.ys["t1"].w[0], end, rtol=1e-4, atol=1e-6)
    steps = np.isfinite(solution.ts["steps"])
    assert steps.sum() == solution.stats["num_accepted_steps"]
    exact = np.asarray(truth.path(solution.ts["steps"][steps], decay))
    assert sup_error(np.asarray(solution.ys["steps"].w)[steps], exact) < 1e-5
    # Between steps: by cubic interpolation, which is coarser.
    exact = np.asarray(truth.path(ts, decay))
    assert sup_error(np.asarray(solution.ys["ts"].w), exact) < 1e-2
    dense = jax.vmap(solution.evaluate)(ts).w
    assert_allclose(dense, solution.ys["ts"].w, rtol=1e-12, atol=1e-14)


def test_event(linear):
    """The time at which a coordinate of the kernel has fallen by half."""
    term, params, truth = linear
    size = lambda w: jnp.linalg.norm(w - truth.end_point())
    start = size(truth.drift(0.0))
    event = diffrax.Event(
        lambda t, y, args, **kwargs: size(y.w) - 0.5 * start,
        optx.Newton(1e-8, 1e-10),
    )
    solution = controlled(gf.KKT5(), term, params, 1e-4, 1e5, event=event)
    assert solution.result == diffrax.RESULTS.event_occurred
    # ‖w − w₊‖ falls as e^{−s}, up to O(λ): half at s = log 2. Cubic interpolation
    # inside the step.
    assert_allclose(solution.ts[0], math.log(2) / 1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "meter",
    [diffrax.TextProgressMeter(minimum_increase=0.3), diffrax.TqdmProgressMeter()],
    ids=by_name,
)
def test_progress_meter(meter, linear, capfd):
    term, params, _ = linear
    solution = controlled(gf.KKT5(), term, params, 1e-2, 50.0, progress_meter=meter)
    jax.block_until_ready(solution.ys)
    jax.effects_barrier()
    printed = "".join(capfd.readouterr())
    assert "100.00%" in printed


def test_jit_and_vmap_over_weight_decay(linear):
    term, params, truth = linear
    run = lambda decay: controlled(gf.KKT5(), term, params, decay, 2 / decay)
    decays = jnp.array([1e-1, 1e-3, 1e-6])
    single = jax.jit(lambda decay: (run(decay).ys.w[0], run(decay).stats))
    lanes, stats = jax.jit(jax.vmap(lambda d: (run(d).ys.w[0], run(d).stats)))(decays)
    for i, decay in enumerate(decays):
        alone, counts = single(decay)
        assert np.linalg.norm(lanes[i] - alone) < 1e-9 * np.linalg.norm(alone)
        assert stats["num_steps"][i] == counts["num_steps"]
        exact = np.asarray(truth.path(2 / decay, decay))
        assert np.linalg.norm(lanes[i] - exact) < 1e-5 * np.linalg.norm(exact)


def tanh_problem(key, *, outputs=None, samples=4):
    kx, ky, *keys = jr.split(key, 5)
    shape = (6,) if outputs is None else (outputs, 6)
    model = TwoLayer(
        jr.normal(keys[0], (6, 2)), jr.normal(keys[1], (6,)), jr.normal(keys[2], shape)
    )
    return jr.normal(kx, (samples, 2)), ky, model


@pytest.mark.parametrize("solver", KKT, ids=by_name)
def test_a_failed_iteration_rejects_the_step(solver):
    x, ky, model = tanh_problem(jr.key(3))
    loss = gf.SquaredError(x, 5 * jr.normal(ky, (4,)), reduction="sum")
    term, params = gf.GradientFlow(loss).term(model)
    tight = ChordIteration(rtol=1e-6, atol=1e-8, norm=optx.rms_norm)

    @jax.jit
    def one_step(h):
        hard = type(solver)(root_finder=tight)
        state = hard.init(term, 0.0, h, params, 1e-4)
        _, error, _, _, result = hard.step(term, 0.0, h, params, 1e-4, state, False)
        return ravel_pytree(error)[0], result == diffrax.RESULTS.successful

    error, solved = one_step(1e4)
    assert not solved and np.all(np.isinf(error))
    error, solved = one_step(1e-3)
    assert solved and np.all(np.isfinite(error))

    run = jax.jit(
        lambda dt0: diffrax.diffeqsolve(
            term,
            solver,
            0.0,
            2e4,
            dt0,
            params,
            args=1e-4,
            stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-8),
            max_steps=5000,
        )
    )
    bold, careful = run(1e4), run(1e-3)
    assert bold.stats["num_rejected_steps"] > careful.stats["num_rejected_steps"]
    bold, careful = (ravel_pytree(sol.ys)[0] for sol in (bold, careful))
    assert np.linalg.norm(bold - careful) < 1e-5 * np.linalg.norm(careful)


def test_restart(linear):
    """A solve in two halves goes on as if it had never stopped: the multiplier, the
    slope and the Gram matrix are handed over."""
    x, ky, model = tanh_problem(jr.key(3))
    loss = gf.SquaredError(x, jr.normal(ky, (4,)))
    term, params = gf.GradientFlow(loss).term(model)
    loose = ChordIteration(rtol=1e-3, atol=1e-3, norm=optx.rms_norm)
    solver = gf.KKT5(root_finder=loose)

    def run(t0, t1, y0, state=None):
        solution = diffrax.diffeqsolve(
            term,
            solver,
            t0,
            t1,
            0.125,
            y0,
            args=0.1,
            saveat=diffrax.SaveAt(t1=True, solver_state=True),
            solver_state=state,
        )
        return jax.tree.map(lambda y: y[0], solution.ys), solution.solver_state

    whole = ravel_pytree(run(0.0, 4.0, params)[0])[0]
    half, state = run(0.0, 2.0, params)
    assert state.gram.shape == (4, 4)
    resumed = ravel_pytree(run(2.0, 4.0, half, state)[0])[0]
    forgetful = ravel_pytree(run(2.0, 4.0, half)[0])[0]
    assert_allclose(resumed, whole, rtol=1e-12)
    assert np.abs(forgetful - whole).max() > 1e-9


def test_restart_with_step_size_control(linear):
    term, params, truth = linear
    saveat = diffrax.SaveAt(t1=True, solver_state=True, controller_state=True)
    first = controlled(gf.KKT5(), term, params, 1e-3, 1e3, saveat=saveat)
    second = controlled(
        gf.KKT5(),
        term,
        jax.tree.map(lambda y: y[0], first.ys),
        1e-3,
        3e3,
        t0=1e3,
        solver_state=first.solver_state,
        controller_state=first.controller_state,
    )
    exact = np.asarray(truth.path(3e3, 1e-3))
    assert np.linalg.norm(second.ys.w[0] - exact) < 1e-5 * np.linalg.norm(exact)


def test_an_opaque_loss_is_refused(linear):
    term, params, _ = linear
    opaque, _ = gf.GradientFlow(gf.Loss(term.loss)).term(params)
    with pytest.raises(ValueError, match="^solver: KKT needs a composite loss.*Loss"):
        controlled(gf.KKT5(), opaque, params, 1e-2, 1.0)


# Against SciPy


SMALL = {
    "diagonal": lambda key: tasks.diagonal_network(key, samples=4, dim=10, sparsity=2),
    "completion": lambda key: tasks.matrix_completion(
        key, shape=(4, 4), rank=1, observed=0.6
    ),
    "tanh": lambda key: tasks.teacher_student(
        key, inputs=2, width=8, samples=3, test_samples=5
    ),
}
_made = {}


def small(name):
    """A small task, and its path by Radau for both λ."""
    if name not in _made:
        task = SMALL[name](jr.key(2))
        _made[name] = task, {}
        for decay in DECAYS:
            ts = np.geomspace(0.1, 5 / decay, 12)
            _made[name][1][decay] = ts, radau_path(task, decay, ts)[0]
    return _made[name]


def error_of(task, decay, ts, reference, rtol):
    path = gf.simulate(
        task.flow, task.model, weight_decay=decay, ts=jnp.asarray(ts), rtol=rtol
    )
    assert path.stats["solver"] == "KKT5"
    return sup_error(flat_paths(path), reference)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rtol", [1e-4, 1e-6])
@pytest.mark.parametrize("name", SMALL)
def test_radau_live(name, rtol, decay):
    task, references = small(name)
    assert error_of(task, decay, *references[decay], rtol) < 5 * rtol


def stored(name):
    task = make_task(name)
    with np.load(DATA / f"radau_{name}.npz") as file:
        data = dict(file)
    # The reference is of this very task, or it means nothing.
    assert_allclose(ravel_pytree(task.model)[0], data["theta0"], rtol=1e-14)
    assert_allclose(task.loss(task.model), data["loss0"], rtol=1e-12)
    return task, data


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rtol", [1e-4, 1e-6])
@pytest.mark.parametrize("name", SMALL)
def test_radau_stored(name, rtol, decay):
    task, data = stored(name)
    ts, reference = data[f"ts_{decay:.0e}"], data[f"theta_{decay:.0e}"]
    assert_allclose(ts[-1], 5 / decay)
    assert error_of(task, decay, ts, reference, rtol) < 5 * rtol


def test_references_say_how_they_were_made():
    for name in SMALL:
        about = json.loads(str(stored(name)[1]["about"]))
        assert {"task", "key", "settings", "method", "jax", "scipy"} <= about.keys()
        assert (DATA / f"radau_{name}.npz").stat().st_size < 1e6


def test_cross_entropy():
    """ℓ'' is singular, along equal shifts of the logits, and not a multiple of I."""
    decay = 1e-3
    x, ky, model = tanh_problem(jr.key(5), outputs=3, samples=5)
    loss = gf.CrossEntropy(x, jr.randint(ky, (5,), 0, 3))
    task = SimpleNamespace(model=model, loss=loss, flow=gf.GradientFlow(loss))
    ts = np.geomspace(0.1, 5 / decay, 12)
    reference, _ = radau_path(task, decay, ts)
    assert error_of(task, decay, ts, reference, 1e-6) < 5e-6


# Balance laws: exact, and independent of any other solver


BALANCED = {
    "difference": lambda key: tasks.diagonal_network(key, form="difference"),
    "product": lambda key: tasks.diagonal_network(key, form="product"),
    "completion": lambda key: tasks.matrix_completion(key, shape=(8, 8)),
    "deep_linear": tasks.deep_linear,
}


@pytest.mark.parametrize("rtol", [1e-4, 1e-6])
@pytest.mark.parametrize("name", BALANCED)
def test_balance(name, rtol):
    task = BALANCED[name](jr.key(0))
    flat = lambda model: ravel_pytree(task.truth.invariant(model))[0]
    start = np.asarray(flat(task.model))
    for decay in (1e-1, 1e-3, 1e-6):
        path = gf.simulate(
            task.flow,
            task.model,
            weight_decay=decay,
            slow_time=2.0,
            rtol=rtol,
            solver=gf.KKT5(),
        )
        balance = np.asarray(jax.vmap(flat)(eqx.combine(path.params, path.static)))
        exact = start * np.exp(-2 * decay * np.asarray(path.t))[:, None]
        error = np.linalg.norm(balance - exact, axis=1).max()
        assert error < 10 * rtol * np.linalg.norm(start), decay


# Cost


@pytest.mark.parametrize("rtol", [1e-4, 1e-6])
@pytest.mark.parametrize("name", ["diagonal", "tanh"])
def test_steps_hardly_depend_on_weight_decay(name, rtol):
    task = make_task(name)
    steps = {
        decay: int(
            gf.simulate(
                task.flow,
                task.model,
                weight_decay=decay,
                ts=jnp.geomspace(0.1, 2 / decay, 12),
                rtol=rtol,
                solver=gf.KKT5(),
            ).stats["steps"]
        )
        for decay in (1e-2, 1e-6)
    }
    assert steps[1e-6] <= 2 * steps[1e-2], steps


# The choice


def test_choose_solver(linear):
    term, params, _ = linear
    choose = lambda *args: type(choose_solver(*args))
    assert choose(term, params, 1e-2, 1.0) is diffrax.Tsit5
    assert choose(term, params, 1e-2, 1e6) is gf.KKT5
    assert choose(term, params, 1e4, 1.0) is gf.KKT5
    opaque, _ = gf.GradientFlow(gf.Loss(term.loss)).term(params)
    assert choose(opaque, params, 1e-2, 1.0) is diffrax.Tsit5
    assert choose(opaque, params, 1e-2, 1e6) is diffrax.Kvaerno5
    flow = gf.GradientFlow(gf.Loss(lambda model: jnp.sum(model**4)))
    assert choose(*flow.term(jnp.ones(3000)), 1e-2, 1e6) is diffrax.Tsit5

    chosen = []

    @jax.jit
    def traced(t1):
        chosen.append(choose(term, params, 1e-2, t1))
        return t1

    traced(1.0)
    assert chosen == [gf.KKT5]
