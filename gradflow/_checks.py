"""Checks of the arguments: one line, naming the argument, before any compute.

Each says what it expected and what it got. Of what is being traced, under `jit` or
`vmap`, only the kind is known; the checks of numbers then return, as a traced boolean,
whether it is wrong, for the result of the run to say (`RESULTS.wrong_argument`).
"""

import warnings
from collections.abc import Callable
from typing import Any, get_origin, TypeGuard

import diffrax
import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, PRNGKeyArray, PyTree

from ._typing import Given

Wrong = bool | Bool[Array, ""]
"""Whether an argument is: False, or traced."""


def is_concrete(x) -> bool:
    """Whether the value of `x` is known now (it is not being traced)."""
    return not isinstance(x, jax.core.Tracer)


def is_key(x: Given) -> TypeGuard[PRNGKeyArray]:
    """Whether it is an array of random keys, which is none of numbers."""
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def word(x: Given) -> str:
    """What `x` is, in one short line."""
    if isinstance(x, type):
        return f"the class {x.__name__}"
    if hasattr(x, "dtype") and np.ndim(x) > 0:
        return f"an array of shape {x.shape}"
    if callable(x):
        name = getattr(x, "__name__", None)
        return f"a {type(x).__name__}" if name is None else f"the function {name}"
    text = str(x) if isinstance(x, np.generic | jax.Array) else repr(x)
    return text if len(text) <= 60 and "\n" not in text else f"a {type(x).__name__}"


def _array(x: Given) -> np.ndarray | Array | None:
    """Real numbers as an array; `None` where `x` is something else."""
    if is_key(x) or x is None:
        return None
    try:
        array = x if isinstance(x, jax.Array) else np.asarray(x)
    except (TypeError, ValueError):
        return None
    real = jnp.issubdtype(array.dtype, jnp.floating)
    return array if real or jnp.issubdtype(array.dtype, jnp.integer) else None


def check_number(
    x: Given, name: str, expected: str, okay: Callable[[Any], Any]
) -> Wrong:
    """Raises unless `x` is one finite real number for which `okay` holds.

    **Returns:** False; where `x` is being traced, whether it is wrong.
    """
    if np.ndim(x) != 0:
        raise ValueError(f"{name}: expected {expected}, got {word(x)}.")
    return check_numbers(x, name, expected, okay)


def check_numbers(
    x: Given, name: str, expected: str, okay: Callable[[Any], Any]
) -> Wrong:
    """The same for one number or a vector."""
    array = _array(x)
    if array is None or array.ndim > 1:
        raise ValueError(f"{name}: expected {expected}, got {word(x)}.")
    if not is_concrete(array):
        return ~jnp.all(jnp.isfinite(array) & okay(array))
    array = np.asarray(array)
    if not (np.isfinite(array) & okay(array)).all():
        raise ValueError(f"{name}: expected {expected}, got {word(x)}.")
    return False


def check_one(x: Given, name: str) -> None:
    """Raises where a sweep is what is wanted."""
    if np.ndim(x) != 0:
        raise ValueError(
            f"{name}: expected one number, got {word(x)}; sweep takes many."
        )


def check_positive(x: Given, name: str) -> Wrong:
    return check_number(x, name, "a positive number", lambda v: v > 0)


def check_integer(x: Given, name: str, least: int = 1) -> Wrong:
    """Raises unless `x` is an integer from `least` on, known now."""
    whole = isinstance(x, int | np.integer) and not isinstance(x, bool)
    if not whole or x < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {word(x)}.")
    return False


def check_choice(x: Given, name: str, among: tuple) -> None:
    """Raises unless `x` is one of a few values."""
    if not any(x is one or (type(x) is type(one) and x == one) for one in among):
        if not among:
            raise ValueError(f"{name}: there is none to choose, got {word(x)}.")
        expected = ", ".join(map(repr, among))
        raise ValueError(f"{name}: expected one of {expected}, got {word(x)}.")


