"""RKC2: its order, its stability to thousands of stages, its spectral radius, its cost;
in plain Diffrax and on flows."""

from fractions import Fraction

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import flat_paths, sup_error
from jax.flatten_util import ravel_pytree
from make_references import DATA, DECAYS, make_task
from numpy.testing import assert_allclose

import gradflow as gf
from gradflow import tasks
from gradflow.models import DiagonalNetwork
from gradflow.solvers import RKC2
from gradflow.solvers.rkc import _CAUTION, _Chebyshev, _power_iteration

by_name = lambda dtype: dtype.__name__


def solve(velocity, y0, t1, *, rtol=1e-4, dt0=1e-3, args=None, **options):
    """Plain Diffrax, with its own step size control."""
    term = diffrax.ODETerm(velocity) if callable(velocity) else velocity
    settings = dict(
        solver=RKC2(),
        t0=0.0,
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=0.02 * rtol),
        saveat=diffrax.SaveAt(t1=True, solver_state=True),
        max_steps=20_000,
    )
    settings |= options
    return diffrax.diffeqsolve(
        term,
        settings.pop("solver"),
        settings.pop("t0"),
        t1,
        dt0,
        y0,
        args=args,
        **settings,
    )


def one_step(velocity, y0, h, state=None, *, solver=None, t0=0.0):
    """A single step: where it ends, its error estimate, its state."""
    solver = RKC2() if solver is None else solver
    term = diffrax.ODETerm(velocity)
    h = jnp.asarray(h, jax.tree.leaves(y0)[-1].dtype)
    t0 = jnp.asarray(t0, h.dtype)
    if state is None:
        state = solver.init(term, t0, t0 + h, y0, None)
    y1, error, _, state, _ = solver.step(term, t0, t0 + h, y0, None, state, False)
    return y1, error, state


def relax(rates):
    """y' = −k (y − sin t) + cos t, for which y = sin t where y(0) = 0."""
    return lambda t, y, args: -rates(t) * (y - jnp.sin(t)) + jnp.cos(t)


# Order


def logistic_flow():
    target, start, decay = np.array([1.0, 2.0, 1.5]), np.array([0.5, 1.8, 0.3]), 0.1
    loss = gf.SquaredError(jnp.eye(3), jnp.asarray(target), reduction="sum")
    model = DiagonalNetwork(jnp.asarray(start), jnp.asarray(start))
    term, params = gf.GradientFlow(loss).term(model)
    k, t1 = target - decay, 1.5
    u = np.sqrt(k / (1 + (k / start**2 - 1) * np.exp(-2 * k * t1)))
    return term, params, decay, t1, np.tile(u, 2)


def forced():
    """Not autonomous, so that the times of the stages matter; y = 1/(1 + t²)."""
    velocity = lambda t, y, args: -2 * t * y**2 - 5 * (y - 1 / (1 + t**2))
    return diffrax.ODETerm(velocity), jnp.ones(1), None, 2.0, np.array([0.2])


@pytest.mark.slow
@pytest.mark.parametrize("problem", [logistic_flow, forced])
def test_order(problem):
    term, y0, args, t1, expected = problem()

    @jax.jit
    def end(h):
        constant = diffrax.ConstantStepSize()
        solution = solve(
            term, y0, t1, dt0=h, args=args, stepsize_controller=constant, max_steps=400
        )
        return ravel_pytree(solution.ys)[0]

    errors = []
    for steps in (40, 80, 160, 320):
        errors.append(np.linalg.norm(end(t1 / steps) - expected))
    assert errors[-1] > 1e-12  # not the rounding's slope
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    assert np.all(np.abs(orders - RKC2().order(term)) < 0.2), (errors, orders)


def test_error_estimate():
    """In a smooth component beside a stiff one, which asks for many stages, it is 1.8
    times the local error, times its caution."""
    rates = jnp.array([1.0, 1e4])
    step = jax.jit(
        lambda h: one_step(lambda t, y, _: -rates * y, jnp.array([1.0, 0.0]), h)
    )
    for h in (0.2, 0.1):
        y1, estimate, _ = step(h)
        true = np.abs(y1[0] - np.exp(-h))
        assert_allclose(np.abs(estimate[0]), 1.8 * _CAUTION * true, rtol=0.1)


# Stability


