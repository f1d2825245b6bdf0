"""Losses of a margin: closed forms, extreme margins, and support vector machines."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.integrate import solve_ivp
from scipy.optimize import minimize

import gradflow as gf
from gradflow.models import LinearModel

SMOOTH = functools.partial(gf.Hinge, delta=0.7)
KINDS = {
    "exponential": gf.Exponential,
    "soft": gf.SoftMargin,
    "hinge": gf.Hinge,
    "smooth": SMOOTH,
}


def plain(kind, margin):
    """φ and φ′, in NumPy, of numbers of any precision."""
    if kind == "exponential":
        return np.exp(-margin), -np.exp(-margin)
    if kind == "soft":
        return np.log1p(np.exp(-margin)), -1 / (1 + np.exp(margin))
    delta = np.inf if kind == "hinge" else 0.7
    lack = np.maximum(1 - margin, 0)
    inner = np.minimum(lack, delta)
    return inner * (lack - inner / 2), -inner


def classes(seed=0, n=12, d=4, gap=0.4):
    """Points on two sides of a plane through zero, `gap` or more away from it."""
    rng = np.random.default_rng(seed)
    u = rng.normal(size=d)
    u /= np.linalg.norm(u)
    x = rng.normal(size=(n, d))
    y = np.sign(x @ u)
    return x + gap * y[:, None] * u, y


def support_vectors(x, y):
    """The w of least norm whose margins are all 1 or more."""
    found = minimize(
        lambda w: 0.5 * w @ w,
        np.linalg.lstsq(x, 3 * y, rcond=None)[0],
        jac=lambda w: w,
        constraints=[
            {
                "type": "ineq",
                "fun": lambda w: y * (x @ w) - 1,
                "jac": lambda w: y[:, None] * x,
            }
        ],
        options={"ftol": 1e-15, "maxiter": 500},
    )
    assert (y * (x @ found.x)).min() > 1 - 1e-9
    return found.x


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_residuals(kind):
    """With two outputs for each sample, each reduction, with weights and without."""
    rng = np.random.default_rng(1)
    z, y = 2 * rng.normal(size=(5, 2)), np.sign(rng.normal(size=(5, 2)))
    w = np.array([1.0, 0.0, 2.5, 0.3, 1.7])
    value, slope = plain(kind, y * z)
    for weights in (None, jnp.asarray(w)):
        each = np.ones(5) if weights is None else w
        for reduction in ("mean", "sum"):
            c = 1 if reduction == "sum" else 1 / each.sum()
            loss = KINDS[kind](
                jnp.asarray(z), jnp.asarray(y.astype(int)), weights=weights,
                reduction=reduction, predict=lambda model, x: x,
            )  # fmt: skip
            assert_allclose(loss(None), c * (each @ value).sum(), rtol=1e-13)
            right = (c * each[:, None] * y * slope).ravel()
            assert_allclose(loss.residuals(None), right, rtol=1e-13, atol=1e-17)
            by_residuals = loss.outer_from(jnp.asarray(right), jnp.asarray(z.ravel()))
            assert_allclose(by_residuals, loss(None), rtol=1e-12)
            margins = np.where(each[:, None] > 0, y * z, np.inf).ravel()
            assert_allclose(loss.margins(jnp.asarray(z.ravel())), margins)
    # A slope of the wrong sign makes no loss that is negative, nor one of far samples.
    wrong = loss.outer_from(jnp.asarray(-right), jnp.asarray(z.ravel()))
    assert 0 <= wrong <= loss(None) * (1 + 1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exponential_has_all_digits(dtype):
    """Down to the smallest numbers, and so have three derivatives."""
    end = {"float32": 86, "float64": 705}[dtype]
    z = np.array([-20, -1, -1e-6, 0, 1e-6, 0.5, 30, end], dtype)
    y, u = np.ones_like(z), np.linspace(1, 2, z.size, dtype=dtype)
    loss = gf.Exponential(jnp.zeros(z.size, dtype), jnp.asarray(y), reduction="sum")
    right = np.exp(-z.astype(np.longdouble))
    slope = jax.grad(loss.outer)
    along = lambda fn: lambda z: jax.jvp(fn, (z,), (jnp.asarray(u),))[1]
    found = slope(jnp.asarray(z)), along(slope)(jnp.asarray(z)), along(along(slope))(z)
    eps = np.finfo(dtype).eps
    for power, got in enumerate(found):
        sign = (-1) ** (power + 1)
        assert_allclose(got, (sign * right * u**power).astype(float), rtol=20 * eps)
    # In one number: the error of exp alone.
    for one, value in zip(z, right, strict=True):
        each = gf.Exponential(jnp.zeros(1), jnp.asarray([-1.0], dtype))
        assert_allclose(each.outer(jnp.asarray([-one])), float(value), rtol=8 * eps)


def test_soft_margin_is_the_logistic_loss():
    z = jnp.asarray([-800.0, -30, -1, -1e-9, 0, 0.3, 2, 40, 700])
    y = jnp.asarray([1.0, -1, 1, 1, -1, -1, 1, 1, 1])
    one, two = gf.SoftMargin(z, y), gf.Logistic(z, 0.5 * (1 + y))
    for fn in (lambda f: f.outer(z), lambda f: jax.grad(f.outer)(z)):
        np.testing.assert_array_equal(fn(one), fn(two))
    r = jax.grad(one.outer)(z)
    np.testing.assert_array_equal(one.outer_from(r, z), two.outer_from(r, z))


def test_a_hinge_counts_the_samples_at_their_margin():
    margins = jnp.asarray([-3.0, 0.5, 1 - 1e-14, 1.0, 1 + 1e-14, 1 + 1e-9, 4])
    y = jnp.asarray([1.0, -1, 1, -1, 1, 1, -1])
    for delta, first in ((np.inf, 1.0), (2.0, 0.0)):
        loss = gf.Hinge(y, y, delta=delta, reduction="sum")
        curved = jax.jvp(jax.grad(loss.outer), (y * margins,), (jnp.ones(7),))[1]
        assert_allclose(curved, [first, 1, 1, 1, 1, 0, 0])
        slope = y * jax.grad(loss.outer)(y * margins)
        lack = np.minimum(np.maximum(1 - np.asarray(margins), 0), delta)
        np.testing.assert_array_equal(slope, -lack)


ERRORS = [
    (lambda x: gf.Exponential(x, jnp.array([0.0, 1.0])), "^y: expected -1 and 1"),
    (lambda x: gf.Hinge(x, jnp.array([True, False])), "^y: expected -1 and 1"),
    (lambda x: gf.SoftMargin(x, jnp.array([1.0, 0.5])), "^y: expected -1 and 1"),
    (
        lambda x: gf.Hinge(x, jnp.array([1, -1]), delta=0.0),
        "^delta: 0 is the plain hinge",
    ),
    (lambda x: gf.Hinge(x, jnp.array([1, -1]), delta=-1.0), "^delta: expected a pos"),
    (lambda x: gf.Hinge(x, jnp.array([1, -1, 1])), "^x: .*2.*3"),
    (lambda x: gf.Exponential(x, jnp.array([1, -1]), reduction="no"), "reduction"),
]


@pytest.mark.parametrize(("make", "words"), ERRORS)
def test_errors_name_the_argument(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make(jnp.ones((2, 3)))


def flow_to(loss, start, ts, solver=None, **how):
    model = LinearModel(jnp.asarray(start, float))
    return gf.simulate(
        gf.GradientFlow(loss), model, weight_decay=0.0, ts=jnp.asarray(ts),
        solver=solver or gf.KKT5(), **how,
    )  # fmt: skip


def test_one_sample_of_the_exponential_loss():
    """θ = log(1 + t), from margins of 0 to one of 645, at a loss of 1e-280."""
    loss = gf.Exponential(jnp.ones((1, 1)), jnp.ones(1))
    ts = np.append(0, np.geomspace(1e-2, 1e280, 600))
    path = flow_to(loss, [0.0], ts, rtol=1e-8)
    theta = np.asarray(path.params.weights)[:, 0]
    assert_allclose(theta, np.log1p(ts), rtol=1e-7)
    assert_allclose(np.log(path.train_loss), -theta, rtol=1e-12)
    assert 1e-281 < path.train_loss[-1] < 1e-279


@pytest.mark.slow
def test_one_sample_of_the_others():
    x, y = jnp.ones((1, 1)), -jnp.ones(1)
    ts = np.append(0, np.geomspace(1e-2, 50, 40))
    hinge = flow_to(gf.Hinge(x, y), [0.0], ts, rtol=1e-8)
    assert_allclose(hinge.params.weights[:, 0], -(1 - np.exp(-ts)), atol=1e-7)
    # At a constant speed δ, until the margin is δ away.
    smooth = flow_to(gf.Hinge(x, y, delta=0.5), [2.0], ts, rtol=1e-8)
    there = (2 + 0.5) / 0.5
    right = np.where(ts < there, 2 - 0.5 * ts, -1 + 0.5 * np.exp(there - ts))
    assert_allclose(smooth.params.weights[:, 0], right, atol=1e-6)
    soft = flow_to(
        gf.SoftMargin(x, y), [0.0], np.append(0, np.geomspace(1e-2, 1e30, 90))
    )
    m = -np.asarray(soft.params.weights)[:, 0]  # m + eᵐ = 1 + t
    assert_allclose(m + np.exp(m), 1 + np.asarray(soft.t), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_paths_are_those_of_radau(kind):
    x, y = classes(3)
    y[:2] *= -1  # not separable
    w, lam = np.linspace(0.1, 2, y.size), 1e-3
    loss = KINDS[kind](jnp.asarray(x), jnp.asarray(y), weights=jnp.asarray(w))
    start = np.random.default_rng(4).normal(size=x.shape[1])

    def velocity(t, th):
        return -x.T @ (w * y * plain(kind, y * (x @ th))[1]) / w.sum() - lam * th

    ts = np.append(0, np.geomspace(0.1, 5e3, 30))
    right = solve_ivp(
        velocity, (0, ts[-1]), start, "Radau", ts, rtol=1e-11, atol=1e-12, max_step=20
    )
    for solver in (gf.KKT4(), gf.RKC2()):
        path = gf.simulate(
            gf.GradientFlow(loss), LinearModel(jnp.asarray(start)), weight_decay=lam,
            ts=jnp.asarray(ts), rtol=1e-7, solver=solver,
        )  # fmt: skip
        assert_allclose(path.params.weights, right.y.T, atol=5e-6)
        losses = [(w @ plain(kind, y * (x @ th))[0]) / w.sum() for th in right.y.T]
        assert_allclose(path.train_loss, losses, rtol=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["exponential", "soft"])
def test_direction_of_the_largest_margin(kind):
    """That of the support vector machine, whatever the weights; and without the sample
    whose weight is zero."""
    x, y = classes(5)
    machine = support_vectors(x, y)
    first = np.flatnonzero(y * (x @ machine) < 1 + 1e-6)[0]  # a support vector
    for weights in (None, np.linspace(0.5, 2, y.size), np.arange(y.size) != first):
        given = None if weights is None else jnp.asarray(weights)
        loss = KINDS[kind](jnp.asarray(x), jnp.asarray(y), weights=given)
        model = LinearModel(jnp.zeros(x.shape[1]))
        found = gf.manifold.limit_map(loss, model, t_max=1e250, throw=False)
        assert bool(found.result == gf.RESULTS.no_minimiser)
        left = np.ones(y.size, bool) if weights is None else np.asarray(weights) > 0
        w = support_vectors(x[left], y[left])
        assert_allclose(found.direction.weights, w / np.linalg.norm(w), atol=1e-5)
        assert_allclose(found.margin, 1 / np.linalg.norm(w), rtol=1e-5)
    assert float(found.margin) > 1.02 / np.linalg.norm(machine)


def test_what_has_underflown_is_no_limit():
    """At a margin of 800 the loss is zero in numbers, and nothing moves."""
    loss = gf.Exponential(jnp.ones((1, 1)), jnp.ones(1))
    far = LinearModel(jnp.asarray([800.0]))
    found = gf.manifold.limit_map(loss, far, form="jacobian", throw=False)
    assert bool(found.result == gf.RESULTS.not_converged)


def hinge_problem(seed=5):
    x, y = classes(seed)
    loss = gf.Hinge(jnp.asarray(x), jnp.asarray(y))
    return x, y, loss, gf.GradientFlow(loss)


def margins_of(model, x, y):
    return y * (x @ np.asarray(model.weights))


@pytest.mark.slow
@pytest.mark.parametrize("delta", [np.inf, 1.0])
@pytest.mark.parametrize("size", [0.0, 5.0])
def test_limit_of_a_hinge(delta, size):
    """Where the flow ends, on the boundary of the region of all minimisers; with δ = 1
    from where ℓ'' is zero for all samples."""
    x, y = classes(5)
    start = size * np.random.default_rng(6).normal(size=x.shape[1])
    loss = gf.Hinge(jnp.asarray(x), jnp.asarray(y), delta=delta)
    found = gf.manifold.limit_map(loss, LinearModel(jnp.asarray(start)))

    def velocity(t, th):
        return x.T @ (y * np.clip(1 - y * (x @ th), 0, delta)) / y.size

    right = solve_ivp(velocity, (0, 3e3), start, "LSODA", rtol=1e-12, atol=1e-12)
    assert_allclose(found.model.weights, right.y[:, -1], atol=1e-6)
    margins = margins_of(found.model, x, y)
    face = np.abs(margins - 1) < 1e-10
    assert face.any() and (margins[~face] > 1 + 1e-4).all()
    # The tangent space is that of the face.
    rank = np.linalg.matrix_rank(x[face])
    assert int(gf.manifold.spectrum(loss, found.model).rank) == rank
    v = np.random.default_rng(7).normal(size=x.shape[1])
    pv = gf.manifold.tangent_projection(loss, found.model, LinearModel(jnp.asarray(v)))
    right = v - np.linalg.pinv(x[face]) @ (x[face] @ v)
    assert_allclose(
        pv.model.weights if hasattr(pv, "model") else pv.weights, right, atol=1e-9
    )


@pytest.mark.slow
def test_drift_of_a_hinge_ends_at_the_support_vector_machine():
    """From inside the region, where it is plain decay, along its faces."""
    x, y, loss, flow = hinge_problem()
    machine = support_vectors(x, y)
    inside = LinearModel(jnp.asarray(30 * machine))
    drift = gf.manifold.riemannian_flow(flow, inside, slow_time=16.0)
    s, w = np.asarray(drift.s), np.asarray(drift.params.weights)
    free = s < np.log(30) - 1e-9
    assert_allclose(w[free], 30 * machine * np.exp(-s[free, None]), rtol=1e-7)
    assert np.isinf(np.asarray(drift.smallest_curvature)[free]).all()
    assert_allclose(w[-1], machine, atol=1e-5)
    other = LinearModel(jnp.asarray(machine + [9.0, -3.0, 4.0, 7.0]))
    limit = gf.manifold.limit_map(loss, other).model
    drift = gf.manifold.riemannian_flow(flow, limit, slow_time=16.0)
    assert_allclose(drift.params.weights[-1], machine, atol=1e-5)


@pytest.mark.slow
def test_two_phases_of_a_hinge():
    """The prediction is off by O(λ), though samples join and leave the face."""
    x, y, loss, flow = hinge_problem()
    start = LinearModel(jnp.asarray([4.0, -2.0, 3.0, 5.0]))
    theory = gf.two_phase(flow, start, slow_time=3.0)
    faces = {
        tuple(np.flatnonzero(y * (x @ w) < 1 + 1e-6))
        for w in np.asarray(theory.drift.params.weights)
    }
    assert len(faces) > 1
    errors = []
    for lam in (1e-2, 1e-3, 1e-4):
        path = gf.simulate(flow, start, weight_decay=lam, slow_time=3.0, rtol=1e-8)
        there = [theory.predict(t, weight_decay=lam).weights for t in path.t]
        errors.append(float(jnp.abs(jnp.stack(there) - path.params.weights).max()))
    assert errors[0] > 5 * errors[1] > 25 * errors[2] and errors[2] < 1e-2
    with pytest.raises(ValueError, match="^order: .*Hinge"):
        gf.two_phase(flow, start, slow_time=3.0, order=2)


@pytest.mark.slow
def test_squared_hinge_with_weight_decay_is_a_linear_svm():
    svm = pytest.importorskip("sklearn.svm")
    x, y, loss, flow = hinge_problem()
    y = y.copy()
    y[:2] *= -1
    loss = gf.Hinge(jnp.asarray(x), jnp.asarray(y))
    for lam in (1e-1, 1e-3):
        right = svm.LinearSVC(
            loss="squared_hinge", C=1 / (2 * y.size * lam), fit_intercept=False,
            tol=1e-10, max_iter=1_000_000,
        ).fit(x, y)  # fmt: skip
        path = gf.simulate(
            gf.GradientFlow(loss), LinearModel(jnp.zeros(x.shape[1])),
            weight_decay=lam, slow_time=40.0,
        )  # fmt: skip
        assert_allclose(path.params.weights[-1], right.coef_[0], atol=2e-5)


def test_far_samples_are_no_limit():
    """Of a Huber loss, and a smooth hinge, ℓ'' is zero where all samples are far: there
    J explains no force, and yet it is one."""
    x, y = jnp.asarray([[1.0], [2.0]]), jnp.asarray([1.0, 1.0])
    model = LinearModel(jnp.asarray([-9.0]))
    for loss in (gf.Huber(x, y), gf.Hinge(x, y, delta=0.5)):
        for form in ("jacobian", "hessian"):
            out = gf.manifold.retract(loss, model, form=form, throw=False)
            assert bool(out.result == gf.RESULTS.not_critical)
