"""No run passes for right that is not: every way to fail, or to be inexact, has a name.
(Divergence, stalling, running out of steps and bad input are in test_simulate.)"""

import dataclasses
from types import SimpleNamespace

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import flat_paths, sup_error

import gradflow as gf
from gradflow import tasks
from gradflow.models import LinearModel
from gradflow.runs.refine import refined
from gradflow.solvers.base import as_flow_solver, Saved
from gradflow.tasks._linear_regression import LinearTruth
from gradflow.theory import two_phase as theory
from gradflow.theory.second_order import second_order


def run(task, decay, **options):
    settings = dict(slow_time=5.0, saves=9, throw=False) | options
    return gf.simulate(task.flow, task.model, weight_decay=decay, **settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rtol", "trusted"), [(1e-3, False), (1e-4, False), (1e-7, True)]
)
def test_explicit_solver_at_its_stability_limit(rtol, trusted):
    """Diffrax itself calls both runs a success."""
    task = tasks.diagonal_network(jr.key(0))
    exact = flat_paths(run(task, 1e-3, rtol=1e-9, solver=gf.KKT5()))
    path = run(task, 1e-3, rtol=rtol, solver=diffrax.Tsit5())
    error = sup_error(flat_paths(path), exact)
    assert path.stats.steps < 20_000
    if trusted:
        assert path.result == gf.RESULTS.successful and error < 20 * rtol
    else:
        assert path.result == gf.RESULTS.unstable and error > 5 * rtol
        assert "stability limit" in str(path)
        with pytest.raises(RuntimeError, match="stability limit"):
            run(task, 1e-3, rtol=rtol, solver=diffrax.Tsit5(), throw=True)


@pytest.mark.slow
def test_explicit_solver_where_curvature_falls_along_the_path():
    """Stiff at first, and not at the end: what counts is the whole path."""
    loss = gf.Loss(lambda w: 0.5 * (w[0] * w[1] - 1) ** 2)
    task = SimpleNamespace(flow=gf.GradientFlow(loss), model=jnp.array([15.0, 1 / 15]))
    exact = flat_paths(run(task, 1e-3, rtol=1e-9, solver=gf.KKT5()))
    path = run(task, 1e-3, rtol=2e-2, solver=diffrax.Tsit5())
    # (It was over 20 rtol before errors that grow were expected to grow on.)
    assert sup_error(flat_paths(path), exact) > 10 * 2e-2
    assert path.result == gf.RESULTS.unstable


@pytest.mark.parametrize(
    ("rejected", "rtol", "result"),
    [(800, 1e-3, "unstable"), (600, 1e-3, "successful"), (800, 5e-5, "successful")],
)
def test_explicit_solver_that_jitters_about_a_valley(rejected, rtol, result):
    """Of 2000 steps; what is saved lies beside the valley, where L is small."""
    term, params = gf.GradientFlow(gf.Loss(lambda w: 0.5 * w[0] ** 2)).term(jnp.ones(1))
    counts = jnp.array([2000, 2000 - rejected, rejected])
    saved = Saved(term, params[None], jnp.ones(1), counts, jnp.asarray(rtol))
    told = as_flow_solver(diffrax.Tsit5()).reservation(saved)
    assert told == getattr(gf.RESULTS, result)


@pytest.mark.slow
def test_steps_that_are_tried_again_to_land():
    """So many of few steps are no sign of the stability limit."""
    loss = gf.Loss(lambda w: 0.5 * ((w[0] * w[1] - 1) ** 2 + (w[2] - 1) ** 2))
    test = gf.Metric(lambda w: (w[0] * w[1] - 1) ** 2, threshold=1e-2)
    path = gf.simulate(
        gf.GradientFlow(loss), jnp.array([0.3, 0.5, 0.0]), weight_decay=0.01, t1=20.0,
        saves=5, rtol=1e-2, solver=diffrax.Tsit5(), until="test",
        metrics={"test": test}, throw=False,
    )  # fmt: skip
    assert path.result == gf.RESULTS.criterion_met
    assert 3 * path.stats.rejected > path.stats.steps


