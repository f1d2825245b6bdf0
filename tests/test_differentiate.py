"""Derivatives through a run: exact with Diffrax's solvers, refused with the others."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
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


@pytest.mark.parametrize("solver", [gf.KKT4(), gf.RKC2(), None])
def test_what_has_no_derivative_says_what_has_one(solver):
    for argument in (0, 1):
        with pytest.raises(ValueError, match="^adjoint: .* solver=diffrax.Tsit5()"):
            jax.grad(lambda *at: end(*at, solver=solver), argument)(*AT)
    with pytest.raises(ValueError, match="^adjoint: "):
        jax.jvp(lambda lam: end(AT[0], lam, solver=solver), AT[1:], AT[1:])
    with pytest.raises(ValueError, match="^adjoint: "):
        end(*AT, solver=gf.KKT4(), adjoint=diffrax.DirectAdjoint())
