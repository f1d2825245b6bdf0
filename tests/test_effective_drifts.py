"""The drifts of optimisers: penalties against Hessians, flows against descents."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import Diagonal
from jax.flatten_util import ravel_pytree
from scipy.integrate import solve_ivp

import gradflow as gf
from gradflow import drifts
from gradflow.flow import flat

H = 0.1
EPS = 1e-3
# Rows of ±1 that are orthogonal: JJᵀ of the diagonal network has one diagonal.
SIGNS = jnp.array([[1.0, 1, 1, -1], [1, -1, 1, 1]])
DIAGONAL = gf.SquaredError(SIGNS, jnp.array([1.0, 0.5]))
UV = Diagonal(jnp.array([0.9, 0.7, 0.5, 0.8]), jnp.array([0.5, 0.4, 0.7, 0.6]))


class Net(eqx.Module):
    """⟨a, tanh(Wx)⟩, or a vector of them."""

    w: jax.Array
    a: jax.Array

    def __call__(self, x):
        return self.a @ jnp.tanh(self.w @ x)


def net(outputs=(), width=3, seed=3):
    kw, ka = jr.split(jr.key(seed))
    return Net(0.7 * jr.normal(kw, (width, 2)), 2 * jr.normal(ka, (*outputs, width)))


X = jr.normal(jr.key(4), (5, 2))
LOSSES = {
    "squared": gf.SquaredError(X, jnp.sin(X)),
    "softmax": gf.CrossEntropy(X, jnp.array([0, 1, 0, 1, 1])),
}
VECTOR, UNRAVEL = ravel_pytree(net((2,)))


def hessian(loss):
    return jax.hessian(lambda th: loss(UNRAVEL(th)))


def gauss_newton(loss):
    def matrix(th):
        jac = jax.jacrev(lambda th: loss.outputs(UNRAVEL(th)))(th)
        return jac.T @ jax.hessian(loss.outer)(loss.outputs(UNRAVEL(th))) @ jac

    return matrix


def roots(a):
    root = jnp.sqrt(jnp.maximum(jnp.diag(a), 1e-300))
    return jnp.sum(jnp.where(jnp.diag(a) > 0, root - EPS * jnp.log1p(root / EPS), 0))


PENALTIES = {
    "Trace": (drifts.Trace, jnp.trace),
    "LargestCurvature": (drifts.LargestCurvature, lambda a: jnp.linalg.eigvalsh(a)[-1]),
    "RootDiagonal": (functools.partial(drifts.RootDiagonal, eps=EPS), roots),
    "LogTrace": (
        functools.partial(drifts.LogTrace, learning_rate=H),
        lambda a: -2 / H * jnp.linalg.slogdet(jnp.eye(len(a)) - 0.5 * H * a)[1],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("form", ["hessian", "jacobian"])
@pytest.mark.parametrize("name", PENALTIES)
def test_against_the_whole_matrix(name, form, loss):
    """Value, gradient and ∇²R v, by differences of the gradient of the reference."""
    make, of_matrix = PENALTIES[name]
    loss = LOSSES[loss]
    matrix = (hessian if form == "hessian" else gauss_newton)(loss)
    penalty = make(loss, net((2,)), form=form)
    reference = jax.jit(jax.value_and_grad(lambda th: of_matrix(matrix(th))))
    v = jr.normal(jr.key(9), VECTOR.shape)

    @jax.jit
    def found(th):
        slope = lambda th: ravel_pytree(penalty.gradient(UNRAVEL(th)))[0]
        by_jax = ravel_pytree(jax.grad(penalty)(UNRAVEL(th)))[0]
        return penalty(UNRAVEL(th)), by_jax, *jax.jvp(slope, (th,), (v,))

    value, by_jax, slope, bent = found(VECTOR)
    exact, exact_slope = reference(VECTOR)
    up, down = (reference(VECTOR + sign * 1e-5 * v)[1] for sign in (1, -1))
    np.testing.assert_allclose(value, exact, rtol=1e-10)
    size = np.abs(exact_slope).max()
    np.testing.assert_allclose(slope, exact_slope, atol=1e-9 * size)
    np.testing.assert_allclose(by_jax, exact_slope, atol=1e-9 * size)
    bend = (up - down) / 2e-5
    np.testing.assert_allclose(bent, bend, atol=1e-5 * np.abs(bend).max())


def test_closed_forms_of_the_diagonal_network():
    """∇²F = Jᵀdiag J/n, J = 2[X diag u, −X diag v]: with entries of X ±1, each
    ∂ᵢ²F = 4θᵢ², and for one sample λ₁ is the trace."""
    norms = [float(jnp.sum(p**2)) for p in (UV.u, UV.v)]
    trace = drifts.Trace(DIAGONAL, UV)
    assert np.isclose(trace(UV), 4 * sum(norms), rtol=1e-13)
    slope = trace.gradient(UV)
    np.testing.assert_allclose(slope.u, 8 * UV.u, rtol=1e-13)
    np.testing.assert_allclose(slope.v, 8 * UV.v, rtol=1e-13)
    sizes = float(jnp.sum(UV.u) + jnp.sum(UV.v))
    root = drifts.RootDiagonal(DIAGONAL, UV, eps=1e-9)
    assert np.isclose(root(UV), 2 * sizes, rtol=1e-6)
    fourth = sum(float(jnp.sum(p**4)) for p in (UV.u, UV.v))
    relative = drifts.Trace(DIAGONAL, UV, relative=True)
    assert np.isclose(relative(UV), 4 * fourth, rtol=1e-13)
    # In the metric of rates √G ∇²F √G counts.
    flow = gf.GradientFlow(DIAGONAL, rates=Diagonal(jnp.array(2.0), jnp.array(0.5)))
    stretched = drifts.Trace(flow, UV)(UV)
    assert np.isclose(stretched, 8 * norms[0] + 2 * norms[1], rtol=1e-13)
    one = gf.SquaredError(SIGNS[:1], jnp.ones(1))
    assert np.isclose(drifts.LargestCurvature(one, UV)(UV), 4 * sum(norms), rtol=1e-12)


def test_probes():
    """Over keys, the mean is the trace, and the variance (2/k) Σᵢ≠ⱼ Aᵢⱼ²; each tells
    it of itself. The same of the gradient, along one direction."""
    loss, k, n = LOSSES["softmax"], 8, 2000
    params = net((2,))
    v = UNRAVEL(jr.normal(jr.key(8), VECTOR.shape))

    @jax.jit
    @jax.vmap
    def draw(key):
        one = drifts.Trace(loss, params, probes=k, key=key)
        along = optax.tree.vdot(one.gradient(params), v)
        return one(params), one.standard_error(params), along

    values, told, along = map(np.asarray, draw(jr.split(jr.key(0), n)))
    a, change = jax.jvp(gauss_newton(loss), (VECTOR,), (ravel_pytree(v)[0],))
    for found, matrix in ((values, a), (along, change)):
        variance = 2 / k * float(jnp.sum(matrix**2) - jnp.sum(jnp.diag(matrix) ** 2))
        off = abs(found.mean() - float(jnp.trace(matrix)))
        assert off < 4 * (variance / n) ** 0.5
        assert abs(found.var() / variance - 1) < 0.15
    assert abs((told**2).mean() / values.var() - 1) < 0.15


def test_blocks_of_samples(monkeypatch):
    """Where few fit at once, value and derivatives are the same."""
    loss, model = LOSSES["softmax"], net((2,))
    of = [
        make(loss, model) for make, _ in (PENALTIES["Trace"], PENALTIES["RootDiagonal"])
    ]
    whole = [(one(model), one.gradient(model)) for one in of]
    monkeypatch.setattr(flat, "_BLOCK_NUMBERS", 2 * 2 * VECTOR.size)
    for one, (value, slope) in zip(of, whole, strict=True):
        np.testing.assert_allclose(one(model), value, rtol=1e-13)
        found = ravel_pytree(one.gradient(model))[0]
        np.testing.assert_allclose(found, ravel_pytree(slope)[0], rtol=1e-11)


def test_settings_give_the_strength():
    n, h, sigma = 2, 0.02, 0.5
    lam = drifts.label_noise(DIAGONAL, UV, learning_rate=h, label_noise=sigma)[1]
    assert np.isclose(lam, h * sigma**2 / (4 * n))
    options = dict(learning_rate=h, label_noise=sigma, batch_size=1)
    assert np.isclose(drifts.label_noise(DIAGONAL, UV, **options)[1], n * lam)
    total = gf.SquaredError(SIGNS, DIAGONAL.y, reduction="sum")
    assert np.isclose(drifts.label_noise(total, UV, **options)[1], 2 * n * lam)
    assert np.isclose(drifts.parameter_noise(DIAGONAL, UV, noise=0.1)[1], 0.005)
    for batch, kind in ((None, drifts.LargestCurvature), (1, drifts.Trace)):
        flow, lam = drifts.sharpness_aware(DIAGONAL, UV, radius=0.1, batch_size=batch)
        assert np.isclose(lam, 0.005) and isinstance(flow.penalty, kind)
    # Weight decay comes on top, at its own strength.
    flow, lam = drifts.parameter_noise(DIAGONAL, UV, noise=0.1, weight_decay=0.03)
    both = lam * flow.penalty(UV)
    alone = 0.005 * drifts.Trace(DIAGONAL, UV)(UV) + 0.03 * gf.L2()(UV)
    assert np.isclose(both, alone, rtol=1e-13)
    # Under vmap, and NaN where an argument makes no sense.
    many = jax.vmap(lambda s: drifts.parameter_noise(DIAGONAL, UV, noise=s)[1])
    np.testing.assert_allclose(many(jnp.array([0.1, -1.0])), [0.005, jnp.nan])


def test_flipped_labels():
    """The loss is the mean over labels that are drawn, whose noise is like ∇²F where
    the model gives their probabilities."""
    x, labels = X[:, :1], jnp.array([0, 2, 1, 0, 2])
    model = eqx.nn.Linear(1, 3, key=jr.key(0))
    flow, lam = drifts.label_noise(
        gf.CrossEntropy(x, labels), model, learning_rate=H, label_noise=0.3
    )
    q = 0.55 * jax.nn.one_hot(labels, 3) + 0.15
    np.testing.assert_allclose(flow.loss.labels, q, rtol=1e-12)
    assert np.isclose(lam, H / 20)
    binary = gf.Logistic(x, jnp.array([[0.0], [1], [1], [0], [1]]))
    one = eqx.nn.Linear(1, 1, key=jr.key(0))
    flow, lam = drifts.label_noise(binary, one, learning_rate=H, label_noise=0.3)
    np.testing.assert_allclose(flow.loss.y, 0.4 * binary.y + 0.3, rtol=1e-12)
    assert np.isclose(lam, H / 20)


def test_a_flow_down_the_trace():
    """Of the diagonal network it is eight times ½‖θ‖²: the same path by either."""
    flow, lam = drifts.label_noise(DIAGONAL, UV, learning_rate=0.1, label_noise=1.0)
    options = dict(slow_time=0.3, solver=gf.KKT4(), saves=5)
    path = gf.simulate(flow, UV, weight_decay=lam, **options)
    same = gf.GradientFlow(DIAGONAL, penalty=8 * gf.L2())
    other = gf.simulate(same, UV, weight_decay=lam, **options)
    np.testing.assert_allclose(path.params.u, other.params.u, atol=1e-5)


@pytest.mark.parametrize(
    "name, make",
    [
        ("form", lambda: drifts.Trace(gf.Loss(lambda m: m.u[0]), UV, form="jacobian")),
        ("key", lambda: drifts.Trace(DIAGONAL, UV, probes=3)),
        ("key", lambda: drifts.Trace(DIAGONAL, UV, key=jr.key(0))),
        ("probes", lambda: drifts.Trace(DIAGONAL, UV, probes=0, key=jr.key(0))),
        (
            "probes",
            lambda: drifts.Trace(DIAGONAL, LARGE, form="hessian"),
        ),
        ("eps", lambda: drifts.RootDiagonal(DIAGONAL, UV, eps=0.0)),
        ("model", lambda: drifts.RootDiagonal(DIAGONAL, LARGE, form="hessian")),
        (
            "model",
            lambda: drifts.LogTrace(DIAGONAL, LARGE, learning_rate=H, form="hessian"),
        ),
        ("learning_rate", lambda: label_noise(learning_rate=0.0)),
        ("label_noise", lambda: label_noise(label_noise=0.0)),
        ("weight_decay", lambda: label_noise(weight_decay=-1.0)),
        ("batch_size", lambda: label_noise(batch_size=0)),
        ("batch_size", lambda: label_noise(batch_size=3)),
        ("label_noise", lambda: label_noise(FLIPPED, label_noise=1.5)),
        ("finite_step", lambda: label_noise(batch_size=1, finite_step=True)),
        ("loss", lambda: label_noise(gf.Huber(SIGNS, DIAGONAL.y))),
        ("loss", lambda: label_noise(weighted())),
        ("flow", lambda: label_noise(gf.GradientFlow(DIAGONAL, hold_norm=True))),
        ("label_noise", lambda: label_noise(gf.Logistic(SIGNS, jnp.full(2, 0.3)))),
        ("radius", lambda: aware(radius=-1.0)),
        ("batch_size", lambda: aware(batch_size=2)),
        ("batch_size", lambda: aware(LOSSES["squared"], net((2,)), batch_size=1)),
        ("loss", lambda: aware(gf.GradientFlow(DIAGONAL, rates=2.0))),
        ("loss", lambda: adam(gf.GradientFlow(DIAGONAL, penalty=gf.L1()))),
        ("noise", lambda: drifts.parameter_noise(DIAGONAL, UV, noise=jnp.nan)),
    ],
)  # fmt: skip
def test_what_makes_no_sense(name, make):
    with pytest.raises(ValueError, match=f"^{name}: [^\n]*$"):
        make()


FLIPPED = gf.Logistic(SIGNS, jnp.array([0.0, 1.0]))
LARGE = Diagonal(jnp.ones(2000), jnp.ones(2000))


def weighted():
    return gf.SquaredError(SIGNS, DIAGONAL.y, weights=jnp.array([1.0, 2.0]))


def label_noise(loss=DIAGONAL, **options):
    usual = dict(learning_rate=H, label_noise=0.5)
    return drifts.label_noise(loss, UV, **(usual | options))


def aware(loss=DIAGONAL, model=UV, **options):
    return drifts.sharpness_aware(loss, model, **({"radius": 1.0} | options))


def adam(loss):
    return drifts.adam(loss, UV, learning_rate=H, label_noise=1.0)


# Real descents, of many seeds: the mean of each approaches the drift.

UNEVEN = gf.SquaredError(jnp.array([[1.5, 0.5]]).T * SIGNS, DIAGONAL.y)
TANH = gf.SquaredError(jnp.array([[1.0, 0.5], [-0.5, 1.0]]), jnp.array([0.5, -0.4]))
END = 0.1  # of slow time


def vector(model):
    return np.asarray(ravel_pytree(model)[0])


def vectors(params):
    return jax.vmap(lambda p: ravel_pytree(p)[0])(params)


def start(name, seed=3):
    losses = {"diagonal": DIAGONAL, "uneven": UNEVEN, "tanh": TANH}
    loss, model = losses[name], net(seed=seed) if name == "tanh" else UV
    return loss, gf.manifold.limit_map(loss, model).model


def drift_of(effective, model, end=END):
    """Where the drift is at that slow time."""
    run = gf.manifold.riemannian_flow(
        effective.flow, model, slow_time=end, ts=jnp.linspace(0, end, 3), rtol=1e-7
    )
    return np.asarray(vectors(run.params))[-1]


def count(effective, h, end=END):
    """How many steps take an optimiser there."""
    return round(end / (float(effective.weight_decay) * h))


def descents(loss, model, effective, h, seeds, end=END, **options):
    """Where descents of many seeds are."""
    steps = count(effective, h, end)

    @jax.jit
    @jax.vmap
    def run(key):
        path = gf.descent(
            gf.GradientFlow(loss), model, weight_decay=0.0, learning_rate=h,
            at=[0, steps // 2, steps], key=key, **options,
        )  # fmt: skip
        return vectors(path.params)[-1]

    return np.asarray(run(jr.split(jr.key(1), seeds)))


def steps_of(step, theta, seeds, steps):
    """The same of steps θ ↦ `step`(θ, key) from θ."""

    @jax.jit
    @jax.vmap
    def run(key):
        each = lambda i, th: step(th, jr.fold_in(key, i))
        return jax.lax.fori_loop(0, steps, each, theta)

    return np.asarray(run(jr.split(jr.key(1), seeds)))


def relative(gap, whole):
    return np.linalg.norm(gap) / np.linalg.norm(whole)


def distance(found, exact):
    """Of one run from the drift, the root of the mean square."""
    return np.sqrt(((found - exact) ** 2).sum(axis=1).mean())


def rate(x, y):
    """p, of y ∝ xᵖ."""
    return np.polyfit(np.log(x), np.log(y), 1)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["diagonal", "tanh"])
def test_descent_with_label_noise(name):
    """One run is off the drift by √h, the mean by h. For steps that are not small
    LogTrace has most of what is missing."""
    loss, model = start(name)
    sigma, steps = 0.5, [0.04, 0.02, 0.01]
    distances, off = [], []
    for h in steps:
        settings = dict(learning_rate=h, label_noise=sigma)
        one = drifts.label_noise(loss, model, **settings)
        exact = drift_of(one, model)
        found = descents(loss, model, one, h, 256, label_noise=sigma)
        distances.append(distance(found, exact))
        off.append(relative(found.mean(axis=0) - exact, exact))
        if h == steps[0]:
            finite = drifts.label_noise(loss, model, finite_step=True, **settings)
            larger = drift_of(finite, model)
            finite_off = relative(found.mean(axis=0) - larger, larger)
    assert 0.4 < rate(steps, distances) < 0.6
    moved = relative(exact - vector(model), vector(model))
    assert moved > 0.12 and off[-1] < 0.01
    if name == "diagonal":  # on the other the mean is too near to tell
        assert moved > 0.4
        assert off[0] > 3 * off[-1] and finite_off < 0.4 * off[0]


@pytest.mark.slow
@pytest.mark.parametrize("name, h", [("diagonal", 0.005), ("tanh", 0.05)])
@pytest.mark.parametrize("relative_noise", [False, True])
def test_descent_with_noise_on_parameters(relative_noise, name, h):
    """One run is off the drift by σ, the root of what slow time goes by."""
    loss, model = start(name)
    theta, unravel = ravel_pytree(model)
    sigmas, distances = [0.1, 0.05], []
    for sigma in sigmas:
        one = drifts.parameter_noise(loss, model, noise=sigma, relative=relative_noise)

        def noisy(th, key, sigma=sigma):
            eta = sigma * jr.normal(key, th.shape)
            return loss(unravel(th * (1 + eta) if relative_noise else th + eta))

        step = lambda th, key, noisy=noisy: th - h * jax.grad(noisy)(th, key)
        found = steps_of(step, theta, 128, count(one, h))
        exact = drift_of(one, model)
        distances.append(distance(found, exact))
    assert 0.4 < rate(np.square(sigmas), distances) < 0.6
    assert relative(exact - theta, theta) > 0.04
    assert relative(found.mean(axis=0) - exact, exact) < 0.01


# Down λ₁ with all samples, for which λ₁ has to stay apart from λ₂ and ρ below h; down
# the trace with one. The two drifts are `apart`, relative to the norm.
AWARE = {
    "tanh": dict(batch=None, rho=0.02, h=0.02, end=0.1, apart=0.03),
    "uneven": dict(batch=None, rho=0.01, h=0.002, end=0.02, apart=0.01),
    "tanh, one": dict(batch=1, rho=0.05, h=0.001, end=0.1, apart=0.03),
    "uneven, one": dict(batch=1, rho=0.05, h=0.001, end=0.05, apart=0.01),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", AWARE)
def test_sharpness_aware_minimisation(name):
    settings = AWARE[name]
    batch, rho, h, end, apart = settings.values()
    loss, model = start(name.removesuffix(", one"))
    theta, unravel = ravel_pytree(model)

    def step(th, key):
        def of(th):
            residuals = jax.vmap(unravel(th))(loss.x) - loss.y
            if batch is None:
                return 0.5 * jnp.mean(residuals**2)
            return 0.5 * residuals[jr.randint(key, (), 0, 2)] ** 2

        up = jax.grad(of)(th)
        return th - h * jax.grad(of)(th + rho * up / (jnp.linalg.norm(up) + 1e-30))

    ours, other = (
        drifts.sharpness_aware(loss, model, radius=rho, batch_size=size)
        for size in ((None, 1) if batch is None else (1, None))
    )
    away = theta + 1e-6 * jr.normal(jr.key(2), theta.shape)
    found = steps_of(step, away, 1 if batch is None else 8, count(ours, h, end))
    exact, others = (drift_of(one, model, end) for one in (ours, other))
    off = relative(found.mean(axis=0) - exact, exact)
    assert off < 0.01 and off < 0.06 * relative(exact - theta, theta)
    assert relative(exact - others, exact) > apart


def with_own_rates(loss, model, c, end):
    """w' = −P G∇R, R = Σᵢ(∂ᵢ²F)^½ with G = (c∂ᵢ²F)^−½ at w, by SciPy."""
    theta, unravel = ravel_pytree(model)
    n = len(loss.y)

    def jacobian(th):
        return jax.jacrev(lambda th: loss.outputs(unravel(th)))(th)

    def roots(th):
        return jnp.sqrt(jnp.sum(jacobian(th) ** 2, axis=0) / n)

    @jax.jit
    def velocity(th):
        jac = jacobian(th)
        rates = 1 / (c**0.5 * roots(th))
        slope = rates * jax.grad(lambda th: jnp.sum(roots(th)))(th)
        kernel = jac @ (rates[:, None] * jac.T)
        return rates * (jac.T @ jnp.linalg.solve(kernel, jac @ slope)) - slope

    run = solve_ivp(lambda s, th: velocity(th), (0, end), theta, rtol=1e-7, atol=1e-9)
    return run.y[:, -1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["diagonal", "tanh"])
