"""How a computation ended: every cause with its remedy, and its number in a store."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from ._checks import is_concrete, Wrong
from ._host import as_array, numpy_of


class RESULTS(diffrax.RESULTS):  # pyright: ignore[reportGeneralTypeIssues]
    """How a computation ended. Compare with `==`; print one to read its message."""

    successful = ""
    out_of_steps = (
        "The step budget was exhausted before the final time. Increase `max_steps`, or "
        "loosen `rtol`."
    )
    slid = (
        "The run reached its end, but slid along kinks of the loss, where ∇F jumps, as "
        "networks of ReLUs do: `stats.sliding` steps. There each step is exact to "
        "about 1e-3 only, and paths from close starts differ by percents. A smooth "
        "activation (softplus, GELU) has no kinks."
    )
    criterion_met = (
        "The run ended early, as asked: what it was to run `until` holds at its end."
    )
    unstable = (
        "An explicit solver ran at its stability limit: noise of the size of the "
        "tolerance, in the stiff directions, makes up a drift of its own, and the path "
        "can be wrong by far more than `rtol`. Give `solver` a KKT solver, or RKC2; or "
        "`rtol` below λ/L, the ratio of weight decay and curvature."
    )
    coarse = (
        "The steps of the descent are too long for a flow to follow: too much changes "
        "from one to the next, and the path may be off by more than 5 % of θ "
        "(`stats.deviation` is an estimate). Lower `learning_rate`, or take "
        "`gradflow.descent`."
    )
    stalled = (
        "The solver could make no step, however small: next to the last time reached "
        "the loss has a kink, is not finite, or bends more sharply than rounding "
        "resolves to `rtol`. Loosen `rtol`, or look at the loss around that model."
    )
    diverged = (
        "The loss or the parameters left the finite range: the loss is likely "
        "unbounded below, or not defined everywhere. Check the loss, or add "
        "weight decay."
    )
    overshot = (
        "The descent went up instead, or left the finite range: `learning_rate` is "
        "likely above 2/L, L the largest curvature of the loss. Lower it."
    )
    not_converged = (
        "The flow had not come to rest at the largest time allowed: the loss is nearly "
        "flat somewhere along it. Increase `t_max`, or check that a minimiser exists."
    )
    no_minimiser = (
        "The loss keeps falling while the parameters keep growing, about as log t over "
        "the last three decades: as where there is no minimiser on this trajectory "
        "(cross-entropy on separable data has none), or where it is very far away "
        "(behind a Jacobian that has nearly lost rank). There is no limit map here, "
        "only a limit of the direction θ/‖θ‖; use weight decay, or a loss with a "
        "minimiser, or see by a larger `t_max` whether there is one."
    )
    not_critical = (
        "The point reached is not on the critical manifold to the tolerance asked: "
        "Gauss-Newton stalled, as it does where the Jacobian loses rank. Loosen "
        "`rtol`, or start closer."
    )
    saddle = (
        "The flow came to rest at a saddle: the Hessian has negative curvature there, "
        "so that almost every other start leaves it. The start is likely symmetric "
        "(equal or zero weights): perturb it."
    )
    ambiguous_rank = (
        "The singular values show no gap of 1e3, so the rank, and with it the tangent "
        "space, is a guess: the point is degenerate, near a singular one, or not "
        "critical to rounding. Retract it first, or set `rtol` to say what counts."
    )
    unresolved = (
        "The matrix-free iteration did not reach its tolerance: the matrix is "
        "ill-conditioned, or too few steps were allowed. Raise `max_steps`, or use "
        "method='dense' where there is one and it fits the memory."
    )
    second_order_lost = (
        "The terms of the second order could not be found: the fast phase changes too "
        "abruptly, or the drift is singular from its start. The first order stands; "
        "shorten `slow_time`, or tighten `rtol`."
    )
    singular_point = (
        "The rank is higher beside this point than at it: the critical manifold is "
        "singular here (it crosses itself, or the loss is flatter than quadratic), has "
        "no tangent space, and theory does not hold. Perturb the model, and take "
        "`limit_map` from there."
    )
    rank_lost = (
        "The Jacobian lost rank along the drift: the critical manifold is singular "
        "there and theory holds only up to that slow time. Shorten `slow_time`."
    )
    raised = (
        "The problem could not be made, or the run broke off, with an error of its "
        "own: `causes` of the sweep has its words."
    )
    undefined_start = (
        "The loss, its gradient or the times are not finite at the start: no step was "
        "taken. Look at `flow.velocity(model, λ)`; a norm at zero, a logarithm or a "
        "root there have no derivative."
    )
    wrong_argument = (
        "An argument makes no sense. It was being traced, and only the result can "
        "tell: check that `weight_decay` is finite and 0 or more, that "
        "times increase and s/λ does not overflow, that scales and tolerances are "
        "positive, and that a `learning_rate` makes more than 16 steps."
    )


CODES = {
    "successful": 0,
    "out_of_steps": 14,
    "slid": 15,
    "unstable": 16,
    "stalled": 17,
    "diverged": 18,
    "overshot": 19,
    "not_converged": 20,
    "no_minimiser": 21,
    "not_critical": 22,
    "saddle": 23,
    "ambiguous_rank": 24,
    "unresolved": 25,
    "second_order_lost": 26,
    "singular_point": 27,
    "rank_lost": 28,
    "raised": 29,
    "undefined_start": 30,
    "wrong_argument": 31,
    "criterion_met": 32,
    "coarse": 33,
}
"""The number of each result in datasets and stores. A number never changes its meaning:
the next result takes the next one."""

# An enumeration of Equinox is an index into its names, whose order is no promise of its
# own. What gradflow knows of that stands below, and nowhere else.
_NAMES: list[str] = list(RESULTS._name_to_item)
_MESSAGES: list[str] = [RESULTS[item] for item in RESULTS._name_to_item.values()]
_OTHER = -2  # one of Diffrax's, none of which is ever a result of gradflow's
_CODE_OF_INDEX = np.array([CODES.get(name, _OTHER) for name in _NAMES], np.int32)


def codes(result: RESULTS) -> np.ndarray:
    """The numbers, as in `CODES`, of a result or of a stack of them."""
    return np.asarray(_CODE_OF_INDEX[np.asarray(result._value)])


def from_codes(values: np.ndarray, attributes: Mapping[str, Any]) -> RESULTS:
    """A stack of results, from numbers and the attributes of the column that holds
    them: their meanings are looked up in `flag_values` and `flag_meanings`.

    **Raises:** `ValueError` for a number that has no meaning there, or one that this
    version does not know.
    """
    meanings = dict(
        zip(
            np.asarray(attributes["flag_values"]).tolist(),
            attributes["flag_meanings"].split(),
            strict=True,
        )
    )
    names = [meanings.get(code, f"number {code}") for code in np.ravel(values).tolist()]
    if unknown := sorted(set(names) - set(CODES)):
        raise ValueError(f"results: {', '.join(unknown)} is no result known here.")
    index = np.array([_NAMES.index(name) for name in names], np.int32)
    index = as_array(index.reshape(np.shape(values)))
    return eqx.tree_at(lambda r: r._value, RESULTS.successful, index)


Out = TypeVar("Out", bound=PyTree)


def is_known(result: RESULTS) -> bool:
    """Whether a result is known now, and not only when what is traced is run."""
    return is_concrete(result._value)


def among(result: RESULTS, *those: RESULTS) -> Bool[Array, "*lanes"]:
    """Whether a result, or each of a stack, is one of those."""
    values = result._value
    return as_array(numpy_of(values).isin(values, np.array([r._value for r in those])))


def is_success(result: RESULTS) -> Bool[Array, "*lanes"]:
    """Whether a run, or each of many, came to where it was to end, whatever the
    reservations on it."""
    return among(result, RESULTS.successful, RESULTS.slid, RESULTS.criterion_met)


def only_if_successful(out: Out, result: RESULTS) -> Out:
    """`out`; a `RuntimeError` where the result is no success. See `unless_failed`."""
    return unless_failed(out, result, among(result, RESULTS.successful))


def unless_failed(out: Out, result: RESULTS, okay: Bool[Array, "*lanes"]) -> Out:
    """`out`; a `RuntimeError` with the words of the result where it is not `okay`: now,
    or when what is traced is run. (`EQX_ON_ERROR` is for the errors of others.)"""
    if not is_known(result) or not is_concrete(okay):
        index = result._value
        return eqx.branched_error_if(out, ~okay, index, _MESSAGES, on_error="raise")
    failed = np.ravel(result._value)[~np.ravel(okay)]
    if failed.size:
        raise RuntimeError(_MESSAGES[int(failed[0])])
    return out


def named_wrong(
    out: Out, wrong: Wrong, values: Callable[[Out], tuple[PyTree, ...]]
) -> Out:
    """`out`, with the result and without the `values` of what makes no sense, where
    `wrong` says so."""
    if wrong is False:
        return out
    found, rest = eqx.partition(values(out), eqx.is_inexact_array)
    none = jax.tree.map(lambda x: jnp.where(wrong, jnp.nan, x), found)
    result = RESULTS.where(wrong, RESULTS.wrong_argument, out.result)
    return eqx.tree_at(
        lambda o: (*values(o), o.result), out, (*eqx.combine(none, rest), result)
    )


def flags() -> dict[str, Any]:
    """The meanings of numbers, as climate scientists write them beside a column."""
    return {
        "flag_values": list(CODES.values()),
        "flag_meanings": " ".join(CODES),
    }


def in_words(
    result: RESULTS,
    solver: str,
    dtype: jnp.dtype | np.dtype,
    *,
    of_descent: bool = False,
) -> str:
    """The message of a result of a run, with what its solver and its precision add; and
    that it follows a descent, which the KKT solvers can't."""
    message = RESULTS[result]
    if among(result, RESULTS.out_of_steps):
        message += f" {_OF_DESCENT if of_descent else _slow(solver)}"
    if among(result, RESULTS.stalled) and jnp.finfo(dtype).bits < 64:
        name = jnp.finfo(dtype).dtype
        message += f" Or call gradflow.enable_float64() first: this is {name}."
    return message


_OF_DESCENT = (
    "To follow a descent takes some six gradients of the loss a stage: for less than "
    "some 10⁵ steps gradflow.descent is quicker."
)


def _slow(solver: str) -> str:
    """Why a solver may take many steps, and what to do."""
    kinks = "a smooth activation (softplus, GELU) has none"
    if "KKT" in solver:
        return (
            f"Steps of {solver} are short where the loss bends in ways that its matrix "
            "leaves out (many are rejected then), and at kinks, as of ReLU or "
            f"max-pooling: {kinks}."
        )
    if solver == "RKC2":
        return (
            "Steps of RKC2 are short for a small `rtol`, and at kinks, as of ReLU or "
            f"max-pooling: {kinks}. Where outputs are some thousands at most, "
            "solver=gradflow.KKT4() takes fewer."
        )
    if issubclass(getattr(diffrax, solver, object), diffrax.AbstractERK):
        return (
            f"{solver} is explicit, and needs many steps where the problem is stiff: "
            "give solver=gradflow.KKT4(), or gradflow.RKC2()."
        )
    return ""
