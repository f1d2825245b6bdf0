"""Descent in steps that are not small, as a flow: against the descent, step by step."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from numpy.testing import assert_allclose
from scipy.integrate import solve_ivp

import gradflow as gf
from gradflow.flow.finite_steps import Alternating, begin_steps
from gradflow.flow.vector import on_vector
from gradflow.results import CODES, codes
from gradflow.solvers.controllers import Alongside, Relative

DECAY, PULL = 1e-3, 0.02


class Valley(eqx.Module):
    w: Float[Array, "4"]


def sharpening(model):
    """A valley along y, of sharpness y (1 − cos x has the curvature of one), down which
    it becomes sharper all the time; and apart from it, a factorisation ab = 1."""
    x, y, a, b = model.w
    return y * (1 - jnp.cos(x)) - PULL * y + 0.5 * (a * b - 1) ** 2


FLOW = gf.GradientFlow(gf.Loss(sharpening))


def slope(w):
    """Of the same and its penalty, by hand."""
    x, y, a, b = w
    left = a * b - 1
    force = [y * np.sin(x), 1 - np.cos(x) - PULL, left * b, left * a]
    return np.array(force) + DECAY * w


def steps_of(w, h, count):
    out = [w]
    for _ in range(count):
        out.append(out[-1] - h * slope(out[-1]))
    return np.array(out)


SMOOTH = np.array([-1, 0, 9, 16, 9, 0, -1]) / 32


def mean_at(values, k):
    """What is smooth in a sequence, at number k."""
    return SMOOTH @ np.asarray(values)[k - 3 : k + 4]


@eqx.filter_jit
def lanes(w, rates, ts, **options):
    """One program for the tests below: three rates, each through three times."""

    def one(h, ts):
        return gf.simulate(
            FLOW, Valley(w), weight_decay=DECAY, learning_rate=h, ts=ts, throw=False,
            solver=diffrax.Tsit5(), rtol=1e-9, **options,
            metrics={"height": lambda m: m.w[0] ** 2},
        )  # fmt: skip

    return eqx.filter_vmap(one)(rates, ts)


@pytest.fixture(scope="module")
def small():
    """Rates that are halved, to t = 4, and the descents."""
    start, counts = np.array([0.3, 0.5, 1.3, 0.3]), np.array([1600, 3200, 6400])
    rates = 4.0 / counts
    ts = np.outer(np.ones(3), [1.0, 2.0, 4.0])
    ends = [steps_of(start, h, n)[-1] for h, n in zip(rates, counts, strict=True)]
    return start, lanes(jnp.asarray(start), jnp.asarray(rates), jnp.asarray(ts)), ends


@pytest.fixture(scope="module")
def edge():
    """Rates whose descents come to the edge of stability, and stay there."""
    start, rates = np.array([0.1, 3.9, 1.3, 0.3]), np.array([0.5, 0.55, 0.6])
    numbers = np.array([8, 400, 1500])
    ts = rates[:, None] * numbers
    paths = lanes(jnp.asarray(start), jnp.asarray(rates), jnp.asarray(ts))
    return rates, numbers, paths, [steps_of(start, h, 1600) for h in rates]


def slopes(errors):
    return np.log2(np.divide(errors[:-1], errors[1:]))


def test_reduces_to_the_flow_to_order_one_and_to_the_descent_to_order_two(small):
    start, paths, ends = small
    assert paths.succeeded.all()
    exact = solve_ivp(lambda t, w: -slope(w), (0, 4), start, rtol=1e-11, atol=1e-12)
    last = paths.params.w[:, -1]
    flow = [np.linalg.norm(w - exact.y[:, -1]) for w in last]
    missed = [np.linalg.norm(w - end) for w, end in zip(last, ends, strict=True)]
    assert_allclose(slopes(flow), 1.0, atol=0.02)
    assert_allclose(slopes(missed), 2.0, atol=0.15)
    told = paths.stats.deviation * np.linalg.norm(last, axis=1)
    assert np.all((told > 0.5 * np.array(missed)) & (told < 10 * np.array(missed)))


def test_edge_of_stability(edge):
    """Sharpness, path, and loss over two steps; far from what they are at w."""
    rates, numbers, paths, descents = edge
    assert paths.succeeded.all() and np.all(paths.stats.deviation < 0.02)
    for i, h in enumerate(rates):
        w, k = descents[i], numbers[-1]
        here = paths.params.w[i, -1]
        assert_allclose(here, mean_at(w, k), rtol=1e-3, atol=1e-6)
        # Of y (1 − cos x), over x = ±ρ.
        rho = paths.metrics["height"][i, -1] ** 0.5
        assert_allclose(here[1] * np.sinc(rho / np.pi) + DECAY, 2 / h, rtol=2e-3)
        losses = [float(sharpening(Valley(v))) for v in w[k - 3 : k + 4]]
        assert_allclose(paths.train_loss[i, -1], SMOOTH @ losses, rtol=5e-3)
        assert abs(sharpening(Valley(here)) - SMOOTH @ losses) > 0.05
        penalties = mean_at(0.5 * np.sum(w**2, axis=1), k)
        assert_allclose(paths.penalty[i, -1], penalties, rtol=1e-4)


def test_first_steps_are_those_of_the_descent(edge):
    rates, numbers, paths, descents = edge
    for i in range(len(rates)):
        early = descents[i][numbers[0]]
        assert_allclose(paths.params.w[i, 0], early, rtol=1e-12, atol=1e-14)
        assert_allclose(paths.train_loss[i, 0], sharpening(Valley(early)), rtol=1e-12)


def test_what_no_flow_follows_is_named(edge):
    """One lane at the edge, one of steps too long, one that leaves it; in lockstep."""
    rates = np.array([0.6, 0.8, 2.5])
    ts = rates[:, None] * edge[1]
    start = jnp.array([0.1, 3.9, 1.3, 0.3])
    paths = lanes(start, jnp.asarray(rates), jnp.asarray(ts))
    names = ["successful", "coarse", "overshot"]
    assert codes(paths.result).tolist() == [CODES[name] for name in names]
    assert paths.stats.deviation[1] > 0.05
    alone = edge[2].params.w[2]
    assert_allclose(paths.params.w[0], alone, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_no_flow_is_no_lack_of_steps(edge):
    """Whose steps are used up: one at the edge, one of steps too long, one far up."""
    rates = np.array([0.6, 0.8, 2.5])
    ts = rates[:, None] * edge[1]
    start = jnp.array([0.1, 3.9, 1.3, 0.3])
    run = lambda most: lanes(start, jnp.asarray(rates), jnp.asarray(ts), max_steps=most)
    names = ["out_of_steps", "coarse", "overshot"]
    assert codes(run(600).result).tolist() == [CODES[name] for name in names]
    # From where the data are fitted any loss is more than at first.
    loss = gf.SquaredError(jnp.eye(2), jnp.ones(2))
    rest = gf.simulate(
        gf.GradientFlow(loss), gf.models.LinearModel(jnp.ones(2)), weight_decay=0.01,
        learning_rate=0.1, t1=500.0, max_steps=25, throw=False,
    )  # fmt: skip
    assert rest.result == gf.RESULTS.out_of_steps and rest.train_loss[0] == 0
    early = run(27)  # of the 29 to infinity
    assert early.stats.steps.tolist() == [27] * 3
    assert codes(early.result).tolist() == [CODES["out_of_steps"]] * 2 + [
        CODES["overshot"]
    ]
    first = jax.tree.map(lambda x: x[0] if eqx.is_array(x) else x, early)
    told = first.verdict
    assert "gradflow.descent is quicker" in told and "KKT" not in told


def test_a_rate_that_makes_no_sense_is_named_where_it_is_traced(edge):
    """The last ends within its first sixteen steps."""
    rates, ts = jnp.array([-0.5, 0.6, 60.0]), np.full((3, 1), 0.6) * edge[1]
    paths = lanes(jnp.array([0.1, 3.9, 1.3, 0.3]), rates, jnp.asarray(ts))
    names = ["wrong_argument", "successful", "wrong_argument"]
    assert codes(paths.result).tolist() == [CODES[name] for name in names]
    assert np.isnan(paths.params.w[0]).all()


H = 0.3


@pytest.fixture(scope="module")
def field():
    """The flow of a descent, at a w, for any u and ln ρ."""
    term, theta = on_vector(*FLOW.term(Valley(jnp.array([0.2, 6.5, 1.3, 0.3]))))
    begun = begin_steps(term, theta, jnp.asarray(DECAY), jnp.asarray(H))

    @jax.jit
    def at(w, u, log_size):
        state = Alternating(w, u, log_size, jnp.zeros(()))
        return begun.term.vf(0.0, state, jnp.asarray(DECAY))

    return at


def test_first_steps_are_split_into_what_is_smooth_and_what_alternates():
    """Of a quadratic that is (1 − hq)^k, q = 1/10 and 19/10, h = 1."""
    curvature = jnp.array([0.1, 1.9, 0.1, 1.9])
    flow = gf.GradientFlow(gf.Loss(lambda m: 0.5 * jnp.sum(curvature * m.w**2)))
    term, theta = on_vector(*flow.term(Valley(jnp.array([1.0, 1.0, -2.0, 3.0]))))
    state = begin_steps(term, theta, jnp.zeros(()), jnp.ones(())).state
    w = 0.9**16 * np.array([1.0, 0.0, -2.0, 0.0])
    x = 0.9**16 * np.array([0.0, 1.0, 0.0, 3.0])
    assert_allclose(state.centre, w, atol=2e-4 * np.linalg.norm(x))
    away = np.exp(state.log_size) * state.direction
    assert_allclose(away, x, atol=2e-4 * np.linalg.norm(x))
    assert_allclose(jnp.linalg.norm(state.direction), 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [None, diffrax.Tsit5()])
def test_a_descent_that_comes_to_rest_at_once(solver):
    """With h = 1/L the first step is the last that moves: nothing alternates."""
    goal = jnp.array([1.0, 0.5, 1.0, 2.0])
    flow = gf.GradientFlow(gf.Loss(lambda m: 0.5 * jnp.sum((m.w - goal) ** 2)))
    path = gf.simulate(
        flow, Valley(jnp.zeros(4)), weight_decay=0.0, learning_rate=1.0, t1=100.0,
        solver=solver,
    )  # fmt: skip
    assert_allclose(path.params.w[-1], goal, rtol=1e-12)
    assert path.stats.steps < 200


@pytest.mark.slow
@pytest.mark.parametrize("level", [0.2, 1e-3])
def test_until_looks_at_the_first_steps_too(level):
    start, h = np.array([0.3, 0.5, 1.3, 0.3]), 0.03
    test = gf.Metric(lambda m: (m.w[2] * m.w[3] - 1) ** 2, threshold=level)
    path = gf.simulate(
        FLOW, Valley(jnp.asarray(start)), weight_decay=DECAY, learning_rate=h, t1=30.0,
        until="test", metrics={"test": test}, solver=diffrax.Tsit5(),
    )  # fmt: skip
    w = steps_of(start, h, 100)
    k = np.argmax((w[:, 2] * w[:, 3] - 1) ** 2 <= level)
    assert path.met and (k <= 16) == (level == 0.2)
    # Within the first steps it is a step; later a time between two.
    end = float(path.t[-1]) / h
    assert abs(end - k) < 1e-9 if k <= 16 else k - 1 < end < k
    assert path.crossing_time("test") == path.t[-1]


def test_errors_of_a_direction_do_not_cancel_those_of_the_centre():
    w = jnp.array([1.0, 2.0])

    def state(centre, direction, log_size):
        return Alternating(centre, direction, jnp.asarray(log_size), jnp.zeros(()))

    controller = Alongside(
        Relative(1e-5, None, dtmin=0.0, parts_of=lambda y: y.centre).wrap(1)
    )
    zero = jnp.zeros(())
    y = state(w, jnp.array([1.0, 0.0]), 0.0)
    aside = jnp.array([0.0, 1e-2])
    for sign in (1, -1):
        error = state(sign * 1e-2 * w, aside, 0.0)
        memory = controller.init(None, zero, zero + 1, y, 0.1, None, None, 5)[1]
        keep, *_ = controller.adapt_step_size(
            zero, zero + 0.1, y, y, None, error, 5, memory
        )
        assert not keep


def test_without_oscillation_it_is_the_modified_equation(field):
    """−∇(G + ¼h‖∇G‖²)."""

    def modified(w):
        def height(w):
            return sharpening(Valley(w)) + 0.5 * DECAY * jnp.vdot(w, w)

        return height(w) + 0.25 * H * jnp.sum(jax.grad(height)(w) ** 2)

    w = jnp.array([0.2, 1.5, 1.3, 0.3])
    speed = field(w, jnp.array([1.0, 0.0, 0.0, 0.0]), jnp.array(-60.0)).centre
    assert_allclose(speed, -jax.jit(jax.grad(modified))(w), rtol=1e-8)


def test_logarithmic_growth_and_the_floor_of_rounding(field):
    """ρ' = (ρ/h) ln(hq − 1) where w is at rest but for y' of the pull; from rounding
    ρ² = ε²/(−2 ln(hq − 1))."""
    w, u = jnp.array([0.0, 6.5, 1.0, 1.0]), jnp.array([1.0, 0.0, 0.0, 0.0])
    q, rise = 6.5 + DECAY, PULL - 6.5 * DECAY
    # Half a step later, as the descent has it: at its start.
    growth = (np.log(H * q - 1) - 0.5 * H * H * rise / (H * q - 1)) / H
    assert growth < 0
    assert_allclose(field(w, u, jnp.array(-20.0)).log_size, growth, rtol=1e-6)
    eps = 0.5 * np.finfo(float).eps * np.sqrt(np.mean(np.square(w)))
    floor = 0.5 * np.log(eps**2 / (-2 * H * growth))
    assert abs(field(w, u, jnp.array(floor)).log_size) < 1e-6 * abs(growth)


def wrong(**given):
    settings = dict(weight_decay=DECAY, learning_rate=0.1, t1=10.0) | given
    flow = settings.pop("flow", FLOW)
    model = settings.pop("model", Valley(jnp.ones(4)))
    return lambda: gf.simulate(flow, model, **settings)


LOSS = FLOW.loss
WRONG = {
    "learning_rate: expected a positive": wrong(learning_rate=-0.1),
    "learning_rate: the first 16 steps": wrong(t1=1.6),
    "learning_rate: descent that is rescaled": wrong(
        flow=gf.GradientFlow(LOSS, hold_norm=True)
    ),
    "learning_rate: descent goes to and fro": wrong(
        flow=gf.GradientFlow(LOSS, penalty=gf.L1())
    ),
    "weight_decay: expected one number": wrong(weight_decay=lambda t: 0.1),
    "solver: expected an explicit": wrong(solver=gf.KKT4()),
    "adjoint: a run with a learning_rate": wrong(adjoint=diffrax.ForwardMode()),
    "model: a learning_rate needs": wrong(model=Valley(jnp.ones(4, jnp.float32))),
}


@pytest.mark.parametrize("told", WRONG)
def test_refused_in_one_line(told):
    with pytest.raises(ValueError, match=f"^{told}") as caught:
        WRONG[told]()
    assert "\n" not in str(caught.value)


def test_no_derivative_leads_through_it():
    def end(h):
        path = gf.simulate(
            FLOW, Valley(jnp.ones(4)), weight_decay=DECAY, learning_rate=h, t1=10.0,
            throw=False,
        )  # fmt: skip
        return jnp.sum(path.train_loss)

    with pytest.raises(ValueError, match="learning_rate has no derivative"):
        jax.grad(end)(0.1)


# Networks


class ConvNet(eqx.Module):
    first: eqx.nn.Conv2d
    last: eqx.nn.Linear

    def __init__(self, key):
        one, two = jr.split(key)
        self.first = eqx.nn.Conv2d(1, 4, 3, stride=2, padding=1, key=one)
        self.last = eqx.nn.Linear(64, 10, key=two)

    def __call__(self, image):
        hidden = jax.nn.gelu(self.first(image.reshape(1, 8, 8)))
        return self.last(hidden.reshape(-1))


def tanh_net():
    keys = jr.split(jr.key(0), 3)
    x = 2 * jr.normal(keys[0], (12, 3))
    y = jnp.sin(2 * x[:, 0]) + 0.5 * x[:, 1]
    model = eqx.nn.MLP(3, "scalar", 20, 1, jnp.tanh, key=keys[2])
    return gf.GradientFlow(gf.SquaredError(x, y)), model


def diagonal():
    task = gf.tasks.diagonal_network(jr.key(0))
    return task.flow, task.model


def digits():
    images, labels = gf.data.scikit_learn_digits()
    x = jnp.asarray(images[:40]).reshape(40, -1)
    y = jax.nn.one_hot(labels[:40], 10, dtype=float)
    return gf.GradientFlow(gf.SquaredError(x, y)), ConvNet(jr.key(0))


def rated():
    flow, model = tanh_net()
    ones = lambda p: jax.tree.map(lambda x: 1.0, p)
    rates = lambda p: eqx.tree_at(lambda p: p.layers[0].weight, ones(p), 0.3)
    return gf.GradientFlow(flow.loss, rates=rates), model


def vectors(path):
    return np.asarray(jax.vmap(lambda p: ravel_pytree(p)[0])(path.params))


def follow(flow, model, h, numbers, decay=1e-3, rtol=1e-5, **settings):
    """A run, and the smooth part of the descent at the same numbers of steps: path,
    sharpness of F + λR, and train loss over two steps."""
    watch = {"sharp": gf.metrics.Sharpness(flow, weight_decay=decay)}
    numbers = np.asarray(numbers)
    path = gf.simulate(
        flow, model, weight_decay=decay, learning_rate=h, ts=jnp.asarray(h * numbers),
        metrics=watch, rtol=rtol, **settings
    )  # fmt: skip
    at = np.unique(numbers[:, None] + np.arange(-3, 4))
    steps = gf.descent(
        flow, model, weight_decay=decay, learning_rate=h, at=at, metrics=watch
    )
    rows = np.searchsorted(at, numbers)
    smooth = lambda values: np.array([mean_at(values, k) for k in rows])
    w, sharp = smooth(vectors(steps)), smooth(steps.metrics["sharp"])
    away = np.linalg.norm(vectors(path) - w, axis=1) / np.linalg.norm(w, axis=1)
    return path, away, sharp, smooth(steps.train_loss)


CASES = {
    # A catapult, and then the edge.
    "tanh": (tanh_net, 0.4, [24, 60, 160, 640, 1400], {}),
    # It starts beyond the edge, and steps over to flatter fits.
    "diagonal": (diagonal, 0.16, [24, 60, 160, 640, 1400], {}),
    # From far below the edge, from rounding, and several directions at it.
    "digits": (digits, 0.1, [60, 350, 630, 1700, 1800], dict(decay=1e-4, rtol=1e-4)),
    "rated": (rated, 0.38, [24, 60, 160, 640, 1400], dict(solver=diffrax.Tsit5())),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_networks(name):
    problem, h, numbers, settings = CASES[name]
    path, away, sharp, losses = follow(*problem(), h, numbers, **settings)
    assert path.stats.learning_rate == h and "descent in steps" in str(path)
    # When a descent leaves its rounding depends on how it was compiled.
    assert away.max() < (1e-2 if name == "digits" else 1e-3)
    assert_allclose(path.metrics["sharp"], sharp, rtol=0.02)
    assert_allclose(path.train_loss, losses, rtol=0.1)
    assert away.max() < 3 * path.stats.deviation + 5 * path.stats.rtol
    if name in ("tanh", "digits"):
        assert_allclose(path.metrics["sharp"][-1], 2 / h, rtol=0.02)
        assert_allclose(sharp[-1], 2 / h, rtol=0.02)


@pytest.mark.slow
def test_grokking_time_of_descent():
    """With steps of 1.9/L descent groks 4 % earlier than the flow, L the largest
    sharpness along that."""
    x = 2 * jr.normal(jr.key(0), (8, 3))
    x_test = 2 * jr.normal(jr.key(1), (300, 3))
    model = gf.scaled(eqx.nn.MLP(3, "scalar", 40, 1, jnp.tanh, key=jr.key(2)), 3.0)
    flow = gf.GradientFlow(gf.SquaredError(x, jnp.sin(x[:, 0])))
    test = gf.SquaredError(x_test, jnp.sin(x_test[:, 0]))
    watch = {"test": gf.Metric(test, threshold=0.3)}
    settings = dict(weight_decay=1e-3, metrics=watch)
    h = 1.9 / 13.47
    steps = gf.descent(flow, model, learning_rate=h, t1=800.0, saves=400, **settings)
    took = steps.crossing_time("test")
    path = gf.simulate(
        flow, model, learning_rate=h, t1=800.0, saves=100, rtol=1e-5, **settings
    )
    assert abs(path.crossing_time("test") / took - 1) < 2e-3
    landed = gf.simulate(
        flow, model, learning_rate=h, t1=800.0, until="test", rtol=1e-5, **settings
    )
    assert landed.met and abs(float(landed.t[-1]) / took - 1) < 2e-3
    plain = gf.simulate(flow, model, t1=800.0, solver=gf.KKT4(), **settings)
    assert abs(plain.crossing_time("test") / took - 1) > 0.03
