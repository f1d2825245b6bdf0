"""What `rtol` promises: an error relative to the θ that there is, in every unit, from
zero, where θ has decayed, and where errors grow; and verdicts without units."""

import functools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy.integrate import solve_ivp
from scipy.special import expit

import gradflow as gf
from gradflow._norms import norm, rms
from gradflow.flow.flat import flatten
from gradflow.flow.nonsmooth import may_have_kinks
from gradflow.solvers.controllers import Relative, SHARE, tolerance
from gradflow.solvers.jumps import find_jumps


class Weights(eqx.Module):
    w: jax.Array

    def __call__(self, x):
        return x @ self.w


class Chain(eqx.Module):
    """A product of matrices."""

    matrices: list

    def __call__(self, x):
        for m in self.matrices:
            x = m @ x
        return x


def flat(path):
    return np.stack([np.asarray(ravel_pytree(path[i])[0]) for i in range(len(path))])


def apart(path, exact):
    """The largest relative error over the saved times."""
    off = np.linalg.norm(flat(path) - exact, axis=1)
    return (off / np.maximum(np.linalg.norm(exact, axis=1), 1e-300)).max()


# -- units, zero, decay ---


@pytest.mark.slow
@pytest.mark.parametrize("unit", [1e-200, 1e-7, 1.0, 1e8])
def test_from_zero_in_every_unit(getkey, unit):
    x = jr.normal(getkey(), (9, 4))
    y = unit * (x @ jnp.array([1.0, -2.0, 0.5, 0.0]))
    ts = np.array([0.0, 0.3, 4.0, 40.0])
    path = gf.simulate(
        gf.GradientFlow(gf.SquaredError(x, y)),
        Weights(jnp.zeros(4)),
        weight_decay=1e-2,
        ts=jnp.asarray(ts),
    )
    rates, modes = np.linalg.eigh(np.asarray(x.T @ x) / 9)
    pull = modes.T @ np.asarray(x.T @ (y / unit)) / 9
    rates = rates + 1e-2
    exact = [modes @ (-np.expm1(-rates * t) / rates * pull) for t in ts]
    assert apart(path, unit * np.stack(exact)) < 5e-6
    assert path.stats.steps < 400


