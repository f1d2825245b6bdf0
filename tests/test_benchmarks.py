"""The scripts in benchmarks/: one short run, and how its rows are read."""

import csv
import dataclasses
import json
import math
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))

pytest.importorskip("tyro")
import predict  # noqa: E402
import report  # noqa: E402


@pytest.mark.slow
def test_quick_run_writes_everything(tmp_path):
    options = ["--quick", "--out", str(tmp_path)]
    run_script(*options, "--methods", "gradflow", "descent", "--budget", "0.5")
    files = ("work_precision.csv", "work_precision.md", "work_precision.png")
    for name in (*files, "cost_against_lambda.png"):
        assert (tmp_path / name).stat().st_size > 500
    lines = (tmp_path / files[0]).read_text(encoding="utf-8").splitlines()
    rows = list(csv.DictReader(lines))
    ours = [r for r in rows if r["method"] == "gradflow" and r["study"] == "time"]
    for lam in (1e-2, 1e-5):
        errors = [float(r["error"]) for r in ours if float(r["weight_decay"]) == lam]
        assert min(errors) <= 1e-4
    assert all(float(r["reference_gap"] or 0) < 1e-5 for r in rows)
    descent = [r for r in rows if r["method"] == "descent"]
    assert {r["status"] for r in descent} >= {"ok"}
    assert descent[-1]["status"] in ("extrapolated", "over budget")
    told = (tmp_path / "work_precision.md").read_text(encoding="utf-8")
    command = "`python benchmarks/work_precision.py --quick --methods gradflow descent"
    assert f"{command} --budget 0.5`" in told and str(tmp_path) not in told

    for name in files[1:]:
        (tmp_path / name).unlink()
    run_script(*options, "--report-only")
    assert (tmp_path / "work_precision.md").read_text(encoding="utf-8") == told
    assert (tmp_path / "work_precision.png").stat().st_size > 500


def run_script(*options):
    script = [sys.executable, str(FOLDER / "work_precision.py"), *options]
    out = subprocess.run(script, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]


def row(method="tsit5", family="Diffrax", **values):
    start = report.Row("P1", method, family, family, report.KEY, 1e-4, "time", "ok")
    return dataclasses.replace(start, **values)


OURS = row("gradflow", "gradflow", error=1e-5, seconds=0.01)


def test_only_a_measured_error_counts():
    loose = row(error=1e-2, seconds=1.0)
    tight = row(error=1e-5, seconds=3.0)
    assert report.best([loose, tight], "P1", "tsit5", report.KEY) is tight
    assert report.best([loose], "P1", "tsit5", report.KEY) is loose
    assert "error 1e-02" in report.cell(loose, OURS)


def test_what_was_not_measured_is_marked():
    over = row(status=report.OVER, seconds=0.5, repeats=1)
    guess = row(status=report.EXTRAPOLATED, seconds=50.0)
    assert report.cell(over, OURS) == "≥ 500 ms (≥ 50 ×)"
    assert report.cell(guess, OURS) == "≈ 50 s (≈ 5e+03 ×)"
    assert report.best([over, guess], "P1", "tsit5", report.KEY) is guess


def test_what_was_assumed_is_marked():
    assumed = row(status=report.OVER, seconds=5.0)
    assert report.cell(assumed, OURS) == "≥ 5 s (≥ 500 ×) †"
    assert not assumed.measured


def test_rows_survive_their_file(tmp_path):
    rows = [OURS, row(status=report.OVER, seconds=5.0, steps=7, note="a, b")]
    report.write_csv(rows, tmp_path / "rows.csv")
    again = report.read_csv(tmp_path / "rows.csv")
    assert list(map(repr, again)) == list(map(repr, rows))  # nan is not nan


def test_a_prediction_is_no_measurement():
    first = row(weight_decay=1e-3, error=1e-5, seconds=2.0)
    last = row(weight_decay=1e-4, error=1e-5, seconds=6.0)
    for lam, seconds in ((1e-5, 18.0), (1e-6, 54.0)):
        grown = row(**predict.as_before(first, last, lam))
        assert math.isclose(grown.seconds, seconds)
        assert grown.status == report.EXTRAPOLATED and not grown.measured
        assert "not run" in grown.note
    quicker = dataclasses.replace(last, seconds=1.0)
    assert predict.as_before(first, quicker, 1e-5)["seconds"] == 1.0
    assert predict.in_proportion(last, 1e-6)["seconds"] == pytest.approx(600.0)


@pytest.mark.parametrize("seconds, passed", [(2.0, True), (0.5, None)])
def test_a_lower_bound_passes_or_decides_nothing(seconds, passed):
    rows = [OURS, row(status=report.OVER, seconds=seconds, repeats=1)]
    assert report.ratio_check(rows, "P1", "Diffrax", 100).passed is passed


