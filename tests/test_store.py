"""Sweeps on disk: whole chunks only, gone on with, and nothing mixed or lost."""

import json
import shutil

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from stores import BUILT, contents, leftovers, make, RATES, run, SEEDS

import gradflow as gf

xr = pytest.importorskip("xarray")
pytest.importorskip("zarr")


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


def test_one_that_knew_fewer_results_is_gone_on_with(tmp_path):
    """As one does that an earlier version began; but not one whose numbers differ."""
    path = tmp_path / "sweep.zarr"
    run(path)
    file = path / "result" / "zarr.json"
    whole = file.read_text()
    told = json.loads(whole)
    told["attributes"]["flag_values"].pop()
    names = told["attributes"]["flag_meanings"].split()
    told["attributes"]["flag_meanings"] = " ".join(names[:-1])
    file.write_text(json.dumps(told))
    shutil.rmtree(path / "chunks" / "000001")
    run(path)
    assert json.loads(file.read_text()) == json.loads(whole)
    told["attributes"]["flag_values"][1] = 7
    file.write_text(json.dumps(told))
    shutil.rmtree(path / "chunks" / "000001")
    with pytest.raises(ValueError, match="result differs from chunk to chunk"):
        run(path)


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
