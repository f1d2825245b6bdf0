"""Sparse and low-rank recovery: data as specified, and answers by outside oracles."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import oracles
import pytest
from jax.flatten_util import ravel_pytree
from numpy.testing import assert_allclose

import gradflow as gf
from gradflow import tasks
from gradflow.models import DeepLinear, HadamardProduct, LinearModel
from gradflow.tasks._convex import least_nuclear

MAKERS = {
    "sparse": tasks.sparse_recovery,
    "deep sparse": lambda key: tasks.sparse_recovery(key, depth=3),
    "entries": tasks.matrix_recovery,
    "flat": lambda key: tasks.matrix_recovery(
        key, measurements="gaussian", shape=(4, 6), rank=1, samples=15
    ),
    "deep matrix": lambda key: tasks.matrix_recovery(
        key, shape=(4, 6), rank=1, samples=15, depth=3
    ),
}
_made = {}


def task_of(name):
    if name not in _made:
        _made[name] = MAKERS[name](jr.key(0))
    return _made[name]


def model_of_truth(task):
    target = task.truth.target
    if isinstance(task.model, LinearModel):
        return LinearModel(target)
    if isinstance(task.model, HadamardProduct):
        ones = jnp.ones_like(task.model.factors)
        return HadamardProduct(ones.at[0].set(target))
    first = jnp.eye(max(target.shape), target.shape[1])
    inner = [jnp.eye(max(target.shape))] * (len(task.model.weights) - 2)
    last = jnp.pad(target, ((0, 0), (0, first.shape[0] - target.shape[1])))
    return DeepLinear(
        (first, *inner, last) if len(task.model.weights) > 1 else (target,)
    )


@pytest.mark.parametrize("name", MAKERS)
def test_what_every_task_promises(name):
    task = task_of(name)
    assert eqx.tree_equal(MAKERS[name](jr.key(0)), task)
    assert not eqx.tree_equal(MAKERS[name](jr.key(1)).truth, task.truth)
    truth = model_of_truth(task)
    assert_allclose(task.truth.coefficients(truth), task.truth.target)
    assert float(task.loss(truth)) < 1e-25
    for metric in task.metrics.values():
        assert (
            float(metric(truth)) < 1e-12 < metric.threshold < float(metric(task.model))
        )
        assert_allclose(eqx.filter_jit(metric)(task.model), metric(task.model))
        hash(jax.tree.structure(metric))
    assert task.flow.penalty is task.penalty
    # A start at zero fits nothing and recovers nothing: both errors are one.
    zero = jax.tree.map(jnp.zeros_like, task.model)
    for metric in task.metrics.values():
        assert float(metric(zero)) == pytest.approx(1)


@pytest.mark.parametrize("name", MAKERS)
def test_codimension_is_the_rank_of_the_jacobian(name):
    task = task_of(name)
    theta, unravel = ravel_pytree(model_of_truth(task))
    theta = theta + 0.1 * jr.normal(jr.key(5), theta.shape)
    jacobian = jax.jacrev(lambda th: task.loss.outputs(unravel(th)))(theta)
    assert np.linalg.matrix_rank(np.asarray(jacobian)) == task.codimension


def test_measurements_have_the_variance_of_the_papers_code():
    make = lambda **kwargs: tasks.sparse_recovery(
        jr.key(2), features=400, samples=200, sparsity=40, **kwargs
    )
    truth = make().truth
    assert float(jnp.var(truth.features)) * 200 == pytest.approx(1, abs=0.02)
    assert int((truth.target != 0).sum()) == 40
    values = np.asarray(truth.target[truth.target != 0])
    assert values.std() * 400**0.5 == pytest.approx(1, abs=0.35)
    assert_allclose(truth.targets, truth.features @ truth.target, atol=1e-15)
    noisy = make(snr=4.0).truth
    noise = np.asarray(noisy.targets - noisy.features @ noisy.target)
    # Of mean ‖ξ‖² = E‖a*‖²/SNR = (s/n)/SNR.
    assert (noise**2).sum() == pytest.approx(0.1 / 4, rel=0.35)


def test_coherence_replaces_rows_by_coordinates():
    """τ N rows see one coordinate each, all different ones, and nothing else."""
    for tau, rows in ((0.0, 0), (0.5, 4), (1.0, 8)):
        task = tasks.sparse_recovery(
            jr.key(1), features=20, samples=8, sparsity=2, coherence=tau
        )
        x = np.asarray(task.truth.features)
        unit = (np.count_nonzero(x, axis=1) == 1) & (x.max(axis=1) == 1)
        assert unit.sum() == rows == unit[:rows].sum()
        assert (x[:rows].sum(axis=0) <= 1).all()
        coherence = float(task.truth.coherence())
        assert coherence == 1 if rows else 1 / 20**0.5 < coherence < 1


def test_entries_of_largest_leverage_are_seen_first():
    make = lambda tau: (
        tasks.matrix_recovery(
            jr.key(1), shape=(8, 6), rank=2, samples=20, leverage=tau
        ).truth
    )
    target = np.asarray(make(0.0).target)
    assert np.linalg.norm(target) == pytest.approx(48**0.5)
    assert np.linalg.matrix_rank(target) == 2
    left, _, right = np.linalg.svd(target)
    score = 4 * (left[:, :2] ** 2).sum(1)[:, None] + 3 * (right[:2] ** 2).sum(0)
    ranked = np.argsort(-score.reshape(-1))
    seen = {
        tau: set(np.asarray(make(tau).measured).tolist()) for tau in (0.0, 0.5, 1.0)
    }
    assert all(len(places) == 20 for places in seen.values())
    assert seen[1] == set(ranked[:20].tolist())
    assert set(ranked[:10].tolist()) <= seen[0.5] != seen[1]
    assert not set(ranked[:10].tolist()) <= seen[0]


def test_least_l1_norm_by_two_programs():
    truth = tasks.sparse_recovery(jr.key(0), samples=40).truth
    x, y = np.asarray(truth.features), np.asarray(truth.targets)
    assert truth.recovers_target()
    assert_allclose(truth.end_point(), oracles.basis_pursuit(x, y), atol=1e-9)
    few = tasks.sparse_recovery(jr.key(0), samples=8).truth
    assert not few.recovers_target()
    x, y = np.asarray(few.features), np.asarray(few.targets)
    assert_allclose(few.end_point(), oracles.basis_pursuit(x, y), atol=1e-8)


@pytest.mark.parametrize("name", ["entries", "flat"])
def test_least_nuclear_norm_of_measured_matrices(name):
    truth = task_of(name).truth
    program = truth.certificate()
    operator, values = truth.operator(), np.asarray(truth.values)
    assert_allclose(operator @ program.solution.reshape(-1), values, atol=1e-12)
    assert np.linalg.norm(program.dual, 2) <= 1 + 1e-12
    assert 0 <= program.gap + 1e-12 and program.gap < 1e-7
    # The dual point comes from the measurements: it is in the range of 𝒳ᵀ.
    dense = operator if isinstance(operator, np.ndarray) else operator.toarray()
    pulled = np.linalg.lstsq(dense.T, program.dual.reshape(-1), rcond=None)[0]
    assert_allclose(dense.T @ pulled, program.dual.reshape(-1), atol=1e-10)


def test_least_nuclear_norm_is_another_matrix_where_there_is_one():
    """[[1, 2], [2, x]] has the nuclear norm √((1 − x)² + 16) for x < 4: 4 at x = 1,
    while the completion of rank one, x = 4, has 5."""
    operator = np.eye(4)[:3]
    program = least_nuclear(operator, np.array([1.0, 2.0, 2.0]), (2, 2))
    assert_allclose(program.solution, [[1, 2], [2, 1]], atol=1e-4)
    assert np.linalg.norm(program.solution, "nuc") == pytest.approx(4, abs=1e-8)


def test_what_no_fit_can_see():
    truth = task_of("sparse").truth
    x, target = np.asarray(truth.features), np.asarray(truth.target)
    _, _, basis = np.linalg.svd(x)
    hidden = np.linalg.norm(basis[30:] @ target) / np.linalg.norm(target)
    assert float(truth.unseen()) == pytest.approx(hidden, rel=1e-10)
    ridge = truth.least_squares()
    assert_allclose(x @ np.asarray(ridge), truth.targets, atol=1e-13)
    assert np.linalg.norm(basis[30:] @ np.asarray(ridge)) < 1e-14
    for name in ("entries", "flat"):
        truth = task_of(name).truth
        fit = np.asarray(truth.least_squares()).reshape(-1)
        assert_allclose(truth.operator() @ fit, truth.values, atol=1e-12)


def test_depth_recovers_without_a_penalty():
    """From a small start a product of two vectors ends near the sparse target, where
    the linear model keeps the error of what it cannot see."""
    errors = {}
    for depth in (1, 2):
        task = tasks.sparse_recovery(
            jr.key(1), features=40, samples=24, sparsity=2, depth=depth
        )
        assert task.truth.recovers_target()
        path = gf.descent(
            task.flow,
            task.model,
            weight_decay=0.0,
            learning_rate=0.2,
            steps=100_000,
            saves=5,
            metrics=task.metrics,
        )
        errors[depth] = float(path.metrics["test"][-1])
        if depth == 1:
            unseen = float(task.truth.unseen())
            assert errors[1] == pytest.approx(unseen, rel=1e-4)
    assert errors[2] < 0.2 * errors[1]


@pytest.mark.parametrize(
    "make, kwargs, message",
    [
        (tasks.sparse_recovery, dict(samples=101), "samples: expected at most 100"),
        (tasks.sparse_recovery, dict(coherence=1.5), "coherence: expected a number fr"),
        (tasks.sparse_recovery, dict(snr=0.0), "snr: expected a positive"),
        (tasks.sparse_recovery, dict(depth=0), "depth: expected an integer >= 1"),
        (tasks.sparse_recovery, dict(scale=-1.0), "scale: expected a positive"),
        (tasks.matrix_recovery, dict(samples=100), "samples: expected at most 99"),
        (tasks.matrix_recovery, dict(rank=11), "rank: expected at most 10"),
        (
            tasks.matrix_recovery,
            dict(leverage=0.5, measurements="gaussian"),
            "leverage: only entries",
        ),
    ],
)
def test_bad_settings_are_refused(make, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(jr.key(0), **kwargs)


def test_products_of_vectors():
    factors = jr.normal(jr.key(0), (3, 4))
    model = HadamardProduct(factors)
    assert_allclose(model.beta, factors[0] * factors[1] * factors[2])
    x = jr.normal(jr.key(1), (4,))
    assert_allclose(model(x), jnp.dot(model.beta, x))
    stack = HadamardProduct(jnp.stack([factors, 2 * factors]))
    assert_allclose(stack.beta[1], 8 * model.beta)
    with pytest.raises(ValueError, match="factors: expected shape"):
        HadamardProduct(jnp.ones((0, 4)))


@pytest.mark.parametrize("samples", [8, 40])
def test_lasso_by_two_methods(samples):
    truth = tasks.sparse_recovery(jr.key(0), samples=samples, snr=10.0).truth
    x, y = np.asarray(truth.features), np.asarray(truth.targets)
    largest = np.abs(x.T @ y).max()
    for weight in (0.5 * largest, 1e-2 * largest, 1e-5 * largest):
        exact = np.asarray(truth.lasso(weight))
        assert oracles.lasso_violation(x, y, weight, exact) < 1e-7
        assert_allclose(exact, oracles.lasso(x, y, weight), atol=1e-7)
    assert (truth.lasso(1.01 * largest) == 0).all()


def test_lasso_where_a_coordinate_leaves_a_full_set():
    """Its correlation is then at the level by rounding; it must not come back at
    once."""
    task = gf.tasks.sparse_recovery(jr.key(0), features=100, sparsity=15, samples=20)
    truth = task.truth
    x, y = np.asarray(truth.features), np.asarray(truth.targets)
    assert oracles.lasso_violation(x, y, 1e-5, np.asarray(truth.lasso(1e-5))) < 1e-7
