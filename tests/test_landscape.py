"""Flows at a fixed norm, and losses against it, where they are known in closed form."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import gradflow as gf


class Point(eqx.Module):
    theta: Array

    def __call__(self, x):
        return x @ self.theta


A = np.array([1.0, 2.0, -2.0])  # ‖A‖ = 3
B = np.array([2.0, 1.0, -1.0])


def towards(target):
    """F = ½‖θ − target‖²."""
    return gf.SquaredError(jnp.eye(3), jnp.asarray(target), reduction="sum")


START = Point(jnp.array([2.0, 0.0, 0.0]))
TS = jnp.linspace(0.0, 3.0, 31)


def exact(t, w):
    """On the sphere the angle φ to A falls as tan(φ/2) = tan(φ₀/2) e^{−‖A‖t/w}."""
    along = A / 3
    e = np.array([1.0, 0.0, 0.0])
    phi = 2 * np.arctan(np.tan(np.arccos(e @ along) / 2) * np.exp(-3 * t / w))
    across = e - (e @ along) * along
    across = across / np.linalg.norm(across)
    return w * (np.outer(np.cos(phi), along) + np.outer(np.sin(phi), across))


@pytest.fixture(scope="module")
def held():
    return gf.GradientFlow(towards(A), hold_norm=True)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [gf.KKT5(), gf.RKC2(), None])
def test_flow_on_the_sphere(solver, held):
    path = gf.simulate(
        held, START, weight_decay=0.0, ts=TS, rtol=1e-8, solver=solver,
        metrics={"train": gf.Metric(held.loss)},
    )  # fmt: skip
    theta = np.asarray(path.params.theta)
    np.testing.assert_allclose(theta, exact(np.asarray(TS), 2.0), atol=1e-7)
    np.testing.assert_allclose(np.linalg.norm(theta, axis=1), 2.0, rtol=1e-14)
    F = 0.5 * ((theta - A) ** 2).sum(axis=1)
    np.testing.assert_allclose(path.train_loss, F, rtol=1e-6)
    np.testing.assert_allclose(path.metrics["train"], F, rtol=1e-6)
    assert eqx.tree_equal(path[0], START, rtol=1e-14)


@pytest.mark.slow
def test_a_penalty_pulls_along_the_sphere_only():
    """Weight decay does nothing there; ½‖θ − B‖² as a penalty is a second loss."""

    class Near(gf.AbstractPenalty):
        def __call__(self, params):
            return 0.5 * jnp.sum((params.theta - B) ** 2)

        def gradient(self, params):
            return eqx.tree_at(lambda p: p.theta, params, params.theta - B)

    options = dict(ts=TS, rtol=1e-9)
    run = lambda loss, penalty, lam: (
        gf.simulate(
            gf.GradientFlow(towards(loss), penalty=penalty, hold_norm=True),
            START,
            weight_decay=lam,
            **options,
        ).params.theta
    )
    # F + λR = ½‖θ − A‖² + ½·½‖θ − B‖² = ¾‖θ − (A + B/2)/1.5‖² + c: on the sphere only
    # the linear part counts, and that is −θ·(A + B/2).
    plain = run(A + B / 2, None, 0.0)
    np.testing.assert_allclose(run(A, Near(), 0.5), plain, atol=1e-7)
    np.testing.assert_allclose(run(A, None, 0.7), run(A, None, 0.0), atol=1e-7)


def test_stepping_and_rescaling_approaches_the_flow(held):
    rates = np.array([0.1, 0.05, 0.025, 0.0125])
    away = []
    for rate in rates:
        path = gf.descent(held, START, weight_decay=0.0, learning_rate=rate, t1=2.0)
        theta = np.asarray(path.params.theta)
        np.testing.assert_allclose(np.linalg.norm(theta, axis=1), 2.0, rtol=1e-13)
        away.append(np.abs(theta - exact(np.asarray(path.t), 2.0)).max())
    slope = np.polyfit(np.log(rates), np.log(away), 1)[0]
    assert abs(slope - 1) < 0.15


@pytest.mark.slow
def test_lanes_hold_their_norm(held):
    sweep = gf.sweep(
        held, START, weight_decay=jnp.array([0.0, 0.5]), ts=TS, batch="vmap",
        progress=False, rtol=1e-8, solver=gf.KKT5(),
    )  # fmt: skip
    for lane in sweep:
        np.testing.assert_allclose(
            lane.params.theta, exact(np.asarray(TS), 2.0), atol=1e-6
        )
        assert lane[0](jnp.ones(3)) == 2.0


@pytest.fixture(scope="module")
def shape():
    """l̃_train(w) = ½(w − ‖A‖)², flat nowhere; l̃_test(w) = ½‖wÂ − B‖², least at
    w = Â·B."""
    test = gf.Metric(towards(B), threshold=1.5)
    other = Point(jnp.array([0.0, 1.0, 1.0]))
    return gf.landscape(
        gf.GradientFlow(towards(A)), [START, other],
        scales=np.geomspace(0.4, 4.0, 9), t1=200.0, metrics={"test": test},
        progress=False, rtol=1e-8,
    )  # fmt: skip


def test_penalty_plays_no_part_in_a_landscape(shape):
    """Not even one with kinks, which no solver could follow on the sphere."""
    again = gf.landscape(
        gf.GradientFlow(towards(A), penalty=gf.L1()), START, scales=shape.scale[:3],
        t1=200.0, metrics={"test": shape.watched["test"]}, progress=False, rtol=1e-8,
    )  # fmt: skip
    np.testing.assert_allclose(again.train_loss[0], shape.train_loss[0, :3], rtol=1e-12)


def test_a_start_whose_runs_all_failed(shape):
    lost = shape.metrics["test"].copy()
    lost[0] = np.nan
    partly = eqx.tree_at(lambda s: s.metrics["test"], shape, lost)
    assert np.isnan(partly.best()[0]) and partly.best()[1] == shape.best()[1]
    assert np.isnan(partly.zone(threshold=1e9)[0]).all()
    assert "Loss landscape" in str(partly)


def test_landscape_in_closed_form(shape):
    assert shape.succeeded.all() and shape.norm.shape == (2, 9)
    np.testing.assert_allclose(shape.norm[0], 2 * shape.scale)
    np.testing.assert_allclose(shape.train_loss, 0.5 * (shape.norm - 3) ** 2, atol=1e-9)
    at = shape.norm[..., None] * A / 3 - B
    np.testing.assert_allclose(shape.metrics["test"], 0.5 * (at**2).sum(-1), atol=1e-6)
    best = A @ B / 3
    np.testing.assert_allclose(shape.best(), best, rtol=0.05)
    half = np.sqrt(2 * 1.5 - (B @ B - best**2))
    np.testing.assert_allclose(
        shape.zone(), [[best - half, best + half]] * 2, rtol=0.05
    )
    assert np.isnan(shape.zone(threshold=0.01)).all()
    assert "test is best at a norm of" in str(shape)
    assert (shape.slope < 1e-3).all()


def test_landscape_of_steps(shape):
    """Step then rescale ends where the flow does."""
    stepped = gf.landscape(
        gf.GradientFlow(towards(A)), START, scales=[0.5, 1.0, 2.0],
        run=gf.Descent(0.05, steps=2000),
        metrics={"test": towards(B)}, progress=False,
    )  # fmt: skip
    np.testing.assert_allclose(
        stepped.train_loss[0], 0.5 * (stepped.norm[0] - 3) ** 2, atol=1e-4
    )


@pytest.mark.slow
def test_landscape_draws_itself(shape):
    plt = pytest.importorskip("matplotlib.pyplot")
    flow = gf.GradientFlow(towards(A))
    run = gf.simulate(flow, START, weight_decay=0.1, t1=10.0, metrics=shape.watched)
    with pytest.raises(ValueError, match=r"^metric: expected one of 'test', got"):
        shape.plot(metric="tset")
    ax = shape.plot(runs={"λ = 0.1": run})
    assert ax.get_xscale() == "log" and "norm" in ax.get_xlabel()
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert {"train loss", "test", "Goldilocks zone", "λ = 0.1"} <= set(labels)
    plt.close("all")


def test_what_makes_no_sense_is_refused(held):
    with pytest.raises(ValueError, match="norm 0"):
        gf.simulate(held, Point(jnp.zeros(3)), weight_decay=0.0, t1=1.0)
    flow = gf.GradientFlow(towards(A))
    with pytest.raises(ValueError, match="scales"):
        gf.landscape(flow, START, scales=[1.0, 0.5, 2.0], t1=1.0)
    with pytest.raises(ValueError, match="t1"):
        gf.landscape(flow, START, scales=[0.5, 1.0, 2.0])
    with pytest.raises(ValueError, match="cannot hold the norm"):
        gf.descent(
            held, START, weight_decay=0.0, learning_rate=0.1, steps=3,
            method="projected",
        )  # fmt: skip