def test_adam_with_label_noise(name):
    """With G taken anew along the drift it is that of a G that changes; a run is off it
    by √h, where 1 − β₂ falls as h."""
    loss, model = start(name, seed=7)  # of which no unit dies
    theta, unravel = ravel_pytree(model)
    sigma, pieces, end = 0.5, 5, 0.01
    exact = with_own_rates(loss, model, sigma**2 / 2, end)
    at = model
    for _ in range(pieces):
        one = drifts.adam(loss, at, learning_rate=0.1, label_noise=sigma)
        at = unravel(jnp.asarray(drift_of(one, at, end / pieces)))
    moved = relative(exact - theta, theta)
    assert moved > 0.05
    assert relative(vector(at) - exact, exact) < 0.05 * moved
    steps, distances = [0.002, 0.0005], []
    for h in steps:
        one = drifts.adam(loss, model, learning_rate=h, label_noise=sigma)
        found = descents(
            loss, model, one, h, 16, end, label_noise=sigma,
            optimiser=lambda rate, h=h: optax.adam(rate, b2=1 - 0.25 * h),
        )  # fmt: skip
        distances.append(distance(found, exact))
    assert 0.4 < rate(steps, distances) < 0.6
    assert relative(found.mean(axis=0) - exact, exact) < 0.01


