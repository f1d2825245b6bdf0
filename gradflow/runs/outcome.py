"""What follows from the verdict on a run: another solver, or an error."""

import diffrax
from jaxtyping import Array, PyTree

from .._host import as_array, numpy_of
from ..results import among, is_known, RESULTS, unless_failed
from .path import Path


def given_up(path: Path, then: diffrax.AbstractSolver) -> str:
    """Says that a solver on trial has failed, and which one follows."""
    return (
        f"{path.stats.solver} is given up after {int(path.stats.steps)} steps; "
        f"{type(then).__name__} begins anew."
    )


def wants_another(result: RESULTS) -> Array:
    """Whether a solver on trial failed for a reason of its own."""
    reasons = (RESULTS.out_of_steps, RESULTS.unstable, RESULTS.stalled)
    return as_array(numpy_of(result._value).any(among(result, *reasons)))


def fail_unless_reached(out: PyTree, path: Path) -> PyTree:
    """Raises unless `path` reached its last time; returns `out`."""
    if is_known(path.result):
        if not bool(path.succeeded):
            raise RuntimeError(path.verdict)
        return out
    return unless_failed(out, path.result, path.succeeded)


def recorded(run: PyTree) -> tuple[PyTree, ...]:
    """What a path, or a drift, has of each saved time."""
    return run.params, run.metrics, run.train_loss, run.penalty
