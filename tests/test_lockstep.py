"""Lanes of one program: what is dear is made for those that need it."""

import operator

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from numpy.testing import assert_allclose

import gradflow as gf
from gradflow.flow.flat import FlatLoss
from gradflow.solvers import kernel
from gradflow.solvers.lockstep import where_needed


@pytest.fixture
def made(monkeypatch):
    """How many kernels and factors a program makes as it runs, of all lanes."""
    count = dict(kernels=0, factors=0)

    def counted(name, fn):
        def count_one(_):
            count[name] += 1

        def told(one, given, *args, **options):
            # (Of what differs between lanes: then it is called for each of them.)
            jax.debug.callback(count_one, jnp.sum(given))
            return fn(one, given, *args, **options)

        return told

    one = counted("kernels", FlatLoss.tangent_kernel)
    monkeypatch.setattr(FlatLoss, "tangent_kernel", one)
    monkeypatch.setattr(kernel, "_factorise", counted("factors", kernel._factorise))
    jax.clear_caches()
    yield count
    jax.clear_caches()


@pytest.fixture(scope="module")
def task():
    return gf.tasks.diagonal_network(jr.key(0), samples=10, dim=20)


def excess(made, loop, lockstep):
    """How many times as much lanes in lockstep make as they make one by one, which
    comes to the same."""
    found = []
    for run in (loop, lockstep):
        made.update(kernels=0, factors=0)
        out = jax.block_until_ready(run())
        jax.effects_barrier()
        found.append((out, dict(made)))
    (alone, own), (together, joint) = found
    for one, other in zip(
        jax.tree.leaves(alone), jax.tree.leaves(together), strict=True
    ):
        assert_allclose(one, other, rtol=1e-9, atol=1e-10)
    return max(joint[what] / own[what] for what in own)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [gf.KKT4(), gf.KKT5()])
def test_kernels_and_factors_of_lanes_in_lockstep(made, task, solver):
    """A `cond` that differs between lanes runs both of its branches: two factors in
    every attempt of each lane. Those of 32 lanes made up to 1.08 times as many as in a
    loop (4.4 times where all of them got what one of them asked for)."""

    def run(batch):
        return gf.sweep(
            task.flow, task.model, weight_decay=jnp.geomspace(1e-2, 1e-5, 16),
            slow_time=2.0, saves=9, solver=solver, rtol=1e-6, batch=batch,
            progress=False,
        ).paths.params  # fmt: skip

    assert excess(made, lambda: run("loop"), lambda: run("vmap")) <= 1.25


@pytest.mark.slow
def test_limits_in_lockstep(made, task):
    """Lanes that are there ask for nothing while others go on."""

    def moved(key):
        moved = lambda p: p + 0.2 * jr.normal(key, p.shape)
        return jax.tree.map(moved, task.model)

    models = jax.vmap(moved)(jr.split(jr.key(3), 6))
    limit = eqx.filter_jit(lambda m: gf.manifold.limit_map(task.loss, m).model)

    def one_by_one():
        return jax.tree.map(
            lambda *p: jnp.stack(p),
            *(limit(jax.tree.map(operator.itemgetter(i), models)) for i in range(6)),
        )

    assert excess(made, one_by_one, lambda: jax.vmap(limit)(models)) <= 1.25


@pytest.mark.slow
def test_lanes_that_slide_in_lockstep(made):
    """Under ℓ1, with steps that end at its kinks."""
    task = gf.tasks.linear_regression(jr.key(0), samples=6, dim=10)
    flow = gf.GradientFlow(task.loss, penalty=gf.L1())

    def run(batch):
        return gf.sweep(
            flow, task.model, weight_decay=jnp.geomspace(1e-1, 1e-3, 8), slow_time=2.0,
            saves=5, solver=gf.KKT4(), batch=batch, progress=False,
        ).paths.params  # fmt: skip

    assert excess(made, lambda: run("loop"), lambda: run("vmap")) <= 1.25


@pytest.mark.parametrize("lanes", [3, 40])
def test_where_needed(lanes):
    """For each lane its own, whatever of it differs between them; nested, too."""
    x = jnp.arange(1.0, lanes + 1)
    shared = jnp.array([2.0, 3.0])

    def one(x, need):
        old = (x, jnp.zeros((2,)))
        return where_needed(need, lambda: (2 * x, x * shared), old)

    @jax.jit
    @jax.vmap
    def many(x, need):
        inner = lambda: where_needed(x > 3, lambda: -x, x)
        return *one(x, need), where_needed(need, inner, 0 * x)

    for need in (x % 2 == 0, x > 2, x > lanes, x > 0):
        double, both, nested = many(x, need)
        assert_allclose(double, np.where(need, 2 * x, x))
        assert_allclose(both, np.where(need[:, None], x[:, None] * shared[None], 0))
        assert_allclose(nested, np.where(need, np.where(x > 3, -x, x), 0))
    for need in (True, False):
        double, _ = jax.vmap(one, in_axes=(0, None))(x, jnp.array(need))
        assert_allclose(double, 2 * x if need else x)
        assert_allclose(one(x[0], jnp.array(need))[0], x[0] * (2 if need else 1))
    grid = jax.vmap(jax.vmap(one, in_axes=(None, 0)), in_axes=(0, None))
    double, _ = grid(x, x > 2)
    assert_allclose(double, np.where(x[None] > 2, 2 * x[:, None], x[:, None]))
