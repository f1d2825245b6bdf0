"""Runs that end when a criterion holds: where, and what is told of it."""

import dataclasses

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import Linear, Product
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from scipy.integrate import solve_ivp
from scipy.optimize import brentq
from shared_problems import LAMS, study, task

import gradflow as gf
from gradflow.runs.descent import prepare_descent
from gradflow.runs.integrate import Integration
from gradflow.runs.methods import scheduled
from gradflow.runs.path import slid
from gradflow.runs.solve import Solve, solve_part
from gradflow.runs.steps import descend_part
from gradflow.runs.until import as_criterion

# F = ½(w₁ − 1)² + ½(w₂/10 − 2)², and a third weight that is in no output.
ROWS = 2**0.5 * jnp.array([[1.0, 0.0, 0.0], [0.0, 0.1, 0.0]])
LOSS = gf.SquaredError(ROWS, 2**0.5 * jnp.array([1.0, 2.0]))
FLOW = gf.GradientFlow(LOSS)
MODEL = Linear(jnp.array([3.0, 5.0, 1.0]))
CURVATURE, PULL = np.array([1.0, 0.01, 0.0]), np.array([1.0, 0.2, 0.0])
LAM = 1e-2


def weights(t, lam=LAM):
    """w(t) in closed form."""
    rate = CURVATURE + lam
    end = PULL / rate
    return end + (np.asarray(MODEL.w) - end) * np.exp(-rate * t)


def speed(t, lam=LAM):
    return np.linalg.norm(PULL - (CURVATURE + lam) * weights(t, lam))


def force(t, lam=LAM):
    return np.linalg.norm(CURVATURE * weights(t, lam) - PULL)


def first_weight(model):
    return model.w[0]


# It falls from 3 to 1.
WATCH = {"test": gf.Metric(first_weight, threshold=1.2)}


def run(until, *, lam=LAM, t1=1e3, **options):
    options = dict(solver=gf.KKT4(), metrics=WATCH, rtol=1e-8) | options
    return gf.simulate(FLOW, MODEL, weight_decay=lam, t1=t1, until=until, **options)


def root(fn, level, lam=LAM, last=2e3):
    return brentq(lambda t: fn(t, lam) - level, 0, last, xtol=1e-12, rtol=1e-14)


DECAY = diffrax.ODETerm(lambda t, y, args: -y)
BIG_STEPS = diffrax.PIDController(rtol=1e-5, atol=1e-7)


@eqx.filter_jit
def decay(level, within):
    """y' = −y from 1, until y ≤ `level`."""
    whole = Integration(
        DECAY, diffrax.Tsit5(), BIG_STEPS, jnp.array([0.0, 0.1, 5.0, 9.0]), None, 500,
        until=lambda t, y: y <= level, within=within,
    )  # fmt: skip
    return whole.run(whole.begin(jnp.ones(()), jnp.asarray(0.05)))


@pytest.mark.parametrize("within", [1e-3, 1e-9])
def test_a_time_is_bisected(within):
    """To what is asked, from above; and the state is that of one step."""
    for level in (0.97, 0.5, 0.01):
        at = decay(jnp.asarray(level), jnp.asarray(within))
        assert at.landed and at.stopped and at.y <= level and at.t == at.high
        assert at.high - at.low <= within * max(float(at.high), 0.05)
        exact = -np.log(level)
        assert abs(float(at.t) / exact - 1) < within + 1e-4
        place = int(np.sum(float(at.t) >= np.array([0.0, 0.1, 5.0])))
        assert np.isfinite(at.saved[:place]).all() and np.isinf(at.saved[place:]).all()
        # Each halving is one step that is not kept.
        few = 3 + np.log2(1 / within)
        assert at.counts[0] == at.counts[1] + at.counts[2] and int(at.counts[2]) <= few
    never = decay(jnp.asarray(-1.0), jnp.asarray(within))
    assert never.t == 9.0 and not never.landed and not never.stopped
    at_once = decay(jnp.asarray(1.0), jnp.asarray(within))
    assert at_once.landed and at_once.t == 0 and at_once.counts[0] == 0


