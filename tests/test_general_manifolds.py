"""Manifolds of minima that do not interpolate or lack rank, and drifts into singular
points: with the answer from theory or from NumPy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import Product
from jax.flatten_util import ravel_pytree
from scipy.integrate import solve_ivp

import gradflow as gf
from gradflow import manifold, models


def balance(model):
    """W₂ᵀW₂ − W₁W₁ᵀ."""
    first, second = model.weights
    return second.T @ second - first @ first.T


def assert_drift(drift):
    """Along a drift F stays and the norm falls."""
    loss = np.asarray(drift.train_loss)
    np.testing.assert_allclose(loss, loss[0], rtol=1e-10, atol=1e-20)
    assert (jnp.diff(drift.penalty) < 0).all()


# --- Label noise on a network with hidden neurons ------------------------------------


def tanh_network(key, width):
    keys = jr.split(key, 3)
    return models.TwoLayer(
        jr.normal(keys[0], (width, 1)),
        jr.normal(keys[1], (width,)),
        jr.normal(keys[2], (width,)),
    )


@pytest.mark.slow
def test_conflicting_labels():
    """Each input comes with two labels: their mean is fitted, half their difference is
    left, M has a dimension less for each input, and theory has its rate."""
    x = jnp.linspace(-1.5, 1.5, 4)
    mean = jnp.array([0.6, -0.4, 0.5, -0.2])
    half = 0.3 * jnp.array([1.0, -0.5, 0.7, 0.4])
    loss = gf.SquaredError(
        jnp.concatenate([x, x]), jnp.concatenate([mean + half, mean - half])
    )
    flow, model = gf.GradientFlow(loss), tanh_network(jr.key(1), 6)
    theory = gf.two_phase(flow, model, slow_time=1.0)
    assert theory.result == gf.RESULTS.successful
    np.testing.assert_allclose(jax.vmap(theory.limit)(x), mean, atol=1e-9)
    np.testing.assert_allclose(
        theory.drift.train_loss, np.full(len(theory.drift), 0.5 * (half**2).mean())
    )
    found = theory.spectrum
    assert found.form == "hessian" and found.rank == 4 and found.dimension == 14
    assert found.gap > 1e3 and not found.ambiguous and not found.negative
    assert_drift(theory.drift)
    lams, errors = np.array([1e-3, 3e-4, 1e-4]), []
    for lam in lams:
        path = gf.simulate(flow, model, weight_decay=lam, slow_time=1.0)
        predicted = eqx.filter(theory.predict(path.t, lam), eqx.is_inexact_array)
        away = jax.tree.map(lambda p, q: p - q, path.params, predicted)
        flat = jax.vmap(lambda p: ravel_pytree(p)[0])(away)
        errors.append(float(jnp.linalg.norm(flat, axis=1).max()))
    slope = np.polyfit(np.log(lams), np.log(errors), 1)[0]
    assert abs(slope - 1) < 0.1 and errors[0] < 0.1


@pytest.mark.slow
def test_more_data_than_can_be_fitted():
    """20 noisy labels of two neurons, 6 parameters: the minimum is isolated."""
    model = models.TwoLayer(
        jnp.array([[2.0], [-1.5]]), jnp.array([-2.0, -1.5]), jnp.array([1.0, 1.5])
    )
    x = jnp.linspace(-3.0, 3.0, 20)
    noise = 0.1 * jr.normal(jr.key(2), (20,))
    loss = gf.SquaredError(x, jax.vmap(model)(x) + noise)
    near = jax.tree.map(lambda p: 1.05 * p, model)
    limit = manifold.limit_map(loss, near)
    theta, unravel = ravel_pytree(limit.model)
    hessian = jax.hessian(lambda th: loss(unravel(th)))(theta)
    values = np.linalg.eigvalsh(np.asarray(hessian))
    assert values[0] > 1e-6 and loss(limit.model) > 1e-3
    found = manifold.spectrum(loss, limit.model)
    assert found.form == "hessian" and not found.negative
    np.testing.assert_allclose(found.values, values[::-1], rtol=1e-6)
    assert found.dimension == 0 and not found.ambiguous
    told = manifold.diagnose(gf.GradientFlow(loss), limit.model)
    assert told.result == gf.RESULTS.successful and told.speed < 1e-12


# --- Deep linear networks that lack rank ---------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("lacking", ["inputs", "target"])
def test_drift_of_a_rank_deficient_minimum(lacking):
    """Inputs of rank two, fitted; or a target of rank one by W₁ of rank one, with noise
    that no inputs explain. The rank is that of J by NumPy, and by theory."""
    x = jr.normal(jr.key(0), (5 if lacking == "inputs" else 10, 3))
    a, b, c = jr.normal(jr.key(2), (3, 3))
    if lacking == "inputs":
        x = x.at[:, 2].set(x[:, 0] - x[:, 1])
        keys = jr.split(jr.key(1))
        loss = gf.SquaredError(x, x @ jnp.outer(a, b))
        start = models.DeepLinear(
            (jr.normal(keys[0], (3, 3)), jr.normal(keys[1], (3, 3)))
        )
        limit = manifold.limit_map(loss, start)
        model, expected, form = limit.model, 3 * 2, "jacobian"
        np.testing.assert_allclose(balance(model), balance(start), atol=1e-7)
    else:
        noise = jr.normal(jr.key(1), (10, 3))
        noise = noise - x @ (jnp.linalg.pinv(x) @ noise)
        loss = gf.SquaredError(x, x @ jnp.outer(a, b).T + noise)
        model = models.DeepLinear(
            (jnp.stack([b, jnp.zeros(3)]), jnp.stack([a, c], axis=1))
        )
        # The image of (dW₁, dW₂): 3r₂ + 3r₁ − r₁r₂ for ranks 2 and 1.
        expected, form = 7, "hessian"
        assert loss(model) > 0.1
    theta, unravel = ravel_pytree(model)
    jac = np.asarray(jax.jacobian(lambda th: loss.outputs(unravel(th)))(theta))
    assert np.linalg.matrix_rank(jac.reshape(-1, theta.size), tol=1e-8) == expected
    found = manifold.spectrum(loss, model)
    assert found.form == form and found.rank == expected and not found.ambiguous
    flow, ts = gf.GradientFlow(loss), jnp.array([0.0, 0.3, 1.0])
    drift = manifold.riemannian_flow(flow, model, slow_time=1.0, ts=ts)
    if lacking == "target":
        assert_drift(drift)
    else:
        assert drift.train_loss.max() < 1e-18
        assert (jnp.diff(drift.penalty) < 0).all()
    for i, s in enumerate(np.asarray(ts)):
        now = np.asarray(balance(model)) * np.exp(-2 * s)
        np.testing.assert_allclose(balance(drift[i]), now, atol=1e-6)
    told = manifold.regularity(flow, drift)
    assert (told.rank == expected).all() and told.result == gf.RESULTS.successful


# --- Singular points along a drift ---------------------------------------------------


@pytest.mark.slow
def test_drift_to_fewer_coordinates_than_samples():
    """uᵢvᵢ in three dimensions, two samples, least ℓ1 norm at one coordinate: the
    second singular value dies as e^{−cs}, c < 1 by what leaves; regular up to s = 2, by
    s = 60 the rank is lost, and all that follow the drift say so."""
    x = jnp.array([[1.0, 0.3, 0.2], [0.5, 0.6, -0.2]])
    loss = gf.SquaredError(x, x[:, 0])
    flow = gf.GradientFlow(loss)
    model = models.DiagonalNetwork(
        jnp.array([1.0, 0.9, -0.8]), jnp.array([0.6, 0.5, 0.7])
    )
    theory = gf.two_phase(flow, model, slow_time=60.0, throw=False)
    end = theory.drift[-1]
    np.testing.assert_allclose(end.u * end.v, jnp.array([1.0, 0, 0]), atol=1e-6)
    assert theory.drift.result == gf.RESULTS.rank_lost
    assert theory.result == gf.RESULTS.rank_lost
    told = manifold.regularity(flow, theory.drift, form="jacobian")
    assert told.result == gf.RESULTS.rank_lost
    assert told.rank[0] == 2 and told.rank[-1] == 1
    assert 2.0 < told.regular_until < 60.0
    assert told.valid_until(1e-4) < told.regular_until
    early = manifold.riemannian_flow(
        flow, theory.limit, slow_time=2.0, ts=theory.drift.s[theory.drift.s < 2.0]
    )
    assert early.result == gf.RESULTS.successful


class Cusp(eqx.Module):
    x: jax.Array
    y: jax.Array

    def __call__(self, _):
        return 2 * self.x**3 - 2 * self.y**2


@pytest.mark.slow
@pytest.mark.parametrize("slow_time, lost", [(4.0, False), (8.0, True)])
def test_cusp(slow_time, lost):
    """x³ = y² is (u², u³), on which ½(x² + y²) drives u' = −u(2 + 3u²)/(4 + 9u²) to
    the cusp at 0. Curvature is still 1e-11 of the largest where the path leaves M by
    1e-6 of what is left of θ."""
    flow = gf.GradientFlow(gf.SquaredError(jnp.zeros(1), jnp.zeros(1)))
    start = Cusp(jnp.array(1.21), jnp.array(1.331))
    drift = manifold.riemannian_flow(flow, start, slow_time=slow_time, throw=False)
    assert (drift.result == gf.RESULTS.rank_lost) == lost
    u = solve_ivp(
        lambda s, u: -u * (2 + 3 * u**2) / (4 + 9 * u**2),
        (0, slow_time),
        [1.1],
        rtol=1e-12,
        atol=1e-16,
    ).y[0, -1]
    end = np.array([drift.params.x[-1], drift.params.y[-1]])
    off = np.linalg.norm(end - [u**2, u**3]) / np.linalg.norm(end)
    assert off > 1e-6 if lost else off < 1e-9


class Away(gf.penalties.AbstractPenalty):
    """R = ½‖θ − (−1, 0)‖²."""

    def __call__(self, params):
        return 0.5 * ((params.u + 1) ** 2 + params.v**2)

    def gradient(self, params):
        return Product(params.u + 1, params.v)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["jacobian", "hessian"])
def test_crossing_reached_in_finite_time(form):
    """On uv = 0 from (1, 0) to (−1, 0): u = 2e^{−s} − 1, through the origin, where the
    axes cross and J = 0, at s = log 2."""
    loss = gf.SquaredError(jnp.ones(1), jnp.zeros(1))
    flow = gf.GradientFlow(loss, penalty=Away())
    drift = manifold.riemannian_flow(
        flow,
        Product(jnp.array(1.0), jnp.array(0.0)),
        slow_time=1.0,
        ts=jnp.array([0.0, 0.3, 0.6, float(np.log(2)), 0.8, 1.0]),
        form=form,
        throw=False,
    )
    assert drift.result == gf.RESULTS.rank_lost
    exact = 2 * np.exp(-np.asarray(drift.slow_time)) - 1
    np.testing.assert_allclose(drift.params.u, exact, atol=1e-6)
    np.testing.assert_allclose(drift.params.v, np.zeros(6), atol=1e-9)
    told = manifold.regularity(flow, drift, form=form)
    assert told.result == gf.RESULTS.rank_lost
