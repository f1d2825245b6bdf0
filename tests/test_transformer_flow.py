"""The flow of networks that learn addition: what is judged, and a small one whole."""

import json

import numpy as np
import pytest

pytest.importorskip("tyro")
pytest.importorskip("zarr")
xr = pytest.importorskip("xarray")
from experiments.shared.record import kept  # noqa: E402
from experiments.transformer_flow import Addition, Embedding, STUDY  # noqa: E402
from experiments.transformer_flow.addition import times  # noqa: E402
from experiments.transformer_flow.embedding import explicit_cost  # noqa: E402


def test_cost_between_stretches():
    """Steps of length 2 + t/2 up to t = 1000 are 2 ln(1 + 250)."""
    place = np.geomspace(1e-3, 1e3, 400)
    data = xr.Dataset(
        {
            "place": ("k", place),
            "density": ("k", 1 / (2 + place / 2)),
            "price": ("k", np.full(400, 0.01)),
        }
    )
    steps, seconds = explicit_cost(data)
    np.testing.assert_allclose(steps, 2 * np.log(251), rtol=1e-3)
    np.testing.assert_allclose(seconds, 0.01 * steps)


def test_when_the_accuracy_stays_high():
    t = np.linspace(0, 10, 11)
    late = np.where(t > 6, 1.0, 0.5)
    late[3] = 1.0  # for a moment only
    data = xr.Dataset(
        {"metric_test": (("w", "time"), np.stack([late, 0 * t]))},
        coords={"t": (("w", "time"), np.stack([t, t]))},
    )
    first, never = times(data, "test")
    assert 6 < first < 7 and not np.isfinite(never)


@pytest.mark.slow
def test_a_small_transformer(tmp_path):
    config = Addition(
        modulus=5,
        width=8,
        weight_decay=("1e-2:1e-3:2",),
        slow_time=1.0,
        descent_steps=2000,
        out=tmp_path,
    )
    summary = STUDY.main(config)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    rows = {row["name"]: row for row in summary["checks"]}
    assert rows["start: off"]["ok"] and rows["drift: off"]["ok"]
    data = kept(tmp_path / "arrays.nc")
    start, end = data.descent_start_flow.values
    # It is gradient descent of first order that is compared, over a way.
    full, half = data.descent_start_1.values, data.descent_start_2.values
    assert np.linalg.norm(end - start) > 0.1 * np.linalg.norm(start)
    ratio = np.linalg.norm(full - end) / np.linalg.norm(half - end)
    assert 1.5 < ratio < 2.5
    assert (tmp_path / "transformer_flow.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_small_embedding(tmp_path):
    config = Embedding(
        modulus=5, width=4, weight_decay=1e-2, t1=500.0, least_steps=20, out=tmp_path
    )
    summary = STUDY.main(config)
    rows = {row["name"]: row for row in summary["checks"]}
    assert rows["Tsit5"]["value"] > 0 and "extrapolated" in rows["Tsit5"]["sentence"]
    assert (tmp_path / "embedding_flow.png").stat().st_size > 10_000