@eqx.filter_jit
def growth(within):
    whole = Integration(
        diffrax.ODETerm(lambda t, y, args: jnp.ones_like(y)), diffrax.Tsit5(),
        BIG_STEPS, jnp.array([1.0]), None, 500, until=lambda t, y: y > 0, within=within,
    )  # fmt: skip
    return whole.run(whole.begin(jnp.zeros(()), jnp.asarray(1e-3)))


def test_what_comes_at_once_has_no_time_of_its_own():
    """It would be halved down to zero: 1000 times."""
    at = growth(jnp.asarray(1e-7))
    assert at.landed and 0 < at.t <= 1e-10 and at.counts[0] < 40


@pytest.mark.parametrize("tol", [0.1, 1e-3])
def test_a_speed(tol):
    path = run(gf.SteadyState(tol))
    exact = root(speed, tol)
    assert abs(float(path.t[-1]) / exact - 1) < 5e-7
    assert bool(path.result == gf.RESULTS.criterion_met) and bool(path.succeeded)
    # What the last row holds is the model at that time.
    np.testing.assert_allclose(path[-1].w, weights(exact), rtol=1e-6)
    assert (np.diff(path.t) > 0).all() and len(path) == len(path.train_loss) < 65
    assert path.stats.accepted + path.stats.rejected == path.stats.steps
    assert "criterion met at t = " in str(path) and "‖θ'‖ ≤ " in str(path)
    assert repr(path).endswith("criterion met>")


def test_a_speed_in_slow_time_where_it_is_rounding_in_time():
    """Along uv = 1 the difference D = u² − v² falls as e^{−2s}, and the speed, relative
    to ‖θ‖, is D/√(D² + 4). The gradient as it is computed from θ is off by the
    tolerance there, far above λ: it is the multiplier's that is seen."""
    lam, tol = 1e-8, 0.02
    flow = gf.GradientFlow(gf.SquaredError(jnp.ones(1), jnp.ones(1)))
    path = gf.simulate(
        flow, Product(jnp.asarray(2.0), jnp.asarray(0.2)), weight_decay=lam,
        slow_time=5.0, solver=gf.KKT4(), until=gf.SteadyState(tol, slow=True),
        saves=17,
    )  # fmt: skip
    exact = 0.5 * np.log((2**2 - 0.2**2) / (2 * tol / np.sqrt(1 - tol**2)))
    assert float(path.slow_time[-1]) == pytest.approx(exact, rel=1e-5)


def test_a_gradient():
    path = run(gf.SmallGradient(0.15), solver=diffrax.Tsit5())
    assert abs(float(path.t[-1]) / root(force, 0.15) - 1) < 1e-6
    # From there it can be run on.
    more = path.again(Linear(path.params.w[-1]), jnp.array([0.0, 1.0, 50.0]))
    assert bool(more.result == gf.RESULTS.successful) and len(more) == 3
    np.testing.assert_allclose(more[-1].w, weights(float(path.t[-1]) + 50), rtol=1e-6)


def test_where_parameters_have_rates():
    """‖∇F‖ and ‖θ'‖ are those of θ. From w = 3: w' = −g(1 + λ)w."""
    loss = gf.SquaredError(jnp.array([[1.0]]), jnp.array([0.0]))
    flow, model = gf.GradientFlow(loss, rates=4.0), Linear(jnp.array([3.0]))
    rate = 4 * (1 + 0.5)
    for until, left in (
        (gf.SmallGradient(0.1), 0.1),
        (gf.SteadyState(0.1), 0.1 / rate),
        (gf.SteadyState(0.3), 0.3 / rate),
    ):
        path = gf.simulate(
            flow, model, weight_decay=0.5, t1=9.0, until=until, solver=gf.KKT4()
        )
        assert float(path.t[-1]) == pytest.approx(np.log(3 / left) / rate, rel=1e-5)
    still = gf.SteadyState(rate / 0.5 * (1 + 1e-9), slow=True)
    path = gf.simulate(
        flow, model, weight_decay=0.5, t1=9.0, until=still, solver=gf.KKT4()
    )
    assert float(path.t[-1]) == 0
    path = gf.descent(
        flow, model, weight_decay=0.5, learning_rate=0.01, steps=900,
        until=gf.SteadyState(0.1),
    )  # fmt: skip
    steps = np.ceil(np.log(0.1 / rate / 3) / np.log(1 - 0.01 * rate))
    assert int(path.stats.steps) == steps


