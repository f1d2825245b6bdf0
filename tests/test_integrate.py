"""The loop of an integration, against Diffrax's."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradflow.runs.integrate import Integration

TS = jnp.array([0.0, 0.3, 0.31, 2.0, 5.0])
FIELD = diffrax.ODETerm(lambda t, y, args: -args * (y - jnp.array([1.0, 0.0])))
START, RATES = jnp.array([2.0, 3.0]), jnp.array([1.0, 20.0])
PID = diffrax.PIDController(rtol=1e-7, atol=1e-9)


def ours(solver, *, max_steps=1000, **options):
    return Integration(FIELD, solver, PID, TS, RATES, max_steps, **options)


@eqx.filter_jit
def run(integration, steps=None):
    return integration.run(integration.begin(START, jnp.asarray(0.01)), steps)


def theirs(solver, controller):
    return diffrax.diffeqsolve(
        FIELD, solver, 0.0, 5.0, 0.01, START, RATES, saveat=diffrax.SaveAt(ts=TS),
        stepsize_controller=controller, max_steps=1000,
    )  # fmt: skip


@pytest.mark.parametrize("land", [True, False])
@pytest.mark.parametrize("solver", [diffrax.Tsit5(), diffrax.Kvaerno5()])
def test_is_what_diffrax_does(solver, land):
    """Tolerances of implicit solvers are those of the controller there, too."""
    landing = diffrax.ClipStepSizeController(PID, step_ts=TS)
    expected = theirs(solver, landing if land else PID)
    found = run(ours(solver, land=land))
    np.testing.assert_allclose(found.saved, expected.ys, rtol=1e-12, atol=1e-14)
    stats = expected.stats
    counts = [stats[f"num_{k}steps"] for k in ("", "accepted_", "rejected_")]
    assert found.counts.tolist() == [int(n) for n in counts]
    assert float(found.t) == 5.0 and diffrax.is_successful(found.result)


def test_goes_on_where_it_paused():
    whole = ours(diffrax.Tsit5())
    part = run(whole, jnp.asarray(7))
    assert part.counts[0] == 7 and part.t < 5.0
    assert np.isinf(part.saved[-1]).all() and (part.saved[0] == START).all()
    rest = eqx.filter_jit(lambda at: whole.run(at))(part)
    for a, b in zip(jax.tree.leaves(rest), jax.tree.leaves(run(whole)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_ends_early():
    few = run(ours(diffrax.Tsit5(), max_steps=5))
    assert few.counts[0] == 5 and few.t < 5.0 and not few.stopped
    near = ours(diffrax.Tsit5(), until=lambda t, y: y[1] < 1e-3)
    at = run(near)
    assert at.stopped and at.y[1] < 1e-3 and at.t < 1.0
    assert np.isfinite(at.saved[2]).all() and np.isinf(at.saved[3]).all()
    at_once = run(ours(diffrax.Tsit5(), until=lambda t, y: y[1] > 0))
    assert at_once.stopped and at_once.counts[0] == 0


def test_a_failure_is_named():
    stuck = diffrax.PIDController(rtol=1e-7, atol=1e-9, dtmin=1e-3, force_dtmin=False)
    wild = diffrax.ODETerm(lambda t, y, args: jnp.where(t > 0.5, jnp.nan, -y))
    at = run(Integration(wild, diffrax.Tsit5(), stuck, TS, RATES, 1000))
    assert at.result == diffrax.RESULTS.dt_min_reached
    assert 0.49 < at.t <= 0.5 and at.counts[2] > 0 and np.isinf(at.saved[3]).all()


def test_no_tiny_step_is_left_before_a_time():
    """Steps of 0.02, 0.2, and on; the first time is a rounding beyond the second."""
    still = diffrax.ODETerm(lambda t, y, args: 0 * y)
    ts = jnp.array([0.0, 0.22 * (1 + 1e-15), 1.0])
    one = Integration(still, diffrax.Tsit5(), PID, ts, None, 100)
    at = eqx.filter_jit(lambda: one.run(one.begin(START, jnp.asarray(0.02))))()
    assert at.counts.tolist() == [3, 3, 0] and float(at.t) == 1.0
