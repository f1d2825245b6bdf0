"""Step-size controllers: the tolerance, and what ends a step early."""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

from .._norms import as_vector, norm, norms, relative_rms, rms
from .._typing import RealScalarLike

SHARE = 0.02
"""The part of the root mean square of θ that counts as the least size of a coordinate:
what is much smaller than the others need not be known to as many digits."""


class AbstractWrapped(diffrax.AbstractAdaptiveStepSizeController):
    """One with the tolerances of the controller that it is around."""

    controller: eqx.AbstractVar[diffrax.AbstractAdaptiveStepSizeController]

    @property
    def rtol(self):
        return self.controller.rtol

    @property
    def atol(self):
        return self.controller.atol

    @property
    def norm(self):
        return self.controller.norm

    def wrap(self, direction):
        wrapped = self.controller.wrap(direction)
        return eqx.tree_at(lambda s: s.controller, self, wrapped)


class _Memory(NamedTuple):
    """What a `Relative` knows of earlier steps."""

    pid: PyTree
    low: Scalar
    """The smallest ‖θ‖ so far."""
    high: Scalar
    """The largest."""
    most: Scalar
    """How long a step may be, for longer ones have failed."""
    rise: Scalar
    """How much longer after the next step."""
    asked: Scalar
    """The length asked of the next step."""
    length: Scalar
    """That of the last accepted step; 0 before there is one."""
    scaled: Scalar
    """Its error, in tolerances."""