def test_where_the_weight_decay_changes():
    """λ is that of the time: w' = −(1 + λ)w, λ = 1/(1 + t)."""
    loss = gf.SquaredError(jnp.array([[1.0]]), jnp.array([0.0]))
    flow, model = gf.GradientFlow(loss), Linear(jnp.array([3.0]))
    size = lambda t: 3 * np.exp(-t) / (1 + t)
    speed = lambda t: (1 + 1 / (1 + t)) * size(t)
    path = gf.simulate(
        flow, model, weight_decay=lambda t: 1 / (1 + t), t1=9.0, solver=gf.KKT4(),
        until=gf.SteadyState(0.1),
    )  # fmt: skip
    end = brentq(lambda t: speed(t) - 0.1, 0, 9)
    assert float(path.t[-1]) == pytest.approx(end, rel=1e-5)
    assert float(path.slow_time[-1]) == pytest.approx(np.log1p(end), rel=1e-5)
    assert np.isfinite(path.slow_time).all()


def test_a_metric():
    path = run("test")
    exact = root(lambda t, lam: weights(t, lam)[0], 1.2)
    assert abs(float(path.t[-1]) / exact - 1) < 1e-7
    values = np.asarray(path.metrics["test"])
    assert values[-1] <= 1.2 and (values[:-1] > 1.2).all()
    assert values[-1] == pytest.approx(1.2, abs=1e-6)
    assert path.crossing_time("test") == float(path.t[-1])
    # What is compiled for one threshold serves another, and horizons above it.
    higher = run(
        "test", metrics={"test": gf.Metric(first_weight, threshold=1.5)}, t1=9.0
    )
    exact = root(lambda t, lam: weights(t, lam)[0], 1.5)
    assert abs(float(higher.t[-1]) / exact - 1) < 1e-6
    # From the start; and never.
    early = run("test", metrics={"test": gf.Metric(first_weight, threshold=3.0)})
    assert early.t.tolist() == [0.0] and early.stats.steps == 0 and bool(early.met)
    assert "met at t = 0" in str(early) and early.crossing_time("test") == 0
    assert "It held from the start." in str(early)
    assert "from the start" not in str(higher)
    with pytest.raises(ValueError, match=r"^name: expected one of 'test', got 'tset'"):
        early.crossing_time("tset")
    with pytest.raises(ValueError, match=r"^name: there is none to choose, got 'test'"):
        dataclasses.replace(early, watched={}).crossing_time("test")
    assert np.isnan(early.slow_speed)
    late = run("test", metrics={"test": gf.Metric(first_weight, threshold=0.5)})
    assert bool(late.result == gf.RESULTS.successful) and len(late) == 65
    assert "criterion not met: test past its threshold" in str(late)
    assert float(late.t[-1]) == 1e3 and np.isnan(late.crossing_time("test"))


def test_the_loss_as_it_is_recorded():
    """By a KKT solver it is computed from the multiplier."""
    flow = gf.GradientFlow(LOSS, penalty=0.1 * gf.L2())
    watch = {"train": gf.Metric(LOSS, threshold=0.1)}
    path = gf.simulate(
        flow, MODEL, weight_decay=LAM, t1=1e3, until="train", metrics=watch,
        solver=gf.KKT4(),
    )  # fmt: skip
    assert (np.asarray(path.train_loss) <= 0.1).tolist() == [False] * (
        len(path) - 1
    ) + [True]
    np.testing.assert_array_equal(path.metrics["train"], path.train_loss)


def low(model):
    return model.w[0] < 1.2


