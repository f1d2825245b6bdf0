"""θ' integrated, and the verdict on the run."""

import dataclasses
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from .._host import as_array
from .._norms import as_vector, norms, rms
from ..flow.term import AbstractFlowTerm, FlowTerm, Sphere
from ..flow.vector import on_vector
from ..metrics import Metric
from ..penalties import absolute_weights, AbstractProximal
from ..results import RESULTS
from ..solvers import (
    AbstractFlowSolver,
    AbstractKKT,
    ActiveSet,
    as_flow_solver,
    curvature_jumps,
)
from ..solvers.base import Controller, Followed, Saved
from ..solvers.controllers import Relative, SHARE
from .integrate import Integration, Reached
from .path import Path
from .problem import check_scalars
from .stats import Stats
from .times import time_scale


class Tolerance(eqx.Module):
    """How exact a run is to be, and at what price."""

    rtol: Scalar
    atol: Scalar | None
    max_steps: int = eqx.field(static=True)


class Solve(eqx.Module):
    """One run of the flow, checked: all that `solve` needs to know. It is compiled once
    for all parameters, weight decays, times of the same number, and tolerances."""

    term: FlowTerm
    params: PyTree
    """Where it starts."""
    weight_decay: Scalar
    ts: Float[Array, " n"]
    """The times to save at; the last is its end."""
    watched: dict[str, Metric]
    same: frozenset[str] = eqx.field(static=True)
    """The metrics that are the loss itself: recorded as exactly as the loss is."""
    solver: diffrax.AbstractSolver
    tolerance: Tolerance
    adjoint: diffrax.AbstractAdjoint | None
    """How it is differentiated, or that it is not."""

    @classmethod
    def of(
        cls,
        term: FlowTerm,
        params: PyTree,
        weight_decay: Scalar,
        ts: Float[Array, " n"],
        watched: dict[str, Metric],
        solver: diffrax.AbstractSolver,
        *,
        rtol: float | Scalar,
        atol: float | Scalar | None = None,
        max_steps: int,
        adjoint: diffrax.AbstractAdjoint | None = None,
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
            weight_decay=as_array(weight_decay),
            ts=ts,
            watched=watched,
            same=frozenset(k for k, m in watched.items() if m.fn is term.loss),
            solver=solver,
            tolerance=tolerance,
            adjoint=adjoint,
        )

    @property
    def saves(self) -> int:
        """How many times it saves."""
        return self.ts.shape[0]

    def again(self, params: PyTree, ts: Float[Array, " n"]) -> "Solve":
        """The same run from elsewhere and through other times. It is compiled already
        if these are as many."""
        return dataclasses.replace(self, params=params, ts=ts)


@eqx.filter_jit
def solve(run: Solve) -> Path:
    """A run from its start to its end."""
    return _solve(run)[0]


@eqx.filter_jit
def solve_part(
    run: Solve, before: Reached | None, steps: Int[Array, ""]
) -> tuple[Path, Reached, Bool[Array, ""]]:
    """So many `steps` of a run, from its start (`None`) or from where the last part
    ended. Returns the path so far, the new state, and whether that is all."""
    path, state, ended = _solve(run, before, steps)
    assert state is not None
    return path, state, ended


def _solve(
    run: Solve, before: Reached | None = None, steps: Int[Array, ""] | None = None
) -> tuple[Path, Reached | None, Bool[Array, ""]]:
    """The order of things: what solves it; integration; what is recorded; the verdict.
    What is not defined at its start is not run: its times are all zero."""
    lam = run.weight_decay
    check_scalars(run.term.loss, run.watched, run.term.model(run.params))
    term, theta = on_vector(run.term, run.params)
    defined = _defined(term, theta, lam) & jnp.all(jnp.isfinite(run.ts))
    ts = jnp.where(defined, run.ts, 0.0)
    end = run.ts[-1]
    scale = jnp.minimum(time_scale(term, theta, lam, end), end)
    scale = jnp.where(defined, scale, 1.0)
    solver = _flow_solver(run)
    controller = _controller(run, solver, scale)
    with jax.default_matmul_precision("highest"):
        followed = solver.follow(term, theta, lam)
        out = _integrate(run, solver, followed, controller, ts, scale, before, steps)
        models, seen, train_loss, penalty = _record(run, solver, out)
        work = solver.work(out.term, out.solver_state)
        result = _verdict(run, solver, out, models, ts, work)
        result = RESULTS.where(defined, result, RESULTS.undefined_start)
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
    path = Path(
        t=run.ts,
        weight_decay=lam,
        params=models,
        static=run.term.static,
        metrics=seen,
        train_loss=train_loss,
        penalty=penalty,
        result=result,
        stats=stats,
        watched=run.watched,
    )
    return path, out.state, ~paused


def _flow_solver(run: Solve) -> AbstractFlowSolver:
    """What answers for the solver of a run; along kinks of the penalty one that follows
    them."""
    solver, penalty = as_flow_solver(run.solver), run.term.penalty
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


# What a solver is told that does not see the jumps of the curvature.
_ACROSS = 0.3


def _controller(run: Solve, solver: AbstractFlowSolver, scale: Scalar) -> Controller:
    """Of the steps. `scale` is the time in which θ
    moves at its start."""
    rtol, atol = run.tolerance.rtol, run.tolerance.atol
    share = solver.tolerance_share(rtol)
    if curvature_jumps(run.term) and not solver.sees_jumps:
        share = share * _ACROSS
    relative = Relative(
        share * rtol,
        None if atol is None else share * atol,
        dtmin=1e-12 * scale,
        # One lucky error estimate is not to carry the solver across the fast phase.
        factormax=6.0,
        parts_of=solver.coordinates,
        growth=not solver.sees_growth,
        # Along kinks all of θ may reach zero in finite time.
        least=0.0 if run.term.penalty.smooth else SHARE * rtol * rms(run.params),
    )
    return solver.controlled(relative)


