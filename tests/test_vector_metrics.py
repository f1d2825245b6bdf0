"""Metrics that are arrays: along paths, in sweeps and stores, in files and figures."""

import jax.numpy as jnp
import jax.random as jr
import matplotlib
import numpy as np
import pytest
from helpers import Linear
from matplotlib.figure import Figure

import gradflow as gf

matplotlib.use("Agg")

LAMS = [0.1, 0.01]
TARGET = jr.normal(jr.key(0), (3, 4))
LOSS = gf.SquaredError(jnp.eye(4), TARGET.T)
FLOW = gf.GradientFlow(LOSS)
MODEL = gf.models.DeepLinear((0.5 * jr.normal(jr.key(1), (3, 4)), jnp.eye(3)))


def singular_values(model):
    return jnp.linalg.svd(model.matrix, compute_uv=False)


def entries(model):
    return model.matrix


WATCH = {"test": gf.Metric(LOSS, threshold=1e-3), "sv": singular_values, "all": entries}


def by_numpy(path):
    """The singular values of each saved model, and its matrix."""
    matrices = np.stack([np.asarray(path[i].matrix) for i in range(len(path))])
    return np.linalg.svd(matrices, compute_uv=False), matrices


def check(path):
    values, matrices = by_numpy(path)
    np.testing.assert_allclose(path.metrics["sv"], values, rtol=1e-12)
    np.testing.assert_allclose(path.metrics["all"], matrices, rtol=1e-12, atol=1e-14)


def sweep(**options):
    usual = dict(weight_decay=LAMS, slow_time=1.0, saves=9, metrics=WATCH)
    usual |= dict(solver=gf.KKT4(), progress=False)
    return gf.sweep(FLOW, MODEL, **(usual | options))


@pytest.fixture(scope="module")
def lanes():
    return sweep()


@pytest.fixture
def ax():
    return Figure().subplots()


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_in_a_sweep(lanes, ax):
    assert lanes.metrics["sv"].shape == (2, 9, 3)
    assert lanes.metrics["all"].shape == (2, 9, 3, 4)
    for path in lanes:
        check(path)
    data = lanes.to_xarray()
    assert data.metric_sv.dims == ("weight_decay", "time", "metric_sv_0")
    assert data.metric_all.dims[2:] == ("metric_all_0", "metric_all_1")
    np.testing.assert_array_equal(data.metric_sv, lanes.metrics["sv"])
    # A line each, but one number of an array: the largest.
    assert "max sv" in str(lanes).splitlines()[1]
    last = lanes.metrics["sv"][0, -1]
    assert f"{float(last.max()):.3g}" in str(lanes).splitlines()[2]
    widths = {len(line.rstrip()) for line in str(lanes).splitlines()[1:]}
    assert len(widths) == 1
    gf.plot.sweep(lanes, ax, metric="sv")
    assert len([x for x in ax.get_lines() if x.get_linestyle() == "-"]) == 2 * 3


def test_of_one_path(lanes, ax, tmp_path):
    path = lanes[1]
    first, last = path.metrics["sv"][0], path.metrics["sv"][-1]
    told = f"sv ({first.min():.3g} … {first.max():.3g}) → "
    assert f"{told}({last.min():.3g} … {last.max():.3g})" in str(path)
    data = path.to_xarray()
    assert data.metric_sv.dims == ("time", "metric_sv_0")
    assert data.metric_all.shape == (9, 3, 4)
    path.plot(ax=ax)
    assert labels(ax) == ["train loss", "all (12)", "sv (3)", "test", "penalty $R$"]
    gf.save(tmp_path / "path.npz", path)
    read = gf.load(tmp_path / "path.npz").metrics["sv"]
    np.testing.assert_array_equal(read, path.metrics["sv"])


@pytest.mark.slow
def test_in_a_store(lanes, tmp_path):
    kept = sweep(store=gf.Store(tmp_path / "s.zarr", chunk=1, parameters=True))
    for name in WATCH:
        np.testing.assert_array_equal(kept.metrics[name], lanes.metrics[name])
    assert kept.to_xarray().metric_sv.dims == ("weight_decay", "time", "metric_sv_0")
    check(kept[1])
    np.testing.assert_array_equal(kept.load().metrics["all"], lanes.metrics["all"])
    assert str(kept) == str(lanes)
    again = sweep(store=gf.Store(tmp_path / "s.zarr", chunk=1, parameters=True))
    np.testing.assert_array_equal(again.metrics["sv"], lanes.metrics["sv"])


