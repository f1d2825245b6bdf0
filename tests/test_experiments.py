"""The scripts in experiments/, on small settings and in this process."""

import importlib.util
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
import gradflow as gf  # noqa: E402
from experiments import report  # noqa: E402
from experiments.shared import command, figures, record, rows  # noqa: E402
from experiments.two_phase import measure, STUDY, study  # noqa: E402


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("two_phase")
    with pytest.MonkeyPatch.context() as patch:
        tiny = lambda key: gf.tasks.linear_regression(key, samples=4, dim=8)
        patch.setitem(study.TASKS, "linear_regression", tiny)
        config = study.TwoPhase(
            task="linear_regression",
            weight_decay=("1e-2:1e-4:3",),
            quick=True,
            out=out,
            store=out / "runs.zarr",
        )
        return out, STUDY.main(config)


@pytest.mark.slow
def test_summary_has_every_number(results):
    out, summary = results
    written = json.loads((out / "summary.json").read_text())
    assert written == summary
    keys = "task text numbers checks settings versions command seconds".split()
    assert written.keys() >= set(keys)
    assert written["numbers"]["weight_decay"] == pytest.approx([1e-2, 1e-3, 1e-4])
    assert len(written["numbers"]["grokking_time"]) == 3
    assert written["numbers"]["rate"] == pytest.approx(1, abs=0.05)
    assert written["versions"]["jax"] == jax.__version__


@pytest.mark.slow
def test_every_check_has_a_value_a_bound_and_a_verdict(results):
    checks = results[1]["checks"]
    assert all({"name", "value", "bound", "ok", "sentence"} == c.keys() for c in checks)
    names = {c["name"] for c in checks}
    expected = "fast phase, drift, composite, DΦ = P, rank, matching, limits, rest"
    expected += ", widths, plateau, onset, closed form, kernel, end point"
    assert names == set(expected.split(", "))
    assert [c for c in checks if c["ok"] is False] == []
    assert results[1]["passed"] == sum(c["ok"] is True for c in checks)


@pytest.mark.slow
def test_arrays_are_labelled(results):
    data = record.kept(results[0] / "arrays.nc")
    assert data.sizes["drift_time"] > 20
    assert (data.sizes["weight_decay"], data.sizes["time"]) == (3, 65)
    assert {"train_loss", "penalty", "error", "metric_test"} <= set(data.data_vars)
    lane = data.sel(weight_decay=1e-3, method="nearest")
    np.testing.assert_allclose(lane.slow_time, 1e-3 * lane.t)
    assert float(lane.metric_test[-1]) < float(lane.metric_test[0])


@pytest.mark.slow
def test_arrays_are_judged_and_drawn_again(results, monkeypatch):
    """Nothing is computed, under the settings that they were computed with."""
    out, summary = results
    monkeypatch.setattr(study.TwoPhase, "compute", lambda config: 1 / 0)
    written, drawn = ((out / f).read_bytes() for f in ("summary.json", "linear.png"))
    for name in ("summary.json", "linear.png", "report.png"):
        (out / name).unlink()
    again = study.TwoPhase(out=out, rejudge=True)
    assert STUDY.main(again) == summary
    assert (out / "summary.json").read_bytes() == written
    assert not (out / "linear.png").exists()
    assert STUDY.main(study.TwoPhase(out=out, redraw=True)) == summary
    assert (out / "linear.png").read_bytes() == drawn and (out / "report.png").exists()
    with pytest.raises(SystemExit, match="no arrays are stored there"):
        STUDY.main(study.TwoPhase(out=out / "elsewhere", redraw=True))


@pytest.mark.slow
def test_figures_are_written(results):
    names = {p.name for p in results[0].glob("*.png")}
    assert names == {"report.png", "collapse.png", "linear.png"}
    assert all((results[0] / n).stat().st_size > 10_000 for n in names)
    page = (results[0] / "report.html").exists()
    assert page == bool(importlib.util.find_spec("plotly"))


@pytest.mark.slow
def test_runs_are_kept(results):
    out, summary = results
    data = gf.open_results(out / "runs.zarr")
    assert data.attrs["finished"] == 3 and (data.result == 0).all()
    steps = summary["numbers"]["steps"]
    np.testing.assert_array_equal(data.steps, steps)


def test_processes_need_a_store():
    many = command.Distributed(distributed=True)
    with pytest.raises(ValueError, match="store"):
        study.TwoPhase(processes=many).compute()


def test_tables_are_those_of_the_recorded_runs():
    text = (report.HERE / "README.md").read_text()
    assert report.filled(text) == text
    # Not a column is empty, and no row is without a criterion.
    for name in report.TABLES:
        table = report.table(name).split("\n")
        _, _, *lines = [line.split(" | ") for line in table]
        assert len({line.replace(r"\|", "").count("|") for line in table}) == 1
        assert all(
            any(cell.strip(" |") for cell in column)
            for column in zip(*lines, strict=True)
        )
    numbers = [3.7e-6, 1e-5, 58_500, 9000, -0.95, "-1.10"]
    told = ["3.7·10⁻⁶", "10⁻⁵", "58 500", "9000", "−0.95", "−1.10"]
    assert list(map(report.number, numbers)) == told


