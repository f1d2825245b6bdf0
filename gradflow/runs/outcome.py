"""What follows from the verdict on a run: another solver, or an error."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._checks import Wrong
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


def named_wrong(path: Path, wrong: Wrong) -> Path:
    """`path`, with the result and without the values of one that was not run, where
    `wrong` says so."""
    if wrong is False:
        return path

    def values(p):
        return (p.params, p.metrics, p.train_loss, p.penalty)

    none = jax.tree.map(lambda x: jnp.where(wrong, jnp.nan, x), values(path))
    result = RESULTS.where(wrong, RESULTS.wrong_argument, path.result)
    return eqx.tree_at(lambda p: (*values(p), p.result), path, (*none, result))
