"""What is asked of a run that follows a descent in steps that are not small."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Scalar

from .._checks import check_arguments, is_concrete, Wrong
from .._host import as_array
from .._typing import Given
from ..flow.finite_steps import FIRST_STEPS
from ..flow.flow import GradientFlow
from ..solvers import Choice, RKC2

CHOICE = Choice(RKC2(), "the one for descent in steps that are not small")
"""The solver of it, unless one is given."""

NO_DERIVATIVE = (
    "adjoint: a run with a learning_rate has no derivative; leave learning_rate out, "
    "for that of the flow."
)


def check_steps(
    flow: GradientFlow,
    model: PyTree,
    learning_rate: Given,
    weight_decay: Given,
    solver: diffrax.AbstractSolver | None,
    adjoint: diffrax.AbstractAdjoint | None,
) -> Wrong:
    """Raises where descent in steps of that length is none that a flow follows here;
    returns whether the length, where it is traced, makes no sense."""
    if callable(learning_rate):
        raise ValueError(
            "learning_rate: expected one number; a schedule is for gradflow.descent."
        )
    if callable(weight_decay):
        raise ValueError(
            "weight_decay: expected one number where there is a learning_rate; a "
            "schedule is for the flow, and for gradflow.descent."
        )
    if flow.hold_norm:
        raise ValueError(
            "learning_rate: descent that is rescaled to a norm follows another flow; "
            "give a flow without hold_norm."
        )
    if not flow.penalty.smooth:
        raise ValueError(
            "learning_rate: descent goes to and fro across the kinks of "
            f"{type(flow.penalty).__name__}; give a smooth penalty, such as "
            "gradflow.Moreau(…, epsilon=…) of it."
        )
    if not (solver is None or isinstance(solver, RKC2 | diffrax.AbstractERK)):
        raise ValueError(
            "solver: expected an explicit one where there is a learning_rate, such as "
            f"gradflow.RKC2() or diffrax.Tsit5(), got {type(solver).__name__}."
        )
    if adjoint is not None:
        raise ValueError(NO_DERIVATIVE)
    dtype = jax.tree.leaves(flow.partition(model)[0])[0].dtype
    if dtype != jnp.float64:
        raise ValueError(
            f"model: a learning_rate needs parameters in float64, got {dtype}: the "
            "oscillation grows from far below what that resolves."
        )
    return check_arguments(learning_rate=learning_rate)


def check_end(ts: Float[Array, " n"], learning_rate: float | Scalar) -> Wrong:
    """Raises for a descent that ends before it is a flow; where that is being traced,
    returns whether it does."""
    if not (is_concrete(ts) and is_concrete(learning_rate)):
        return ~(as_array(ts)[-1] > FIRST_STEPS * learning_rate)
    first = FIRST_STEPS * float(learning_rate)
    if not float(np.asarray(ts)[-1]) > first:
        raise ValueError(
            f"learning_rate: the first {FIRST_STEPS} steps reach t = {first:.3g}, and "
            "only what comes after is a flow; give a later end, or take "
            "gradflow.descent."
        )
    return False
