"""Rates of the parameters: θ' = −G(∇F + λ∇R), against closed forms and SciPy."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exact_l1 import l1_flow
from jax.flatten_util import ravel_pytree
from jaxtyping import Array
from numpy.testing import assert_allclose
from scipy.integrate import solve_ivp
from scipy.linalg import expm
from sklearn.linear_model import Lasso

import gradflow as gf
from gradflow.sweeps.identity import describe, difference


class Linear(eqx.Module):
    w: Array

    def __call__(self, x):
        return x @ self.w


class Product(eqx.Module):
    u: Array
    v: Array

    def __call__(self, x):
        return x @ (self.u * self.v)


RNG = np.random.default_rng(0)
X, Y, START = RNG.normal(size=(3, 6)), RNG.normal(size=3), RNG.normal(size=6)
G = np.array([1.0, 1e4, 30.0, 1e3, 3.0, 200.0])
LOSS = gf.SquaredError(jnp.asarray(X), jnp.asarray(Y), reduction="sum")
MODEL = Linear(jnp.asarray(START))
FLOW = gf.GradientFlow(LOSS, rates=Linear(jnp.asarray(G)))
KERNEL = X @ (G[:, None] * X.T)
LIMIT = START + G * (X.T @ np.linalg.solve(KERNEL, Y - X @ START))
P = np.eye(6) - G[:, None] * (X.T @ np.linalg.solve(KERNEL, X))


def linear(t, lam):
    """θ(t), by the eigenvectors of √G(XᵀX + λ)√G."""
    root = np.sqrt(G)
    values, vectors = np.linalg.eigh(
        root[:, None] * (X.T @ X + lam * np.eye(6)) * root[None]
    )
    start, right = vectors.T @ (START / root), vectors.T @ (root * (X.T @ Y))
    decay = np.exp(-values * t[:, None])
    gain = -np.expm1(-values * t[:, None]) / values
    return (decay * start + gain * right) @ vectors.T * root


def relative(found, exact):
    found, exact = np.asarray(found), np.asarray(exact)
    away = np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact, axis=1)
    return away.max()


def product_problem(seed=1):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = ((3, 5), (3,), (5,), (5,))
    x, y, u, v = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    return gf.SquaredError(x, y), Product(u, v)


@pytest.mark.parametrize("lam", [1e-1, 1e-5])
def test_linear_regression(lam):
    """Tolerance and train loss hold for θ, with rates over four decades."""
    path = gf.simulate(FLOW, MODEL, weight_decay=lam, slow_time=2.0, rtol=1e-6,
                       solver=gf.KKT4())  # fmt: skip
    exact = linear(np.asarray(path.t), lam)
    assert relative(path.params.w, exact) < 5e-6
    assert_allclose(path.params.w[0], START, rtol=1e-15)
    late = np.asarray(path.slow_time) > 0.05
    plateau = 0.5 * ((exact @ X.T - Y) ** 2).sum(axis=1)
    assert_allclose(path.train_loss[late], plateau[late], rtol=1e-5)
    assert_allclose(path.penalty, 0.5 * (exact**2).sum(axis=1), rtol=2e-5)


def test_velocity_and_the_parts_that_share_a_rate():
    loss, model = product_problem()
    force = jax.grad(lambda m: loss(m))(model)
    rates = [
        (Product(jnp.array(3.0), jnp.arange(1.0, 6.0)), 3.0, np.arange(1.0, 6.0)),
        (2.0, 2.0, 2.0),
        (lambda p: jax.tree.map(lambda x: 1 / x.size, p), 0.2, 0.2),
    ]
    for given, first, second in rates:
        speed = gf.GradientFlow(loss, rates=given).velocity(model, 0.1)
        assert_allclose(speed.u, -first * (force.u + 0.1 * model.u), rtol=1e-12)
        assert_allclose(speed.v, -second * (force.v + 0.1 * model.v), rtol=1e-12)
    # A tuple of layers, each with weight and bias; what is not trained has none.
    net = eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(0))
    layers = eqx.filter(net, eqx.is_inexact_array)
    layers = eqx.tree_at(lambda m: m.layers, layers, (2.0, 5.0))
    loss = gf.SquaredError(jnp.ones((2, 3)), jnp.zeros((2, 1)))
    term, _ = gf.GradientFlow(loss, rates=layers).term(net)
    for layer, rate in zip(term.chart.root.layers, (2.0, 5.0), strict=True):
        for root in (layer.weight, layer.bias):
            assert_allclose(root**2, np.full(root.shape, rate), rtol=1e-15)


def test_kinks_in_the_metric():
    """At a zero of ℓ1 the force is thresholded, and then has its rate; the kinks of a
    group have the rate of the group."""
    start = Linear(jnp.array([0.0, 0.0, 1.0, -1.0, 0.5, 2.0]))
    force = X.T @ (X @ np.asarray(start.w) - Y)
    lam = 0.9 * abs(force[0])
    speed = gf.GradientFlow(LOSS, penalty=gf.L1(), rates=FLOW.rates).velocity(
        start, lam
    )
    held = np.sign(force) * np.maximum(np.abs(force) - lam, 0)
    signs = np.sign(np.asarray(start.w))
    exact = -G * np.where(signs == 0, held, force + lam * signs)
    assert_allclose(speed.w, exact, rtol=1e-12)
    zero = Linear(jnp.zeros(6))
    lasso = gf.penalties.GroupLasso(groups="leaf")
    speed = gf.GradientFlow(LOSS, penalty=lasso, rates=4.0).velocity(zero, 1.0)
    plain = gf.GradientFlow(LOSS, penalty=lasso).velocity(zero, 1.0)
    assert_allclose(speed.w, 4 * np.asarray(plain.w), rtol=1e-12)
    with pytest.raises(ValueError, match="^rates: the kinks of GroupLasso couple"):
        gf.GradientFlow(LOSS, penalty=lasso, rates=FLOW.rates).term(MODEL)


@pytest.mark.parametrize(
    ("rates", "match"),
    [
        (0.0, "^rates: expected positive numbers .`trainable` leaves out"),
        (Linear(jnp.array([1.0, 1.0, 1.0, -1.0, 1.0, 1.0])), "^rates.w: expected pos"),
        (Linear(jnp.ones(2)), r"^rates.w: expected a number, or an array of shape \(6"),
        ({"w": 1.0}, "^rates: expected a pytree that begins"),
        ("fast", "^rates: expected positive numbers"),
        (None, "^rates: a flow that holds the norm"),
        ((), "^rates: expected positive numbers .*got none"),
        (lambda p: p, "^rates.w: expected positive numbers"),
    ],
)
def test_what_are_no_rates(rates, match):
    with pytest.raises(ValueError, match=match):
        if rates is None:
            gf.GradientFlow(LOSS, rates=1.0, hold_norm=True)
        gf.GradientFlow(LOSS, rates=rates).term(MODEL)


def test_projection_and_spectrum():
    """P is orthogonal in the metric G⁻¹; the curvatures are those of √G ∇²F √G."""
    point = Linear(jnp.asarray(LIMIT))
    v = RNG.normal(size=6)
    for form in ("jacobian", "hessian"):
        found = gf.manifold.tangent_projection(
            FLOW, point, Linear(jnp.asarray(v)), form=form
        )
        assert_allclose(found.w, P @ v, atol=1e-10)
    values = gf.manifold.spectrum(FLOW, point).values
    exact = np.linalg.svd(X * np.sqrt(G), compute_uv=False)
    assert_allclose(values, exact, rtol=1e-12)
    near = gf.manifold.retract(FLOW, MODEL)
    assert_allclose(near.model.w, LIMIT, rtol=1e-10)


@pytest.mark.slow
def test_limit_and_drift():
    limit = gf.manifold.limit_map(FLOW, MODEL)
    assert_allclose(limit.model.w, LIMIT, rtol=1e-8)
    slope = jax.jacobian(lambda w: gf.manifold.limit_map(FLOW, Linear(w)).model.w)(
        MODEL.w
    )
    assert_allclose(slope, P, atol=1e-8)
    with pytest.raises(ValueError, match="^limit_map: only the derivative"):
        jax.grad(
            lambda g: gf.manifold.limit_map(
                gf.GradientFlow(LOSS, rates=g), MODEL
            ).model.w[0]
        )(jnp.array(2.0))
    for solver in (None, diffrax.Dopri8()):
        drift = gf.manifold.riemannian_flow(
            FLOW, limit.model, slow_time=0.1, solver=solver, rtol=1e-9
        )
        s = np.asarray(drift.s)
        exact = np.array([expm(-t * P @ np.diag(G)) @ LIMIT for t in s])
        assert relative(drift.params.w, exact) < 1e-8
    # Of a net: DΦ by differences.
    loss, model = product_problem()
    flow = gf.GradientFlow(loss, rates=Product(5.0, jnp.arange(1.0, 6.0)))
    start, back = ravel_pytree(model)
    ends = lambda th: ravel_pytree(gf.manifold.limit_map(flow, back(th)).model)[0]
    point, v = ends(start), jnp.asarray(RNG.normal(size=10))
    moved = (ends(point + 1e-4 * v) - ends(point - 1e-4 * v)) / 2e-4
    along = gf.manifold.tangent_projection(flow, back(point), back(v))
    assert_allclose(ravel_pytree(along)[0], moved, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("by_layer", [True, False])
def test_every_solver_against_radau(by_layer):
    """A tanh net with rates over four decades; SciPy takes the raw equation."""
    keys = jax.random.split(jax.random.key(3), 3)
    x = jax.random.normal(keys[0], (6, 3))
    y = jax.random.normal(keys[1], (6, 1))
    net = eqx.nn.MLP(3, 1, 8, 1, activation=jnp.tanh, key=keys[2])
    params, static = eqx.partition(net, eqx.is_inexact_array)
    start, back = ravel_pytree(params)
    rates = back(jnp.asarray(10 ** RNG.uniform(0, 4, start.size)))
    each = ravel_pytree(rates)[0]
    if by_layer:
        rates = eqx.tree_at(lambda m: m.layers, params, (1e4, 1.0))
        each = np.where(np.arange(start.size) < 32, 1e4, 1.0)
    loss = gf.SquaredError(x, y)
    flow = gf.GradientFlow(loss, rates=rates)
    force = jax.jit(jax.grad(lambda th: loss(eqx.combine(back(th), static))))
    ts, lam, g = np.append(0.0, np.geomspace(1e-6, 2.0, 30)), 0.1, np.asarray(each)
    truth = solve_ivp(
        lambda t, th: -g * (np.asarray(force(th)) + lam * th), (0, 2.0),
        np.asarray(start), "Radau", t_eval=ts, rtol=1e-10, atol=1e-12,
    ).y.T  # fmt: skip
    for solver in (gf.KKT4(), gf.KKT5(), gf.RKC2(), diffrax.Tsit5()):
        path = gf.simulate(
            flow, net, weight_decay=lam, ts=jnp.asarray(ts), solver=solver, rtol=1e-6
        )
        found = jax.vmap(lambda p: ravel_pytree(p)[0])(path.params)
        assert relative(found, truth) < 5e-6, solver


@pytest.mark.slow
def test_two_phases():
    """Errors of the first and of the second order in λ, and the law of the norm."""
    task = gf.tasks.teacher_student(jax.random.key(0), width=10, samples=4)
    rng = np.random.default_rng(0)
    params = eqx.filter(task.model, eqx.is_inexact_array)
    rates = jax.tree.map(
        lambda p: jnp.asarray(10 ** rng.uniform(-1, 1, p.shape)), params
    )
    flow = gf.GradientFlow(task.loss, rates=rates)
    theory = gf.two_phase(flow, task.model, slow_time=0.4, order=2, rtol=1e-10)
    lams = jnp.geomspace(1e-3, 1e-4, 3)
    lanes = gf.sweep(flow, task.model, weight_decay=lams, slow_time=0.4, rtol=1e-9)
    report = gf.compare(lanes, theory)
    for order in (1, 2):
        error = np.log(report.orders[order].sup)
        slopes = np.diff(error) / np.diff(np.log(lams))
        assert_allclose(slopes, order, atol=0.03)
    law = gf.radial_law(flow, theory)
    assert_allclose(law.integral, law.log_norm, atol=1e-8)


@pytest.mark.slow
def test_along_the_kinks_of_l1():
    """The path event by event, and the end by scikit-learn."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(6, 16)) / np.sqrt(6)
    y = x[:, [2, 9]] @ rng.normal(size=2)
    start, g, lam = 0.1 * rng.normal(size=16), 10 ** rng.uniform(-1, 1, 16), 1e-2
    start[3] = 0.0
    loss = gf.SquaredError(jnp.asarray(x), jnp.asarray(y), reduction="sum")
    flow = gf.GradientFlow(loss, penalty=gf.L1(), rates=Linear(jnp.asarray(g)))
    ts = np.append(0.0, np.geomspace(1e-2, 300.0, 20))
    path = gf.simulate(
        flow, Linear(jnp.asarray(start)), weight_decay=lam, ts=jnp.asarray(ts),
        rtol=1e-8, solver=gf.KKT5(),
    )  # fmt: skip

    root = np.sqrt(g)
    exact = root * l1_flow(x * root, y, start / root, lam * root, ts[-1], ts=ts)
    assert relative(path.params.w, exact) < 5e-8
    lasso = Lasso(alpha=lam / 6, fit_intercept=False, tol=1e-14, max_iter=10**6)
    found = np.asarray(path.params.w[-1])
    assert_allclose(found, lasso.fit(x, y).coef_, atol=1e-8)
    assert ((found == 0) == (lasso.coef_ == 0)).all()


