"""Which times, and which steps, are saved."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Scalar

from .._checks import (
    check_integer,
    check_positive,
    check_times,
    is_concrete,
)
from .._host import as_array, numpy_of
from .._norms import as_vector, norms
from .._typing import Given
from ..flow.term import FlowTerm
from ..solvers import measure_size, Size


def even_times(
    x: Float[np.ndarray, " n"], end: Float[Array, ""], scale: Float[Array, ""]
) -> Float[Array, " n"]:
    """The times at fractions x of the way to `end`, in log(1 + t/τ), τ the scale; the
    last fraction is 1."""
    last, unit = np.asarray(end), np.asarray(scale)
    x = x[:-1].astype(last.dtype)
    with np.errstate(divide="ignore", invalid="ignore"):  # an end that is not finite
        return as_array(np.append(unit * np.expm1(x * np.log1p(last / unit)), last))


_MOST_STEPS = 2**62  # of an integer of 64 bits


def saved_steps(
    steps: Given,
    slow_time: float | None,
    t1: float | None,
    at: Given,
    saves: int,
    weight_decay: Given,
    learning_rate: Given,
) -> np.ndarray:
    """The numbers of steps after which to save."""
    lengths = dict(steps=steps, slow_time=slow_time, t1=t1, at=at)
    given = [name for name, value in lengths.items() if value is not None]
    if len(given) != 1:
        expected = "steps, slow_time, t1, at"
        raise ValueError(f"{expected}: give exactly one, got {given or 'none'}.")
    if at is not None:
        numbers = np.asarray(at)
        integers = numbers.ndim == 1 and np.issubdtype(numbers.dtype, np.integer)
        if not integers or numbers.size < 2:
            raise ValueError("at: expected a vector of two or more integers.")
        if numbers[0] < 0 or (np.diff(numbers) <= 0).any():
            raise ValueError("at: expected increasing numbers of steps from 0 on.")
        return numbers
    check_integer(saves, "saves", 3)
    for name, value in (("slow_time", slow_time), ("t1", t1)):
        if value is None:
            continue
        if callable(learning_rate):
            raise ValueError(
                f"{name}: give steps or at where learning_rate is a schedule."
            )
        if not is_concrete(learning_rate) or not is_concrete(weight_decay):
            raise ValueError(
                f"{name}: give steps where λ or learning_rate is being traced."
            )
        check_positive(value, name)
        if name == "slow_time" and weight_decay == 0:
            raise ValueError("slow_time: s = λt needs weight_decay > 0; give steps.")
        unit = float(learning_rate) * float(weight_decay if name == "slow_time" else 1)
        count = float(value) / unit if unit > 0 else np.inf
        if not count < _MOST_STEPS:
            raise ValueError(
                f"{name}: that would take {count:.3g} steps, more than can be counted; "
                "raise learning_rate."
            )
        steps = max(1, round(count))
    check_integer(steps, "steps", 1)
    return log_spaced_steps(int(steps), saves)


def log_spaced_steps(steps: int, saves: int = 65) -> np.ndarray:
    """0, and up to `saves` − 1 integers from 1 to `steps`, evenly in the logarithm as
    far as integers can be."""
    if saves > steps:
        return np.arange(steps + 1)
    few, many = saves - 1, 64 * saves

    def spaced(k):
        return np.unique(np.rint(np.geomspace(1, steps, k)).astype(np.int64))

    # Where integers coincide, finer spacing makes up for those that are lost.
    while few < many:
        middle = (few + many) // 2
        if spaced(middle).size < saves - 1:
            few = middle + 1
        else:
            many = middle
    return np.concatenate([[0], spaced(few)])


def prepare(
    term: FlowTerm,
    params: PyTree,
    weight_decay: Scalar,
    slow_time: float | Scalar | None,
    t1: float | Scalar | None,
    ts: Array | None,
    saves: int,
    *,
    measure: bool,
) -> tuple[Float[Array, " n"], Size | None]:
    """The times to save; and, if asked for, what `choose_solver` wants to know."""
    if ts is not None and not measure:
        return as_array(ts, weight_decay.dtype), None

    def array(x):
        return None if x is None else as_array(x, weight_decay.dtype)

    span = _Span(array(slow_time), array(t1), array(ts))
    return _prepare(term, params, weight_decay, span, saves, measure)


class _Span(NamedTuple):
    """How far a run goes: one of three."""

    slow_time: Scalar | None
    t1: Scalar | None
    ts: Float[Array, " n"] | None


@eqx.filter_jit
def _prepare(
    term: FlowTerm,
    params: PyTree,
    weight_decay: Scalar,
    span: _Span,
    saves: int,
    measure: bool,
) -> tuple[Float[Array, " n"], Size | None]:
    ts = span.ts
    if ts is None:
        end = span.t1 if span.slow_time is None else span.slow_time / weight_decay
        assert end is not None  # one of the three is given
        ts = _save_times(term, params, weight_decay, end, saves)
    if not measure:
        return ts, None
    return ts, measure_size(term, params, weight_decay, ts[-1])


def _save_times(
    term: FlowTerm, params: PyTree, weight_decay: Scalar, t1: Scalar, saves: int
) -> Float[Array, " saves"]:
    """Zero, and `saves` − 1 times evenly spaced in log t up to `t1`, from the time in
    which θ would move by 1 % at its initial speed."""
    start = jnp.minimum(0.01 * time_scale(term, params, weight_decay, t1), 0.1 * t1)
    fraction = jnp.linspace(0.0, 1.0, saves - 1, dtype=t1.dtype)
    later = (start * (t1 / start) ** fraction).at[-1].set(t1)
    return jnp.concatenate([jnp.zeros_like(later[:1]), later])


def drift_times(
    ts: Float[Array, " n"] | None, slow_time: float, params: PyTree
) -> Float[Array, " n"]:
    """The slow times at which a drift is saved: those given, or 257 from 0 to
    `slow_time`, evenly in log(1 + s)."""
    dtype = jax.tree.leaves(params)[0].dtype
    if ts is None:
        xp = numpy_of(slow_time)
        last = xp.asarray(slow_time, dtype)
        x = np.linspace(0, 1, 257, dtype=dtype)[:-1]
        return as_array(xp.append(xp.expm1(x * xp.log1p(last)), last))
    check_times(ts, "ts", 1)
    ts = as_array(ts, dtype)
    if is_concrete(ts) and is_concrete(slow_time):
        s = np.asarray(ts)
        increasing = s.size > 0 and (np.diff(s) > 0).all()
        if not increasing or s[0] < 0 or s[-1] > slow_time:
            raise ValueError(
                f"ts: expected increasing slow times from 0 to slow_time = {slow_time}."
            )
    return ts


def time_scale(
    term: FlowTerm, params: PyTree, weight_decay: Scalar, t1: Scalar
) -> Scalar:
    """‖θ₀‖/‖θ₀'‖, infinite at rest; a ten-thousandth of t₁ where θ₀ is zero."""
    velocity = term.velocity(params, weight_decay)
    both, roots = jnp.stack([as_vector(params), as_vector(velocity)]), term.chart.roots
    size, speed = norms(both if roots is None else roots[None] * both)
    return jnp.where(size > 0, size / speed, 1e-4 * t1)
