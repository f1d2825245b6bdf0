"""experiments/laws: their pieces against closed forms, and two of them, small."""

import types

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

pytest.importorskip("tyro")
xr = pytest.importorskip("xarray")
import gradflow as gf  # noqa: E402
from experiments.laws import (  # noqa: E402
    common,
    held,
    invariance,
    norms,
    paths,
    STUDY,
)
from experiments.shared.rows import check  # noqa: E402


@pytest.fixture(scope="module")
def falls():
    """The drift of a linear regression, w₁ + w₂e^{−s} with w₁ normal and w₂ in the
    kernel of X: V = |w₁|² + |w₂|²e^{−2s}, and κ the second part of it."""
    x = jnp.array([[1.0, 1.0, 0.0]])
    flow = gf.GradientFlow(gf.SquaredError(x, jnp.array([2.0])))
    s = np.linspace(0, 3, 61)
    still, moving = np.array([1.0, 1.0, 0.0]), np.array([1.0, -1.0, 2.0])
    weights = jnp.asarray(still + np.exp(-s)[:, None] * moving)
    model = jax.vmap(gf.models.LinearModel)(weights)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    drift = types.SimpleNamespace(s=s, params=params, static=static)
    return common.contraction(flow, drift)


def test_kappa_is_the_part_of_the_weights_that_is_tangent(falls):
    gone = 6 * np.exp(-2 * falls.s)
    np.testing.assert_allclose(falls.size, 2 + gone)
    np.testing.assert_allclose(falls.kappa, gone / (2 + gone))


def test_the_integral_along_the_drift_is_the_slow_time(falls):
    for s in (0.3, 1.111, 3.0):
        assert falls.until(s) == pytest.approx(s, rel=1e-5)
        ratio = 0.5 * np.log(8 / (2 + 6 * np.exp(-2 * s)))
        assert falls.log_ratio(s) == pytest.approx(ratio, rel=1e-5)
        # A mean of κ: between the values at both ends, so that T is above the bound.
        assert falls.kappa[-1] < falls.constant(s) < falls.kappa[0] < 1
    assert np.isnan(falls.until(np.nan))


def test_a_verdict_is_that_of_the_claims():
    good, bad = check("one", 1, "≤ 2", ""), check("two", 3, "≤ 2", "")
    open_ = check("three", np.nan, "≤ 2", "", given=False)
    of = lambda controls, claims: common.verdict(controls, claims)
    assert of([], [good]).sentence == "holds: one" and of([], [good]).value == 1
    assert of([good], [bad]).sentence == "refuted: two"
    mixed = of([], [good, bad, open_])
    assert mixed.sentence == "holds where: one. Refuted: two" and mixed.value == 0.5
    assert of([bad], [good]).sentence == "open: a control failed"
    assert of([good], [open_]).sentence == "open: nothing was judged"
    assert mixed.ok is None


def test_exponents_and_bends():
    lams = np.array([1.0, 0.1, 0.01])
    times = np.stack([3 / lams, lams**-0.757, [0.0, np.nan, 1.0]])
    local = norms.local_exponents(lams, times)
    np.testing.assert_allclose(local[:2], [[1, 1], [0.757, 0.757]])
    assert not np.isfinite(local[2]).any()
    x = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    assert held.explained(2 + 3 * x, x) == pytest.approx(1)
    assert held.explained(x**2, x) < 0.97
    assert held.explained(x**2, x, x**2) == pytest.approx(1)
    assert np.isnan(held.explained(x[:3], x[:3]))
    assert held.bend(x, 3 * x) == pytest.approx(1)
    assert held.bend(x, x**2) == pytest.approx(9 / 3)
    assert held.bend(x, -x) == np.inf


def test_the_share_of_a_line_of_a_circle_and_of_a_walk():
    t = np.linspace(0, 1, 200, endpoint=False)[:, None]
    assert paths.component_share(t * np.array([[1.0, 2.0, 3.0]])) == pytest.approx(1)
    circle = np.hstack([np.cos(2 * np.pi * t), np.sin(2 * np.pi * t)])
    assert paths.component_share(circle) == pytest.approx(0.5)
    steps = np.random.default_rng(0).normal(size=(200, 20_000))
    share = paths.component_share(steps.cumsum(axis=0))
    assert share == pytest.approx(6 / np.pi**2, abs=0.02)


