"""The KKT solvers: against closed forms and SciPy, in plain Diffrax, at every λ."""

import json
import math
from types import SimpleNamespace
from typing import ClassVar

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
from scipy.integrate import solve_ivp

import gradflow as gf
from gradflow import tasks
from gradflow.models import DiagonalNetwork, LinearModel, TwoLayer
from gradflow.solvers.stages import ChordIteration

KKT = [gf.KKT4(), gf.KKT5()]
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "steps"), [(gf.KKT4, (15, 30, 60)), (gf.KKT5, (9, 18, 36))]
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_step_in_float32_stays_there():
    """Though in plain Diffrax times are float64 here."""
    x, ky, model = tanh_problem(jr.key(3))
    single = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree)
    loss = gf.SquaredError(single(x), single(jr.normal(ky, (4,))))
    term, params = gf.GradientFlow(loss).term(single(model))
    solver = gf.KKT4(root_finder=ChordIteration(1e-3, 1e-5, optx.rms_norm))
    t0, t1 = jnp.asarray(0.0), jnp.asarray(0.1)
    state = solver.init(term, t0, t1, params, 0.01)
    y1, error, info, after, _ = solver.step(term, t0, t1, params, 0.01, state, False)
    for leaf in jax.tree.leaves((y1, error, info)):
        assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all()
    dtypes = lambda s: [a.dtype for a in jax.tree.leaves(s)]
    assert dtypes(after) == dtypes(state)


@pytest.mark.slow
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


@pytest.mark.slow
def test_restart(linear):
    """A solve in two halves goes on as if it had never stopped: the multiplier, the
    slope and the tangent kernel are handed over."""
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
    assert state.kernel.shape == (4, 4)
    resumed = ravel_pytree(run(2.0, 4.0, half, state)[0])[0]
    forgetful = ravel_pytree(run(2.0, 4.0, half)[0])[0]
    assert_allclose(resumed, whole, rtol=1e-12)
    assert np.abs(forgetful - whole).max() > 1e-9


@pytest.mark.slow
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


def test_a_large_opaque_loss_is_refused():
    opaque = gf.GradientFlow(gf.Loss(lambda model: jnp.sum(model.weights**4)))
    term, params = opaque.term(LinearModel(jnp.ones(5001)))
    with pytest.raises(ValueError, match="^solver: KKT needs a composite.*5001.*RKC2"):
        controlled(gf.KKT4(), term, params, 1e-2, 1.0)


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
    """The larger one of KKT4's, and of whatever is chosen where no solver is named."""

    def error(solver):
        path = gf.simulate(
            task.flow, task.model, weight_decay=decay, ts=jnp.asarray(ts), rtol=rtol,
            solver=solver,
        )  # fmt: skip
        assert path.result == gf.RESULTS.successful
        assert solver is None or path.stats.solver == "KKT4"
        return sup_error(flat_paths(path), reference)

    return max(error(gf.KKT4()), error(None))


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rtol", [1e-4, 1e-6])
@pytest.mark.parametrize("name", SMALL)
def test_radau_stored(name, rtol, decay):
    task, data = stored(name)
    ts, reference = data[f"ts_{decay:.0e}"], data[f"theta_{decay:.0e}"]
    assert_allclose(ts[-1], 5 / decay)
    assert error_of(task, decay, ts, reference, rtol) < 5 * rtol


@pytest.mark.slow
def test_references_say_how_they_were_made():
    for name in SMALL:
        about = json.loads(str(stored(name)[1]["about"]))
        assert {"task", "key", "settings", "method", "jax", "scipy"} <= about.keys()
        assert (DATA / f"radau_{name}.npz").stat().st_size < 1e6


# ℓ'' is singular and no multiple of I: along equal shifts of the logits (softmax),
# where a sample is further than δ off (Huber, whose ℓ'' also jumps), or beyond its
# margin (hinge), and where it does not count (a weight of zero).
def sides(key):
    return jnp.where(jr.bernoulli(key, 0.5, (5, 3)), 1.0, -1.0)


