"""Speed of what is used most, watched by pytest-benchmark: `pytest benchmarks`.

No assertion on time, only that what was timed is right: compare runs with
`--benchmark-autosave` and `--benchmark-compare`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import PROBLEMS
from work_precision import times

import gradflow as gf
from gradflow.solvers import KKT4

gf.enable_float64()

pytest.importorskip("pytest_benchmark")

LAM = 1e-5


@pytest.mark.parametrize("name", ["P1", "P2", "P3"])
def test_one_path(benchmark, name):
    problem = PROBLEMS[name]()
    run = lambda solver, rtol: jax.block_until_ready(
        gf.simulate(
            problem.task.flow,
            problem.task.model,
            weight_decay=LAM,
            ts=jnp.asarray(times(LAM)),
            solver=solver,
            rtol=rtol,
        )
    )
    path = benchmark.pedantic(run, (None, 1e-4), rounds=7, warmup_rounds=1)
    theta, exact = (problem.flat(p.params) for p in (path, run(KKT4(), 1e-6)))
    error = np.linalg.norm(theta - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert error.max() < 5e-4


def test_sweep(benchmark):
    task = PROBLEMS["P1"]().task
    run = lambda: gf.sweep(
        task.flow,
        task.model,
        weight_decay=jnp.geomspace(1e-2, 1e-6, 9),
        slow_time=5.0,
        rtol=1e-4,
        progress=False,
    )
    sweep = benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    assert bool(sweep.succeeded.all())
    # In slow time all lanes end at the same weights, to first order in λ.
    np.testing.assert_allclose(sweep.penalty[1:, -1], sweep.penalty[-1, -1], rtol=2e-2)


def test_tangent_kernel(benchmark):
    problem = PROBLEMS["P3"]()
    kernel = jax.jit(lambda theta: problem.loss.tangent_kernel(theta))
    run = lambda: kernel(problem.theta).block_until_ready()
    found = benchmark.pedantic(run, rounds=50, warmup_rounds=2)
    u = jnp.cos(jnp.arange(problem.m, dtype=float))
    _, pullback = jax.vjp(problem.loss.outputs, problem.theta)
    _, pushed = jax.jvp(problem.loss.outputs, (problem.theta,), pullback(u))
    np.testing.assert_allclose(found @ u, pushed, rtol=1e-10)
