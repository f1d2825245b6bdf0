"""Critical manifolds of losses that do not interpolate, and where there is none."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import Linear
from jax.flatten_util import ravel_pytree
from scipy.optimize import minimize

import gradflow as gf
from gradflow import manifold, models

# --- Label noise -------------------------------------------------------------------


@pytest.fixture(scope="module")
def noisy_diagonal():
    """β = u ⊙ v in 4 dimensions, 12 noisy samples: M is uᵢvᵢ = βᵢ, with β the least
    squares fit, four hyperbolas."""
    kx, ky, ku, kv = jr.split(jr.key(5), 4)
    x = jr.normal(kx, (12, 4))
    y = x @ jnp.array([1.0, -0.5, 0.7, 0.3]) + 0.5 * jr.normal(ky, (12,))
    model = models.DiagonalNetwork(
        1 + 0.3 * jr.normal(ku, (4,)), 0.5 + 0.3 * jr.normal(kv, (4,))
    )
    loss = gf.SquaredError(x, y)
    beta = np.linalg.lstsq(np.asarray(x), np.asarray(y), rcond=None)[0]
    return loss, model, beta, manifold.limit_map(loss, model)


def on_hyperbolas(balance, beta):
    """u and v with uv = β and u² − v² = c, u > 0."""
    u = np.sqrt((balance + np.sqrt(balance**2 + 4 * beta**2)) / 2)
    return u, beta / u


def test_limit_with_label_noise(noisy_diagonal):
    loss, model, beta, limit = noisy_diagonal
    assert limit.result == gf.RESULTS.successful
    u, v = on_hyperbolas(np.asarray(model.u**2 - model.v**2), beta)
    np.testing.assert_allclose(limit.model.u, u, rtol=1e-7)
    np.testing.assert_allclose(limit.model.v, v, rtol=1e-7)
    assert loss(limit.model) > 0.05
    found = manifold.spectrum(loss, limit.model)
    assert found.form == "hessian" and found.dimension == 4
    assert found.gap > 1e3 and not found.ambiguous and not found.negative
    # P keeps what is tangent to the hyperbolas: (u, −v) in each.
    along = models.DiagonalNetwork(limit.model.u, -limit.model.v)
    kept = manifold.tangent_projection(loss, limit.model, along)
    np.testing.assert_allclose(kept.u, along.u, atol=1e-9)
    np.testing.assert_allclose(kept.v, along.v, atol=1e-9)
    across = models.DiagonalNetwork(limit.model.v, limit.model.u)
    gone = ravel_pytree(manifold.tangent_projection(loss, limit.model, across))[0]
    np.testing.assert_allclose(gone, jnp.zeros(8), atol=1e-9)


@pytest.mark.slow
def test_drift_with_label_noise(noisy_diagonal):
    """u² − v² dies as e^{−2s} on uv = β; F stays, the norm falls."""
    loss, _, beta, limit = noisy_diagonal
    flow = gf.GradientFlow(loss)
    ts = jnp.array([0.0, 0.5, 2.0])
    drift = manifold.riemannian_flow(flow, limit.model, slow_time=2.0, ts=ts)
    start = np.asarray(limit.model.u**2 - limit.model.v**2)
    for i, s in enumerate(np.asarray(ts)):
        u, v = on_hyperbolas(start * np.exp(-2 * s), beta)
        np.testing.assert_allclose(drift.params.u[i], u, rtol=1e-7)
        np.testing.assert_allclose(drift.params.v[i], v, rtol=1e-7)
    np.testing.assert_allclose(drift.train_loss, drift.train_loss[0], rtol=1e-12)
    assert (jnp.diff(drift.penalty) < 0).all()
    found = manifold.regularity(flow, drift)
    assert found.form == "hessian" and found.result == gf.RESULTS.successful
    assert (found.rank == 4).all() and found.regular_until == 2.0


# --- Deep linear networks ----------------------------------------------------------


def low_rank_fit(seed=3):
    """W₂W₁ of rank one against a full matrix, white inputs: the minimum is the best
    approximation of rank one, where F is not zero."""
    q = jnp.linalg.qr(jr.normal(jr.key(seed), (10, 3)))[0]
    target = jr.normal(jr.key(seed + 1), (3, 3))
    return gf.SquaredError(q, q @ target.T, reduction="sum"), np.asarray(target)


@pytest.mark.slow
def test_best_approximation_of_rank_one():
    loss, target = low_rank_fit()
    kb, ka = jr.split(jr.key(0))
    model = models.DeepLinear((jr.normal(ka, (1, 3)), jr.normal(kb, (3, 1))))
    limit = manifold.limit_map(loss, model)
    assert limit.result == gf.RESULTS.successful
    left, sigma, right = np.linalg.svd(target)
    best = sigma[0] * np.outer(left[:, 0], right[0])
    np.testing.assert_allclose(limit.model.matrix, best, atol=1e-9)
    np.testing.assert_allclose(
        loss(limit.model), 0.5 * (sigma[1:] ** 2).sum(), rtol=1e-10
    )
    # One scale is free: (aW₂)(W₁/a).
    found = manifold.spectrum(loss, limit.model)
    assert found.form == "hessian" and found.dimension == 1
    assert not found.ambiguous and not found.negative
    balance = lambda m: jnp.sum(m.weights[0] ** 2) - jnp.sum(m.weights[1] ** 2)
    np.testing.assert_allclose(balance(limit.model), balance(model), atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["zero", "second"])
def test_saddle_is_named(start):
    """θ = 0, and the second singular direction, whence the first is not seen."""
    loss, target = low_rank_fit()
    left, _, right = np.linalg.svd(target)
    scale = 0.0 if start == "zero" else 1.0
    model = models.DeepLinear(
        (jnp.asarray(scale * right[1:2]), jnp.asarray(scale * left[:, 1:2]))
    )
    limit = manifold.limit_map(loss, model, throw=False)
    assert limit.result == gf.RESULTS.saddle
    assert "negative curvature" in str(limit)
    found = manifold.diagnose(gf.GradientFlow(loss), limit.model, form="hessian")
    assert found.result == gf.RESULTS.saddle
    with pytest.raises(RuntimeError, match="saddle"):
        manifold.limit_map(loss, model)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "expected"), [((2, 1), 7), ((1, 1), 5)])
def test_rank_deficient_minimum(ranks, expected):
    """W₂W₁ = W* of rank one by two hidden units: the image of (dW₁, dW₂) ↦ W₂dW₁ +
    dW₂W₁ has 3a + 3b − ab dimensions, a and b the ranks of W₂ and W₁. Where both are
    one M crosses itself, and the rank there is lower than around."""
    x = jr.normal(jr.key(0), (10, 3))
    noise = jr.normal(jr.key(1), (10, 3))
    # Noise that the inputs cannot explain: F > 0, and W* is optimal all the same.
    noise = noise - x @ (jnp.linalg.pinv(x) @ noise)
    a, b = jr.normal(jr.key(2), (3,)), jr.normal(jr.key(3), (3,))
    target = jnp.outer(a, b)
    loss = gf.SquaredError(x, x @ target.T + noise)
    second = jr.normal(jr.key(4), (3,)) if ranks[0] == 2 else jnp.zeros(3)
    model = models.DeepLinear(
        (jnp.stack([b, jnp.zeros(3)]), jnp.stack([a, second], axis=1))
    )
    assert loss(model) > 0.1
    found = manifold.spectrum(loss, model)
    assert found.form == "hessian" and found.rank == expected
    assert found.gap > 1e3 and not found.ambiguous and not found.negative
    expected_result = gf.RESULTS.successful
    if ranks == (1, 1):
        expected_result = gf.RESULTS.singular_point
    told = manifold.diagnose(gf.GradientFlow(loss), model)
    assert told.result == expected_result
    # Without noise the Jacobian form has to see it, too.
    told = manifold.diagnose(gf.GradientFlow(gf.SquaredError(x, x @ target.T)), model)
    assert told.spectrum.form == "jacobian" and told.spectrum.rank == expected
    assert told.result == expected_result


# --- No minimiser ------------------------------------------------------------------


def hard_margin(x, sign):
    """min ½‖w‖² subject to sᵢ⟨w, xᵢ⟩ ≥ 1."""
    rows = sign[:, None] * x
    answer = minimize(
        lambda w: 0.5 * w @ w,
        np.linalg.lstsq(rows, np.ones(len(rows)), rcond=None)[0],
        jac=lambda w: w,
        constraints={
            "type": "ineq",
            "fun": lambda w: rows @ w - 1,
            "jac": lambda w: rows,
        },
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    assert answer.success
    return answer.x


@pytest.mark.slow
def test_separable_data_give_the_widest_margin():
    """Soudry et al., arXiv 1710.10345. Two points have the margin 1, the others more
    than 2: they are forgotten as 1/t, and the balance of the two is found as t^(−1/2).
    """
    points = np.array([[1, 1], [1, -0.5], [2, 3], [2.5, -1], [3, 0.2]])
    turn = np.array([[0.6, 0.8], [-0.8, 0.6]])
    y = np.array([True, False, False, True, True])
    x = (2.0 * y - 1)[:, None] * points @ turn
    loss = gf.Logistic(jnp.asarray(x), jnp.asarray(y.astype(float)))
    limit = manifold.limit_map(loss, Linear(jnp.array([0.1, -0.3])), throw=False)
    assert limit.result == gf.RESULTS.no_minimiser
    w = hard_margin(x, 2.0 * y - 1)
    np.testing.assert_allclose(limit.direction.w, w / np.linalg.norm(w), atol=1e-4)
    np.testing.assert_allclose(limit.margin, 1 / np.linalg.norm(w), rtol=1e-4)
    # θ/‖θ‖ itself is not nearly there yet.
    now = limit.model.w / jnp.linalg.norm(limit.model.w)
    assert jnp.abs(now - w / np.linalg.norm(w)).max() > 1e-3
    assert "direction" in str(limit) and f"{float(limit.margin):.3g}" in str(limit)


@pytest.mark.slow
def test_margin_of_a_softmax():
    """Of a label's logit above the next one."""
    loss = gf.CrossEntropy(jnp.eye(3)[:2], jnp.array([0, 2]))
    model = eqx.nn.Linear(3, 3, use_bias=False, key=jr.key(0))
    limit = manifold.limit_map(loss, model, t_max=1e8, throw=False)
    assert limit.result == gf.RESULTS.no_minimiser
    # By symmetry each sample has its label at 2a and the others at −a, of norm one in
    # all: a = 1/√12, so the margin is 3a, found as t^(−1/2).
    np.testing.assert_allclose(limit.margin, 3 / 12**0.5, rtol=1e-3)


def test_a_limit_has_no_direction(noisy_diagonal):
    limit = noisy_diagonal[-1]
    assert limit.margin == 0 and not limit.direction.u.any()
