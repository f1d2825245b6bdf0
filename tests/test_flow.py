"""The flow as a vector field, and as a Diffrax term."""

from typing import ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import Diagonal, diagonal_problem, linear_problem
from jax.flatten_util import ravel_pytree
from numpy.testing import assert_allclose

import gradflow as gf
import gradflow.flow.flat
from gradflow.flow.flat import flatten, linearized
from gradflow.flow.flow import partition
from gradflow.losses import samples
from gradflow.models import LinearModel, TwoLayer


class Quartic(gf.penalties.AbstractCurved):
    """R(θ) = ¼ Σ θᵢ⁴."""

    diagonal: ClassVar[bool] = True

    def __call__(self, params):
        return 0.25 * sum(jnp.sum(p**4) for p in jax.tree.leaves(params))

    def gradient(self, params):
        return jax.tree.map(lambda p: p**3, params)

    def curvature(self, params):
        return jax.tree.map(lambda p: 3 * p**2, params)


def numpy_force(model, loss):
    """∇F of the network ⟨u² − v², x⟩."""
    x, y, u, v = map(np.asarray, (loss.x, loss.y, model.u, model.v))
    slope = x.T @ (x @ (u**2 - v**2) - y) / len(y)
    return 2 * u * slope, -2 * v * slope


def test_velocity(getkey):
    loss, model = diagonal_problem(getkey(), samples=3, features=5)
    force_u, force_v = numpy_force(model, loss)
    velocity = gf.GradientFlow(loss).velocity(model, 0.3)
    assert_allclose(velocity.u, -force_u - 0.3 * np.asarray(model.u), rtol=1e-12)
    assert_allclose(velocity.v, -force_v - 0.3 * np.asarray(model.v), rtol=1e-12)


def test_penalty_of_your_own(getkey):
    loss, model = diagonal_problem(getkey(), samples=3, features=5)
    flow = gf.GradientFlow(loss, penalty=Quartic())
    force_u, _ = numpy_force(model, loss)
    velocity = flow.velocity(model, jnp.asarray(0.3))
    assert_allclose(velocity.u, -force_u - 0.3 * np.asarray(model.u) ** 3, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [gf.KKT4(), gf.KKT5()])
def test_solvers_take_the_penalty_of_the_flow(solver):
    """With no data to speak of, θ' = −λθ³: θ(t) = θ₀/√(1 + 2λθ₀²t)."""
    loss = gf.SquaredError(jnp.zeros((1, 3)), jnp.zeros(1))
    model = LinearModel(jnp.array([1.0, -0.5, 2.0]))
    flow = gf.GradientFlow(loss, penalty=Quartic())
    path = gf.simulate(
        flow, model, weight_decay=0.2, ts=jnp.array([0.0, 1.0, 10.0]), solver=solver
    )
    start, t = np.asarray(model.weights), np.asarray(path.t)[:, None]
    expected = start / np.sqrt(1 + 0.4 * start**2 * t)
    assert_allclose(path.params.weights, expected, rtol=5e-6)
    assert_allclose(path.penalty, 0.25 * (expected**4).sum(axis=1), rtol=2e-5)


@pytest.mark.slow
def test_frozen_leaves(getkey):
    """Only what is trainable moves, is penalised and is in the state."""
    loss, model = diagonal_problem(getkey(), samples=3, features=5)
    only_u = Diagonal(True, False)
    flow = gf.GradientFlow(loss, trainable=only_u)
    term, params = flow.term(model)
    assert params.v is None
    assert_allclose(params.u, model.u)
    velocity = flow.velocity(model, 0.1)
    assert velocity.v is None
    force_u, _ = numpy_force(model, loss)
    assert_allclose(velocity.u, -force_u - 0.1 * np.asarray(model.u), rtol=1e-12)

    path = gf.simulate(flow, model, weight_decay=0.1, t1=20.0, solver=gf.KKT5())
    assert_allclose(path.penalty[0], 0.5 * np.sum(np.asarray(model.u) ** 2))
    assert np.abs(path[-1].u - model.u).max() > 0.1
    assert eqx.tree_equal(path[-1].v, model.v)
    # At rest u is 0 or its force balances the decay: nothing pulls on v.
    moved = flow.velocity(path[-1], 0.1).u
    assert np.abs(moved).max() < 0.1 * np.abs(velocity.u).max()


