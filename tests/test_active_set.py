"""Flows along the kinks of ℓ1, against exact solutions."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from exact_l1 import l1_drift, l1_flow
from jaxtyping import Array
from scipy.optimize import linprog

import gradflow as gf


class Linear(eqx.Module):
    a: Array

    def __call__(self, x):
        return x @ self.a


def data(samples, features, sparsity, seed=1):
    rng = np.random.default_rng(seed)
    truth = np.zeros(features)
    at = rng.choice(features, sparsity, replace=False)
    truth[at] = rng.normal(size=sparsity)
    x = rng.normal(size=(samples, features)) / np.sqrt(samples)
    return x, x @ truth


def loss_on(x, y):
    return gf.SquaredError(jnp.asarray(x), jnp.asarray(y), reduction="sum")


@pytest.mark.slow
@pytest.mark.parametrize("target", [0.05, -0.4, 0.3])
def test_one_coordinate_in_closed_form(target):
    """θ' = target − θ − λ sign θ from 1: it reaches 0 at t = ln((1−c)/−c), with
    c = target − λ; stays there, to the bit, if |target| ≤ λ; and else goes on, or never
    gets there."""
    lam = 0.1
    loss = loss_on(np.ones((1, 1)), np.array([target]))
    flow = gf.GradientFlow(loss, penalty=gf.L1())
    ts = jnp.linspace(0.0, 6.0, 41)
    start = Linear(jnp.ones(1))
    path = gf.simulate(flow, start, weight_decay=lam, ts=ts, rtol=1e-9, atol=1e-10)
    c = target - lam
    exact = c + (1 - c) * np.exp(-np.asarray(ts))
    if c < 0:
        end = np.log((1 - c) / -c)
        other = target + lam
        later = other * -np.expm1(-(np.asarray(ts) - end)) if other < 0 else 0.0
        exact = np.where(ts < end, exact, later)
    found = np.asarray(path.params.a[:, 0])
    np.testing.assert_allclose(found, exact, atol=1e-8)
    settled = abs(target) <= lam
    assert (found[-5:] == 0).all() == settled


@pytest.fixture(scope="module")
def flow_and_exact():
    x, y = data(6, 16, 2)
    start = 0.1 * np.random.default_rng(0).normal(size=16)
    start[3] = 0.0
    flow = gf.GradientFlow(loss_on(x, y), penalty=gf.L1())
    ts = np.concatenate([[0.0], np.geomspace(1e-2, 3e3, 40)])
    exact = l1_flow(x, y, start, 1e-3, ts[-1], ts=ts)
    return flow, Linear(jnp.asarray(start)), ts, exact


@pytest.mark.slow
def test_flow_equals_the_exact_one(flow_and_exact):
    flow, start, ts, exact = flow_and_exact
    ts = jnp.asarray(ts)
    run = lambda rtol: gf.simulate(
        flow, start, weight_decay=1e-3, ts=ts, rtol=rtol, solver=gf.KKT5()
    )
    size = np.linalg.norm(exact[-1])
    for rtol in (1e-6, 1e-9):
        path = run(rtol)
        found = np.asarray(path.params.a)
        error = np.linalg.norm(found - exact, axis=1).max() / size
        assert error < 2 * rtol
        np.testing.assert_array_equal(found[-1] == 0, np.abs(exact[-1]) < 1e-10)
        # F through the multiplier, tiny as it is.
        r = np.asarray(flow.loss.x) @ exact[-1] - np.asarray(flow.loss.y)
        np.testing.assert_allclose(path.train_loss[-1], 0.5 * r @ r, rtol=1e-4)
    assert (exact[-1] == 0).sum() >= 8
    # Held at zero, let go, and held again: not just settled once.
    zeros = np.abs(exact) < 1e-12
    assert ((zeros[:-1] & ~zeros[1:]).any(axis=0) & zeros[-1]).any() or zeros[0, 3]


@pytest.mark.slow
def test_from_zero(flow_and_exact):
    """What is held from the start is at zero inside the solver too."""
    flow, start, ts, _ = flow_and_exact
    x, y = np.asarray(flow.loss.x), np.asarray(flow.loss.y)
    exact = l1_flow(x, y, np.zeros(16), 0.1, ts[-1], ts=ts)
    model = eqx.tree_at(lambda m: m.a, start, jnp.zeros(16))
    path = gf.simulate(
        flow, model, weight_decay=0.1, ts=jnp.asarray(ts), rtol=1e-9, solver=gf.KKT5()
    )
    found = np.asarray(path.params.a)
    np.testing.assert_allclose(found, exact, atol=1e-8)
    r = found @ x.T - y
    np.testing.assert_allclose(path.train_loss, 0.5 * (r**2).sum(axis=1), rtol=1e-6)


def test_velocity_is_zero_where_a_coordinate_is_held():
    flow = gf.GradientFlow(loss_on(np.eye(3), [0.05, -0.4, 0.3]), penalty=gf.L1())
    velocity = flow.velocity(Linear(jnp.array([0.0, 0.0, 0.2])), 0.1)
    np.testing.assert_allclose(velocity.a, [0.0, -0.3, 0.0], atol=1e-15)


@pytest.mark.slow
def test_lanes_agree_with_single_runs(flow_and_exact):
    flow, start, ts, exact = flow_and_exact
    lams = jnp.array([1e-2, 1e-3])
    sweep = gf.sweep(
        flow, start, weight_decay=lams, ts=jnp.asarray(ts), rtol=1e-6,
        solver=gf.KKT5(), batch="vmap", progress=False,
    )  # fmt: skip
    assert sweep.succeeded.all()
    size = np.linalg.norm(exact[-1])
    error = np.linalg.norm(np.asarray(sweep[1].params.a) - exact, axis=1).max()
    assert error < 2e-6 * size


@pytest.mark.slow
def test_drift_is_the_exact_one():
    """Piecewise linear, ending in finite time at the point of least ℓ1 norm."""
    x, y = data(12, 40, 3)
    start = np.linalg.pinv(x) @ y
    times, corners = l1_drift(x, start, 5.0)
    assert len(times) > 20 and times[-2] < 4.5
    flow = gf.GradientFlow(loss_on(x, y), penalty=gf.L1())
    drift = gf.manifold.riemannian_flow(flow, Linear(jnp.asarray(start)), slow_time=5.0)
    found, s = np.asarray(drift.params.a), np.asarray(drift.s)
    exact = np.stack([np.interp(s, times, c) for c in corners.T], axis=1)
    np.testing.assert_allclose(found, exact, atol=1e-9)
    assert (np.diff(np.asarray(drift.penalty)) <= 1e-12).all()
    n = x.shape[1]
    program = linprog(np.ones(2 * n), A_eq=np.hstack([x, -x]), b_eq=y)
    np.testing.assert_allclose(found[-1], program.x[:n] - program.x[n:], atol=1e-8)
    np.testing.assert_array_equal(found[-1] == 0, np.abs(corners[-1]) == 0)


@pytest.mark.slow
def test_without_weight_decay_there_are_no_kinks(flow_and_exact):
    flow, start, *_ = flow_and_exact
    ts = jnp.array([0.0, 1.0, 10.0])
    plain = gf.GradientFlow(flow.loss)
    run = lambda f: gf.simulate(f, start, weight_decay=0.0, ts=ts, rtol=1e-8)
    np.testing.assert_allclose(run(flow).params.a, run(plain).params.a, rtol=1e-6)


@pytest.mark.slow
def test_only_chosen_leaves_are_penalised():
    """The one left out follows ridge-free least squares, and is not held at zero."""

    class Two(eqx.Module):
        a: Array
        b: Array

        def __call__(self, x):
            return x[0] * self.a + x[1] * self.b

    loss = loss_on(np.eye(2), np.array([0.05, 0.05]))
    flow = gf.GradientFlow(loss, penalty=gf.L1(where=lambda m: m.a))
    start = Two(jnp.array(0.5), jnp.array(0.0))
    path = gf.simulate(flow, start, weight_decay=0.1, t1=50.0, atol=1e-10)
    assert path.params.a[-1] == 0
    np.testing.assert_allclose(path.params.b[-1], 0.05, rtol=1e-6)


def test_what_cannot_follow_kinks_is_refused(flow_and_exact):
    import diffrax

    flow, start, *_ = flow_and_exact
    with pytest.raises(ValueError, match="only the KKT solvers follow"):
        gf.simulate(flow, start, weight_decay=1e-3, t1=1.0, solver=diffrax.Tsit5())
