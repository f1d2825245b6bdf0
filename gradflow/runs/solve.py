"""θ' integrated, and the verdict on the run."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from .._host import as_array, known, taken
from .._norms import as_vector, norms, rms
from ..flow.decay import decay_at, DecaySchedule
from ..flow.finite_steps import FIRST_STEPS
from ..flow.nonsmooth import loss_may_have_kinks
from ..flow.term import AbstractFlowTerm, FlowTerm, Sphere
from ..flow.vector import on_vector
from ..metrics import Metric
from ..penalties import absolute_weights, AbstractProximal
from ..precision import exact_products
from ..results import is_success, RESULTS
from ..solvers import (
    AbstractFlowSolver,
    AbstractKKT,
    ActiveSet,
    as_flow_solver,
    curvature_jumps,
    FiniteSteps,
)
from ..solvers.base import Controller, Followed, Saved
from ..solvers.controllers import Relative, SHARE
from .each import mean_over, of_each
from .integrate import Integration, Reached
from .path import Path
from .problem import check_values
from .stats import Stats
from .times import time_scale
from .until import AbstractCriterion, Here


class Tolerance(eqx.Module):
    """How exact a run is to be, and at what price."""

    rtol: Scalar
    atol: Scalar | None
    max_steps: int = eqx.field(static=True)

    def over(self, factor: float) -> "Tolerance":
        """A `factor` smaller."""
        rtol, atol = (
            None if x is None else as_array(known(x) / factor, x.dtype)
            for x in (self.rtol, self.atol)
        )
        return dataclasses.replace(self, rtol=rtol, atol=atol)


class Solve(eqx.Module):
    """One run of the flow, checked: all that `solve` needs to know. It is compiled once
    for all parameters, weight decays, times of the same number, and tolerances."""

    term: FlowTerm
    params: PyTree
    """Where it starts."""
    weight_decay: Scalar | DecaySchedule
    ts: Float[Array, " n"]
    """The times to save at; the last is its end."""
    watched: dict[str, Metric]
    same: frozenset[str] = eqx.field(static=True)
    """The metrics that are the loss itself: recorded as exactly as the loss is."""
    solver: diffrax.AbstractSolver
    tolerance: Tolerance
    adjoint: diffrax.AbstractAdjoint | None
    """How it is differentiated, or that it is not."""
    until: AbstractCriterion | None
    """When it is to end before."""
    learning_rate: Scalar | None
    """Of a descent in steps of that length; of the flow `None`."""

    @classmethod
    def of(
        cls,
        term: FlowTerm,
        params: PyTree,
        weight_decay: Scalar | DecaySchedule,
        ts: Float[Array, " n"],
        watched: dict[str, Metric],
        solver: diffrax.AbstractSolver,
        *,
        rtol: float | Scalar,
        atol: float | Scalar | None = None,
        max_steps: int,
        adjoint: diffrax.AbstractAdjoint | None = None,
        until: AbstractCriterion | None = None,
        learning_rate: float | Scalar | None = None,
    ) -> "Solve":
        """With numbers as arrays, and what is not given as usual."""
        tolerance = Tolerance(
            as_array(rtol, ts.dtype),
            None if atol is None else as_array(atol, ts.dtype),
            max_steps,
        )
        return cls(
            term=term,
            params=params,
            weight_decay=weight_decay
            if isinstance(weight_decay, DecaySchedule)
            else as_array(weight_decay),
            ts=ts,
            watched=watched,
            same=frozenset(k for k, m in watched.items() if m.fn is term.loss),
            solver=solver,
            tolerance=tolerance,
            adjoint=adjoint,
            until=until,
            learning_rate=None
            if learning_rate is None
            else as_array(learning_rate, ts.dtype),
        )

    @property
    def saves(self) -> int:
        """How many times it saves."""
        return self.ts.shape[0]

    def again(self, params: PyTree, ts: Float[Array, " n"], start: float) -> "Solve":
        """The same run from other parameters, at time `start` of it, and through other
        times since then, to the last of them."""
        decay, params = self.weight_decay, self.term.chart.state(params)
        if isinstance(decay, DecaySchedule):
            decay = decay.from_time(start)
        return dataclasses.replace(
            self, params=params, weight_decay=decay, ts=ts, until=None
        )

    @property
    def flow_solver(self) -> AbstractFlowSolver:
        """What answers for the solver."""
        solver = as_flow_solver(self.solver)
        if self.learning_rate is None:
            return solver
        return FiniteSteps(solver, self.learning_rate)

    def finer(self, factor: float, ts: Float[Array, " n"]) -> "Solve":
        """The same run through other times, to the last of them, to a tolerance a
        `factor` smaller."""
        tolerance = self.tolerance.over(factor)
        return dataclasses.replace(self, ts=ts, tolerance=tolerance, until=None)

    def with_steps(self, most: int) -> "Solve":
        """The same with another budget of steps."""
        budget = dataclasses.replace(self.tolerance, max_steps=most)
        return dataclasses.replace(self, tolerance=budget)

    def metric(
        self, name: str, models: tuple[PyTree, ...], loss: Scalar
    ) -> Float[Array, "..."]:
        """The mean of a metric over models whose mean loss is that."""
        return loss if name in self.same else mean_over(self.watched[name], models)


@exact_products
@eqx.filter_jit
def solve(run: Solve) -> Path:
    """A run from its start to its end, by one program, through which one can
    differentiate if it has an `adjoint`."""
    steps = _Steps.of(run)
    if run.adjoint is not None:
        return _told(run, steps, _differentiably(run, steps))[0]
    at = steps.go_on(run, steps.begin(run, run.ts[-1]))
    return _told(run, steps, _reached(run, steps, at))[0]


@exact_products
@eqx.filter_jit
def begin(run: Solve, end: Scalar) -> Reached:
    """The start of a run that goes on in parts, and ends at `end`: its `ts` may be the
    first of many."""
    return _Steps.of(run).begin(run, end)


def solve_part(
    run: Solve, before: Reached | None, steps: Int[Array, ""]
) -> tuple[Path, Reached, Bool[Array, ""]]:
    """So many `steps` of a run, from its start (`None`) or from where the last part
    ended. Returns the path so far, the new state, and whether that is all."""
    at = begin(run, taken(run.ts, -1)) if before is None else before
    return _solve_on(run, at, steps)


@exact_products
@eqx.filter_jit
def _solve_on(
    run: Solve, at: Reached, steps: Int[Array, ""]
) -> tuple[Path, Reached, Bool[Array, ""]]:
    how = _Steps.of(run)
    at = how.go_on(run, at, steps)
    path, ended = _told(run, how, _reached(run, how, at))
    return path, at, ended


# To this part of `rtol` a run lands on the time at which what it runs `until` comes.
LANDED = 0.1


class _Steps(NamedTuple):
    """With what a run is made, of vectors."""

    flow: FlowTerm
    theta: Float[Array, " d"]
    solver: AbstractFlowSolver
    followed: Followed

    @classmethod
    def of(cls, run: Solve) -> "_Steps":
        check_values(run.term.loss, run.watched, run.term.model(run.params))
        flow, theta = on_vector(run.term, run.params)
        solver = _flow_solver(run)
        lam = decay_at(run.weight_decay, jnp.zeros_like(run.ts[0]))
        return cls(flow, theta, solver, solver.follow(flow, theta, lam))

    def start(self, run: Solve, end: Scalar) -> tuple[Bool[Array, ""], Scalar]:
        """Whether it is defined at its start: else it is not to be run; and the length
        of its first step."""
        lam = decay_at(run.weight_decay, jnp.zeros_like(end))
        defined = _defined(self.flow, self.theta, lam) & jnp.all(jnp.isfinite(run.ts))
        scale = jnp.minimum(time_scale(self.flow, self.theta, lam, end), end)
        return defined, 1e-3 * jnp.where(defined, scale, 1.0)

    def integration(self, run: Solve, first: Scalar) -> Integration:
        until = run.until

        def holds(t: Scalar, y: PyTree) -> Bool[Array, ""]:
            assert until is not None
            return until.holds(self.here(run, t, y))

        return Integration(
            self.followed.term,
            self.followed.solver,
            _controller(run, self.solver, first),
            run.ts,
            run.weight_decay,
            run.tolerance.max_steps,
            until=None if until is None else holds,
            within=None if until is None else LANDED * run.tolerance.rtol,
            since=self.followed.since,
        )

    def here(self, run: Solve, t: Scalar, y: PyTree) -> Here:
        """A state, for a criterion to look at."""
        solver, term = self.solver, self.followed.term
        params = solver.params_of(y)

        def metric(name: str) -> Scalar:
            models = tuple(map(term.model, solver.points(y)))
            return run.metric(name, models, solver.loss_of(term, y))

        return Here(
            term=term,
            params=params,
            weight_decay=decay_at(run.weight_decay, t),
            metric=metric,
            gradient=lambda: solver.gradient_of(term, y),
        )

    def begin(self, run: Solve, end: Scalar) -> Reached:
        defined, first = self.start(run, end)
        integration = self.integration(run, first)
        at = integration.begin(self.followed.state, first)
        if run.until is not None and self.followed.before is not None:
            at = self._met_before(run, at, self.followed.before)
        high = jnp.where(defined, at.high, jnp.inf)
        return dataclasses.replace(at, stopped=at.stopped | ~defined, high=high)

    def _met_before(
        self, run: Solve, at: Reached, before: Callable[[Scalar], PyTree]
    ) -> Reached:
        """The start; or where what it runs `until` holds at a step of the descent
        before that, this step."""
        assert run.until is not None and run.learning_rate is not None
        ts = run.learning_rate * jnp.arange(FIRST_STEPS + 1, dtype=run.ts.dtype)
        until = run.until
        holds = jax.lax.map(lambda t: until.holds(self.here(run, t, before(t))), ts)
        met, t = jnp.any(holds), ts[jnp.argmax(holds)]
        y = jax.tree.map(lambda a, b: jnp.where(met, a, b), before(t), at.y)
        t, high = jnp.where(met, t, at.t), jnp.where(met, t, at.high)
        return dataclasses.replace(at, t=t, y=y, stopped=at.stopped | met, high=high)

    def go_on(
        self, run: Solve, at: Reached, steps: Int[Array, ""] | None = None
    ) -> Reached:
        return self.integration(run, at.first).run(at, steps)


def _told(
    run: Solve, steps: _Steps, out: "_Integrated"
) -> tuple[Path, Bool[Array, ""]]:
    """What is recorded, and the verdict; and whether that is all of the run."""
    solver = steps.solver
    models, seen, train_loss, penalty = _record(run, solver, out)
    work = solver.work(out.term, out.solver_state, out.end)
    result = _verdict(run, solver, out, models, work)
    result = RESULTS.where(out.defined, result, RESULTS.undefined_start)
    paused = (result == RESULTS.out_of_steps) & (
        out.counts[0] < run.tolerance.max_steps
    )
    atol = run.tolerance.atol
    stats = Stats(
        solver.name,
        *out.counts,
        rtol=run.tolerance.rtol,
        atol=0.0 if atol is None else atol,
        **work,
    )
    decay, slow = run.weight_decay, None
    if isinstance(decay, DecaySchedule):
        slow = decay.slow_time(out.ts)
        decay = decay.mean(out.ts, slow)
    path = Path(
        t=out.ts,
        weight_decay=decay,
        clock=slow,
        params=models,
        static=run.term.static,
        metrics=seen,
        train_loss=train_loss,
        penalty=penalty,
        result=result,
        stats=stats,
        watched=run.watched,
    )
    return path, ~paused


def _flow_solver(run: Solve) -> AbstractFlowSolver:
    """What answers for the solver of a run; along kinks of the penalty one that follows
    them."""
    solver, penalty = run.flow_solver, run.term.penalty
    if penalty.smooth:
        return solver
    kinked = [part for _, part in penalty.terms() if not part.smooth]
    kind = type(kinked[0]).__name__
    remedy = f"give gradflow.Moreau({kind}(…), epsilon=…), which is smooth."
    if not isinstance(kinked[0], AbstractProximal):
        remedy = "there is no smooth form of it here."
    if isinstance(run.term.chart, Sphere):
        raise ValueError(
            f"penalty: a flow that holds the norm has no use for the kinks of {kind}; "
            + remedy
        )
    if absolute_weights(penalty, run.params) is None:
        raise ValueError(
            f"penalty: the kinks of {kind} are not coordinates at zero; {remedy}"
        )
    if not isinstance(solver, AbstractKKT):
        raise ValueError(
            f"solver: only the KKT solvers follow a flow along the kinks of {kind}, "
            f"got {solver.name}; or {remedy}"
        )
    return ActiveSet(solver)


# What a solver is told that does not see the jumps of the curvature. (With 0.3 Tsit5
# was off by 6.2 rtol in one of 300 random problems.)
_ACROSS = 0.2


def _controller(run: Solve, solver: AbstractFlowSolver, first: Scalar) -> Controller:
    """Of the steps, of which the `first` has that length."""
    rtol, atol = run.tolerance.rtol, run.tolerance.atol
    start, chart = run.params, run.term.chart
    if chart.roots is not None:
        start = chart.place(start)
    share = solver.tolerance_share(rtol)
    if curvature_jumps(run.term) and not solver.sees_jumps:
        share = share * _ACROSS
    # (Of a start at zero the first step is a guess by the last time, and may be far too
    # long: nothing is too short then.)
    size = rms(start)
    relative = Relative(
        share * rtol,
        None if atol is None else share * atol,
        dtmin=jnp.where(size > 0, 1e-9, 0.0) * first,
        # One lucky error estimate is not to carry the solver across the fast phase.
        factormax=6.0,
        parts_of=solver.coordinates,
        growth=not solver.sees_growth,
        # Along kinks all of θ may reach zero in finite time.
        least=0.0 if run.term.penalty.smooth else SHARE * rtol * size,
        kinked=loss_may_have_kinks(run.term, run.params),
        roots=chart.roots,
    )
    return solver.controlled(relative)


class _Integrated(NamedTuple):
    """What came of an integration, of the whole run or of a part of it."""

    term: AbstractFlowTerm
    """Of vectors, as are all states."""
    ts: Float[Array, " n"]
    """The times to save at; those after the end are the end."""
    saved: PyTree
    """States at these times."""
    end: PyTree
    t: Scalar
    """The state reached, and when."""
    counts: Int[Array, " 3"]
    solver_state: PyTree
    result: RESULTS
    """Diffrax's, in gradflow's words."""
    defined: Bool[Array, ""]
    """Whether there was a start."""
    landed: Bool[Array, ""]
    """Whether it has ended where what it was to run `until` has come."""


def _reached(run: Solve, steps: _Steps, at: Reached) -> _Integrated:
    landed, ts, saved = at.landed, run.ts, at.saved
    if steps.followed.before is not None:
        early = ts < steps.followed.since
        before = jax.vmap(steps.followed.before)(ts)
        saved = jax.tree.map(
            lambda a, b: jnp.where(
                jnp.reshape(early, (-1,) + (1,) * (a.ndim - 1)), a, b
            ),
            before,
            saved,
        )
    if run.until is not None:
        after = landed & (ts > at.t)

        def put(rows: Array, y: Array) -> Array:
            beyond = jnp.reshape(after, (-1,) + (1,) * y.ndim)
            return jnp.where(beyond, y[None], rows)

        ts, saved = jnp.where(after, at.t, ts), jax.tree.map(put, saved, at.y)
    result = _translate(at.result, (at.t < run.ts[-1]) & ~landed)
    return _Integrated(
        steps.followed.term, ts, saved, at.y, at.t, at.counts, at.solver, result,
        landed | ~at.stopped, landed,
    )  # fmt: skip


def _differentiably(run: Solve, steps: _Steps) -> _Integrated:
    """By Diffrax's own loop, which has derivatives. Where steps end has none: times to
    save depend on the start, and through the lengths of thousands of steps that grows
    to 1e22. What is saved at a time changes with it by θ'."""
    defined, first = steps.start(run, run.ts[-1])
    ts, first = jax.lax.stop_gradient((jnp.where(defined, run.ts, 0.0), first))
    controller = _controller(run, steps.solver, first)
    solution = diffrax.diffeqsolve(
        steps.followed.term,
        steps.followed.solver,
        t0=jnp.zeros_like(ts[0]),
        t1=ts[-1],
        dt0=first,
        y0=steps.followed.state,
        args=run.weight_decay,
        saveat=diffrax.SaveAt(
            subs=[diffrax.SubSaveAt(ts=ts), diffrax.SubSaveAt(t1=True)],
            solver_state=True,
        ),
        stepsize_controller=diffrax.ClipStepSizeController(controller, step_ts=ts),
        max_steps=run.tolerance.max_steps,
        throw=False,
        adjoint=run.adjoint,  # pyright: ignore[reportArgumentType]
    )
    saved, ends = solution.ys  # pyright: ignore[reportGeneralTypeIssues]
    saved = jax.vmap(functools.partial(_moved, run, steps))(saved, run.ts, ts)
    _, reached = solution.ts  # pyright: ignore[reportGeneralTypeIssues]
    t, end = reached[0], jax.tree.map(lambda y: y[0], ends)
    kinds = ("", "accepted_", "rejected_")
    counts = jnp.stack([solution.stats[f"num_{kind}steps"] for kind in kinds])
    result = _translate(solution.result, t < ts[-1])
    return _Integrated(
        steps.followed.term, run.ts, saved, end, t, counts, solution.solver_state,
        result, defined, jnp.array(False),
    )  # fmt: skip