@pytest.mark.slow
def test_units_change_no_step(getkey):
    """θ in a unit of 1e-12, with time to match: the same steps."""
    x, key = jr.normal(getkey(), (5, 8)), getkey()

    def steps(unit):
        flow = gf.GradientFlow(gf.SquaredError(x, unit * x[:, 0]))
        model = Weights(unit * jr.normal(key, (8,)))
        path = gf.simulate(flow, model, weight_decay=1e-3, slow_time=2.0, saves=9)
        return int(path.stats.steps), flat(path) / unit

    (one, exact), (other, found) = steps(1.0), steps(2.0**-40)
    assert one == other
    np.testing.assert_allclose(found, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_what_has_decayed_stays_exact():
    """A weight that nothing but decay moves, beside one that is fitted at zero."""
    flow = gf.GradientFlow(gf.SquaredError(jnp.eye(3)[:1], jnp.zeros(1)))
    for solver in (gf.KKT4(), gf.KKT5()):
        path = gf.simulate(
            flow, Weights(jnp.array([1.0, 2.0, -1.0])), weight_decay=1e-3,
            ts=jnp.array([0.0, 1.8e4]), solver=solver,
        )  # fmt: skip
        exact = np.array([2.0, -1.0]) * np.exp(-18.0)
        np.testing.assert_allclose(flat(path)[-1, 1:], exact, rtol=5e-5)


def test_norms_do_not_underflow():
    tree = {"a": jnp.array([3e-200, 0.0]), "b": jnp.array([[4e-200]])}
    np.testing.assert_allclose(norm(tree), 5e-200)
    np.testing.assert_allclose(rms(tree), 5e-200 / 3**0.5)
    np.testing.assert_allclose(norm({"a": jnp.full(2, 1e200)}), 2**0.5 * 1e200)
    # One unit for all leaves, however small the first is.
    apart = {"a": jnp.array([1e-300, 0.0]), "b": jnp.array([3e200, 4e200])}
    np.testing.assert_allclose(norm(apart), 5e200)
    assert norm({"a": jnp.zeros(3)}) == 0
    assert jnp.isinf(norm({"a": jnp.array([1.0, jnp.inf])}))
    size = tolerance(jnp.array([0.0, 1.0]), 1e-3)
    np.testing.assert_allclose(size, 1e-3 * (np.array([0, 1]) + SHARE * 0.5**0.5))
    assert (tolerance(jnp.zeros(2), 1e-3) > 0).all()


# -- growth ---


@pytest.mark.slow
@pytest.mark.parametrize("solver", [gf.KKT4(), gf.KKT5(), gf.RKC2()])
def test_leaving_saddles(solver):
    """Two layers from 1e-3: each factor of e of growth is a few steps, whose errors add
    up. Measured 40, 15 and 62 rtol before they counted for more."""
    keys = jr.split(jr.key(7), 2)
    start = Chain([2e-3 * jr.normal(k, (3, 3)) for k in keys])
    loss = gf.SquaredError(jnp.eye(3), jnp.diag(jnp.array([1.0, 0.6, 0.3])))
    flow = gf.GradientFlow(loss)
    term, params = flow.term(start)
    theta, back = ravel_pytree(params)
    slope = lambda t, y: ravel_pytree(term.velocity(back(jnp.asarray(y)), 1e-3))[0]
    ts = np.concatenate([[0.0], np.geomspace(0.5, 400, 33)])
    exact = solve_ivp(
        jax.jit(slope), (0, 400), theta, method="DOP853", t_eval=ts, rtol=1e-12,
        atol=1e-16,
    ).y.T  # fmt: skip
    # RKC2 is of order 2: 1e-8 would take it 40 000 steps.
    for rtol in (1e-4, 1e-6) if isinstance(solver, gf.RKC2) else (1e-4, 1e-6, 1e-8):
        path = gf.simulate(
            flow, start, weight_decay=1e-3, ts=jnp.asarray(ts), rtol=rtol, solver=solver
        )
        assert apart(path, exact) < 6 * rtol


# -- verdicts ---


@pytest.mark.slow
def test_large_targets_are_no_divergence():
    x = jr.normal(jr.key(3), (30, 5), jnp.float32)
    y = 1e6 + 3e5 * x[:, 1]
    model = eqx.nn.Linear(5, "scalar", key=jr.key(0), dtype=jnp.float32)
    path = gf.simulate(
        gf.GradientFlow(gf.SquaredError(x, y)), model, weight_decay=1e-2, t1=50.0,
        rtol=1e-4,
    )  # fmt: skip
    assert bool(path.succeeded)


def test_exact_growth_is_no_divergence():
    """A linear loss has no minimiser; its flow is θ₀ + t."""
    flow = gf.GradientFlow(gf.Loss(lambda m: -jnp.sum(m.w)))
    path = gf.simulate(flow, Weights(jnp.ones(2)), weight_decay=0.0, t1=1e12)
    np.testing.assert_allclose(flat(path)[-1], 1 + 1e12, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("power", [3, 4])
def test_finite_time_blow_up_is_divergence(power):
    """w' = w² or w³ reaches infinity at t = 1 or ½."""
    flow = gf.GradientFlow(gf.Loss(lambda m: -jnp.sum(m.w**power) / power))
    path = gf.simulate(
        flow, Weights(jnp.ones(1)), weight_decay=0.0, t1=5.0, throw=False
    )
    assert bool(path.result == gf.RESULTS.diverged)
    assert np.isnan(flat(path)[-1]).all()


@pytest.mark.slow
def test_a_start_that_is_not_defined_takes_no_step():
    flow = gf.GradientFlow(gf.Loss(lambda m: (jnp.linalg.norm(m.w) - 1) ** 2))
    run = lambda lam, w: gf.simulate(
        flow, Weights(w), weight_decay=lam, t1=10.0, throw=False, saves=5,
        solver=gf.KKT4(),
    )  # fmt: skip
    path = run(1e-3, jnp.zeros(2))
    assert bool(path.result == gf.RESULTS.undefined_start)
    assert path.stats.steps == 0
    with pytest.raises(RuntimeError, match="not finite at the start"):
        gf.simulate(flow, Weights(jnp.zeros(2)), weight_decay=1e-3, t1=10.0)
    # Under `jit` a negative λ is only known when it runs.
    path = eqx.filter_jit(run)(jnp.array(-1.0), jnp.ones(2))
    assert bool(path.result == gf.RESULTS.wrong_argument)
    assert path.stats.steps == 0


# -- stages ---


class Product(eqx.Module):
    """Σⱼ xⱼ Πᵢ uᵢⱼ, analytic, and steep from a large start."""

    u: jax.Array

    def __call__(self, x):
        return jnp.prod(self.u, 0) @ x


@pytest.mark.slow
@pytest.mark.parametrize("solver", [gf.KKT4(), gf.KKT5()])
def test_smooth_losses_never_slide(solver):
    x, y = jr.normal(jr.key(4), (30, 9)), jr.uniform(jr.key(5), (30,))
    path = gf.simulate(
        gf.GradientFlow(gf.Logistic(x, y)), Product(8 * jr.normal(jr.key(6), (4, 9))),
        weight_decay=0.0, t1=100.0, saves=9, solver=solver,
    )  # fmt: skip
    assert path.stats.sliding == 0


@pytest.mark.slow
def test_the_multiplier_is_solved_for_too():
    """From α = 3e3 a logit changes by far more than θ's tolerance of it: μ, the force,
    may not lag behind."""
    rng = np.random.default_rng(2)
    dim, n, lam, alpha = 12, 5, 1e-3, 3e3
    x = rng.integers(0, 2, (n, dim)) * 2.0 - 1
    y = (x[:, 1] > 0) * 1.0
    sign = 2 * y - 1

    def slope(t, th):
        u, v = np.split(th, 2)
        g = x.T @ (-sign * expit(-sign * (x @ (u * u - v * v)))) / n
        return np.concatenate([-2 * u * g - lam * u, 2 * v * g - lam * v])

    ts = np.concatenate([[0.0], np.geomspace(1e-9, 5e3, 33)])
    start = np.full(dim, alpha / np.sqrt(2 * dim))
    exact = solve_ivp(
        slope, (0, ts[-1]), np.tile(start, 2), method="LSODA", rtol=1e-11,
        atol=1e-13 * alpha, t_eval=ts,
    ).y.T  # fmt: skip
    loss = gf.Logistic(jnp.asarray(x), jnp.asarray(y))
    path = gf.simulate(
        gf.GradientFlow(loss),
        gf.models.DifferenceNetwork(jnp.asarray(start), jnp.asarray(start)),
        weight_decay=lam, ts=jnp.asarray(ts), solver=gf.KKT4(),
    )  # fmt: skip
    assert apart(path, exact) < 2e-5
    np.testing.assert_allclose(path.train_loss, jax.vmap(loss)(path.models), rtol=0.02)


@pytest.mark.slow
def test_curvature_that_the_kernel_leaves_out():
    """An attention layer that cannot fit its data: a few hundred steps, of which
    none slides."""

    class Attend(eqx.Module):
        q: jax.Array
        v: jax.Array

        def __call__(self, x):
            scores = jax.nn.softmax(x @ self.q @ x.T, axis=-1)
            return scores[0] @ (x @ self.v)

    keys = jr.split(jr.key(11), 4)
    x = jr.normal(keys[0], (14, 3, 3))
    y = jnp.cos(x[:, 0, 1]) + 0.3 * jr.normal(keys[1], (14,))
    model = Attend(jr.normal(keys[2], (3, 3)), jr.normal(keys[3], (3,)))
    path = gf.simulate(
        gf.GradientFlow(gf.SquaredError(x, y)), model, weight_decay=1e-5,
        slow_time=2.0, saves=17, rtol=1e-5, solver=gf.KKT4(),
    )  # fmt: skip
    assert path.stats.steps < 350
    assert path.stats.sliding == 0


def test_equal_steps_land_on_equidistant_times():
    """Where the error leaves the step as it is, it ends behind the next of them, not a
    rounding before it, whose remainder would be below the shortest step."""
    controller = Relative(1e-3, dtmin=1e-9).wrap(1)
    y, t0, t1 = jnp.array([1.0, 2.0]), jnp.array(0.3), jnp.array(0.4)
    _, state = controller.init(
        None, t0, jnp.array(9.0), y, jnp.array(0.1), None, None, 5
    )
    step = lambda t0, t1, error: controller.adapt_step_size(
        t0, t1, y, y, None, 1e-3 * error * y, 5, state
    )
    keep, start, end, _, _, result = step(t0, t1, 0.9)
    assert keep and result == diffrax.RESULTS.successful
    assert 0 < float(end - (start + (t1 - t0))) < 1e-14
    keep, *_, result = step(t0, t0 + 1e-12, 0.0)
    assert keep and result == diffrax.RESULTS.successful
    keep, *_, result = step(t0, t0 + 2e-9, 1e9)
    assert not keep and result == diffrax.RESULTS.dt_min_reached


def test_error_of_one_large_coordinate():
    """The mean over 100 coordinates forgives it by a factor of ten; its share in ‖θ‖
    does not."""
    controller = Relative(1e-3, dtmin=1e-9).wrap(1)
    y = jnp.full(100, 1e-3).at[0].set(1.0)
    t0, t1 = jnp.array(0.0), jnp.array(0.1)
    _, state = controller.init(None, t0, t1, y, jnp.array(0.1), None, None, 5)
    kept = lambda error: controller.adapt_step_size(
        t0, t1, y, y, None, jnp.zeros(100).at[0].set(error), 5, state
    )[0]
    assert kept(0.9e-3) and not kept(1.1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "bound"), [(gf.KKT4(), 10), (gf.KKT5(), 5), (gf.RKC2(), 5)]
)
def test_decay_with_jumps_of_the_curvature(solver, bound):
    """All of θ decays as e^{−λt}, to e⁻²⁰, under a Huber loss, which is flat here. The
    errors of 20 factors of e add up; those of KKT4 are larger than it sees."""
    x, rtol = jnp.zeros((3, 4)), 3e-4
    loss = gf.Huber(x, jnp.zeros(3), delta=0.5)
    model = gf.models.LinearModel(jnp.array([1.0, -2.0, 0.5, 3.0]))
    path = gf.simulate(
        gf.GradientFlow(loss), model, weight_decay=4.0, t1=5.0, saves=5, rtol=rtol,
        solver=solver,
    )  # fmt: skip
    (start,) = jax.tree.leaves(model)
    (found,) = jax.tree.leaves(path.params)
    exact = start[None] * jnp.exp(-4.0 * path.t)[:, None]
    gaps = jnp.linalg.norm(found - exact, axis=1) / jnp.linalg.norm(exact, axis=1)
    assert float(gaps.max()) < bound * rtol


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "bound"), [(gf.RKC2(), 5), (diffrax.Tsit5(), 20)])
def test_many_jumps_of_the_curvature(solver, bound):
    """Thirty residuals come under Huber's threshold, of which an explicit solver sees
    nothing. Measured 7 (RKC2) and 150 rtol (Tsit5) with the tolerance it was given."""
    x, y = jr.normal(jr.key(3), (30, 3)), 3 * jr.normal(jr.key(4), (30,))
    flow = gf.GradientFlow(gf.Huber(x, y, delta=0.3, reduction="sum"))
    model = gf.models.LinearModel(jnp.array([4.0, -5.0, 3.0]))
    ts = jnp.concatenate([jnp.zeros(1), jnp.geomspace(1e-2, 20, 17)])
    run = functools.partial(gf.simulate, flow, model, weight_decay=1e-2, ts=ts)
    exact = flat(run(solver=diffrax.Dopri8(), rtol=1e-11))
    assert apart(run(solver=solver, rtol=1e-6), exact) < bound * 1e-6