@pytest.mark.slow
def test_in_descents_in_lockstep_and_through_many_times():
    steps = dict(run=gf.Descent([0.1, 0.2], steps=50), slow_time=None, solver=None)
    for path in sweep(weight_decay=0.1, batch="vmap", **steps):
        check(path)
    ts = jnp.linspace(0.0, 3.0, 80)  # more than one program takes
    path = gf.simulate(
        FLOW, MODEL, weight_decay=0.1, ts=ts, metrics=WATCH, solver=gf.KKT4()
    )
    assert path.metrics["sv"].shape == (80, 3)
    check(path)


@pytest.mark.slow
def test_in_theory(ax):
    lanes = sweep(weight_decay=[1e-3, 1e-2], saves=33, slow_time=0.5, rtol=1e-8)
    theory = gf.two_phase(FLOW, MODEL, slow_time=0.5, metrics=WATCH, order=2)
    report = gf.compare(lanes, theory)
    assert np.isfinite(report.grokked.measured).all()
    data = report.to_xarray()
    assert data.predicted_metric_sv.dims[-2:] == ("predicted_time", "metric_sv_0")
    # What is predicted of the singular values is what they are.
    t, told = report.curves.t[0], report.curves.metrics["sv"][0]
    inside = np.asarray(lanes.t[0]) <= t[-1]
    for k in range(3):
        along = np.interp(lanes.t[0][inside], t, told[:, k])
        np.testing.assert_allclose(along, lanes.metrics["sv"][0, inside, k], atol=2e-3)
    assert "sv (" in str(theory.drift)
    assert theory.to_xarray().drift_metric_sv.shape == (len(theory.drift), 3)
    gf.plot.collapse(report, ax, metric="sv")
    assert len(ax.get_lines()) >= 2 * 3 + 3
    assert labels(ax)[0].startswith("drift") and "drift" not in labels(ax)[1]
    gf.plot.report(report)
    # Under no name does it count as one that is to pass a threshold.
    named = dict(WATCH, test=singular_values)
    report = gf.compare(
        sweep(weight_decay=[1e-3, 1e-2], metrics=named, slow_time=0.5),
        gf.two_phase(FLOW, MODEL, slow_time=0.5, metrics=named),
    )
    assert np.isnan(report.grokked.measured).all()
    gf.plot.report(report)


def test_only_one_number_has_a_threshold():
    watch = {"sv": gf.Metric(singular_values, threshold=0.1)}
    told = r"^metrics\['sv'\]: a threshold is for one number, .* shape \(3,\); [^\n]*$"
    steps = dict(weight_decay=0.1, metrics=watch)
    with pytest.raises(ValueError, match=told):
        gf.simulate(FLOW, MODEL, slow_time=1.0, **steps)
    with pytest.raises(ValueError, match=told):
        gf.descent(FLOW, MODEL, learning_rate=0.1, steps=3, **steps)
    with pytest.raises(ValueError, match=told):
        sweep(metrics=watch)
    with pytest.raises(ValueError, match=r"^values: a threshold is for one number"):
        gf.crossing_time(np.arange(3.0), np.ones((3, 2)), watch["sv"])


def test_what_else_is_for_single_numbers(lanes):
    with pytest.raises(ValueError, match=r"^metrics\['sv'\]: a landscape is of"):
        gf.landscape(LOSS, MODEL, scales=[1.0, 2.0, 3.0], t1=1.0, metrics=WATCH)
    with pytest.raises(ValueError, match="^path: expected one number for the metric"):
        gf.widths(lanes[0], train="test", test="sv")
    assert np.isnan(lanes.crossing_time("sv")).all()


@pytest.mark.parametrize("wrong", [lambda m: jnp.ones(0), lambda m: (m, m)])
def test_what_is_no_array_of_numbers(wrong):
    with pytest.raises(
        ValueError, match=r"^metrics\['a'\]: expected real numbers, got"
    ):
        gf.simulate(FLOW, MODEL, weight_decay=0.1, t1=1.0, metrics={"a": wrong})


def test_a_lane_of_another_shape_is_marked():
    """The others are as they were."""

    def make(size):
        loss = gf.SquaredError(jnp.ones((2, size)), jnp.ones(2))
        model = Linear(jnp.ones(size))
        return gf.GradientFlow(loss), model, {"w": lambda m: m.w}

    lanes = gf.sweep(
        make, axes={"size": [3, 4, 3]}, weight_decay=0.1, saves=3, progress=False,
        run=gf.Descent(0.1, steps=5),
    )  # fmt: skip
    assert lanes.causes == {
        1: "LaneDiffers: metrics['w']: in this lane it has the shape (4,), and in "
        "others (3,)."
    }
    assert lanes.metrics["w"].shape == (3, 3, 3)
    assert np.isnan(lanes.metrics["w"][1]).all()
    np.testing.assert_array_equal(lanes.metrics["w"][0], lanes.metrics["w"][2])
    assert np.isfinite(np.asarray(lanes.metrics["w"][0])).all()
