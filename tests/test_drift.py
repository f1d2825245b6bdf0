"""The drift w' = −P∇R along the critical manifold, against closed forms."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import (
    diagonal_problem,
    flat,
    Linear,
    linear_problem,
    overdetermined,
    Product,
)

import gradflow as gf
from gradflow import manifold


@pytest.mark.slow
def test_drift_of_linear_regression(getkey):
    loss, model = linear_problem(getkey(), samples=4, features=9)
    start = manifold.limit_map(loss, model).model
    drift = manifold.riemannian_flow(gf.GradientFlow(loss), start, slow_time=5.0)
    assert len(drift) == 257 and drift.slow_time[-1] == 5.0
    least = jnp.linalg.pinv(loss.x) @ loss.y
    exact = least[None] + jnp.outer(jnp.exp(-drift.slow_time), start.w - least)
    np.testing.assert_allclose(drift.params.w, exact, atol=1e-9)


@pytest.mark.slow
def test_drift_of_least_squares_without_interpolation(getkey):
    loss, model, pinv = overdetermined(getkey())
    start = manifold.limit_map(loss, model).model
    drift = manifold.riemannian_flow(
        gf.GradientFlow(loss), start, slow_time=2.0, ts=jnp.array([0.0, 1.0, 2.0])
    )
    least = pinv @ loss.y
    exact = least[None] + jnp.outer(jnp.exp(-drift.slow_time), start.w - least)
    np.testing.assert_allclose(drift.params.w, exact, atol=1e-9)


@pytest.mark.slow
def test_drift_of_the_diagonal_network(diagonal):
    """u⊙v decays as e^(−2s), the norm falls, and the path stays on M."""
    loss, _, start = diagonal
    drift = manifold.riemannian_flow(
        gf.GradientFlow(loss),
        start,
        slow_time=5.0,
        metrics={"norm": lambda m: m.u @ m.u + m.v @ m.v},
    )
    u, v = drift.params.u, drift.params.v
    product = jnp.outer(jnp.exp(-2 * drift.slow_time), start.u * start.v)
    np.testing.assert_allclose(u * v, product, atol=1e-8)
    assert jnp.all(jnp.diff(drift.penalty) < 0)
    np.testing.assert_allclose(drift.metrics["norm"], 2 * drift.penalty, rtol=1e-13)
    assert jnp.max(drift.train_loss) < 1e-16
    found = manifold.spectrum(loss, drift[-1], form="jacobian")
    np.testing.assert_allclose(
        drift.smallest_curvature[-1], found.smallest_curvature, rtol=1e-8
    )


@pytest.mark.slow
def test_forms_of_the_drift_agree(tanh_net):
    loss, _, start = tanh_net
    ts = jnp.array([0.0, 0.3, 1.0])
    one, two = (
        manifold.riemannian_flow(
            gf.GradientFlow(loss), start, slow_time=1.0, ts=ts, form=form
        )
        for form in ("jacobian", "hessian")
    )
    np.testing.assert_allclose(flat(one[-1]), flat(two[-1]), atol=1e-7)
    np.testing.assert_allclose(
        one.smallest_curvature, two.smallest_curvature, rtol=1e-6
    )


@pytest.mark.slow
def test_drift_passes_through_a_loss_of_rank():
    """With one nonzero coefficient wanted and 6 samples, all coordinates but one die:
    σ_min falls to 1e-5 of its start by s = 12, and the end has the least ℓ1 norm."""
    loss, model = diagonal_problem(jr.key(2), samples=6, features=10, nonzero=1)
    start = manifold.limit_map(loss, model).model
    ts = jnp.array([0.0, 3.0, 6.0, 12.0])
    flow = gf.GradientFlow(loss)
    drift = manifold.riemannian_flow(flow, start, slow_time=12.0, ts=ts, throw=False)
    assert drift.smallest_curvature[-1] < 1e-9 * drift.smallest_curvature[0]
    product = jnp.outer(jnp.exp(-2 * ts), start.u * start.v)
    u, v = drift.params.u, drift.params.v
    np.testing.assert_allclose(u * v, product, atol=1e-8)
    beta = u[-1] ** 2 - v[-1] ** 2
    np.testing.assert_allclose(beta, jnp.zeros(10).at[0].set(1.0), atol=1e-6)


@pytest.mark.slow
def test_lost_rank_is_named():
    """uv = 0 crosses itself at the origin, where the drift from (1, 0) is heading."""
    loss = gf.SquaredError(jnp.ones(1), jnp.zeros(1))
    flow = gf.GradientFlow(loss)
    start = Product(jnp.ones(()), jnp.full((), 1e-3))
    kept = manifold.riemannian_flow(flow, start, slow_time=2.0)
    np.testing.assert_allclose(kept[-1].u, jnp.exp(-2.0), rtol=1e-5)
    hidden = gf.SquaredError(
        jnp.array([1.0, 1.0]),
        jnp.array([1.0, 0.0]),
        # One output with a fixed scale, one that dies: rank 2 falls to 1.
        predict=lambda m, x: jnp.stack([m.w[0], m.w[1] * m.w[2]]),
    )
    out = manifold.riemannian_flow(
        gf.GradientFlow(hidden),
        Linear(jnp.array([1.0, 1.0, 0.0])),
        slow_time=25.0,
        throw=False,
    )
    assert out.result == gf.RESULTS.rank_lost


def test_drift_checks_its_times_and_its_start(diagonal):
    loss, _, start = diagonal
    flow = gf.GradientFlow(loss)
    with pytest.raises(ValueError, match="slow_time: "):
        manifold.riemannian_flow(flow, start, slow_time=-1.0)
    with pytest.raises(ValueError, match="ts: "):
        manifold.riemannian_flow(
            flow, start, slow_time=1.0, ts=jnp.array([0.0, 0.5, 0.2])
        )
