"""Grokking times: predicted with an error, refused where theory ends, and the rules of
thumb beside them."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

import gradflow as gf

KEY = jax.random.key(0)
LAMS = (1e-2, 1e-3, 1e-5)


@pytest.fixture(scope="module")
def diagonal():
    task = gf.tasks.diagonal_network(KEY, samples=8, dim=20, sparsity=2)
    options = dict(slow_time=4.0, metrics=task.metrics)
    theory = gf.two_phase(task.flow, task.model, order=2, **options)
    paths = gf.sweep(
        task.flow,
        task.model,
        weight_decay=jnp.array(LAMS),
        solver=gf.KKT5(),
        saves=513,
        rtol=1e-8,
        progress=False,
        **options,
    )
    return task, theory, paths


@pytest.mark.parametrize("name", ["train", "test"])
def test_times_are_right_and_so_is_their_error(diagonal, name):
    _, theory, paths = diagonal
    for lam, path in zip(LAMS, paths, strict=True):
        predicted = theory.crossing_time(name, lam)
        measured = path.crossing_time(name)
        assert predicted.order == 2
        assert abs(predicted.time / measured - 1) < 1e-3
        # Twice, and what interpolating the path between its saved times adds.
        off = abs(predicted.time - measured)
        assert off < 2 * predicted.error + 3e-6 * measured
        assert predicted.error < 5e-3 * measured
        assert f"{predicted.time:.6g}" in str(predicted)


def test_the_second_order_is_nearer(diagonal):
    _, theory, paths = diagonal
    first = dataclasses.replace(theory, second=None)
    for lam, path in zip(LAMS[:2], paths, strict=False):
        measured = path.crossing_time("test")
        off = [abs(x.grokking_time(lam).time - measured) for x in (first, theory)]
        assert off[0] > 5 * off[1]
        assert np.isnan(first.grokking_time(lam).error)


def test_no_number_beyond_the_validity(diagonal):
    _, theory, paths = diagonal
    # It does cross, at s = 1.1, but η(s) is no longer above 10 λ there.
    beyond = theory.grokking_time(0.1)
    assert np.isnan(beyond.time) and np.isnan(beyond.error)
    until = theory.valid_until(0.1)
    assert 0 < until < 1 and f"s ≤ {until:.3g}" in str(beyond)
    eta = np.interp(until, theory.drift.s, theory.smallest_curvature)
    assert eta > 1.0
    # From the start:
    assert theory.valid_until(10.0) == 0.0
    assert "too large" in theory.grokking_time(10.0).why
    horizons = [theory.valid_until(lam) for lam in (1e-1, 1e-2, 1e-3, 1e-5)]
    assert np.all(np.diff(horizons) > 0) and horizons[-1] == theory.drift.s[-1]


def test_names_and_thresholds(diagonal):
    task, theory, _ = diagonal
    with pytest.raises(ValueError, match="no metric is named 'other'"):
        theory.crossing_time("other", 1e-3)


@pytest.mark.slow
def test_widths(diagonal):
    _, _, paths = diagonal
    a, b = (gf.widths(paths[i]) for i in (1, 2))
    assert abs(b.drop - a.drop) < 0.02 * a.drop
    assert abs((b.plateau - a.plateau) / np.log(100) - 1) < 0.01
    # A metric that is known: 1/(1 + t) from memorisation at t = 0.1 on.
    t = jnp.concatenate([jnp.zeros(1), jnp.geomspace(1e-3, 1e6, 400)])
    fall = 1 / (1 + t)
    known = dataclasses.replace(
        paths[1],
        t=t,
        metrics={"train": 1 / (1 + 10 * t), "test": fall},
        train_loss=fall,
        penalty=fall,
        watched={"train": gf.Metric(lambda m: m, threshold=0.5)},
    )
    width = gf.widths(known)
    top = 1 / 1.1
    begin, end = 1 / (0.9 * top) - 1, 1 / (0.1 * top) - 1
    np.testing.assert_allclose(width.begin, begin, rtol=2e-2)
    np.testing.assert_allclose(width.end, end, rtol=2e-2)
    np.testing.assert_allclose(width.drop, np.log(end / begin), atol=2e-2)


def test_onset(diagonal):
    task, theory, paths = diagonal
    found = [gf.onset(task.flow, path) for path in paths]
    # t_GF is of the fast phase; t_WD grows as ln(1/λ) over η at the end of it.
    fitted = [x.t_gf for x in found]
    np.testing.assert_allclose(fitted, fitted[-1], rtol=0.05)
    eta = float(theory.spectrum.smallest_curvature)
    slope = (found[2].t_wd - found[1].t_wd) / np.log(100)
    assert abs(slope * eta - 1) < 0.1
    # Where the two phases are told apart, λ is far below the balance.
    assert found[1].balance > 100 * LAMS[1]
    gradient = task.flow.velocity(task.model, 0.0)
    size = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradient)))
    end = np.sqrt(2 * float(paths[1].penalty[-1]))
    np.testing.assert_allclose(found[1].balance, size / end, rtol=1e-10)


def test_radial_law(diagonal):
    task, theory, _ = diagonal
    law = gf.radial_law(task.flow, theory)
    np.testing.assert_allclose(law.integral, law.log_norm, atol=2e-6)
    assert law.log_norm[-1] < -0.3 and np.all(np.diff(law.log_norm) < 0)


@pytest.mark.slow
def test_transition_time_of_large_scales():
    assert np.isclose(gf.transition_time(np.e**2, 0.1), 20.0)
    with pytest.raises(ValueError, match="scale"):
        gf.transition_time(0.5, 0.1)
    # The null coordinates of linear regression decay as αe^{−λt}: exact in ratios.
    task = gf.tasks.linear_regression(KEY, samples=5, dim=12)
    drawn = task.model.weights
    times = []
    for alpha in (10.0, 1000.0):
        model = gf.models.LinearModel(alpha * drawn)
        theory = gf.two_phase(
            task.flow,
            model,
            slow_time=12.0,
            metrics={"test": task.metrics["test"]},
        )
        times.append(theory.grokking_time(1e-3).time)
    expected = gf.transition_time(100.0, 1e-3)
    np.testing.assert_allclose(times[1] - times[0], expected, rtol=1e-2)


# Saddles: a fast phase that is slow


class Cube(eqx.Module):
    """x ↦ u³x, which leaves u = 0 after t ≈ 1/3u₀; and a parameter that does nothing,
    so that there is a drift."""

    u: jax.Array
    idle: jax.Array

    def __call__(self, x):
        return self.u**3 * x


@pytest.fixture(scope="module")
def cube():
    """Theory at both orders, of F = ½(u³ − 1)² from u₀ = 0.03, and the time at which
    u³ = ½, by quadrature of u' = 3u²(1 − u³) − λu."""
    flow = gf.GradientFlow(gf.SquaredError(jnp.ones(1), jnp.ones(1)))
    model = Cube(jnp.asarray(0.03), jnp.asarray(1.0))
    watch = {"test": gf.Metric(lambda m: 1 - m.u**3, threshold=0.5)}
    run = functools.partial(gf.two_phase, flow, model, slow_time=2.0, metrics=watch)

    def exact(lam):
        slowness = lambda u: 1 / (3 * u**2 * (1 - u**3) - lam * u)
        return quad(slowness, 0.03, 0.5 ** (1 / 3), epsabs=0, epsrel=1e-11)[0]

    return run(), run(order=2), exact