@pytest.mark.slow
def test_grokking_by_label_noise():
    """Without any weight decay, the time is predicted within 5 %."""
    n, d, h, sigma = 12, 24, 0.02, 0.5
    x = jr.rademacher(jr.key(0), (n, d), float)
    beta = jnp.zeros(d).at[:2].set(jnp.array([1.0, -1.0]))
    loss = gf.SquaredError(x, x @ beta)
    model = gf.models.DifferenceNetwork(*[jnp.full(d, 0.7)] * 2)
    size = lambda model: 0.5 * jnp.sum((model.beta - beta) ** 2)
    test = gf.Metric(size, threshold=0.1)
    flow, lam = drifts.label_noise(loss, model, learning_rate=h, label_noise=sigma)
    theory = gf.two_phase(flow, model, slow_time=0.5, metrics={"test": test})
    time = theory.grokking_time(lam).time
    at = np.unique(np.round(np.linspace(0, 1.3 * time / h, 600)).astype(int))

    @jax.jit
    @jax.vmap
    def run(key):
        path = gf.descent(
            gf.GradientFlow(loss), model, weight_decay=0.0, learning_rate=h, at=at,
            label_noise=sigma, key=key, metrics={"test": test},
        )  # fmt: skip
        return path.metrics["test"]

    mean = np.asarray(run(jr.split(jr.key(1), 8))).mean(axis=0)
    measured = gf.crossing_time(at * h, mean, test)
    assert mean[at * h > 30][0] > 0.4 and time > 50 * 30
    assert abs(measured / time - 1) < 0.05


