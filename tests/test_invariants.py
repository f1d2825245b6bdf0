"""What theory conserves, on every task; and identities on many random cases."""

import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import gradflow as gf
from gradflow import manifold, tasks
from gradflow.models import DiagonalNetwork, TwoLayer

SMOOTH = {
    "linear_regression": dict(samples=4, dim=8),
    # In the form and shape of the next: compiled but once.
    "diagonal_network": dict(form="product", samples=4, dim=7, sparsity=2),
    "fourier_diagonal": dict(samples=4, frequencies=3),
    "matrix_completion": dict(shape=(4, 4), rank=1),
    "deep_linear": dict(width=3, inputs=6, samples=3),
    "teacher_student": dict(width=8, samples=4),
    "matrix_recovery": dict(shape=(3, 3), rank=1, samples=5, depth=2, scale=0.7),
}
KINKED = {"relu_1d": dict(width=12, samples=4)}
# Under ‖θ‖₁, which has no drift along M.
UNSMOOTH = {"sparse_recovery": dict(features=4, samples=2, sparsity=1)}
# Nothing is conserved, or there is no limit: several layers with biases, attention,
# logits of separable data. Or the data are not at hand.
NETWORKS = {
    "image_classification",
    "image_mlp",
    "modular_addition",
    "modular_transformer",
    "polarizability",
    "sentiment",
    "symbol_addition",
    "teacher_mlp",
    "wide_teacher",
}


def test_every_task_is_here():
    makers = {
        name
        for name, made in inspect.getmembers(tasks, inspect.isfunction)
        if inspect.signature(made).return_annotation is tasks.Task
    }
    assert makers == {*SMOOTH, *KINKED, *UNSMOOTH, *NETWORKS}
    for name, options in UNSMOOTH.items():
        assert not getattr(tasks, name)(jr.key(1), **options).penalty.smooth


def invariant(task, model):
    """Proportional to e^{−2s}, or to e^{−s} for a linear model; and the rate."""
    if task.name == "linear_regression":
        basis = task.truth.basis
        return model.weights - basis.T @ (basis @ model.weights), 1.0
    if task.name == "teacher_student":
        return None, None
    if task.name == "matrix_recovery":
        first, second = model.weights
        return (second.T @ second - first @ first.T).reshape(-1), 2.0
    return ravel_pytree(task.truth.invariant(model))[0], 2.0


@pytest.mark.slow
@pytest.mark.parametrize("name", SMOOTH)
def test_limit_and_drift(name):
    """The limit keeps what the flow conserves and has the dimension known; along the
    drift the norm falls, F stays, and the conserved decays as it must."""
    task = getattr(tasks, name)(jr.key(1), **SMOOTH[name])
    limit = manifold.limit_map(task.loss, task.model).model
    found = manifold.spectrum(task.loss, limit)
    assert found.rank == task.codimension
    assert found.gap > 1e3 and not found.ambiguous
    drift = manifold.riemannian_flow(
        task.flow, limit, slow_time=1.0, ts=jnp.linspace(0.0, 1.0, 9)
    )
    assert (jnp.diff(drift.penalty) < 0).all()
    assert drift.train_loss.max() < 1e-14 * task.loss(task.model)
    start, rate = invariant(task, task.model)
    if start is None:
        return
    size = np.abs(start).max()
    np.testing.assert_allclose(invariant(task, limit)[0], start, atol=1e-7 * size)
    for i, s in enumerate(np.asarray(drift.slow_time)):
        now = invariant(task, drift[i])[0]
        np.testing.assert_allclose(now, start * np.exp(-rate * s), atol=1e-6 * size)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINKED)
def test_balance_with_kinks(name):
    """No manifold to speak of, but the balance and, in the slow phase, the norm; and F
    stays below what weight decay makes it."""
    task = getattr(tasks, name)(jr.key(1), **KINKED[name])
    path = gf.simulate(
        task.flow, task.model, weight_decay=1e-2, slow_time=1.0, rtol=1e-5, throw=False
    )
    assert path.succeeded
    start = np.asarray(task.truth.invariant(task.model))
    slow = np.asarray(path.slow_time)
    decayed = start * np.exp(-2 * slow)[:, None]
    balance = np.asarray(jax.vmap(task.truth.invariant)(path.models))
    assert np.abs(balance - decayed).max() < 1e-2 * np.abs(start).max()
    drifting = slow > 0.1
    assert (np.diff(np.asarray(path.penalty)[drifting]) < 0).all()
    assert np.asarray(path.train_loss)[drifting].max() < 1e-3 * path.train_loss[0]


SHAPES = {
    "two layers": TwoLayer(jnp.zeros((6, 2)), jnp.zeros(6), jnp.zeros(6)),
    "diagonal": DiagonalNetwork(jnp.zeros(12), jnp.zeros(12)),
}


@pytest.mark.parametrize("form", ["jacobian", "hessian"])
@pytest.mark.parametrize("name", SHAPES)
def test_projector_identities(name, form):
    """On 50 random networks of each kind, each on the M of its own data: P² = P,
    Pᵀ = P, JP = 0, and the dimension with its gap; and on 10 more whose outputs are so
    mixed that the values fall from 1 to 1e-14 by hundreds, that there is no gap."""
    unravel = ravel_pytree(SHAPES[name])[1]
    inputs = 2 if name == "two layers" else 12
    mixed = lambda model, x: x[1] @ jax.vmap(model)(x[0])
    # ∇²F has the squares of the singular values.
    graded = 10.0 ** -(2 * jnp.arange(8.0) / (1 if form == "jacobian" else 2))

    def case(key, mix):
        ktheta, kx = jr.split(key)
        theta = jr.normal(ktheta, (24,))
        model = unravel(theta)
        x = jr.normal(kx, (8, inputs))
        jac = jax.jacobian(lambda th: jax.vmap(unravel(th))(x))(theta)
        left, values, _ = jnp.linalg.svd(jac, full_matrices=False)
        mixing = jnp.where(mix, (graded / values)[:, None] * left.T, jnp.eye(8))
        y = mixed(model, (x, mixing))
        loss = gf.SquaredError((x, mixing), y, predict=mixed)
        project = lambda v: ravel_pytree(
            manifold.tangent_projection(loss, model, unravel(v), form=form)
        )[0]
        p = jax.vmap(project)(jnp.eye(24))
        found = manifold.spectrum(loss, model, form=form)
        errors = (
            jnp.abs(p @ p - p).max(),
            jnp.abs(p - p.T).max(),
            jnp.abs(jac @ p).max() / jnp.linalg.norm(jac),
        )
        return jnp.stack(errors), jnp.trace(p), found

    keys = jr.split(jr.key(1), 60)
    errors, trace, found = eqx.filter_jit(jax.vmap(case))(keys, jnp.arange(60) >= 50)
    assert (errors[:, :2] < 1e-9).all()
    assert found.ambiguous[50:].all() and (found.gap[50:] < 1e3).all()
    assert not found.ambiguous[:50].any() and (found.gap[:50] > 1e3).all()
    assert (found.rank[:50] == 8).all()
    np.testing.assert_allclose(trace[:50], np.full(50, 16.0), atol=1e-9)
    assert (errors[:50, 2] < 1e-12).all()