def stability_polynomial(s, z):
    """P(z) = a + b T_s(w₀ + w₁z) in extended precision, by cosines."""
    s, z = np.longdouble(s), np.asarray(z, np.longdouble)
    shift = 2 / np.longdouble(13) / s**2
    theta = 2 * np.arcsinh(np.sqrt(shift / 2))
    sinh, cosh = np.sinh(s * theta), np.cosh(s * theta)
    first = s * sinh / np.sinh(theta)
    second = (s**2 * cosh - s * sinh / np.tanh(theta)) / np.sinh(theta) ** 2
    b, x = second / first**2, 1 + shift + first / second * z
    chebyshev = np.where(
        np.abs(x) <= 1,
        np.cos(s * np.arccos(np.clip(x, -1, 1))),
        np.cosh(s * np.arccosh(np.maximum(x, 1))),
    )
    return 1 - b * cosh + b * chebyshev


@pytest.mark.parametrize(
    ("dtype", "stages", "atol"),
    [
        (jnp.float64, (2, 3, 50, 5000), 3e-11),
        (jnp.float32, (3, 50, 500), 3e-3),
    ],
    ids=["float64", "float32"],
)
def test_internal_stability(dtype, stages, atol):
    """One step of y' = −ky is P(−hk) y, over the whole stability interval. Rounding
    errors that grew with s² would be 1e-8 and 5e-2."""

    solver = RKC2()
    y0 = jnp.ones(201, dtype)

    @jax.jit
    def step(top):
        rates = jnp.linspace(0, 1, 201, dtype=dtype) * top
        velocity = lambda t, y, args: -rates * y
        state = solver.init(diffrax.ODETerm(velocity), top * 0, top, y0, None)
        state = eqx.tree_at(lambda s: s.radius, state, top)
        y1, error, state = one_step(velocity, y0, 1.0, state)
        return y1, error, state.evaluations, rates

    for s in stages:
        # What, a tenth enlarged, asks for exactly s stages.
        top = jnp.asarray(0.653 * ((s - 0.5) ** 2 - 1) / 1.1, dtype)
        y1, error, evaluations, rates = step(top)
        assert y1.dtype == dtype and evaluations == s + 1  # one of them at the start
        assert np.all(np.isfinite(error))
        exact = stability_polynomial(s, -np.asarray(rates, float))
        assert_allclose(y1, exact, rtol=0, atol=atol)
        assert np.abs(exact[1:]).max() < 1


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32], ids=by_name)
def test_coefficients(dtype):
    """Against the recurrences of the Chebyshev polynomials in rational numbers."""

    @jax.jit
    def coefficients(s):
        scheme, stages = _Chebyshev(s, dtype), jnp.arange(201)
        return scheme.w1, *(jax.vmap(f)(stages) for f in (scheme.b, scheme.a, scheme.c))

    for s in (2, 3, 20, 200):
        w0 = 1 + Fraction(2, 13 * s**2)
        t, d, e = [Fraction(1), w0], [Fraction(0), Fraction(1)], [Fraction(0)] * 2
        for _ in range(s - 1):  # T, T' and T'' at w₀
            e.append(4 * d[-1] + 2 * w0 * e[-1] - e[-2])
            d.append(2 * t[-1] + 2 * w0 * d[-1] - d[-2])
            t.append(2 * w0 * t[-1] - t[-2])
        b = [e[max(j, 2)] / d[max(j, 2)] ** 2 for j in range(s + 1)]
        w1 = d[s] / e[s]
        exact = [
            b,
            [1 - x * y for x, y in zip(b, t, strict=True)],
            [w1 * x * y for x, y in zip(b, d, strict=True)],
        ]
        found = coefficients(jnp.array(s))
        tolerance = 20 * float(jnp.finfo(dtype).eps)
        assert_allclose(found[0], float(w1), rtol=tolerance)
        for x, y in zip(found[1:], exact, strict=True):
            assert_allclose(x[1 : s + 1], np.array(y[1:], float), rtol=tolerance)


