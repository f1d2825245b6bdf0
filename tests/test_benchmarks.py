"""The scripts in benchmarks/: one short run, and how its rows are read."""

import csv
import dataclasses
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))

pytest.importorskip("tyro")
import report  # noqa: E402


def test_quick_run_writes_everything(tmp_path):
    script = [sys.executable, str(FOLDER / "work_precision.py"), "--quick"]
    options = ["--methods", "gradflow", "descent", "--budget", "0.5"]
    options += ["--out", str(tmp_path)]
    out = subprocess.run(script + options, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
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


@pytest.mark.parametrize("seconds, passed", [(2.0, True), (0.5, None)])
def test_a_lower_bound_passes_or_decides_nothing(seconds, passed):
    rows = [OURS, row(status=report.OVER, seconds=seconds, repeats=1)]
    assert report.ratio_check(rows, "P1", "Diffrax", 100).passed is passed


@pytest.mark.parametrize("seconds, passed", [(2.0, True), (0.5, False)])
def test_a_time_passes_or_fails(seconds, passed):
    rows = [OURS, row(error=1e-5, seconds=seconds)]
    assert report.ratio_check(rows, "P1", "Diffrax", 100).passed is passed