def test_trainable_as_a_function_of_a_leaf(getkey):
    model = TwoLayer(
        jr.normal(getkey(), (4, 2)),
        jr.normal(getkey(), (4,)),
        jr.normal(getkey(), (4,)),
    )
    loss = gf.SquaredError(jnp.ones((3, 2)), jnp.zeros(3))
    flow = gf.GradientFlow(loss, trainable=lambda leaf: getattr(leaf, "ndim", 0) == 2)
    params, static = flow.partition(model)
    assert params.bias is None and params.outer is None
    assert static.inner is None
    assert eqx.tree_equal(eqx.combine(params, static), model)


def test_term_in_plain_diffrax(getkey):
    """The state is the pytree, `args` is λ, and the result is the closed form."""
    loss, model = linear_problem(getkey(), samples=3, features=5)
    truth = gf.tasks.LinearTruth(loss.x, loss.y, model.w, model.w, curvature=1 / 3)
    term, params = gf.GradientFlow(loss).term(model)
    solution = diffrax.diffeqsolve(
        term,
        diffrax.Tsit5(),
        0.0,
        5.0,
        None,
        params,
        args=0.2,
        stepsize_controller=diffrax.PIDController(rtol=1e-9, atol=1e-11),
    )
    assert_allclose(solution.ys.w[-1], truth.path(5.0, 0.2), rtol=1e-7, atol=1e-9)


def test_flat_loss(getkey):
    loss, model = diagonal_problem(getkey(), samples=3, features=5)
    term, params = gf.GradientFlow(loss).term(model)
    theta, flat = flatten(loss, params, term.static)
    force = np.concatenate(numpy_force(model, loss))
    u, v, x = map(np.asarray, (model.u, model.v, loss.x))
    jacobian = np.concatenate([2 * u * x, -2 * v * x], axis=1)
    assert eqx.tree_equal(flat.model(theta), model)
    assert_allclose(flat(theta), loss(model))
    assert_allclose(flat.gradient(theta), force, rtol=1e-11)
    assert_allclose(flat.jacobian(theta), jacobian, rtol=1e-12)
    assert_allclose(flat.outputs(theta), x @ (u**2 - v**2), rtol=1e-12)
    assert_allclose(jacobian.T @ np.asarray(flat.residuals(theta)), force, rtol=1e-11)
    opaque = flatten(gf.Loss(loss), params, term.static)[1]
    with pytest.raises(ValueError, match="^loss: Loss is not composite"):
        opaque.jacobian(theta)


def test_velocity_under_jit_and_vmap(getkey):
    loss, model = diagonal_problem(getkey(), samples=3, features=5)
    flow = gf.GradientFlow(loss)
    decays = jnp.array([0.0, 0.1, 10.0])
    stacked = eqx.filter_jit(jax.vmap(lambda decay: flow.velocity(model, decay)))(
        decays
    )
    for i, decay in enumerate(decays):
        one = ravel_pytree(flow.velocity(model, decay))[0]
        lane = ravel_pytree(jax.tree.map(lambda x: x[i], stacked))[0]  # noqa: B023
        assert_allclose(lane, one, rtol=1e-13)


def test_errors_name_the_argument():
    with pytest.raises((ValueError, TypeError), match="loss"):
        gf.GradientFlow(lambda model: 0.0)
    flow = gf.GradientFlow(gf.Loss(lambda model: jnp.zeros(())))
    half = [jnp.ones(2), jnp.ones(2, jnp.float32)]
    for model in ({}, {"name": "none", "count": 3}, half, jnp.ones(2, complex)):
        with pytest.raises(ValueError, match="^model: "):
            flow.partition(model)
    with pytest.raises(ValueError, match="^model: holds a NaN"):
        flow.partition(jnp.array([0.0, jnp.nan]))


