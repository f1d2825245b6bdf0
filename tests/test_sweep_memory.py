"""Sweeps of more lanes than fit into memory together."""

import json
import os
import pathlib
import subprocess
import sys
import warnings

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import gradflow as gf
from gradflow.sweeps import lanes, memory, programs, runner

ROOT = pathlib.Path(__file__).parents[1]
TASK = gf.tasks.linear_regression(jr.key(0), samples=3, dim=6)
LAMS = np.geomspace(1.0, 1e-2, 11)
TOLD = "RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes."


def run(batch="vmap", lams=LAMS, **options):
    return gf.sweep(
        TASK.flow, TASK.model, weight_decay=lams, saves=5, progress=False,
        run=gf.Descent(0.05, steps=600), metrics=TASK.metrics, batch=batch, **options,
    )  # fmt: skip


class Full:
    """A result whose program has run out of memory."""

    def __array__(self, *args, **kwargs):
        raise jax.errors.JaxRuntimeError(TOLD)


@pytest.fixture
def small(monkeypatch):
    """Makes a memory that holds so many lanes; returns the sizes of all programs."""

    def hold(most, error=None, *, late=False):
        made, program = [], programs._program

        def counted(run, number, *args):
            made.append(len(number))
            if len(number) <= most:
                return program(run, number, *args)
            if late:
                return Full()
            raise error or jax.errors.JaxRuntimeError(TOLD)

        monkeypatch.setattr(programs, "_program", counted)
        return made

    return hold


@pytest.fixture(scope="module")
def whole():
    return run()


def same(a, b):
    """(Lockstep of another number of lanes may round in another way.)"""
    np.testing.assert_array_equal(gf.results.codes(a.result), [0] * len(LAMS))
    for name in ("t", "train_loss", "penalty"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-12)


@pytest.mark.parametrize("late", [False, True])
def test_half_as_many_lanes(small, whole, late):
    """And again, and never more than those that fit."""
    made = small(3, late=late)
    with pytest.warns(UserWarning, match="11 lanes at once do not fit .* they are 6"):
        lanes = run()
    # (Two of 6 were in memory together: one is tried once more by itself.)
    assert made == ([11, 6, 6, 6] + [3] * 4)
    same(lanes, whole)


def test_the_smaller_size_stays(small, whole, tmp_path):
    """For later chunks of a store, too; with lanes in parts."""
    made = small(2)
    store = gf.Store(tmp_path / "s.zarr", chunk=4, checkpoint=0.0)
    with pytest.warns(UserWarning, match="4 lanes at once") as told:
        lanes = run(store=store)
    assert made.count(4) == 1 and set(made) == {4, 2}
    assert len(told) == 1
    same(lanes.load(), whole)


def test_memory_that_runs_out_in_a_later_part(whole, tmp_path, monkeypatch):
    """Lanes go on, in smaller programs, from their checkpoints."""
    program, parts = programs._program, []

    def counted(run, number, stack, shared, how):
        out = program(run, number, stack, shared, how)
        parts.append(len(number))
        if len(number) > 6 and len(parts) == 2:
            raise MemoryError
        return out

    monkeypatch.setattr(programs, "_program", counted)
    with pytest.warns(UserWarning, match="they are 6"):
        lanes = run(store=gf.Store(tmp_path / "s.zarr", chunk=11, checkpoint=0.0))
    assert parts[:2] == [11, 11] and set(parts[2:]) == {6}
    same(lanes.load(), whole)


def test_a_lane_that_does_not_fit_by_itself(small):
    made = small(0)
    with pytest.warns(UserWarning, match="2 lanes at once"):
        with pytest.raises(memory.OutOfMemory) as error:
            run(lams=LAMS[:2])
    assert made == [2, 1, 1, 1, 1]
    assert str(error.value) == (
        f"this lane does not fit into memory, even by itself ({TOLD}); give fewer "
        "saves, or fewer metrics at once, or a smaller batch_size."
    )


