"""What is recorded along a path: one by one, or of many saved times at once."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import gradflow as gf
from gradflow.runs import each as rows, solve


def kinds(fn, *args):
    return {e.primitive.name for e in rows.operations(jax.make_jaxpr(fn)(*args))}


def test_many_at_once():
    """But not on a CPU, nor what `jax.vmap` would make more of, or can't."""
    states = jr.normal(jr.key(0), (65, 4))
    simple = lambda y: (y, jnp.sum(y**2))
    norm = lambda y: jnp.linalg.norm(jnp.linalg.cholesky(jnp.outer(y, y) + jnp.eye(4)))
    host = lambda y: jax.pure_callback(np.sum, jax.ShapeDtypeStruct((), y.dtype), y)
    loop = lambda y: jax.lax.while_loop(lambda z: jnp.sum(z) > 1, lambda z: z / 2, y)
    branch = lambda y: jax.lax.cond(y[0] > 0, lambda: y, lambda: -y)
    for fn in (simple, norm, host, loop, branch):
        for platform in ("cpu", "gpu"):
            each = functools.partial(rows.of_each, fn, platform=platform)
            together = fn is simple and platform == "gpu"
            assert ("scan" in kinds(each, states)) != together
            found, one = each(states), jax.lax.map(fn, states)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b), found, one)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [gf.KKT4(), gf.RKC2()])
def test_a_path_is_the_same(monkeypatch, solver):
    """To rounding, whichever way it is recorded; in blocks, too."""
    task = gf.tasks.diagonal_network(jr.key(0), samples=7, dim=19)
    run = functools.partial(
        gf.simulate, task.flow, task.model, slow_time=1.0, saves=21, solver=solver
    )
    flat = lambda path: jax.tree.leaves((path.params, path.train_loss, path.metrics))
    one = flat(run(weight_decay=0.1, metrics=task.metrics))
    tried = []

    def in_blocks(fn, states, size):
        tried.append(size)
        return blocks(fn, states, 2**20 // 9)

    blocks = rows.in_blocks
    gpu = functools.partial(rows.of_each, platform="gpu")
    with monkeypatch.context() as patch:
        patch.setattr(solve, "of_each", gpu)
        patch.setattr(rows, "in_blocks", in_blocks)
        jax.clear_caches()
        many = flat(run(weight_decay=0.1, metrics=task.metrics))
    jax.clear_caches()
    assert tried and max(tried) < 2**20
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-15)