def _moved(run: Solve, steps: _Steps, y: PyTree, t: Scalar, fixed: Scalar) -> PyTree:
    """A state at a time, with its derivative in that."""
    speed = steps.followed.term.vf(fixed, y, run.weight_decay)
    return jax.tree.map(lambda y, v: y + v * (t - fixed), y, speed)


def _record(
    run: Solve, solver: AbstractFlowSolver, out: _Integrated
) -> tuple[PyTree, dict[str, Array], Array, Array]:
    """At each time: the parameters, the metrics, F and R."""

    def record(y: PyTree) -> PyTree:
        params, points = solver.params_of(y), solver.points(y)
        models = tuple(map(out.term.model, points))
        loss = solver.loss_of(out.term, y)
        seen = {name: run.metric(name, models, loss) for name in run.watched}
        # What was not reached is not finite.
        reached = _finite(params)
        values = (params, seen, loss, mean_over(out.term.penalty, points))
        return jax.tree.map(lambda x: jnp.where(reached, x, jnp.nan), values)

    params, seen, train_loss, penalty = of_each(record, out.saved)
    models = jax.vmap(out.term.chart.place)(params)
    return models, seen, train_loss, penalty


# From this estimate of its deviation on a flow is too coarse for a descent: at 0.09
# sharpness and train loss were off by 5 to 20 %.
_COARSE = 0.05