@pytest.mark.slow
def test_theory_of_a_drift_against_the_flow():
    """The error of the first order falls as λ, of weight decay beside a trace too."""
    loss, model = start("tanh")
    flow, _ = drifts.label_noise(
        loss, model, learning_rate=0.1, label_noise=0.5, weight_decay=1e-3
    )
    away = gf.scaled(model, 1.1)
    theory = gf.two_phase(flow, away, slow_time=0.5)
    sweep = gf.sweep(
        flow, away, weight_decay=[1e-3, 3e-4, 1e-4], slow_time=0.5, progress=False
    )
    report = gf.compare(sweep, theory)
    rate = np.polyfit(np.log(sweep.weight_decay), np.log(report.orders[1].sup), 1)[0]
    assert 0.9 < rate < 1.1


@pytest.mark.slow
def test_where_the_largest_eigenvalue_has_company():
    """Down λ₁ of two samples alike, both eigenvalues meet: there the drift ends, and
    says so."""
    loss, model = start("diagonal")
    flow, _ = drifts.sharpness_aware(loss, model, radius=0.1)
    drift = gf.manifold.riemannian_flow(
        flow, model, slow_time=0.1, ts=jnp.linspace(0, 0.1, 41), throw=False,
        max_steps=2000,
    )  # fmt: skip
    assert drift.result != gf.RESULTS.successful
    gaps = [float(flow.penalty.gap(drift[i])) for i in range(41)]
    reached = np.isfinite(drift.penalty)
    assert reached[0] and gaps[0] > 0.05 and not reached[-1]