@pytest.mark.slow
def test_times_inside_a_slow_fast_phase(cube):
    _, theory, exact = cube
    lams = np.geomspace(1e-6, 8e-2, 16)  # beyond 0.09 it never leaves
    told = [theory.grokking_time(lam) for lam in lams]
    given = np.array([np.isfinite(x.time) for x in told])
    assert given[lams < 1e-3].all() and not given[lams > 2e-2].any()
    for lam, time in zip(lams[given], np.array(told)[given], strict=True):
        assert abs(time.time - exact(lam)) < 2 * time.error, lam
        assert time.error < 0.05 * time.time
    # From the smallest on it is the error of the paths.
    assert told[0].error < 1e-5 * told[0].time


@pytest.mark.slow
def test_a_slow_fast_phase_limits_the_validity(cube):
    first, second, exact = cube
    for theory in (first, second):
        until = [theory.valid_until(lam) for lam in (1e-5, 2e-2)]
        # η = 9, and the drift alone would have it hold for the larger one too.
        assert until == [2.0, 0.0] and theory.smallest_curvature.min() > 8.9
        why = theory.grokking_time(2e-2).why
        assert "too large" in why and "fast phase" in why
    # By the delay, (T²/2)θ', which is what λ does to first order.
    step = 1e-6
    slope = (exact(step) - exact(0.0)) / step
    u = 0.5 ** (1 / 3)
    least = slope * 3 * u**2 * (1 - u**3) / 2**0.5  # at u³ = ½, where ‖Φ‖² = 2
    assert least < first.fast_shift < 3 * least