def ends(g, **options):
    """u at the end, with rates (g, 1) of u and v."""
    loss, model = product_problem()
    flow = gf.GradientFlow(loss, rates=Product(g, 1.0))
    options = {"weight_decay": 0.1, "t1": 1.0, "throw": False, **options}
    return gf.simulate(flow, model, **options)


@pytest.mark.slow
def test_lanes_of_rates():
    """`jit`, `vmap` and sweeps over G; a lane without sense harms no other; and the
    derivative in G."""
    many = lambda g: jax.jit(
        jax.vmap(lambda g: ends(g, solver=gf.KKT4()).params.u[-1])
    )(g)
    rates = jnp.array([0.1, 1.0, 10.0])
    together = np.asarray(many(rates))
    loss, model = product_problem()

    def problem(g):
        return gf.GradientFlow(loss, rates=Product(g, 1.0)), model, {}

    lanes = gf.sweep(
        problem, axes={"g": [0.1, 1.0, 10.0]}, weight_decay=[0.1], t1=1.0,
        solver=gf.KKT4(),
    )  # fmt: skip
    assert_allclose(lanes.paths.params.u[:, -1], together, rtol=1e-12)
    plain = gf.simulate(
        gf.GradientFlow(loss), model, weight_decay=0.1, t1=1.0, rtol=1e-8
    )
    assert_allclose(plain.params.u[-1], together[1], rtol=5e-6)
    spoilt = np.asarray(many(jnp.array([0.1, -1.0, 0.0])))
    assert_allclose(spoilt[0], together[0], rtol=1e-12)
    assert np.isnan(spoilt[1:]).all()
    options = dict(solver=diffrax.Tsit5(), rtol=1e-9, ts=jnp.array([0.0, 1.0]))
    total = lambda g: jnp.sum(ends(g, t1=None, **options).params.u[-1])
    slope = jax.grad(total)(jnp.array(2.0))
    across = (total(jnp.array(2.001)) - total(jnp.array(1.999))) / 2e-3
    assert_allclose(slope, across, rtol=1e-5)


