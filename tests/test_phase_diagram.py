"""The phase diagram: what it says of a run, and the whole of it on a small task."""

import functools
import json

import numpy as np
import pytest

pytest.importorskip("tyro")
pytest.importorskip("zarr")
xr = pytest.importorskip("xarray")
import gradflow as gf  # noqa: E402
from experiments.phase_diagram import STUDY, study  # noqa: E402
from experiments.shared.record import kept  # noqa: E402


def curve(t, drop):
    """From 100 to 1e-2 around time `drop`; above 1 until then."""
    return np.where(t < drop, 100.0, 1e-2)


def test_what_is_said_of_a_run():
    t = np.concatenate([[0.0], np.geomspace(0.1, 1e4, 600)])
    #        measured memorised, grokked; predicted memorised, grokked; what it is
    cases = [
        (np.inf, np.inf, np.nan, np.nan, "failed"),
        (1.0, np.inf, 1.0, np.nan, "never"),
        (1.0, 1.5, 1.0, 1.5, "at_once"),
        (1.0, 0.5, 1.0, 0.5, "at_once"),
        (1.0, 1000.0, 1.0, np.nan, "untold"),
        (1.0, 1000.0, 1.0, 1200.0, "otherwise"),
        (1.0, 1000.0, 1.0, 1010.0, "agree"),
    ]
    dims = ("seed", "init_scale", "weight_decay")
    lams = np.geomspace(1e-2, 1e-4, len(cases))
    shape = (1, 1, len(cases))
    column = lambda k: np.array([c[k] for c in cases]).reshape(shape)
    curves = lambda k: np.stack([curve(t, c[k]) for c in cases]).reshape(*shape, -1)
    runs = xr.Dataset(
        {
            "metric_train": ((*dims, "time"), curves(0)),
            "metric_test": ((*dims, "time"), curves(1)),
            "result": (dims, np.zeros(shape, int)),
        },
        coords={
            "seed": [0],
            "init_scale": [1.0],
            "weight_decay": lams,
            "t": ((*dims, "time"), np.broadcast_to(t, (*shape, t.size))),
        },
    )
    theory = xr.Dataset({"train": (dims, column(2)), "test": (dims, column(3))})
    data = study.with_phase(study.times(runs, theory), 0.05)
    said = [list(study.PHASES)[k] for k in data.phase.values.ravel()]
    assert said == [c[4] for c in cases]
    np.testing.assert_allclose(data.delay.values[0, 0, -1], 999.0, rtol=0.03)
    runs["result"] += 1
    assert (study.with_phase(study.times(runs, theory), 0.05).phase == 0).all()


@pytest.mark.slow
def test_a_small_diagram(tmp_path, monkeypatch):
    tiny = functools.partial(gf.tasks.linear_regression, samples=3, dim=6)
    case = study.Case(tiny, (2.0, 6.0), 3.0, "a line")
    monkeypatch.setitem(study.CASES, "diagonal", case)
    config = study.PhaseDiagram(
        tasks=("diagonal",),
        weight_decay=("1e-2:1e-4:3",),
        scales=2,
        seeds=1,
        order=1,
        out=tmp_path,
    )
    summary = STUDY.main(config)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    data = kept(tmp_path / "arrays.nc")
    ((_, case),) = config.cases(data)
    counts = np.bincount(case.phase.values.ravel(), minlength=6)
    assert counts.sum() == 6
    # Of this task everything is known: where it groks theory says when.
    assert counts[5] >= 3 and counts[4] == 0
    assert "0 grokked; theory differs" in summary["checks"][1]["sentence"]
    assert summary["failed"] == 0
    assert (tmp_path / "phase_diagram.png").stat().st_size > 10_000
    assert data.delay.dims == ("task", "seed", "scale", "weight_decay")
    np.testing.assert_allclose(data.init_scale, [[2.0, 6.0]])
