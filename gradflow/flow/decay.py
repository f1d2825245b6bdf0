"""The weight decay λ: a number, or one that changes with time."""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from .._typing import RealScalarLike, Schedule

_MOST_STEPS = 4096  # of the clocks


class InSlowTime(eqx.Module):
    """A schedule of the weight decay in slow time: λ = schedule(s), ds = λ dt.

    Give it as `weight_decay` of [`gradflow.simulate`][], with a `slow_time`, or of
    [`gradflow.descent`][], with `steps`. s is slow time, without a unit, and λ in units
    of 1/t; it must be positive throughout.

    **Arguments:**

    - `schedule`: λ as a function of s.
    """

    schedule: Schedule

    def __call__(self, s: RealScalarLike) -> Scalar:
        """λ(s)."""
        return decay_of(self.schedule, jnp.asarray(s))


class DecaySchedule(eqx.Module):
    """λ(t), of time t since the start of a run, or of the piece of it that begins
    `since` then."""

    of_clock: Schedule
    """A function of t; or of s, where there is a `clock`."""
    since: Scalar
    clock: diffrax.Solution | None = None
    """s(t), where the schedule is of s."""

    def __call__(self, t: RealScalarLike) -> Scalar:
        """λ(t)."""
        t = jnp.asarray(t) + self.since
        if self.clock is not None:
            t = self._slow(t)
        return decay_of(self.of_clock, t)

    def _slow(self, t: Scalar) -> Scalar:
        assert self.clock is not None
        last = self.clock.t1
        return self.clock.evaluate(jnp.clip(t, 0, last)).astype(t.dtype)

    def from_time(self, t: float) -> "DecaySchedule":
        """The same, of a run that starts at time t of this one."""
        later = self.since + jnp.asarray(t, self.since.dtype)
        return eqx.tree_at(lambda decay: decay.since, self, later)

    def slow_time(self, ts: Float[Array, " n"]) -> Float[Array, " n"]:
        """s = ∫λ dt, from the start of the run on, at increasing times."""
        if self.clock is not None:
            begun = self._slow(self.since)
            return jax.vmap(self._slow)(ts + self.since) - begun
        now = jnp.zeros_like(self.since)
        out = _integrate(
            lambda t, _: self(t), now, ts[-1], diffrax.SaveAt(ts=ts), land=ts
        )
        assert out.ys is not None
        return jnp.where(diffrax.is_successful(out.result), out.ys, jnp.nan)

    def mean(self, ts: Float[Array, " n"], slow: Float[Array, " n"]) -> Scalar:
        """The mean of λ over the run; that at its start, where it has no length."""
        end = ts[-1]
        return jnp.where(end > 0, slow[-1] / jnp.where(end > 0, end, 1), self(0 * end))


Decay = float | Scalar | DecaySchedule


def decay_at(weight_decay: Decay, t: RealScalarLike) -> Any:
    """λ at time t, one number."""
    return weight_decay(t) if isinstance(weight_decay, DecaySchedule) else weight_decay


def of_slow_time(
    schedule: InSlowTime, slow_time: Scalar
) -> tuple[DecaySchedule, Scalar]:
    """The schedule as one of t, and the time at which s = `slow_time`: infinite where
    it does not get there."""
    zero = jnp.zeros_like(slow_time)
    to = _integrate(
        # (What is not positive ends it.)
        lambda s, _: 1 / jnp.maximum(schedule(s), 0),
        zero,
        slow_time,
        diffrax.SaveAt(t1=True),
    )
    assert to.ys is not None
    clock = _integrate(
        lambda _, s: schedule(s), zero, to.ys[0], diffrax.SaveAt(dense=True)
    )
    there = diffrax.is_successful(to.result) & diffrax.is_successful(clock.result)
    end = jnp.where(there, to.ys[0], jnp.inf)
    return DecaySchedule(schedule.schedule, zero, clock), end


def _integrate(
    rate: Callable[[Scalar, Scalar], Scalar],
    zero: Scalar,
    end: Scalar,
    saveat: diffrax.SaveAt,
    land: Float[Array, " n"] | None = None,
) -> diffrax.Solution:
    """y' = rate(x, y) from y(0) = 0, to ten digits (in double precision); with steps
    that end at the points to `land` on."""
    # (Where λ jumps no step is too short to see it, but for what a time can resolve.)
    tol = max(1e-10, 10 * float(jnp.finfo(zero.dtype).eps))
    controller = diffrax.PIDController(rtol=tol, atol=tol)
    if land is not None:
        controller = diffrax.ClipStepSizeController(controller, step_ts=land)
    return diffrax.diffeqsolve(
        diffrax.ODETerm(lambda x, y, _: rate(x, y)),
        diffrax.Dopri8(),
        t0=zero,
        t1=end,
        dt0=1e-6 * end,
        y0=zero,
        saveat=saveat,
        stepsize_controller=controller,
        max_steps=_MOST_STEPS if land is None else 16 * _MOST_STEPS,
        throw=False,
    )


def decay_of(schedule: Schedule, x: Scalar) -> Scalar:
    """λ, in the precision of its clock."""
    with jax.numpy_dtype_promotion("standard"):  # as Optax's schedules need
        return jnp.asarray(schedule(x), x.dtype)