@pytest.mark.parametrize("seconds, passed", [(2.0, True), (0.5, False)])
def test_a_time_passes_or_fails(seconds, passed):
    rows = [OURS, row(error=1e-5, seconds=seconds)]
    assert report.ratio_check(rows, "P1", "Diffrax", 100).passed is passed


@pytest.mark.parametrize("seconds", [0.5, 2.0])
@pytest.mark.parametrize("status", [report.OVER, report.EXTRAPOLATED])
def test_what_was_not_run_decides_nothing(status, seconds):
    unrun = row(status=status, seconds=seconds, repeats=0)
    check = report.ratio_check([OURS, unrun], "P1", "Diffrax", 100)
    assert check.passed is None
    word = "assumed" if status == report.OVER else "extrapolated"
    assert word in check.found and str(check).startswith("undecided")


def test_a_measurement_decides_beside_what_was_not_run():
    unrun = row("kvaerno5", status=report.OVER, seconds=1.5)
    check = lambda *rows: report.ratio_check([OURS, *rows], "P1", "Diffrax", 100)
    assert check(unrun, row(error=1e-5, seconds=1.2)).passed is True
    assert check(unrun, row(error=1e-5, seconds=0.5)).passed is False
    # The assumed one may be the fastest.
    assert check(unrun, row(error=1e-5, seconds=2.0)).passed is None
    # It was stopped after long enough: what it would have taken does not matter.
    stopped = row(status=report.OVER, seconds=1.1, repeats=1)
    guess = row(status=report.EXTRAPOLATED, seconds=50.0)
    assert check(stopped, guess).passed is True
    assert check(dataclasses.replace(stopped, seconds=0.5), guess).passed is None


@pytest.mark.slow
def test_first_result_is_told(tmp_path):
    out = tmp_path / "first.json"
    script = [sys.executable, str(FOLDER / "first_result.py")]
    options = ["--rows", "simulate", "--repeats", "1", "--out", str(out)]
    told = subprocess.run(
        [*script, *options], capture_output=True, text=True, timeout=300
    )
    assert not told.returncode, told.stderr
    found = json.loads(out.read_text(encoding="utf-8"))["simulate"]
    assert set(found) == {"bare", "simulate", "kvaerno", "lsoda"}
    assert all(value > 0 for value in found.values())
    for words in ("gradflow.simulate", "Kvaerno5", "LSODA"):
        assert words in told.stdout


@pytest.mark.slow
def test_children_of_first_result(tmp_path):
    """What needs no other process is a call away."""
    import first_result

    row = first_result.task("tasks.linear_regression(jr.key(0), samples=3, dim=6)")
    assert row["parameters"] == 6 and 0 < row["compiling"] <= row["seconds"]
    assert row["solver"] == "KKT4"
    with pytest.raises(RuntimeError, match="no_such"):
        first_result.child("f.no_such()")


@pytest.mark.slow
def test_gpu_without_one(tmp_path):
    """All parts but the README's block, which has a test of its own, and P4."""
    script = [sys.executable, str(FOLDER / "gpu.py"), "--device", "cpu"]
    script += ["--parts", "sweeps", "rank", "memory", "transformer"]
    script += ["--problems", "P1", "--lanes", "1", "3", "--most-on-cpu", "2"]
    script += ["--modulus", "5", "--max-steps", "50", "--out", str(tmp_path)]
    out = subprocess.run(script, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    (path,) = tmp_path.glob("gpu_*.json")
    parts = json.loads(path.read_text())["parts"]
    failed = [
        row["failed"] for rows in parts.values() for row in rows if "failed" in row
    ]
    assert not failed
    assert [row["lanes"] for row in parts["sweeps"]] == [1, 3, 2]
    assert all(row["succeeded"] == row["lanes"] for row in parts["sweeps"])
    (rank,) = parts["rank"]
    assert rank["rank"] == rank["samples"]
    assert parts["memory"][0]["ended"]
    assert 0 < parts["transformer"][0]["steps"] <= 50
    assert "## rank" in path.with_suffix(".md").read_text()


@pytest.mark.slow
def test_stiff_cases(tmp_path):
    """Attention, of which every fifth step was rejected before errors that grow were
    expected to grow on: 101 steps, 19 rejected."""
    out = tmp_path / "cases.json"
    script = [sys.executable, str(FOLDER / "stiff_cases.py")]
    options = ["--cases", "attention_12", "--weight-decay", "1e-2", "--out", str(out)]
    told = subprocess.run(
        [*script, *options], capture_output=True, text=True, timeout=300
    )
    assert not told.returncode, told.stderr
    (found,) = json.loads(out.read_text(encoding="utf-8"))
    assert "| attention_12 | 12 | 1e-02 |" in told.stdout and "**" not in told.stdout
    ours, radau = found["KKT4"], found["Radau"]
    assert ours["rejected"] <= 0.12 * ours["steps"] < 0.12 * 2 * (radau["steps"] + 17)
    assert max(ours["error"], found["KKT5"]["error"]) < found["moved"] < 50
    assert radau["error"] < 1
