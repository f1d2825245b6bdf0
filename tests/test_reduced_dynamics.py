"""The dynamics of norm and messiness against its laws of time."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import gradflow as gf


@eqx.filter_jit
def run(dynamics, norm, messiness, weight_decay, t1):
    return dynamics.simulate(norm, messiness, weight_decay=weight_decay, t1=t1)


def simulate(dynamics, *numbers):
    """With numbers as arrays, so that all runs share one compilation."""
    as_arrays = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, float), tree)
    return run(as_arrays(dynamics), *as_arrays(numbers))


def measured(dynamics, weight_decay, *, start=0.5, end=0.05, above=2.0):
    """Times measured, and by both laws, from `above` times the critical norm."""
    norm = above * float(dynamics.loss.critical_norm(start))
    exact, plain = (
        dynamics.time_law(norm, start, end, weight_decay=weight_decay, exact=e)
        for e in (True, False)
    )
    path = simulate(dynamics, norm, start, weight_decay, 1.5 * exact)
    return float(path.time_until(end)), exact, plain


@pytest.mark.parametrize("angle", [0.3, 0.8, 1.2])
@pytest.mark.parametrize("rate", [0.1, 1.0, 10.0])
def test_exact_law(angle, rate):
    cliff = gf.Cliff(norm=1.0, angle=angle, softness=0.003)
    time, law, _ = measured(gf.ReducedDynamics(cliff, representation_rate=rate), 0.003)
    assert_allclose(time, law, rtol=0.02)


@pytest.mark.parametrize("angle", [0.9, 1.2])
@pytest.mark.parametrize("weight_decay", [0.01, 0.001])
def test_law_of_the_paper(angle, weight_decay):
    """t η_Dγ = L + h tan θ, where w² η_R is about η_D on the edge."""
    cliff = gf.Cliff(norm=3.0, angle=angle, softness=0.003)
    middle = float(cliff.critical_norm(0.275))
    rates = dict(decoder_rate=2.0, representation_rate=2.0 / middle**2)
    time, _, law = measured(gf.ReducedDynamics(cliff, **rates), weight_decay)
    assert_allclose(time, law, rtol=0.05)


def test_the_paper_leaves_a_factor_out():
    """A representation that learns ten times faster takes less than half the time."""
    cliff = gf.Cliff(norm=1.0, angle=1.2, softness=0.003)
    time, exact, plain = measured(
        gf.ReducedDynamics(cliff, representation_rate=10.0), 0.003
    )
    assert time < 0.5 * plain and abs(time / exact - 1) < 0.02


def test_time_goes_as_one_over_the_weight_decay_and_grows_with_the_angle():
    decays = np.geomspace(1e-3, 1e-2, 3)
    times = {
        angle: [
            measured(gf.ReducedDynamics(gf.Cliff(1.0, angle, softness=0.003)), g)[0]
            for g in decays
        ]
        for angle in (0.6, 1.2)
    }
    for some in times.values():
        slope = np.polyfit(np.log(decays), np.log(some), 1)[0]
        assert_allclose(slope, -1, atol=0.02)
    # In fewer data a start of the same norm takes longer.
    wide, narrow = (
        gf.ReducedDynamics(gf.Cliff(1.0, angle)).time_law(
            3.0, 0.5, 0.05, weight_decay=0.01, exact=False
        )
        for angle in (1.2, 0.6)
    )
    assert wide > narrow


def test_cliff_is_an_l_along_the_norm():
    cliff = gf.Cliff(norm=2.0, angle=0.7, height=10.0, softness=0.01)
    edge = float(cliff.critical_norm(0.3))
    assert_allclose(edge, 2 * np.exp(0.3 / np.tan(0.7)), rtol=1e-12)
    norms = edge * np.exp(np.linspace(-1, 1, 41))
    values = np.asarray(jax.vmap(cliff, (0, None))(jnp.asarray(norms), 0.3))
    assert (np.diff(values) < 0).all() and values[-1] < 1e-12
    beyond = np.sin(0.7) * 1.0
    assert_allclose(values[0], 10 * beyond**2, rtol=1e-6)


def test_velocity_is_equation_6():
    """Of another loss, l̃ = m²/w: against its derivatives by hand."""
    dynamics = gf.ReducedDynamics(lambda w, m: m**2 / w, 2.0, 3.0)
    dw, dm = dynamics.velocity(jnp.asarray(1.5), jnp.asarray(0.4), 0.1)
    assert_allclose(dw, -2 * (-(0.4**2) / 1.5**2 + 0.1 * 1.5), rtol=1e-12)
    assert_allclose(dm, -3 * 2 * 0.4 / 1.5, rtol=1e-12)


def test_on_the_plain_the_norm_decays_and_nothing_is_learnt():
    dynamics = gf.ReducedDynamics(gf.Cliff(1.0, 0.8, softness=0.003), 2.0)
    path = simulate(dynamics, 20.0, 0.5, 0.01, 50.0)
    assert_allclose(path.norm, 20 * np.exp(-0.02 * np.asarray(path.t)), rtol=1e-6)
    assert_allclose(path.messiness, 0.5, rtol=1e-6)
    assert path.time_until(0.1) == np.inf and path.time_until(0.7) == 0
    assert path.loss.max() < 1e-20


def test_what_makes_no_sense():
    dynamics = gf.ReducedDynamics(gf.Cliff(1.0, 0.8))
    with pytest.raises(ValueError, match="angle: expected 0 < θ < π/2, got 2.0"):
        gf.Cliff(1.0, 2.0)
    with pytest.raises(ValueError, match="decoder_rate: expected a positive"):
        gf.ReducedDynamics(gf.Cliff(1.0, 0.8), decoder_rate=0.0)
    with pytest.raises(ValueError, match="norm: expected a positive"):
        dynamics.simulate(-1.0, 0.5, weight_decay=0.1, t1=1.0)
    with pytest.raises(ValueError, match="saves: expected an integer >= 2"):
        dynamics.simulate(1.0, 0.5, weight_decay=0.1, t1=1.0, saves=1)
    law = lambda w, m: dynamics.time_law(w, m, 0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match="the critical norm, or more, got 1.0"):
        law(1.0, 0.5)
    with pytest.raises(ValueError, match="until: expected less than 0.05, got 0.1"):
        law(9.0, 0.05)
    with pytest.raises(ValueError, match="that of a Cliff"):
        gf.ReducedDynamics(lambda w, m: m).time_law(1.0, 0.5, 0.1, weight_decay=0.1)
