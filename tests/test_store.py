"""Sweeps on disk: whole chunks only, gone on with, and nothing mixed or lost."""

import errno
import hashlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import gradflow as gf

xr = pytest.importorskip("xarray")
pytest.importorskip("zarr")

ROOT = pathlib.Path(__file__).parents[1]
RATES = [0.02, 0.05, 0.1]
SEEDS = [0, 1, 2, 3]
BUILT = []


def make(seed):
    BUILT.append(seed)
    task = gf.tasks.linear_regression(jr.key(seed), samples=3, dim=6)
    return task.flow, task.model, task.metrics


def run(path, function=make, **options):
    options = dict(learning_rate=RATES, steps=20, saves=5, chunk=3) | options
    axes = {"seed": SEEDS}
    return gf.sweep(
        function, axes=axes, weight_decay=0.1, progress=False, store=path, **options
    )


def contents(path):
    """The checksums of all files."""
    return {
        str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in path.rglob("*")
        if f.is_file()
    }


def leftovers(path):
    return [f.name for f in path.parent.iterdir() if "partial" in f.name]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "sweep.zarr"
    return path, run(path, parameters=True)


def test_holds_what_the_sweep_gives(whole):
    path, data = whole
    assert not gf.open_results(path).train_loss._in_memory  # it is read when it is used
    lanes = gf.sweep(
        make, axes={"seed": SEEDS}, weight_decay=0.1, progress=False,
        learning_rate=RATES, steps=20, saves=5,
    )  # fmt: skip
    expected = lanes.to_xarray()
    assert dict(data.sizes) == dict(seed=4, learning_rate=3, time=5) | {
        "params_weights_0": 6
    }
    for name in expected.variables:
        assert data[name].dims == expected[name].dims, name
        np.testing.assert_array_equal(data[name], expected[name], err_msg=name)
    np.testing.assert_array_equal(
        data.params_weights.sel(seed=2, learning_rate=0.05), lanes[2, 1].models.weights
    )
    assert (data.result == 0).all()
    assert data.result.attrs["flag_meanings"].split()[:2] == ["not_run", "successful"]
    again = gf.open_results(path)
    assert again.identical(data) and leftovers(path) == []


def test_says_how_it_was_made(whole):
    path, data = whole
    assert data.attrs["seeds"] == SEEDS and data.attrs["finished"] == 4
    assert data.attrs["versions"]["jax"] == jax.__version__
    assert data.attrs["device"] == jax.devices()[0].device_kind
    assert data.attrs["config"]["steps"] == 20
    assert set(data.attrs["commit"]) == {"gradflow", "working_directory"}
    # Any reader of Zarr finds it.
    plain = xr.open_zarr(path, chunks=None, consolidated=False)
    np.testing.assert_array_equal(plain.train_loss, data.train_loss)


def test_nothing_is_computed_again(whole):
    path = whole[0]
    before = contents(path)
    BUILT.clear()
    run(path, parameters=True)
    assert set(BUILT) <= {0}  # the first, to be compared
    assert contents(path) == before


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(steps=21), r"steps: 20 there, 21 here"),
        (dict(learning_rate=[0.02, 0.05, 0.2]), r"axes.learning_rate: .*0.1\].*0.2\]"),
        (dict(chunk=6), "chunk"),
        (dict(method="decoupled"), "method: nothing there, decoupled here"),
        (dict(parameters=False), "parameters"),
    ],
)
def test_another_configuration_is_refused(whole, change, words):
    path = whole[0]
    before = contents(path)
    with pytest.raises(ValueError, match=f"(?s)holds another sweep:.*{words}"):
        run(path, **(dict(parameters=True) | change))
    assert contents(path) == before


def test_other_data_are_refused(whole):
    def make(seed):  # of the same name
        task = gf.tasks.linear_regression(jr.key(seed + 1), samples=3, dim=6)
        return task.flow, task.model, task.metrics

    make.__qualname__ = "make"
    with pytest.raises(ValueError, match=r"first.flow.loss.x: float64\[3, 6\] norm"):
        run(whole[0], make, parameters=True)


def test_a_corrupted_chunk_is_named_and_computed_again(whole, tmp_path):
    path = tmp_path / "sweep.zarr"
    run(path)
    good = contents(path)
    file = path / "train_loss" / "c" / "2" / "0" / "0"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"corrupted: 2 \(train_loss/c/2/0/0\)"):
        gf.open_results(path)
    BUILT.clear()
    with pytest.warns(UserWarning, match="chunk 2 of .* is corrupted"):
        run(path)
    assert set(BUILT) <= {0, 2}
    assert contents(path) == good