@pytest.mark.parametrize(
    "solver",
    [
        gf.RKC2(),
        pytest.param(gf.KKT5(), marks=pytest.mark.slow),
        pytest.param(diffrax.Kvaerno5(), marks=pytest.mark.slow),
        pytest.param(None, marks=pytest.mark.slow),
    ],
)
def test_a_function_of_the_model(solver):
    path = run(low, solver=solver, rtol=1e-6)
    w = weights(float(path.t[-1]))
    assert abs(w[0] - 1.2) < 5e-6 * np.linalg.norm(w)
    assert bool(path.met) and path.stats.until == "low(model)"


def test_what_has_no_start_has_no_end():
    """Whatever the criterion says there."""
    flow = gf.GradientFlow(gf.Loss(lambda model: jnp.sum(jnp.log(model.w))))
    path = gf.simulate(
        flow, Linear(-jnp.ones(3)), weight_decay=LAM, t1=1.0, throw=False,
        until=lambda model: jnp.array(True), solver=diffrax.Tsit5(),
    )  # fmt: skip
    assert bool(path.result == gf.RESULTS.undefined_start) and not bool(path.met)
    assert len(path) == 65 and "criterion" not in str(path)


def test_one_program():
    """Under jit and vmap the end is repeated, and each lane has its own."""

    @eqx.filter_jit
    @eqx.filter_vmap
    def many(lam):
        return run(gf.SteadyState(0.1), lam=lam, saves=9, solver=diffrax.Tsit5())

    lams = np.array([1e-2, 1e-1, 1e-3])
    paths = many(jnp.asarray(lams))
    assert paths.t.shape == (3, 9) and bool(paths.met.all())
    for lam, t, w, value in zip(
        lams, paths.t, paths.params.w, paths.metrics["test"], strict=True
    ):
        exact = root(speed, 0.1, lam)
        assert abs(float(t[-1]) / exact - 1) < 1e-6
        after = np.asarray(t) == t[-1]
        assert after.sum() > 1 and (np.diff(t) >= 0).all()
        expected = np.stack([weights(each, lam) for each in np.asarray(t)])
        np.testing.assert_allclose(w, expected, rtol=1e-6)
        np.testing.assert_array_equal(w[after], w[-1:].repeat(after.sum(), axis=0))
        np.testing.assert_array_equal(value, w[:, 0])
        # Interpolating and crossing times take repeated ends.
        assert np.interp(2 * exact, t, value) == value[-1]
        level = gf.Metric(first_weight, threshold=float(value[-1]))
        assert gf.crossing_time(t, value, level) == pytest.approx(float(t[-1]))


def test_is_not_differentiated():
    with pytest.raises(ValueError, match=r"^until: a run that a criterion ends has no"):
        run(low, solver=diffrax.Tsit5(), adjoint=diffrax.ForwardMode())
    with pytest.raises(ValueError, match=r"^until: a run"):
        jax.grad(lambda lam: run(low, lam=lam, solver=diffrax.Tsit5()).train_loss[-1])(
            LAM
        )


@pytest.mark.parametrize(
    "until, told",
    [
        (3.0, "expected the name of a metric, a function of the model, .* got 3.0"),
        (gf.SteadyState, "expected the name of a metric, .* got the class SteadyState"),
        ("train", r"expected one of the metrics \['test', 'bare'\], got 'train'"),
        ("bare", "the metric 'bare' has no threshold"),
        (first_weight, r"expected one boolean of the model, got float64 of shape \(\)"),
        (lambda m: m.w < 1, r"expected one boolean of the model, got bool of shape"),
        (lambda m: None, "expected one boolean of the model, got NoneType"),
        (lambda m: float(m.w[0]) < 1, "expected a function .* that JAX can trace"),
    ],
)
def test_what_is_no_criterion(until, told):
    watch = WATCH | {"bare": gf.Metric(first_weight)}
    with pytest.raises(ValueError, match=f"^until: {told}"):
        as_criterion(until, *FLOW.term(MODEL), watch)


@pytest.mark.parametrize("kind", [gf.SmallGradient, gf.SteadyState])
def test_tolerances(kind):
    for wrong in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="^tol: expected a finite number, 0 or"):
            kind(wrong)
    assert kind(0.0).tol.dtype == jnp.float64 and kind(0.5).words.endswith("≤ 0.5")
    told = []
    jax.jit(lambda x: [told.append(kind(tol).words) for tol in (x, 0.5)] and x)(1.0)
    assert [words.rpartition(" ")[2] for words in told] == ["tol", "0.5"]


