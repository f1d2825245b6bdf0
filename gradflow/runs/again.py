"""A run that was made, made again: from elsewhere, or to more digits."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Array, Float, PyTree

from .._checks import finest
from .._host import as_array
from ..results import among, RESULTS
from .path import Path
from .solve import Solve
from .windows import solve_through

# A finer run may take about so many times more steps, and its tolerance is smaller by
# this factor at most; and at least, where numbers have too few digits.
_STEPS, _MOST, _LEAST = 5.0, 100.0, 10.0
# By how much its budget of steps is raised where that of the run is not enough.
_BUDGET = 100


class Again:
    """Makes a run again; see `Path.again`."""

    def __init__(self, run: Solve | Callable[[], Solve], like: int | None = None):
        """**Arguments:**

        - `run`: the run, or what gives it.
        - `like`: the number of times for which there are programs, if not that of those
            that are to be run through.
        """
        self._run, self._like = run, like
        self._finer: dict[bytes, Path] = {}

    def __call__(
        self,
        params: PyTree = None,
        ts: Float[Array, " n"] | None = None,
        start: float = 0.0,
    ) -> Path:
        run = self._run if isinstance(self._run, Solve) else self._run()
        if params is not None:
            assert ts is not None
            return solve_through(run.again(params, ts, start), like=self._like)
        # One name after another is asked for what it says of them.
        key = b"" if ts is None else np.asarray(ts).tobytes()
        if key not in self._finer:
            self._finer[key] = _finer(run, ts)
        return self._finer[key]


def _finer(run: Solve, ts: Float[Array, " n"] | None) -> Path:
    finer = run.finer(_factor(run), halved(run.ts if ts is None else ts))
    if ts is None:
        finer = dataclasses.replace(finer, until=run.until)
    like = run.saves
    path = solve_through(finer, like=like)
    if bool(among(path.result, RESULTS.out_of_steps)):
        finer = finer.with_steps(_BUDGET * run.tolerance.max_steps)
        path = solve_through(finer, like=like)
    path = dataclasses.replace(path, again=Again(finer, like)).to_its_end()
    if not bool(path.succeeded):
        raise RuntimeError(
            f"error: the run was made again to rtol = {float(finer.tolerance.rtol):.1g}"
            f", and that failed: {path.verdict}"
        )
    return path


def halved(ts: Float[Array, " n"]) -> Float[Array, " 2*n"]:
    """The times, and before each the one halfway from the last."""
    end = np.asarray(ts)
    middle = 0.5 * (np.append(np.zeros_like(end[:1]), end[:-1]) + end)
    return as_array(np.stack([middle, end], axis=1).ravel())


def _factor(run: Solve) -> float:
    """By how much smaller a tolerance is that is worth a run.

    **Raises:** `ValueError` where numbers don't have the digits.
    """
    rtol, floor = float(run.tolerance.rtol), finest(run.params)
    order: Any = run.solver.error_order(run.term)
    factor = min(_STEPS**order, _MOST, rtol / floor)
    if factor < _LEAST:
        raise ValueError(
            f"error: a run to much less than rtol = {rtol:.1g} would be beyond the "
            f"digits of {np.asarray(run.ts).dtype} parameters; for more call "
            "gradflow.enable_float64() before the model is made."
        )
    return factor