def check_callable(x: Given, name: str, of: str = "the model") -> None:
    if not callable(x) or isinstance(x, type):
        raise ValueError(f"{name}: expected a function of {of}, got {word(x)}.")


def as_level(x: Given, name: str = "threshold") -> float | None:
    """A number known now, as a plain one; or `None`."""
    if x is None:
        return None
    if not is_concrete(x):
        raise ValueError(f"{name}: expected a number known before tracing.")
    array = _array(x)
    if array is None or array.ndim != 0 or np.isnan(array):
        raise ValueError(f"{name}: expected one real number, got {word(x)}.")
    return float(array)


def as_data(x: PyTree, name: str) -> PyTree:
    """`x` with arrays of numbers for leaves.

    **Raises:** `ValueError` where JAX can make none of them.
    """
    try:
        return jax.tree.map(jnp.asarray, x)
    except (TypeError, ValueError) as error:
        kind = type(x).__name__
        raise ValueError(
            f"{name}: expected arrays of numbers, got a {kind}."
        ) from error


def check_finite(x: PyTree, name: str) -> None:
    for leaf in jax.tree.leaves(x):
        if (
            is_concrete(leaf)
            and jnp.issubdtype(leaf.dtype, jnp.inexact)
            and not np.isfinite(leaf).all()
        ):
            raise ValueError(f"{name}: holds a NaN or an infinity.")


def check_loss_data(x: PyTree, y: Array, y_name: str) -> None:
    lengths = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(x)}
    if y.ndim == 0 or y.shape[0] == 0:
        raise ValueError(f"{y_name}: expected at least one sample on the first axis.")
    if lengths and lengths != {y.shape[0]}:
        raise ValueError(
            f"x: its first axis has {sorted(map(str, lengths))} samples, {y_name} has "
            f"{y.shape[0]}."
        )
    if jnp.issubdtype(y.dtype, jnp.complexfloating):
        raise ValueError(f"{y_name}: expected real numbers, got {y.dtype}.")
    check_finite(x, "x")


def check_labels(labels: Array) -> None:
    """Raises unless they are a vector of integers from 0 on."""
    expected = "labels: expected a vector of integers from 0 to k - 1, got"
    if labels.ndim != 1:
        raise ValueError(f"{expected} an array of shape {labels.shape}.")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"{expected} {labels.dtype}.")
    if is_concrete(labels) and np.min(labels) < 0:
        raise ValueError(f"{expected} some < 0.")


def check_probabilities(labels: Array) -> None:
    """Raises unless they are rows of probabilities."""
    expected = "labels: expected probabilities that add up to one in each row, got"
    if not jnp.issubdtype(labels.dtype, jnp.floating):
        raise ValueError(f"{expected} {labels.dtype}.")
    if not is_concrete(labels):
        return
    rows = np.asarray(labels)
    if not (np.isfinite(rows).all() and (rows >= 0).all()):
        raise ValueError(f"{expected} some that are negative or not finite.")
    total = rows.sum(axis=1)
    worst = total[np.abs(total - 1).argmax()]
    if not abs(worst - 1) <= 1e-5:
        raise ValueError(f"{expected} a row with a sum of {worst:.6g}.")


def as_weights(weights: Given, n: int, *, mean: bool) -> Array | None:
    """Weights of n samples, of mean one where asked for; or `None`.

    **Raises:** `ValueError` unless they are n finite numbers from 0 on, not all zero.
    """
    if weights is None:
        return None
    expected = f"weights: expected {n} finite numbers from 0 on, not all zero, got"
    array = as_data(weights, "weights")
    if not eqx.is_array(array) or array.shape != (n,):
        raise ValueError(f"{expected} {word(weights)}.")
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise ValueError(f"{expected} {array.dtype}.")
    if is_concrete(array):
        values = np.asarray(array)
        if not (np.isfinite(values).all() and (values >= 0).all() and values.any()):
            raise ValueError(f"{expected} others.")
    array = array if jnp.issubdtype(array.dtype, jnp.inexact) else array.astype(float)
    return array / jnp.mean(array) if mean else array