@pytest.mark.slow
@pytest.mark.parametrize("rtol", [1e-3, 1e-6])
def test_sliding_along_kinks(rtol):
    """Neither stalls nor passes for exact; and the balance law is kept."""
    task = tasks.relu_1d(jr.key(1), width=20, samples=6)
    path = run(task, 1e-2, rtol=rtol, max_steps=2000, throw=True)
    assert path.result == gf.RESULTS.slid and path.succeeded
    assert 0 < path.stats.sliding <= path.stats.accepted
    assert "WARNING" in str(path) and "kinks" in str(path)
    start, end = (np.asarray(task.truth.invariant(path[i])) for i in (0, -1))
    decayed = start * np.exp(-2 * 1e-2 * float(path.t[-1]))
    assert np.linalg.norm(end - decayed) < 1e-2 * np.linalg.norm(start)


def noisy(key):
    """More samples than parameters: the residuals stay large."""
    kx, ky, km = jr.split(key, 3)
    x = jr.normal(kx, (25, 1))
    y = jnp.sin(3 * x[:, 0]) + 0.3 * jr.normal(ky, (25,))
    return gf.SquaredError(x, y), eqx.nn.MLP(1, "scalar", 3, 1, jnp.tanh, key=km)


def outliers(key):
    """Samples that pull with a constant force, on and off."""
    kx, ky, km = jr.split(key, 3)
    x, y = jr.normal(kx, (6, 2)), 3 * jr.normal(ky, (6, 2))
    return gf.Huber(x, y, delta=0.3), eqx.nn.MLP(2, 2, 10, 1, jnp.tanh, key=km)


@pytest.mark.slow
@pytest.mark.parametrize("rtol", [1e-3, 1e-6])
@pytest.mark.parametrize("decay", [1e-2, 1e-5])
@pytest.mark.parametrize("make", [noisy, outliers])
def test_a_smooth_loss_does_not_slide(make, decay, rtol):
    """Though the iteration, which leaves out the curvature of the outputs, is slow."""
    loss, model = make(jr.key(0))
    task = SimpleNamespace(flow=gf.GradientFlow(loss), model=model)
    settings = dict(solver=gf.KKT4(), slow_time=1.0, max_steps=2000)
    path = run(task, decay, rtol=rtol, **settings)
    assert path.result == gf.RESULTS.successful and path.stats.sliding == 0


@pytest.mark.slow
def test_from_zero():
    """θ₀ = 0 sets no scale of its own."""
    x, y = jr.normal(jr.key(0), (3, 8)), jnp.array([1.0, -2.0, 0.5])
    model = LinearModel(jnp.zeros(8))
    truth = LinearTruth(x, y, jnp.zeros(8), model.weights, curvature=1 / 3)
    task = SimpleNamespace(flow=gf.GradientFlow(gf.SquaredError(x, y)), model=model)
    path = run(task, 1e-3, slow_time=None, ts=jnp.array([0.5, 10.0, 1e3, 5e3]))
    assert path.result == gf.RESULTS.successful
    assert sup_error(flat_paths(path), np.asarray(truth.path(path.t, 1e-3))) < 1e-5


@pytest.mark.slow
def test_rank_collapse_is_told():
    """On a diagonal network coordinates die out, and the rank of J with them."""
    task = tasks.diagonal_network(jr.key(0), samples=12, dim=24, sparsity=2)
    ratios = {}
    for s in (1.0, 60.0):
        path = run(task, 1e-4, slow_time=s, solver=gf.KKT4())
        ratios[s] = float(path.stats.conditioning)
        assert path.result == gf.RESULTS.successful
        assert ("losing rank" in str(path)) == (s == 60.0)
    assert ratios[1.0] > 1e-4 > 1e-6 > ratios[60.0]


@pytest.mark.slow
def test_a_jacobian_without_full_rank():
    """Each sample twice, so that half the singular values of J vanish."""
    x = jr.normal(jr.key(0), (3, 8))
    y = jnp.array([1.0, -2.0, 0.5])
    x, y = jnp.concatenate([x, x]), jnp.concatenate([y, y])
    model = LinearModel(jr.normal(jr.key(1), (8,)))
    truth = LinearTruth(x, y, jnp.zeros(8), model.weights, curvature=1 / 6)
    flow = gf.GradientFlow(gf.SquaredError(x, y))
    path = gf.simulate(flow, model, weight_decay=1e-4, slow_time=5.0, rtol=1e-6)
    assert sup_error(flat_paths(path), np.asarray(truth.path(path.t, 1e-4))) < 5e-6
    assert path.stats.conditioning < 1e-12 and "is below rounding:\n" in str(path)


