"""Lanes of one program: what is made only where one of them asks for it."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from numpy.testing import assert_allclose

import gradflow as gf
from gradflow.flow.flat import FlatLoss
from gradflow.solvers import kernel


@pytest.fixture
def made(monkeypatch):
    """How many kernels and factors a program makes as it runs."""
    count = dict(kernels=0, factors=0)

    def counted(name, fn):
        def count_one():
            count[name] += 1

        def told(*args, **options):
            jax.debug.callback(count_one)
            return fn(*args, **options)

        return told

    one = counted("kernels", FlatLoss.tangent_kernel)
    monkeypatch.setattr(FlatLoss, "tangent_kernel", one)
    monkeypatch.setattr(kernel, "_factorise", counted("factors", kernel._factorise))
    jax.clear_caches()
    yield count
    jax.clear_caches()


@pytest.mark.parametrize("solver", [gf.KKT4(), gf.KKT5()])
def test_kernels_and_factors_of_lanes_in_lockstep(made, solver):
    """A `cond` that differs between lanes runs both of its branches: two factors in
    every attempt. Now only what some lane needs is made, and only that lane takes it:
    no lane depends on the others."""
    task = gf.tasks.diagonal_network(jr.key(0), samples=10, dim=20)
    lams = jnp.geomspace(1e-2, 1e-5, 16)

    def run(batch):
        made.update(kernels=0, factors=0)
        out = gf.sweep(
            task.flow, task.model, weight_decay=lams, slow_time=2.0, saves=9,
            solver=solver, rtol=1e-6, batch=batch, progress=False,
        )  # fmt: skip
        jax.effects_barrier()
        return out, dict(made)

    alone, _ = run("loop")
    together, joint = run("vmap")
    most = max(np.asarray(together.stats.steps).tolist())
    assert joint["kernels"] <= 1.5 * most
    assert joint["factors"] <= 2 * most
    for one, other in zip(
        jax.tree.leaves(alone.paths.params),
        jax.tree.leaves(together.paths.params),
        strict=True,
    ):
        assert_allclose(one, other, rtol=1e-9, atol=1e-10)