class Relative(diffrax.AbstractAdaptiveStepSizeController):
    """A `diffrax.PIDController` whose tolerance for a coordinate is

        rtol (|θᵢ| + 0.02 rms(θ)),

    of the θ that there is now: the larger of both ends of a step. So it means the same
    in every unit, from a start at zero, and for what has decayed far below its start.
    And since a mean over coordinates may forgive the largest of them, the error is to
    be below rtol ‖θ‖ as a vector too. With an `atol` the tolerance is atol + rtol |θᵢ|,
    as Diffrax has it.

    Relative to ‖θ‖, errors do not die out where all of θ decays, or grows from a small
    start: n ~ 1/z steps, each by a factor of e^{∓z}, add up to n of them. So once ‖θ‖
    is far below its largest so far (or above its smallest), the part of an error along
    the step counts in proportion to the step too.

    An error that has grown in the last step is expected to grow as much in the next
    (Gustafsson, ACM Trans. Math. Softw. 20, 1994): else, where outputs are curved,
    every other step would be rejected, each time a little too long.

    Where a step has no error, for it left the domain of the flow or an implicit stage
    was not solved, half of it is tried, and only slowly do the next ones come near that
    length again, then faster: else every other step would fail.

    A step that is rejected at the resolution of t, where t + h = t, ends the run.
    """

    rtol: Scalar | float
    atol: Scalar | float
    """0 unless one was given."""
    parts_of: Callable[[PyTree], PyTree] = eqx.field(static=True)
    roots: Float[Array, " d"] | None
    """See `AbstractChart`."""
    share: float = eqx.field(static=True)
    growth: bool = eqx.field(static=True)
    kinked: bool = eqx.field(static=True)
    pid: diffrax.PIDController

    def __init__(
        self,
        rtol: Scalar | float,
        atol: Scalar | float | None = None,
        *,
        dtmin: Scalar | float | None = None,
        factormax: float = 10.0,
        parts_of: Callable[[PyTree], PyTree] = lambda y: y,
        growth: bool = True,
        least: Scalar | float = 0.0,
        kinked: bool = False,
        roots: Float[Array, " d"] | None = None,
    ):
        """**Arguments:**

        - `rtol`, `atol`: the tolerances; `atol` is none unless given.
        - `dtmin`: the shortest step: a shorter one ends the run.
        - `factormax`: by how much a step may be longer than the one before.
        - `parts_of`: the parameters in a state.
        - `least`: what no tolerance is below, where no `atol` is given.
        - `kinked`: whether the loss may have kinks: a step that failed at one says
            nothing of those after it.
        - `growth`: whether errors of growth count for more; False for a solver that
            sees to it itself.
        - `roots`: by what the numbers of a state are multiplied to be those of θ, for
            which the tolerances are.
        """
        self.rtol = rtol
        self.atol = least if atol is None else atol
        self.parts_of = parts_of
        # (Of what is differentiated, steps have no part in the derivative.)
        self.roots = None if roots is None else jax.lax.stop_gradient(roots)
        self.share = SHARE if atol is None else 0.0
        self.growth = growth
        self.kinked = kinked
        self.pid = diffrax.PIDController(
            rtol=0.0, atol=1.0, dtmin=dtmin, force_dtmin=False, factormax=factormax,
            norm=jnp.abs,
        )  # fmt: skip

    @property
    def norm(self):
        return lambda y: relative_rms(self.parts_of(y))

    def wrap(self, direction):
        return eqx.tree_at(lambda s: s.pid, self, self.pid.wrap(direction))

    def _measured(self, y: PyTree) -> Float[Array, " d"]:
        """What of a state the tolerances are for."""
        v = as_vector(self.parts_of(y))
        return v if self.roots is None else self.roots * v

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        if dt0 is None:
            raise ValueError("dt0: Relative does not guess the first step; give it.")
        end, state = self.pid.init(terms, t0, t1, y0, dt0, args, func, error_order)
        size = norm(self._measured(y0))
        most = jnp.full((), jnp.inf, jnp.result_type(t1))
        one, none = jnp.ones_like(most), jnp.zeros_like(most)
        asked = jnp.asarray(end - t0, most.dtype)
        return end, _Memory(state, size, size, most, one, asked, none, none)

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        memory: _Memory = controller_state
        state, low, high, most, rise, *_ = memory
        before, after, error = (self._measured(y) for y in (y0, y1_candidate, y_error))
        # Where a step has left the domain of the flow, the tolerance is that of its
        # start.
        sound = jnp.all(jnp.isfinite(after))
        after = jnp.where(sound, after, before)
        largest = jnp.maximum(jnp.abs(before), jnp.abs(after))
        step, (whole,) = Step.of(before, after, error, largest)
        spread = max(largest.size, 1) ** 0.5
        scale = tolerance(
            largest, self.rtol, self.atol, self.share, typical=whole / spread
        )
        size, left = step.size, step.left
        far = _far(high, size)
        if self.growth:
            far = jnp.maximum(far, _far(size, low))
        # Where all of θ comes to zero that is no decay.
        far = jnp.where(
            size > 1e3 * jnp.asarray(self.atol, size.dtype) / self.rtol, far, 0
        )
        more = 1 + jnp.minimum(_LASTING * far * step.share_along(), _MOST)
        shrunk = jnp.clip(size / jnp.where(left > 0, left, size + 1), 1, _MOST)
        more = more * jnp.where(high > size, shrunk**far, 1)
        scaled = relative_rms(error / scale)
        if self.share:
            allowed = self.rtol * whole + self.atol * spread
            excess = step.missed / jnp.where(allowed > 0, allowed, 1)
            # Without rounding it is no more than that.
            more = more * jnp.clip(jnp.nan_to_num(excess / scaled), 1, 2 * spread)
        scaled = jnp.where(sound, more * scaled, jnp.inf)
        one = jnp.ones_like(scaled)
        keep, next_t0, next_t1, jump, state, result = self.pid.adapt_step_size(
            t0, t1, one, one, args, scaled, error_order, state
        )
        # A step that ends a rounding before a time to land on would leave a tiny one to
        # it, as steps of equal length do between equidistant times (in Diffrax's loop;
        # that of a run sees to it by itself). And a tiny step
        # that is accepted is no failure.
        eps = jnp.finfo(jnp.result_type(t1)).eps
        next_t1 = jnp.where(keep, next_t1 + 4 * eps * jnp.abs(next_t1), next_t1)
        tiny = keep & (result == diffrax.RESULTS.dt_min_reached)
        result = diffrax.RESULTS.where(tiny, diffrax.RESULTS.successful, result)
        stuck = ~keep & (next_t1 - next_t0 <= 4 * eps * next_t0)
        stuck = stuck & (result == diffrax.RESULTS.successful)
        result = diffrax.RESULTS.where(stuck, diffrax.RESULTS.dt_min_reached, result)
        end = jnp.where(keep, left, size)
        h = jnp.asarray(t1 - t0)
        error = jax.lax.stop_gradient(scaled).astype(h.dtype)
        longest = next_t0 + self._longest(memory, h, error, error_order)
        next_t1 = jnp.where(keep, jnp.minimum(next_t1, longest), next_t1)
        length = jnp.where(keep, h, memory.length)
        error = jnp.where(keep, error, memory.scaled)
        if not self.kinked:
            failed = ~jnp.isfinite(scaled)
            most = jnp.where(keep, rise * most, jnp.where(failed, _BELOW * h, most))
            rise = jnp.where(keep, jnp.minimum(_AGAIN * rise, 10), rise)
            rise = jnp.where(failed, _AGAIN, rise)
            following = jnp.where(failed, _SHORTER * h, next_t1 - next_t0)
            next_t1 = next_t0 + jnp.minimum(following, most)
        low, high = jnp.minimum(low, end), jnp.maximum(high, end)
        asked = jnp.asarray(next_t1 - next_t0)
        state = _Memory(state, low, high, most, rise, asked, length, error)
        return keep, next_t0, next_t1, jump, state, result

    def _longest(
        self, memory: _Memory, h: Scalar, scaled: Scalar, order: RealScalarLike
    ) -> Scalar:
        """How long the next step may be, after one of h: the ψ of its error ψhᵏ grows
        by the same factor once more, or stays. No limit where that is not known: a step
        cut short, to land, says nothing of ψ, as its error is of another order."""
        length, last = memory.length, memory.scaled
        known = (length > 0) & (last > 0) & (scaled > 0) & (h > _CUT * memory.asked)
        length, last, scaled = (jnp.where(known, x, 1) for x in (length, last, scaled))
        growth = (length / h) * (scaled / last) ** (1 / order)
        factor = self.pid.safety / (scaled ** (1 / order) * jnp.maximum(growth, 1))
        longest = h * jnp.maximum(factor, self.pid.factormin)
        return jnp.where(known, longest, jnp.inf)


