"""Results written to files and read again, labelled, and shown."""

import io
import json
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import shared_problems

import gradflow as gf
from gradflow.results import codes, flags, from_codes

TASK = gf.tasks.diagonal_network(jr.key(0), samples=3, dim=6)


def squares(model):
    return jnp.sum(model.beta**2)


def same(a, b, structure=True):
    """Whether two results have the same bits, and the same structure."""
    one, two = (jax.tree.flatten(eqx.filter(x, eqx.is_array)) for x in (a, b))
    assert str(one[1]) == str(two[1]) or not structure
    for x, y in zip(one[0], two[0], strict=True):
        assert type(x) is type(y) and x.dtype == y.dtype
        assert np.array_equal(x, y, equal_nan=x.dtype.kind == "f")
    return bool(one[0])


def there_and_back(result, tmp_path):
    gf.save(tmp_path / "result.npz", result)
    with np.load(tmp_path / "result.npz", allow_pickle=False) as archive:
        assert json.loads(str(archive["structure"]))["format"] == 1
    return gf.load(tmp_path / "result.npz")


@pytest.fixture(scope="module")
def path():
    watch = {"test": gf.Metric(squares, threshold=1e-3)}
    return gf.simulate(
        TASK.flow, TASK.model, weight_decay=1e-2, slow_time=1.0, saves=9, metrics=watch
    )


def test_a_path(path, tmp_path):
    read = there_and_back(path, tmp_path)
    assert type(read) is gf.Path and same(path, read)
    assert read.again is None and str(read) == str(path)
    assert bool(read.result == gf.RESULTS.successful)
    assert read.watched["test"].fn is squares
    np.testing.assert_array_equal(read[3].beta, path[3].beta)


def test_pickle_works_too(path):
    assert same(path, pickle.loads(pickle.dumps(path)))


def test_what_is_one_object_is_one_again(tmp_path):
    both = (TASK.flow, gf.Metric(TASK.loss))
    flow, metric = there_and_back(both, tmp_path)
    assert flow.loss is metric.fn and same(flow, TASK.flow)


def test_all_kinds(tmp_path):
    bf = jnp.arange(3, dtype=jnp.bfloat16)
    result = {
        "key": jr.key(3),
        1: (np.float32(2.5), np.arange(4, dtype=np.int8), bf),
        "rest": [None, True, 1.5, 2 + 1j, {"a"}, frozenset({1}), jnp.dtype("float32")],
        "function": jax.nn.relu,
        "class": gf.KKT4,
        "result": from_codes(np.array([15, 23]), flags()),
        "far": np.array([np.nan, np.inf]),
    }  # fmt: skip
    read = there_and_back(result, tmp_path)
    assert list(read) == list(result) and read["rest"] == result["rest"]
    assert (jr.key_data(read["key"]) == jr.key_data(result["key"])).all()
    assert all(
        (a == b).all() and a.dtype == b.dtype
        for a, b in zip(read[1], result[1], strict=True)
    )
    assert read["function"] is jax.nn.relu and read["class"] is gf.KKT4
    assert codes(read["result"]).tolist() == [15, 23]
    assert np.array_equal(read["far"], result["far"], equal_nan=True)


def test_into_bytes_and_by_public_names():
    gf.save(buffer := io.BytesIO(), [jnp.tanh, jnp.sin, jax.nn.gelu, squares])
    buffer.seek(0)
    assert gf.load(buffer) == [jnp.tanh, jnp.sin, jax.nn.gelu, squares]


def test_a_lost_function_says_so(path, tmp_path):
    watched = {"own": gf.Metric(lambda model: 0.0, threshold=1.0)}
    read = there_and_back(eqx.tree_at(lambda p: p.watched, path, watched), tmp_path)
    assert read.watched["own"].threshold == 1.0
    with pytest.raises(ValueError, match="<lambda>: a function without a name"):
        read.watched["own"].fn(path[0])


def test_files_that_are_none(tmp_path):
    file = tmp_path / "x.npz"
    file.write_bytes(b"something else")
    with pytest.raises(ValueError, match="^file: .* is none that gradflow saved"):
        gf.load(file)
    np.savez(file, a=np.ones(2))
    with pytest.raises(ValueError, match="^file: .* is none that gradflow saved"):
        gf.load(file)
    root = {"kind": "object", "type": "gradflow.gone:Gone", "fields": {}}
    for version, told in ((1, "a Gone of gradflow.gone, which is not"), (2, "later")):
        text = {"format": version, "root": 0, "nodes": [root]}
        np.savez(file, structure=np.array(json.dumps(text)))
        with pytest.raises(ValueError, match=told):
            gf.load(file)
    with pytest.raises(FileNotFoundError):
        gf.load(tmp_path / "nowhere.npz")


def test_what_is_traced_cannot_be_saved(tmp_path):
    @jax.jit
    def run(x):
        gf.save(tmp_path / "x.npz", {"x": x})

    with pytest.raises(ValueError, match="is being traced"):
        run(1.0)


@pytest.fixture(scope="module")
def study():
    return shared_problems.study()


def test_sweep_theory_and_report(study, tmp_path):
    sweep, _, _ = study
    for result in study:
        read = there_and_back(result, tmp_path)
        assert type(read) is type(result) and str(read) == str(result)
        # (What runs the lanes of a sweep again is not kept.)
        assert same(result, read, structure=False)
    assert read.sweep.to_xarray().equals(sweep.to_xarray())
    assert read.plot() is not None


