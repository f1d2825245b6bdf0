"""The two-phase prediction, and what it is measured by."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import first_of

import gradflow as gf
from gradflow.runs.interpolate import interpolate
from gradflow.theory.compare import fit_rate

KEY = jax.random.key(0)
# Over s up to which the smallest normal curvature stays of the order of one.
TASKS = {
    "linear_regression": (
        lambda: gf.tasks.linear_regression(KEY, samples=5, dim=12),
        2.0,
    ),
    "diagonal_network": (
        lambda: gf.tasks.diagonal_network(KEY, samples=8, dim=20, sparsity=2),
        1.0,
    ),
    "teacher_student": (
        lambda: gf.tasks.teacher_student(KEY, width=20, samples=6),
        1.0,
    ),
}


@pytest.fixture(scope="module", params=first_of(TASKS))
def studied(request):
    make, slow_time = TASKS[request.param]
    task = make()
    theory = gf.two_phase(
        task.flow, task.model, slow_time=slow_time, metrics=task.metrics
    )
    sweep = gf.sweep(
        task.flow,
        task.model,
        weight_decay=jnp.geomspace(1e-2, 1e-6, 5),
        slow_time=slow_time,
        metrics=task.metrics,
        saves=257,
        rtol=1e-8,
        progress=False,
    )
    return task, theory, sweep, gf.compare(sweep, theory)


def test_error_is_of_order_one_over_three_decades(studied):
    _, _, _, report = studied
    first = report.orders[1]
    used = report.weight_decay[first.rate.used]
    assert used.max() / used.min() >= 999
    assert abs(first.rate.exponent - 1) < 0.1
    assert first.rate.stderr < 0.05
    # Not only the rate: the bound itself, and it falls with every λ.
    assert np.all(np.diff(first.sup_all) < 0) and first.sup_all[-1] < 1e-4


def test_report_text(studied):
    _, _, _, report = studied
    text = str(report)
    assert "1.00e-06" in text and "theory: 1" in text and "FAILED" not in text


def test_drift_alone_is_the_composite_in_the_slow_phase(studied):
    _, _, _, report = studied
    np.testing.assert_allclose(
        report.drift.sup[-1],
        np.max(
            report.orders[1].error[-1][np.asarray(report.sweep.slow_time[-1]) >= 0.1]
        ),
        rtol=1e-6,
    )


def test_prediction_begins_at_the_model_and_passes_the_limit(studied):
    task, theory, _, _ = studied
    start = theory.predict(0.0, 1e-6)
    for a, b in zip(leaves(start), leaves(task.model), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    # With λ = 0 there is no drift: the end is Φ(θ₀).
    for a, b in zip(
        leaves(theory.predict(10 * theory.fast.t[-1], 0.0)),
        leaves(theory.limit),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-12)
    beyond = theory.predict(2 * theory.drift.s[-1] / 1e-3, 1e-3)
    assert all(jnp.isnan(x).all() for x in leaves(beyond))


@pytest.mark.slow
def test_prediction_agrees_with_the_flow_between_the_saved_times(studied):
    task, theory, _, _ = studied
    ts = jnp.geomspace(3 * theory.fast_scale, theory.fast.t[-1] / 2, 7)
    fast = gf.simulate(
        task.flow,
        task.model,
        weight_decay=0.0,
        ts=jnp.concatenate([jnp.zeros(1), ts]),
        solver=gf.KKT5(),
        rtol=1e-9,
    )
    predicted = theory.predict(fast.t, 0.0)
    for a, b in zip(leaves(predicted), leaves(fast.models), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-7)


def test_limit_has_the_known_codimension(studied):
    task, theory, _, _ = studied
    assert int(theory.spectrum.rank) == task.codimension
    assert not bool(theory.spectrum.ambiguous)


@pytest.mark.slow
def test_derivative_of_the_limit_map_is_the_tangent_projection(studied):
    task, theory, _, _ = studied
    params, static = eqx.partition(theory.limit, eqx.is_inexact_array)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    step = 1e-4 * jnp.linalg.norm(flat)

    def limit(theta):
        model = eqx.combine(unravel(theta), static)
        out = gf.manifold.limit_map(task.loss, model, rtol=1e-12)
        return ravel(out.model)

    for key in jax.random.split(jax.random.key(7), 2):
        v = jax.random.normal(key, flat.shape)
        v = v / jnp.linalg.norm(v)
        # Of fourth order: the error of a central difference at this step is 1e-7.
        d = lambda h, v=v: (limit(flat + h * v) - limit(flat - h * v)) / (2 * h)
        difference = (4 * d(step) - d(2 * step)) / 3
        projected = gf.manifold.tangent_projection(task.loss, theory.limit, unravel(v))
        error = jnp.linalg.norm(difference - ravel(projected))
        assert error < 1e-6


def test_predicted_grokking_time(studied):
    task, _, _, report = studied
    if task.name == "diagonal_network":
        pytest.skip("this small one does not cross its threshold by s = 1")
    told = report.grokked
    crossed = np.isfinite(told.measured) & (report.weight_decay <= 1e-3)
    assert crossed.sum() >= 3
    np.testing.assert_allclose(
        told.predicted[crossed], told.measured[crossed], rtol=0.02
    )


def leaves(model):
    return jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))


def ravel(model):
    return jax.flatten_util.ravel_pytree(eqx.filter(model, eqx.is_inexact_array))[0]


def test_interpolation_is_of_high_order():
    x = jnp.linspace(0.0, 8.0, 101)
    f = lambda x: jnp.exp(-jnp.exp(x - 4))
    at = jnp.array([0.0, 0.3, 17.5, 50.25, 99.9, 100.0])
    values = jax.vmap(lambda p: interpolate({"f": f(x)}, p)["f"])(at)
    np.testing.assert_allclose(values, f(0.08 * at), atol=2e-9)
    cubic = lambda n: n**3 - 5.0 * n
    exact = interpolate(cubic(jnp.arange(20.0)), jnp.asarray(11.3))
    np.testing.assert_allclose(exact, cubic(11.3), rtol=1e-12)


def test_fit_rate():
    lams = np.geomspace(1e-1, 1e-6, 6)
    errors = 3 * lams**1.5
    rate = fit_rate(lams, errors, largest=1e-2, floor=1e-8)
    assert rate.used.tolist() == [False, True, True, True, True, False]
    assert abs(rate.exponent - 1.5) < 1e-12 and rate.stderr < 1e-12
    assert str(rate) == "1.500 ± 0.000 over 4 λ from 1.0e-05 to 1.0e-02"
    # A line through two points leaves nothing to tell its error from.
    two = fit_rate(lams, errors, largest=2e-3, floor=1e-6)
    assert abs(two.exponent - 1.5) < 1e-12 and np.isnan(two.stderr)
    said = "1.500 over 2 λ from 1.0e-04 to 1.0e-03, too few to tell its error"
    assert str(two) == said
    none = fit_rate(lams, errors, largest=1e-7, floor=0.0)
    assert np.isnan(none.exponent) and "no rate" in str(none)


def test_crossing_time():
    t = np.array([0.0, 1.0, 10.0, 100.0, 1000.0])
    below = gf.Metric(lambda m: m, threshold=0.1)
    above = gf.Metric(lambda m: m, threshold=0.5, higher_is_better=True)
    # From 1 to 0.01 between t = 10 and 100, symmetric: halfway in both logarithms.
    assert np.isclose(
        gf.crossing_time(t, np.array([1, 1, 1, 0.01, 0.01], float), below), 10**1.5
    )
    # For good: the earlier crossing does not count.
    assert np.isclose(
        gf.crossing_time(t, np.array([1, 0.01, 1, 0.01, 0.01], float), below), 10**1.5
    )
    # Values that vanish are interpolated as they are.
    rising = np.array([0.0, 0.0, 0.0, 0.0, 1.0])
    assert 100 < gf.crossing_time(t, rising, above) < 1000
    # A smooth metric, at the default density of saved times.
    fine = np.concatenate([[0.0], np.geomspace(1e-2, 1e6, 64)])
    falling = 1 / (1 + (fine / 50) ** 2)
    assert np.isclose(gf.crossing_time(fine, falling, below), 150.0, rtol=5e-3)
    assert gf.crossing_time(t, np.array([0.05] * 5, float), below) == 0.0
    assert np.isnan(gf.crossing_time(t, np.array([0.05, 1, 1, 1, 1], float), below))
    assert np.isnan(
        gf.crossing_time(t, np.array([1, 1, np.nan, 0.0, 0.0], float), below)
    )
    assert np.isnan(
        gf.crossing_time(t, np.array([1.0] * 5, float), gf.Metric(lambda m: m))
    )


@pytest.mark.slow
def test_no_prediction_without_a_minimiser(monkeypatch):
    x = jnp.array([[-2.0], [-1.0], [1.0], [2.0]])
    loss = gf.CrossEntropy(x, jnp.array([0, 0, 1, 1]))
    model = eqx.nn.Linear(1, 2, key=KEY)
    flow = gf.GradientFlow(loss)
    with pytest.raises(Exception, match="no minimiser"):
        gf.two_phase(flow, model, slow_time=1.0)
    # What there is to look at does not take for ever.
    monkeypatch.setattr("gradflow.theory.two_phase._A_LOOK", 30)
    theory = gf.two_phase(flow, model, slow_time=1.0, throw=False)
    assert theory.result == gf.RESULTS.no_minimiser and not theory.stands
    assert theory.fast.stats.steps == 30 and np.isfinite(theory.fast.train_loss[1])


@pytest.mark.slow
def test_compare_needs_the_same_model():
    task = gf.tasks.linear_regression(KEY, samples=5, dim=12)
    other = gf.tasks.linear_regression(KEY, samples=5, dim=13)
    theory = gf.two_phase(task.flow, task.model, slow_time=1.0)
    sweep = gf.sweep(
        other.flow,
        other.model,
        weight_decay=jnp.array([0.1]),
        slow_time=1.0,
        progress=False,
    )
    with pytest.raises(ValueError, match="theory"):
        gf.compare(sweep, theory)
    # The same shapes, another start.
    moved = jax.tree.map(lambda w: w + 0.1, task.model)
    sweep = gf.sweep(
        task.flow,
        moved,
        weight_decay=jnp.array([0.1]),
        slow_time=1.0,
        progress=False,
    )
    with pytest.raises(ValueError, match="theory"):
        gf.compare(sweep, theory)


@pytest.mark.slow
def test_redundant_data():
    x = jax.random.normal(KEY, (4, 9))
    x = jnp.concatenate([x, x[:1]])
    model = gf.models.LinearModel(jnp.arange(9.0))
    flow = gf.GradientFlow(gf.SquaredError(x, x @ jnp.ones(9)))
    theory = gf.two_phase(flow, model, slow_time=2.0)
    assert bool(theory.result == gf.RESULTS.successful)
    assert int(theory.spectrum.rank) == 4 and bool(theory.spectrum.deficient)
    # M is affine: η is constant, and what lies in ker X decays as e^{−s}.
    eta = jnp.linalg.svd(x, compute_uv=False)[3] ** 2 / 5
    np.testing.assert_allclose(theory.smallest_curvature, eta, rtol=1e-10)
    least = jnp.linalg.pinv(x) @ (x @ jnp.ones(9))
    s = theory.drift.s[:, None]
    exact = least[None] + jnp.exp(-s) * (theory.limit.weights - least)[None]
    np.testing.assert_allclose(theory.drift.models.weights, exact, atol=1e-7)


@pytest.mark.slow
def test_failures_are_results_where_asked():
    task = gf.tasks.diagonal_network(KEY, samples=8, dim=20, sparsity=2)
    short = gf.two_phase(
        task.flow, task.model, slow_time=1.0, max_steps=15, throw=False
    )
    assert bool(short.result == gf.RESULTS.out_of_steps)
    assert "step budget" in str(short)


@pytest.mark.slow
def test_interpolation_error_bounds_the_error():
    # A small start: a plateau, and then an abrupt fall.
    task = gf.tasks.diagonal_network(
        KEY, samples=8, dim=20, sparsity=2, init_scale=3e-3
    )
    theory = gf.two_phase(task.flow, task.model, slow_time=0.1)
    ts = jnp.concatenate([jnp.zeros(1), jnp.geomspace(0.5, 20.0, 40)])
    options = dict(weight_decay=0.0, ts=ts, solver=gf.KKT5(), rtol=1e-9)
    fast = gf.simulate(task.flow, task.model, **options)
    predicted = theory.predict(ts, 0.0)
    off = jnp.hypot(predicted.u - fast.models.u, predicted.v - fast.models.v)
    size = jnp.sqrt(2 * theory.drift.penalty[0])
    error = jnp.max(jnp.linalg.norm(off, axis=1)) / size
    # 65 points would be off by 2e-2, 257 by 2e-5.
    assert len(theory.fast) >= 513 and len(theory.drift) == 65
    assert (jnp.diff(theory.fast.t) > 0).all()
    # Either path has an error of its own besides, of some rtol.
    assert error < theory.interpolation_error + 5e-9
    assert theory.interpolation_error < 6e-8
    assert "interpolated" not in str(theory)
    off = eqx.tree_at(lambda t: t.interpolation_error, theory, jnp.array(1e-3))
    assert "interpolated with a relative error of about 0.001" in str(off)


@pytest.mark.parametrize(
    "bad, name",
    [
        (dict(slow_time=-1.0), "slow_time"),
        (dict(rtol=2.0), "rtol"),
    ],
)
def test_bad_input_before_any_compute(bad, name):
    calls = []

    def predict(model, x):
        jax.debug.callback(lambda: calls.append(None))
        return jax.vmap(model)(x)

    flow = gf.GradientFlow(
        gf.SquaredError(jnp.eye(3)[:2], jnp.ones(2), predict=predict)
    )
    model = gf.models.LinearModel(jnp.ones(3))
    with pytest.raises(ValueError, match=name):
        gf.two_phase(flow, model, **(dict(slow_time=1.0) | bad))
    assert not calls
