"""Derivatives through a run: exact with Diffrax's solvers, refused with the others."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from numpy.testing import assert_allclose

import gradflow as gf

Y, T = 0.7, 1.5


class Weight(eqx.Module):
    w: jax.Array


def end(start, lam, target=Y, **options):
    """θ(T) of F = ½(w − y)²."""
    loss = gf.Loss(lambda m: 0.5 * (m.w - target) ** 2)
    path = gf.simulate(
        gf.GradientFlow(loss), Weight(start), weight_decay=lam, t1=T, saves=3,
        rtol=1e-9, **options,
    )  # fmt: skip
    return path.params.w[-1]


def exact(start, lam):
    rest = Y / (1 + lam)
    return rest + (start - rest) * jnp.exp(-(1 + lam) * T)


AT = (jnp.array(2.0), jnp.array(0.3))
RIGHT = jax.grad(exact, argnums=(0, 1))(*AT)


@pytest.mark.slow
def test_forward():
    run = lambda *at: end(
        *at, solver=diffrax.Tsit5(), adjoint=diffrax.ForwardMode()
    )  # fmt: skip
    value, slope = jax.jvp(run, AT, (jnp.array(1.0), jnp.array(-2.0)))
    assert_allclose(value, exact(*AT), rtol=1e-8)
    assert_allclose(slope, RIGHT[0] - 2 * RIGHT[1], rtol=1e-7)


@pytest.mark.slow
def test_reverse():
    run = lambda *at: end(*at, solver=diffrax.Tsit5())
    assert_allclose(jax.grad(run, argnums=(0, 1))(*AT), RIGHT, rtol=1e-7)


@pytest.mark.slow
def test_times_to_save_that_depend_on_the_run():
    """They begin at the time scale of the start. Through the lengths of some thousand
    steps at the limit of stability the derivative was 1e22."""
    task = gf.tasks.diagonal_network(jr.key(0), samples=6, dim=12)

    def norm(lam, alpha, t1, **options):
        path = gf.simulate(
            task.flow, gf.scaled(task.model, alpha), weight_decay=lam, rtol=1e-8,
            solver=diffrax.Tsit5(), **(options or {"t1": t1}),
        )  # fmt: skip
        return path.penalty[-1]

    found = jax.grad(norm, argnums=(0, 1, 2))(0.01, 1.0, 30.0)
    given = lambda *at: norm(*at, 30.0, ts=jnp.array([0.0, 30.0]))
    assert_allclose(found[:2], jax.grad(given, argnums=(0, 1))(0.01, 1.0), rtol=1e-6)
    end = gf.simulate(task.flow, task.model, weight_decay=0.01, t1=30.0, rtol=1e-9)
    params, speed = end[-1], task.flow.velocity(end[-1], 0.01)
    rise = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, params, speed)))
    assert_allclose(found[2], rise, rtol=1e-4)
    later = jax.grad(lambda lam: norm(lam, 1.0, None, slow_time=0.3))(0.01)
    assert_allclose(later, found[0] - 30.0 / 0.01 * found[2], rtol=1e-5)


@pytest.mark.parametrize("solver", [gf.KKT4(), gf.RKC2(), None])
def test_what_has_no_derivative_says_what_has_one(solver):
    for argument in (0, 1):
        with pytest.raises(ValueError, match="^adjoint: .* solver=diffrax.Tsit5()"):
            jax.grad(lambda *at: end(*at, solver=solver), argument)(*AT)
    with pytest.raises(ValueError, match="^adjoint: "):
        jax.jvp(lambda lam: end(AT[0], lam, solver=solver), AT[1:], AT[1:])
    with pytest.raises(ValueError, match="^adjoint: "):
        end(*AT, solver=gf.KKT4(), adjoint=diffrax.DirectAdjoint())