@pytest.mark.slow
def test_more_samples_than_parameters_is_no_loss_of_rank():
    loss, model = noisy(jr.key(0))
    task = SimpleNamespace(flow=gf.GradientFlow(loss), model=model)
    path = run(task, 1e-3, slow_time=1.0, solver=gf.KKT4())
    assert path.stats.conditioning is None and "losing rank" not in str(path)


@pytest.mark.slow
def test_float32_takes_the_tolerance_that_it_resolves():
    task = tasks.diagonal_network(jr.key(0), samples=8, dim=20, sparsity=3)
    cast = lambda x: x.astype(jnp.float32) if eqx.is_inexact_array(x) else x
    single = eqx.tree_at(
        lambda t: (t.model, t.loss),
        task,
        replace_fn=lambda part: jax.tree.map(cast, part),
    )
    with pytest.warns(UserWarning, match="rtol: 1e-07 is below.*float32.*float64"):
        path = run(single, 1e-4, rtol=1e-7)
    assert path.succeeded and path.params.u.dtype == jnp.float32
    rtol = float(path.stats.rtol)
    assert 5e-5 < rtol < 2e-4
    exact = run(task, 1e-4, rtol=1e-8, ts=path.t.astype(float), slow_time=None)
    assert sup_error(flat_paths(path), flat_paths(exact)) < 20 * rtol


# The train loss: through the multiplier


def _sides(key):
    return jnp.where(jr.bernoulli(key, 0.5, (6,)), 1.0, -1.0)


