"""The tasks: what they promise of their data, their metrics and their truths."""

from decimal import Decimal, localcontext

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from numpy.testing import assert_allclose
from scipy.integrate import solve_ivp

from gradflow import GradientFlow, SquaredError, tasks
from gradflow.models import (
    DeepLinear,
    DiagonalNetwork,
    DifferenceNetwork,
    LinearModel,
    MatrixFactorisation,
)

MAKERS = {
    "linear": tasks.linear_regression,
    "difference": lambda key: tasks.diagonal_network(key, form="difference"),
    "product": lambda key: tasks.diagonal_network(key, form="product"),
    "fourier": tasks.fourier_diagonal,
    "completion": lambda key: tasks.matrix_completion(key, shape=(8, 7), observed=0.5),
    "deep": tasks.deep_linear,
    "deeper": lambda key: tasks.deep_linear(key, depth=3, outputs=3),
    "tanh": tasks.teacher_student,
    "relu": lambda key: tasks.teacher_student(key, activation="relu"),
    "relu_1d": tasks.relu_1d,
}
_made = {}


def task_of(name):
    if name not in _made:
        _made[name] = MAKERS[name](jr.key(0))
    return _made[name]


def model_of_truth(name):
    """A model that is exactly what made the data."""
    truth = task_of(name).truth
    if name in ("tanh", "relu", "relu_1d"):
        return truth.teacher
    target = truth.target
    if name == "linear":
        return LinearModel(target)
    if name == "difference":
        return DifferenceNetwork(
            jnp.sqrt(jnp.maximum(target, 0)), jnp.sqrt(jnp.maximum(-target, 0))
        )
    if name in ("product", "fourier"):
        return DiagonalNetwork(target, jnp.ones_like(target))
    if name == "completion":
        return MatrixFactorisation(target, jnp.eye(target.shape[1]))
    return DeepLinear((target, jnp.eye(target.shape[0])))


def flat(task):
    """θ₀, the outputs z and their Jacobian as functions of θ, and the targets."""
    theta, unravel = ravel_pytree(task.model)
    outputs = jax.jit(lambda th: task.loss.outputs(unravel(th)))
    return theta, outputs, jax.jit(jax.jacrev(outputs)), task.loss.y.reshape(-1)


def interpolating_point(task):
    """A point of M near the initial model, by Gauss–Newton with a line search."""
    theta, outputs, jacobian, y = flat(task)
    theta = np.asarray(theta)
    residual = np.asarray(outputs(theta) - y)
    for _ in range(100):
        step = np.linalg.lstsq(np.asarray(jacobian(theta)), residual, rcond=1e-10)[0]
        size = 1.0
        while size > 1e-6:
            trial = np.asarray(outputs(theta - size * step) - y)
            if np.linalg.norm(trial) < np.linalg.norm(residual):
                break
            size /= 2
        else:
            break
        theta, residual = theta - size * step, trial
    assert np.linalg.norm(residual) < 1e-11 * np.linalg.norm(y)
    return theta


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_same_key_same_task(name):
    task = task_of(name)
    assert eqx.tree_equal(MAKERS[name](jr.key(0)), task)
    assert not eqx.tree_equal(MAKERS[name](jr.key(1)).model, task.model)


@pytest.mark.parametrize("name", MAKERS)
def test_metrics_and_their_thresholds(name):
    task, truth = task_of(name), model_of_truth(name)
    for metric in task.metrics.values():
        # The truth is what made both data sets; the start is far from both levels.
        assert abs(float(metric(truth))) < 1e-25
        assert 0 < metric.threshold < float(metric(task.model))
    zero = jax.tree.map(jnp.zeros_like, task.model)
    assert_allclose(task.metrics["train"].threshold, 0.01 * float(task.loss(zero)))


@pytest.mark.parametrize("name", MAKERS)
def test_flow_and_metrics_work_under_jit(name):
    task = task_of(name)
    assert isinstance(task.flow, GradientFlow)
    assert task.flow.loss is task.loss
    for metric in task.metrics.values():
        assert_allclose(eqx.filter_jit(metric)(task.model), metric(task.model), 1e-12)
        # What a sweep keeps as a static argument has to be hashable.
        hash(jax.tree.structure(metric))