class Rough(eqx.Module):
    """Smooth in w, but for rounding, in steps of 1e-5; or with a kink."""

    w: jax.Array
    kink: bool = eqx.field(static=True)

    def __call__(self, x):
        z = x @ self.w
        return jax.nn.relu(z) if self.kink else (100 + jnp.tanh(z)) - 100


@pytest.mark.parametrize("kink", [False, True])
def test_rounding_is_no_jump(kink):
    """Halving the way between two points leaves the steps of rounding as they are, as
    it leaves a jump; but there are as large ones beside them."""
    x = jnp.eye(2, dtype=jnp.float32)
    model = Rough(jnp.array([-1e-3, 0.3], jnp.float32), kink)
    loss = gf.SquaredError(x, jnp.ones(2, jnp.float32))
    theta, loss = flatten(loss, *eqx.partition(model, eqx.is_array))
    there = theta + jnp.array([3e-3, 1e-3], jnp.float32)
    mu = jnp.ones(2, jnp.float32)
    assert bool(find_jumps(loss, theta, there, mu, jnp.array(True))) is kink
    assert not find_jumps(loss, theta, there, mu, jnp.array(False))


def test_what_is_written_with_a_maximum_may_be_smooth():
    theta = jnp.array([1.0, -2.0])
    kinked = lambda fn: may_have_kinks(
        *flatten(gf.Loss(lambda w: jnp.sum(fn(w))), theta, None)[::-1]
    )
    assert not any(map(kinked, (jax.nn.softplus, jax.nn.log_sigmoid, jnp.tanh)))
    assert all(map(kinked, (jax.nn.relu, jnp.abs, jax.nn.leaky_relu)))
    variance = lambda w: jnp.var(w, keepdims=True)
    assert not kinked(eqx.nn.LayerNorm(2))
    assert not kinked(lambda w: jnp.maximum(0.0, variance(w)))
    assert kinked(lambda w: jnp.maximum(0.5, variance(w)))
    assert kinked(lambda w: jnp.maximum(0.0, variance(w) - 1))
    assert kinked(lambda w: jnp.maximum(w[:1], variance(w)))


