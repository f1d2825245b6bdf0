"""Kinks crossed along a path."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import gradflow as gf
from gradflow import manifold
from gradflow.models import TwoLayer


def test_crossings_of_a_known_path():
    """A path in slow time t ↦ bias = cos, at x = 0: the preactivation is the bias."""
    task = gf.tasks.linear_regression(jr.key(0), samples=2, dim=4)
    path = gf.simulate(task.flow, task.model, weight_decay=0.1, t1=1.0, saves=101)
    t = np.linspace(0.0, 7.0, 101)
    # One crosses at π/2, 3π/2; one stays positive; one reaches its kink at t = 2, stays
    # until 3, and leaves on the other side; one stays and comes back.
    held = np.clip(t - 2, None, 0) + np.clip(t - 3, 0, None)
    back = np.clip(2 - t, 0, None) + np.clip(t - 3, 0, None)
    gates = np.stack([np.cos(t), 2 + np.cos(t), held, back], axis=1)
    path = gf.Path(
        t=jnp.asarray(t),
        weight_decay=jnp.ones(()),
        params={"gates": jnp.asarray(gates)},
        static={"gates": None},
        metrics={},
        train_loss=path.train_loss,
        penalty=path.penalty,
        result=path.result,
        stats=path.stats,
        watched={},
    )
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


def test_relu_drift():
    """A drift of a ReLU network crosses kinks, each seen as a flip of a gate between
    the two saved times."""
    task = gf.tasks.relu_1d(jr.key(1), width=12, samples=4)
    path = gf.simulate(
        task.flow, task.model, weight_decay=1e-2, slow_time=1.0, rtol=1e-5, throw=False
    )
    assert path.succeeded
    x = task.loss.x
    preactivations = lambda model: jax.vmap(model.preactivations)(x)
    found = manifold.kink_crossings(path, preactivations)
    assert found.sliding.shape == (4, 12)
    gates = np.asarray(jax.vmap(preactivations)(path.models))
    flips = np.diff(np.sign(gates), axis=0) != 0
    assert found.count > 0
    # Every crossing is a flip seen between its two saved times.
    for before, after, gate in zip(found.before, found.after, found.gate, strict=True):
        i, j = np.searchsorted(np.asarray(path.t), [before, after])
        assert flips[i:j, gate[0], gate[1]].any()


def test_preactivations_are_those_of_the_network():
    model = TwoLayer(jnp.ones((2, 1)), jnp.array([0.5, -2.0]), jnp.ones(2), "relu")
    z = model.preactivations(jnp.array(1.0))
    np.testing.assert_allclose(z, [1.5, -1.0])
    np.testing.assert_allclose(model(jnp.array(1.0)), 1.5)


def test_a_path_that_ended_early_is_refused():
    task = gf.tasks.relu_1d(jr.key(1), width=12, samples=4)
    path = gf.simulate(
        task.flow,
        task.model,
        weight_decay=1e-2,
        slow_time=1.0,
        max_steps=3,
        throw=False,
    )
    with pytest.raises(ValueError, match="path: ended early"):
        manifold.kink_crossings(path, lambda model: model.bias)