def _verdict(
    run: Solve,
    solver: AbstractFlowSolver,
    out: _Integrated,
    models: PyTree,
    work: dict[str, Array],
) -> RESULTS:
    """How a run ended. A failure has its true cause; then come the reservations on one
    that reached its end: of the flow, and of the solver. That it `slid` shows in
    `work`, where it has landed, too."""
    term, result = out.term, out.result
    end = solver.params_of(out.end)
    speed = term.velocity(end, decay_at(run.weight_decay, out.t))
    lost = ~_finite((term.loss(term.model(end)), end, speed))
    lost = lost & (result != RESULTS.out_of_steps)
    # What reaches infinity in finite time stalls on its way there.
    fled = (result == RESULTS.stalled) & flees(end, speed, out.t)
    result = RESULTS.where(lost | fled, RESULTS.diverged, result)
    slid = (result == RESULTS.successful) & (work.get("sliding", 0) > 0)
    result = RESULTS.where(slid, RESULTS.slid, result)
    if run.learning_rate is not None:
        first, last = (
            run.term.loss(run.term.model(run.params)),
            solver.loss_of(term, out.end),
        )
        # (A start that fits has no loss: then λR is what there is to compare to.)
        pull = decay_at(run.weight_decay, out.t) * run.term.penalty(run.params)
        scale = jnp.abs(first) + jnp.abs(pull)
        up = ~(last <= scale / jnp.finfo(first.dtype).eps ** 0.5)
        # All of its steps are taken: it is not to be gone on with.
        spent = result == RESULTS.out_of_steps
        spent = spent & (out.counts[0] >= run.tolerance.max_steps)
        failed = (result == RESULTS.diverged) | (result == RESULTS.stalled) | spent
        result = RESULTS.where(failed & up, RESULTS.overshot, result)
        coarse = (result == RESULTS.successful) | (spent & ~up)
        coarse = coarse & ~(work["deviation"] <= _COARSE)
        result = RESULTS.where(coarse, RESULTS.coarse, result)
    states = jax.vmap(run.term.chart.state)(models)
    saved = Saved(run.term, states, out.ts, out.counts, run.tolerance.rtol)
    reserved = solver.reservation(saved)
    result = RESULTS.where(result == RESULTS.successful, reserved, result)
    met = out.landed & is_success(result)
    return RESULTS.where(met, RESULTS.criterion_met, result)