# Measured times: landed on


class Pair(eqx.Module):
    """x ↦ ⟨w, x⟩; on data that see one coordinate alone, the other is e^{−λt}."""

    w: jax.Array

    def __call__(self, x):
        return x @ self.w


def decaying(threshold=1e-3):
    """A flow, a model, and a metric that crosses at t = −ln(threshold)/2λ."""
    flow = gf.GradientFlow(gf.SquaredError(jnp.eye(2)[:1], jnp.full(1, 0.3)))
    traced = []

    def square(model):
        traced.append(None)
        return model.w[1] ** 2

    watch = {"test": gf.Metric(square, threshold=threshold)}
    exact = lambda lam: -np.log(threshold) / 2 / np.asarray(lam)
    return flow, Pair(jnp.ones(2)), watch, exact, traced


@pytest.mark.slow
def test_measured_times_are_landed_on():
    flow, model, watch, exact, traced = decaying()
    run = functools.partial(gf.simulate, flow, model, weight_decay=0.02, rtol=1e-8)
    path = run(t1=1e3, metrics=watch, saves=33)
    rough = gf.crossing_time(path.t, path.metrics["test"], watch["test"])
    stated = gf.crossing_error(path.t, path.metrics["test"], watch["test"])
    compiled = len(traced)
    off, rough_off = (abs(t - exact(0.02)) for t in (path.crossing_time("test"), rough))
    assert off < 1e-7 * exact(0.02) and rough_off > 20 * off
    assert rough_off < stated < 100 * rough_off
    assert len(traced) == compiled  # it is the same program
    # Saved times so few that one pass is not enough; and what jumps.
    few = run(ts=jnp.array([0.0, 9e2, 1e3]), metrics=watch)
    assert abs(few.crossing_time("test") - exact(0.02)) < 1e-7 * exact(0.02)
    step = gf.Metric(lambda m: jnp.sign(m.w[1] - 0.2), threshold=0.0)
    jump = run(t1=1e3, metrics={"jump": step})
    at = -np.log(0.2) / 0.02
    assert abs(jump.crossing_time("jump") - at) < 1e-7 * at


@pytest.mark.slow
def test_each_lane_of_a_sweep_is_landed_on():
    flow, model, watch, exact, traced = decaying()
    # The last one ends before it crosses, and the first is made to have failed.
    lams = jnp.array([1.0, 0.1, 0.02, 1e-3])
    lanes = gf.sweep(
        flow, model, weight_decay=lams, t1=1e3, metrics=watch, saves=17,
        solver=gf.KKT4(), rtol=1e-8, progress=False,
    )  # fmt: skip
    bad = jax.tree.map(lambda v: v.at[0].set(jnp.nan), lanes.paths.metrics)
    lanes = dataclasses.replace(
        lanes, paths=dataclasses.replace(lanes.paths, metrics=bad)
    )
    lanes.crossing_time("test")
    compiled = len(traced)
    times = lanes.crossing_time("test")
    assert len(traced) == compiled
    assert np.isnan(times[[0, 3]]).all()
    np.testing.assert_allclose(times[1:3], exact(lams[1:3]), rtol=1e-7)
    theory = gf.two_phase(flow, model, slow_time=5.0, metrics=watch)
    report = gf.compare(lanes, theory)
    np.testing.assert_allclose(report.grokked.measured, times, rtol=1e-9)


@pytest.mark.slow
def test_a_crossing_that_cannot_be_landed_on_is_told():
    flow, model, watch, exact, _ = decaying()
    path = gf.simulate(flow, model, weight_decay=0.02, t1=1e3, metrics=watch, saves=17)

    def again(params, ts, start):
        piece = path.again(params, ts, start)
        lost = jax.tree.map(lambda v: v.at[-1].set(jnp.nan), piece.metrics)
        return dataclasses.replace(piece, metrics=lost, result=gf.RESULTS.stalled)

    failing = dataclasses.replace(path, again=again)
    with pytest.warns(UserWarning, match="test at λ = 0.02 is interpolated.*no step"):
        time = failing.crossing_time("test")
    assert time == gf.crossing_time(path.t, path.metrics["test"], watch["test"])


def test_times_of_a_descent_are_interpolated():
    flow, model, watch, exact, _ = decaying()
    path = gf.descent(
        flow, model, weight_decay=0.02, learning_rate=0.1, t1=1e3, metrics=watch
    )
    assert path.again is None
    rough = gf.crossing_time(path.t, path.metrics["test"], watch["test"])
    assert path.crossing_time("test") == rough
