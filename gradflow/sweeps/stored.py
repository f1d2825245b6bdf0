"""Runs the lanes of a sweep: all of them, or chunk by chunk into a store."""

from collections.abc import Mapping
from pathlib import Path as File
from typing import Any, NamedTuple

import jax
import numpy as np

from ..results import CODES
from ..runs.columns import columns
from ..runs.until import words_of
from .axes import Axes, lanes_of_block
from .checkpoints import Checkpoints
from .columns import parameter_columns
from .identity import about, describe
from .lanes import AbstractLanes
from .on_disk import settings, StoredPaths, StoredProblems
from .open import open_results
from .options import Store
from .plan import Problem
from .problems import Problems
from .programs import Batch
from .progress import ProgressBars
from .result import Sweep
from .runner import first_shape, fitting, Ran, Runner
from .store import blocks_of, pending, remove_stale, ZarrStore


class _Chunks(NamedTuple):
    """The chunks of a store: blocks of lanes."""

    axes: Axes
    block: tuple[int, ...]
    """The shape of a chunk, along the dimensions."""
    count: int

    def lanes(self, number: int) -> list[int]:
        """The numbers of the lanes of a chunk."""
        return lanes_of_block(self.axes.shape, self.block, number)[1]


def run_stored(
    lanes: AbstractLanes, batch: Batch, progress: bool | Mapping[str, str], kept: Store
) -> Sweep:
    """The chunks that the store does not have, as far as they are for this process;
    returns what is in the store then."""
    plan = lanes.plan
    processes, process = jax.process_count(), jax.process_index()
    store = ZarrStore(File(kept.path), process)
    remove_stale(store.path, processes)
    fit = fitting(lanes, batch, len(plan.axes))
    size = kept.chunk or store.chunk() or max(16, fit)
    chunks = _Chunks(plan.axes, *blocks_of(plan.axes, size))
    attributes = _attributes(lanes.problems, chunks.block, kept.parameters)
    store.prepare(plan.axes, attributes)
    folder = store.path / "chunks" / "checkpoints"
    checkpoints = Checkpoints(folder, kept.checkpoint)

    def keep(number: int, ran: Ran) -> None:
        _write(store, number, chunks, ran, kept.parameters)
        checkpoints.remove(map(str, chunks.lanes(number)))

    # The expensive ones first, and so in turn for each process.
    cost = [-sum(map(lanes.cost, chunks.lanes(n))) for n in range(chunks.count)]
    order = sorted(range(chunks.count), key=cost.__getitem__)
    # Each looks at its share; then all see the same, and share what is left.
    mine = order[process::processes]
    for number in set(mine) - set(pending(store, mine)):
        checkpoints.remove(map(str, chunks.lanes(number)))
        if kept.retry and store.marker(number)["causes"]:
            store.remove_chunk(number)
    _wait_for_all_processes("looked at the store")
    left = [number for number in order if not store.is_finished(number)]
    _wait_for_all_processes("shared the chunks")
    todo = left[process::processes]
    total = sum(len(chunks.lanes(number)) for number in todo)
    most = min(fit, int(np.prod(chunks.block)))
    held: list[tuple[int, Ran]] = []
    """Chunks in which no lane has run."""
    some_ran = len(left) < chunks.count
    shape = first_shape(lanes) if todo else None
    with ProgressBars(plan.axes, total, progress) as bars:
        checkpoints.part_done = bars.part_done
        runner = Runner(lanes, batch, bars, most, shape)
        for number in todo:
            if store.is_finished(number):  # by another run of the same
                continue
            ran = runner.run(chunks.lanes(number), checkpoints)
            held.append((number, ran))
            some_ran = some_ran or bool(ran.done)
            while some_ran and held:
                keep(*held.pop(0))
    # Where no lane at all has run, the mistake is not in the lanes.
    if held and processes == 1:
        assert held[0][1].error is not None
        raise held[0][1].error
    for number, ran in held:
        keep(number, ran)
    _wait_for_all_processes("computed all chunks")
    checkpoints.end()
    return _opened(lanes, kept, check=process == 0)


def _opened(lanes: AbstractLanes, kept: Store, *, check: bool) -> Sweep:
    """The sweep of a store, with what its paths have from their problems."""
    plan, results = lanes.plan, open_results(kept.path, check=check)
    causes = {int(lane): cause for lane, cause in results.attrs["causes"].items()}
    problems = StoredProblems(lanes.problems, len(plan.axes))
    given = settings(plan.axes, plan.fixed)
    paths = StoredPaths(str(kept.path), given, problems, results)
    owned = problems if plan.count_problems > 1 else ()
    return Sweep(paths, plan.axes, owned, causes, plan.fixed_numbers)


def _wait_for_all_processes(what: str) -> None:
    """Until all have done what it says."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"gradflow.sweep: {what}")


def _attributes(
    problems: Problems, block: tuple[int, ...], parameters: bool
) -> dict[str, Any]:
    """What tells the sweep of a store from others, and how it was made."""
    plan = problems.plan
    axes, make = plan.axes, plan.make
    try:
        first: dict[str, Any] | str = dict(
            zip(Problem._fields, problems.of(0), strict=True)
        )
    except Exception as error:
        first = type(error).__name__  # its words may differ from call to call
    values = plan.fixed | plan.asked
    config = {
        "problem": None if isinstance(make, Problem) else make,
        "first": first,
        "axes": {k: list(v) for k, v in axes.values.items()},
        "dimensions": dict(axes.along),
        **{k: v for k, v in values.items() if v is not None},
        "metrics": plan.metrics,
        "chunk": block,
        "parameters": parameters,
        "float64": jax.config.read("jax_enable_x64"),
    }
    more = {"seeds": describe(axes.values["seed"])} if "seed" in axes.values else {}
    if until := words_of(plan.asked["until"]):
        more["until"] = until
    return {"config": describe(config), **more, **about()}


def _write(
    store: ZarrStore, number: int, chunks: _Chunks, ran: Ran, parameters: bool
) -> None:
    """Writes a chunk."""
    if ran.done:
        kept = {
            name: (dims, _counted(name, values))
            for name, (dims, values) in columns(ran.paths, ran.watched).items()
        }
        if parameters:
            kept |= parameter_columns(ran.paths)
    else:
        code = np.full(len(ran.causes), CODES["raised"], np.int32)
        kept = {"result": ((), code)}
    notes = {
        "causes": {str(i): cause for i, cause in ran.causes.items()},
        "device": jax.local_devices()[0].device_kind,
        "solver": ran.solvers,
    }
    store.write(number, chunks.axes, chunks.block, kept, notes)


def _counted(name: str, values: np.ndarray) -> np.ndarray:
    """Counts as floats, of which some may be missing."""
    return values if name == "result" or values.dtype.kind == "f" else values * 1.0