def _defined(term: FlowTerm, params: PyTree, weight_decay: Scalar) -> Bool[Array, ""]:
    """Whether loss and velocity are finite at the start."""
    speed = term.velocity(params, weight_decay)
    return _finite((term.loss(term.model(params)), speed))


def _finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether all numbers in it are."""
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves))


def flees(params: PyTree, velocity: PyTree, t: Scalar) -> Bool[Array, ""]:
    """Whether θ is about to be infinite: at this speed it would double in far less time
    than has passed."""
    theta, speed = as_vector(params), as_vector(velocity)
    far, fast = norms(jnp.stack([theta, speed]))
    return (jnp.vdot(theta, speed) > 0) & (far < 1e-6 * t * fast)


def _translate(result: diffrax.RESULTS, short: Bool[Array, ""]) -> RESULTS:
    """Diffrax's result in gradflow's words; `short`: whether the end is not reached."""
    # All else that can go wrong in a solver goes wrong in a step.
    ended = RESULTS.where(short, RESULTS.out_of_steps, RESULTS.successful)
    out = RESULTS.where(diffrax.is_successful(result), ended, RESULTS.stalled)
    ran_out = result == diffrax.RESULTS.max_steps_reached
    return RESULTS.where(ran_out, RESULTS.out_of_steps, out)