# The tangent kernel


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("block", [2**28, 1000])
def test_tangent_kernel(sampled, block, monkeypatch, getkey):
    """JJᵀ, whole and in blocks, where samples are known to be independent or not."""
    monkeypatch.setattr(gradflow.flow.flat, "_BLOCK_BYTES", block)
    model = eqx.nn.MLP(3, 2, 4, 1, jnp.tanh, key=getkey())
    x, y = jax.random.normal(getkey(), (7, 3)), jnp.zeros((7, 2))
    at_once = {} if sampled else dict(predict=lambda m, x: jax.vmap(m)(x))
    params, static = partition(model)
    theta, loss = flatten(gf.SquaredError(x, y, **at_once), params, static)
    assert (samples(loss.composite) is not None) == sampled
    assert (block > theta.nbytes * 14) == (block > 1000)
    jac = np.asarray(jax.jacfwd(loss.outputs)(theta))
    weights = np.linspace(0.5, 2.0, theta.size)
    assert_allclose(loss.jacobian(theta), jac, atol=1e-13)
    assert_allclose(loss.tangent_kernel(theta), jac @ jac.T, atol=1e-12)
    weighted = loss.tangent_kernel(theta, jnp.asarray(weights))
    assert_allclose(weighted, (jac * weights) @ jac.T, atol=1e-12)


def test_tangent_kernel_fits_into_memory():
    """2000 outputs and 1e5 parameters, in a compiled program of less than 4 GB."""
    model = eqx.nn.MLP(20, "scalar", 4545, 1, jnp.tanh, key=jax.random.key(0))
    loss = gf.SquaredError(jnp.zeros((2000, 20)), jnp.zeros(2000))
    params, static = partition(model)
    theta, flat = flatten(loss, params, static)
    assert theta.size > 99_000
    compiled = jax.jit(lambda th: flat.tangent_kernel(th)).lower(theta).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2e9


@jax.custom_vjp
def reverse_only(x):
    return x * jnp.exp(x)


reverse_only.defvjp(
    lambda x: (x * jnp.exp(x), x), lambda x, g: (g * (1 + x) * jnp.exp(x),)
)


@jax.custom_vjp
def known_by_its_slope(x):
    return jnp.sin(x)


known_by_its_slope.defvjp(
    lambda x: (jnp.sin(x), x),
    lambda x, g: (
        jax.pure_callback(
            lambda x, g: np.asarray(g) * np.cos(x),
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            x,
            g,
        ),
    ),
)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.vmap, jax.checkpoint])
def test_a_forward_product_of_what_has_reverse_ones_only(getkey, wrap):
    weights = jr.normal(getkey(), (4, 6))
    outputs = lambda fn: lambda x: jnp.tanh(weights @ wrap(fn)(x) ** 2)
    x, u = jr.normal(getkey(), (6,)), jr.normal(getkey(), (6,))
    v = jr.normal(getkey(), (4,))

    @jax.jit
    def products(x, u, v):
        z, push, pull = linearized(outputs(reverse_only), x)
        return z, push(u), pull(v)

    plain = outputs(lambda x: x * jnp.exp(x))
    jac = jax.jacfwd(plain)(x)
    right = plain(x), jac @ u, v @ jac
    for got, want in zip(products(x, u, v), right, strict=True):
        assert_allclose(got, want, rtol=1e-12)


def test_outputs_without_a_forward_product_are_refused():
    with pytest.raises(ValueError, match="solver=diffrax.Tsit5"):
        linearized(known_by_its_slope, jnp.ones(3))


@pytest.mark.slow
@pytest.mark.parametrize("solver", [gf.KKT4(), gf.RKC2()])
def test_a_run_of_a_model_with_reverse_products_only(getkey, solver):
    x, key = jr.normal(getkey(), (5, 2)), getkey()
    flow = gf.GradientFlow(gf.SquaredError(x, jnp.sin(x[:, 0])))

    def end(activation):
        model = eqx.nn.MLP(2, "scalar", 4, 1, activation, key=key)
        path = gf.simulate(
            flow, model, weight_decay=0.1, t1=3.0, saves=3, solver=solver
        )
        return ravel_pytree(path[-1].layers[0].weight)[0]

    plain = lambda x: x * jnp.exp(x)
    assert_allclose(end(reverse_only), end(plain), rtol=1e-9)