def test_closed_form_to_a_spectrum_of_a_million():
    rates = jnp.geomspace(1e-2, 1e6, 30)
    force = jnp.where(rates > 1, rates, 1.0)  # so that the limits are of order one
    y0 = jnp.linspace(-1, 1, 30)
    run = jax.jit(
        lambda rtol: solve(lambda t, y, _: force - rates * y, y0, 1.0, rtol=rtol)
    )
    exact = force / rates + (y0 - force / rates) * np.exp(-rates)
    errors = []
    for rtol in (1e-3, 1e-5):
        solution = run(rtol)
        errors.append(np.abs(solution.ys[0] / exact - 1).max())
        assert errors[-1] < 10 * rtol
        assert_allclose(solution.solver_state.radius, 1e6, rtol=0.02)
    assert errors[1] < 0.1 * errors[0]


def test_heat_equation():
    n, t1 = 200, 0.1
    x = np.arange(1, n + 1) / (n + 1)
    edge = jnp.zeros(1)
    laplace = lambda t, u, args: (
        (n + 1.0) ** 2 * jnp.diff(jnp.concatenate([edge, u, edge]), 2)
    )
    rate = lambda k: 4 * (n + 1.0) ** 2 * np.sin(k * np.pi * x[0] / 2) ** 2
    exact = lambda t: sum(np.exp(-rate(k) * t) * np.sin(k * np.pi * x) for k in (1, 4))
    solution = jax.jit(lambda: solve(laplace, jnp.asarray(exact(0.0)), t1, rtol=1e-5))()
    error = np.linalg.norm(solution.ys[0] - exact(t1)) / np.linalg.norm(exact(t1))
    assert error < 1e-4
    # Forward Euler is stable up to a step of 2/ρ.
    assert int(solution.solver_state.evaluations) < 0.35 * t1 * rate(n) / 2


def test_growing_components_do_no_harm():
    """A loss that is not convex: e^t beside e^{−10⁴t}, and a coordinate at rest."""
    rates = jnp.array([1.0, 0.0, -1e4])
    solution = jax.jit(lambda: solve(lambda t, y, _: rates * y, jnp.ones(3), 3.0))()
    assert_allclose(solution.ys[0], [np.exp(3), 1, 0], rtol=3e-3, atol=1e-6)
    still, error, state = jax.jit(lambda: one_step(lambda *_: 0 * rates, rates, 1e3))()
    assert_allclose(still, rates, rtol=0)
    assert np.all(error == 0) and state.radius == 0


# The spectral radius


@pytest.mark.slow
def test_start_vector_that_misses_the_stiff_eigenvector():
    """The state claims ρ = 1 while it is 10⁴: in a diagonal system power iteration from
    a unit vector never sees any other. The stages do."""
    rates = jnp.geomspace(1.0, 1e4, 20)
    velocity = relax(lambda t: rates)
    state = RKC2().init(diffrax.ODETerm(velocity), 0.0, 1.0, jnp.zeros(20), None)
    assert_allclose(state.radius, 1e4, rtol=0.02)
    blind = eqx.tree_at(
        lambda s: (s.vector, s.radius),
        state,
        (jnp.zeros(20).at[0].set(1.0), jnp.ones(())),
    )
    run = jax.jit(
        lambda state: solve(velocity, jnp.zeros(20), 10.0, dt0=1.0, solver_state=state)
    )
    sighted, solution = run(state), run(blind)
    assert_allclose(solution.ys[0], np.sin(10.0), rtol=2e-4)
    assert_allclose(solution.solver_state.radius, 1e4, rtol=0.02)
    more = solution.stats["num_steps"] - sighted.stats["num_steps"]
    assert more < 40, more


def test_curvature_that_rises_during_the_run():
    """From 10³ in one half of the coordinates to 10⁵ in the other: the top eigenvector
    before has no part in the one after. In 1 % of the run; or at once."""
    spread = jnp.linspace(0.1, 1.0, 10)
    low, high = jnp.full(10, 1e3), 1e5 * spread

    def rising(width):
        def rates(t):
            after = jax.nn.sigmoid((t - 3) / width)
            return 1 + jnp.concatenate([(1 - after) * low, after * high])

        return rates

    run = jax.jit(lambda width: solve(relax(rising(width)), jnp.zeros(20), 6.0))
    for width in (0.02, 1e-9):
        solution = run(width)
        assert_allclose(solution.ys[0], np.sin(6.0), rtol=5e-4)
        assert_allclose(solution.solver_state.radius, 1e5, rtol=0.02)
        assert solution.stats["num_steps"] < 1000


