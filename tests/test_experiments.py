"""The scripts in experiments/, on small settings and in this process."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

ROOT = pathlib.Path(__file__).parents[1]

pytest.importorskip("tyro")
xr = pytest.importorskip("xarray")
from experiments.shared import common  # noqa: E402
from experiments.two_phase import (  # noqa: E402
    rows,
    study as script,
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("two_phase")
    with pytest.MonkeyPatch.context() as patch:
        tiny = lambda key: script.gf.tasks.linear_regression(key, samples=4, dim=8)
        patch.setitem(script.TASKS, "linear_regression", tiny)
        config = script.Config(
            task="linear_regression",
            weight_decay=("1e-2:1e-4:3",),
            quick=True,
            out=out,
            store=out / "runs.zarr",
        )
        return out, script.main(config)


def test_summary_has_every_number(results):
    out, summary = results
    written = json.loads((out / "summary.json").read_text())
    assert written == summary
    keys = "task report checks settings versions command seconds".split()
    assert written.keys() >= set(keys)
    assert written["settings"]["weight_decay"] == pytest.approx([1e-2, 1e-3, 1e-4])
    assert len(written["report"]["grokking_time"]) == 3
    assert written["report"]["rate"]["exponent"] == pytest.approx(1, abs=0.05)
    assert written["versions"]["jax"] == jax.__version__


def test_every_check_has_a_value_a_bound_and_a_verdict(results):
    checks = results[1]["checks"]
    assert all({"name", "value", "bound", "ok", "sentence"} == c.keys() for c in checks)
    names = {c["name"] for c in checks}
    assert names >= {"P1-P1", "P1-P2", "P1-DΦ", "P1-M", "P1-L", "P1-T", "P1-E1"}
    assert [c for c in checks if c["ok"] is False] == []
    assert results[1]["passed"] == sum(c["ok"] is True for c in checks)


def test_arrays_are_labelled(results):
    data = xr.open_dataset(results[0] / "paths.nc", engine="scipy")
    sizes = dict(data.sizes)
    assert sizes.pop("drift_time") > 20 and sizes == {"weight_decay": 3, "time": 65}
    assert {"train_loss", "penalty", "error", "metric_test"} <= set(data.data_vars)
    lane = data.sel(weight_decay=1e-3, method="nearest")
    np.testing.assert_allclose(lane.slow_time, 1e-3 * lane.t)
    assert float(lane.metric_test[-1]) < float(lane.metric_test[0])
    data.close()


def test_figures_are_written(results):
    names = {p.name for p in results[0].glob("*.png")}
    assert names == {"report.png", "collapse.png", "linear.png"}
    assert all((results[0] / n).stat().st_size > 10_000 for n in names)


def test_runs_are_kept(results):
    out, summary = results
    data = script.gf.open_results(out / "runs.zarr")
    assert data.attrs["finished"] == 3 and (data.result == 0).all()
    steps = summary["report"]["steps"]
    np.testing.assert_array_equal(data.steps, steps)


def test_processes_need_a_store():
    many = common.Distributed(distributed=True)
    with pytest.raises(ValueError, match="store"):
        script.main(script.Config(processes=many))


def test_help_names_every_option():
    command = [sys.executable, "-m", "experiments.two_phase", "--help"]
    run = dict(capture_output=True, text=True, check=True, cwd=ROOT)
    out = subprocess.run(command, **run).stdout
    for name in (
        "task",
        "weight-decay",
        "slow-time",
        "seed",
        "out",
        "quick",
        "rtol",
        "store",
        "distributed",
        "coordinator",
    ):
        assert f"--{name}" in out


def test_weight_decays_are_numbers_and_ranges():
    lams = common.parse_weight_decay(("1e-2:1e-4:3", "0.1", "1e-3"))
    np.testing.assert_allclose(lams, [1e-1, 1e-2, 1e-3, 1e-4])


@pytest.mark.parametrize("word", ["small", "1:2", "1e-2:1e-4:x", "-1e-3"])
def test_bad_weight_decays_are_refused(word):
    with pytest.raises(ValueError, match="weight_decay: expected"):
        common.parse_weight_decay((word,))


def test_a_check_that_breaks_is_reported_as_failed(capsys):
    def broken():
        raise RuntimeError("no such luck\nmore")

    (row,) = common.attempt(broken)
    assert row.ok is False and row.sentence == "RuntimeError: no such luck"
    assert "FAIL" in capsys.readouterr().out


def test_json_has_no_nan():
    out = common.plain({"a": np.array([1.0, np.nan]), "b": (np.inf, np.bool_(True))})
    assert out == {"a": [1.0, None], "b": [None, True]}


def test_first_below_finds_the_crossing():
    t = np.concatenate([[0.0], np.geomspace(1e-3, 1e3, 40)])
    found = rows.first_below(t, 1 / (1 + t), 0.01)
    assert found == pytest.approx(99.0, rel=1e-3)
    assert np.isnan(rows.first_below(t, 1 + t, 0.5))


def test_kinks_closer_than_the_eye_are_one():
    task = script.gf.tasks.relu_1d(jax.random.key(0))
    teacher = task.truth.teacher
    assert rows.count_kinks(task, teacher) == 3
    assert rows.count_kinks(task, task.model) > 10


def test_labels_of_a_logarithmic_axis():
    figure = Figure()
    ax = figure.add_subplot()
    ax.set(xscale="log", yscale="log", xlim=(0.3, 3), ylim=(1e-6, 1))
    common.label_few(figure)
    figure.draw_without_rendering()
    shown = lambda axis: {t.get_text() for t in axis.get_ticklabels(which="both")}
    assert shown(ax.xaxis) >= {"0.5", "1", "2"}
    assert "0.4" not in shown(ax.xaxis) and not any("10" in t for t in shown(ax.xaxis))
    assert any("10^" in t for t in shown(ax.yaxis))