@pytest.mark.slow
def test_balance_and_crossing():
    """Without decay g_v u² − g_u v² is conserved; a crossing is landed on."""
    loss, model = product_problem()
    flow = gf.GradientFlow(loss, rates=Product(3.0, 0.2))
    metrics = {"train": gf.Metric(loss, threshold=0.05)}
    path = gf.simulate(
        flow, model, weight_decay=0.0, t1=30.0, metrics=metrics, rtol=1e-9
    )
    kept = np.asarray(0.2 * path.params.u**2 - 3 * path.params.v**2)
    assert_allclose(kept, np.broadcast_to(kept[0], kept.shape), atol=1e-7)
    time = path.crossing_time("train")
    there = gf.simulate(
        flow, model, weight_decay=0.0, ts=jnp.array([0.0, time]), rtol=1e-9
    )
    assert_allclose(there.train_loss[-1], 0.05, rtol=1e-6)


def test_descent_has_learning_rates_of_layers():
    rates = Linear(jnp.asarray(G / 1e4))
    g, h, lam = G / 1e4, 0.05, 0.3
    flow = gf.GradientFlow(LOSS, rates=rates)

    def run(**options):
        path = gf.descent(
            flow, MODEL, weight_decay=lam, learning_rate=h, at=[0, 1, 3], **options
        )
        return np.asarray(path.params.w)

    force = lambda w: X.T @ (X @ w - Y)
    w = START
    for _ in range(3):
        w = w - h * g * (force(w) + lam * w)
    assert_allclose(run()[-1], w, rtol=1e-12)
    first = run(method="decoupled", optimiser=optax.adam)[1]
    adam = START - h * g * (np.sign(force(START)) + lam * START)
    assert_allclose(first, adam, rtol=1e-6)
    steps = run(method="projected")
    onto = lambda w: w - g * (X.T @ np.linalg.solve(X @ (g[:, None] * X.T), X @ w - Y))
    assert_allclose(steps[1], onto(START * (1 - h * lam * g)), rtol=1e-10)
    with pytest.raises(ValueError, match="^method: 'proximal' has one step"):
        run(method="proximal")
    with pytest.raises(ValueError, match="^optimiser: .*the gradient alone"):
        run(optimiser=optax.lbfgs)


def test_what_tells_two_flows_apart():
    """A store of a flow without rates is still one of it; others are told by theirs."""
    plain = describe(gf.GradientFlow(LOSS))
    before = {k: v for k, v in plain.items() if k != "rates"}
    assert not difference(before, plain)
    assert not difference(describe(FLOW), describe(FLOW))
    other = gf.GradientFlow(LOSS, rates=Linear(jnp.asarray(2 * G)))
    for one in (before, plain, describe(other)):
        assert any("rates" in line for line in difference(one, describe(FLOW)))
    with pytest.raises(ValueError, match="^flow: it has rates"):
        gf.landscape(FLOW, MODEL, scales=[0.5, 1.0, 2.0], t1=1.0)
