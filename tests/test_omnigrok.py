"""Omnigrok's experiments on networks: on tiny settings, in this process."""

import dataclasses
import json
import math
import pathlib
import sys

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

FOLDER = pathlib.Path(__file__).parents[1] / "experiments"
sys.path.insert(0, str(FOLDER))

pytest.importorskip("tyro")
xr = pytest.importorskip("xarray")
import common  # noqa: E402
import omnigrok as script  # noqa: E402
import omnigrok_teacher as teacher  # noqa: E402
import omnigrok_theory as theory  # noqa: E402
import omnigrok_transformer as transformer  # noqa: E402

import gradflow as gf  # noqa: E402

TINY = dict(modulus=5, fraction=0.6, width=8, hidden=8)


@pytest.fixture(autouse=True)
def relaxed():
    """Scripts run under JAX's own rules of promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_every_row_has_a_command():
    names = "ts-l ts-t ts-theory ma-n ma-c ma-w ma-r".split()
    assert set(names) <= script.EXPERIMENTS.keys()
    # The defaults are the paper's.
    config = script.parse(["ts-t", "--seed", "3"])
    assert isinstance(config, teacher.TST) and config.seed == 3
    assert (config.width, config.samples, config.steps) == (100, 100, 100_000)
    assert config.learning_rate == 3e-4 and config.gammas[0] == 0.03
    config = script.parse(["ma-n"])
    assert isinstance(config, transformer.MAN)
    assert (config.modulus, config.fraction, config.weight_decay) == (113, 0.3, 1.0)
    assert config.learning_rate == 1e-3 and config.effective() == config
    # A smaller one says so.
    config = script.parse(["ma-n", "--quick"]).effective()
    assert config.modulus < 113 and "small" in config.title


def test_a_run_is_stored_and_read_again(tmp_path):
    config = transformer.Addition(**TINY)
    options = dict(steps=60, every=20, weight_decay=1.0)
    one = transformer.train(config, tmp_path, **options)
    (file,) = tmp_path.iterdir()
    when = file.stat().st_mtime_ns
    again = transformer.train(config, tmp_path, **options)
    assert file.stat().st_mtime_ns == when
    for name, values in one.arrays.items():
        assert_array_equal(values, again.arrays[name])
    # One of other settings is not taken for it.
    transformer.train(config, tmp_path, **{**options, "steps": 61})
    assert file.stat().st_mtime_ns > when
    # It is the loss in double precision of a network in single.
    assert one.arrays["train_loss"].dtype == np.float64
    assert one.arrays["norm"].dtype == np.float32
    task = gf.tasks.modular_transformer(jr.key(0), **TINY)
    leaves = jax.tree.leaves(eqx.filter(task.model, eqx.is_array))
    norm = math.sqrt(sum(float(np.sum(np.square(leaf))) for leaf in leaves))
    assert_allclose(one.arrays["norm"][0], norm, rtol=1e-6)
    loss = eqx.filter_jit(lambda model: task.loss(model))(task.model)
    assert_allclose(one.arrays["train_loss"][0], loss, rtol=1e-5)
    assert one.arrays["train_loss"][-1] < 0.9 * loss


def test_addition_is_judged(tmp_path):
    """A network that only memorises fails, and its files are there."""
    config = transformer.MAN(**TINY, steps=60, out=tmp_path)
    summary = script.main(config)
    assert [row["name"] for row in summary["checks"]] == ["P3-MA-N"] * 4
    data = xr.open_dataset(tmp_path / "arrays.nc", engine="scipy")
    step = summary["test"] or math.inf
    assert summary["checks"][3]["ok"] == (step <= 1e4)
    norm = data.norm.values[0]
    assert_allclose(summary["checks"][1]["value"], norm.max() / norm[0])
    data.close()
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_held_norms_and_scans(tmp_path):
    held = transformer.MAC(**TINY, steps=60, out=tmp_path / "c").run()
    norm = held.data.norm.values[0]
    assert_allclose(norm, norm[0], rtol=1e-5)
    free = transformer.Addition(**TINY)
    other = transformer.train(
        free, tmp_path, steps=60, every=10, weight_decay=0.0, init_scale=1.0
    )
    assert_allclose(norm[0], 0.8 * other.arrays["norm"][0], rtol=1e-6)
    config = transformer.MAW(
        **TINY, gammas=(1.0, 2.0), seeds=2, slow_time=0.06, out=tmp_path / "w"
    )
    scan = config.run()
    assert scan.data.steps.shape == (2, 2, 2) and scan.numbers["steps"] == 180
    assert len(list((tmp_path / "w" / "runs").iterdir())) == 4
    # Nobody generalises in so few steps: no slope, and that is no success.
    assert [row.ok for row in scan.checks[1::2]] == [False, False]
    config = transformer.MAR(
        **TINY, fractions=(0.4, 0.6), alphas=(0.5, 1.0, 2.0), steps=60, out=tmp_path
    )
    found = config.run()
    assert found.data.test.shape == (2, 3) and found.checks[0].ok is False


def test_where_increasing_values_cross():
    x = np.array([0.1, 0.2, 0.4])
    assert transformer.crossing(x, np.array([0.0, 0.8, 1.0])) == pytest.approx(0.3)
    assert np.isnan(transformer.crossing(x, np.array([0.0, 0.1, 0.2])))
    assert np.isnan(transformer.crossing(x, np.array([0.9, 1.0, 1.0])))


def landscape(train, test):
    """One with the paper's norms, and with given losses in its units."""
    scale = 10 ** np.linspace(-1, 1, 11)
    train, test = 2.5 * np.asarray(train)[None], 2.5 * np.asarray(test)[None]
    return gf.Landscape(
        scale=scale,
        norm=9 * scale[None],
        train_loss=train,
        metrics={"test_loss": test},
        slope=np.zeros_like(train),
        succeeded=np.ones_like(train, bool),
        watched={"test_loss": gf.Metric(lambda model: 0.0, threshold=2.5e-3)},
    )


