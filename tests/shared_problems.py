"""A problem of fixed shapes, and all that gradflow says of it: made once in a process,
for all tests that need results and do not mind which."""

import functools

import jax
import jax.numpy as jnp

import gradflow as gf

LAMS = jnp.array([1e-2, 1e-3, 1e-4])


@functools.cache
def task():
    return gf.tasks.linear_regression(jax.random.key(0), samples=4, dim=8)


@functools.cache
def study():
    """A sweep over `LAMS`, the theory to second order, and their comparison."""
    here, options = task(), dict(slow_time=3.0, metrics=task().metrics)
    theory = gf.two_phase(here.flow, here.model, order=2, **options)
    sweep = gf.sweep(
        here.flow,
        here.model,
        weight_decay=LAMS,
        saves=65,
        solver=gf.KKT5(),
        rtol=1e-8,
        progress=False,
        **options,
    )
    return sweep, theory, gf.compare(sweep, theory)