@pytest.mark.parametrize("kind", [gf.SquaredError, gf.CrossEntropy])
def test_the_defect_is_that_of_two_small_steps(kind):
    """θ_AB − θ_BA of steps of size h, over h²‖g_A‖‖g_B‖."""
    x, y = jr.normal(jr.key(0), (6, 4)), jr.normal(jr.key(1), (6,))
    model = gf.models.LinearModel(jr.normal(jr.key(2), (4,)))
    if kind is gf.CrossEntropy:
        y, model = jnp.array([0, 1, 1, 0, 2, 1]), eqx.nn.Linear(4, 3, key=jr.key(2))
    halves = paths.pairs_of_halves(jr.key(3), 6, 1)
    assert sorted(halves.ravel().tolist()) == list(range(6))
    w, unravel = jax.flatten_util.ravel_pytree(model)

    def gradient(samples, w):
        loss = kind(x[samples], y[samples])
        return jax.grad(lambda w: loss(unravel(w)))(w)

    a, b = halves[0]
    step = lambda w, one: w - 1e-4 * gradient(one, w)
    away = step(step(w, a), b) - step(step(w, b), a)
    size = jnp.linalg.norm(gradient(a, w)) * jnp.linalg.norm(gradient(b, w))
    expected = jnp.linalg.norm(away) / (1e-8 * size)
    defect = paths.Defect(kind(x, y), halves)(model)
    # Exact of a quadratic loss, but for rounding; else to O(h).
    rtol = 1e-5 if kind is gf.SquaredError else 1e-3
    np.testing.assert_allclose(defect, expected, rtol=rtol)


def test_the_path_of_a_transformer_is_that_of_its_attention():
    config = paths.Component(networks=("transformer",))
    model = config.task("transformer", 0).model
    params = jax.tree.map(
        lambda p: jnp.stack([p, 2 * p]), eqx.filter(model, eqx.is_array)
    )
    found = paths.flat(types.SimpleNamespace(params=params))
    (block,) = model.blocks
    own = jax.flatten_util.ravel_pytree(block.attention)[0]
    np.testing.assert_allclose(found, [own, 2 * own], rtol=1e-15)
    assert found.shape[1] == 4 * 32 * 32


def test_the_onset_is_at_ten_times_the_first_values():
    t = np.arange(6.0)
    assert paths.onset(t, np.array([1.0, 1.0, 2.0, 9.0, 11.0, 3.0])) == 4
    assert np.isnan(paths.onset(t, np.ones(6)))


def test_models_without_a_scale_or_of_a_degree():
    weight = jr.normal(jr.key(0), (3, 2))
    model = invariance.DirectionEntries(weight, 5.0)
    twice = invariance.DirectionEntries(2 * weight, 5.0)
    assert jnp.linalg.norm(model.matrix) == pytest.approx(5)
    np.testing.assert_allclose(twice(jnp.array([2, 1])), model.matrix[2, 1])
    network = invariance.DirectionNetwork(weight, jnp.ones(3), jnp.ones(3), 2.0)
    scaled = eqx.tree_at(lambda m: m.inner, network, 3 * weight)
    x = jnp.array([0.3, -1.0])
    np.testing.assert_allclose(scaled(x), network(x))
    assert invariance.turned(weight, 3 * weight) == pytest.approx(0)
    assert invariance.turned(weight, -weight) == pytest.approx(2)
    for depth in held.DEPTHS.values():
        task = held.signs(0, depth)
        bigger = jax.tree.map(lambda p: 2 * p, task.model)
        np.testing.assert_allclose(bigger.beta, 2.0**depth * task.model.beta)
        # Of so many inputs the part that is told is a share of the angle.
        at = gf.models.LinearModel(jnp.zeros(40).at[0].set(1.0))
        angle = held.Angle(task.test.fn.target)
        assert angle(types.SimpleNamespace(beta=at.weights)) == pytest.approx(0.25)


def test_the_metric_of_adam_is_that_of_its_gradients():
    loss = gf.SquaredError(jnp.eye(2), jnp.array([0.0, 0.0]), reduction="sum")
    weights = jnp.array([[1.0, 4.0], [-1.0, 4.0]])
    models = jax.vmap(gf.models.LinearModel)(weights)
    params, static = eqx.partition(models, eqx.is_inexact_array)
    path = types.SimpleNamespace(params=params, static=static)
    flow = norms.in_metric_of(path, gf.GradientFlow(loss), 0.0)
    # Gradients are the weights: √v = (1, 4), and rates of geometric mean one.
    np.testing.assert_allclose(flow.rates.weights, [2.0, 0.5])
    np.testing.assert_allclose(flow.penalty.weights.weights, [0.5, 2.0])


@pytest.mark.slow
def test_two_laws_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(norms, "NETWORKS", {"diagonal": common.diagonal})
    options = dict(seeds=2, quick=True)
    config = norms.NormDelay(**options, scales=(1.0,), out=tmp_path / "delay")
    checks = {c["name"]: c for c in STUDY.main(config)["checks"]}
    assert checks["identity"]["value"] < 1e-6
    assert checks["diagonal: integral"]["value"] < 1e-3
    assert checks["diagonal: lower"]["ok"]
    assert checks["verdict"]["sentence"].startswith("holds")
    config = paths.Component(
        **options, networks=("diagonal",), points=31, out=tmp_path / "component"
    )
    summary = STUDY.main(config)
    checks = {c["name"]: c for c in summary["checks"]}
    assert checks["walk"]["ok"] and 0.5 < checks["diagonal, flow"]["value"] <= 1
    for name in ("delay", "component"):
        assert (tmp_path / name / f"{name}.png").stat().st_size > 10_000
