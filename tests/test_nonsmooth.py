"""Flows with kinked penalties: the smoothed flow and proximal descent approach the same
path, each at its own order, and for ℓ1 the exact one."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jaxtyping import Array

import gradflow as gf


class Sensing(eqx.Module):
    a: Array

    def __call__(self, x):
        return jnp.sum(x * self.a)


@pytest.fixture(scope="module")
def problem():
    kx, ky, ka = jr.split(jr.key(0), 3)
    x = jr.normal(kx, (6, 4, 3)) / 6**0.5
    y = jr.normal(ky, (6,))
    return gf.SquaredError(x, y, reduction="sum"), Sensing(jr.normal(ka, (4, 3)))


# Times are multiples of the steps; at the end everything has settled.
LAM, TS = 0.2, jnp.asarray([0.0, *(0.4 * 2.0**k for k in range(8))])


def distance(one, other):
    return float(jnp.max(jnp.abs(one.params.a - other.params.a)))


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [gf.L1(), gf.GroupLasso(), gf.Nuclear()], ids=str)
def test_smoothing_and_proximal_steps_agree(penalty, problem):
    loss, start = problem

    def smoothed(epsilon):
        flow = gf.GradientFlow(loss, penalty=gf.Moreau(penalty, epsilon))
        path = gf.simulate(flow, start, weight_decay=LAM, ts=TS, rtol=1e-7)
        assert isinstance(penalty, gf.L1) or path.stats.solver == "RKC2"
        return path

    def stepped(rate):
        flow = gf.GradientFlow(loss, penalty=penalty)
        at = np.round(np.asarray(TS) / rate).astype(int)
        return gf.descent(
            flow, start, weight_decay=LAM, learning_rate=rate, at=at, method="proximal"
        )

    if isinstance(penalty, gf.L1):
        flow = gf.GradientFlow(loss, penalty=penalty)
        exact = gf.simulate(flow, start, weight_decay=LAM, ts=TS, rtol=1e-8)
    else:
        exact = smoothed(1e-4)
    rough, fine = (distance(smoothed(e), exact) for e in (1e-2, 1e-3))
    assert fine < 0.2 * rough < 0.2 * 5e-2
    rates = jnp.array([0.05, 0.0125])
    far, near = (distance(stepped(float(rate)), exact) for rate in rates)
    assert near < 0.5 * far and near < 2e-2
    assert float(jnp.max(jnp.abs(exact.params.a[-1] - exact.params.a[0]))) > 0.3


@pytest.mark.slow
def test_two_phase_theory_of_a_penalty_with_kinks(problem):
    """The drift is piecewise linear, and so is its interpolation: the error is of order
    λ down to what that leaves, which is told."""
    loss, start = problem
    flow = gf.GradientFlow(loss, penalty=gf.L1())
    theory = gf.two_phase(flow, start, slow_time=2.0)
    assert 1e-6 < theory.interpolation_error < 2e-2
    assert "the penalty has kinks" in str(theory)
    sweep = gf.sweep(
        flow, start, weight_decay=jnp.array([1e-2, 1e-3]), slow_time=2.0, rtol=1e-8,
        progress=False,
    )  # fmt: skip
    report = gf.compare(sweep, theory)
    left = float(theory.interpolation_error)
    sup = report.orders[1].sup_all
    assert sup[1] < 0.3 * sup[0] + left
    with pytest.raises(ValueError, match="the second takes"):
        gf.two_phase(flow, start, slow_time=2.0, order=2)