def check_logits(labels: Array, shape: tuple[int, ...]) -> None:
    """Raises unless logits of that shape have a column for each label."""
    if labels.ndim == 2 and shape != labels.shape:
        raise ValueError(
            f"labels: the model's logits have shape {shape}, the probabilities "
            f"{labels.shape}."
        )
    if len(shape) != 2 or shape[0] != labels.shape[0]:
        raise ValueError(
            f"labels: the model's logits have shape {shape}, expected "
            f"({labels.shape[0]}, classes)."
        )
    if labels.ndim == 2:
        return
    # Of a NumPy array: in a traced function jnp would trace the comparison too.
    largest = np.asarray(labels).max() if is_concrete(labels) else 0
    if largest >= shape[1]:
        raise ValueError(
            f"labels: the largest is {largest}, but the model gives {shape[1]} logits."
        )


def check_model(params: PyTree) -> None:
    leaves = jax.tree.leaves(params)
    if sum(leaf.size for leaf in leaves) == 0:
        raise ValueError("model: has no trainable parameters.")
    dtypes = {str(leaf.dtype) for leaf in leaves}
    if len(dtypes) > 1 or "complex" in next(iter(dtypes)):
        raise ValueError(
            f"model: parameters must be of one real precision, got {sorted(dtypes)}."
        )
    if jnp.finfo(leaves[0].dtype).bits < 32:
        raise ValueError(
            f"model: {leaves[0].dtype} resolves too few digits for a flow; cast the "
            "parameters to float32 or float64."
        )
    check_finite(params, "model")


def check_init_scale(init_scale: Given, name: str = "init_scale") -> Wrong:
    return check_number(init_scale, name, "one positive number", lambda v: v > 0)


def check_from_zero(x: Given, name: str) -> Wrong:
    return check_number(x, name, "a finite number, 0 or more", lambda v: v >= 0)


def check_fraction(x: Given, name: str) -> Wrong:
    between = lambda v: (v > 0) & (v < 1)
    return check_number(x, name, "a number between 0 and 1", between)


def check_solver(solver: Given, name: str = "solver") -> Wrong:
    """Raises unless it is a solver that estimates its error."""
    if isinstance(solver, diffrax.AbstractAdaptiveSolver):
        kind = get_origin(solver.term_structure) or solver.term_structure
        if kind is diffrax.MultiTerm or isinstance(kind, tuple):
            raise ValueError(
                f"{name}: expected one for a single right-hand side, such as "
                f"gradflow.KKT4(), got {type(solver).__name__}, which takes several."
            )
        return False
    got = word(solver) if isinstance(solver, type | str) else type(solver).__name__
    if isinstance(solver, diffrax.AbstractSolver):
        got += ", which has no error estimate to choose steps by"
    raise ValueError(f"{name}: expected one such as gradflow.KKT4(), got {got}.")


def check_rate(rate: Given, name: str) -> Wrong:
    """A number, or a schedule: a function of the step."""
    if not callable(rate):
        return check_positive(rate, name)
    with jax.numpy_dtype_promotion("standard"):
        first = rate(0)
    kind = "a positive number, or a schedule that gives one for each step"
    return check_number(first, name, kind, lambda v: v >= 0)


_ARGUMENTS: dict[str, Callable[[Any, str], Wrong]] = {
    "after": check_from_zero,
    "atol": check_from_zero,
    "checkpoint": check_from_zero,
    "chunk": check_integer,
    "gradient_noise": check_from_zero,
    "init_scale": check_init_scale,
    "label_noise": check_from_zero,
    "learning_rate": check_rate,
    "margin": check_positive,
    "max_steps": check_integer,
    "residual_tol": check_from_zero,
    "rtol": check_fraction,
    "share": check_fraction,
    "slow_time": check_positive,
    "solver": check_solver,
    "t_max": check_positive,
    "tolerance": check_from_zero,
    "weight_decay": check_from_zero,
}
"""What an argument of that name has to be, wherever there is one."""


