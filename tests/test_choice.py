"""Which solver is taken when none is named."""

import dataclasses

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import linear_problem
from numpy.testing import assert_allclose

import gradflow as gf
from gradflow.runs import simulate as simulating
from gradflow.solvers import choose_solver, cpu_advice, measure_size, Size


@pytest.fixture(scope="module")
def linear():
    """A linear regression: its term and its initial parameters."""
    loss, model = linear_problem(jr.key(1), samples=3, features=6)
    return gf.GradientFlow(loss).term(model)


def test_choose_solver(linear):
    term, params = linear
    size = lambda x, d=6, m=3: Size(jnp.asarray(x), d, m, 6.0 * d * (m or 100))
    choose = lambda *args, **kw: type(choose_solver(*args, **kw).solver)
    assert choose(size(1.0)) is diffrax.Tsit5
    assert choose(size(1e6)) is gf.KKT4
    assert choose(size(1e6), rtol=1e-9) is gf.KKT5
    assert choose(size(1e4, 100_000, 5000), rtol=1e-3) is gf.RKC2
    # The kernel does not fit, nor do its factors: KKT without a matrix, or RKC2 where
    # the flow is not that stiff.
    for many in ((20_000, 10_001), (6000, 20_000)):
        assert choose(size(1e8, *many)) is gf.KKT4
        assert choose(size(1e4, *many), rtol=1e-4) is gf.RKC2
    assert choose(size(1e8, 2, 10_001)) is gf.KKT4  # it is kept as two columns
    assert choose(size(1e6, 6, None)) is gf.KKT4
    # Cheap gradients beside a costly kernel: an entry of a product of two matrices.
    cheap = lambda x: Size(jnp.asarray(x), 800, 180, 5e4)
    assert choose(cheap(1.2e3), rtol=1e-4) is gf.RKC2
    assert choose(cheap(1.2e6), rtol=1e-4) is gf.KKT4
    assert choose(size(1e6, 6000, None)) is gf.RKC2
    assert choose(size(1e8, 6000, 8000)) is gf.KKT4
    with pytest.raises(ValueError, match="^penalty: only KKT .* 10001 outputs"):
        choose_solver(Size(jnp.asarray(1e6), 20_000, 10_001, 1.0, kinks=True))
    why = choose_solver(size(1e6)).why
    assert "L·t1 = 1e+06" in why and "m = 3" in why and "Tsit5" in why

    chosen = []

    @jax.jit
    def traced(t1):
        chosen.append(choose_solver(measure_size(term, params, 1e-2, t1)))
        return t1

    traced(1.0)
    assert type(chosen[0].solver) is gf.KKT4 and "unknown" in chosen[0].why

    @jax.jit
    def to_nine_digits(t1):
        size = measure_size(term, params, 1e-2, t1)
        chosen.append(choose_solver(size, rtol=1e-9))
        return t1

    to_nine_digits(1.0)
    assert type(chosen[1].solver) is gf.KKT5


def test_measure_size(linear):
    term, params = linear
    x = np.asarray(term.loss.x)
    found = measure_size(term, params, 0.1, 2.0)
    top = np.linalg.eigvalsh(x.T @ x / len(x))[-1]
    assert_allclose(found.stiffness, 2 * (top + 0.1), rtol=0.05)
    assert (found.parameters, found.outputs) == (6, 3)
    assert 4 * 6 * 3 <= found.gradient <= 8 * 6 * 3 + 50  # Xβ, and Xᵀ of the residuals
    opaque, _ = gf.GradientFlow(gf.Loss(term.loss)).term(params)
    assert measure_size(opaque, params, 0.1, 2.0).outputs is None


def test_advice_for_small_runs_on_an_accelerator(monkeypatch):
    """It goes with the reason for the solver, and follows what an iteration takes."""
    task = gf.tasks.diagonal_network(jr.key(0), samples=5, dim=12)
    small = measure_size(*task.flow.term(task.model), 0.0, 1.0)
    large = dataclasses.replace(small, gradient=1e6)
    for solver in (gf.KKT4(), gf.RKC2()):
        told = cpu_advice(small, solver, "gpu")
        assert 'jax.default_device(jax.devices("cpu")[0])' in told
        assert "\n" not in told
        assert not cpu_advice(small, solver, "cpu")
        assert not cpu_advice(large, gf.KKT4(), "gpu")
    # Between them: three gradients are more than one.
    between = dataclasses.replace(small, gradient=5e5)
    assert not cpu_advice(between, gf.KKT4(), "gpu")
    assert cpu_advice(between, gf.RKC2(), "gpu")
    flow = dict(weight_decay=0.1, t1=1.0, saves=5)
    usual = gf.simulate(task.flow, task.model, **flow).stats.why
    assert "CPU" not in usual
    monkeypatch.setattr(simulating, "_platform", lambda path: "gpu")
    path = gf.simulate(task.flow, task.model, **flow)
    assert path.stats.why.startswith(usual + "; one run of so little work")
    given = gf.simulate(task.flow, task.model, solver=gf.KKT4(), **flow)
    assert given.stats.why == "given"