LOSSES = {
    "squared error": lambda x, key: gf.SquaredError(x, jr.normal(key, (6,))),
    "Huber": lambda x, key: gf.Huber(x, 3 * jr.normal(key, (6,))),
    "logistic": lambda x, key: gf.Logistic(x, jr.bernoulli(key, 0.5, (6,))),
    "exponential": lambda x, key: gf.Exponential(x, _sides(key)),
    "hinge": lambda x, key: gf.Hinge(x, _sides(key)),
    "weighted": lambda x, key: gf.SquaredError(
        x, jr.normal(key, (6,)), weights=jnp.array([1.0, 2, 0, 0.1, 5, 1])
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_train_loss_is_as_exact_as_the_parameters(name):
    kx, ky, km = jr.split(jr.key(4), 3)
    model = eqx.nn.MLP(2, "scalar", 20, 1, jnp.tanh, key=km)
    loss = LOSSES[name](jr.normal(kx, (6, 2)), ky)
    flow = gf.GradientFlow(loss)
    # But for the time between the phases, when the loss is below the tolerance and has
    # not come to its plateau yet.
    decay, ts = 1e-6, jnp.array([1.0, 3.0, 10.0, 3e4, 1e5, 3e5, 1e6])
    go = lambda rtol: gf.simulate(flow, model, weight_decay=decay, ts=ts, rtol=rtol)
    path, exact = go(1e-4), go(1e-9)
    error = sup_error(flat_paths(path), flat_paths(exact))
    relative = lambda f: np.abs(np.asarray(f / exact.train_loss) - 1).max()
    most = 20 if name == "squared error" else 50  # there the fit is never exact
    assert relative(path.train_loss) < most * error
    # The reference is the loss of its own parameters where that has digits left.
    plain = jnp.stack([loss(exact[i]) for i in range(3)])
    np.testing.assert_allclose(exact.train_loss[:3], plain, rtol=1e-6)
    if name == "squared error":
        computed = jnp.stack([loss(path[i]) for i in range(len(path))])
        assert relative(computed) > 20 * error


# A failure of the theory names the phase, the place, and the curvatures there


@pytest.mark.slow
def test_a_failure_names_phase_place_and_spectrum(monkeypatch):
    # The flow of a quartic comes to rest as t^{−1/2}: never, up to t_max.
    quartic = gf.Loss(lambda model: (model.weights[0] ** 2) ** 2 / 4)
    slow = LinearModel(jnp.array([1.0, 2.0]))
    predict = gf.two_phase
    with pytest.raises(RuntimeError, match=r"^limit phase, reached t = 100.*curvature"):
        predict(gf.GradientFlow(quartic), slow, slow_time=1.0, t_max=100.0)
    task = tasks.linear_regression(jr.key(3), samples=3, dim=6)
    flow, model = task.flow, task.model
    # A fast path is saved at 65 times: these do not suffice, but for the limit.
    with pytest.raises(RuntimeError, match=r"^fast phase, reached t = .*step budget"):
        predict(flow, model, slow_time=1.0, max_steps=55)
    whole = theory.riemannian_flow
    short = lambda *args, **options: whole(*args, **(options | {"max_steps": 20}))
    monkeypatch.setattr(theory, "riemannian_flow", short)
    with pytest.raises(RuntimeError) as caught:
        predict(flow, model, slow_time=1.0)
    text = str(caught.value)
    assert text.startswith("drift phase, reached s = ") and "\n" not in text
    eta = np.linalg.svd(np.asarray(task.loss.x), compute_uv=False)[-1] ** 2 / 3
    assert "rank 3, smallest normal curvatures" in text and f"{eta:.2g}" in text
    told = predict(flow, model, slow_time=1.0, throw=False)
    assert told.where and f"FAILED: {told.where}" in str(told)
    assert told.result == gf.RESULTS.out_of_steps and told.valid_until(1e-6) == 0.0


def bumpy(x, last=0.0):
    """A drift of one parameter that 65 places do not resolve."""
    x = jnp.asarray(x)
    values = jnp.tanh(200 * (x - 0.6)) + jnp.where(x == 1, last, 0.0)
    return gf.manifold.Drift(
        s=x, params={"w": values[:, None]}, static=None, metrics={}, train_loss=values,
        penalty=values, result=gf.RESULTS.successful, stats=gf.Stats("by hand", 0),
        smallest_curvature=jnp.ones_like(x), watched={},
    )  # fmt: skip


def test_refinement_ends_where_a_run_fails_or_theory_has_ended():
    runs = []

    def run(x, failing=False):
        runs.append(x)
        return bumpy(x, jnp.nan if failing and len(runs) == 3 else 0.0)

    told = dict(clock="s", curvature="smallest_curvature")
    path, error = refined(run, 1e-7, **told)
    assert len(path) == 1025 and len(runs) == 3 and error < 1e-3
    runs.clear()
    # The run for 1025 places fails: what there was stays as it is.
    path, error = refined(lambda x: run(x, True), 1e-7, **told)
    assert len(runs) == 3 and len(path) == 257 and jnp.isfinite(path.train_loss).all()
    # Straight lines between them, as along kinks, are not refined beyond 257.
    runs.clear()
    path, _ = refined(run, 1e-7, degree=1, **told)
    assert len(path) == 257 and len(runs) == 2
    # What changes abruptly after the rank is lost does not count.
    runs.clear()

    def lost(x):
        path = run(x)
        eta = jnp.where(path.s < 0.3, 1.0, 1e-12)
        return dataclasses.replace(path, smallest_curvature=eta)

    path, error = refined(lost, 1e-7, **told)
    assert len(runs) == 1 and error < 1e-7


@pytest.mark.slow
def test_theory_where_infinities_and_nan_raise():
    task = tasks.diagonal_network(jr.key(2), samples=3, dim=6, sparsity=1)
    found = gf.two_phase(
        task.flow, task.model, slow_time=1.0, metrics=task.metrics, order=2
    )
    term, _ = task.flow.term(task.model)
    with jax.debug_nans(True), jax.debug_infs(True):
        paths = found.fast, found.drift
        again = second_order(term, *paths, found.spectrum, found.fast_scale)
        np.testing.assert_allclose(again.ratio, found.second.ratio)
        assert np.isfinite(found.memorisation_time(1e-4).time)
        assert "too large" in found.memorisation_time(50.0).why
