"""Sweeps on disk: whole chunks only, gone on with, and nothing mixed or lost."""

import concurrent.futures
import errno
import functools
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import gradflow as gf
from gradflow.sweeps.identity import describe, difference
from gradflow.sweeps.store import remove_stale, ZarrStore

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


def run(path, function=make, *, chunk=3, parameters=False, retry=False, **steps):
    steps = dict(learning_rate=RATES, steps=20) | steps
    store = gf.Store(path, chunk=chunk, parameters=parameters, retry=retry)
    sweep = gf.sweep(
        function, axes={"seed": SEEDS}, weight_decay=0.1, run=gf.Descent(**steps),
        saves=5, progress=False, store=store,
    )  # fmt: skip
    return sweep.to_xarray()


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
        run=gf.Descent(RATES, steps=20), saves=5,
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
    mixed = run(tmp_path / "mixed.zarr", brittle, chunk=6)  # of two seeds
    known = np.isfinite(mixed.threshold_test.values).all(axis=1)
    assert known.tolist() == [False, True] * 2
    nowhere = tmp_path / "none.zarr"
    with pytest.raises(KeyError, match="seeds are out"):
        run(nowhere, lambda seed: {}["seeds are out"])
    none = gf.open_results(nowhere)
    assert (
        none.attrs["finished"] == 0 and (none.result == -1).all()
    )  # to be tried again


def test_lanes_that_raise_in_the_last_chunk(tmp_path):
    def brittle(seed):
        if seed == 3:
            raise ArithmeticError("three")
        return make(seed)

    for _ in range(2):
        data = run(tmp_path / "sweep.zarr", brittle)
        assert (data.result.values[:3] == 0).all() and data.attrs["finished"] == 4
        assert (data.result.values[3] > 0).all() and len(data.attrs["causes"]) == 3


MISSING = set()


def needs_a_file(seed):
    if seed in MISSING:
        raise OSError("no such file yet")
    return make(seed)


def test_lanes_that_raised_are_tried_again_if_asked(tmp_path):
    path = tmp_path / "sweep.zarr"
    MISSING.add(1)
    assert len(run(path, needs_a_file).attrs["causes"]) == 3
    MISSING.clear()
    assert len(run(path, needs_a_file).attrs["causes"]) == 3  # it is finished
    BUILT.clear()
    data = run(path, needs_a_file, retry=True)
    assert data.attrs["causes"] == {} and (data.result == 0).all()
    assert set(BUILT) <= {0, 1}


def test_lanes_are_compared_with_the_first_whichever_are_run(tmp_path):
    """One with fewer steps to save than the first is marked, in a second call too."""
    task = gf.tasks.linear_regression(jr.key(0), samples=3, dim=6)
    path = tmp_path / "sweep.zarr"
    for _ in range(2):
        data = gf.sweep(
            task.flow, task.model, weight_decay=[1e-2, 1.0], slow_time=1.0,
            saves=20, run=gf.Descent(0.1), progress=False,
            store=gf.Store(path, chunk=1),
        ).to_xarray()  # fmt: skip
        assert data.result.values[0] == 0 and data.result.values[1] > 0
        assert "saves: this lane has" in data.attrs["causes"]["1"]
        # The first is there; what is left is run without it.
        shutil.rmtree(path / "chunks" / "000001")


def same_in_store(stored, lanes):
    """Whether a sweep gives the same from a store as in memory."""
    kept = stored.load()
    assert kept.load() is kept and lanes.load() is lanes
    for sweep in (stored, kept):
        assert isinstance(sweep, gf.Sweep)
        assert str(sweep) == str(lanes)
        assert (sweep.dims, sweep.shape, sweep.fixed, sweep.causes) == (
            lanes.dims, lanes.shape, lanes.fixed, lanes.causes,
        )  # fmt: skip
        for name in ("t", "weight_decay", "slow_time", "train_loss", "penalty"):
            one, two = getattr(sweep, name), getattr(lanes, name)
            np.testing.assert_array_equal(one, two, name, strict=True)
        for name, values in lanes.metrics.items():
            np.testing.assert_array_equal(sweep.metrics[name], values, name)
        np.testing.assert_array_equal(sweep.succeeded, lanes.succeeded)
        np.testing.assert_array_equal(sweep.stats.steps, lanes.stats.steps)
        assert bool((sweep.result == lanes.result).all())
        for one, two in zip(sweep, lanes, strict=True):
            np.testing.assert_array_equal(one.params.weights, two.params.weights)
            assert one.watched == two.watched
            if bool(two.succeeded):
                assert str(one) == str(two)
                np.testing.assert_array_equal(one[-1].weights, two[-1].weights)