def test_a_threshold_in_single_precision():
    """What passes in float32 passes as it is recorded."""
    term, params = gf.GradientFlow(LOSS).term(Linear(jnp.ones(3, jnp.float32)))
    for higher in (False, True):
        metric = gf.Metric(first_weight, threshold=0.9, higher_is_better=higher)
        found = as_criterion("test", term, params, {"test": metric})
        level = float(found.level)
        assert found.level.dtype == jnp.float32 and level != 0.9
        assert level >= 0.9 if higher else level <= 0.9
        assert abs(level - 0.9) < 1e-7


def descend(until, **options):
    options = dict(learning_rate=0.1, steps=400, metrics=WATCH, saves=9) | options
    return gf.descent(FLOW, MODEL, weight_decay=LAM, until=until, **options)


def by_hand(rate, most=400):
    """The number of the first step after which w₁ ≤ 1.2."""
    w = np.asarray(MODEL.w)
    for i in range(most):
        if w[0] <= 1.2:
            return i, w
        w = w - rate(i) * ((CURVATURE + LAM) * w - PULL)
    raise AssertionError


def test_a_descent():
    """It has the number of the step that a loop in Python has."""
    for rate in (0.1, 0.013):
        path = descend("test", learning_rate=rate)
        number, w = by_hand(lambda i, rate=rate: rate)
        assert int(path.stats.steps) == number and bool(path.met)
        assert float(path.t[-1]) == rate * number
        np.testing.assert_allclose(path[-1].w, w, rtol=1e-12)
        assert (np.diff(path.t) > 0).all() and path.metrics["test"][-1] <= 1.2
        assert path.crossing_time("test") == float(path.t[-1])
    assert f"{number} steps of 0.013" in str(path) and "criterion met" in str(path)
    never = descend("test", learning_rate=1e-4)
    assert never.stats.steps == 400 and bool(never.result == gf.RESULTS.successful)
    assert len(never) == 9 and "criterion not met" in str(never)
    at = descend("test", steps=None, at=[5, 20, 100, 300])
    number, _ = by_hand(lambda i: 0.1)
    np.testing.assert_allclose(at.t, 0.1 * np.array([5, 20, number]), rtol=1e-14)


def test_a_descent_on_a_schedule():
    """Its time is the sum of its steps up to the end."""
    schedule = optax.cosine_decay_schedule(0.02, 400)
    path = descend("test", learning_rate=schedule)
    number, w = by_hand(lambda i: 0.01 * (1 + np.cos(np.pi * i / 400)))
    exact = sum(0.01 * (1 + np.cos(np.pi * i / 400)) for i in range(number))
    assert int(path.stats.steps) == number > 50
    np.testing.assert_allclose(path[-1].w, w, rtol=1e-12)
    assert float(path.t[-1]) == pytest.approx(exact, rel=1e-12)
    assert float(path.stats.learning_rate) == pytest.approx(exact / number)
    # Over several blocks, from a saved step and from the start.
    long = scheduled(lambda i: 1.0 + 0 * i, np.array([3000, 10_000]), float)
    numbers = jnp.array([3000, 10_000])
    for steps in (0, 7, 2999, 3000, 3001, 8000, 10_000):
        assert float(long.time(jnp.asarray(steps), numbers)) == steps


def test_a_descent_by_minibatches():
    """The metric is that of the model, whatever the minibatch."""
    watch = {"train": gf.Metric(LOSS, threshold=1.1)}
    some = dict(batch_size=1, key=jr.key(0), metrics=watch)
    every = descend(None, steps=None, at=list(range(60)), **some)
    path = descend("train", steps=60, **some)
    first = int(np.flatnonzero(np.asarray(every.train_loss) <= 1.1)[0])
    assert int(path.stats.steps) == first > 2
    np.testing.assert_array_equal(path[-1].w, every[first].w)


