"""Runs the lanes of a sweep: all of them, or chunk by chunk into a store."""

from pathlib import Path as File
from typing import Any

import jax
import numpy as np

from ..results import CODES
from ..runs.columns import columns
from .axes import Axes, lanes_of_block
from .checkpoints import Checkpoints
from .columns import parameter_columns
from .identity import about, describe
from .lanes import fitting, Lanes, Runner
from .open import open_results
from .options import Store
from .programs import Batch
from .progress import Bars
from .recipe import Problem, Recipe
from .store import pending, plan, remove_stale, ZarrStore


def run_stored(
    recipe: Recipe,
    batch: Batch,
    progress: bool,
    kept: Store,
) -> Any:
    """The chunks that the store does not have, as far as they are for this process;
    returns the store, opened."""
    axes = recipe.axes
    processes, process = jax.process_count(), jax.process_index()
    store = ZarrStore(File(kept.path), process)
    remove_stale(store.path, processes)
    fit = fitting(recipe, batch, len(axes))
    block, count = plan(axes, kept.chunk or store.chunk() or max(16, fit))
    store.prepare(axes, _attributes(recipe, block, kept.parameters))
    lanes_of = lambda number: lanes_of_block(axes.shape, block, number)[1]
    # The expensive ones first, and so in turn for each process.
    order = sorted(range(count), key=lambda n: -sum(map(recipe.cost, lanes_of(n))))
    folder = store.path / "chunks" / "checkpoints"
    checkpoints = Checkpoints(folder, kept.checkpoint)
    forget = lambda number: checkpoints.forget(map(str, lanes_of(number)))
    # Each looks at its share; then all see the same, and share what is left.
    mine = order[process::processes]
    for number in set(mine) - set(pending(store, mine)):
        forget(number)
        if kept.retry and store.marker(number)["causes"]:
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
                    _write(store, one, axes, block, found, kept.parameters)
                    forget(one)
                held = []
    if held and processes == 1:
        error = held[0][1].error
        assert error is not None
        raise error
    for one, found in held:
        _write(store, one, axes, block, found, kept.parameters)
        forget(one)
    _meet("computed all chunks")
    checkpoints.end()
    return open_results(kept.path, check=process == 0)


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
    store: ZarrStore,
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
        code = np.full(len(lanes.causes), CODES["raised"], np.int32)
        kept = {"result": ((), code)}
    notes = {
        "causes": {str(i): cause for i, cause in lanes.causes.items()},
        "device": jax.local_devices()[0].device_kind,
        "solver": lanes.solvers,
    }
    store.write(number, axes, block, kept, notes)


def _counted(name: str, values: np.ndarray) -> np.ndarray:
    """Counts as floats, of which some may be missing."""
    return values if name == "result" or values.dtype.kind == "f" else values * 1.0