@pytest.mark.parametrize(
    "name", [name for name in MAKERS if name not in ("relu", "relu_1d")]
)
def test_codimension_is_the_rank_of_the_jacobian(name):
    task = task_of(name)
    theta = interpolating_point(task)
    jacobian = np.asarray(flat(task)[2](theta))
    assert np.linalg.matrix_rank(jacobian, rtol=1e-7) == task.codimension
    assert task.codimension < theta.size


@pytest.mark.parametrize(
    "name", [name for name in MAKERS if name not in ("linear", "tanh")]
)
def test_invariants(name):
    task = task_of(name)
    model, invariant = task.model, task.truth.invariant
    force = jax.grad(task.loss)(model)
    value, along_force = jax.jvp(invariant, (model,), (force,))
    along_decay = jax.jvp(invariant, (model,), (jax.tree.map(jnp.negative, model),))[1]
    size = np.linalg.norm(ravel_pytree(model)[0]) * np.linalg.norm(
        ravel_pytree(force)[0]
    )
    assert size > 1e-3
    leaves = map(jax.tree.leaves, (value, along_force, along_decay))
    for v, f, d in zip(*leaves, strict=True):
        assert np.abs(f).max() < 1e-12 * size
        assert np.abs(v).max() > 1e-3
        assert_allclose(d, -2 * v, atol=1e-12)


def test_tanh_has_no_invariant():
    task = task_of("tanh")
    with pytest.raises(ValueError, match="model"):
        task.truth.invariant(task.model)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weight_decay", [1e-1, 1e-3])
def test_linear_path_against_radau(reduction, weight_decay):
    task = tasks.linear_regression(
        jr.key(3), samples=4, dim=9, init_scale=2.0, reduction=reduction
    )
    times = np.array([0.0, 0.3, 2.0, 0.5 / weight_decay, 3 / weight_decay])
    matrix = np.asarray(jax.hessian(task.loss)(task.model).weights.weights)
    velocity = jax.jit(
        lambda w: task.flow.velocity(LinearModel(w), weight_decay).weights
    )
    solution = solve_ivp(
        lambda t, w: np.asarray(velocity(w)),
        (0, times[-1]),
        np.asarray(task.model.weights),
        method="Radau",
        jac=-matrix - weight_decay * np.eye(9),
        t_eval=times,
        rtol=1e-11,
        atol=1e-13,
    )
    path = task.truth.path(times, weight_decay)
    assert path.shape == (5, 9)
    assert_allclose(path, solution.y.T, rtol=1e-9, atol=1e-9)
    assert_allclose(path[3], task.truth.path(times[3], weight_decay), rtol=1e-14)


@pytest.mark.parametrize("weight_decay", [1e-1, 1e-4, 1e-8])
def test_linear_path_to_rounding(weight_decay):
    # Rows that are multiples of Hadamard's: then every coordinate has a formula of its
    # own, and 50 digits are no effort.
    rotation = np.array(
        [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], float
    )
    scales, start, target = [2, 3, 0.5, 0], [5, -3, 1, 2], [0.5, 1, -4, 7]
    w, w_start = rotation.T @ target / 2, rotation.T @ start / 2
    x = np.diag(scales[:3]) @ rotation[:3] / 2
    truth = tasks.LinearTruth(*map(jnp.asarray, (x, x @ w, w, w_start)), curvature=1.0)
    decay = Decimal(weight_decay)
    with localcontext(prec=50):
        for t in (0.0, 1e-3, 1.0, 1 / weight_decay, 30 / weight_decay):
            coordinates = []
            for scale, z, goal in zip(scales, start, target, strict=True):
                rate = Decimal(scale) ** 2 + decay
                limit = Decimal(scale) ** 2 * Decimal(goal) / rate
                rest = (Decimal(z) - limit) * (-rate * Decimal(t)).exp()
                coordinates.append(float(limit + rest))
            expected = rotation.T @ coordinates / 2
            error = np.linalg.norm(truth.path(t, weight_decay) - expected)
            assert error < 1e-14 * np.linalg.norm(expected)


