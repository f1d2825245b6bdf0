"""Runs lanes under progress bars: all of a sweep, or chunk by chunk for a store."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax

from ..runs.path import Path
from .checkpoints import Checkpoints
from .lanes import AbstractLanes, Lane
from .memory import AtOnce, memory_left
from .programs import Batch, run_lanes
from .progress import ProgressBars
from .stack import blank, OfProblem, stack


class LaneDiffers(ValueError):
    """A lane whose results are not of the shape of the others'."""


class Shape(NamedTuple):
    """What is the same in the results of all lanes."""

    saves: int
    metrics: dict[str, tuple[int, ...]]
    """The shapes of all."""

    def check(self, own: "Shape") -> None:
        """Raises `LaneDiffers` unless a lane gives arrays like these."""
        if own.saves != self.saves:
            raise LaneDiffers(
                f"saves: this lane has {own.saves} times to save, and others "
                f"{self.saves}, as some take few steps; give fewer saves, or at."
            )
        if set(own.metrics) != set(self.metrics):
            raise LaneDiffers(
                f"metrics: this lane has {sorted(own.metrics)}, and others "
                f"{sorted(self.metrics)}."
            )
        for name, shape in own.metrics.items():
            if shape != self.metrics[name]:
                raise LaneDiffers(
                    f"metrics[{name!r}]: in this lane it has the shape {shape}, and in "
                    f"others {self.metrics[name]}."
                )


def first_shape(lanes: AbstractLanes) -> Shape | None:
    """That of the first lane that can be made: the same, whichever lanes are run, and
    by whom."""
    for number in range(len(lanes.plan.axes)):
        with contextlib.suppress(Exception):
            return _shape(lanes, number, lanes.lane(number))
    return None


def _shape(lanes: AbstractLanes, number: int, lane: Lane) -> Shape:
    return Shape(lane.run.saves, lanes.problems.metric_shapes(number))


class Runner:
    """Runs lanes under progress bars, `size` of them as one program, and compares each
    with `shape`; or with the first that is made, where none is given."""

    def __init__(
        self,
        lanes: AbstractLanes,
        batch: Batch,
        bars: ProgressBars,
        size: int,
        shape: Shape | None = None,
    ):
        self.lanes, self.bars, self.shape = lanes, bars, shape
        self.at_once = AtOnce(size)
        self.batch: Batch = batch
        # The errors of one problem's own making are for the caller to know.
        self.one = lanes.problems.one

    def run(
        self,
        numbers: Sequence[int],
        checkpoints: Checkpoints | None = None,
    ) -> "Ran":
        """Runs the lanes of these numbers."""
        problems: dict[tuple[int, ...], OfProblem] = {}
        found = run_lanes(
            self._made(numbers, problems),
            self.batch,
            self.at_once,
            lambda i, path, device: self.bars.lane_done(numbers[i], path, device),
            catch=(RuntimeError,) if self.one else (Exception,),
            checkpoints=checkpoints,
            given_up=self.bars.given_up,
        )
        return Ran(self.lanes, numbers, found, problems)

    def _made(
        self, numbers: Sequence[int], problems: dict[tuple[int, ...], OfProblem]
    ) -> Iterator[Lane | Exception]:
        """The lanes; what they have from their problems goes into `problems`."""
        for i in numbers:
            try:
                lane = self.lanes.lane(i)
                shape = _shape(self.lanes, i, lane)
                self.shape = self.shape or shape
                self.shape.check(shape)
                if (owner := self.lanes.plan.owner(i)) not in problems:
                    problems[owner] = self.lanes.problems.parts(i)
                yield lane
            except Exception as error:
                if self.one and not isinstance(error, LaneDiffers):
                    raise
                yield error


class Ran:
    """What lanes gave: of each a path, or an error."""

    def __init__(
        self,
        lanes: AbstractLanes,
        numbers: Sequence[int],
        found: Sequence[Path | Exception],
        problems: dict[tuple[int, ...], OfProblem],
    ):
        self.done = [path for path in found if isinstance(path, Path)]
        self.causes = {
            i: f"{type(error).__name__}: {error}"
            for i, error in zip(numbers, found, strict=True)
            if isinstance(error, Exception)
        }
        """The error of each lane that raised one."""
        errors = (error for error in found if isinstance(error, Exception))
        self.error = next(errors, None)
        self.solvers = sorted({str(path.stats.solver) for path in self.done})
        if not self.done:
            return
        lams = [lanes.plan.value(i, "weight_decay") for i in numbers]
        self.paths = stack(
            [
                path if isinstance(path, Path) else blank(self.done[0], lam)
                for path, lam in zip(found, lams, strict=True)
            ]
        )
        owners = [lanes.plan.owner(i) for i in numbers]
        first = next(iter(problems.values()))
        self.many = len(set(owners)) > 1
        self.problems = tuple(problems.get(owner, first) for owner in owners)
        """Of each lane, what its path has from its problem."""
        self.watched = [
            {} if i in self.causes else own.watched
            for i, own in zip(numbers, self.problems, strict=True)
        ]
        """The metrics of each lane, none of one that raised."""


def fitting(lanes: AbstractLanes, batch: Batch, most: int) -> int:
    """How many lanes to run as one program, up to `most`: in lockstep as many as fit
    into the memory of all devices, by estimate, or a power of two below, which hardly
    depends on what else is there; in loops eight a device, or one by one on one."""
    devices = jax.local_devices()
    if batch == "loop":
        return min(most, 8 * len(devices)) if len(devices) > 1 else 1
    try:
        each = lanes.bytes_per_lane(0)
    except Exception:  # which is told when the lane is run
        return most
    room = 0.7 * memory_left([device.memory_stats() for device in devices])
    fit = max(1, int(room // each))
    return most if fit >= most else 2 ** (fit.bit_length() - 1)