def test_a_step_that_ends_in_high_curvature_is_rejected():
    """At rest, nothing grows, and no error is seen: only the spectral radius tells that
    the step was too long."""
    velocity = lambda t, y, args: -jnp.where(t > 0.99, 1e4, 1.0) * y
    step = jax.jit(lambda h: one_step(velocity, jnp.zeros(2), h)[1:])
    error, state = step(1.0)
    assert np.all(np.isinf(error))
    assert_allclose(state.radius, 1e4)
    error, state = step(0.98)
    assert_allclose(error, 0.0)


@pytest.mark.slow
def test_spectral_radius_along_a_path():
    """It is the largest curvature of the loss, plus λ."""
    task = tasks.diagonal_network(jr.key(2), samples=6, dim=20, sparsity=2)
    decay, term, params = 1e-2, *task.flow.term(task.model)
    theta, unravel = ravel_pytree(params)
    curvature = jax.jit(jax.hessian(lambda th: task.loss(term.model(unravel(th)))))
    run = jax.jit(lambda t1: solve(term, params, t1, args=decay))
    for t1 in (1.0, 30.0, 300.0):
        solution = run(t1)
        end, _ = ravel_pytree(jax.tree.map(lambda y: y[0], solution.ys))
        top = np.abs(np.linalg.eigvalsh(curvature(end) + decay * np.eye(40))).max()
        assert_allclose(solution.solver_state.radius, top, rtol=0.03)


def test_how_well_the_spectral_radius_is_known():
    """To a percent; but where two stages do whatever it is, by one product."""
    eigenvalues = jnp.array([10.0, 6.0, 3.0, 1.0])
    push, start = (lambda v: eigenvalues * v), jnp.array([0.1, 1.0, 1.0, 1.0])
    guess = jnp.asarray(3.0)
    _, radius, products = _power_iteration(push, start, guess, 1000)
    assert 9.7 < radius <= 10 and 3 < products < 100
    _, radius, products = _power_iteration(push, start, guess, 1000, 100.0)
    assert radius < 9 and products == 1
    _, again, products = _power_iteration(push, start, guess, 1000, 1.0)
    assert 9.7 < again <= 10 and 3 < products


# The stages


@pytest.mark.slow
def test_most_stages():
    """A step that would need more is refused, whatever its error; the run goes on with
    shorter ones."""
    rates = jnp.geomspace(1.0, 1e4, 10)
    velocity = lambda t, y, args: -rates * y
    reach = 0.653 * (10**2 - 1) / 1.1 / 1e4  # of 10 stages
    step = jax.jit(
        lambda h: one_step(velocity, jnp.zeros(10), h, solver=RKC2(max_stages=10))[1:]
    )
    error, state = step(0.97 * reach)
    assert np.all(error == 0) and state.evaluations == 11
    error, state = step(1.05 * reach)
    assert np.all(np.isinf(error)) and state.evaluations <= 3

    solution = jax.jit(
        lambda: solve(
            velocity,
            jnp.ones(10),
            0.5,
            solver=RKC2(max_stages=10),
            saveat=diffrax.SaveAt(steps=True, t1=True, solver_state=True),
            max_steps=2000,
        )
    )()
    reached = np.isfinite(solution.ts)
    steps = np.diff(solution.ts[reached])
    assert 0.5 * reach < steps.max() < 1.05 * reach
    assert_allclose(
        solution.ys[reached][-1], np.exp(-0.5 * rates), rtol=1e-3, atol=1e-4
    )
    with pytest.raises(ValueError, match="^max_stages: expected 2 or more, got 1"):
        RKC2(max_stages=1)


@pytest.mark.slow
def test_evaluations_grow_as_the_root_of_the_stiffness():
    ts = jnp.linspace(0.0, 6.0, 50)
    saveat = diffrax.SaveAt(ts=ts, dense=True, solver_state=True)
    run = jax.jit(
        lambda k: solve(
            relax(lambda t: k * jnp.array([1.0, 0.1])),
            jnp.zeros(2),
            6.0,
            saveat=saveat,
            max_steps=1000,
        )
    )
    stiffness = np.array([1e3, 1e4, 1e5, 1e6])
    solutions = [run(k) for k in stiffness]
    states = [solution.solver_state for solution in solutions]
    counts = [s.evaluations for s in states]
    slope = np.polyfit(np.log(stiffness), np.log(counts), 1)[0]
    assert 0.4 < slope < 0.6, counts
    assert max(s.products for s in states) < 2 * min(s.products for s in states)
    for solution in solutions:  # saved by interpolation
        assert_allclose(solution.ys[:, 0], np.sin(ts), atol=1e-3)
        assert_allclose(jax.vmap(solution.evaluate)(ts), solution.ys, atol=1e-12)