def test_linear_drift_is_the_limit_of_the_path():
    task = task_of("linear")
    truth, slow = task.truth, np.array([0.5, 1.0, 4.0])
    errors = [
        np.abs(truth.path(slow / decay, decay) - truth.drift(slow)).max()
        for decay in (1e-4, 1e-5)
    ]
    assert_allclose(errors[0] / errors[1], 10, rtol=1e-2)
    x, y = np.asarray(task.loss.x), np.asarray(task.loss.y)
    assert_allclose(truth.end_point(), np.linalg.pinv(x) @ y, rtol=1e-10, atol=1e-13)
    assert_allclose(truth.drift(60.0), truth.end_point(), atol=1e-14)
    assert_allclose(x @ truth.drift(0.0), y, rtol=1e-10, atol=1e-12)


def test_linear_regression_groks():
    task = task_of("linear")
    path = jax.vmap(LinearModel)(task.truth.path(np.array([20.0, 5e3]), 1e-3))
    train, test = (
        jax.vmap(task.metrics[which])(path) < task.metrics[which].threshold
        for which in ("train", "test")
    )
    assert train.tolist() == [True, True]
    assert test.tolist() == [False, True]


@pytest.mark.parametrize("name", ["difference", "product", "fourier"])
def test_least_l1_is_feasible_and_certified(name):
    task = task_of(name)
    truth = task.truth
    beta, dual, gap = truth.certificate()
    x, y = np.asarray(truth.features), np.asarray(truth.targets)
    assert_allclose(x @ beta, y, atol=1e-12)
    assert np.abs(x.T @ dual).max() <= 1 + 1e-12
    assert_allclose(y @ dual, np.abs(beta).sum(), rtol=1e-9)
    assert abs(gap) < 1e-9
    assert truth.recovers_target()
    assert_allclose(truth.end_point(), truth.target, atol=1e-10)
    assert_allclose(truth.coefficients(model_of_truth(name)), truth.target, atol=1e-15)


def test_too_few_samples_do_not_recover_the_target():
    task = tasks.diagonal_network(jr.key(0), samples=6, sparsity=5)
    assert not task.truth.recovers_target()
    beta = np.asarray(task.truth.end_point())
    assert np.abs(beta).sum() < np.abs(task.truth.target).sum()
    assert np.count_nonzero(beta) <= 6


def test_fourier_features_are_orthonormal():
    grid = jnp.linspace(-jnp.pi, jnp.pi, 32, endpoint=False)
    x = np.asarray(tasks.fourier_features(grid, 7))
    assert x.shape == (32, 15)
    assert_allclose(x.T @ x / 32, np.eye(15), atol=1e-13)


def test_expected_losses_agree_with_samples():
    """½‖β − β*‖² and its like are the loss on new inputs, up to sampling error."""
    task = task_of("product")
    x = jr.normal(jr.key(7), (40000, 100))
    sampled = SquaredError(x, x @ task.truth.target)(task.model)
    assert_allclose(task.metrics["test"](task.model), sampled, rtol=0.03)
    task = task_of("deeper")
    x = jr.normal(jr.key(7), (40000, 20))
    sampled = SquaredError(x, x @ task.truth.target.T)(task.model)
    assert_allclose(task.metrics["test"](task.model), sampled, rtol=0.03)


def test_completion_data():
    task = tasks.matrix_completion(jr.key(5), shape=(6, 9), rank=2, observed=0.5)
    truth = task.truth
    assert np.linalg.matrix_rank(truth.target) == 2
    rows, columns = np.asarray(truth.indices).T
    assert_allclose(np.asarray(truth.target)[rows, columns], truth.values)
    hidden = np.ones((6, 9), bool)
    hidden[rows, columns] = False
    assert hidden.sum() == 27
    difference = np.asarray(task.model.matrix - truth.target)
    assert_allclose(task.loss(task.model), 0.5 * (difference[~hidden] ** 2).sum())
    test = task.metrics["test"](task.model)
    assert_allclose(test, 0.5 * (difference[hidden] ** 2).mean())
    mean = tasks.matrix_completion(
        jr.key(5), shape=(6, 9), rank=2, observed=0.5, reduction="mean"
    )
    assert_allclose(mean.loss(mean.model), task.loss(task.model) / 27)


def test_completion_with_few_columns_has_unknown_codimension():
    make = tasks.matrix_completion
    assert make(jr.key(0), shape=(6, 9), factor_rank=5).codimension is None
    assert make(jr.key(0), shape=(6, 9), factor_rank=12).codimension == 24


