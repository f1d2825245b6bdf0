"""The plan of a sweep: its axes, what is the same in all lanes, and how far they go."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ..flow.flow import GradientFlow
from ..metrics import Metric
from ..runs.stats import NUMBERS
from .axes import Axes

RUN = ("weight_decay", "init_scale", "rtol", "learning_rate")
"""The arguments of a run that may be vectors; the axes of a problem are the others."""
_OTHERS = ("t", "time", "slow_time", "train_loss", "penalty", "result", "why")
RECORDED = frozenset((*NUMBERS, *_OTHERS))
"""Names in the results, which axes cannot have."""


class Problem(NamedTuple):
    """What is run: the flow, from where, and what is watched."""

    flow: GradientFlow
    model: PyTree
    watched: dict[str, Metric]
    slow_time: float | None = None
    """How far a task asks to be run."""


class Span(NamedTuple):
    """Until when a lane runs. Where nothing is given, as far as its task asks for."""

    slow_time: float | None = None
    t1: float | None = None
    ts: Float[Array | np.ndarray, " n"] | None = None
    """Times to save at, of a flow."""
    steps: int | None = None
    at: Sequence[int] | Int[Array | np.ndarray, " n"] | None = None
    """Numbers of steps to save at, of a descent."""

    @property
    def given(self) -> bool:
        """Whether any is."""
        return any(value is not None for value in self)

    @property
    def of_flow(self) -> dict[str, Any]:
        """What a flow knows of it, by the names of the arguments."""
        return {"slow_time": self.slow_time, "t1": self.t1, "ts": self.ts}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a sweep was asked for. Lanes are given by their numbers."""

    axes: Axes
    make: Callable[..., Any] | Problem
    """Makes the problem, from the values of its axes; or the `Problem` itself."""
    metrics: dict[str, Metric]
    """In addition to those of the problem."""
    fixed: dict[str, Any]
    """Those of `RUN` that are no axes; `learning_rate` is `None` for a flow, and `rtol`
    for a descent."""
    span: Span
    saves: int
    asked: dict[str, Any]
    """All other arguments by name, as they were given: a store compares them."""

    def value(self, lane: int, name: str) -> Any:
        """That of one of `RUN` in a lane."""
        if name not in self.axes.along:
            return self.fixed.get(name)
        return self.axes.at(lane)[name]

    def all_values(self, name: str) -> tuple:
        """Those of one of `RUN` in any lane."""
        return self.axes.values.get(name, (self.fixed.get(name),))

    @property
    def fixed_numbers(self) -> dict[str, float]:
        """Those that are the same for all lanes, and numbers."""
        return {k: v for k, v in self.fixed.items() if isinstance(v, int | float)}

    def values_of_problem(self, lane: int) -> dict[str, Any]:
        """The values of the axes of the problem, by name."""
        return {k: v for k, v in self.axes.at(lane).items() if k not in RUN}

    @property
    def _own(self) -> set[str]:
        """The dimensions of the axes of the problem."""
        return {dim for name, dim in self.axes.along.items() if name not in RUN}

    @property
    def count_problems(self) -> int:
        """How many there are."""
        sizes = zip(self.axes.dims, self.axes.shape, strict=True)
        return math.prod(n for dim, n in sizes if dim in self._own)

    def owner(self, lane: int) -> tuple[int, ...]:
        """Which lanes have the same problem: their positions along its axes."""
        place, own = np.unravel_index(lane, self.axes.shape), self._own
        return tuple(
            int(i) for i, d in zip(place, self.axes.dims, strict=True) if d in own
        )

    def siblings(self, lane: int) -> list[int]:
        """All lanes with the same problem and tolerance."""
        axes, own, rtol = self.axes, self._own, self.value(lane, "rtol")
        place = np.unravel_index(lane, axes.shape)
        ranges: list[list[int]] = []
        for dim, size, at in zip(axes.dims, axes.shape, place, strict=True):
            if dim in own:
                ranges.append([int(at)])
            elif dim == axes.along.get("rtol"):
                ranges.append(
                    [k for k, v in enumerate(axes.values["rtol"]) if v == rtol]
                )
            else:
                ranges.append(list(range(size)))
        return np.ravel_multi_index(np.ix_(*ranges), axes.shape).ravel().tolist()