def check_arguments(**values: Given) -> Wrong:
    """Raises unless each argument is what its name stands for.

    **Returns:** False; where some are being traced, whether one is wrong.
    """
    wrong: Wrong = False
    for name, value in values.items():
        wrong = wrong | _ARGUMENTS[name](value, name)
    return wrong


def check_given(**values: Given) -> Wrong:
    """The same for arguments that may be left out, where they are not `None`."""
    return check_arguments(**{k: v for k, v in values.items() if v is not None})


def resolvable(rtol, params: PyTree):
    """`rtol`, or the finest tolerance that there is. Says so."""
    dtype = jax.tree.leaves(params)[0].dtype
    floor = finest(params)
    if not is_concrete(rtol):
        return jnp.maximum(rtol, floor)
    if rtol < floor:
        warnings.warn(
            f"rtol: {rtol:g} is below what {dtype} parameters can resolve; "
            f"{floor:.1g} is taken. For more digits call "
            "gradflow.enable_float64() before the model is made.",
            stacklevel=4,
        )
    return max(rtol, floor)


def finest(params: PyTree) -> float:
    """The smallest tolerance that the precision of the parameters resolves along a
    path: 800 times the distance of two numbers, 1e-4 in float32."""
    return 800 * float(jnp.finfo(jax.tree.leaves(params)[0].dtype).eps)


def check_horizon(
    weight_decay: Given,
    slow_time: Given,
    t1: Given,
    ts: Given,
    saves: Given,
    dtype: DTypeLike = np.float64,
) -> Wrong:
    """Of when a run ends, and what it saves. Weight decays may be many; `dtype` is that
    of the parameters, in which times are counted."""
    given = [
        n
        for n, v in (("slow_time", slow_time), ("t1", t1), ("ts", ts))
        if v is not None
    ]
    if len(given) != 1:
        raise ValueError(f"slow_time, t1, ts: give exactly one, got {given or 'none'}.")
    check_integer(saves, "saves", 3)
    (name,) = given
    if ts is not None:
        wrong, unit = check_times(ts, "ts"), 1.0
        end = np.asarray(ts)[-1] if is_concrete(ts) else ts[-1]
    else:
        end = t1 if slow_time is None else slow_time
        wrong = check_positive(end, name)
        unit = 1.0 if slow_time is None else weight_decay
    if not (is_concrete(end) and is_concrete(weight_decay)):
        there = jnp.asarray(end, dtype) / jnp.min(jnp.asarray(unit, dtype))
        return wrong | ~jnp.isfinite(there)
    number = jnp.finfo(dtype)
    least = float(np.asarray(weight_decay).min())
    if 0 < least < number.tiny:
        raise ValueError(f"weight_decay: {least:.3g} is zero in {np.dtype(dtype)}.")
    if slow_time is not None and least == 0:
        raise ValueError("slow_time: s = λt needs weight_decay > 0; give t1 or ts.")
    end = float(end) / float(np.asarray(unit).min())
    if not end < float(number.max):
        raise ValueError(
            f"{name}: the run would end at t = {end:.3g}, and the largest number in "
            f"{np.dtype(dtype)} is {float(number.max):.3g}."
        )
    return wrong


def check_times(ts: Given, name: str, least: int = 2) -> Wrong:
    """Of a vector of increasing times, so many at least."""
    values = _array(ts)
    if values is None or values.ndim != 1 or values.size < least:
        got = word(ts if values is None else values)
        raise ValueError(
            f"{name}: expected a vector of {least} or more finite numbers, got {got}."
        )
    if not is_concrete(values):
        increasing = jnp.all(jnp.diff(values) > 0) & (values[0] >= 0)
        return ~(increasing & jnp.isfinite(values[-1]))
    values = np.asarray(values)
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: expected finite numbers, got some that are not.")
    if values[0] < 0 or (np.diff(values) <= 0).any():
        raise ValueError(f"{name}: expected increasing numbers from 0 on.")
    return False
