"""Sweeps over many devices and many processes give what one device gives."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

xr = pytest.importorskip("xarray")
pytest.importorskip("zarr")
import gradflow as gf  # noqa: E402

ROOT = pathlib.Path(__file__).parents[1]

COMMON = """
import json, sys
import jax, jax.numpy as jnp, jax.random as jr, numpy as np
sys.path.insert(0, {root!r})
place, count, address, out = sys.argv[1:5]
place, count = int(place), int(count)
if count > 1:
    jax.distributed.initialize(address, count, place)
import gradflow as gf

def make(seed):
    if seed == 5:
        raise OSError("no such data")
    task = gf.tasks.linear_regression(jr.key(seed), samples=3, dim=6)
    return task.flow, task.model, task.metrics

def run(store=None):
    # 9 steps too far apart: those lanes overshoot.
    return gf.sweep(make, axes={{"seed": range(7)}}, weight_decay=[0.1, 0.2, 0.3],
                    run=gf.Descent([0.05, 9.0], steps=30), saves=5, progress=True,
                    store=store and gf.Store(store, chunk=6), batch="loop")
"""

MEMORY = """
lanes = run()
np.savez(out, train=lanes.train_loss, test=lanes.metrics["test"],
         weights=lanes.paths.params.weights, result=gf.results.codes(lanes.result))
print(json.dumps([jax.local_device_count(), len(lanes.causes)]))
"""

STORED = """
data = run(out).to_xarray()
print(json.dumps([jax.process_count(), data.attrs["finished"],
                  int((data.result == -1).sum())]))
"""


def start(script, out, place=0, count=1, address="", devices=1):
    code = COMMON.format(root=str(ROOT)) + script
    flags = os.environ.get("XLA_FLAGS", "")
    flags += f" --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-c", code, str(place), str(count), address, str(out)],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_ENABLE_X64": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1]), err


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """On one device, in this process and in memory."""
    code = COMMON.format(root=str(ROOT)).replace("sys.argv[1:5]", "ARGV")
    folder = tmp_path_factory.mktemp("one")
    names = {"ARGV": ["0", "1", "", str(folder / "one.npz")]}
    exec(compile(code + MEMORY, "one", "exec"), names)
    return dict(np.load(folder / "one.npz"))


@pytest.mark.slow
def test_eight_devices(one, tmp_path):
    told, err = ended(start(MEMORY, tmp_path / "8.npz", devices=8))
    assert told == [8, 6]
    many = np.load(tmp_path / "8.npz")
    for name, values in one.items():
        np.testing.assert_array_equal(many[name], values, err_msg=name)
    # A line for each device.
    assert all(f"cpu {k}" in err for k in range(8)) and "steps/s" in err


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_many_processes_share_a_store(one, tmp_path, processes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    store = tmp_path / "sweep.zarr"
    runs = [start(STORED, store, k, processes, address) for k in range(processes)]
    for process in runs:
        assert ended(process)[0] == [processes, 7, 0]
    data = gf.open_results(store)
    shape = data.result.shape
    np.testing.assert_array_equal(data.result, one["result"].reshape(shape))
    for name, own in (("train_loss", "train"), ("metric_test", "test")):
        values = one[own].reshape(*shape, -1)
        np.testing.assert_array_equal(data[name], values, err_msg=name)
    assert len(data.attrs["causes"]) == 6
    assert [f.name for f in tmp_path.iterdir()] == ["sweep.zarr"]


PLACED = """
devices = jax.devices()
mesh = jax.sharding.Mesh(np.array(devices), ("i",))
rows = jax.sharding.NamedSharding(mesh, jax.P("i"))
x = jr.normal(jr.key(2), (4, 3))
model = gf.models.LinearModel(jnp.ones(3))

def train(put, model, **how):
    loss = gf.SquaredError(put(x), put(x[:, 1]))
    lanes = gf.sweep(gf.GradientFlow(loss), model, weight_decay=[0.1, 0.3], saves=4,
                     progress=False, metrics={"loss": loss}, **how)
    assert (lanes.metrics["loss"] == lanes.train_loss).all()
    return np.asarray(lanes.train_loss)

on = lambda k: lambda a: jax.device_put(a, devices[k])
flow, steps = dict(ts=jnp.arange(3.0)), dict(run=gf.Descent(0.1, steps=5))
plain = train(lambda a: a, model, **flow)
split = train(lambda a: jax.device_put(a, rows), on(1)(model), **flow)
far = train(on(1), on(0)(model), **steps)
print(json.dumps([(plain == split).all().item(),
                  (far == train(lambda a: a, model, **steps)).all().item()]))
"""


@pytest.mark.slow
def test_data_on_other_devices_are_placed(tmp_path):
    told, _ = ended(start(PLACED, tmp_path / "no.npz", devices=2))
    assert told == [True, True]