def test_a_sweep_of_many_problems_from_a_store(tmp_path):
    """One of which cannot be made."""
    MISSING.add(1)
    call = dict(
        axes={"seed": [0, 1, 2]}, weight_decay=0.1, run=gf.Descent(RATES, steps=9),
        saves=5, progress=False,
    )  # fmt: skip
    lanes = gf.sweep(needs_a_file, **call)
    store = gf.Store(tmp_path / "s.zarr", parameters=True)
    stored = gf.sweep(needs_a_file, **call, store=store)
    assert not stored.to_xarray().train_loss._in_memory
    same_in_store(stored, lanes)
    crossing = stored.crossing_time("test")
    np.testing.assert_array_equal(crossing, lanes.crossing_time("test"))
    MISSING.clear()


def test_what_a_store_does_not_have(tmp_path):
    flow, model, metrics = make(0)
    sweep = gf.sweep(
        flow, model, weight_decay=[0.1, 0.2], run=gf.Descent(0.1, steps=9), saves=5,
        metrics=metrics, progress=False, store=tmp_path / "s.zarr",
    )  # fmt: skip
    assert sweep[1].metrics["test"].shape == (5,) and "2 weight decays" in str(sweep)
    with pytest.raises(ValueError, match="parameters: the store has none"):
        sweep[1][-1]
    gf.save(tmp_path / "sweep.npz", sweep)
    with pytest.raises(ValueError, match="gf.open_results.*sweep.load"):
        str(gf.load(tmp_path / "sweep.npz"))
    gf.save(tmp_path / "sweep.npz", sweep.load())
    assert str(gf.load(tmp_path / "sweep.npz")) == str(sweep)


@pytest.mark.slow
def test_flows_and_a_single_problem(tmp_path):
    task = gf.tasks.linear_regression(jr.key(0), samples=3, dim=6)
    lams = jnp.geomspace(1e-1, 1e-3, 5)
    options = dict(weight_decay=lams, slow_time=1.0, saves=4, progress=False)
    options |= dict(solver=gf.KKT4(), metrics=task.metrics)
    store = gf.Store(tmp_path / "s.zarr", chunk=2, parameters=True)
    stored = gf.sweep(task.flow, task.model, store=store, **options)
    lanes = gf.sweep(task.flow, task.model, **options)
    same_in_store(stored, lanes)
    data = stored.to_xarray()
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
        other = options | dict(solver=gf.KKT5())
        gf.sweep(task.flow, task.model, store=store, **other)


def test_what_is_no_store_is_left_alone(tmp_path):
    with pytest.raises(FileNotFoundError, match="none at"):
        gf.open_results(tmp_path / "nothing.zarr")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no store"):
        run(tmp_path / "notes")
    assert leftovers(tmp_path / "notes") == []
    foreign = tmp_path / "foreign.zarr"
    xr.Dataset({"a": ("x", [1, 2])}).to_zarr(foreign, zarr_format=3, consolidated=False)
    for use in (gf.open_results, run):
        with pytest.raises(ValueError, match="none that gradflow.sweep made"):
            use(foreign)
    with pytest.raises(ValueError, match="chunk"):
        run(tmp_path / "s.zarr", chunk=0)
    with pytest.raises(ValueError, match="throw"):
        flow, model, _ = make(0)
        store = tmp_path / "s.zarr"
        gf.sweep(flow, model, weight_decay=[0.1], t1=1.0, store=store, throw=True)


def described(value):
    return json.loads(json.dumps(describe(value)))


def inside(k):
    def metric(model, power=2):
        return k * model**power

    return metric


class Norm:
    def __init__(self, p):
        self.p = p

    def __call__(self, model):
        return self.p

    def method(self, model):
        return self.p


@pytest.mark.parametrize(
    "one, two, same",
    [
        (lambda m: m + 1, lambda m: m + 2, lambda m: m + 1),
        (inside(1), inside(2), inside(1)),
        (Norm(1), Norm(2), Norm(1)),
        (Norm(1).method, Norm(2).method, Norm(1).method),
        (optax.sgd(0.1), optax.sgd(0.2), optax.sgd(0.1)),
        (gf.L2(where=lambda m: m[0]), gf.L2(where=lambda m: m[1]), None),
        ({"a", "b"}, {"a", "c"}, {"b", "a"}),
        (np.array([np.nan, 1.0]), np.array([np.nan, 2.0]), np.array([np.nan, 1.0])),
        (np.array(["a", None]), np.array(["b", None]), np.array(["a", None])),
    ],
)
def test_what_differs_is_told_apart(one, two, same):
    assert difference(described(one), described(two)) != []
    if same is not None:
        assert difference(described(one), described(same)) == []