def test_restart_and_counts():
    """A solve in two halves goes on as if it had never stopped. With a constant step
    size no step is rejected, and every evaluation is counted."""
    calls = []
    solver, constant = RKC2(), diffrax.ConstantStepSize()

    def velocity(t, y, args):
        jax.debug.callback(lambda: calls.append(1))
        return relax(lambda t: jnp.array([1.0, 500.0]))(t, y, args)

    @jax.jit
    def run(t0, t1, y0, state):
        return solve(
            velocity,
            y0,
            t1,
            t0=t0,
            dt0=0.125,
            solver_state=state,
            stepsize_controller=constant,
        )

    term = diffrax.ODETerm(velocity)
    start = solver.init(term, 0.0, 1.0, jnp.ones(2), None)
    whole = run(0.0, 4.0, jnp.ones(2), start)
    jax.effects_barrier()
    assert len(calls) == whole.solver_state.evaluations > 32 * 5
    half = run(0.0, 2.0, jnp.ones(2), start)
    resumed = run(2.0, 4.0, half.ys[0], half.solver_state)
    assert_allclose(resumed.ys, whole.ys, rtol=1e-12)
    work = solver.work(term, resumed.solver_state, None)
    assert work == solver.work(term, whole.solver_state, None)
    assert work["evaluations"] == whole.solver_state.evaluations


# In plain Diffrax


@pytest.mark.slow
def test_pytrees_and_precisions():
    rates = {"a": jnp.geomspace(1.0, 1e3, 6).reshape(2, 3), "b": [jnp.asarray(50.0)]}
    velocity = lambda t, y, _: jax.tree.map(lambda k, y: -k * y - y**3, rates, y)
    ones = jax.tree.map(jnp.ones_like, rates)
    solution = jax.jit(lambda: solve(velocity, ones, 0.5))()
    exact = lambda k: np.sqrt(k * np.exp(-k) / (1 + k - np.exp(-k)))
    for y, k in zip(*map(jax.tree.leaves, (solution.ys, rates)), strict=True):
        assert y.shape == (1, *k.shape)
        assert_allclose(y[0], exact(k), rtol=1e-2, atol=1e-4)

    y0 = {"half": jnp.ones(2, jnp.float32), "full": jnp.ones(2)}
    velocity = lambda t, y, _: {
        "half": -jnp.array([1.0, 100.0], jnp.float32) * y["half"],
        "full": -jnp.array([2.0, 200.0]) * y["full"],
    }
    y1, error, state = jax.jit(lambda: one_step(velocity, y0, 0.01))()
    for leaf in (y1, error, state.slope, state.vector):
        assert jax.tree.map(lambda x: x.dtype, leaf) == {
            "half": jnp.float32,
            "full": jnp.float64,
        }
    assert_allclose(y1["half"][0], np.exp(-0.01), rtol=1e-5)
    assert_allclose(y1["full"][0], np.exp(-0.02), rtol=1e-5)


def test_float32():
    rates = jnp.geomspace(1.0, 1e4, 20, dtype=jnp.float32)
    solution = jax.jit(
        lambda: solve(
            relax(lambda t: rates),
            jnp.zeros(20, jnp.float32),
            jnp.float32(10.0),
            t0=jnp.float32(0.0),
            dt0=jnp.float32(1e-3),
            rtol=1e-2,
        )
    )()
    assert solution.ys.dtype == jnp.float32
    assert solution.solver_state.radius.dtype == jnp.float32
    assert_allclose(solution.ys[0], np.sin(10.0), rtol=1e-2)
    assert solution.stats["num_steps"] < 300