def test_a_full_disk_is_named_and_nothing_is_lost(whole, tmp_path, monkeypatch):
    path = tmp_path / "sweep.zarr"
    flush, count = os.fsync, [0]

    def full(handle):
        count[0] += 1
        if count[0] > 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left.*make room") as caught:
            run(path)
    assert caught.value.errno == errno.ENOSPC and leftovers(path) == []
    some = gf.open_results(path)
    assert 0 < some.attrs["finished"] < 4
    lanes = some.result.values[: some.attrs["finished"]]
    assert (lanes == 0).all() and (some.result.values[-1] == -1).all()
    assert np.isnan(some.train_loss.values[-1]).all()
    run(path)
    other = tmp_path / "other.zarr"
    run(other)
    assert contents(path) == contents(other)


def test_lanes_that_raise(tmp_path):
    def brittle(seed):
        if seed in (0, 2):
            raise ArithmeticError(f"seed {seed} is odd")
        return make(seed)

    path = tmp_path / "sweep.zarr"
    data = run(path, brittle, chunk=2)
    names = data.result.attrs["flag_meanings"].split()
    values = data.result.attrs["flag_values"]
    codes = [names[values.index(int(v))] for v in data.result.values[:, 0]]
    assert codes == ["raised", "successful"] * 2
    assert data.attrs["causes"]["7"] == "ArithmeticError: seed 2 is odd"
    assert np.isnan(data.train_loss.values[2]).all()
    assert np.isfinite(data.train_loss.values[3]).all()
    nowhere = tmp_path / "none.zarr"
    with pytest.raises(KeyError, match="seeds are out"):
        run(nowhere, lambda seed: {}["seeds are out"])
    assert gf.open_results(nowhere).attrs["finished"] == 0  # to be tried again


def test_flows_and_a_single_problem(tmp_path):
    task = gf.tasks.linear_regression(jr.key(0), samples=3, dim=6)
    lams = jnp.geomspace(1e-1, 1e-3, 5)
    options = dict(weight_decay=lams, slow_time=1.0, saves=4, progress=False)
    options |= dict(solver=gf.KKT4(), metrics=task.metrics)
    data = gf.sweep(
        task.flow, task.model, store=tmp_path / "s.zarr", chunk=2, parameters=True,
        **options,
    )  # fmt: skip
    lanes = gf.sweep(task.flow, task.model, **options)
    np.testing.assert_array_equal(data.metric_test, lanes.metrics["test"])
    back = gf.as_sweep(data, task.flow, task.model, metrics=task.metrics)
    assert str(back) == str(lanes)
    np.testing.assert_array_equal(back[3].models.weights, lanes[3].models.weights)
    assert back.paths.watched == lanes.paths.watched
    with pytest.raises(ValueError, match="yet to be run"):
        missing = data.assign(result=data.result * 0 - 1)
        gf.as_sweep(missing, task.flow, task.model)
    with pytest.raises(ValueError, match="params_weights"):
        gf.as_sweep(data.drop_vars("params_weights"), task.flow, task.model)
    with pytest.raises(ValueError, match=r"solver.type: KKT4 there, KKT5 here"):
        gf.sweep(
            task.flow, task.model, store=tmp_path / "s.zarr", chunk=2, parameters=True,
            **(options | dict(solver=gf.KKT5())),
        )  # fmt: skip


def test_what_is_no_store_is_left_alone(tmp_path):
    with pytest.raises(FileNotFoundError, match="none at"):
        gf.open_results(tmp_path / "nothing.zarr")
    (tmp_path / "notes").mkdir()
    with pytest.raises(FileExistsError, match="no store"):
        run(tmp_path / "notes")
    with pytest.raises(ValueError, match="chunk"):
        run(tmp_path / "s.zarr", chunk=0)
    with pytest.raises(ValueError, match="throw"):
        run(tmp_path / "s.zarr", throw=True)


KILLS = int(os.environ.get("GRADFLOW_KILLS", "2"))
"""How many times a run is killed; the process takes some seconds to start each time."""


def test_killed_at_any_moment_it_goes_on(tmp_path):
    """SIGKILL at random moments; then the store is as if nothing had happened."""
    script = ROOT / "benchmarks" / "kill.py"
    command = [sys.executable, str(script), "--kills", str(KILLS), "--seed", "0"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    out = subprocess.run(
        [*command, "--out", str(tmp_path)], env=env, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stdout + out.stderr
    told = json.loads(out.stdout.splitlines()[-1])
    assert told["kills"] == KILLS and told["equal"] and told["leftovers"] == []
    assert told["computed_again"] == []
