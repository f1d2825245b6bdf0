"""How many programs are compiled: each operation of `jax.numpy` on the host is one, for
which a new process takes 20 to 100 ms."""

import functools
import re

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import compiled

import gradflow as gf
from gradflow.runs.solve import Solve, solve, solve_part


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


@pytest.mark.parametrize("solver", [gf.KKT4(), gf.RKC2(), gf.KKT4])
def test_steps_multiply_matrices_at_full_precision(solver):
    """Which on a CPU is the only one there is: JAX's default on a GPU is not."""
    x = jr.normal(jr.key(1), (3, 8), jnp.float32)
    flow = gf.GradientFlow(gf.SquaredError(x, x[:, 0]))
    model = gf.models.DiagonalNetwork(*jnp.full((2, 8), 0.3, jnp.float32))
    term, params = flow.term(model)
    run = functools.partial(
        Solve.of, term, params, jnp.float32(0.1), jnp.arange(3, dtype=jnp.float32), {},
        rtol=1e-4, max_steps=100,
    )  # fmt: skip
    if isinstance(solver, type):  # in parts
        one = run(solver())
        whole = lambda: solve_part(one, None, jnp.asarray(10))
    else:
        one = run(solver)
        whole = lambda: solve(one)
    text = str(jax.make_jaxpr(lambda: eqx.filter(whole(), eqx.is_array))())
    products = re.findall(r"dot_general\[.*?\]\s", text, re.DOTALL)
    assert len(products) > 5
    assert all("HIGHEST" in product for product in products)


@pytest.mark.slow
def test_what_is_traced_inside_a_function_is_one_program():
    """Under `vmap` and `grad`, of a loss and of a metric, by any solver."""
    x = jr.normal(jr.key(2), (3, 8))
    model = gf.models.DiagonalNetwork(*jnp.full((2, 8), 0.3))
    options = dict(weight_decay=0.1, ts=jnp.linspace(0, 1, 4))

    def end(c, solver):
        loss = gf.SquaredError(x, x[:, 0], predict=lambda m, x: c * (x @ m.beta))
        path = gf.simulate(gf.GradientFlow(loss), model, solver=solver, **options)
        return jnp.sum(path.params.u[-1])

    def seen(c):
        flow = gf.GradientFlow(gf.SquaredError(x, x[:, 0]))
        watch = {"m": lambda m: c * jnp.sum(m.beta)}
        path = gf.simulate(flow, model, solver=gf.KKT4(), metrics=watch, **options)
        return path.metrics["m"][-1]

    ones = jnp.array([1.0, 1.2])
    many = jax.vmap(lambda c: end(c, gf.KKT4()))(ones)
    np.testing.assert_allclose(many, [end(c, gf.KKT4()) for c in ones], rtol=1e-9)
    slope = jax.grad(end)(1.0, diffrax.Tsit5())
    rise = end(1.0 + 1e-4, diffrax.Tsit5()) - end(1.0 - 1e-4, diffrax.Tsit5())
    np.testing.assert_allclose(slope, rise / 2e-4, rtol=1e-3)
    np.testing.assert_allclose(jax.vmap(seen)(ones), seen(1.0) * ones, rtol=1e-9)
    np.testing.assert_allclose(jax.grad(seen)(1.0), seen(1.0), rtol=1e-9)
