"""Checks of the arguments: one line, naming the argument, before any compute."""

import warnings

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree


def is_concrete(x) -> bool:
    """Whether the value of `x` is known now (it is not being traced)."""
    return not isinstance(x, jax.core.Tracer)


def is_key(x) -> bool:
    """Whether it is an array of random keys, which is none of numbers."""
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


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
    check_finite(x, "x")


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


def check_init_scale(init_scale, name: str = "init_scale") -> None:
    if is_concrete(init_scale) and not (
        np.ndim(init_scale) == 0 and 0 < init_scale < np.inf
    ):
        raise ValueError(f"{name}: expected one positive number, got {init_scale!r}.")


def check_weight_decay(weight_decay) -> None:
    if not is_concrete(weight_decay):
        return
    value = np.asarray(weight_decay)
    if not np.issubdtype(value.dtype, np.number) or not np.isfinite(value).all():
        raise ValueError(f"weight_decay: expected a finite number, got {weight_decay}.")
    if (value < 0).any():
        raise ValueError(f"weight_decay: expected 0 or more, got {weight_decay}.")


def check_tolerance(rtol) -> None:
    if is_concrete(rtol) and not 0 < rtol < 1:
        raise ValueError(f"rtol: expected a number between 0 and 1, got {rtol}.")


def resolvable(rtol, params: PyTree):
    """`rtol`, or the smallest tolerance that the precision of the parameters resolves
    along a path: 800 times the distance of two numbers, 1e-4 in float32. Says so."""
    dtype = jax.tree.leaves(params)[0].dtype
    floor = 800 * float(jnp.finfo(dtype).eps)
    if not is_concrete(rtol):
        return jnp.maximum(rtol, floor)
    if rtol < floor:
        warnings.warn(
            f"rtol: {rtol:g} is below what {dtype} parameters can resolve; "
            f"{floor:.1g} is taken. Make the model in float64 for more digits.",
            stacklevel=3,
        )
    return max(rtol, floor)


def check_horizon(weight_decay, slow_time, t1, ts, saves) -> None:
    given = [
        n
        for n, v in (("slow_time", slow_time), ("t1", t1), ("ts", ts))
        if v is not None
    ]
    if len(given) != 1:
        raise ValueError(f"slow_time, t1, ts: give exactly one, got {given or 'none'}.")
    for name, value in (("slow_time", slow_time), ("t1", t1)):
        if value is not None and is_concrete(value) and not 0 < float(value) < np.inf:
            raise ValueError(f"{name}: expected a positive number, got {value}.")
    if slow_time is not None and is_concrete(weight_decay):
        if (np.asarray(weight_decay) == 0).any():
            raise ValueError("slow_time: s = λt needs weight_decay > 0; give t1 or ts.")
    if saves < 3:
        raise ValueError(f"saves: expected 3 or more, got {saves}.")
    if ts is not None and is_concrete(ts):
        check_times(ts, "ts")


def check_times(ts, name: str) -> None:
    values = np.asarray(ts)
    if values.ndim != 1 or values.size < 2 or not np.isfinite(values).all():
        raise ValueError(f"{name}: expected a vector of two or more finite times.")
    if values[0] < 0 or (np.diff(values) <= 0).any():
        raise ValueError(f"{name}: expected increasing times from 0 on.")
