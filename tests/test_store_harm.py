"""What may harm a store: bad files, full disks, other threads and processes, kills."""

import errno
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from stores import BUILT, contents, in_threads, leftovers, run

import gradflow as gf
from gradflow.sweeps.store import remove_stale, ZarrStore

pytest.importorskip("xarray")
pytest.importorskip("zarr")


ROOT = pathlib.Path(__file__).parents[1]


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


def flip(file):
    data = bytearray(file.read_bytes())
    data[6] ^= 255
    file.write_bytes(data)


@pytest.fixture
def copy(whole, tmp_path):
    path = tmp_path / "copy.zarr"
    shutil.copytree(whole[0], path)
    return path


def test_what_belongs_to_no_chunk_is_mended(copy):
    good = contents(copy)
    flip(copy / "learning_rate" / "c" / "0")
    (copy / "train_loss" / "zarr.json").write_text("{")
    with pytest.raises(ValueError, match="learning_rate/c/0, train_loss/zarr.json of"):
        gf.open_results(copy)
    with pytest.warns(UserWarning, match="corrupted, and are written anew"):
        run(copy, parameters=True)
    assert contents(copy) == good


def test_a_corrupted_chunk_is_not_shown_before_it_is_computed_again(copy):
    flip(copy / "train_loss" / "c" / "2" / "0" / "0")
    ZarrStore(copy).remove_chunk(2)  # as a run does that is then killed
    data = gf.open_results(copy)
    assert (data.result.values[2] == -1).all() and data.attrs["finished"] == 3
    assert np.isnan(data.train_loss.values[2]).all()
    assert np.isfinite(data.train_loss.values[[0, 1, 3]]).all()


def test_a_marker_that_is_cut_off(copy):
    (copy / "chunks" / "000001" / "zarr.json").write_text("{")
    with pytest.raises(ValueError, match=r"corrupted: 1 \(chunks/000001\)"):
        gf.open_results(copy)
    assert (gf.open_results(copy, check=False).result == 0).all()


def test_another_device_is_told(copy):
    file = copy / "zarr.json"
    here = json.dumps(jax.devices()[0].device_kind)
    text = file.read_text()
    assert f'"device": {here}' in text
    file.write_text(text.replace(f'"device": {here}', '"device": "abacus"'))
    with pytest.warns(UserWarning, match="begun on abacus"):
        run(copy, parameters=True)


def test_another_process_may_make_it_first(copy, tmp_path, monkeypatch):
    path = tmp_path / "sweep.zarr"
    begin = ZarrStore._begin

    def slow(self, *rest):
        begin(self, *rest)
        if not path.exists():
            shutil.copytree(copy, path)

    monkeypatch.setattr(ZarrStore, "_begin", slow)
    BUILT.clear()
    run(path, parameters=True)
    assert set(BUILT) <= {0} and leftovers(path) == []
    assert contents(path) == contents(copy)


HOLD = """
import pathlib, sys, time
from gradflow.sweeps.store import _lock
folder = pathlib.Path(sys.argv[1])
lock = _lock(folder)
lock.acquire()
folder.mkdir()
print("held", flush=True)
time.sleep(600)
"""


def held_by_another(folder):
    """A process that is writing a folder aside."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.slow
def test_what_others_have_left_aside(tmp_path):
    path = tmp_path / "a[1].zarr"
    aside = lambda name: path.with_name(f"{path.name}.partial-{name}")
    for name in ("0-left", "1-left", "0-else-where-1"):  # the last as it once was
        aside(name).mkdir()
    aside("0-gone.lock").touch()
    other, dead = map(held_by_another, (aside("0-other"), aside("0-dead")))
    try:
        dead.kill()
        dead.communicate()
        remove_stale(path, 1)
        assert not aside("1-left").exists() and aside("0-left").exists()
        # That of another run that is at work is its own: it is neither taken away
        # nor is the other run ended.
        run(path, steps=3)
        assert sorted(leftovers(path)) == [
            f"{aside('0-other').name}{x}" for x in ("", ".lock")
        ]
        assert other.poll() is None
    finally:
        other.kill()
        other.communicate()
    run(path, steps=3)
    assert leftovers(path) == []


def test_sweeps_in_threads_have_stores_of_their_own(tmp_path):
    """Three at a time; then the same again, and with other data; and two of one."""

    def call(name, factor):
        x = jr.normal(jr.key(3), (5000, 6))
        flow = gf.GradientFlow(gf.SquaredError(x, factor * x[:, 1]))
        return gf.sweep(
            flow, gf.models.LinearModel(jnp.ones(6)), weight_decay=[0.1, 0.01],
            run=gf.Descent(0.1, steps=4), saves=3, progress=False,
            store=tmp_path / name,
        )  # fmt: skip

    names = ("a", "b", "c")
    calls = lambda factor: [functools.partial(call, n, factor) for n in names]
    first = in_threads(*calls(1.0))
    for one, two in zip(first, in_threads(*calls(1.0)), strict=True):
        assert one.to_xarray().equals(two.to_xarray())
    for refused in calls(2.0):
        with pytest.raises(ValueError, match="holds another sweep"):
            refused()
    with pytest.raises(ValueError, match="holds another sweep"):
        in_threads(*calls(2.0))
    same = in_threads(*[functools.partial(call, "d", 1.0)] * 3)
    assert all(one.to_xarray().equals(first[0].to_xarray()) for one in same)
    assert leftovers(tmp_path / "d") == []


KILLS = int(os.environ.get("GRADFLOW_KILLS", "2"))
"""How many times a run is killed; the process takes some seconds to start each time."""


@pytest.mark.slow
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
