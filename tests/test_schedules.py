"""Weight decay on a schedule, of t or of s."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import Linear
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from numpy.testing import assert_allclose
from scipy.integrate import solve_ivp
from scipy.optimize import brentq

import gradflow as gf

# One equation in two unknowns: along (1, 1) the data pull, along (1, -1) nothing does.
LOSS = gf.SquaredError(jnp.array([[1.0, 1.0]]), jnp.array([2.0]))
MODEL = Linear(jnp.array([3.0, -1.0]))
FLOW = gf.GradientFlow(LOSS)
TS = jnp.array([0.0, 1.0, 10.0, 50.0, 200.0])


class Falling(eqx.Module):
    """λ(t) = a/(1 + t/τ), ∫λ dt = aτ log(1 + t/τ)."""

    a: Float[Array, ""]
    tau: float = 20.0

    def __call__(self, t):
        return self.a / (1 + t / self.tau)

    def slow_time(self, t):
        return self.a * self.tau * np.log1p(np.asarray(t) / self.tau)


def exact(decay, ts):
    """(θ₁ + θ₂)/2 and (θ₁ − θ₂)/2 by quadrature. With σ = θ₁ + θ₂ it is
    σ' = −2(σ − 2) − λσ, and (θ₁ − θ₂)' = −λ(θ₁ − θ₂)."""

    def rate(t, sigma):
        return -2 * (sigma - 2) - float(decay(t)) * sigma

    out = solve_ivp(
        rate, (0, ts[-1]), [2.0], "Radau", np.asarray(ts), rtol=1e-11, atol=1e-13
    )
    return out.y[0] / 2


DECAY = Falling(jnp.array(0.1))


@pytest.mark.parametrize("solver", [gf.KKT4(), gf.KKT5(), gf.RKC2(), diffrax.Tsit5()])
def test_closed_form(solver):
    """Every solver sees λ at its stages; the clock is ∫λ dt."""
    path = gf.simulate(FLOW, MODEL, weight_decay=DECAY, ts=TS, solver=solver)
    slow = DECAY.slow_time(TS)
    assert_allclose(path.slow_time, slow, rtol=1e-8)
    along, across = exact(DECAY, TS), 2 * np.exp(-slow)
    true = np.stack([along + across, along - across], 1)
    off = np.linalg.norm(path.params.w - true, axis=1)
    most = 8e-6 if isinstance(solver, gf.RKC2) else 5e-6
    assert (off < most * np.linalg.norm(true, axis=1)).all()
    assert_allclose(path.weight_decay, slow[-1] / 200)


def test_in_slow_time():
    """λ(s) = a e^{−s} is λ(t) = a/(1 + at)."""
    decay = gf.InSlowTime(lambda s: 0.1 * jnp.exp(-s))
    path = gf.simulate(FLOW, MODEL, weight_decay=decay, slow_time=2.0, saves=9)
    t = np.asarray(path.t)
    assert_allclose(t[-1], (np.exp(2.0) - 1) / 0.1, rtol=1e-8)
    assert_allclose(path.slow_time, np.log1p(0.1 * t), rtol=1e-7, atol=1e-9)
    w = path.params.w
    assert_allclose((w[:, 0] - w[:, 1]) / 2, 2 / (1 + 0.1 * t), rtol=5e-6)


def test_of_optax():
    """With a jump, which is at a time that is landed on."""
    decay = optax.piecewise_constant_schedule(0.1, {50: 0.1})
    path = gf.simulate(FLOW, MODEL, weight_decay=decay, ts=TS)
    slow = np.minimum(TS, 50) * 0.1 + np.maximum(TS - 50, 0) * 0.01
    assert_allclose(path.slow_time, slow, rtol=1e-6)
    w = path.params.w
    assert_allclose((w[:, 0] - w[:, 1]) / 2, 2 * np.exp(-slow), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [gf.KKT4(), gf.KKT5(), gf.RKC2()])
def test_against_radau(solver):
    """A network, along a schedule that falls and rises; KKT5 with half the tolerance
    has half the error."""
    kx, ky, km = jr.split(jr.key(1), 3)
    loss = gf.SquaredError(jr.normal(kx, (8, 3)), jr.normal(ky, (8, 1)))
    model = eqx.nn.MLP(3, 1, 12, 1, jnp.tanh, key=km)
    decay = lambda t: 1e-2 * (1 + 0.9 * jnp.sin(t / 30))
    term, params = gf.GradientFlow(loss).term(model)
    theta, unravel = ravel_pytree(params)
    force = jax.jit(jax.grad(lambda th: loss(term.model(unravel(th)))))
    rate = lambda t, y: -np.asarray(force(y)) - float(decay(t)) * y
    ts = np.array([0.0, 5.0, 50.0, 200.0, 300.0])
    true = solve_ivp(rate, (0, 300), theta, "Radau", ts, rtol=1e-10, atol=1e-12).y.T
    run = jax.jit(
        lambda rtol: (
            gf.simulate(
                gf.GradientFlow(loss),
                model,
                weight_decay=decay,
                ts=jnp.asarray(ts),
                solver=solver,
                rtol=rtol,
            ).params
        )  # fmt: skip
    )
    for rtol in (1e-4, 1e-6):
        path = jax.vmap(lambda p: ravel_pytree(p)[0])(run(rtol))
        off = np.linalg.norm(path - true, axis=1) / np.linalg.norm(true, axis=1)
        assert off.max() < 6 * rtol


@pytest.mark.slow
def test_sliding():
    """Under ℓ1: a coordinate is caught when the pull has grown, and let go when it has
    fallen."""
    loss = gf.SquaredError(jnp.array([[1.0]]), jnp.array([1.0]))
    flow = gf.GradientFlow(loss, penalty=gf.L1())
    # From 1: θ' = 1 − θ − λ; λ rises beyond 1, and falls again.
    decay = lambda t: 0.2 * t * jnp.exp(1 - t / 10)
    ts = jnp.linspace(0.0, 60.0, 61)
    path = gf.simulate(flow, Linear(jnp.array([1.0])), weight_decay=decay, ts=ts)
    w, lam = path.params.w[:, 0], jax.vmap(decay)(ts)
    held = np.flatnonzero(np.asarray(w) == 0)
    assert held.size > 10
    assert (lam[held] >= 1 - 1e-6).all() and lam[held[-1] + 1] < 1
    free = solve_ivp(
        lambda t, y: 1 - y - float(decay(t)),
        (float(ts[0]), float(ts[held[0] - 1])), [1.0], t_eval=ts[: held[0]],
        rtol=1e-10, atol=1e-12,
    )  # fmt: skip
    assert_allclose(w[: held[0]], free.y[0], atol=2e-5)
    let_go = brentq(lambda t: float(decay(t)) - 1, 10, 60)
    again = solve_ivp(
        lambda t, y: 1 - y - float(decay(t)), (let_go, 60.0), [0.0],
        t_eval=ts[held[-1] + 1 :], rtol=1e-10, atol=1e-12,
    )  # fmt: skip
    assert_allclose(w[held[-1] + 1 :], again.y[0], atol=2e-5)


@pytest.mark.slow
def test_lanes_of_schedules():
    """Modules with numbers in them, under `vmap`."""
    many = jax.vmap(
        lambda a: gf.simulate(
            FLOW, MODEL, weight_decay=Falling(a), ts=TS, solver=gf.KKT4()
        )
    )(jnp.array([0.1, 0.01]))
    for i, a in enumerate((0.1, 0.01)):
        slow = Falling(a).slow_time(TS)
        assert_allclose(many.slow_time[i], slow, rtol=1e-8)
        w = many.params.w[i]
        assert_allclose((w[:, 0] - w[:, 1]) / 2, 2 * np.exp(-slow), rtol=5e-6)


@pytest.mark.slow
def test_sliding_from_no_weight_decay():
    """A coordinate has the sign that it has while nothing pulls it."""
    loss = gf.SquaredError(jnp.eye(2), jnp.array([1.0, -1.0]), reduction="sum")
    flow = gf.GradientFlow(loss, penalty=gf.L1())
    warm = lambda t: 0.1 * jnp.minimum(t, 1.0)
    ts = np.array([0.0, 1e-3, 0.01, 0.1, 0.3, 1.0, 3.0])
    path = gf.simulate(
        flow, Linear(-0.5 * jnp.ones(2)), weight_decay=warm, ts=jnp.asarray(ts)
    )
    true = solve_ivp(
        lambda t, y: np.array([1.0, -1.0]) - y - float(warm(t)) * np.sign(y),
        (0, 3), [-0.5, -0.5], "LSODA", ts, rtol=1e-9, atol=1e-11, max_step=0.01,
    )  # fmt: skip
    assert_allclose(path.params.w, true.y.T, atol=1e-4)
    # From the minimum: θ₁ = 1 − ∫ e^{−(t − τ)}λ(τ) dτ = 1 − 0.1(t − 1 + e^{−t}), t ≤ 1.
    rest = gf.simulate(flow, Linear(loss.y), weight_decay=warm, ts=jnp.asarray(ts))
    w, early = rest.params.w, ts <= 1
    assert_allclose(
        w[early, 0], 1 - 0.1 * (ts[early] - 1 + np.exp(-ts[early])), atol=1e-5
    )
    assert_allclose(w[:, 1], -w[:, 0], atol=1e-6)


@pytest.mark.slow
def test_what_comes_and_goes():
    """A pulse between saved times is in the clock too; and there is a clock where a run
    ends at its start, or begins in the middle."""
    pulse = lambda t: jnp.where((t >= 500) & (t < 501), 1.0, 0.0)
    ts = jnp.array([0.0, 500.0, 500.5, 501.0, 1000.0])
    path = gf.simulate(FLOW, MODEL, weight_decay=pulse, ts=ts, solver=gf.KKT4())
    assert_allclose(path.slow_time, [0, 0, 0.5, 1, 1], atol=1e-3)
    often = lambda t: 0.1 * (jnp.floor(1e3 * t) % 2)
    with pytest.raises(ValueError, match="weight_decay: the schedule changes too"):
        gf.simulate(FLOW, MODEL, weight_decay=often, ts=TS)
    at_once = lambda model: jnp.array(True)
    path = gf.simulate(FLOW, MODEL, weight_decay=DECAY, ts=TS, until=at_once)
    assert float(path.weight_decay) == 0.1 and bool(path.met)
    path = gf.descent(
        FLOW, MODEL, weight_decay=DECAY, learning_rate=0.1, steps=9, until=at_once
    )
    assert float(path.weight_decay) == 0.1 and bool(path.met)
    decay = gf.InSlowTime(lambda s: 0.1 / (1 + s))
    path = gf.simulate(FLOW, MODEL, weight_decay=decay, slow_time=2.0, saves=9)
    piece = path.again(
        jax.tree.map(lambda p: p[5], path.params), path.t[5:] - path.t[5],
        float(path.t[5]),
    )  # fmt: skip
    assert_allclose(piece.slow_time, path.slow_time[5:] - path.slow_time[5], atol=1e-8)


def test_crossing_time():
    """The flow that is run again between two saved times knows what time it is."""
    metric = gf.Metric(lambda m: m.w[0] - m.w[1], threshold=1.0)
    path = gf.simulate(FLOW, MODEL, weight_decay=DECAY, ts=TS, metrics={"test": metric})
    # 4 e^{−s} = 1, s = 2 log(1 + t/20)
    assert_allclose(path.crossing_time("test"), 20 * (2 - 1), rtol=1e-5)


@pytest.mark.slow
def test_theory_follows_the_clock():
    """The first order needs s(t) alone."""
    theory = gf.two_phase(FLOW, MODEL, slow_time=5.0)
    small = Falling(jnp.array(1e-3), 1000.0)
    ts = jnp.array([10.0, 100.0, 1000.0, 10_000.0])
    path = gf.simulate(FLOW, MODEL, weight_decay=small, ts=ts)
    told = theory.predict(ts, slow_time=path.slow_time)
    assert_allclose(told.w, path.params.w, atol=2e-3)
    other = theory.predict(ts[:3], 1e-3)
    assert np.abs(other.w - path.params.w[:3]).max() > 0.1
    with pytest.raises(ValueError, match="weight_decay, slow_time: give one"):
        theory.predict(ts)
    with pytest.raises(ValueError, match="slow_time: expected the slow times at t"):
        theory.predict(ts, slow_time=1.0)


@pytest.mark.parametrize("method", ["subgradient", "decoupled"])
def test_descent(method):
    """Step by step; on a schedule of the step size, too."""
    rates = optax.linear_schedule(0.1, 0.02, 50)

    def by_hand(decay, rates):
        w, t, s = np.array(MODEL.w), 0.0, 0.0
        for i in range(60):
            h, lam = float(rates(i)), float(decay(t, s))
            w = w - h * ((w.sum() - 2) * np.ones(2) + lam * w)
            t, s = t + h, s + h * lam
        return w, t, s

    for decay, at in (
        (DECAY, lambda t, s: DECAY(t)),
        (gf.InSlowTime(lambda s: 0.1 * jnp.exp(-s)), lambda t, s: 0.1 * np.exp(-s)),
    ):
        for rate in (0.05, rates):
            path = gf.descent(
                FLOW, MODEL, weight_decay=decay, learning_rate=rate, steps=60,
                method=method,
            )  # fmt: skip
            w, t, s = by_hand(at, rate if callable(rate) else lambda i: 0.05)
            assert_allclose(path.params.w[-1], w, rtol=1e-10)
            assert_allclose([path.t[-1], path.slow_time[-1]], [t, s], rtol=1e-10)


def test_what_makes_no_sense():
    falls = lambda t: 0.1 - 0.01 * t
    run = lambda **how: gf.simulate(FLOW, MODEL, **how)
    with pytest.raises(ValueError, match="weight_decay: expected a schedule .* t = 50"):
        run(weight_decay=falls, ts=TS)
    with pytest.raises(ValueError, match="slow_time: give t1 or ts where weight_decay"):
        run(weight_decay=falls, slow_time=1.0)
    with pytest.raises(ValueError, match="t1: give slow_time where weight_decay is"):
        run(weight_decay=gf.InSlowTime(falls), t1=1.0)
    with pytest.raises(ValueError, match="weight_decay: expected a schedule of positi"):
        run(weight_decay=gf.InSlowTime(lambda s: 0.1 - s), slow_time=1.0)
    for schedule in (falls, gf.InSlowTime(lambda s: s - 0.1)):
        with pytest.raises(ValueError, match="weight_decay: expected a schedule"):
            gf.descent(FLOW, MODEL, weight_decay=schedule, learning_rate=0.5, steps=90)
    with pytest.raises(ValueError, match="slow_time: give steps or at where weight_de"):
        gf.descent(FLOW, MODEL, weight_decay=falls, learning_rate=0.1, slow_time=1.0)


def test_steps_of_no_length_are_steps():
    """A step size that has fallen to zero makes equal times of different models."""
    rate = lambda k: jnp.where(k < 20, 0.01, 0.0)
    path = gf.descent(
        FLOW, MODEL, weight_decay=0.01, at=[0, 10, 20, 30, 40], learning_rate=rate,
        optimiser=optax.adam(0.01),
    )  # fmt: skip
    assert_allclose(path.t, [0, 0.1, 0.2, 0.2, 0.2])
    assert (jnp.abs(jnp.diff(path.params.w, axis=0)) > 1e-3).all()