def test_words_are_kept(tmp_path):
    path = descend("test")
    gf.save(tmp_path / "path.npz", path)
    read = gf.load(tmp_path / "path.npz")
    assert str(read) == str(path) and bool(read.met)
    assert read.crossing_time("test") == path.crossing_time("test")
    data = path.to_xarray()
    assert int(data.result) == 32 and data.sizes["time"] == len(path)
    start = descend("test", metrics={"test": gf.Metric(first_weight, threshold=4.0)})
    for one in (path, start):
        axes = one.plot()
        axes.figure.canvas.draw()
        axes.figure.clear()


def test_one_that_slid():
    """The result can say one thing only; how exact it is must not be lost."""
    path = descend("test").told(sliding=jnp.asarray(0))
    assert not slid(path)
    path = path.told(sliding=jnp.asarray(3))
    assert slid(path) and "WARNING: The run reached its end, but slid" in str(path)
    path = dataclasses.replace(path, result=gf.RESULTS.successful)
    assert not slid(path)
    assert slid(dataclasses.replace(path, result=gf.RESULTS.slid))


def small(seed):
    task = gf.tasks.linear_regression(jr.key(seed), samples=3, dim=6)
    level = 0.1 if seed else 0.0015
    watch = {"train": gf.Metric(task.loss, threshold=level)}
    return task.flow, task.model, watch


def many(until, path=None, steps=60):
    """Descents, whose lanes end at steps of their own."""
    return gf.sweep(
        small, axes={"seed": [0, 1]}, weight_decay=[0.1, 0.01], until=until, saves=5,
        run=gf.Descent(learning_rate=0.02, steps=steps), progress=False, store=path,
    )  # fmt: skip


def test_lanes_of_descents():
    sweep = many("train")
    for i, path in enumerate(sweep):
        seed, lam = np.unravel_index(i, sweep.shape)
        flow, model, watch = small(int(seed))
        alone = gf.descent(
            flow, model, weight_decay=[0.1, 0.01][lam], learning_rate=0.02, steps=60,
            saves=5, metrics=watch, until="train",
        )  # fmt: skip
        np.testing.assert_allclose(path.t, alone.t, rtol=1e-14)
        np.testing.assert_allclose(path.train_loss, alone.train_loss, rtol=1e-12)
        assert int(path.stats.steps) == int(alone.stats.steps)
        assert bool(path.met) == bool(alone.met)
        assert sweep.t[i, -1] == path.t[-1] and sweep.padded(i).t.shape == (5,)
        assert path.stats.until == "train past its threshold"
    met = np.asarray(sweep.paths.met)
    assert met.any() and not met.all() and bool(sweep.succeeded.all())
    assert f"criterion met in {met.sum()} of 4: train past its threshold" in str(sweep)
    assert "  met at t = " in str(sweep) and "  not met" in str(sweep)


def test_a_store_of_lanes(tmp_path):
    sweep, stored = many("train"), many("train", tmp_path / "sweep.zarr")
    np.testing.assert_array_equal(stored.t, sweep.t)
    assert str(stored) == str(sweep) and len(stored[0]) == len(sweep[0])
    assert (stored.result == sweep.result).all()
    np.testing.assert_array_equal(
        stored.crossing_time("train"), sweep.crossing_time("train")
    )
    again = many("train", tmp_path / "sweep.zarr")
    np.testing.assert_array_equal(again.t, sweep.t)
    # Another criterion is another sweep; so is another function.
    for other in (None, gf.SteadyState(0.1), low):
        with pytest.raises(ValueError, match=r"holds another sweep:\n  until: train"):
            many(other, tmp_path / "sweep.zarr")


def test_a_function_tells_stores_apart(tmp_path):
    def make(level):
        return lambda model: jnp.sum(model.weights**2) < level

    many(make(1.0), tmp_path / "sweep.zarr")
    many(make(1.0), tmp_path / "sweep.zarr")
    with pytest.raises(ValueError, match=r"until.with.level: 1.0 there, 2.0 here"):
        many(make(2.0), tmp_path / "sweep.zarr")


def test_a_lane_without_the_metric():
    with pytest.raises(ValueError, match="^until: expected one of the metrics"):
        many("test")