@pytest.mark.slow
def test_a_run_is_recorded(results, tmp_path, monkeypatch):
    (tmp_path / "records").mkdir()
    monkeypatch.setattr(report, "HERE", tmp_path)
    summary = json.loads((results[0] / "summary.json").read_text())
    summary["command"] = "python -m experiments.beyond_l2 cs1 --quick"
    run = tmp_path / "run"
    run.mkdir()
    (run / "summary.json").write_text(json.dumps(summary))
    report.record(run)
    assert [r["command"] for r in report.records()] == ["cs1 --quick"]
    table = report.table("beyond_l2")
    assert table.count("\n") == 1 + len(summary["checks"]) and "pass" in table


@pytest.mark.slow
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
        "rejudge",
        "redraw",
    ):
        assert f"--{name}" in out


def test_weight_decays_are_numbers_and_ranges():
    lams = command.parse_weight_decay(("1e-2:1e-4:3", "0.1", "1e-3"))
    np.testing.assert_allclose(lams, [1e-1, 1e-2, 1e-3, 1e-4])


@pytest.mark.parametrize("word", ["small", "1:2", "1e-2:1e-4:x", "-1e-3"])
def test_bad_weight_decays_are_refused(word):
    with pytest.raises(ValueError, match="weight_decay: expected"):
        command.parse_weight_decay((word,))


def test_a_check_that_breaks_is_reported_as_failed(capsys):
    def broken():
        raise RuntimeError("no such luck\nmore")

    (row,) = rows.attempt(broken)
    assert row.ok is False and row.sentence == "RuntimeError: no such luck"
    assert "FAIL" in str(row) and "no such luck" in capsys.readouterr().out


@pytest.mark.parametrize(
    "bound, good, bad",
    [
        ("≤ 1e-2", 0.01, 0.011),
        ("≥ 5 decades", 5, 4.9),
        ("< 3000, all", 2999, 3000),
        ("> 1/3", 0.34, 1 / 3),
        ("= 12", 12, 11),
        ("−1 ± 0.05", -1.04, -1.06),
        ("1/3 … 3", 1 / 3, 3.01),
    ],
)
def test_bounds_are_read(bound, good, bad):
    assert rows.holds(good, bound) and not rows.holds(bad, bound)
    assert not rows.holds(np.nan, bound)
    row = rows.check("name", good, bound, "words", also=False)
    assert row.ok is False and rows.check("name", bad, bound, "", given=0).ok is None


def test_no_slope_is_judged_by_two_points():
    x, y = np.array([1.0, 2.0, 4.0]), np.array([1.0, 0.5, 0.25])
    row = rows.law_check("law", x, y, "-1 ± 0.1", "words")
    assert row.ok and row.value == pytest.approx(-1) and row.sentence == "words"
    row = rows.law_check("law", x[:2], y[:2], "-1 ± 0.1", "words")
    assert row.ok is None and np.isnan(row.value) and "three points" in row.sentence
    # Of three, of which one never came, two are left: it fails.
    y[2] = np.inf
    assert rows.law_check("law", x, y, "-1 ± 0.1", "words").ok is False


def test_what_the_command_line_names_counts_beside_quick():
    """Also where it is as by default."""
    config = STUDY.parse(["--quick", "--saves", "129", "--no-cache"])
    assert config.given == ("quick", "cache", "saves")
    assert config.effective().saves == 129
    assert STUDY.parse(["--quick", "--saves=129"]).effective().saves == 129
    assert STUDY.parse(["--quick"]).effective().saves == 65
    assert study.TwoPhase(quick=True, saves=33).effective().saves == 33
    assert "given" not in config.told()


def test_bounds_that_are_none_are_refused():
    assert rows.check("name", 1.0, "", "for information").ok is None
    with pytest.raises(ValueError, match="bound: expected"):
        rows.holds(1.0, "small")


def test_json_has_no_nan():
    out = record.plain({"a": np.array([1.0, np.nan]), "b": (np.inf, np.bool_(True))})
    assert out == {"a": [1.0, None], "b": [None, True]}


def test_first_below_finds_the_crossing():
    t = np.concatenate([[0.0], np.geomspace(1e-3, 1e3, 40)])
    found = measure.first_below(t, 1 / (1 + t), 0.01)
    assert found == pytest.approx(99.0, rel=1e-3)
    assert np.isnan(measure.first_below(t, 1 + t, 0.5))


def test_kinks_closer_than_the_eye_are_one():
    task = gf.tasks.relu_1d(jax.random.key(0))
    teacher = task.truth.teacher
    assert measure.count_kinks(task, teacher) == 3
    assert measure.count_kinks(task, task.model) > 10


def test_labels_of_a_logarithmic_axis():
    figure = Figure()
    ax = figure.add_subplot()
    ax.set(xscale="log", yscale="log", xlim=(0.3, 3), ylim=(1e-6, 1))
    figures.label_few(figure)
    figure.draw_without_rendering()
    shown = lambda axis: {t.get_text() for t in axis.get_ticklabels(which="both")}
    assert shown(ax.xaxis) >= {"0.5", "1", "2"}
    assert "0.4" not in shown(ax.xaxis) and not any("10" in t for t in shown(ax.xaxis))
    assert any("10^" in t for t in shown(ax.yaxis))
