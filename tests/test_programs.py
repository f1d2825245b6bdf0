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


@pytest.mark.slow
def test_other_numbers_of_times_compile_nothing():
    """And give the same path: of three windows, of one, and of part of one."""
    x = jr.normal(jr.key(1), (3, 9))
    flow = gf.GradientFlow(gf.SquaredError(x, x[:, 0]))
    model = gf.models.DiagonalNetwork(jnp.full(9, 0.3), jnp.full(9, 0.2))
    size = lambda model: jnp.sum(model.beta**2)

    def run(times):
        return gf.simulate(
            flow, model, weight_decay=0.1, ts=jnp.linspace(0, 20, times), rtol=1e-7,
            solver=gf.KKT4(), metrics={"size": size},
        )  # fmt: skip

    one = run(49)
    with compiled() as names:
        many, few = run(193), run(37)
    assert not any("solve" in name or "begin" in name for name in names), names
    assert len(many) == 193 and len(few) == 37 and len(many.metrics["size"]) == 193
    assert many.result == gf.RESULTS.successful
    assert one.stats.steps < many.stats.steps < 2 * 193
    for path, others in ((many, slice(None, None, 4)), (few, slice(0, 1))):
        theta, at = (jax.tree.leaves(p.params)[0] for p in (one, path))
        scale = jnp.linalg.norm(theta[0])
        assert jnp.linalg.norm(at[-1] - theta[-1]) < 1e-6 * scale
        if path is many:
            off = jnp.linalg.norm(at[others] - theta, axis=1)
            assert off.max() < 1e-6 * scale
    # One that ends in the first of its windows is told so.
    short = dict(weight_decay=0.1, ts=jnp.linspace(0, 20, 193), max_steps=30)
    path = gf.simulate(flow, model, solver=gf.KKT4(), throw=False, **short)
    assert path.result == gf.RESULTS.out_of_steps and int(path.stats.steps) == 30
    finite = np.isfinite(path.train_loss)
    assert 5 < finite.sum() < 60 and not finite[60:].any()
