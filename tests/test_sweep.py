"""The sweep over weight decays: lanes are independent, whatever way they are run."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf

LAMS = jnp.array([1e-1, 1e-2, 1e-3])


@pytest.fixture(scope="module")
def task():
    return gf.tasks.linear_regression(jax.random.key(0), samples=4, dim=8)


@pytest.fixture(scope="module")
def looped(task):
    return run(task, batch="loop")


def run(task, **options):
    options = dict(weight_decay=LAMS, slow_time=3.0, saves=9) | options
    options = dict(solver=gf.KKT5(), metrics=task.metrics, progress=False) | options
    return gf.sweep(task.flow, task.model, **options)


@pytest.mark.slow
def test_each_lane_is_the_single_run(task, looped):
    for i, lam in enumerate(LAMS):
        path = gf.simulate(
            task.flow,
            task.model,
            weight_decay=lam,
            slow_time=3.0,
            saves=9,
            solver=gf.KKT5(),
            metrics=task.metrics,
        )
        np.testing.assert_array_equal(looped[i].t, path.t)
        np.testing.assert_array_equal(looped[i].models.weights, path.models.weights)
        np.testing.assert_array_equal(looped[i].metrics["test"], path.metrics["test"])


@pytest.mark.slow
def test_vmap_agrees_with_loop(task, looped):
    lanes = run(task, batch="vmap")
    assert jnp.all(lanes.succeeded)
    np.testing.assert_allclose(lanes.t, looped.t, rtol=1e-13)
    np.testing.assert_allclose(
        lanes.paths.params.weights, looped.paths.params.weights, rtol=0, atol=1e-9
    )
    np.testing.assert_array_equal(lanes.stats.steps, looped.stats.steps)


def test_indexing_and_text(task, looped):
    assert len(looped) == 3 and len(list(looped)) == 3
    assert looped.t.shape == (3, 9) and looped.slow_time.shape == (3, 9)
    np.testing.assert_allclose(looped.slow_time[:, -1], 3.0)
    assert looped[1].weight_decay == LAMS[1]
    assert looped[1][4].weights.shape == (8,)
    text = str(looped)
    assert "1.00e-03" in text and "KKT5" in text and "FAILED" not in text


@pytest.mark.slow
def test_compiles_once():
    task = gf.tasks.linear_regression(jax.random.key(1), samples=3, dim=5)
    traces = []

    def seen(model):
        traces.append(None)
        return jnp.sum(model.weights)

    counted = {"seen": seen}
    run(task, weight_decay=LAMS[:1], metrics=counted)
    once = len(traces)
    run(task, weight_decay=jnp.array([0.3, 0.02]), metrics=counted, rtol=1e-5)
    assert len(traces) == once > 0


@pytest.mark.slow
def test_a_failed_lane_is_marked_and_harms_no_other():
    # θ' = (a − λ)θ: for λ = 0.01 beyond what numbers can hold by the end.
    fn = lambda model: -1.0 * jnp.sum(model.weights**2)
    flow = gf.GradientFlow(gf.Loss(fn))
    model = gf.models.LinearModel(jnp.arange(1.0, 4.0))
    lams = jnp.array([2.5, 0.01, 2.2])
    for batch in ("loop", "vmap"):
        options = dict(t1=400.0, saves=9, progress=False, batch=batch, rtol=1e-6)
        lanes = gf.sweep(flow, model, weight_decay=lams, **options)
        # As many lanes: the same program, for arithmetic may differ with the size.
        healthy = gf.sweep(flow, model, weight_decay=lams.at[1].set(3.0), **options)
        assert lanes.succeeded.tolist() == [True, False, True]
        assert bool(lanes[1].result == gf.RESULTS.diverged)
        assert "FAILED" in str(lanes) and "unbounded below" in str(lanes)
        assert jnp.isnan(lanes[1].train_loss[-1])
        for here in (0, 2):
            np.testing.assert_array_equal(
                lanes[here].models.weights, healthy[here].models.weights, strict=True
            )
            exact = model.weights[None, :] * jnp.exp(
                (2.0 - lams[here]) * lanes[here].t[:, None]
            )
            np.testing.assert_allclose(
                lanes[here].models.weights, exact, rtol=1e-3, atol=1e-6
            )
    with pytest.raises(Exception, match="unbounded below"):
        gf.sweep(flow, model, weight_decay=lams, t1=400.0, progress=False, throw=True)


@pytest.mark.parametrize(
    "bad, name",
    [
        (dict(weight_decay=jnp.array([])), "weight_decay"),
        (dict(weight_decay=jnp.array([1e-2, -1e-3])), "weight_decay"),
        (dict(weight_decay=jnp.array([1e-2, jnp.nan])), "weight_decay"),
        (dict(weight_decay=jnp.array([1e-2, 0.0])), "slow_time"),
        (dict(t1=3.0), "slow_time"),
    ],
)
def test_bad_input(task, bad, name):
    with pytest.raises(ValueError, match=name):
        run(task, **bad)


def test_progress_bar_counts_lanes(task, capsys):
    run(task, progress=True)
    shown = capsys.readouterr().err
    assert "3/3" in shown and "0 failed" in shown


@pytest.mark.slow
def test_frozen_leaves_are_shared():
    model = gf.models.DiagonalNetwork(jnp.full(4, 0.5), jnp.full(4, 0.7))
    only_u = eqx.tree_at(lambda m: m.u, jax.tree.map(lambda _: False, model), True)
    loss = gf.SquaredError(jnp.eye(4)[:2], jnp.ones(2))
    flow = gf.GradientFlow(loss, trainable=only_u)
    lanes = gf.sweep(flow, model, weight_decay=LAMS, t1=5.0, saves=5, progress=False)
    assert lanes.paths.static.v.shape == (4,)
    np.testing.assert_array_equal(lanes[2][-1].v, model.v)