LOSSES = {
    "cross-entropy": lambda x, key: gf.CrossEntropy(x, jr.randint(key, (5,), 0, 3)),
    "logistic": lambda x, key: gf.Logistic(x, jr.bernoulli(key, 0.5, (5, 3))),
    "Huber": lambda x, key: gf.Huber(x, 3 * jr.normal(key, (5, 3)), delta=0.5),
    "exponential": lambda x, key: gf.Exponential(x, sides(key)),
    "soft margin": lambda x, key: gf.SoftMargin(x, sides(key), reduction="sum"),
    "hinge": lambda x, key: gf.Hinge(x, sides(key)),
    "smooth hinge": lambda x, key: gf.Hinge(x, sides(key), delta=0.5),
    "weighted": lambda x, key: gf.SquaredError(
        x, jr.normal(key, (5, 3)), weights=jnp.array([1.0, 0, 3, 0.1, 1])
    ),
    "soft labels": lambda x, key: gf.CrossEntropy(
        x, jax.nn.softmax(jr.normal(key, (5, 3)), axis=1)
    ),
    "opaque": lambda x, key: gf.Loss(gf.SquaredError(x, jr.normal(key, (5, 3)))),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_other_losses(name):
    decay = 1e-3
    x, ky, model = tanh_problem(jr.key(5), outputs=3, samples=5)
    loss = LOSSES[name](x, ky)
    task = SimpleNamespace(model=model, loss=loss, flow=gf.GradientFlow(loss))
    ts = np.geomspace(0.1, 5 / decay, 12)
    reference, _ = radau_path(task, decay, ts)
    hard = ("logistic", "Huber", "soft margin", "exponential", "hinge", "smooth hinge")
    most = 20 if name in hard else 5
    assert error_of(task, decay, ts, reference, 1e-6) < most * 1e-6


class SmoothedL1(gf.penalties.AbstractCurved):
    """R(θ) = Σ √(θᵢ² + ε²), as stiff as 1/ε where θᵢ is small; with its curvature, or
    without."""

    width: float
    told: bool
    diagonal: ClassVar[bool] = False

    def __call__(self, params):
        size = lambda p: jnp.sum(jnp.sqrt(p**2 + self.width**2))
        return sum(size(p) for p in jax.tree.leaves(params))

    def gradient(self, params):
        return jax.tree.map(lambda p: p / jnp.sqrt(p**2 + self.width**2), params)

    def curvature(self, params):
        bend = lambda p: self.width**2 / (p**2 + self.width**2) ** 1.5
        return jax.tree.map(bend, params) if self.told else 0.0


@pytest.mark.slow
def test_stiff_penalty():
    """Against SciPy; and what the curvature is for."""
    loss, model = linear_problem(jr.key(0), samples=3, features=6)
    decay, ts = 1e-2, np.geomspace(0.1, 3e2, 12)
    iterations = {}
    for told in (True, False):
        penalty = SmoothedL1(1e-3, told)
        flow = gf.GradientFlow(loss, penalty=penalty)
        path = gf.simulate(
            flow,
            model,
            weight_decay=decay,
            ts=jnp.asarray(ts),
            rtol=1e-5,
            solver=gf.KKT4(),
        )
        iterations[told] = int(path.stats.iterations)
        velocity = jax.jit(
            lambda w, flow=flow: (
                flow.velocity(eqx.tree_at(lambda m: m.w, model, w), decay).w
            )
        )
        reference = solve_ivp(
            lambda t, w, velocity=velocity: np.asarray(velocity(jnp.asarray(w))),
            (0.0, ts[-1]),
            np.asarray(model.w),
            method="Radau",
            t_eval=ts,
            rtol=1e-9,
            atol=1e-11,
        ).y.T
        assert sup_error(flat_paths(path), reference) < 5e-5
    assert iterations[True] < iterations[False]


@pytest.mark.slow
@pytest.mark.parametrize("solver", KKT, ids=by_name)
@pytest.mark.parametrize("decay", [1e-1, 1e-4])
def test_linear_flow_of_a_wide_spectrum(solver, decay):
    """Eigenvalues from 1e-4 to 1e8, and one zero; θ(t) in closed form."""
    rates = np.append(np.geomspace(1e-4, 1e8, 12), 0.0)
    scales = jnp.sqrt(jnp.asarray(rates))
    start, target = np.linspace(1.0, 2.0, 13), np.linspace(-1.0, 1.0, 13)
    loss = gf.SquaredError(
        None,
        scales * target,
        reduction="sum",
        predict=lambda model, x: scales * model.weights,
    )
    flow = gf.GradientFlow(loss)
    ts = np.geomspace(1e-9, 5 / decay, 20)
    path = gf.simulate(
        flow,
        LinearModel(jnp.asarray(start)),
        weight_decay=decay,
        ts=jnp.asarray(ts),
        rtol=1e-6,
        solver=solver,
    )
    rest = rates * target / (rates + decay)
    exact = rest + (start - rest) * np.exp(-np.outer(ts, rates + decay))
    assert sup_error(flat_paths(path), exact) < 5e-6
    assert path.stats.steps < 500


# Balance laws: exact, and independent of any other solver


BALANCED = {
    "difference": lambda key: tasks.diagonal_network(key, form="difference"),
    "product": lambda key: tasks.diagonal_network(key, form="product"),
    "completion": lambda key: tasks.matrix_completion(key, shape=(8, 8)),
    "deep_linear": tasks.deep_linear,
}


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["diagonal", "tanh"])
def test_steps_hardly_depend_on_weight_decay(name):
    task = make_task(name)
    runs = {
        decay: gf.simulate(
            task.flow,
            task.model,
            weight_decay=decay,
            ts=jnp.geomspace(0.1, 5 / decay, 12),
            rtol=1e-4,
            solver=gf.KKT4(),
        ).stats
        for decay in (1e-2, 1e-5, 1e-8)
    }
    steps = {decay: int(stats.steps) for decay, stats in runs.items()}
    assert steps[1e-8] <= 2 * steps[1e-2], steps
    for stats in runs.values():
        assert int(stats.rejected) <= 0.15 * int(stats.steps)
        assert int(stats.kernels) <= 0.5 * int(stats.steps)