def test_what_is_described_is_not_itself_a_trap():
    def again(n):
        return again(n - 1) if n else 0

    assert "again" in str(described(again))  # which closes over itself
    assert difference({"a": np.nan}, {"a": np.nan}) == []
    # What another version of Python compiled tells nothing.
    here = described(lambda m: m)
    assert difference(here | {"code": "code of cpython-30 1234"}, here) == []


def simple(a, b=0):
    return make(10 * a + b)


def test_the_order_of_axes_counts(tmp_path):
    path = tmp_path / "s.zarr"
    options = dict(weight_decay=0.1, run=gf.Descent(0.05, steps=9), saves=3)
    options |= dict(progress=False, store=path)
    gf.sweep(simple, axes={"a": [0, 1], "b": [0, 1]}, **options)
    with pytest.raises(ValueError, match=r"order: \['a', 'b'\] there, \['b', 'a'\]"):
        gf.sweep(simple, axes={"b": [0, 1], "a": [0, 1]}, **options)


@pytest.mark.parametrize("name", ["chunks", "a/b", ".a"])
def test_names_of_arrays(tmp_path, name):
    flow, model, _ = make(0)
    both = dict(weight_decay=[0.1, 0.2], run=gf.Descent(0.05, steps=9), saves=3)
    both |= dict(progress=False, store=tmp_path / "s.zarr")
    with pytest.raises(ValueError, match=f"axes: '{name}' can't be"):
        gf.sweep(lambda **_: (flow, model), axes={name: [1]}, **both)
    with pytest.raises(ValueError, match=f"metrics: '{name}' can't be"):
        gf.sweep(flow, model, metrics={name: lambda m: 0.0}, **both)
    assert [*tmp_path.iterdir()] == []


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


def in_threads(*calls):
    """What each call gives, all at the same time."""
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        barrier = threading.Barrier(len(calls))
        begin = lambda call: (barrier.wait(), call())[1]
        return [future.result() for future in [pool.submit(begin, c) for c in calls]]


class Meets:
    """Is described only while another thread describes it too."""

    barrier = threading.Barrier(2, timeout=20)

    @property
    def __dict__(self):
        self.barrier.wait()
        return {}


def test_what_two_threads_describe_at_a_time():
    shared = Norm({"p": 3, "q": Meets()})
    found = in_threads(lambda: describe(shared), lambda: describe([shared]))
    assert found[0] == {"type": "Norm", "p": {"p": 3, "q": "Meets"}}
    assert found[1] == [found[0]]


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


def test_a_sweep_from_a_selection(tmp_path):
    flow, model, metrics = make(0)
    again = dict(flow=flow, model=model, metrics=metrics)
    options = dict(saves=3, weight_decay=[0.1, 0.2, 0.3])
    options |= dict(progress=False, metrics=metrics)
    descent = lambda rate: dict(run=gf.Descent(rate, steps=9))
    store = lambda name: gf.Store(tmp_path / name, parameters=True, chunk=4)
    sweep = gf.sweep(flow, model, store=store("a"), **options, **descent(RATES))
    data = sweep.to_xarray()
    assert data.lane.values.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    data.attrs["causes"] = {"5": "OSError: gone"}
    part = gf.as_sweep(data.isel(learning_rate=1), **again)
    lanes = gf.sweep(flow, model, **options, **descent(RATES[1]))
    assert part.causes == {2: "OSError: gone"}
    assert str(part).replace("  RAISED: OSError: gone", "") != str(part)
    np.testing.assert_array_equal(part[1].models.weights, lanes[1].models.weights)
    one = gf.as_sweep(data.isel(learning_rate=1, weight_decay=1), **again)
    np.testing.assert_array_equal(one[0].models.weights, lanes[1].models.weights)
    options |= dict(zipped=[("learning_rate", "weight_decay")], **descent(RATES))
    data = gf.sweep(flow, model, store=store("b"), **options).to_xarray()
    assert (
        data.weight_decay.dims == ("learning_rate",) and "weight_decay" in data.coords
    )
    assert str(gf.as_sweep(data, **again)) == str(gf.sweep(flow, model, **options))


def test_a_sweep_is_of_one_problem(whole):
    flow, model, metrics = make(2)
    with pytest.raises(ValueError, match="select one value of seed"):
        gf.as_sweep(whole[1], flow, model, metrics=metrics)
    one = gf.as_sweep(whole[1].sel(seed=2), flow, model, metrics=metrics)
    assert one.dims == ("learning_rate",) and one.fixed["weight_decay"] == 0.1


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
