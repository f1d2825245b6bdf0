"""experiments/theory_limits, on a small setting and in this process."""

import json

import equinox as eqx
import numpy as np
import pytest

pytest.importorskip("tyro")
pytest.importorskip("xarray")
import gradflow as gf  # noqa: E402
from experiments.shared.record import kept  # noqa: E402
from experiments.theory_limits import STUDY, study  # noqa: E402


def small(key, init_scale=1.0):
    options = dict(samples=4, dim=8, init_scale=init_scale)
    return gf.tasks.linear_regression(key, **options)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("theory_limits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "CASES", {"linear": study.Case(small, 3.0, (1.0,))})
        config = study.TheoryLimits(weight_decay=("1e-2:1e-4:3",), out=out)
        return out, STUDY.main(config)


@pytest.mark.slow
def test_order_two_and_grokking_times_are_checked(results):
    out, summary = results
    assert json.loads((out / "summary.json").read_text()) == summary
    checks = {c["name"]: c for c in summary["checks"]}
    assert checks.keys() == {
        "linear: rate",
        "linear: span",
        "linear: gain",
        "linear: grokking, scale 1",
    }
    assert checks["linear: rate"]["value"] == pytest.approx(2, abs=0.1)
    assert all(c["ok"] for c in checks.values())


@pytest.mark.slow
def test_everything_is_written(results):
    out, _ = results
    for name in ("errors", "horizons", "grokking_times"):
        assert (out / f"{name}.png").stat().st_size > 10_000
    data = kept(out / "arrays.nc")
    assert data.grokking_time.shape == (2, 3) and set(data.task.values) == {"linear"}
    off = data.predicted_grokking_time / data.grokking_time - 1
    assert np.isfinite(off).all() and np.abs(off).max() < 0.02


@pytest.mark.slow
def test_a_rate_of_two_points_is_not_passed(results):
    report = study.unpack(kept(results[0] / "arrays.nc"), "reports")["linear", 0.0]
    of = lambda used: [r.ok for r in study.accuracy("tanh", report, used)]
    assert of(True) == of(False) == [True, True, True]
    rate = report.orders[2].rate
    few = eqx.tree_at(lambda rate: rate.used, rate, np.arange(rate.used.size) < 2)
    report = eqx.tree_at(lambda r: r.orders[2].rate, report, few)
    assert of(True) == [None, None, True] and of(False) == [False, False, True]
    assert "2 of 3 λ" in study.accuracy("tanh", report, True)[0].sentence


def test_unknown_task_is_named():
    with pytest.raises(SystemExit, match="tasks: no 'conv' here"):
        study.TheoryLimits(tasks=("conv",)).names()
