"""The limit map Φ: where the flow ends, against closed forms and LSODA."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import (
    diagonal_problem,
    flat,
    Linear,
    linear_problem,
    overdetermined,
    Product,
    random_like,
)
from jax.flatten_util import ravel_pytree
from scipy.integrate import solve_ivp

import gradflow as gf
from gradflow import manifold
from gradflow.flow.flat import flatten
from gradflow.manifold.jacobian_form import JacobianForm
from gradflow.manifold.limit import _finish


@pytest.mark.slow
def test_limit_of_linear_regression(getkey):
    loss, model = linear_problem(getkey(), samples=4, features=9)
    w = model.w + jnp.linalg.pinv(loss.x) @ (loss.y - loss.x @ model.w)
    out = manifold.limit_map(loss, model)
    assert out.result == gf.RESULTS.successful
    np.testing.assert_allclose(out.model.w, w, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [None, diffrax.Tsit5()])
def test_limit_on_the_hyperbola(solver):
    """uv = y with u² − v² conserved: u² = (c + √(c² + 4y²))/2."""
    u, v, y = 1.3, -0.4, 2.0
    loss = gf.SquaredError(jnp.ones(1), jnp.full(1, y))
    out = manifold.limit_map(loss, Product(jnp.array(u), jnp.array(v)), solver=solver)
    c = u**2 - v**2
    limit = np.sqrt((c + np.sqrt(c**2 + 4 * y**2)) / 2)
    np.testing.assert_allclose(out.model.u, limit, rtol=1e-8)
    np.testing.assert_allclose(out.model.v, y / limit, rtol=1e-8)
    assert out.residual < 1e-12


def test_limit_keeps_the_invariants(diagonal):
    loss, start, limit = diagonal
    np.testing.assert_allclose(limit.u * limit.v, start.u * start.v, atol=1e-8)
    assert loss(limit) < 1e-24


def test_limit_is_the_identity_on_the_manifold(diagonal):
    loss, _, limit = diagonal
    again = manifold.limit_map(loss, limit)
    np.testing.assert_allclose(flat(again.model), flat(limit), atol=1e-13)


def test_derivative_of_the_limit_is_the_projection(diagonal, getkey):
    """DΦ = P on M, by central differences of Φ, whose error is O(h²)."""
    loss, _, limit = diagonal
    v = random_like(getkey(), limit)
    h = 1e-4
    move = lambda h: jax.tree.map(lambda p, q: p + h * q, limit, v)
    ends = [flat(manifold.limit_map(loss, move(x)).model) for x in (h, -h)]
    pv = flat(manifold.tangent_projection(loss, limit, v))
    np.testing.assert_allclose((ends[0] - ends[1]) / (2 * h), pv, atol=1e-6)


@pytest.mark.slow
def test_limit_where_the_data_cannot_be_fitted():
    """uv = 1 and uv = 2 at once: the Jacobian form meets residuals, the Hessian form
    takes over, and the limit is on uv = 3/2."""
    loss = gf.SquaredError(jnp.ones(2), jnp.array([1.0, 2.0]))
    out = manifold.limit_map(loss, Product(jnp.array(2.0), jnp.array(0.1)))
    assert out.result == gf.RESULTS.successful
    np.testing.assert_allclose(out.model.u * out.model.v, 1.5, rtol=1e-12)
    np.testing.assert_allclose(out.model.u**2 - out.model.v**2, 3.99, rtol=1e-8)
    found = manifold.spectrum(loss, out.model)
    assert found.form == "hessian" and found.dimension == 1


class Squares(eqx.Module):
    """f(x) = ⟨u⊙u, x⟩."""

    u: jax.Array

    def __call__(self, x):
        return x @ self.u**2


def lsoda_limit(loss, model, end):
    """Where SciPy is at time `end`, tolerances far below any size on the way."""
    theta, unravel = ravel_pytree(model)
    force = jax.grad(lambda th: loss(unravel(th)))
    field, slope = jax.jit(force), jax.jit(jax.jacfwd(force))
    out = solve_ivp(
        lambda t, th: -np.asarray(field(th)),
        (0.0, end),
        np.asarray(theta),
        method="LSODA",
        jac=lambda t, th: -np.asarray(slope(th)),
        rtol=1e-12,
        atol=1e-30,
    )
    assert out.success
    return out.y[:, -1]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["jacobian", "hessian"])
def test_limit_past_a_saddle(form):
    """From tiny starts one coordinate has arrived, to ten digits and more, before the
    others begin to grow; J explains nothing of their residuals, and their force is far
    below any tolerance."""
    x = jnp.array([[2.0, 0, 0, 0], [0, 0.3, 0.5, 0.2], [0, 0.4, 0, 0.6]])
    loss = gf.SquaredError(x, jnp.array([3.0, 0.25, 0.15]))
    for start in (1e-5, 1e-11, 1e-18):
        model = Squares(start * jnp.array([1.0, 0.7, 1.2, 0.5]))
        out = manifold.limit_map(loss, model, form=form)
        right = lsoda_limit(loss, model, 1e5)
        np.testing.assert_allclose(out.model.u, right, atol=1e-7)
        assert right[1:].max() > 0.5


@pytest.mark.slow
def test_limit_of_a_network_from_a_tiny_start():
    x = jnp.linspace(-1.0, 1.2, 3)
    loss = gf.SquaredError(x, jnp.array([0.4, -0.2, 0.5]))
    keys = jr.split(jr.key(3), 3)
    shapes = (4, 1), (4,), (4,)
    start = [1e-6 * jr.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
    model = gf.models.TwoLayer(*start)
    out = manifold.limit_map(loss, model)
    right = lsoda_limit(loss, model, 1e5)
    error = np.linalg.norm(flat(out.model) - right) / np.linalg.norm(right)
    assert error < 1e-7 and loss(out.model) < 1e-20


def test_the_last_move_is_as_short_as_it_seemed():
    """Beside the saddle u = (1, 1e-10), whence Gauss–Newton goes to (1, 1/2)."""
    loss = gf.SquaredError(jnp.eye(2), jnp.array([1.0, 0.25]))
    params, static = eqx.partition(Squares(jnp.array([1.0, 1e-10])), eqx.is_array)
    theta, flat_loss = flatten(loss, params, static)
    end, residual, found = _finish(flat_loss, theta, JacobianForm(), None)
    assert residual < 1e-10 and jnp.abs(end[1]) > 0.1 and not found
    _, _, found = _finish(flat_loss, jnp.array([1 + 1e-8, 0.5]), JacobianForm(), None)
    assert found


@pytest.mark.slow
def test_limit_from_zero(getkey):
    """The solution of least norm, in any unit of the targets."""
    loss, _ = linear_problem(getkey(), samples=3, features=5)
    least = jnp.linalg.pinv(loss.x) @ loss.y
    for unit in (1.0, 1e-9, 1e9):
        scaled = gf.SquaredError(loss.x, unit * loss.y)
        out = manifold.limit_map(scaled, Linear(jnp.zeros(5)))
        np.testing.assert_allclose(out.model.w / unit, least, atol=1e-10)


@pytest.mark.slow
def test_limit_in_other_units():
    """θ in units of c, outputs in units of b: t is in units of c²/b²."""
    x, y = jr.normal(jr.key(0), (3, 5)), jnp.array([1.0, -2.0, 0.5])
    u = jr.normal(jr.key(1), (5,))

    def limit(c, b):
        loss = gf.SquaredError(b / c**2 * x, b * y)
        return manifold.limit_map(loss, Squares(c * u))

    one = limit(1.0, 1.0)
    for c, b in ((1e-9, 1e9), (1e9, 1.0)):
        out = limit(c, b)
        np.testing.assert_allclose(out.model.u / c, one.model.u, atol=1e-11)
        np.testing.assert_allclose(out.time * (b / c) ** 2, one.time, rtol=1e-3)
        assert int(out.stats.steps) < 1.2 * int(one.stats.steps)


@pytest.mark.slow
def test_undefined_start():
    """The gradient of a norm at zero."""
    loss = gf.Loss(lambda m: (jnp.linalg.norm(m.w) - 1) ** 2)
    out = manifold.limit_map(loss, Linear(jnp.zeros(3)), throw=False)
    assert out.result == gf.RESULTS.undefined_start and out.stats.steps < 10


@pytest.mark.slow
def test_healthy_problems_make_no_nans(getkey):
    loss, model = diagonal_problem(getkey(), samples=2, features=4)
    with jax.debug_nans(True):
        for form in ("jacobian", "hessian"):
            limit = manifold.limit_map(loss, model, form=form).model
            assert manifold.spectrum(loss, limit, form=form).rank == 2
            drift = manifold.riemannian_flow(
                gf.GradientFlow(loss),
                limit,
                slow_time=0.5,
                ts=jnp.array([0.0, 0.5]),
                form=form,
            )
            assert drift.succeeded


@pytest.mark.slow
def test_limit_of_least_squares_without_interpolation(getkey):
    loss, model, pinv = overdetermined(getkey())
    out = manifold.limit_map(loss, model)
    w = model.w + pinv @ (loss.y - loss.x @ model.w)
    np.testing.assert_allclose(out.model.w, w, atol=1e-9)
    assert loss(out.model) > 0.1
    found = manifold.spectrum(loss, out.model)
    assert found.form == "hessian" and found.dimension == 2


@pytest.mark.slow
def test_separable_data_have_no_limit(getkey):
    x = jr.normal(jr.key(3), (12, 3))
    loss = gf.CrossEntropy(x, (x[:, 0] > 0).astype(int))
    model = eqx.nn.MLP(3, 2, 8, 1, activation=jnp.tanh, key=getkey())
    out = manifold.limit_map(loss, model, t_max=1e7, throw=False)
    assert out.result == gf.RESULTS.no_minimiser
    assert "of normalised margin 0." in str(out)
    with pytest.raises(Exception, match="no minimiser"):
        manifold.limit_map(loss, model, t_max=1e7)


@pytest.mark.slow
def test_inseparable_data_have_a_limit(getkey):
    """The same inputs with both labels: a minimiser exists, and is found."""
    x = jr.normal(getkey(), (6, 2))
    loss = gf.CrossEntropy(jnp.concatenate([x, x]), jnp.repeat(jnp.arange(2), 6))
    out = manifold.limit_map(loss, eqx.nn.Linear(2, 2, key=getkey()))
    assert out.result == gf.RESULTS.successful
    np.testing.assert_allclose(loss(out.model), jnp.log(2.0), rtol=1e-12)


class Bowl(gf.AbstractLoss):
    """F = Σ (a/2)(w − 9)² + (b/4) w⁴."""

    a: jax.Array
    b: jax.Array

    def __call__(self, model):
        w = model.w
        return jnp.sum(0.5 * self.a * (w - 9) ** 2 + 0.25 * self.b * w**4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "a, b, expected",
    [
        (-2.0, 0.0, gf.RESULTS.diverged),
        # w ~ t^(−1/2): too slow to arrive.
        (0.0, 4.0, gf.RESULTS.not_converged),
        # Relaxes at the rate 1e-8: the norm grows all along, but there is a minimiser.
        (1e-8, 0.0, gf.RESULTS.not_converged),
        (1.0, 0.0, gf.RESULTS.successful),
    ],
)
def test_how_a_flow_ends(a, b, expected):
    loss = Bowl(jnp.array(a), jnp.array(b))
    out = manifold.limit_map(loss, Linear(jnp.ones(2)), t_max=1e6, throw=False)
    assert out.result == expected


@pytest.mark.slow
def test_limit_out_of_steps(diagonal):
    loss, start, _ = diagonal
    for progress in (False, True):
        out = manifold.limit_map(
            loss, start, max_steps=3, throw=False, progress=progress
        )
        assert out.result == gf.RESULTS.out_of_steps and int(out.stats.steps) == 3
