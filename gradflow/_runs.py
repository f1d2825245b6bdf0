"""Runs the lanes of a sweep: all of them, or chunk by chunk into a store."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path as File
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from ._axes import Axes, lanes_of_block
from ._configuration import about, describe
from ._labelled import columns, parameter_columns
from ._lanes import blank, Lane, Owned, Problem, Recipe, stack, Unlike
from ._parts import Checkpoints
from ._programs import Batch, run_lanes
from .path import Path
from .results import RESULTS
from .simulate import given_up, SOLVER
from .store import open_results, pending, plan, remove_stale, Store


class Bars:
    """A line for each device of this process: lanes done and failed, steps a second,
    the time that is left, and the lane that took most."""

    def __init__(self, axes: Axes, total: int, progress: bool):
        devices, process = jax.local_devices(), jax.process_index()
        where = f"process {process}, " if jax.process_count() > 1 else ""
        many = len(devices) > 1 or bool(where)
        # A log file gets whole lines, and those now and then only.
        log = not sys.stderr.isatty() and "ipykernel" not in sys.modules
        self.axes = axes
        self.failed, self.steps = [0] * len(devices), [0.0] * len(devices)
        self.worst = [(0.0, -1)] * len(devices)
        self.start = self.shown = time.perf_counter()
        self.bars = [
            tqdm(
                total=total // len(devices) + (k < total % len(devices)),
                desc=f"{where}{device.platform} {k}" if many else None,
                unit="lane",
                position=k if many and not log else None,
                mininterval=10.0 if log else 0.1,
                bar_format="{l_bar}{r_bar}\n" if log else None,
                disable=not progress,
            )
            for k, device in enumerate(devices)
        ]

    def tell(self, lane: int, path: Path | Exception, device: int) -> None:
        bar = self.bars[device]
        if isinstance(path, Exception):
            self.failed[device] += 1
        else:
            self.failed[device] += int(path.result._value) not in _REACHED
            steps = float(path.stats["steps"])
            self.steps[device] += steps
            self.worst[device] = max(self.worst[device], (steps, lane))
        if not bar.disable:
            rate = self.steps[device] / (time.perf_counter() - self.start)
            worst = self.worst[device][1]
            where = f", most at {self.axes.words(worst)}" if worst >= 0 else ""
            bar.set_postfix_str(
                f"{self.failed[device]} failed, {rate:.3g} steps/s{where}",
                refresh=False,
            )
        bar.update()

    def given_up(self, lane: Lane, path: Path) -> None:
        """Says that the solver of a lane, which was only tried, has failed."""
        if self.bars[0].disable or lane.again is None:
            return
        solver = lane.again.args[SOLVER]
        where = self.axes.words(int(lane.name))
        tqdm.write(f"{where}: {given_up(path, solver)}", file=sys.stderr)

    def under_way(self, name: str, path: Path) -> None:
        """Shows how far a lane is that takes long."""
        bar, now = self.bars[0], time.perf_counter()
        if bar.disable or now - self.shown < max(bar.mininterval, 1.0):
            return
        self.shown = now
        lane = int(name.partition("-")[0])
        done = int(np.isfinite(np.asarray(path.train_loss)).sum())
        words = f"{self.axes.words(lane)}: {done} of {len(path.t)} saved times"
        bar.set_postfix_str(words)

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, *_: Any) -> None:
        for bar in self.bars:
            bar.close()


_REACHED = [int(r._value) for r in (RESULTS.successful, RESULTS.slid)]


class Runner:
    """Runs lanes of a recipe under bars."""

    def __init__(self, recipe: Recipe, batch: Batch, bars: Bars):
        self.recipe, self.batch, self.bars = recipe, batch, bars
        # The errors of one problem's own making are for the caller to know.
        self.one = isinstance(recipe.make, Problem)

    def run(
        self,
        numbers: Sequence[int],
        size: int | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> "Lanes":
        owned: dict[Any, Owned] = {}
        catch = (RuntimeError,) if self.one else (Exception,)
        lanes = self._made(numbers, owned)
        tell = lambda i, path, device: self.bars.tell(numbers[i], path, device)
        found = run_lanes(
            lanes,
            self.batch,
            size,
            tell,
            catch=catch,
            checkpoints=checkpoints,
            given_up=self.bars.given_up,
        )
        return Lanes(self.recipe, numbers, found, owned)

    def _made(
        self, numbers: Sequence[int], owned: dict[Any, Owned]
    ) -> Iterator[Lane | Exception]:
        for i in numbers:
            try:
                lane = self.recipe.lane(i)
                if (owner := self.recipe.owner(i)) not in owned:
                    owned[owner] = self.recipe.owned(i)
                yield lane
            except Exception as error:
                if self.one and not isinstance(error, Unlike):
                    raise
                yield error


class Lanes:
    """What lanes gave: of each a path, or an error."""

    def __init__(
        self,
        recipe: Recipe,
        numbers: Sequence[int],
        found: Sequence[Path | Exception],
        owned: dict[Any, Owned],
    ):
        self.done = [path for path in found if isinstance(path, Path)]
        self.causes = {
            i: f"{type(error).__name__}: {error}"
            for i, error in zip(numbers, found, strict=True)
            if isinstance(error, Exception)
        }
        errors = (error for error in found if isinstance(error, Exception))
        self.error = next(errors, None)
        self.solvers = sorted({path.stats["solver"] for path in self.done})
        if not self.done:
            return
        lams = [recipe.value(i, "weight_decay") for i in numbers]
        self.paths = stack(
            [
                path if isinstance(path, Path) else blank(self.done[0], lam)
                for path, lam in zip(found, lams, strict=True)
            ]
        )
        owners = [recipe.owner(i) for i in numbers]
        first = next(iter(owned.values()))
        self.many = len(set(owners)) > 1
        self.owned = tuple(owned.get(owner, first) for owner in owners)
        self.watched = [
            {} if i in self.causes else own.watched
            for i, own in zip(numbers, self.owned, strict=True)
        ]
        """The metrics of each lane, none of one that raised."""


def fitting(recipe: Recipe, batch: Batch, most: int) -> int:
    """How many lanes to run as one program, up to `most`: in lockstep as many as fit
    into the memory of all devices, by estimate; in loops eight a device."""
    devices = jax.local_devices()
    if batch == "loop":
        return max(1, min(most, 8 * len(devices)))
    try:
        each = recipe.bytes_per_lane(0)
    except Exception:  # which is told when the lane is run
        return most
    known = devices[0].memory_stats() or {}
    room = 0.7 * known.get("bytes_limit", 4e9) * len(devices)
    return max(1, min(most, int(room // each)))


def run_stored(
    recipe: Recipe,
    batch: Batch,
    progress: bool,
    path: str | os.PathLike,
    chunk: int | None,
    parameters: bool,
    checkpoint: float,
    retry: bool,
) -> Any:
    """The chunks that the store does not have, as far as they are for this process;
    returns the store, opened."""
    axes = recipe.axes
    processes, process = jax.process_count(), jax.process_index()
    store = Store(File(path), process)
    remove_stale(store.path, processes)
    fit = fitting(recipe, batch, len(axes))
    block, count = plan(axes, chunk or store.chunk() or max(16, fit))
    store.prepare(axes, _attributes(recipe, block, parameters))
    lanes_of = lambda number: lanes_of_block(axes.shape, block, number)[1]
    # The expensive ones first, and so in turn for each process.
    order = sorted(range(count), key=lambda n: -sum(map(recipe.cost, lanes_of(n))))
    folder = store.path / "chunks" / "checkpoints"
    checkpoints = Checkpoints(folder, checkpoint)
    forget = lambda number: checkpoints.forget(map(str, lanes_of(number)))
    # Each looks at its share; then all see the same, and share what is left.
    mine = order[process::processes]
    for number in set(mine) - set(pending(store, mine)):
        forget(number)
        if retry and store.marker(number)["causes"]:
            store.forget(number)
    _meet("looked at the store")
    left = [number for number in order if not store.is_finished(number)]
    _meet("shared the chunks")
    todo = left[process::processes]
    held: list[tuple[int, Lanes]] = []
    ran = len(left) < count
    if todo:
        recipe.compare_with_first()
    total = sum(len(lanes_of(number)) for number in todo)
    with Bars(axes, total, progress) as bars:
        checkpoints.tell = bars.under_way
        runner = Runner(recipe, batch, bars)
        for number in todo:
            if store.is_finished(number):  # by another run of the same
                continue
            most = min(fit, int(np.prod(block)))
            lanes = runner.run(lanes_of(number), most, checkpoints)
            # Where no lane at all has run, the mistake is not in the lanes.
            held.append((number, lanes))
            ran = ran or bool(lanes.done)
            if ran:
                for one, found in held:
                    _write(store, one, axes, block, found, parameters)
                    forget(one)
                held = []
    if held and processes == 1:
        error = held[0][1].error
        assert error is not None
        raise error
    for one, found in held:
        _write(store, one, axes, block, found, parameters)
        forget(one)
    _meet("computed all chunks")
    checkpoints.end()
    return open_results(path, check=process == 0)


def _meet(what: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"gradflow.sweep: {what}")


def _attributes(
    recipe: Recipe, block: tuple[int, ...], parameters: bool
) -> dict[str, Any]:
    axes, make = recipe.axes, recipe.make
    try:
        first: Any = dict(zip(Problem._fields, recipe.problem(0), strict=True))
    except Exception as error:
        first = type(error).__name__  # its words may differ from call to call
    values = recipe.fixed | recipe.options
    config = {
        "problem": None if isinstance(make, Problem) else make,
        "first": first,
        "axes": {k: list(v) for k, v in axes.values.items()},
        "dimensions": dict(axes.along),
        **{k: v for k, v in values.items() if v is not None},
        "metrics": recipe.metrics,
        "chunk": block,
        "parameters": parameters,
        "float64": jax.config.read("jax_enable_x64"),
    }
    seeds = {"seeds": describe(axes.values["seed"])} if "seed" in axes.values else {}
    return {"config": describe(config), **seeds, **about()}


def _write(
    store: Store,
    number: int,
    axes: Axes,
    block: tuple[int, ...],
    lanes: Lanes,
    parameters: bool,
) -> None:
    if lanes.done:
        kept = {
            name: (("time",) * (values.ndim - 1), _counted(name, values))
            for name, values in columns(lanes.paths, lanes.watched).items()
        }
        if parameters:
            kept |= parameter_columns(lanes.paths)
    else:
        code = int(RESULTS.raised._value)
        kept = {"result": ((), np.full(len(lanes.causes), code, np.int32))}
    notes = {
        "causes": {str(i): cause for i, cause in lanes.causes.items()},
        "device": jax.local_devices()[0].device_kind,
        "solver": lanes.solvers,
    }
    store.write(number, axes, block, kept, notes)


def _counted(name: str, values: np.ndarray) -> np.ndarray:
    """Counts as floats, of which some may be missing."""
    return values if name == "result" or values.dtype.kind == "f" else values * 1.0
