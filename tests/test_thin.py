"""KKT where there are fewer parameters than outputs: one d × d matrix."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from numpy.testing import assert_allclose

import gradflow as gf
from gradflow.flow.flat import flatten, in_blocks
from gradflow.manifold.limit import default_solver
from gradflow.solvers import choose_solver, measure_size
from gradflow.solvers.kernel import (
    curved_kernel,
    is_thin,
    no_kernel,
    RENEWED,
    stage_curvature,
    StageMatrix,
    Thin,
    WHOLE,
)


def flat_at(path, at):
    return ravel_pytree(jax.tree.map(lambda x: x[at], path.params))[0]


def network(samples, *, width=2, loss=gf.SquaredError, noise=0.1):
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(samples, 2)))
    y = jnp.tanh(2 * x[:, 0]) * x[:, 1] + noise * draw.normal(size=samples)
    if loss is gf.Logistic:
        y = (y > 0).astype(float)
    model = eqx.nn.MLP(2, "scalar", width, 1, jnp.tanh, key=jr.key(1))
    return gf.GradientFlow(loss(x, y)), model


@pytest.mark.parametrize("loss", [gf.SquaredError, gf.Logistic])
@pytest.mark.parametrize("kind", ["even", "uneven", "whole"])
def test_change_solves_the_stage_equations(loss, kind):
    """A δθ + c Jᵀδμ = lack and δμ − ℓ''J δθ = off, as one system of d + m."""
    flow, model = network(30, loss=loss)
    params, static = flow.partition(model)
    theta, flat = flatten(flow.loss, params, static)
    mu, c = 5.0 * flat.residuals(theta), jnp.asarray(3.0)
    draw = np.random.default_rng(1)
    lack, off = (jnp.asarray(draw.normal(size=v.shape)) for v in (theta, mu))
    d, m = theta.size, mu.size
    alpha = jnp.asarray(1.3)
    matrix = alpha * jnp.eye(d)
    if kind == "uneven":
        alpha = jnp.asarray(draw.uniform(1, 3, size=d))
        matrix = jnp.diag(alpha)
    if kind == "whole":
        matrix = stage_curvature(flat, theta, mu, matrix, c)
    kernel = curved_kernel(flat, theta, None)
    assert isinstance(kernel, Thin)
    curvature = matrix if kind == "whole" else None
    effort = jnp.asarray(WHOLE if kind == "whole" else RENEWED)
    _, none = no_kernel(flat, theta, mu)
    found = StageMatrix.of(
        flat, kernel, curvature, alpha, c, effort, none, jnp.array(True)
    )
    z, push, pull = flat.linearize(theta)
    dy, dmu, _ = found.change(lack, off, z, push, pull)
    jac = flat.jacobian(theta)
    curved = jax.hessian(flat.outer)(z) @ jac
    system = jnp.block([[matrix, c * jac.T], [-curved, jnp.eye(m)]])
    expected = jnp.linalg.solve(system, jnp.concatenate([lack, off]))
    assert_allclose(dy, expected[:d], rtol=1e-9, atol=1e-10)
    assert_allclose(dmu, expected[d:], rtol=1e-9, atol=1e-9)
    # The multiplier alone, as its polish asks: shift (shift + ℓ''J A⁻¹Jᵀ)⁻¹ (ℓ''p + q).
    p, q = jnp.asarray(draw.normal(size=(2, m)))
    if kind != "whole":
        shift = 1 / c if kind == "uneven" else alpha / c
        scaled = matrix / alpha if kind == "even" else matrix
        inner = curved @ jnp.linalg.solve(scaled, jac.T) + shift * jnp.eye(m)
        right = jax.hessian(flat.outer)(z) @ p + q
        assert_allclose(
            found.solve(p, q, z, push, pull)[0],
            shift * jnp.linalg.solve(inner, right),
            atol=1e-8,
        )


@pytest.mark.parametrize(
    "loss", [gf.SquaredError, pytest.param(gf.Logistic, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("solver", [gf.KKT4(), gf.KKT5()])
def test_follows_the_flow(loss, solver):
    """Against the same loss taken as opaque, whose Hessian is exact."""
    flow, model = network(60, width=4, loss=loss)
    run = dict(weight_decay=1e-3, slow_time=2.0, saves=9)
    opaque = gf.GradientFlow(gf.Loss(lambda model: flow.loss(model)))
    exact = gf.simulate(opaque, model, solver=gf.KKT5(), rtol=1e-10, **run)
    path = gf.simulate(flow, model, solver=solver, rtol=1e-6, **run)
    for at in range(1, 9):
        found, expected = flat_at(path, at), flat_at(exact, at)
        error = jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)
        assert error < 5e-6, (at, error)
    assert_allclose(path.train_loss, exact.train_loss, rtol=1e-4)
    assert int(path.stats.rejected) <= 0.2 * int(path.stats.steps)


@pytest.mark.slow
def test_kinks_and_uneven_penalties():
    flow, model = network(40)
    lasso = gf.GradientFlow(flow.loss, penalty=gf.penalties.L1())
    path = gf.simulate(lasso, model, weight_decay=0.05, slow_time=2.0, rtol=1e-6)
    smooth = gf.GradientFlow(
        flow.loss, penalty=gf.penalties.Moreau(gf.penalties.L1(), epsilon=1e-7)
    )
    near = gf.simulate(smooth, model, weight_decay=0.05, slow_time=2.0, rtol=1e-6)
    assert_allclose(flat_at(path, -1), flat_at(near, -1), atol=1e-5)


def test_limit_of_many_outputs():
    """By KKT5, though the outputs are many: it is the parameters that are few. The
    limit is the solution of least squares."""
    flow, _ = network(600)
    model = eqx.nn.Linear(2, "scalar", key=jr.key(2))
    params, static = flow.partition(model)
    assert isinstance(default_solver(flow.loss, params, static), gf.KKT5)
    found = gf.manifold.limit_map(flow, model).model
    x = np.hstack([flow.loss.x, np.ones((600, 1))])
    expected = np.linalg.lstsq(x, flow.loss.y, rcond=None)[0]
    assert_allclose(np.append(found.weight, found.bias), expected, rtol=1e-8)


def test_neither_memory_nor_time_of_outputs_squared():
    """20 000 outputs: their kernel would be 3.2 GB. KKT is the choice."""
    flow, model = network(20_000)
    term, params = flow.term(model)
    size = measure_size(term, params, 1e-4, 2e4)
    assert isinstance(choose_solver(size).solver, gf.KKT4)
    path = gf.simulate(flow, model, weight_decay=1e-4, slow_time=2.0, saves=5)
    assert path.stats.solver == "KKT4" and path.stats.steps < 400
    theta = ravel_pytree(params)[0]
    assert is_thin(theta, jnp.zeros(20_000)) and not is_thin(theta, theta)


def test_recorded_loss_where_data_are_not_fitted():
    """It comes from the multiplier. With the curvature of the outputs in the matrix the
    polish of that went astray: here by 4e-4, elsewhere by a factor of 400."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(60, 2))
    y = np.sin(x @ draw.normal(size=(2, 3))) + 0.5 * draw.normal(size=(60, 3))
    model = eqx.nn.MLP(2, 3, 3, 1, jnp.tanh, key=jr.key(3))
    flow = gf.GradientFlow(gf.SquaredError(jnp.asarray(x), jnp.asarray(y)))
    path = gf.simulate(
        flow, model, weight_decay=1e-4, slow_time=2.0, saves=9, solver=gf.KKT4()
    )
    term, _ = flow.term(model)
    exact = jnp.stack(
        [
            flow.loss(term.model(jax.tree.map(lambda a, i=i: a[i], path.params)))
            for i in range(len(path))
        ]
    )
    assert_allclose(path.train_loss, exact, rtol=1e-5)


def test_in_blocks():
    """As many rows at once as there is memory for."""
    rows = jr.normal(jr.key(0), (7, 3))
    double = lambda row: jnp.outer(row, row).ravel()
    for size in (1, 2**19, 2**20, 2**22):
        assert_allclose(in_blocks(double, rows, size), jax.vmap(double)(rows))
    twice = lambda row: (double(row["x"]), row["k"])
    both = in_blocks(twice, dict(x=rows, k=rows), 2**19)
    assert_allclose(both[0], jax.vmap(double)(rows))
    assert_allclose(both[1], rows)