@pytest.mark.parametrize("batch", ["loop", "vmap"])
def test_lanes_of_flows(batch):
    lams = [1e-1, 1e-2, 1e-5]
    sweep = gf.sweep(
        FLOW, MODEL, weight_decay=lams, t1=50.0, until=gf.SteadyState(0.05), rtol=1e-7,
        solver=diffrax.Tsit5(), batch=batch, saves=9, progress=False, metrics=WATCH,
        throw=True,
    )  # fmt: skip
    assert sweep.t.shape == (3, 9) and np.isfinite(sweep.t).all()
    for path, lam in zip(sweep, lams, strict=True):
        exact = root(speed, 0.05, lam)
        assert bool(path.met) == (exact < 50)
        assert abs(float(path.t[-1]) / min(exact, 50.0) - 1) < 1e-6
    # The flow of a lane is run again to its crossing, whatever ended it.
    exact = root(lambda t, lam: weights(t, lam)[0], 1.2, 1e-2)
    assert sweep.crossing_time("test")[1] == pytest.approx(exact, rel=1e-6)
    ax = sweep.plot()
    ax.figure.clear()


class Net(eqx.Module):
    """⟨a, tanh(Bx)⟩."""

    a: Float[Array, " k"]
    b: Float[Array, "k d"]

    def __call__(self, x):
        return self.a @ jnp.tanh(self.b @ x)


def test_a_net_against_scipy():
    """Its events are found on a path at a far tighter tolerance."""
    kx, ky, ka, kb, kt = jr.split(jr.key(5), 5)
    y = jr.normal(ky, (6,))
    loss, test = (gf.SquaredError(jr.normal(k, (6, 3)), y) for k in (kx, kt))
    net = Net(jr.normal(ka, (8,)), jr.normal(kb, (8, 3)))
    lam, flow = 1e-2, gf.GradientFlow(loss)
    term, params = flow.term(net)
    theta, unravel = ravel_pytree(params)
    velocity = jax.jit(lambda th: ravel_pytree(term.velocity(unravel(th), lam))[0])
    seen = jax.jit(lambda th: test(term.model(unravel(th))))
    level = 0.8 * float(seen(theta))

    def event(t, th):
        return float(seen(th)) - level

    event.terminal = True
    exact = solve_ivp(
        lambda t, th: np.asarray(velocity(th)), (0, 300), np.asarray(theta),
        method="DOP853", rtol=1e-11, atol=1e-12, events=event,
    )  # fmt: skip
    (at,) = exact.t_events[0]
    path = gf.simulate(
        flow, net, weight_decay=lam, t1=300.0, rtol=1e-7, solver=gf.KKT4(), saves=33,
        metrics={"test": gf.Metric(test, threshold=level)}, until="test",
    )  # fmt: skip
    assert float(path.t[-1]) == pytest.approx(at, rel=1e-6)
    end = ravel_pytree(path[-1])[0]
    np.testing.assert_allclose(end, exact.y_events[0][0], rtol=0, atol=1e-6)


def caught(model):
    return model.w[1] == 0


@pytest.mark.slow
def test_along_a_kink():
    """Of ℓ1: θ' = y − θ − λ sign θ until a coordinate is caught at zero, and it has no
    speed from there on."""
    y, start, lam = np.array([2.0, 0.1]), np.array([1.0, 3.0]), 0.5
    flow = gf.GradientFlow(
        gf.SquaredError(jnp.eye(2), jnp.asarray(y), reduction="sum"), penalty=gf.L1()
    )
    options = dict(weight_decay=lam, t1=50.0, solver=gf.KKT4(), saves=9)
    model = Linear(jnp.asarray(start))
    path = gf.simulate(flow, model, until=caught, **options)
    exact = np.log((start[1] - y[1] + lam) / (lam - y[1]))
    assert float(path.t[-1]) == pytest.approx(exact, rel=1e-5) and path[-1].w[1] == 0
    # ‖θ'‖ = |y₁ − λ − 1| e^{−t}: the force on the other, which is held, is no speed.
    path = gf.simulate(flow, model, until=gf.SteadyState(0.02), **options)
    assert float(path.t[-1]) == pytest.approx(np.log(0.5 / 0.02), abs=2e-4)