def test_a_labelled_path(path):
    data = path.to_xarray()
    assert data["train_loss"].dims == ("time",) and data.sizes["time"] == 9
    np.testing.assert_array_equal(data["metric_test"], path.metrics["test"])
    assert float(data["threshold_test"]) == 1e-3 and int(data["result"]) == 0
    assert int(data["steps"]) == int(path.stats.steps)
    assert data.attrs["solver"] == path.stats.solver
    assert {"t", "slow_time"} <= set(data.coords)


def test_short_in_a_console_and_drawn_in_a_notebook(path):
    assert repr(path).startswith("<Path by ") and len(repr(path)) < 120
    assert "successful" in repr(path)
    shown = path._repr_html_()
    assert "<pre>Path of" in shown and "data:image/png;base64," in shown
    stacked = eqx.filter_vmap(lambda i: path)(jnp.arange(2))
    assert repr(stacked) == "<Path of times (2, 9)>"


def equal(data, name, values):
    """That a variable has these values; its dimensions."""
    np.testing.assert_array_equal(data[name], np.asarray(values), name)
    return data[name].dims


def test_a_labelled_drift(study):
    drift = study[1].drift
    data = drift.to_xarray()
    assert equal(data, "slow_time", drift.s) == ("time",)
    assert "slow_time" in data.coords and "t" not in data
    assert data["slow_time"].attrs["units"] == "slow time s"
    equal(data, "smallest_curvature", drift.smallest_curvature)
    equal(data, "penalty", drift.penalty)
    equal(data, "metric_test", drift.metrics["test"])
    assert equal(data, "steps", drift.stats.steps) == ()
    assert int(data["result"]) == 0 and data.attrs["solver"] == "KKT5"


def test_a_labelled_theory(study):
    theory = study[1]
    data = theory.to_xarray()
    assert equal(data, "fast_t", theory.fast.t) == ("fast_time",)
    assert equal(data, "drift_slow_time", theory.drift.s) == ("drift_time",)
    assert set(data.coords) == {"fast_t", "drift_slow_time"}
    for name in ("fast_t", "fast_scale"):
        assert data[name].attrs["units"] == "time t"
    equal(data, "fast_train_loss", theory.fast.train_loss)
    equal(data, "drift_metric_test", theory.drift.metrics["test"])
    equal(data, "drift_smallest_curvature", theory.smallest_curvature)
    for name in ("fast_scale", "fast_shift", "interpolation_error"):
        equal(data, name, getattr(theory, name))
    assert int(data["rank"]) == 4 and int(data["dimension"]) == 4
    known = theory.second.ratio.size
    equal(data.isel(drift_time=slice(known)), "drift_ratio", theory.second.ratio)
    assert np.isnan(data["drift_ratio"][known:]).all()
    assert int(data["result"]) == 0 and data.attrs["orders"] == [1, 2]
    assert data.attrs["fast_solver"] == theory.fast.stats.solver


def test_a_labelled_report(study):
    sweep, _, report = study
    data = report.to_xarray()
    lanes = ("weight_decay",)
    equal(data, "train_loss", sweep.train_loss)
    equal(data, "weight_decay", report.weight_decay)
    for k, order in report.orders.items():
        own = data.sel(order=k)
        assert equal(own, "error", order.error) == (*lanes, "time")
        for name in ("sup", "sup_all", "next_term"):
            assert equal(own, name, getattr(order, name)) == lanes
        assert equal(own, "rate_used", order.rate.used) == lanes
        equal(own, "rate", order.rate.exponent)
    equal(data, "drift_error", report.drift.error)
    for name in ("memorised", "grokked"):
        times = getattr(report, name)
        assert equal(data, name, times.measured) == lanes
        equal(data, f"{name}_predicted", times.predicted)
        equal(data, f"{name}_error", times.error)
        assert data[name].attrs["units"] == "time t"
    assert np.isfinite(data["memorised"]).all()
    equal(data, "valid_until", report.valid_until)
    assert data["valid_until"].attrs["units"] == "slow time s"
    assert equal(data, "predicted_t", report.curves.t) == (*lanes, "predicted_time")
    equal(data, "predicted_metric_test", report.curves.metrics["test"])


def test_theory_in_a_console_and_in_a_notebook(study):
    _, theory, report = study
    for result, told, first in (
        (theory.drift, "<Drift by KKT5, 65 slow times to s = 3: successful>", "Drift"),
        (theory, "<TwoPhase of order 2, fast phase to t = ", "Two-phase theory: "),
        (
            report,
            "<Report on 3 weight decays from 0.0001 to 0.01: error of",
            "Two-phase theory ",
        ),
    ):
        assert repr(result).startswith(told) and len(repr(result)) < 120
        shown = result._repr_html_()
        assert f"<pre>{first}" in shown and "data:image/png;base64," in shown
    stacked = eqx.filter_vmap(lambda i: theory)(jnp.arange(2))
    assert repr(stacked.drift) == "<Drift of slow times (2, 65)>"
    traced = []
    eqx.filter_jit(lambda x: traced.append(repr(x)))(theory)
    assert traced == ["<TwoPhase of what is traced>"]
