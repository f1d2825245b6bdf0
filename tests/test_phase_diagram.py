"""The phase diagram: what it says of a run, and the whole of it on a small task."""

import functools
import json

import numpy as np
import pytest

pytest.importorskip("tyro")
pytest.importorskip("zarr")
xr = pytest.importorskip("xarray")
from experiments.phase_diagram import study as script  # noqa: E402


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
    data = script.times(runs, theory, script.Config())
    said = [script.PHASES[k] for k in data.phase.values.ravel()]
    assert said == [c[4] for c in cases]
    np.testing.assert_allclose(data.delay.values[0, 0, -1], 999.0, rtol=0.03)
    runs["result"] += 1
    assert (script.times(runs, theory, script.Config()).phase == 0).all()


def test_a_small_diagram(tmp_path, monkeypatch):
    tiny = functools.partial(script.gf.tasks.linear_regression, samples=3, dim=6)
    study = script.Study(tiny, (2.0, 6.0), 3.0, "a line")
    monkeypatch.setitem(script.STUDIES, "diagonal", study)
    config = script.Config(
        tasks=("diagonal",),
        weight_decay=("1e-2:1e-4:3",),
        scales=2,
        seeds=1,
        order=1,
        out=tmp_path,
    )
    summary = script.main(config)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert sum(summary["cells"]["diagonal"].values()) == 6
    # Of this task everything is known: where it groks theory says when.
    assert summary["cells"]["diagonal"]["agree"] >= 3
    assert summary["cells"]["diagonal"]["otherwise"] == 0
    assert summary["failed"] == 0
    assert (tmp_path / "phase_diagram.png").stat().st_size > 10_000
    data = xr.open_dataset(tmp_path / "arrays.nc", engine="scipy")
    assert data.delay.dims == ("task", "seed", "init_scale", "weight_decay")
    data.close()
