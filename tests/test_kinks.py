"""Kinks crossed along a path."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.optimize import brentq

import gradflow as gf
from gradflow import manifold
from gradflow.models import TwoLayer


def handmade(t, params):
    """A path of what is given."""
    nothing = jnp.zeros(t.shape)
    return gf.Path(
        t=jnp.asarray(t),
        weight_decay=jnp.ones(()),
        params=params,
        static=jax.tree.map(lambda p: None, params),
        metrics={},
        train_loss=nothing,
        penalty=nothing,
        result=gf.RESULTS.successful,
        stats=gf.Stats("by hand", 0),
        watched={},
    )


def test_crossings_of_a_known_path():
    """A path in slow time t ↦ bias = cos, at x = 0: the preactivation is the bias."""
    t = np.linspace(0.0, 7.0, 101)
    # One crosses at π/2, 3π/2; one stays positive; one reaches its kink at t = 2, stays
    # until 3, and leaves on the other side; one stays and comes back.
    held = np.clip(t - 2, None, 0) + np.clip(t - 3, 0, None)
    back = np.clip(2 - t, 0, None) + np.clip(t - 3, 0, None)
    gates = np.stack([np.cos(t), 2 + np.cos(t), held, back], axis=1)
    path = handmade(t, {"gates": jnp.asarray(gates)})
    found = manifold.kink_crossings(path, lambda model: model["gates"])
    assert found.count == 3
    np.testing.assert_allclose(
        found.t, [np.pi / 2, 2.03, 3 * np.pi / 2], atol=1e-5 + 0.01
    )
    np.testing.assert_allclose(found.t[[0, 2]], [np.pi / 2, 1.5 * np.pi], atol=2e-4)
    assert (found.before <= found.t).all() and (found.t <= found.after).all()
    np.testing.assert_array_equal(found.gate[:, 0], [0, 2, 0])
    np.testing.assert_array_equal(found.sliding, [False, False, True, True])
    assert "3 crossings" in str(found) and "slid along 2" in str(found)


def resampled_crossings(path, x, tolerance=1e-6, fine=16):
    """For each sample and neuron, how often wx + b changes its sign along the path,
    interpolated between its saved times, and seen at 16 times as many."""
    t = np.asarray(path.t)
    places = np.interp(
        np.arange(fine * (t.size - 1) + 1) / fine, np.arange(t.size), np.arange(t.size)
    )
    at = lambda p: np.stack(
        [np.interp(places, np.arange(t.size), column) for column in np.asarray(p).T]
    )
    w, b = at(path.params.inner[:, :, 0]), at(path.params.bias)
    counts = np.zeros((x.size, len(w)), int)
    for i, value in enumerate(np.asarray(x).reshape(-1)):
        for j, z in enumerate(w * value + b):
            saved = np.abs(z[::fine])
            signs = np.sign(z[np.abs(z) > tolerance * saved.max()])
            counts[i, j] = np.sum(signs[1:] != signs[:-1])
    return counts


@pytest.mark.slow
def test_relu_drift():
    """A drift of a ReLU network crosses kinks: as many, of each gate, as are counted
    along the interpolated path."""
    task = gf.tasks.relu_1d(jr.key(1), width=12, samples=4)
    path = gf.simulate(
        task.flow, task.model, weight_decay=1e-2, slow_time=1.0, rtol=1e-5, throw=False
    )
    assert path.succeeded and isinstance(task.loss, gf.SquaredError)
    x = task.loss.x
    preactivations = lambda model: jax.vmap(model.preactivations)(x)
    found = manifold.kink_crossings(path, preactivations)
    assert found.sliding.shape == (4, 12)
    assert found.count > 0
    counts = np.zeros((4, 12), int)
    np.add.at(counts, tuple(found.gate.T), 1)
    np.testing.assert_array_equal(counts, resampled_crossings(path, x))
    # Every crossing is a flip seen between its two saved times.
    gates = np.asarray(jax.vmap(preactivations)(path.models))
    for before, after, gate in zip(found.before, found.after, found.gate, strict=True):
        i, j = np.searchsorted(np.asarray(path.t), [before, after])
        z = gates[[i, j], gate[0], gate[1]]
        assert z[0] * z[1] < 0


@pytest.mark.slow
def test_kink_along_a_riemannian_drift():
    """One neuron a·relu(wx + b), fitted at x = 1: along M w − b decays as e^{−s}, a² −
    (w + b)²/2 as e^{−2s}, and wx + b at x = −½, where there is no sample, changes its
    sign once. (At a sample's own kink a drift may slide, or cross, by the last bit.)"""
    y, total, apart = 1.3, 1.2, 1.0
    start = TwoLayer(
        jnp.array([[(total + apart) / 2]]),
        jnp.array([(total - apart) / 2]),
        jnp.array([y / total]),
        "relu",
    )
    flow = gf.GradientFlow(gf.SquaredError(jnp.ones(1), jnp.full(1, y)))

    def exact(s):
        """w + b from a(w + b) = y, and wx + b at x = −½."""
        e = ((y / total) ** 2 - total**2 / 2) * np.exp(-2 * s)
        c = np.sqrt(np.sqrt(e**2 + 2 * y**2) - e)
        return c, 0.25 * c - 0.75 * apart * np.exp(-s)

    crossing = brentq(lambda s: exact(s)[1], 0.0, 2.0)
    assert 0.3 < crossing < 1.7
    at = lambda model: model.preactivations(jnp.array(-0.5))
    for points in (21, 201):
        ts = jnp.linspace(0.0, 2.0, points)
        drift = manifold.riemannian_flow(flow, start, slow_time=2.0, ts=ts)
        assert drift.result == gf.RESULTS.successful
        z = np.asarray(jax.vmap(at)(drift.models))[:, 0]
        np.testing.assert_allclose(z, exact(np.asarray(ts))[1], atol=1e-8)
        found = manifold.kink_crossings(drift, at)
        assert found.count == 1 and not found.sliding.any()
        np.testing.assert_allclose(found.t, crossing, atol=0.2 / points)
        assert found.before <= crossing <= found.after


def test_preactivations_are_those_of_the_network():
    model = TwoLayer(jnp.ones((2, 1)), jnp.array([0.5, -2.0]), jnp.ones(2), "relu")
    z = model.preactivations(jnp.array(1.0))
    np.testing.assert_allclose(z, [1.5, -1.0])
    np.testing.assert_allclose(model(jnp.array(1.0)), 1.5)


def test_a_path_that_ended_early_is_refused():
    gates = jnp.array([1.0, -1.0, jnp.nan])[:, None]
    path = handmade(np.arange(3.0), {"gates": gates})
    with pytest.raises(ValueError, match="path: ended early"):
        manifold.kink_crossings(path, lambda model: model["gates"])