class _Integrated(NamedTuple):
    """What came of an integration, of the whole run or of a part of it."""

    term: AbstractFlowTerm
    """Of vectors, as are all states."""
    saved: PyTree
    """States at the times to save."""
    end: PyTree
    t: Scalar
    """The state reached, and when."""
    counts: Int[Array, " 3"]
    solver_state: PyTree
    result: RESULTS
    """Diffrax's, in gradflow's words."""
    state: Reached | None
    """From which the next part goes on."""


def _integrate(
    run: Solve,
    solver: AbstractFlowSolver,
    followed: Followed,
    controller: Controller,
    ts: Float[Array, " n"],
    scale: Scalar,
    before: Reached | None,
    steps: Int[Array, ""] | None,
) -> _Integrated:
    stepper, term, y0 = followed
    first = 1e-3 * scale
    if run.adjoint is not None:
        controller = diffrax.ClipStepSizeController(controller, step_ts=ts)
        solution = diffrax.diffeqsolve(
            term,
            stepper,
            t0=jnp.zeros_like(ts[0]),
            t1=ts[-1],
            dt0=first,
            y0=y0,
            args=run.weight_decay,
            saveat=diffrax.SaveAt(
                subs=[diffrax.SubSaveAt(ts=ts), diffrax.SubSaveAt(t1=True)],
                solver_state=True,
            ),
            stepsize_controller=controller,
            max_steps=run.tolerance.max_steps,
            throw=False,
            adjoint=run.adjoint,
        )
        saved, ends = solution.ys  # pyright: ignore[reportGeneralTypeIssues]
        _, reached = solution.ts  # pyright: ignore[reportGeneralTypeIssues]
        t, end = reached[0], jax.tree.map(lambda y: y[0], ends)
        kinds = ("", "accepted_", "rejected_")
        counts = jnp.stack([solution.stats[f"num_{kind}steps"] for kind in kinds])
        state, solver_state, result = None, solution.solver_state, solution.result
    else:
        integration = Integration(
            term, stepper, controller, ts, run.weight_decay, run.tolerance.max_steps
        )
        begun = integration.begin(y0, first) if before is None else before
        state = integration.run(begun, steps)
        saved, end, t, counts = state.saved, state.y, state.t, state.counts
        solver_state, result = state.solver, state.result
    result = _translate(result)
    most = (result == RESULTS.successful) & (t < ts[-1])
    result = RESULTS.where(most, RESULTS.out_of_steps, result)
    return _Integrated(term, saved, end, t, counts, solver_state, result, state)


def _record(
    run: Solve, solver: AbstractFlowSolver, out: _Integrated
) -> tuple[PyTree, dict[str, Array], Array, Array]:
    """At each time: the parameters, the metrics, F and R."""

    def record(y: PyTree) -> PyTree:
        params = solver.params_of(y)
        model = out.term.model(params)
        loss = solver.loss_of(out.term, y)
        seen = {
            k: loss if k in run.same else metric(model)
            for k, metric in run.watched.items()
        }
        # What was not reached is not finite.
        reached = _finite(params)
        values = (params, seen, loss, out.term.penalty(params))
        return jax.tree.map(lambda x: jnp.where(reached, x, jnp.nan), values)

    params, seen, train_loss, penalty = jax.lax.map(record, out.saved)
    models = jax.vmap(out.term.chart.place)(params)
    return models, seen, train_loss, penalty


def _verdict(
    run: Solve,
    solver: AbstractFlowSolver,
    out: _Integrated,
    models: PyTree,
    ts: Float[Array, " n"],
    work: dict[str, Array],
) -> RESULTS:
    """How a run ended. A failure has its true cause; then come the reservations on one
    that reached its end: of the flow, and of the solver."""
    term, result = out.term, out.result
    end = solver.params_of(out.end)
    speed = term.velocity(end, run.weight_decay)
    lost = ~_finite((term.loss(term.model(end)), end, speed))
    lost = lost & (result != RESULTS.out_of_steps)
    # What reaches infinity in finite time stalls on its way there.
    fled = (result == RESULTS.stalled) & flees(end, speed, out.t)
    result = RESULTS.where(lost | fled, RESULTS.diverged, result)
    slid = (result == RESULTS.successful) & (work.get("sliding", 0) > 0)
    result = RESULTS.where(slid, RESULTS.slid, result)
    saved = Saved(run.term, models, ts, out.counts, run.tolerance.rtol)
    reserved = solver.reservation(saved)
    return RESULTS.where(result == RESULTS.successful, reserved, result)


def run_again(run: Solve, params: PyTree, ts: Float[Array, " n"]) -> Path:
    """An earlier run, from elsewhere and through other times."""
    return solve(run.again(params, ts))


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


def _translate(result: diffrax.RESULTS) -> RESULTS:
    """Diffrax's result in gradflow's words."""
    # All else that can go wrong in a solver goes wrong in a step.
    out = RESULTS.stalled
    for theirs, ours in (
        (diffrax.RESULTS.successful, RESULTS.successful),
        (diffrax.RESULTS.max_steps_reached, RESULTS.out_of_steps),
        (diffrax.RESULTS.event_occurred, RESULTS.diverged),
    ):
        out = RESULTS.where(result == theirs, ours, out)
    return out