def test_two_that_fit_one_by_one(monkeypatch, whole):
    """While one is in memory there is no room for another."""
    made, program = [], programs._program
    started = programs._Programs.start
    waiting = []

    def start(self, given):
        running = started(self, given)
        waiting.append(given)

        def wait():
            waiting.remove(given)
            return running.wait()

        return running._replace(wait=wait)

    def counted(run, number, *args):
        made.append(len(number))
        if waiting:
            raise jax.errors.JaxRuntimeError(TOLD)
        return program(run, number, *args)

    monkeypatch.setattr(programs._Programs, "start", start)
    monkeypatch.setattr(programs, "_program", counted)
    sweeping = sys.modules["gradflow.sweeps.sweep"]
    monkeypatch.setattr(sweeping, "fitting", lambda *_: 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lanes = run()
    same(lanes, whole)
    assert set(made) == {2}


def test_one_that_fits_and_one_that_does_not(monkeypatch):
    """One by one, as in a loop on one device."""
    program = programs._WHOLE[programs.Descend]

    def limited(args):
        if float(args.weight_decay) > 0.9:
            raise MemoryError
        return program(args)

    monkeypatch.setitem(programs._WHOLE, programs.Descend, limited)
    lanes = run("loop", LAMS[:3])
    assert lanes.succeeded.tolist() == [False, True, True]
    assert lanes.causes[0].startswith("OutOfMemory: this lane does not fit")
    assert "(MemoryError)" in lanes.causes[0]


def test_the_remedy_is_one_that_there_is(monkeypatch):
    """A solver without a matrix, but for one that has none."""

    def none(args):
        raise MemoryError

    monkeypatch.setattr(programs, "solve_through", none)
    flow = dict(weight_decay=[0.1], t1=1.0, saves=5, progress=False, batch="loop")
    for solver in (gf.KKT4(), gf.RKC2()):
        with pytest.raises(memory.OutOfMemory) as error:
            gf.sweep(TASK.flow, TASK.model, solver=solver, **flow)
        assert ("gf.RKC2()" in str(error.value)) == isinstance(solver, gf.KKT4)


def test_other_errors_are_not_about_memory(small):
    """Each lane by itself, in the same program."""
    made = small(0, RuntimeError("out of luck"))
    with pytest.raises(RuntimeError, match="out of luck"):
        run(lams=LAMS[:2])
    assert made == [2, 2, 2]


def test_the_error_of_jax():
    """That of an array larger than any memory."""
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jax.block_until_ready(jax.numpy.zeros(2**48))
    assert memory.is_out_of_memory(error.value)
    assert memory.is_out_of_memory(MemoryError())
    assert not memory.is_out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: no"))
    assert not memory.is_out_of_memory(ValueError("out of memory"))


class Caught(BaseException):
    pass


def many_samples():
    """Fewer parameters than outputs."""
    x = jr.normal(jr.key(1), (400, 2))
    model = eqx.nn.MLP(2, "scalar", 6, 1, jnp.tanh, key=jr.key(2))
    return gf.GradientFlow(gf.SquaredError(x, jnp.sin(3 * x[:, 0]))), model


def diagonal():
    task = gf.tasks.diagonal_network(jr.key(0), samples=10, dim=40)
    return task.flow, task.model


@pytest.mark.slow
@pytest.mark.parametrize("solver", [gf.KKT4(), gf.RKC2(), diffrax.Tsit5(), None])
@pytest.mark.parametrize("problem", [diagonal, many_samples])
@pytest.mark.parametrize("wide", [False, True])
def test_what_a_lane_takes(monkeypatch, solver, problem, wide):
    """By estimate, and as XLA says, also where a metric is `wide`, and of twenty times
    as many numbers as the model. (`None` is a descent.)"""
    told, given = [], []
    kind = lanes.DescentLanes if solver is None else lanes.FlowLanes
    estimate = kind.bytes_per_lane

    def tell(self, number):
        told.append(estimate(self, number))
        return told[0]

    def catch(*args):
        given.extend(args)
        raise Caught

    program = programs._program
    monkeypatch.setattr(kind, "bytes_per_lane", tell)
    monkeypatch.setattr(programs, "_program", catch)
    how = dict(slow_time=1.0, solver=solver)
    if solver is None:
        how = dict(run=gf.Descent(0.01, steps=100))
    flow, model = problem()
    watch = {"loss": flow.loss}
    if wide:
        theta = lambda m: ravel_pytree(flow.partition(m)[0])[0]
        watch["wide"] = lambda m: jnp.outer(jnp.arange(20.0), jnp.sin(theta(m)))
    with pytest.raises(Caught):
        gf.sweep(
            flow, model, weight_decay=LAMS[:8], saves=33, batch="vmap", progress=False,
            metrics=watch, **how,
        )  # fmt: skip
    of = program.lower(*given).compile().compiled.memory_analysis()
    sizes = (of.temp_size_in_bytes, of.output_size_in_bytes, of.argument_size_in_bytes)
    takes = sum(sizes) / 8
    assert 0.9 < told[0] / takes < 2, (told, takes)


def test_what_is_left_is_counted():
    """Of the fullest device; on a CPU what the machine has, and that once."""

    def used(size):
        return dict(bytes_limit=100, bytes_in_use=size)

    assert memory.memory_left([used(30)]) == 70
    assert memory.memory_left([used(30), used(90)]) == 20
    assert memory.memory_left([used(130)]) == 0
    host = memory.memory_left([None])
    assert 1e8 < host <= 8e9 and memory.memory_left([None] * 4) == host


def test_how_many_lanes_fit(monkeypatch):
    """All, or a power of two; of a loop it is one on one device."""

    class Some:
        def bytes_per_lane(self, number):
            return 10

    fitting = runner.fitting.__wrapped__
    for room, most, size in [(1000, 50, 50), (1000, 90, 64), (15, 9, 1), (0, 9, 1)]:
        monkeypatch.setattr(runner, "memory_left", lambda stats, room=room: room)
        assert fitting(Some(), "vmap", most) == size
    assert fitting(Some(), "loop", 9) == 1


DEVICES = """
import json, sys, warnings
import numpy as np
sys.path[:0] = {path!r}
import jax
import test_sweep_memory as tests
from gradflow.sweeps import programs

store = sys.argv[1]
out = []
for batch in ("loop", "vmap"):
    lams = np.geomspace(1.0, 1e-2, 21)
    whole = tests.run(batch, lams)
    made, program = [], programs._program

    def counted(run, number, *args):
        made.append(len(number))
        if len(number) > 6:
            raise jax.errors.JaxRuntimeError(tests.TOLD)
        return program(run, number, *args)

    programs._program = counted
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        lanes = tests.run(batch, lams)
        kept = tests.run(batch, lams, store=tests.gf.Store(
            store + batch, chunk=21, checkpoint=0.0))
    programs._program = program
    off = [float(np.max(np.abs(a.train_loss / whole.train_loss - 1)))
           for a in (lanes, kept)]
    out.append([made, len(told), off])
print(json.dumps(out))
"""


@pytest.mark.slow
def test_on_many_devices(tmp_path):
    """In loops, which are the same for any number of lanes, to the last bit."""
    flags = os.environ.get("XLA_FLAGS", "")
    flags += " --xla_force_host_platform_device_count=2"
    code = DEVICES.format(path=[str(ROOT), str(ROOT / "tests")])
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "s")], text=True, timeout=300,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_ENABLE_X64": "1"},
        capture_output=True,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    loops, lockstep = json.loads(out.stdout)
    for (made, told, off), sizes in ((loops, [4, 8, 16]), (lockstep, [6, 12, 22])):
        assert sorted(set(made)) == sizes and told == 2
        # Of each sweep one, what was under way meanwhile, and one more by itself.
        assert all(made.count(size) <= 6 for size in sizes[1:])
        assert off[0] <= 1e-12 and off[1] <= 1e-9
    assert loops[2][0] == 0
