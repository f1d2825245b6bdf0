"""How many lanes of a sweep are in memory together."""

import os
import warnings
from collections.abc import Sequence

import jax

from ..runs.solve import Solve
from ..solvers import AbstractKKT
from .lanes import Lane


class OutOfMemory(RuntimeError):
    """A lane that does not fit into memory by itself."""

    @classmethod
    def of(cls, error: Exception, lane: Lane) -> "OutOfMemory":
        """In one line, with what helps."""
        remedy = "give fewer saves, or fewer metrics at once"
        if not isinstance(lane.run, Solve):
            remedy += ", or a smaller batch_size"
        elif isinstance(lane.run.solver, AbstractKKT) and lane.run.term.penalty.smooth:
            if not lane.run.solver.matrix_free:
                remedy += ", or solver=gf.KKT4(matrix_free=True)"
            remedy += ", or solver=gf.RKC2()"
        first = (str(error) or type(error).__name__).splitlines()[0]
        return cls(
            f"this lane does not fit into memory, even by itself ({first}); {remedy}."
        )


def is_out_of_memory(error: Exception) -> bool:
    """Whether that is what an error says."""
    if not isinstance(error, jax.errors.JaxRuntimeError):
        return isinstance(error, MemoryError)
    told = str(error).lower().replace("_", " ")
    signs = ("resource exhausted", "out of memory", "alloc failed")
    return any(sign in told for sign in signs)


class AtOnce:
    """How many lanes are one program: fewer, once so many have run out of memory."""

    def __init__(self, size: int):
        self.size = size
        self._told = False

    def halve(self, size: int) -> bool:
        """From now on half of `size` on each device, or fewer; says so, once. Returns
        False where that is one lane already."""
        devices = jax.local_device_count()
        each = -(-size // devices)
        if each == 1:
            return False
        self.size = min(self.size, -(-each // 2) * devices)
        if not self._told:
            self._told = True
            warnings.warn(
                f"sweep: {size} lanes at once do not fit into memory; from here on "
                f"they are {self.size}, and half as many again if these do not fit.",
                stacklevel=2,
            )
        return True


def memory_left(stats: Sequence[dict[str, int] | None]) -> float:
    """The bytes that are left on all devices together, by the `memory_stats` of each.

    A CPU tells none: its devices share one memory. Of that half is taken, and 8 GB at
    most: other programs have the rest, and lockstep is no gain there. (Not what happens
    to be free: a sweep that is run again is to be the same programs.)
    """
    left = [
        s["bytes_limit"] - s.get("bytes_in_use", 0)
        for s in stats
        if s and "bytes_limit" in s
    ]
    if len(left) == len(stats):
        return float(max(min(left), 0) * len(left))
    try:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # where the system does not tell
        there = 8e9
    return min(there / 2, 8e9)
