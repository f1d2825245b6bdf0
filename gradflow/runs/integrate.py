"""The loop of an integration: steps by a solver, their lengths by a controller.

It is `diffrax.diffeqsolve` without what a run does not ask of it: derivatives, and
checks whose callbacks keep JAX from keeping the program in its cache. Steps end on the
times to save, and so nothing is interpolated, unless asked for.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from ..solvers.base import Controller, with_tolerances_of
from .parts import strong

# A step that would end as near to a time to land on, in roundings of it, ends there.
_NEAR = 100


class Reached(eqx.Module):
    """Where an integration is after some of its steps: all that the next depends on."""

    t: Scalar
    next: Scalar
    """Where the next step ends, unless there is a time to land on before."""
    y: PyTree
    solver: PyTree
    controller: PyTree
    saved: PyTree
    """The states at the times to save; infinite at those that are not reached."""
    counts: Int[Array, " 3"]
    """Steps; those accepted, and rejected."""
    stopped: Bool[Array, ""]
    """Whether what it was to run `until` has come, or it was not to run at all."""
    low: Scalar
    high: Scalar
    """What it runs `until` comes after the first of these times, and has come at the
    second; which is infinite where that is not known yet."""
    first: Scalar
    """The length of the first step."""
    result: diffrax.RESULTS

    @property
    def landed(self) -> Bool[Array, ""]:
        """Whether it has ended where what it runs `until` has come."""
        return self.t >= self.high


class Integration(eqx.Module):
    """y' = f(y) from t = 0, or later, through the increasing times `ts`."""

    term: diffrax.AbstractTerm
    solver: diffrax.AbstractSolver
    controller: Controller
    ts: Float[Array, " n"]
    args: PyTree
    max_steps: int | Int[Array, ""]
    until: Callable[[Scalar, PyTree], Bool[Array, ""]] | None = None
    """A condition of t and y that ends it early, at the end of a step."""
    within: Scalar | None = None
    """The part of the time to which the end is to be that at which the condition comes:
    by bisection, steps from where it is not there yet being tried again, shorter. With
    `None` it is the end of whichever step is the first after which it is there."""
    land: bool = eqx.field(static=True, default=True)
    """Whether steps end on `ts`; else the solver interpolates."""
    since: Scalar | float = 0.0
    """The time at which it starts."""

    def begin(self, y0: PyTree, dt0: Scalar) -> Reached:
        """At its start, with a first step of `dt0`."""
        solver, controller = self._ready()
        start = jnp.asarray(self.since, self.ts.dtype)
        order = solver.error_order(self.term)
        following, state = controller.init(
            self.term, start, self.ts[-1], y0, dt0, self.args, solver.func, order
        )
        following = jnp.asarray(following)
        end = jnp.minimum(following, self._target(start))
        begun = solver.init(self.term, start, end, y0, self.args)
        there = self.ts <= start
        stopped = jnp.array(False) if self.until is None else self.until(start, y0)

        def room(y: Array) -> Array:
            shown = jnp.reshape(there, (-1,) + (1,) * y.ndim)
            return jnp.where(shown, y, jnp.full((), jnp.inf, y.dtype))

        return Reached(
            t=start,
            next=following,
            y=y0,
            solver=strong(begun),
            controller=strong(state),
            saved=jax.tree.map(room, y0),
            counts=jnp.zeros(3, int),
            stopped=stopped,
            low=start,
            high=jnp.where(stopped, start, jnp.inf),
            first=dt0,
            result=diffrax.RESULTS.successful,
        )

    def run(self, at: Reached, steps: Int[Array, ""] | None = None) -> Reached:
        """On to the end, or `steps` on."""
        solver, controller = self._ready()
        most = self.max_steps
        if steps is not None:
            most = jnp.minimum(at.counts[0] + steps, most)
        end = self.ts[-1]

        def going(at: Reached) -> Bool[Array, ""]:
            okay = diffrax.is_successful(at.result) & ~at.stopped
            return okay & (at.t < end) & (at.counts[0] < most)

        def step(at: Reached) -> Reached:
            # One that has ended, and waits in lockstep for others, steps nowhere: the
            # solver sees that.
            following = jnp.where(going(at), at.next, at.t)
            at = eqx.tree_at(lambda at: at.next, at, following)
            return self._step(solver, controller, at)

        return jax.lax.while_loop(going, step, at)

    def _ready(self) -> tuple[diffrax.AbstractSolver, Controller]:
        wrapped: Any = self.controller.wrap(1)
        controller: Controller = wrapped
        solver = with_tolerances_of(controller, self.solver)
        if getattr(solver, "scan_kind", "") is None:
            # Of Diffrax's loops over stages the one that `jax.jvp` leads through.
            solver = eqx.tree_at(
                lambda s: s.scan_kind, solver, "lax", is_leaf=lambda x: x is None
            )
        return solver, controller

    def _target(self, t: Scalar) -> Scalar:
        """The next time to land on."""
        if not self.land:
            return self.ts[-1]
        return self.ts[jnp.minimum(jnp.sum(self.ts <= t), self.ts.size - 1)]

    def _end(self, at: Reached) -> Scalar:
        """Where the next step ends."""
        end = jnp.minimum(at.next, self._target(at.t))
        if self.within is None:
            return end
        near = at.high - at.low <= self._width(at, at.high)
        between = jnp.where(near, at.high, 0.5 * (at.low + at.high))
        return jnp.where(jnp.isfinite(at.high), between, end)

    def _width(self, at: Reached, t: Scalar) -> Scalar:
        """How exactly a time is to be known (in the first step not to a part of it, as
        what comes at once has no time of its own)."""
        assert self.within is not None
        return self.within * jnp.maximum(t, at.first)

    def _search(
        self, at: Reached, end: Scalar, keep: Bool[Array, ""], y: PyTree
    ) -> tuple[Bool[Array, ""], Bool[Array, ""], Scalar, Scalar]:
        """After a step from `at` to y, at time `end`, that is to be kept or not:
        whether it ends the run; whether it is to be tried again although it might be
        kept; and between which times what it runs `until` comes.

        All steps of a bisection begin at the same state, so that the last is one that
        was tried before, and gives what it gave.
        """
        if self.until is None:
            return jnp.array(False), jnp.array(False), at.low, at.high
        until = self.until
        holds = jax.lax.cond(keep, lambda: until(end, y), lambda: jnp.array(False))
        if self.within is None:
            return holds, jnp.array(False), at.low, at.high
        stop = holds & (end - at.low <= self._width(at, end))
        before = keep & ~holds & (end < at.high) & jnp.isfinite(at.high)
        again = (holds & ~stop) | before
        # A step that has failed says nothing: it begins anew.
        low = jnp.where(keep, jnp.where(holds, at.low, end), at.t)
        high = jnp.where(holds, end, jnp.where(before, at.high, jnp.inf))
        return stop, again, low, high

    def _step(
        self, solver: diffrax.AbstractSolver, controller: Controller, at: Reached
    ) -> Reached:
        end = self._end(at)
        y, error, dense, state, result = solver.step(
            self.term, at.t, end, at.y, self.args, at.solver, False
        )
        # Where a step has left the domain of the flow it is to be shorter.
        error = jax.tree.map(lambda e: jnp.where(jnp.isnan(e), jnp.inf, e), error)
        order: Any = solver.error_order(self.term)
        keep, _, following, _, memory, verdict = controller.adapt_step_size(
            at.t, end, at.y, y, self.args, error, order, at.controller
        )  # fmt: skip
        keep = jnp.asarray(keep)
        stop, again, low, high = self._search(at, end, keep, y)
        keep = keep & ~again
        one = jnp.ones((), int)
        t = jnp.where(keep, end, at.t)
        target = self._target(t)
        near = keep & (following > target * (1 - _NEAR * jnp.finfo(t.dtype).eps))
        following = jnp.where(near, jnp.maximum(following, target), following)

        def kept(new: PyTree, old: PyTree) -> PyTree:
            return jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, old)

        result = diffrax.RESULTS.where(keep, result, diffrax.RESULTS.successful)
        okay = diffrax.is_okay(result)
        # A step that is tried again has not been, to the controller.
        memory = jax.tree.map(
            lambda a, b: jnp.where(again, b, a), memory, at.controller
        )
        verdict = diffrax.RESULTS.where(again, diffrax.RESULTS.successful, verdict)
        return Reached(
            t=t,
            next=following,
            y=kept(y, at.y),
            solver=kept(state, at.solver),
            controller=memory,
            saved=self._saved(solver, at, end, keep, y, dense),
            counts=at.counts + jnp.stack([one, keep.astype(int), 1 - keep.astype(int)]),
            stopped=stop,
            low=low,
            high=high,
            first=at.first,
            result=diffrax.RESULTS.where(okay, verdict, result),
        )

    def _saved(
        self,
        solver: diffrax.AbstractSolver,
        at: Reached,
        end: Scalar,
        keep: Bool[Array, ""],
        y: PyTree,
        dense: dict,
    ) -> PyTree:
        """With what a step from `at` to y, at time `end`, adds if it is kept."""
        n = self.ts.size
        place = jnp.sum(self.ts <= at.t)

        def reached(place: Int[Array, ""]) -> Bool[Array, ""]:
            return keep & (place < n) & (self.ts[jnp.minimum(place, n - 1)] <= end)

        def put(saved: PyTree, place: Int[Array, ""], y: PyTree) -> PyTree:
            return jax.tree.map(lambda s, v: s.at[place].set(v, mode="drop"), saved, y)

        if self.land:
            return put(at.saved, jnp.where(reached(place), place, n), y)
        between = solver.interpolation_cls(t0=at.t, t1=end, **dense)

        def fill(carry: tuple[Int[Array, ""], PyTree]) -> tuple:
            place, saved = carry
            return place + 1, put(saved, place, between.evaluate(self.ts[place]))

        first = (place, at.saved)
        return jax.lax.while_loop(lambda carry: reached(carry[0]), fill, first)[1]