def test_after_a_failed_step_its_length_is_approached_slowly():
    """Half of a step that has no error, then no more than 0.6 of it, which rises by
    5 %, 10 %, 16 % … in a step; without a failure nothing is held back."""
    controller = Relative(1e-3, dtmin=1e-9).wrap(1)
    y, t = jnp.array([1.0, 2.0]), jnp.array(0.0)
    _, state = controller.init(
        None, t, jnp.array(9.0), y, jnp.array(1.0), None, None, 5
    )

    def step(t, end, error, state):
        keep, start, end, _, state, _ = controller.adapt_step_size(
            t, end, y, y, None, error * y, 5, state
        )
        return bool(keep), start, end, state

    free = step(t, jnp.array(1.0), 1e-9, state)
    assert free[0] and float(free[2] - free[1]) > 5
    kept, t, end, state = step(t, jnp.array(1.0), jnp.inf, state)
    assert not kept and float(end - t) == 0.5
    for rises in (1, 3, 6, 10):
        kept, t, end, state = step(t, end, 1e-9, state)
        assert kept
        np.testing.assert_allclose(end - t, 0.6 * 1.05**rises)
    for _ in range(20):
        kept, t, end, state = step(t, end, 1e-9, state)
    assert end - t > 1e3


def test_an_error_that_grows_is_expected_to_grow_on():
    """Its ψ in ψhᵏ has grown by (a/b)ᵏ in a step: then the next is shorter than the
    error alone has it. Not so where ψ falls, nor after a step that was cut short."""
    controller = Relative(1e-3, dtmin=1e-9).wrap(1)
    y, t, order = jnp.array([1.0, 1.0]), jnp.array(0.0), 5
    _, state = controller.init(
        None, t, jnp.array(9.0), y, jnp.array(1.0), None, None, order
    )

    def step(h, error, state):
        """Whether it is kept, and the length of the next."""
        keep, start, end, _, state, _ = controller.adapt_step_size(
            t, t + h, y, y, None, 1e-3 * error * y, order, state
        )
        return bool(keep), float(end - start), state

    usual = 0.9 * 0.5 ** (-1 / order)
    kept, a, state = step(1.0, 0.5, state)
    assert kept and a == pytest.approx(usual)
    kept, following, state = step(a, 0.5, state)
    assert kept and following == pytest.approx(usual * a)
    kept, b, state = step(following, 2.0, state)
    assert not kept and b < 0.9 * a
    kept, following, _ = step(b, 0.5, state)
    assert kept and following == pytest.approx(usual * b * b / a)
    kept, following, _ = step(0.9 * b, 0.5, state)
    assert kept and following == pytest.approx(usual * 0.9 * b)
