"""The derivative of the limit map, against finite differences and what it must obey."""

from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import Diagonal, diagonal_problem, Product
from jax.flatten_util import ravel_pytree

import gradflow as gf
from gradflow import manifold
from gradflow.flow.flat import flatten
from gradflow.manifold import _variational


def flat_limit(loss, model, **options):
    """Φ as a function of one vector, and that vector."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    theta, unravel = ravel_pytree(params)

    def phi(theta):
        start = eqx.combine(unravel(theta), static)
        limit = manifold.limit_map(loss, start, **options).model
        return ravel_pytree(eqx.filter(limit, eqx.is_inexact_array))[0]

    gradient = jax.grad(lambda th: loss(eqx.combine(unravel(th), static)))
    return phi, theta, gradient


@pytest.fixture(scope="module")
def stiff():
    """A network with curvatures over three decades, and one feature that is always
    zero: its Φ at θ, and DΦ v forward and uᵀDΦ in reverse."""
    loss, model = diagonal_problem(jr.key(7), samples=6, features=15)
    scales = jnp.logspace(0, -1.5, 15).at[-1].set(0.0)
    x = loss.x * jnp.broadcast_to(scales, loss.x.shape)
    loss = gf.SquaredError(x, x[:, :2].sum(axis=1))
    phi, theta, gradient = flat_limit(loss, model)
    kv, ku = jr.split(jr.key(1))
    v, u = jr.normal(kv, theta.shape), jr.normal(ku, theta.shape)
    w, push = jax.linearize(phi, theta)
    (backward,) = jax.linear_transpose(push, theta)(u)
    return SimpleNamespace(**locals())


@pytest.mark.slow
def test_derivative_off_the_manifold(stiff):
    """Forward, reverse, finite differences, and DΦ∇F = 0: Φ is constant along the
    flow."""
    phi, theta, v, push = stiff.phi, stiff.theta, stiff.v, stiff.push
    forward = push(v)
    np.testing.assert_allclose(stiff.backward @ v, stiff.u @ forward, rtol=1e-11)
    # Central differences twice, so that their error is O(h⁴).
    difference = lambda h: (phi(theta + h * v) - phi(theta - h * v)) / (2 * h)
    h = 4e-3
    exact = (4 * difference(h / 2) - difference(h)) / 3
    assert jnp.linalg.norm(forward - exact) < 1e-5 * jnp.linalg.norm(forward)
    force = stiff.gradient(theta)
    assert jnp.linalg.norm(force) > 0.05
    assert jnp.linalg.norm(push(force)) < 1e-9 * jnp.linalg.norm(force)
    assert jnp.linalg.norm(forward) > 0.1 * jnp.linalg.norm(v)
    np.testing.assert_array_equal(stiff.w, phi(theta))


@pytest.mark.slow
def test_derivative_without_interpolation():
    """uv = 1 and uv = 2 at once: the limit is on uv = y = 3/2, with c = u² − v²
    conserved: u∞² = (c + √(c² + 4y²))/2, in closed form."""
    loss = gf.SquaredError(jnp.ones(2), jnp.array([1.0, 2.0]))

    def exact(u, v):
        c = u**2 - v**2
        return jnp.sqrt((c + jnp.sqrt(c**2 + 4 * 1.5**2)) / 2)

    limit = lambda model: manifold.limit_map(loss, model, form="hessian").model
    found = lambda u, v: limit(Product(u, v)).u
    at = jnp.array(1.3), jnp.array(-0.4)
    np.testing.assert_allclose(
        jax.grad(found, (0, 1))(*at), jax.grad(exact, (0, 1))(*at), rtol=1e-7
    )


@pytest.mark.slow
def test_derivative_on_the_manifold_is_the_projection():
    loss, model = diagonal_problem(jr.key(7), samples=6, features=15)
    limit = manifold.limit_map(loss, model).model
    phi, theta, _ = flat_limit(loss, limit)
    push = jax.linearize(phi, theta)[1]
    derivative = jax.vmap(push, out_axes=1)(jnp.eye(theta.size))
    unravel = ravel_pytree(limit)[1]
    project = lambda v: manifold.tangent_projection(loss, limit, unravel(v))
    projection = jax.vmap(lambda v: ravel_pytree(project(v))[0])(jnp.eye(theta.size))
    np.testing.assert_allclose(derivative, projection, atol=1e-9)
    jac = jax.jacobian(lambda th: loss.outputs(unravel(th)))(theta)
    np.testing.assert_allclose(jac @ derivative, jnp.zeros_like(jac), atol=1e-9)


@pytest.mark.slow
def test_derivative_of_a_batch():
    """Under jit and vmap as one by one; a lane without a limit is NaN, and alone. In
    each DΦ∇F = 0, seen along a random u to 1e-7, what a derivative is exact to."""
    loss, model = diagonal_problem(jr.key(7), samples=6, features=15)
    phi, theta, gradient = flat_limit(loss, model, throw=False)
    u = jr.normal(jr.key(1), theta.shape)
    slope = lambda th: jax.linear_transpose(jax.linearize(phi, th)[1], th)(u)[0]
    starts = theta[None] + 0.5 * jr.normal(jr.key(2), (4, theta.size))
    starts = starts.at[1].set(jnp.zeros_like(theta))  # a saddle
    batch = eqx.filter_jit(jax.vmap(jax.grad(lambda th: phi(th) @ u)))(starts)
    assert jnp.isnan(batch[1]).all()
    np.testing.assert_allclose(batch[2], slope(starts[2]), rtol=1e-6, atol=1e-8)
    forces = jax.vmap(gradient)(starts)
    along = jnp.abs(jnp.sum(batch * forces, axis=1))
    size = jnp.linalg.norm(batch, axis=1) * jnp.linalg.norm(forces, axis=1)
    kept = np.arange(4) != 1
    assert (size[kept] > 1).all() and (along < 1e-7 * size)[kept].all()


@pytest.mark.slow
def test_iterative_step_is_the_dense_one(stiff, monkeypatch):
    """What serves more than 1500 parameters: its linear systems, and their transpose
    in reverse mode. ∇²F leaves the weights of the dead feature alone; where b is zero
    there as well, 0/0 would end the iteration."""
    # On M: off it, c = 10⁷ would meet negative curvature.
    params, static = eqx.partition(stiff.model, eqx.is_inexact_array)
    flat = flatten(stiff.loss, params, static)[1]
    b = stiff.u.at[14].set(0.0)
    solve = lambda b, c: _variational._shifted_solve(flat, stiff.w, c, b)

    def answers(c):
        forward, transpose = jax.vjp(lambda b: solve(b, c), b)
        return forward, transpose(b)[0]

    cs = jnp.array([1.0, 30.0, 1e7])
    dense = jax.vmap(answers)(cs)
    monkeypatch.setattr(_variational, "_DENSE", 0)
    iterative = jax.vmap(answers)(cs)
    for one, two in zip(dense, iterative, strict=True):
        np.testing.assert_allclose(two, one, atol=1e-9)
        assert (one != two).any()


@pytest.mark.slow
def test_iterative_derivative_is_the_dense_one(stiff, monkeypatch):
    monkeypatch.setattr(_variational, "_DENSE", 0)
    made = _variational.pushforward.__wrapped__
    fresh = lambda *args: made(*args)  # not the one compiled before
    monkeypatch.setattr(_variational, "pushforward", eqx.filter_jit(fresh))
    backward = jax.grad(lambda th: stiff.phi(th) @ stiff.u)(stiff.theta)
    np.testing.assert_allclose(backward, stiff.backward, atol=1e-9)
    assert (backward != stiff.backward).any()


@pytest.mark.parametrize("broken", [jnp.nan, -1.0])
def test_a_system_that_fails_is_nan(broken):
    """And one that does not is exact, b = 0 included."""
    solve = lambda scale, b: _variational._conjugate_gradients(lambda x: scale * x, b)
    bad = jnp.array([1.0, broken])
    assert jnp.isnan(solve(bad, jnp.ones(2))).all()
    np.testing.assert_allclose(solve(jnp.array([1.0, 4.0]), jnp.ones(2)), [1, 0.25])
    np.testing.assert_array_equal(solve(jnp.ones(2), jnp.zeros(2)), jnp.zeros(2))


@pytest.mark.slow
def test_only_the_start_has_a_derivative():
    loss, model = diagonal_problem(jr.key(7), samples=6, features=15)
    limit = lambda y: manifold.limit_map(gf.SquaredError(loss.x, y), model).model
    with pytest.raises(ValueError, match="only the derivative in the initial"):
        jax.eval_shape(jax.grad(lambda y: limit(y).u[0]), loss.y)
    trainable = Diagonal(True, False)
    half = lambda u, v: manifold.limit_map(
        loss, Diagonal(u, v), trainable=trainable
    ).model.u[0]
    with pytest.raises(ValueError, match="only the derivative in the initial"):
        jax.eval_shape(jax.grad(half, 1), model.u, model.v)
