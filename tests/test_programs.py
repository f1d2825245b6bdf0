"""How many programs are compiled: each operation of `jax.numpy` on the host is one, for
which a new process takes 20 to 100 ms."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import compiled

import gradflow as gf


@pytest.mark.slow
def test_printing_compiles_nothing():
    x = jr.normal(jr.key(0), (3, 7))
    flow = gf.GradientFlow(gf.SquaredError(x, x[:, 0]))
    model = gf.models.DiagonalNetwork(jnp.full(7, 0.3), jnp.full(7, 0.2))
    path = gf.simulate(flow, model, weight_decay=0.1, t1=1.0, saves=11)
    eqx.clear_caches()
    jax.clear_caches()  # of what other tests have compiled
    with compiled() as names:
        text, short = str(path), repr(path)
        values = path.slow_time, path.slow_speed, path.succeeded, path[3].u
    assert not names
    assert "still drifting" in text and "successful" in short
    assert all(isinstance(value, jax.Array) for value in values)
    step = np.concatenate([p[-1] - p[-2] for p in jax.tree.leaves(path.params)])
    last = np.concatenate([p[-1] for p in jax.tree.leaves(path.params)])
    speed = np.linalg.norm(step) / np.linalg.norm(last) / (0.1 * np.diff(path.t)[-1])
    np.testing.assert_allclose(path.slow_speed, speed, rtol=1e-12)


@pytest.mark.slow
def test_a_sweep_runs_what_simulate_has_compiled():
    x = jr.normal(jr.key(1), (3, 8))
    flow = gf.GradientFlow(gf.SquaredError(x, x[:, 0]))
    model = gf.models.DiagonalNetwork(jnp.full(8, 0.3), jnp.full(8, 0.2))
    size = lambda model: jnp.sum(model.beta**2)
    options = dict(slow_time=1.0, saves=17, solver=gf.KKT4())
    names = {}
    for threshold in (None, 0.5):
        watch = {"test": gf.Metric(size, threshold=threshold)}
        with compiled() as names[threshold]:
            path = gf.simulate(flow, model, weight_decay=0.1, metrics=watch, **options)
        assert path.watched["test"].threshold == threshold
    assert any("solve" in name for name in names[None]) and not names[0.5]
    with compiled() as swept:
        gf.sweep(
            flow, model, weight_decay=[0.1, 0.3], metrics=watch, progress=False,
            **options,
        )  # fmt: skip
    assert not any("solve" in name for name in swept)
