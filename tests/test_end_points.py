"""Where drifts end, against convex programs solved by others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf


def end_of_flow(task, slow_time):
    """A true flow, λ = 1e-5, not the theory's drift."""
    path = gf.simulate(
        task.flow, task.model, weight_decay=1e-5, slow_time=slow_time, rtol=1e-6
    )
    return np.asarray(task.truth.coefficients(path[-1]))


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["difference", "product"])
def test_diagonal_network_ends_at_the_least_l1_norm(form):
    task = gf.tasks.diagonal_network(jax.random.key(0), form=form)
    target = np.asarray(task.truth.end_point())
    assert relative(end_of_flow(task, 20.0), target) < 1e-3
    # It was not there to begin with.
    limit = gf.manifold.limit_map(task.loss, task.model).model
    assert relative(np.asarray(task.truth.coefficients(limit)), target) > 0.1


@pytest.mark.slow
def test_completion_ends_at_the_least_nuclear_norm():
    pytest.importorskip("cvxpy")
    task = gf.tasks.matrix_completion(jax.random.key(0))
    target = np.asarray(task.truth.end_point())
    assert relative(end_of_flow(task, 20.0), target) < 1e-2
    start = np.asarray(task.truth.coefficients(task.model))
    assert relative(start, target) > 0.1


@pytest.mark.slow
def test_linear_regression_ends_at_the_least_norm():
    task = gf.tasks.linear_regression(jax.random.key(0), samples=5, dim=12)
    target = np.asarray(task.truth.end_point())
    assert relative(end_of_flow(task, 25.0), target) < 1e-4
    assert jnp.isfinite(target).all()


@pytest.mark.long  # it takes 71 000 steps
def test_drift_goes_on_where_rank_is_lost():
    """10 of 12 curvatures die on the way: the drift is regularised by a weight decay of
    1e-14 of the largest one, says that rank was lost, and ends at the least ℓ1 norm all
    the same, from which it is off as the dying coordinates are, by e^{−s} or less."""
    task = gf.tasks.diagonal_network(jax.random.key(0), samples=12, dim=24, sparsity=2)
    target = np.asarray(task.truth.end_point())
    start = gf.manifold.limit_map(task.loss, task.model).model
    drift = gf.manifold.riemannian_flow(
        task.flow,
        start,
        slow_time=30.0,
        ts=jnp.array([0.0, 1.0, 10.0, 20.0, 30.0]),
        throw=False,
    )
    assert drift.result == gf.RESULTS.rank_lost
    errors = [relative(np.asarray(b), target) for b in drift.models.beta]
    assert errors[1] > 0.01
    assert errors[2] < 1e-4 and errors[3] < 1e-9 and errors[4] < 1e-12
    curvature = drift.smallest_curvature
    assert curvature[0] > 0.1 and curvature[-1] < 1e-13