# A step of less than this part of what was asked was cut short.
_CUT = 0.99

# After a step that failed: the next, the limit of those after it, and by how much that
# rises faster with each. (Up to what length stages can be solved changes slowly along a
# path: a logistic loss of 1185 parameters took 523 steps, of which 244 failed, before.)
_SHORTER, _BELOW, _AGAIN = 0.5, 0.6, 1.05

# By how much an error along the step counts for more where it lasts.
_LASTING = 6.0
# By how much at most: what the iterations of an implicit solver leave is a hundredth of
# a tolerance.
_MOST = 100.0
_ONSET = 0.1  # the logarithm of the speed gained in a step at which it counts fully


def _far(large: Scalar, small: Scalar) -> Scalar:
    """From 0 where one size is four times the other to 1 at twelve times. A start at
    zero has no size."""
    return jnp.where(small > 0, jnp.clip(jnp.log(large / small) - 1.5, 0, 1), 0)


class Step(NamedTuple):
    """A step Δ of θ and the estimate of its error, as vectors, and their sizes."""

    gone: Float[Array, " d"]
    """Δ."""
    error: Float[Array, " d"]
    length: Scalar
    """‖Δ‖."""
    missed: Scalar
    """That of the error."""
    size: Scalar
    """‖θ‖ at its start."""
    left: Scalar
    """‖θ‖ at its end."""

    @classmethod
    def of(
        cls,
        before: Float[Array, " d"],
        after: Float[Array, " d"],
        error: Float[Array, " d"],
        *others: Float[Array, " d"],
        roots: Float[Array, " d"] | None = None,
    ) -> tuple["Step", list[Scalar]]:
        """The step from `before` to `after`, and the norms of `others`: all together,
        since each norm by itself is as large a program. Where there are `roots`, the
        step is that of θ; the others are speeds of the state, which is what flows down
        a gradient."""
        if roots is not None:
            before, after, error = (roots * x for x in (before, after, error))
        gone = after - before
        sizes = norms(jnp.stack([gone, error, before, after, *others]))
        return cls(gone, error, *sizes[:4]), list(sizes[4:])

    def share_along(self, rounding: Scalar | float = 0.0) -> Scalar:
        """‖θ‖/‖Δ‖ times the part of the error that lies along Δ, as far as it is above
        rounding, relative to ‖θ‖."""
        along = jnp.sum((self.error / self.missed) * (self.gone / self.length))
        whole = jnp.maximum(self.size, self.left)
        along = jnp.abs(along) - rounding * (whole / self.missed)
        return jnp.nan_to_num(jnp.maximum(along, 0) * whole / self.length)


