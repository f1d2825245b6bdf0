"""Kinks crossed along a path."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

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
        stats={},
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


def test_kink_along_a_riemannian_drift():
    """A drift on M crosses a kink, once, and its balance decays through it as e^{−2s};
    where it crosses is seen again on a grid ten times as fine. (Of eight random tasks
    this one has a crossing before s = 0.3.)"""
    task = gf.tasks.relu_1d(jr.key(5), width=12, samples=4)
    start = manifold.limit_map(task.loss, task.model).model
    assert isinstance(task.loss, gf.SquaredError)
    x = task.loss.x
    preactivations = lambda model: jax.vmap(model.preactivations)(x)
    found = []
    for points in (31, 301):
        drift = manifold.riemannian_flow(
            task.flow,
            start,
            slow_time=0.3,
            ts=jnp.linspace(0.0, 0.3, points),
            rtol=1e-6,
            throw=False,
        )
        found.append(manifold.kink_crossings(drift, preactivations))
        balance = np.asarray(jax.vmap(task.truth.invariant)(drift.models))
        decay = np.exp(-2 * np.asarray(drift.slow_time))[:, None]
        away = np.abs(balance - balance[0] * decay).max()
        assert away < 1e-6 * np.abs(balance[0]).max()
        assert drift.train_loss.max() < 1e-18 and (np.diff(drift.penalty) < 0).all()
        z = np.asarray(jax.vmap(preactivations)(drift.models)).reshape(points, -1)
        assert np.sum(z[1:] * z[:-1] < 0) == found[-1].count == 1
    coarse, fine = found
    np.testing.assert_array_equal(coarse.gate, fine.gate)
    assert coarse.before <= fine.before and fine.after <= coarse.after


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
