"""The derivative of the limit map, against finite differences and what it must obey."""

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
from gradflow.flow import flatten
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


def stiff_network():
    """Curvatures over three decades."""
    loss, model = diagonal_problem(jr.key(7), samples=6, features=15)
    scales = jnp.logspace(0, -1.5, 15)
    x = loss.x * jnp.broadcast_to(scales, loss.x.shape)
    return gf.SquaredError(x, x[:, :2].sum(axis=1)), model


def test_derivative_off_the_manifold():
    """Forward, reverse, finite differences, and DΦ∇F = 0: Φ is constant along the
    flow."""
    phi, theta, gradient = flat_limit(*stiff_network())
    kv, ku = jr.split(jr.key(1))
    v, u = jr.normal(kv, theta.shape), jr.normal(ku, theta.shape)
    w, push = jax.linearize(phi, theta)
    forward = push(v)
    (backward,) = jax.linear_transpose(push, theta)(u)
    np.testing.assert_allclose(backward @ v, u @ forward, rtol=1e-11)
    # Central differences twice, so that their error is O(h⁴).
    difference = lambda h: (phi(theta + h * v) - phi(theta - h * v)) / (2 * h)
    h = 4e-3
    exact = (4 * difference(h / 2) - difference(h)) / 3
    assert jnp.linalg.norm(forward - exact) < 1e-5 * jnp.linalg.norm(forward)
    force = gradient(theta)
    assert jnp.linalg.norm(force) > 0.05
    assert jnp.linalg.norm(push(force)) < 1e-6 * jnp.linalg.norm(force)
    assert jnp.linalg.norm(forward) > 0.1 * jnp.linalg.norm(v)
    np.testing.assert_array_equal(w, phi(theta))


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


def test_derivative_of_a_batch():
    """Under jit and vmap as one by one; a lane without a limit is NaN, and alone."""
    loss, model = diagonal_problem(jr.key(7), samples=6, features=15)
    phi, theta, _ = flat_limit(loss, model, throw=False)
    u = jr.normal(jr.key(1), theta.shape)
    slope = lambda th: jax.linear_transpose(jax.linearize(phi, th)[1], th)(u)[0]
    starts = theta[None] + 0.1 * jr.normal(jr.key(2), (3, theta.size))
    starts = starts.at[1].set(jnp.zeros_like(theta))  # a saddle
    batch = eqx.filter_jit(jax.vmap(jax.grad(lambda th: phi(th) @ u)))(starts)
    assert jnp.isnan(batch[1]).all()
    np.testing.assert_allclose(batch[2], slope(starts[2]), rtol=1e-6, atol=1e-8)


def test_iterative_step_is_the_dense_one(monkeypatch):
    """What serves more than 1500 parameters: its linear systems, and their transpose
    in reverse mode."""
    loss, model = stiff_network()
    params, static = eqx.partition(model, eqx.is_inexact_array)
    theta, flat = flatten(loss, params, static)
    b = jr.normal(jr.key(1), theta.shape)
    solve = lambda b: _variational._shifted_solve(flat, theta, jnp.array(30.0), b)
    dense = solve(b), jax.vjp(solve, b)[1](b)[0]
    monkeypatch.setattr(_variational, "_DENSE", 0)
    iterative = solve(b), jax.vjp(solve, b)[1](b)[0]
    np.testing.assert_allclose(iterative[0], dense[0], atol=1e-9)
    np.testing.assert_allclose(iterative[1], dense[1], atol=1e-9)
    assert (dense[0] != iterative[0]).any()


def test_only_the_start_has_a_derivative():
    loss, model = diagonal_problem(jr.key(7), samples=6, features=15)
    limit = lambda y: manifold.limit_map(gf.SquaredError(loss.x, y), model).model
    with pytest.raises(ValueError, match="only the derivative in the initial"):
        jax.grad(lambda y: limit(y).u[0])(loss.y)
    trainable = Diagonal(True, False)
    half = lambda u, v: manifold.limit_map(
        loss, Diagonal(u, v), trainable=trainable
    ).model.u[0]
    with pytest.raises(ValueError, match="only the derivative in the initial"):
        jax.grad(half, 1)(model.u, model.v)
