"""Runs the lanes of a sweep: all of them, or chunk by chunk into a store."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path as File
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from ._axes import Axes, lanes_of_block
from ._labelled import columns, parameter_columns
from ._lanes import Batch, blank, Lane, Owned, Problem, Recipe, run_lanes, stack
from .path import Path
from .results import RESULTS
from .store import about, describe, open_results, pending, plan, remove_stale, Store


class Runner:
    """Runs lanes of a recipe under a bar."""

    def __init__(self, recipe: Recipe, batch: Batch, bar: Any):
        self.recipe, self.batch, self.bar = recipe, batch, bar
        self.failed = 0
        # The errors of one problem's own making are for the caller to know.
        self.one = isinstance(recipe.make, Problem)

    def run(self, numbers: Sequence[int], size: int | None = None) -> "Lanes":
        owned: dict[Any, Owned] = {}
        catch = (RuntimeError,) if self.one else (Exception,)
        lanes = self._made(numbers, owned)
        found = run_lanes(lanes, self.batch, size, self._tell, catch=catch)
        self.bar.set_postfix_str(f"{self.failed} failed")
        return Lanes(self.recipe, numbers, found, owned)

    def _made(
        self, numbers: Sequence[int], owned: dict[Any, Owned]
    ) -> Iterator[Lane | Exception]:
        for i in numbers:
            try:
                lane = self.recipe.lane(i)
                if (owner := self.recipe.owner(i)) not in owned:
                    owned[owner] = self.recipe.owned(i)
                here = self.recipe.axes.words(i)
                self.bar.set_postfix_str(f"{here}, {self.failed} failed")
                yield lane
            except Exception as error:
                if self.one:
                    raise
                yield error

    def _tell(self, path: Path | Exception) -> None:
        self.failed += isinstance(path, Exception) or not bool(path.succeeded)
        self.bar.update()


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
        if not self.done:
            return
        lengths = sorted({path.t.shape[0] for path in self.done})
        if len(lengths) > 1:
            raise ValueError(
                f"saves: the lanes have from {lengths[0]} to {lengths[-1]} times to "
                "save, as some take few steps; give fewer saves, or at."
            )
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


def run_stored(
    recipe: Recipe,
    batch: Batch,
    progress: bool,
    path: str | os.PathLike,
    chunk: int | None,
    parameters: bool,
) -> Any:
    """All chunks that the store does not have; returns the store, opened."""
    axes = recipe.axes
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk: expected a number of lanes from 1 on, got {chunk}.")
    block, count = plan(axes, chunk or 16)
    store = Store(File(path))
    remove_stale(store.path, 1)
    store.prepare(axes, _attributes(recipe, block, parameters))
    numbers = list(range(count))
    todo = list(pending(store, numbers))
    size = int(np.prod(block))
    lanes_of = lambda number: lanes_of_block(axes.shape, block, number)[1]
    left = sum(len(lanes_of(number)) for number in todo)
    held: list[tuple[int, Lanes]] = []
    with tqdm(
        total=len(axes), initial=len(axes) - left, unit="lane", disable=not progress
    ) as bar:
        runner = Runner(recipe, batch, bar)
        for number in todo:
            lanes = runner.run(lanes_of(number), size)
            # Where no lane at all has run, the mistake is not in the lanes.
            held.append((number, lanes))
            if lanes.done or len(todo) < count:
                for one, found in held:
                    _write(store, one, axes, block, found, parameters)
                held = []
    if held:
        error = held[0][1].error
        assert error is not None
        raise error
    return open_results(path)


def _attributes(
    recipe: Recipe, block: tuple[int, ...], parameters: bool
) -> dict[str, Any]:
    axes, make = recipe.axes, recipe.make
    try:
        first: Any = dict(zip(Problem._fields, recipe.problem(0), strict=True))
    except Exception as error:
        first = f"{type(error).__name__}: {error}"
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
            for name, values in columns(
                lanes.paths, [own.watched for own in lanes.owned]
            ).items()
        }
        if parameters:
            kept |= parameter_columns(lanes.paths)
    else:
        code = int(RESULTS.raised._value)
        kept = {"result": ((), np.full(len(lanes.causes), code, np.int32))}
    notes = {
        "causes": {str(i): cause for i, cause in lanes.causes.items()},
        "device": jax.devices()[0].device_kind,
    }
    store.write(number, axes, block, kept, notes)


def _counted(name: str, values: np.ndarray) -> np.ndarray:
    """Counts as floats, of which some may be missing."""
    return values if name == "result" or values.dtype.kind == "f" else values * 1.0