def lasting(growth: Scalar, step: Step, rounding: Scalar | float = 0.0) -> Scalar:
    """By how much the error of a step counts for more since later steps will not damp
    it: from 1, where the flow does not speed up, to 101. `growth` is the logarithm of
    the speed gained, and `rounding` what an error may be of ‖θ‖ by rounding alone.

    Most errors die out, as those towards the critical manifold do. But where the flow
    leaves a saddle, as e^{μt}, an error along it is a shift in time, which stays
    however large the mode grows. There n ~ 1/z steps of z = μh add up to n errors for
    each factor of e. So the error e of a step that goes Δ is to be small against Δ too:
    e·Δ/‖Δ‖² below `rtol`. That also finds what the embedded formulas, made for decay,
    do not see of growth above z = ½.
    """
    weight = jnp.clip(jnp.nan_to_num(growth) / _ONSET, 0, 1)
    return 1 + jnp.minimum(_LASTING * weight * step.share_along(rounding), _MOST)


def tolerance(
    size: Float[Array, " d"],
    rtol: RealScalarLike,
    atol: RealScalarLike = 0.0,
    share: float = SHARE,
    *,
    typical: Scalar | None = None,
) -> Float[Array, " d"]:
    """atol + rtol (|θᵢ| + share rms(θ)), above zero, for θ of the given `size`, whose
    root mean square may be known: `typical`."""
    least = share * (rms(size) if typical is None else typical)
    rtol, atol, least = (jnp.asarray(x, size.dtype) for x in (rtol, atol, least))
    # An error counts for up to 100 times more, twice, and is to be above underflow.
    floor = 1e3 * jnp.finfo(size.dtype).tiny
    return atol + rtol * (jnp.abs(size) + least) + floor


# Of a step that came too late for a release, this part is tried when what the straight
# line says has failed twice: just after another event the force jumps.
_BACK = 0.1


class Landing(AbstractWrapped):
    """Ends steps on the events that an `ActiveSet` finds."""

    controller: diffrax.AbstractAdaptiveStepSizeController

    def __init__(self, controller: diffrax.AbstractAdaptiveStepSizeController):
        self.controller = controller

    def init(self, *args):
        t1, inner = self.controller.init(*args)
        return t1, (inner, jnp.array(0))

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        inner, tries = controller_state
        keep, next_t0, next_t1, jump, inner, result = self.controller.adapt_step_size(
            t0, t1, y0, y1_candidate, args, y_error, error_order, inner
        )
        part = y1_candidate.landing
        tries = jnp.where(part < 0, tries + 1, 0)
        part = jnp.where(tries > 2, -jnp.minimum(-part, _BACK), part)
        shortened = t0 + jnp.abs(part) * (t1 - t0)
        next_t1 = jnp.where(part < 1, shortened, next_t1)
        return keep, next_t0, next_t1, jump, (inner, tries), result


class Alongside(AbstractWrapped):
    """For an `Alternating` state, of whose centre alone the tolerance is: the errors of
    its direction, and a tenth of that of ln ρ, are to be within `rtol` too."""

    controller: diffrax.AbstractAdaptiveStepSizeController

    def __init__(self, controller: diffrax.AbstractAdaptiveStepSizeController):
        self.controller = controller

    def init(self, *args):
        return self.controller.init(*args)

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        error: Any = y_error
        more = jnp.maximum(norm(error.direction), 0.1 * jnp.abs(error.log_size))
        both = jnp.abs(error.centre) + more * jnp.abs(y0.centre)
        # (An infinite one of what is zero is no number.)
        both = jnp.where(jnp.isnan(both), jnp.inf, both)
        error = eqx.tree_at(lambda y: y.centre, error, both)
        return self.controller.adapt_step_size(
            t0, t1, y0, y1_candidate, args, error, error_order, controller_state
        )
