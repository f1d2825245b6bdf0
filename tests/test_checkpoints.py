"""Runs in parts end as in one, and interrupted lanes go on from files."""

import re

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax.core import Tracer

import gradflow as gf
from gradflow.metrics import Metric
from gradflow.runs.descent import prepare_descent
from gradflow.runs.solve import Solve, solve, solve_part
from gradflow.runs.steps import descend, descend_part
from gradflow.sweeps import (
    checkpoints as _parts,
    programs as _programs,
    progress,
)

TASK = gf.tasks.diagonal_network(jr.key(0), samples=5, dim=12, sparsity=2)


def in_parts(part, args, counts):
    """The path by parts of so many steps, over and over, and how many there were."""
    state, ended, number = None, False, 0
    while not ended:
        steps = jnp.asarray(counts[number % len(counts)])
        path, state, ended = part(args, state, steps)
        number += 1
    return path, number


def equal(a, b):
    """Whether all arrays of two paths have the same bits."""
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    arrays = [(x, y) for x, y in leaves if isinstance(x, jax.Array)]
    assert len(arrays) > 5
    return all(np.array_equal(x, y, equal_nan=True) for x, y in arrays)


@pytest.mark.slow
def test_a_flow_in_parts():
    """One that lands on kinks."""
    lam, solver = 1e-2, gf.KKT4()
    flow = gf.GradientFlow(TASK.loss, penalty=gf.L1())
    term, params = flow.term(TASK.model)
    ts = jnp.concatenate([jnp.zeros(1), jnp.geomspace(1e-2, 2 / lam, 9)])
    watched = {"test": Metric(TASK.metrics["test"].fn)}
    args = Solve.of(
        term, params, jnp.asarray(lam), ts, watched, solver, rtol=1e-5, max_steps=10_000
    )
    whole, number = in_parts(solve_part, args, [10_000])
    assert number == 1 and bool(whole.succeeded) and int(whole.stats.steps) > 25
    few, number = in_parts(solve_part, args, [10])
    assert number > 2
    assert equal(few, in_parts(solve_part, args, [10, 3, 12])[0])
    assert int(few.stats.steps) == int(whole.stats.steps)
    for a, b in zip(
        jax.tree.leaves(few.params), jax.tree.leaves(whole.params), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(few.metrics["test"], whole.metrics["test"], rtol=1e-9)
    # And by one program from start to end, which rounds in another way.
    for a, b in zip(
        jax.tree.leaves(solve(args).params), jax.tree.leaves(whole.params), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_the_budget_of_steps_is_that_of_all_parts():
    term, params = TASK.flow.term(TASK.model)
    ts = jnp.array([0.0, 1.0, 1e3])
    args = Solve.of(
        term, params, jnp.asarray(1e-2), ts, {}, gf.KKT4(), rtol=1e-6, max_steps=25
    )
    path, number = in_parts(solve_part, args, [10])
    assert number == 3 and int(path.stats.steps) == 25
    assert bool(path.result == gf.RESULTS.out_of_steps)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_descent_in_parts(batch_size):
    args = prepare_descent(
        TASK.flow, TASK.model, {}, weight_decay=1e-2, learning_rate=1e-2,
        init_scale=1.0, steps=200, slow_time=None, t1=None, at=None, saves=12,
        method="decoupled", optimiser=optax.adam, batch_size=batch_size,
        key=jr.key(1) if batch_size else None,
    )  # fmt: skip
    whole = descend(args)
    few, number = in_parts(descend_part, args, [30])
    assert number == 7 and np.isfinite(whole.train_loss).all()
    assert equal(few, in_parts(descend_part, args, [30, 1, 77])[0])
    np.testing.assert_allclose(few.train_loss, whole.train_loss, rtol=1e-9)


@pytest.mark.parametrize("gone_at", [101, 102])
def test_a_descent_that_leaves_the_finite_range_in_parts(gone_at):
    """Blocks are of two steps."""

    def update(force, count, params=None):
        kick = jnp.where(count + 1 == gone_at, jnp.inf, 0.0)
        return jax.tree.map(lambda p: kick + 0 * p, params), count + 1

    kicked = optax.GradientTransformation(lambda params: jnp.zeros((), int), update)
    args = prepare_descent(
        TASK.flow, TASK.model, {}, weight_decay=0.0, learning_rate=1e-2,
        init_scale=1.0, steps=None, slow_time=None, t1=None, saves=12,
        at=np.array([0, gone_at - 1, gone_at, 400], np.int32), method="subgradient",
        optimiser=kicked, batch_size=None, key=None,
    )  # fmt: skip
    whole = in_parts(descend_part, args, [400])[0]
    for counts in [101], [102], [60]:
        path, _ = in_parts(descend_part, args, counts)
        assert equal(whole, path)
    assert bool(path.result == gf.RESULTS.overshot)
    assert np.isfinite(path.train_loss).tolist() == [True, True, False, False]


@pytest.mark.slow
def test_a_pause_before_any_step_was_accepted():
    flow = gf.GradientFlow(TASK.loss, penalty=gf.L2())
    term, params = flow.term(TASK.model)
    ts = jnp.concatenate([jnp.zeros(1), jnp.geomspace(1e-2, 1e-1, 9)])
    watched = {"test": Metric(TASK.metrics["test"].fn)}
    args = Solve.of(
        term,
        params,
        jnp.asarray(0.1),
        ts,
        watched,
        gf.RKC2(),
        rtol=1e-9,
        max_steps=10_000,
    )
    _, state, _ = solve_part(args, None, jnp.asarray(1))
    assert state.counts.tolist() == [1, 0, 1]
    path, _ = in_parts(solve_part, args, [1, 1000])
    assert bool(path.succeeded) and np.isfinite(path.train_loss).all()


def test_random_keys_are_kept(tmp_path):
    checkpoints = _parts.Checkpoints(tmp_path, 0.0)
    state = {
        "keys": jr.split(jr.key(3), 2),
        "other": jr.key(1, impl="rbg"),
        "none": None,
        "half": jnp.arange(3, dtype=jnp.bfloat16),
    }
    like = lambda: jax.eval_shape(lambda: state)
    assert checkpoints.load("1", like) is None
    checkpoints.save("1", state)
    read = checkpoints.load("1", like)
    assert jax.tree.structure(read) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(read), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype and bool(jnp.all(a == b))


@pytest.mark.slow
def test_a_descent_with_random_keys_in_lockstep(tmp_path, parts):
    def noisy(rate):
        return optax.chain(optax.add_noise(0.1, 0.5, jr.key(3)), optax.sgd(rate))

    steps: dict = dict(
        learning_rate=1e-2, steps=30, batch_size=2, key=jr.key(1), optimiser=noisy
    )
    options: dict = dict(saves=4, progress=False)
    kept = gf.sweep(
        TASK.flow, TASK.model, weight_decay=[1e-1, 1e-2], batch="vmap",
        store=gf.Store(tmp_path / "s.zarr", checkpoint=0.0), run=gf.Descent(**steps),
        **options,
    )  # fmt: skip
    alone = gf.descent(TASK.flow, TASK.model, weight_decay=1e-2, **steps, **options)
    np.testing.assert_allclose(kept.train_loss[1], alone.train_loss, rtol=1e-9)


def test_what_fills_a_program_up_takes_one_step(tmp_path):
    checkpoints = _parts.Checkpoints(tmp_path, 1e9)
    checkpoints._last = {"a": np.inf, "b": np.inf}
    lanes = [_programs.Lane(None, "", name=name) for name in "ab"]
    taken = []

    def launch(some, size):
        assert len(some) == size == 3
        taken.append([int(lane.steps) for lane in some])
        return lambda: [(path, None, True)] * size

    path = gf.Path.__new__(gf.Path)
    first = [_programs.Part(path, None, ended) for ended in (True, False)]
    program = _programs.Program([0, 1], lanes, 3)
    _programs._run_on(program, first, launch, checkpoints)
    assert taken == [[256, 1, 1]]


class Cut(BaseException):
    """As if the process had been ended."""


LAMS = [1e-1, 1e-2, 1e-3]
OPTIONS = dict(slow_time=2.0, saves=5, solver=gf.KKT4(), progress=False)


def run(path, checkpoint=0.0, **options):
    store = gf.Store(path, chunk=3, checkpoint=checkpoint)
    options = OPTIONS | options
    return gf.sweep(TASK.flow, TASK.model, weight_decay=LAMS, store=store, **options)


def contents(path):
    files = (f for f in sorted(path.rglob("*")) if f.is_file())
    return {str(f.relative_to(path)): f.read_bytes() for f in files}


@pytest.fixture
def parts(monkeypatch):
    """Parts of 10 steps; returns which have begun: whether from the start."""
    monkeypatch.setattr(_programs, "FIRST", 10)
    monkeypatch.setattr(_parts, "FIRST", 10)
    begun = []
    for whole, part in list(_programs._PARTS.items()):

        def counted(*args, part=part):
            if isinstance(args[-1], jax.Array) and not isinstance(args[-1], Tracer):
                begun.append(args[-2] is None)
            return part(*args)

        monkeypatch.setitem(_programs._PARTS, whole, counted)
    return begun


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["loop", "vmap"])
def test_a_lane_that_was_cut_off_goes_on(tmp_path, monkeypatch, parts, batch):
    whole = tmp_path / "whole.zarr"
    run(whole, batch=batch)
    names = contents(whole)
    assert not any("checkpoint" in name for name in names)
    path = tmp_path / "cut.zarr"
    save = _parts.Checkpoints.save

    def fail(self, name, state):
        if name == "1" and int(state.counts[0]) > 10:
            raise Cut
        save(self, name, state)

    with monkeypatch.context() as patch:
        patch.setattr(_parts.Checkpoints, "save", fail)
        with pytest.raises(Cut):
            run(path, batch=batch)
    left = {f.name for f in (path / "chunks" / "checkpoints").iterdir()}
    assert "1.eqx" in left and all(name.endswith(".eqx") for name in left)
    parts.clear()
    run(path, batch=batch)
    assert contents(path) == names
    if batch == "loop":  # lanes 0 and 1 had begun
        assert sum(parts) == 1 and parts.count(False) >= 2


@pytest.mark.slow
def test_the_bar_tells_how_far_a_long_lane_is(tmp_path, monkeypatch, parts, capsys):
    monkeypatch.setattr(progress.time, "perf_counter", iter(range(10**6)).__next__)
    run(tmp_path / "s.zarr", progress=True)
    lines = capsys.readouterr().err
    assert re.search(r"λ 0.001: [1-4] of 5 saved times", lines), lines


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_read(tmp_path, parts):
    whole, path = tmp_path / "whole.zarr", tmp_path / "bad.zarr"
    run(whole)
    run(path)
    (path / "chunks" / "000000" / "zarr.json").unlink()
    (path / "chunks" / "000000").rmdir()
    (path / "chunks" / "checkpoints").mkdir()
    (path / "chunks" / "checkpoints" / "1.eqx").write_bytes(b"half")
    with pytest.warns(UserWarning, match=r"1\.eqx cannot be read .* starts anew"):
        run(path)
    assert contents(path) == contents(whole)


def test_a_checkpoint_that_cannot_be_written(tmp_path, monkeypatch, parts):
    whole, path = tmp_path / "whole.zarr", tmp_path / "full.zarr"
    run(whole)

    def full(*args):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(_parts.eqx, "tree_serialise_leaves", full)
        with pytest.warns(UserWarning, match="cannot be written .no space left"):
            run(path)
    assert contents(path) == contents(whole)


def test_seconds_between_checkpoints(tmp_path):
    with pytest.raises(
        ValueError, match="checkpoint: expected a finite number, 0 or more"
    ):
        run(tmp_path / "s.zarr", checkpoint=-1.0)


def test_what_is_not_reached_yet_is_no_error(tmp_path):
    """With `jax_debug_nans` healthy lanes pass, in parts as well."""
    steps = dict(run=gf.Descent(0.01, steps=700))
    with jax.debug_nans(True):
        lanes = gf.sweep(
            TASK.flow, TASK.model, weight_decay=[0.1, 0.2], saves=5, progress=False,
            store=tmp_path / "a", **steps,
        )  # fmt: skip
    assert lanes.succeeded.all() and np.isfinite(lanes.train_loss).all()