def in_parts(part, whole, counts):
    """The path by parts of so many steps."""
    state, ended, number = None, False, 0
    while not ended:
        path, state, ended = part(whole, state, jnp.asarray(counts[number % 2]))
        number += 1
    return path, number


@pytest.mark.parametrize("kind", ["flow", "descent"])
def test_in_parts(kind):
    """Also where a part ends within a bisection."""
    term, params = FLOW.term(MODEL)
    until = as_criterion("test", term, params, WATCH)
    if kind == "flow":
        ts = jnp.concatenate([jnp.zeros(1), jnp.geomspace(0.1, 1e3, 8)])
        given = dict(rtol=1e-6, max_steps=1000, until=until)
        lam = jnp.asarray(LAM)
        whole = Solve.of(term, params, lam, ts, WATCH, diffrax.Tsit5(), **given)
        part = solve_part
    else:
        whole = prepare_descent(
            FLOW, MODEL, WATCH, until, weight_decay=LAM, learning_rate=0.01, steps=400,
            saves=9, slow_time=None, t1=None, at=None, init_scale=1.0, batch_size=None,
            method="subgradient", optimiser=None, key=None,
        )  # fmt: skip
        part = descend_part
    one, number = in_parts(part, whole, [10_000, 10_000])
    assert number == 1 and bool(one.met)
    few, number = in_parts(part, whole, [7, 4])
    assert number > 3 and few.t.shape == one.t.shape
    np.testing.assert_array_equal(few.t, one.t)
    np.testing.assert_array_equal(few.params.w, one.params.w)
    assert (few.result == one.result) and few.stats.steps == one.stats.steps


def test_many_windows():
    """Times beyond those of one program."""
    ts = jnp.linspace(0.0, 100.0, 201)
    path = run("test", t1=None, ts=ts)
    exact = root(lambda t, lam: weights(t, lam)[0], 1.2)
    rows = int(np.sum(np.asarray(ts) < exact))
    assert len(path) == rows + 1 and float(path.t[-1]) == pytest.approx(exact, rel=5e-7)
    np.testing.assert_array_equal(path.t[:-1], ts[:rows])
    # w₁ ends at 1/1.01; it is a millionth above that in the third window of four.
    level = 1 / 1.01 + 1e-6 * (3 - 1 / 1.01)
    watch = {"test": gf.Metric(first_weight, threshold=level)}
    late = run("test", t1=None, ts=ts * 0.2, metrics=watch)
    exact = np.log(1e6) / 1.01
    assert 129 < len(late) < 195 and bool(late.met)
    np.testing.assert_array_equal(late.t[:-1], 0.2 * ts[: len(late) - 1])
    for t, w in zip(np.asarray(late.t), late.params.w, strict=True):
        np.testing.assert_allclose(w, weights(t), rtol=1e-7)
    # (Where it falls by 1e-6 in a unit of time, the error of the weight is seen.)
    assert float(late.t[-1]) == pytest.approx(exact, abs=0.05)


@pytest.mark.slow
def test_lanes_that_end_are_compared():
    """Up to their ends."""
    here = task()
    options = dict(solver=gf.KKT5(), rtol=1e-8, slow_time=3.0, metrics=here.metrics)
    _, theory, report = study()
    sweep = gf.sweep(
        here.flow, here.model, weight_decay=LAMS, progress=False,
        until=gf.SteadyState(0.7, slow=True), **options,
    )  # fmt: skip
    assert bool(sweep.paths.met.all()) and float(sweep.slow_time.max()) < 2.5
    found = gf.compare(sweep, theory)
    assert found.orders[1].error.shape == sweep.t.shape
    assert np.isfinite(found.orders[1].sup).all()
    assert (found.orders[1].sup <= report.orders[1].sup * (1 + 1e-6)).all()
    assert found.orders[1].rate.exponent == pytest.approx(1.0, abs=0.1)
    assert "met at t" in str(sweep) and str(found)
    found.plot()