@pytest.mark.slow
def test_vmap_equals_a_loop():
    velocity = lambda t, y, k: -k * jnp.array([1.0, 0.01]) * (y - 1) - y**3
    rates = jnp.array([1.0, 1e2, 1e4])

    def run(k):
        solution = solve(velocity, jnp.zeros(2), 2.0, args=k)
        return solution.ys[0], solution.stats, solution.solver_state

    single = jax.jit(run)
    lanes, stats, states = jax.jit(jax.vmap(run))(rates)
    for i, k in enumerate(rates):
        alone, counts, state = single(k)
        assert_allclose(lanes[i], alone, rtol=1e-9)
        assert stats["num_steps"][i] == counts["num_steps"]
        assert states.evaluations[i] == state.evaluations
        assert states.products[i] == state.products
    assert len(set(map(int, states.evaluations))) == 3


@pytest.mark.slow
def test_jumps_and_backwards():
    """After a jump of the velocity slope and spectral radius are renewed; and time may
    run backwards."""
    rate = lambda t: jnp.where(t < 1, 1.0, 1e4)
    aim = lambda t: jnp.where(t < 1, 0.0, 2.0)
    controller = diffrax.ClipStepSizeController(
        diffrax.PIDController(rtol=1e-4, atol=1e-6), jump_ts=jnp.array([1.0])
    )
    solution = jax.jit(
        lambda: solve(
            lambda t, y, _: -rate(t) * (y - aim(t)),
            jnp.ones(1),
            1.0003,
            stepsize_controller=controller,
        )
    )()
    exact = 2 + (np.exp(-1.0) - 2) * np.exp(-3.0)
    assert_allclose(solution.ys[0], exact, rtol=5e-4)
    assert_allclose(solution.solver_state.radius, 1e4, rtol=1e-6)
    assert solution.stats["num_rejected_steps"] < 10

    growing = jnp.array([1.0, 1e3])
    back = jax.jit(
        lambda: solve(lambda t, y, _: growing * y, jnp.ones(2), -1.0, dt0=-1e-3)
    )()
    assert_allclose(back.ys[0], [np.exp(-1.0), 0.0], rtol=2e-3, atol=1e-5)
    assert back.stats["num_steps"] < 250


# Flows


@pytest.mark.slow
@pytest.mark.parametrize("decay", DECAYS)
def test_radau_stored(decay):
    """Of the loss nothing is asked but its gradient."""
    task = make_task("diagonal")
    with np.load(DATA / "radau_diagonal.npz") as file:
        data = dict(file)
    assert_allclose(ravel_pytree(task.model)[0], data["theta0"], rtol=1e-14)
    ts, reference = data[f"ts_{decay:.0e}"], data[f"theta_{decay:.0e}"]
    path = gf.simulate(
        gf.GradientFlow(gf.Loss(task.loss)),
        task.model,
        weight_decay=decay,
        ts=jnp.asarray(ts),
        rtol=1e-4,
        solver=RKC2(),
    )
    assert path.stats.solver == "RKC2"
    assert sup_error(flat_paths(path), reference) < 5e-4
    assert int(path.stats.evaluations) < 1200 * (1e-2 / decay) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("seed, lam, t1", [(0, 1e-2, 100.0), (1, 1e-3, 100.0)])
def test_kinks_that_are_many(seed, lam, t1):
    """A ReLU net of 20 neurons and 30 samples crosses one of 600 kinks in most steps,
    and slides along some. Jumps of the velocity are no growth: they shorten a step by
    what they do to it, and no more."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(30, 2)))
    y = jnp.tanh(2 * x[:, 0]) - 0.5 * jnp.tanh(x[:, 1])
    model = eqx.nn.MLP(2, "scalar", 20, 1, jax.nn.relu, key=jr.key(seed))
    flow = gf.GradientFlow(gf.SquaredError(x, y))
    parts, steps = np.linspace(0, 1, 9), 100_000
    truth = gf.descent(
        flow,
        model,
        weight_decay=lam,
        learning_rate=t1 / steps,
        at=[int(part * steps) for part in parts],
    )
    # Without a difference between jumps and growth it takes over 30 000 steps.
    for rtol, most in ((1e-2, 1200), (1e-3, 6000)):
        path = gf.simulate(
            flow,
            model,
            weight_decay=lam,
            ts=jnp.asarray(parts * t1),
            solver=RKC2(),
            rtol=rtol,
            max_steps=most,
        )
        assert sup_error(flat_paths(path), flat_paths(truth)) < rtol
