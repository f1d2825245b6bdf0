"""Runs through any number of times by one program: window after window of them."""

import dataclasses
import functools
import warnings

import diffrax
import jax
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._checks import is_concrete
from .._host import as_array
from ..solvers import AbstractFlowSolver, as_flow_solver
from .integrate import Reached
from .parts import FIRST
from .path import Path
from .progress import Bar, run_in_parts
from .solve import begin, Solve, solve, solve_part

# The most times in a window: what is compiled for so many serves any number above.
WINDOW = 65


def solve_through(
    run: Solve,
    bar: Bar | None = None,
    *,
    kinked: bool = False,
    like: int | None = None,
) -> Path:
    """`solve`, by programs that hardly depend on how many times there are, those of a
    run `like` it through so many; under a `bar`, if it is to be shown; and where there
    may be kinks, with word after some steps of whether they make these short. What is
    being traced is one program."""
    bar = Bar("", shown=False) if bar is None else bar
    if run.adjoint is not None or not _known(run):
        return _in_one(run, bar)
    ts = np.asarray(run.ts)
    end = float(ts[-1])

    def far(path: Path, at: Reached) -> tuple[float, str]:
        # By the saved times: where they are denser steps are shorter.
        passed = np.interp(float(at.t), ts, np.linspace(0, 1, ts.size))
        share = float(passed) if end > 0 else 1.0
        return share, f"t = {float(at.t):.3g}, {int(path.stats.steps)} steps"

    def warn(path: Path, at: Reached) -> None:
        _warn_of_kinks(path, float(at.t), end)

    windows = [
        dataclasses.replace(run, ts=as_array(w))
        for w in _windows(ts, as_flow_solver(run.solver), like or run.saves)
    ]
    at, paths = begin(windows[0], as_array(ts[-1])), []
    for window in windows:
        # (What is being traced may be inside of a function that the run calls.)
        if not _known((at, paths)):
            return _in_one(run, bar)
        if paths:
            at = dataclasses.replace(at, saved=_nothing(at.saved))
        part = functools.partial(solve_part, window)
        early = FIRST - int(np.asarray(at.counts)[0])
        seen = warn if kinked and early > 0 else None
        first = early if early > 0 else FIRST
        path, at = run_in_parts(part, at, bar, far, first=first, seen=seen)
        paths.append(path)
    if not _known(paths):
        return _in_one(run, bar)
    whole = len(paths) == 1 and len(paths[0]) == run.saves
    return paths[0] if whole else _joined(paths, run.saves)


def _known(tree: PyTree) -> bool:
    """Whether nothing in it is being traced."""
    return all(map(is_concrete, jax.tree.leaves(tree)))


def _in_one(run: Solve, bar: Bar) -> Path:
    """By one program: what is being traced, for a derivative maybe, where the solver
    has one."""
    derivable = run.flow_solver.differentiable and run.until is None
    if run.adjoint is None and derivable:
        usual = diffrax.RecursiveCheckpointAdjoint()
        run = dataclasses.replace(run, adjoint=usual)
    path = solve(run)
    bar.tell(1.0, "")
    return path


def _windows(
    ts: Float[np.ndarray, " n"], solver: AbstractFlowSolver, like: int
) -> list[Float[np.ndarray, " w"]]:
    """The times, at most `WINDOW` at once. The last window is filled up with the last
    time: to `WINDOW`, or if the `like` many of a run are fewer to the next number
    2ᵏ + 1, for the metrics are evaluated at each."""
    # Others are judged by all their times together.
    if solver.differentiable:
        return [ts]
    size = min(WINDOW, 1 + 2 ** max(int(like - 2).bit_length(), 1))
    count = -(-ts.size // size)
    filled = np.append(ts, np.full(count * size - ts.size, ts[-1]))
    return list(filled.reshape(count, size))


def _nothing(saved: PyTree) -> PyTree:
    """Room for the states of a window."""
    return jax.tree.map(lambda x: as_array(np.full(x.shape, np.inf, x.dtype)), saved)


def _joined(paths: list[Path], n: int) -> Path:
    """One path of those through the windows, of n times. Its result, and what it took,
    are the last one's."""

    def join(*parts: Array) -> np.ndarray:
        known = [np.asarray(x) for x in parts]
        return (known[0] if len(known) == 1 else np.concatenate(known))[:n]

    names = ("t", "params", "metrics", "train_loss", "penalty", "clock")
    along = ({name: getattr(path, name) for name in names} for path in paths)
    joined = jax.device_put(jax.tree.map(join, *along))
    return dataclasses.replace(paths[-1], **joined)


def _warn_of_kinks(path: Path, t: float, end: float) -> None:
    assert path.stats.rejected is not None
    steps, rejected = int(path.stats.steps), int(path.stats.rejected)
    slid = path.stats.sliding
    if t < 0.1 * end and (rejected if slid is None else int(slid)) > steps / 4:
        told = f"{rejected} rejected" if slid is None else f"{int(slid)} along kinks"
        warnings.warn(
            f"simulate: after {steps} steps ({told}) t = {t:.2g} of "
            f"{end:.2g}. Steps are short where the loss has kinks, as of "
            "ReLU or max-pooling; the run goes on, and may take long. A smooth "
            "activation (softplus, GELU) has none; or loosen rtol, or give an earlier "
            "end.",
            stacklevel=8,
        )
