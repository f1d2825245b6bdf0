"""Which times, and which steps, are saved."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree, Scalar

from .._checks import (
    check_integer,
    check_positive,
    check_times,
    is_concrete,
    Wrong,
)
from .._host import as_array, numpy_of
from .._norms import as_vector, norms
from .._typing import Given
from ..flow.decay import Decay, decay_at, DecaySchedule, InSlowTime, of_slow_time
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
        rates = dict(learning_rate=learning_rate, weight_decay=weight_decay)
        for rate, given in rates.items():
            if callable(given):
                raise ValueError(
                    f"{name}: give steps or at where {rate} is a schedule."
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
    weight_decay: Decay,
    slow_time: float | Scalar | None,
    t1: float | Scalar | None,
    ts: Array | None,
    saves: int,
    *,
    measure: bool,
) -> tuple[Float[Array, " n"], Size | None]:
    """The times to save; and, if asked for, what `choose_solver` wants to know."""
    dtype = jax.tree.leaves(params)[0].dtype
    if ts is not None and not measure:
        return as_array(ts, dtype), None

    def array(x):
        return None if x is None else as_array(x, dtype)

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
    weight_decay: Decay,
    span: _Span,
    saves: int,
    measure: bool,
) -> tuple[Float[Array, " n"], Size | None]:
    ts = span.ts
    if ts is None:
        end = span.t1
        if span.slow_time is not None:
            assert not isinstance(weight_decay, DecaySchedule)  # which have a `t1`
            end = span.slow_time / weight_decay
        assert end is not None  # one of the three is given
        start = decay_at(weight_decay, jnp.zeros_like(end))
        ts = _save_times(term, params, start, end, saves)
    if not measure:
        return ts, None
    largest = weight_decay
    if isinstance(largest, DecaySchedule):
        largest = jnp.max(jax.vmap(largest)(ts))
    return ts, measure_size(term, params, largest, ts[-1])


def as_decay(
    weight_decay: Given,
    slow_time: Given,
    t1: Given,
    ts: Given,
    dtype: DTypeLike,
) -> tuple[Scalar | DecaySchedule, Given, Given]:
    """The weight decay as a run takes it, with its slow time and its end; on a schedule
    of s that is where s is what was asked for.

    **Raises:** `ValueError` where the end is not told by the clock of the schedule.
    """
    if not callable(weight_decay):
        return as_array(weight_decay, dtype), slow_time, t1
    if not isinstance(weight_decay, InSlowTime):
        if slow_time is not None:
            raise ValueError(
                "slow_time: give t1 or ts where weight_decay is a schedule of t; or "
                "one of s, gradflow.InSlowTime(schedule)."
            )
        return DecaySchedule(weight_decay, as_array(0, dtype)), None, t1
    if slow_time is None:
        name = "ts" if t1 is None else "t1"
        raise ValueError(
            f"{name}: give slow_time where weight_decay is a schedule of slow time."
        )
    check_positive(slow_time, "slow_time")
    decay, end = _in_slow_time(weight_decay, as_array(slow_time, dtype))
    if is_concrete(end) and not np.isfinite(end):
        raise ValueError(
            "weight_decay: expected a schedule of positive numbers up to s = "
            f"{float(slow_time):.3g}, with no more than some dozen jumps."
        )
    return decay, None, end


@eqx.filter_jit
def _in_slow_time(
    schedule: InSlowTime, slow_time: Scalar
) -> tuple[DecaySchedule, Scalar]:
    return of_slow_time(schedule, slow_time)


def check_decay(weight_decay: Decay, ts: Float[Array, " n"]) -> Wrong:
    """Raises unless a schedule gives numbers from 0 on at all times to save, and ∫λ dt
    can be told."""
    if not isinstance(weight_decay, DecaySchedule):
        return False
    values, slow = _decays(weight_decay, ts)
    if not is_concrete(values):
        return ~jnp.all(jnp.isfinite(values + slow) & (values >= 0))
    values = np.asarray(values)
    wrong = ~(np.isfinite(values) & (values >= 0))
    if wrong.any():
        i = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            "weight_decay: expected a schedule of finite numbers, 0 or more, got "
            f"{values[i]:.3g} at t = {float(np.asarray(ts)[i]):.3g}."
        )
    if not np.isfinite(np.asarray(slow)).all():
        raise ValueError(
            "weight_decay: the schedule changes too often for ∫λ dt to be followed; "
            "give t1 an earlier time, or a smoother one."
        )
    return False


@eqx.filter_jit
def _decays(
    weight_decay: DecaySchedule, ts: Float[Array, " n"]
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    return jax.vmap(weight_decay)(ts), weight_decay.slow_time(ts)


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
    ts: Float[Array, " n"] | None, slow_time: float | Scalar, params: PyTree
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
