"""The second order of the two-phase theory: its rate, its terms, and its error bar."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import first_of
from jax.flatten_util import ravel_pytree

import gradflow as gf
from gradflow.manifold.jacobian_form import JacobianForm
from gradflow.theory import second_order
from gradflow.theory.second_order import backward_differences, inner, Point

KEY = jax.random.key(0)


class Softened(gf.AbstractPenalty):
    """R(θ) = Σ √(1 + θ²) − 1: smooth, and neither quadratic nor rotation-invariant."""

    def __call__(self, params):
        each = (jnp.sum(jnp.sqrt(1 + p * p) - 1) for p in jax.tree.leaves(params))
        return jnp.asarray(sum(each))

    def gradient(self, params):
        return jax.tree.map(lambda p: p / jnp.sqrt(1 + p * p), params)


def diagonal():
    task = gf.tasks.diagonal_network(KEY, samples=5, dim=10, sparsity=2)
    return task.flow, task.model, 1.0


def teacher_student():
    task = gf.tasks.teacher_student(KEY, width=10, samples=4)
    return task.flow, task.model, 0.6


def soft_labels():
    """Neither loss nor penalty is quadratic."""
    x = jax.random.normal(jax.random.key(1), (4, 2))
    y = jnp.array([0.1, 0.8, 0.6, 0.3])
    flow = gf.GradientFlow(gf.Logistic(x, y, reduction="sum"), penalty=Softened())
    keys = jax.random.split(jax.random.key(3), 3)
    shapes = ((8, 2), (8,), (8,))
    drawn = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    return flow, gf.models.TwoLayer(*drawn), 0.5


# Of three layers of weights, and others: experiments/theory_limits.
PROBLEMS = {f.__name__: f for f in (diagonal, teacher_student, soft_labels)}


@pytest.fixture(scope="module", params=first_of(PROBLEMS))
def studied(request):
    flow, model, slow_time = PROBLEMS[request.param]()
    theory = gf.two_phase(flow, model, slow_time=slow_time, order=2, rtol=1e-10)
    sweep = gf.sweep(
        flow,
        model,
        weight_decay=jnp.array([3e-3, 1e-3, 3e-4, 1e-4, 3e-5]),
        slow_time=slow_time,
        solver=gf.KKT5(),
        saves=129,
        rtol=1e-10,
        progress=False,
    )
    return request.param, flow, theory, sweep, gf.compare(sweep, theory)


def test_rates_over_two_decades(studied):
    _, _, theory, _, report = studied
    assert np.all(report.valid_until == theory.drift.s[-1])
    ends = report.weight_decay[[0, -1]]
    for rate, order in report.orders.items():
        sup = order.error.max(axis=1)
        slopes = np.diff(np.log(sup)) / np.diff(np.log(report.weight_decay))
        whole = np.log(sup[0] / sup[-1]) / np.log(ends[0] / ends[1])
        assert abs(whole - rate) < 0.1, slopes
    first, second = (report.orders[k].error[1].max() for k in (1, 2))  # at λ = 1e-3
    gain = first / second
    assert gain > 10, gain
    assert abs(report.orders[2].rate.exponent - 2) < 0.1
    assert "theory: 2" in str(report)


def test_error_bars(studied):
    _, _, _, _, report = studied
    first, second = report.orders[1], report.orders[2]
    used = second.rate.used
    assert used.sum() >= 2
    # The triangle inequality; and the second error is small.
    off = np.abs(first.next_term - first.sup)
    assert np.all(off <= 1.01 * second.sup), off
    np.testing.assert_allclose(first.next_term, first.sup, rtol=0.1)
    ratio = second.sup[used] / second.next_term[used]
    assert np.all((ratio > 0.4) & (ratio < 2.5)), ratio


def test_start_and_end_of_the_fast_phase(studied):
    _, _, theory, _, _ = studied
    # θ₁(0) = 0: weight decay has had no time.
    for lam in (1e-2, 1e-4):
        start = theory.predict(0.0, lam, order=2)
        for a, b in zip(leaves(start), leaves(theory.predict(0.0, 0.0)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)
    flat = vectors(theory.second.inner)
    size = np.linalg.norm(flat, axis=1)
    assert size[-1] == 0 and size[-2] < 2e-6 * size.max()
    assert theory.second.mismatch < 1e-6


@pytest.mark.slow
def test_normal_and_tangent_parts(studied):
    _, flow, theory, _, _ = studied
    term, _ = flow.term(eqx.combine(theory.limit, theory.drift.static))
    for i in (0, 25):
        params = jax.tree.map(lambda p, i=i: p[i], theory.drift.params)
        at = Point(term, params, theory.spectrum)
        w1 = jnp.asarray(vectors(theory.second.tangent)[i])
        h = jnp.asarray(vectors(theory.second.offset)[i])
        assert np.linalg.norm(at.project(h)) < 1e-10 * np.linalg.norm(h)
        # To the tolerance of its equation, which is not told to stay tangent.
        assert np.linalg.norm(at.project(w1) - w1) < 1e-5 * np.linalg.norm(w1 + h)


@pytest.mark.slow
def test_hessian_form_agrees(studied):
    name, flow, theory, _, _ = studied
    if name != "diagonal":
        pytest.skip("one problem is enough")
    limit = eqx.combine(theory.limit, theory.drift.static)
    term, _ = flow.term(limit)
    dense = gf.manifold.spectrum(flow.loss, limit, form="hessian")
    paths = theory.fast, theory.drift
    other = second_order.second_order(term, *paths, dense, theory.fast_scale)
    for part in ("inner", "tangent", "offset"):
        a, b = (vectors(getattr(x, part)) for x in (theory.second, other))
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_ratio_is_that_of_the_next_term(studied):
    """What the second order leaves normal to M is λ²b, of size λ² ratio ‖h‖."""
    _, flow, theory, sweep, _ = studied
    term, _ = flow.term(eqx.combine(theory.limit, theory.drift.static))
    path = sweep[3]
    lam, ends = float(path.weight_decay), theory.drift.s
    i = int(np.argmin(abs(path.slow_time - ends[-1] / 2)))
    t, s = float(path.t[i]), float(path.slow_time[i])
    flat = lambda model: ravel_pytree(flow.partition(model)[0])[0]
    drift = flow.partition(theory.predict(t, lam, order=1))[0]
    at = Point(term, drift, theory.spectrum)
    left = flat(path[i]) - flat(theory.predict(t, lam, order=2))
    found = np.linalg.norm(left - at.project(left)) / np.linalg.norm(at.offset) / lam**2
    expected = np.interp(s, ends[: theory.second.ratio.size], theory.second.ratio)
    np.testing.assert_allclose(found, expected, rtol=0.05)


def test_the_next_term_inside_the_fast_phase(studied):
    """What the second order leaves is λ²q; the end of q, normal to M, is b(0)."""
    _, flow, theory, sweep, _ = studied
    second, path = theory.second, sweep[2]
    lam, q = float(path.weight_decay), vectors(theory.second.next)
    flat = lambda params: ravel_pytree(params)[0]
    i = int(np.argmin(abs(path.t - theory.fast.t[-1] / 4)))
    told = flow.partition(theory.predict(float(path.t[i]), lam, order=2))[0]
    left = (flat(flow.partition(path[i])[0]) - flat(told)) / lam**2
    expected = flat(theory._along_fast(second.next, path.t[i]))
    assert np.linalg.norm(left - expected) < 0.15 * np.linalg.norm(expected)
    term, _ = flow.term(eqx.combine(theory.limit, theory.drift.static))
    start = jax.tree.map(lambda p: p[0], theory.drift.params)
    at = Point(term, start, theory.spectrum)
    last = jnp.asarray(q[-1])
    found = jnp.linalg.norm(last - at.project(last)) / jnp.linalg.norm(at.offset)
    # The ratio at the very start takes a one-sided difference.
    np.testing.assert_allclose(found, second.ratio[0], rtol=0.1)
    sizes = [
        np.linalg.norm(x) / np.linalg.norm(at.w) for x in (second_at(second, 0), q[-1])
    ]
    np.testing.assert_allclose(
        second.fast_ratio[-1], max(sizes[0], sizes[1] ** 0.5), rtol=1e-5
    )


def second_at(second, i):
    """w₁ + h at node i of the drift."""
    return vectors(second.tangent)[i] + vectors(second.offset)[i]


def test_where_the_solver_of_the_tangent_part_stops(studied, monkeypatch):
    name, flow, theory, _, _ = studied
    if name != "diagonal":
        pytest.skip("one problem is enough")
    known, whole = 40, second_order.outer
    stopped = lambda *args: whole(*args).at[known:].set(jnp.inf)
    monkeypatch.setattr(second_order, "outer", stopped)
    term, _ = flow.term(eqx.combine(theory.limit, theory.drift.static))
    paths = theory.fast, theory.drift
    found = second_order.second_order(term, *paths, theory.spectrum, theory.fast_scale)
    assert found.until == theory.drift.s[known - 1]
    ratio = theory.second.ratio[:known]
    np.testing.assert_allclose(found.ratio[:-1], ratio[:-1], rtol=1e-9)
    np.testing.assert_allclose(found.ratio[-1], ratio[-1], rtol=0.1)


@pytest.mark.slow
def test_every_term_is_needed(studied):
    name, flow, theory, sweep, _ = studied
    if name != "teacher_student":
        pytest.skip("one generic network is enough")
    term, _ = flow.term(eqx.combine(theory.limit, theory.drift.static))
    second, drift = theory.second, theory.drift
    nothing = lambda tree: jax.tree.map(jnp.zeros_like, tree)
    start = jnp.asarray(vectors(second.tangent)[0])
    first = jax.tree.map(lambda p: p[0], second.tangent)
    stack = jax.vmap(ravel_pytree(first)[1])
    along = lambda w1, bend: stack(
        second_order.outer(
            term, drift.params, drift.s, drift.s, w1, theory.spectrum, bend
        )
    )
    whole = along(start, 1.0)
    for a, b in zip(leaves(whole), leaves(second.tangent), strict=True):
        np.testing.assert_array_equal(a, b)
    without = {
        "offset": dict(offset=nothing(second.offset)),
        "inner": dict(inner=nothing(second.inner)),
        "w₁(0)": dict(tangent=along(jnp.zeros_like(start), 1.0)),
        "D²Φ": dict(tangent=along(start, 0.0)),
    }
    for name, change in without.items():
        maimed = dataclasses.replace(
            theory, second=dataclasses.replace(second, **change)
        )
        sup = gf.compare(sweep, maimed).orders[2].error.max(axis=1)
        lams = np.asarray(sweep.weight_decay)
        slope = np.log(sup[2] / sup[-1]) / np.log(lams[2] / lams[-1])
        assert abs(slope - 1) < 0.1, (name, slope)


def leaves(tree):
    return jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))


def vectors(params):
    return np.asarray(jax.vmap(lambda p: ravel_pytree(p)[0])(params))


@pytest.mark.slow
def test_second_derivative_of_the_limit_map():
    flow, model, _ = soft_labels()
    limit = gf.manifold.limit_map(flow.loss, model, rtol=1e-11)
    term, params = flow.term(limit.model)
    found = gf.manifold.spectrum(flow.loss, limit.model)
    at = Point(term, params, found)
    h, gradient = (
        at.offset,
        at.drift - at.root.T @ (at.root @ at.offset),
    )  # ∇R = P∇R − Hh
    np.testing.assert_allclose(
        gradient, ravel_pytree(flow.penalty.gradient(params))[0], atol=1e-10
    )
    unravel = ravel_pytree(params)[1]
    a, b = h / jnp.linalg.norm(h), gradient / jnp.linalg.norm(gradient)

    def phi(theta):
        moved = eqx.combine(unravel(theta), term.static)
        out = gf.manifold.limit_map(flow.loss, moved, rtol=1e-12)
        return ravel_pytree(flow.partition(out.model)[0])[0]

    def mixed(step):
        corner = lambda i, j: phi(at.w + step * (i * a + j * b))
        same, opposite = corner(1, 1) + corner(-1, -1), corner(1, -1) + corner(-1, 1)
        return (same - opposite) / (4 * step**2)

    exact = at.bending() / (jnp.linalg.norm(h) * jnp.linalg.norm(gradient))
    # This is the tangent part of D²Φ, all that the drift needs of it.
    errors = [
        float(jnp.linalg.norm(at.project(mixed(step)) - exact)) for step in (0.06, 0.03)
    ]
    assert errors[1] < 0.05 * jnp.linalg.norm(exact)
    assert abs(np.log2(errors[0] / errors[1]) - 2) < 0.3, errors


@pytest.mark.slow
def test_derivative_of_the_drift_field():
    flow, model, _ = soft_labels()
    limit = gf.manifold.limit_map(flow.loss, model, rtol=1e-11)
    term, params = flow.term(limit.model)
    found = gf.manifold.spectrum(flow.loss, limit.model)
    at = Point(term, params, found)
    unravel = ravel_pytree(params)[1]
    v = at.project(jax.random.normal(jax.random.key(9), at.w.shape))
    v = v / jnp.linalg.norm(v)

    def field(step):
        moved = eqx.combine(unravel(at.w + step * v), term.static)
        moved = gf.manifold.retract(flow.loss, moved).model
        return -Point(term, flow.partition(moved)[0], found).drift

    step = 1e-4
    difference = (field(step) - field(-step)) / (2 * step)
    np.testing.assert_allclose(difference, at.field_jvp(v), atol=1e-6)


@pytest.mark.slow
def test_linear_regression_in_closed_form():
    task = gf.tasks.linear_regression(KEY, samples=5, dim=12)
    x, y = np.asarray(task.loss.x), np.asarray(task.loss.y)
    curvature, basis = np.linalg.eigh(x.T @ x / 5)
    force, start = basis.T @ (x.T @ y / 5), basis.T @ np.asarray(task.model.weights)
    inside = curvature > 1e-10
    k = np.where(inside, curvature, 1.0)
    scale = jnp.asarray(0.2 / curvature[-1])
    ts = scale * jnp.expm1(jnp.linspace(0.0, 1.0, 257) * jnp.log1p(40.0 / scale))
    t = np.asarray(ts)[:, None]
    decayed = np.exp(-k * t)
    path = np.where(inside, force / k + (start - force / k) * decayed, start) @ basis.T
    within = -force / k**2 * (1 - decayed) - (start - force / k) * t * decayed
    exact = np.where(inside, within, 0.0) @ basis.T
    speed = jnp.asarray(np.where(inside, 0.0, start) @ basis.T)
    term, _ = task.flow.term(task.model)
    path = jax.vmap(gf.models.LinearModel)(jnp.asarray(path))
    fast = second_order.FastPath(term, path, scale, JacobianForm())
    numerical = inner(fast, ts, ts[-1], speed)
    np.testing.assert_allclose(numerical, exact, atol=5e-8 * np.abs(exact).max())
    # θ₂ less its growth ½t²w°'': the coefficient of λ² in g/(k + λ) + … e^{−(k + λ)t}.
    rest = force / k**3 * (1 - decayed) - force / k**2 * t * decayed
    rest = rest + (start - force / k) * t**2 / 2 * decayed
    exact = np.where(inside, rest, 0.0) @ basis.T
    growth = second_order.Growth(speed, bend=speed, rise=jnp.zeros_like(speed))
    numerical2 = second_order.inner_next(fast, ts, ts[-1], numerical, growth)
    np.testing.assert_allclose(numerical2, exact, atol=1e-6 * np.abs(exact).max())
    # w₁ vanishes, and h = −(∇²F)⁺w.
    last = gf.models.LinearModel(path.weights[-1])
    found = gf.manifold.spectrum(task.loss, last, form="jacobian")
    assert found.rank == 5
    w1, h, _ = second_order.match(term, last, numerical[-1], found)
    exact_h = -np.where(inside, force / k**2, 0.0) @ basis.T
    np.testing.assert_allclose(h, exact_h, atol=1e-9)
    assert jnp.abs(w1).max() < 1e-6


def test_backward_differences():
    for order in (4, 5):
        alpha = np.asarray(backward_differences(order))
        for degree in range(order + 1):
            exact = degree == 1
            at = -np.arange(6.0)
            assert abs(alpha @ at**degree - exact) < 1e-10


def test_orders_that_there_are_not():
    flow, model, _ = diagonal()
    theory = gf.two_phase(flow, model, slow_time=1.0, rtol=1e-10)
    assert theory.second is None and "second order" not in str(theory)
    with pytest.raises(ValueError, match="order: the second was not computed"):
        theory.predict(1.0, 1e-3, order=2)
    with pytest.raises(ValueError, match="order: expected one of 1, 2"):
        theory.predict(1.0, 1e-3, order=3)
    with pytest.raises(ValueError, match="order: expected one of 1, 2"):
        gf.two_phase(flow, model, slow_time=0.3, order=0)