def test_least_nuclear_norm_is_feasible_and_certified():
    pytest.importorskip("cvxpy")
    truth = tasks.matrix_completion(jr.key(0), shape=(8, 7), observed=0.5).truth
    matrix, dual, gap = truth.certificate()
    rows, columns = np.asarray(truth.indices).T
    assert_allclose(matrix[rows, columns], truth.values, atol=1e-14)
    off = np.ones(matrix.shape, bool)
    off[rows, columns] = False
    assert not dual[off].any()
    assert np.linalg.norm(dual, 2) <= 1 + 1e-12
    norm = np.linalg.norm(matrix, "nuc")
    assert_allclose((dual * matrix).sum(), norm, rtol=1e-7)
    assert -1e-12 < gap < 1e-7
    assert norm < np.linalg.norm(truth.target, "nuc") * (1 + 1e-9)


@pytest.mark.slow
def test_completion_recovers_where_enough_is_observed():
    pytest.importorskip("cvxpy")
    make = tasks.matrix_completion
    assert make(jr.key(0), shape=(8, 8), rank=1, observed=0.8).truth.recovers_target()
    few = make(jr.key(0), shape=(8, 8), rank=3, observed=0.3).truth
    assert not few.recovers_target()


@pytest.mark.parametrize("name", ["deep", "deeper"])
def test_deep_linear_end_point(name):
    task = task_of(name)
    end = np.asarray(task.truth.end_point())
    x, y = np.asarray(task.loss.x), np.asarray(task.loss.y)
    assert_allclose(x @ end.T, y, atol=1e-12)
    # Its rows lie in the span of the data, which makes it the least of all.
    span = np.linalg.svd(x, full_matrices=False)[2]
    assert_allclose(end @ span.T @ span, end, atol=1e-12)


def test_relu_kinks():
    task = task_of("relu_1d")
    teacher = task.truth.teacher
    positions, jumps = task.truth.kinks(teacher)
    assert np.abs(positions).max() < 1.5
    slope = jax.vmap(jax.grad(teacher))
    for position, jump in zip(positions, jumps, strict=True):
        left, right = slope(jnp.stack([position - 1e-6, position + 1e-6]))
        assert_allclose(right - left, jump, rtol=1e-10)


ERRORS = [
    (tasks.linear_regression, {"samples": 50}, "samples"),
    (tasks.linear_regression, {"dim": 1}, "dim"),
    (tasks.linear_regression, {"init_scale": 0.0}, "init_scale"),
    (tasks.linear_regression, {"reduction": "max"}, "reduction"),
    (tasks.diagonal_network, {"form": "sum"}, "form"),
    (tasks.diagonal_network, {"samples": 101}, "samples"),
    (tasks.diagonal_network, {"sparsity": 0}, "sparsity"),
    (tasks.diagonal_network, {"init_scale": float("nan")}, "init_scale"),
    (tasks.fourier_diagonal, {"frequencies": 1}, "frequencies"),
    (tasks.fourier_diagonal, {"samples": 82}, "samples"),
    (tasks.matrix_completion, {"shape": (20, 0)}, "shape"),
    (tasks.matrix_completion, {"rank": 21}, "rank"),
    (tasks.matrix_completion, {"observed": 1.0}, "observed"),
    (tasks.matrix_completion, {"factor_rank": 0}, "factor_rank"),
    (tasks.deep_linear, {"depth": 1}, "depth"),
    (tasks.deep_linear, {"outputs": 3, "width": 2}, "width"),
    (tasks.deep_linear, {"samples": 20}, "samples"),
    (tasks.teacher_student, {"activation": "gelu"}, "activation"),
    (tasks.teacher_student, {"samples": 40}, "samples"),
    (tasks.teacher_student, {"init_scale": -1.0}, "init_scale"),
    (tasks.relu_1d, {"samples": 0}, "samples"),
    (tasks.relu_1d, {"teacher_width": 0}, "teacher_width"),
]


@pytest.mark.parametrize(("make", "settings", "name"), ERRORS)
def test_errors_name_the_argument(make, settings, name):
    # TypeError where annotations are checked at run time: that check comes first.
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
        make(jr.key(0), **settings)


def test_a_task_needs_both_metrics():
    task = task_of("linear")
    with pytest.raises(ValueError, match="metrics"):
        tasks.Task(
            name="half",
            model=task.model,
            loss=task.loss,
            metrics={"train": task.metrics["train"]},
            truth=None,
            codimension=None,
            slow_time=1.0,
        )
