"""The errors that a path and its times tell of themselves, against exact ones.

The sample is larger by hand, or for another seed:

    python tests/test_errors.py --seed 3 --runs 300
"""

import argparse
import collections
import dataclasses
import warnings

from conftest import drop_programs  # before JAX, which reads what it sets

# isort: split
import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import compiled, Linear
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from numpy.testing import assert_allclose, assert_array_equal
from scipy.integrate import solve_ivp
from scipy.optimize import brentq

import gradflow as gf

SOLVERS = (gf.KKT4(), gf.KKT5(), gf.RKC2(), diffrax.Tsit5())


def right(estimate, true, rounding):
    """Whether an estimate is within [1/2, 2] of an error, where that is above
    rounding."""
    estimate, true, rounding = np.broadcast_arrays(estimate, true, rounding)
    known = np.abs(true) > rounding
    ratio = estimate[known] / true[known]
    return (ratio >= 0.5) & (ratio <= 2)


# -- closed forms ---

X = jnp.array([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]])
Y = jnp.array([1.0, 2.0])
START = np.array([0.5, 1.0, 3.0])
LAM = 0.02
TS = np.array([0.0, 0.3, 1.0, 4.0, 15.0, 60.0])


def first(model):
    return model.w[0] ** 2


# It rises to 1.1 until t = 15, and then decays.
WATCH = {
    "low": gf.Metric(first, threshold=0.7),
    "high": gf.Metric(first, threshold=0.5, higher_is_better=True),
    "w": gf.Metric(lambda model: model.w),
}


def regression(t):
    """The exact θ(t), by the eigenvectors of the Hessian."""
    x, y = np.asarray(X), np.asarray(Y)
    hessian = x.T @ x / 2 + LAM * np.eye(3)
    rates, modes = np.linalg.eigh(hessian)
    rest = np.linalg.solve(hessian, x.T @ y / 2)
    return rest + modes @ (np.exp(-rates * t) * (modes.T @ (START - rest)))


def passing(level, a, b):
    return brentq(lambda t: regression(t)[0] ** 2 - level, a, b, xtol=1e-13)


def run(solver, simulate=gf.simulate, **options):
    flow = gf.GradientFlow(gf.SquaredError(X, Y))
    usual = dict(weight_decay=LAM, ts=jnp.asarray(TS), rtol=1e-4, metrics=WATCH)
    model = Linear(jnp.asarray(START))
    return simulate(flow, model, solver=solver, **usual | options)


@pytest.mark.parametrize("solver", [gf.KKT4(), gf.RKC2()])
def test_linear_regression(solver):
    path = run(solver)
    with compiled() as programs:
        estimate = path.error("w")
        others = [path.error(name) for name in ("low", "train_loss", "penalty")]
    assert not programs
    exact = np.stack([regression(t) for t in TS])
    assert right(estimate, path.params.w - exact, 1e-13).all()
    gap = np.asarray(X) @ exact.T - np.asarray(Y)[:, None]
    values = exact[:, 0] ** 2, (gap**2).mean(axis=0) / 2, (exact**2).sum(axis=1) / 2
    recorded = path.metrics["low"], path.train_loss, path.penalty
    for error, value, seen in zip(others, values, recorded, strict=True):
        assert right(error, np.asarray(seen) - value, 1e-13).all()
    with compiled() as programs:
        off = path.crossing_error("low")
    assert not programs  # but for those of `crossing_time`
    assert right(off, abs(path.crossing_time("low") - passing(0.7, 20, 50)), 0).all()
    assert off > 0


def test_until():
    """Of a run that ends at a threshold, its end is the time."""
    path = run(gf.KKT4(), until="high")
    assert bool(path.met)
    off = float(path.t[-1]) - passing(0.5, 1, 4)
    assert right(path.crossing_error("high"), abs(off), 0).all()
    exact = np.stack([regression(t) for t in np.asarray(path.t)])
    assert right(path.error("w"), path.params.w - exact, 1e-13).all()
    # Of others one is good throughout, and one has no threshold.
    assert path.crossing_error("low") == 0 and np.isnan(path.crossing_error("w"))


def test_more_steps_than_the_run_was_given():
    path = run(gf.KKT4(), max_steps=40)
    exact = np.stack([regression(t) for t in TS])
    assert right(path.error("w"), path.params.w - exact, 1e-13).all()


def test_what_has_no_error(tmp_path):
    path = run(gf.KKT4())
    gf.save(tmp_path / "path.npz", path)
    descent = gf.descent(
        gf.GradientFlow(gf.SquaredError(X, Y)), Linear(jnp.asarray(START)),
        weight_decay=LAM, learning_rate=0.1, steps=10, metrics=WATCH,
    )  # fmt: skip
    for other in (gf.load(tmp_path / "path.npz"), descent):
        for ask in (other.error, other.crossing_error):
            with pytest.raises(ValueError, match="^error: .*can't be run again"):
                ask("low")
    failed = run(gf.KKT4(), max_steps=3, throw=False)
    with pytest.raises(ValueError, match="^error: expected a path that did not fail"):
        failed.error("low")
    for ask in (path.error, path.crossing_error):
        with pytest.raises(ValueError, match="^name: expected one of .*'low'.*'lo'"):
            ask("lo")


def test_single_precision():
    single = lambda tree: jax.tree.map(
        lambda x: x.astype(jnp.float32) if eqx.is_inexact_array(x) else x, tree
    )
    flow = gf.GradientFlow(gf.SquaredError(single(X), single(Y)))
    model = single(Linear(jnp.asarray(START)))
    options = dict(weight_decay=LAM, ts=jnp.asarray(TS), solver=gf.KKT4())
    fine = gf.simulate(flow, model, rtol=2e-4, **options)
    with pytest.raises(ValueError, match="^error: .*float32 .*enable_float64"):
        fine.error("penalty")
    rough = gf.simulate(flow, model, rtol=1e-2, **options)
    exact = np.stack([(regression(t) ** 2).sum() / 2 for t in TS])
    off = np.asarray(rough.penalty, float) - exact
    assert right(rough.error("penalty"), off, 1e-4 * exact).all()
