"""The lanes of a sweep, run for a store chunk by chunk."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax

from ..runs.path import Path
from .checkpoints import Checkpoints
from .programs import Batch, run_lanes
from .progress import Bars
from .recipe import Lane, Problem, Recipe, Unlike
from .stack import blank, Owned, stack


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