def test_shapes_are_judged():
    scale = 10 ** np.linspace(-1, 1, 11)
    low = np.where(scale > 0.5, 9e-6, 1.0)
    u = 1e-4 * np.exp(8 * np.log(scale) ** 2)
    judged = lambda *args: [row.ok for row in teacher.shape_rows("", "", *args)]
    assert judged(landscape(low, u)) == [True, True, True]
    high = np.where(scale > 0.5, 1.1e-5, 1.0)
    assert judged(landscape(high, u)) == [False, True, True]
    away = 1e-4 * np.exp(8 * np.log(scale / 1.8) ** 2)
    assert judged(landscape(low, away))[1] is False
    flat = 1e-4 * np.exp(np.log(scale) ** 2)
    assert judged(landscape(low, flat))[2] is False


def test_scans_are_judged():
    gamma = np.array([0.03, 0.1, 0.3, 1.0])
    times = np.stack([np.full(4, 100.0), 2000 / gamma], axis=1)
    judged = lambda t: [r.ok for r in teacher.scan_rows("", "", gamma, t, "γ")]
    assert judged(times) == [True, True]
    assert judged(times * [[1, 1], [1, 1], [1, 1], [1.3, 1]]) == [False, True]
    assert judged(times * np.stack([np.ones(4), gamma**0.5], axis=1)) == [True, False]
    times[0, 1] = np.inf
    assert judged(times) == [True, False]


def test_step_then_rescale_goes_over_into_the_flow():
    task = gf.tasks.teacher_mlp(jr.key(1), width=5, samples=6, init_scale=1.0)
    rates, apart = teacher.agreement(task, t1=2.0)
    assert abs(common.law(rates, apart) - 1) < 0.1 and apart[-1] < 1e-2


def test_the_error_of_most():
    task = gf.tasks.teacher_mlp(jr.key(1), width=5, samples=20, init_scale=1.0)
    z = np.asarray(jax.vmap(task.model)(task.loss.x))
    errors = np.sort(np.mean((z - task.loss.y) ** 2, axis=1))
    level = float(theory.ErrorOf(task.loss, 0.95)(task.model))
    assert_allclose(level, errors[18])
    # It is below a tolerance where 95 % are right, and not where fewer are.
    share = lambda tolerance: float(
        gf.tasks.ShareWithin(task.loss, tolerance)(task.model)
    )
    assert share(level * (1 + 1e-9)) == pytest.approx(0.95)
    assert share(level * (1 - 1e-9)) == pytest.approx(0.9)


def test_predictions_are_judged():
    lams = np.array([1e-4, 1e-5, 1e-6])
    measured = 0.5 / lams
    good = theory.Predicted(
        measured=measured,
        predicted=np.stack([1.01 * measured, 1.001 * measured]) * [[np.nan, 1.0, 1.0]],
        errors=np.zeros(3),
        valid=np.array([0.1, 0.6, 0.7]),
        lams=lams,
        drift=(lams, lams),
        paths=[],
        text="",
        seconds={},
    )
    assert [row.ok for row in good.rows(2.0)] == [True, None, True]
    assert good.rows(2.0)[1].value == pytest.approx(0.01)
    off = dataclasses.replace(good, predicted=good.predicted * 1.05)
    assert [row.ok for row in off.rows(2.0)] == [True, None, False]
    first = dataclasses.replace(good, predicted=good.predicted[[0, 0]])
    assert [row.ok for row in first.rows(2.0)] == [True, True]
    silent = dataclasses.replace(good, predicted=good.predicted * np.nan)
    assert [row.ok for row in silent.rows(2.0)] == [False, False]
    never = dataclasses.replace(silent, measured=np.nan * measured)
    assert [row.ok for row in never.rows(2.0)] == [None, None]


def test_landscapes_are_drawn():
    scale = 10 ** np.linspace(-1, 1, 11)
    land = landscape(np.where(scale > 0.5, 9e-6, 1.0), 1e-4 * (1 + np.log(scale) ** 2))
    rates = 0.08 / 2.0 ** np.arange(4)
    fig = teacher.landscape_figure(
        "title", {"flow": land, "Adam": land}, {}, rates, 0.02 * rates
    )
    *_, last = fig.axes
    assert (
        len(fig.axes) == 3
        and "slope 1.00" in last.get_legend().get_texts()[0].get_text()
    )
    common.plt.close(fig)
