"""Diagnostics of the critical manifold, dense and matrix-free, where the answer is
known."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import diagonal_problem, Linear, linear_problem, Product
from jax.flatten_util import ravel_pytree

import gradflow as gf
from gradflow import manifold
from gradflow.manifold import _matrix_free, jacobian_form


def flat(tree):
    return ravel_pytree(eqx.filter(tree, eqx.is_inexact_array))[0]


@pytest.fixture(scope="module")
def tanh_net():
    """A generic network, interpolating 8 samples: no symmetry helps."""
    kx, ky, km = jr.split(jr.key(11), 3)
    loss = gf.SquaredError(jr.normal(kx, (8, 3)), jr.normal(ky, (8, 1)))
    model = eqx.nn.MLP(3, 1, 12, 1, activation=jnp.tanh, key=km)
    return loss, manifold.limit_map(loss, model).model


# --- At a point --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dense", "matrix-free"])
@pytest.mark.parametrize("form", ["jacobian", "hessian"])
def test_curvature_of_the_hyperbola(form, method):
    """uv = y has curvature 2y/(u² + v²)^{3/2}, and F = ½(uv − y)² η = u² + v² there;
    the drift is P(u, v), of length |u² − v²|/√(u² + v²)."""
    u, y = 1.7, 2.0
    v = y / u
    flow = gf.GradientFlow(gf.SquaredError(jnp.ones(1), jnp.full(1, y)))
    found = manifold.diagnose(
        flow, Product(jnp.array(u), jnp.array(v)), form=form, method=method
    )
    size = u**2 + v**2
    assert found.result == gf.RESULTS.successful
    assert found.spectrum.dimension == 1 and found.distance < 1e-15
    np.testing.assert_allclose(found.spectrum.smallest_curvature, size, rtol=1e-12)
    np.testing.assert_allclose(found.speed, abs(u**2 - v**2) / size**0.5, rtol=1e-10)
    np.testing.assert_allclose(found.curvature, 2 * y / size**1.5, rtol=1e-9)
    assert len(str(found).splitlines()) in (3, 4, 5)
    assert f"curvature {2 * y / size**1.5:.3g}" in str(found)


def test_curvature_of_a_generic_manifold(tanh_net):
    """Retracted, the tangent line w + hu bends as the geodesic does: its second
    difference is II(u, u), with an error of O(h²)."""
    loss, on = tanh_net
    flow = gf.GradientFlow(loss)
    params = eqx.filter(on, eqx.is_inexact_array)
    u = manifold.tangent_projection(loss, on, params)

    def moved(h):
        there = jax.tree.map(lambda p, q: p + h * q, params, u)
        return flat(manifold.retract(loss, eqx.combine(there, on)).model)

    second = lambda h: (moved(h) + moved(-h) - 2 * flat(on)) / h**2
    h = 0.02
    bend = (4 * second(h / 2) - second(h)) / 3
    found = manifold.diagnose(flow, on)
    np.testing.assert_allclose(found.bending, jnp.linalg.norm(bend), rtol=1e-3)
    assert found.bending > 0.1


def test_distance_and_its_result():
    """At (u, v) off uv = y the distance is |uv − y|/√(u² + v²), to first order."""
    flow = gf.GradientFlow(gf.SquaredError(jnp.ones(1), jnp.full(1, 2.0)))
    off = Product(jnp.array(2.0), jnp.array(1.01))
    found = manifold.diagnose(flow, off, form="jacobian")
    size = 2.0**2 + 1.01**2
    np.testing.assert_allclose(found.distance, 0.02 / size, rtol=1e-12)
    assert found.result == gf.RESULTS.not_critical
    assert "not on the critical manifold" in str(found)


def no_gap():
    """Singular values 10⁰, 10⁻¹, …, 10⁻¹⁴: no gap to cut at."""
    loss = gf.SquaredError(jnp.diag(jnp.logspace(0, -14, 15)), jnp.zeros(15))
    return loss, Linear(jnp.zeros(15)), gf.RESULTS.ambiguous_rank


def hyperbola(y):
    """At the origin, uv = y has a saddle, and uv = 0 crosses itself."""
    result = gf.RESULTS.saddle if y else gf.RESULTS.singular_point
    loss = gf.SquaredError(jnp.ones(1), jnp.full(1, y))
    return loss, Product(jnp.array(0.0), jnp.array(0.0)), result


def quartic():
    """Here M is a point, but ∇²F = 0, without any doubt."""
    loss = gf.Loss(lambda m: jnp.sum(m.w**4))
    return loss, Linear(jnp.zeros(15)), gf.RESULTS.singular_point


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dense", "matrix-free"])
@pytest.mark.parametrize(
    "case", [no_gap(), hyperbola(1.0), hyperbola(0.0), quartic()], ids=range(4)
)
def test_degenerate_points_are_named(case, method):
    loss, model, result = case
    found = manifold.diagnose(gf.GradientFlow(loss), model, method=method)
    assert found.result == result
    assert str(gf.RESULTS[result]) in str(found)


def test_rtol_decides_what_distance_is_measured_in():
    """A residual of 1e-9 is 1e-6 away along σ = 1e-3, and 1e-9 if that is dropped."""
    loss = gf.SquaredError(jnp.diag(jnp.array([1.0, 1e-3])), jnp.array([1.0, 1e-9]))
    flow, model = gf.GradientFlow(loss), Linear(jnp.array([1.0, 0.0]))
    for rtol, rank, distance in ((None, 2, 1e-6), (0.1, 1, 1e-9)):
        found = manifold.diagnose(flow, model, form="jacobian", rtol=rtol)
        assert found.spectrum.rank == rank
        np.testing.assert_allclose(found.distance, distance, rtol=1e-3)


# --- Without a matrix --------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", ["jacobian", "hessian"])
def test_matrix_free_is_dense(form, tanh_net):
    """To 4e-11 of the condition numbers, 13 of J and 170 of ∇²F."""
    loss, on = tanh_net
    v = jax.tree.map(lambda p: jnp.sin(p + 1), eqx.filter(on, eqx.is_inexact_array))
    flow = gf.GradientFlow(loss)
    both = []
    for method in ("dense", "matrix-free"):
        project = manifold.tangent_projection(loss, on, v, form=form, method=method)
        found = manifold.diagnose(flow, on, form=form, method=method)
        assert found.result == gf.RESULTS.successful
        assert found.spectrum.rank == 8 and not found.spectrum.ambiguous
        both.append((flat(project), found))
    (dense, one), (free, two) = both
    assert (dense != free).any()
    tolerance = 4e-11 * (13 if form == "jacobian" else 170)
    np.testing.assert_allclose(free, dense, atol=tolerance)
    np.testing.assert_allclose(
        two.spectrum.values[:8], one.spectrum.values[:8], rtol=1e-10
    )
    np.testing.assert_allclose(two.speed, one.speed, rtol=1e-9)
    np.testing.assert_allclose(two.bending, one.bending, rtol=1e-8)


@pytest.mark.slow
def test_least_squares_in_any_unit():
    """Without an absolute tolerance: one of 4e-11 left the point beside a regular one
    off M, where the rank is higher."""
    a = jr.normal(jr.key(0), (5, 7))
    b = jr.normal(jr.key(1), (5,))
    exact = jnp.linalg.pinv(a) @ b
    for unit in (1.0, 1e-14, 1e14):
        x, okay = _matrix_free.least_squares(lambda v: a @ v, unit * b, 7)
        assert okay
        np.testing.assert_allclose(x / unit, exact, atol=1e-8)


@pytest.mark.slow
def test_matrix_free_with_a_curved_outer_loss(tanh_net):
    """ℓ'' is not a multiple of I: the singular values are those of (ℓ'')^½J."""
    loss, on = tanh_net
    logistic = gf.Logistic(loss.x, jax.nn.sigmoid(jax.vmap(on)(loss.x)))
    dense, free = (
        manifold.spectrum(logistic, on, form="jacobian", method=method)
        for method in ("dense", "matrix-free")
    )
    np.testing.assert_allclose(free.values, dense.values, rtol=1e-10)
    hessian = manifold.spectrum(logistic, on, form="hessian", method="matrix-free")
    np.testing.assert_allclose(hessian.curvatures[:8], dense.curvatures, rtol=1e-9)


@pytest.mark.slow
def test_matrix_free_sees_redundant_data():
    loss, model = diagonal_problem(jr.key(7), samples=6, features=15)
    twice = gf.SquaredError(
        jnp.concatenate([loss.x, loss.x]), jnp.concatenate([loss.y, loss.y])
    )
    on = manifold.retract(loss, model).model
    # All 12 steps; and 8, with which the rank, 6, is known as well.
    for steps in (None, 8):
        found = manifold.spectrum(twice, on, method="matrix-free", max_steps=steps)
        assert found.resolved and not found.ambiguous
        assert found.rank == 6 and found.deficient
        assert "rank-deficient (6 of 12)" in str(found)
    # The same all over M, which therefore is regular.
    flow = gf.GradientFlow(twice)
    assert manifold.diagnose(flow, on).result == gf.RESULTS.successful


@pytest.mark.slow
def test_size_decides(monkeypatch):
    """Above it no matrix is made: not for the form, nor for what follows."""

    class NoMatrix(gf.flow.flat.FlatLoss):
        def jacobian(self, theta):
            raise AssertionError("a Jacobian was made")

    loss, model = linear_problem(jr.key(0), samples=6, features=11)
    on = manifold.retract(loss, model).model
    dense = manifold.tangent_projection(loss, on, model).w
    monkeypatch.setattr(jacobian_form, "_DENSE", 65)
    monkeypatch.setattr(gf.flow.flat, "FlatLoss", NoMatrix)
    jax.clear_caches()
    free = manifold.tangent_projection(loss, on, model).w
    np.testing.assert_allclose(free, dense, atol=1e-9)
    found = manifold.spectrum(loss, on)
    assert found.form == "jacobian" and found.rank == 6
    # Off M the residuals are seen without a matrix, too.
    assert manifold.spectrum(loss, model).form == "hessian"
    monkeypatch.setattr(jacobian_form, "_DENSE", 66)
    jax.clear_caches()
    with pytest.raises(AssertionError, match="a Jacobian was made"):
        manifold.tangent_projection(loss, on, model)


@pytest.mark.slow
def test_too_few_steps_are_named():
    loss, model = linear_problem(jr.key(0), samples=8, features=20)
    on = manifold.retract(loss, model).model
    found = manifold.spectrum(loss, on, method="matrix-free", max_steps=5)
    assert not found.resolved and found.ambiguous
    assert "did not reach its tolerance" in str(found)
    flow = gf.GradientFlow(loss)
    told = manifold.diagnose(flow, on, method="matrix-free", max_steps=5)
    assert told.result == gf.RESULTS.unresolved
    options = dict(method="matrix-free", max_steps=3)
    with pytest.raises(RuntimeError, match="did not reach its tolerance"):
        manifold.tangent_projection(loss, on, on, **options)
    out = manifold.tangent_projection(loss, on, on, throw=False, **options)
    assert jnp.isnan(out.w).all()


@pytest.mark.parametrize("redundant", [False, True])
def test_full_rank_is_known_early(redundant):
    """60 singular values between 1 and 2: 30 steps are enough to see that none is
    smaller; and that one is, where a sample comes twice, but not how many others."""
    left, right = (
        jnp.linalg.qr(jr.normal(key, (size, 60)))[0]
        for key, size in zip(jr.split(jr.key(0)), (60, 90), strict=True)
    )
    x = left @ jnp.diag(jnp.linspace(1, 2, 60)) @ right.T
    x = x.at[1].set(x[0]) if redundant else x
    loss = gf.SquaredError(x, jnp.zeros(60), reduction="sum")
    on = Linear(jnp.zeros(90))
    found = manifold.spectrum(loss, on, method="matrix-free", max_steps=30)
    dense = manifold.spectrum(loss, on, method="dense", form=found.form)
    assert dense.rank == 60 - redundant
    assert found.resolved == (not redundant) and found.ambiguous == redundant
    if not redundant:
        assert found.rank == 60 and found.gap > 1e3
        np.testing.assert_allclose(
            found.smallest_curvature, dense.smallest_curvature, rtol=1e-2
        )


def test_saddle_without_a_matrix():
    """F = ½ Σ κᵢwᵢ² with 3 positive and 2 negative curvatures among 40."""
    kappa = jnp.zeros(40).at[:5].set(jnp.array([3.0, 2.0, -1.5, 1.0, -0.5]))
    loss = gf.Loss(lambda m: 0.5 * jnp.sum(kappa * m.w**2))
    found = manifold.spectrum(loss, Linear(jnp.zeros(40)), method="matrix-free")
    assert found.rank == 5 and found.negative and not found.ambiguous
    np.testing.assert_allclose(found.smallest_curvature, 0.5, rtol=1e-12)


# --- Along a drift -----------------------------------------------------------------


@pytest.mark.slow
def test_regularity_along_the_drift_of_a_hyperbola():
    """uv = y from (u₀, y/u₀): u² − v² = c₀e^{−2s}, and η = u² + v² = √(c² + 4y²)."""
    y, u0 = 0.1, 2.0
    flow = gf.GradientFlow(gf.SquaredError(jnp.ones(1), jnp.full(1, y)))
    start = Product(jnp.array(u0), jnp.array(y / u0))
    drift = manifold.riemannian_flow(flow, start, slow_time=3.0)
    found = manifold.regularity(flow, drift)
    c = (u0**2 - (y / u0) ** 2) * np.exp(-2 * np.asarray(drift.slow_time))
    eta = np.sqrt(c**2 + 4 * y**2)
    np.testing.assert_allclose(found.smallest_curvature, eta, rtol=1e-7)
    np.testing.assert_allclose(found.sigma_min**2, eta, rtol=1e-7)
    np.testing.assert_allclose(found.curvature, 2 * y / eta**1.5, rtol=1e-6)
    assert (found.rank == 1).all() and found.result == gf.RESULTS.successful
    assert found.regular_until == 3.0
    # η = 10λ where c² = (10λ)² − 4y².
    lam = 0.05
    until = 0.5 * np.log(c[0] / np.sqrt((10 * lam) ** 2 - 4 * y**2))
    np.testing.assert_allclose(found.valid_until(lam), until, rtol=1e-4)
    assert found.valid_until(1e-3) == 3.0  # η ≥ 2y = 0.2 throughout
    assert found.valid_until(1.0) == 0.0
    assert "valid up to s = " in str(found)
    for lam in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="weight_decay: expected"):
            found.valid_until(lam)
    # Nothing is valid where nothing is known.
    guess = eqx.tree_at(lambda r: r.ambiguous, found, jnp.ones_like(found.ambiguous))
    assert np.isnan(guess.regular_until) and guess.valid_until(1e-3) == 0.0
    assert "nan" not in str(guess) and "not regular" in str(guess)
    unknown = found.smallest_curvature.at[100:].set(jnp.nan)
    unknown = eqx.tree_at(lambda r: r.smallest_curvature, found, unknown)
    assert unknown.valid_until(1e-3) == drift.slow_time[99]
    # Nor of a drift that did not get to its end, or that was not one.
    lost = jax.tree.map(lambda p: p.at[200:].set(jnp.nan), drift.params)
    lost = eqx.tree_at(
        lambda p: (p.params, p.result), drift, (lost, gf.RESULTS.out_of_steps)
    )
    with pytest.raises(ValueError, match="path: the drift failed .* step budget"):
        manifold.regularity(flow, lost)
    off = eqx.tree_at(lambda p: p.result, drift, gf.RESULTS.not_critical)
    assert manifold.regularity(flow, off).result == gf.RESULTS.not_critical


@pytest.mark.slow
def test_regularity_where_rank_is_lost():
    """One output keeps its scale, one dies as e^{−2s}: rank 2 falls to 1."""
    loss = gf.SquaredError(
        jnp.array([1.0, 1.0]),
        jnp.array([1.0, 0.0]),
        predict=lambda m, x: jnp.stack([m.w[0], m.w[1] * m.w[2]]),
    )
    flow = gf.GradientFlow(loss)
    drift = manifold.riemannian_flow(
        flow,
        Linear(jnp.array([1.0, 1.0, 0.0])),
        slow_time=45.0,
        ts=jnp.linspace(0.0, 45.0, 46),
        throw=False,
    )
    found = manifold.regularity(flow, drift, form="jacobian")
    assert found.rank[0] == 2 and found.rank[-1] == 1
    assert found.result == gf.RESULTS.rank_lost
    assert 10.0 < found.regular_until < 45.0
    # η = e^{−2s}/2 falls to 10λ at s = ½ log(1/(20λ)).
    for lam in (1e-3, 1e-6):
        until = 0.5 * np.log(1 / (20 * lam))
        np.testing.assert_allclose(found.valid_until(lam), until, rtol=1e-4)
    assert found.valid_until(1e-40) == found.regular_until
