"""θ' integrated, and the verdict on the run."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from .._norms import norm, rms
from ..flow.term import FlowTerm, place, Sphere, Tracked
from ..metrics import Metric
from ..penalties import AbstractPenalty
from ..results import RESULTS
from ..solvers import (
    AbstractKKT,
    ActiveSet,
    curvature_jumps,
    Landing,
    RKC2,
    sharpness,
    Signed,
)
from ..solvers.controllers import Pausing, Relative, SHARE
from .parts import strong
from .path import Path
from .problem import check_scalars
from .progress import Bar
from .times import time_scale


class Solved(eqx.Module):
    """Where an integration is after some of its steps: all that the next depends on."""

    t: Scalar
    next: Scalar
    """Where the next step ends."""
    y: PyTree
    solver: PyTree
    controller: PyTree
    made_jump: Bool[Array, ""]
    saved: PyTree
    """What was saved so far, at all saved times."""
    counts: Int[Array, " 3"]
    """Steps; those accepted, and rejected."""


SOLVER, MAX_STEPS = 6, 9
"""The places of `solver` and `max_steps` among the arguments of `solve`."""


def solve_arguments(
    term: FlowTerm,
    params: PyTree,
    weight_decay: Scalar,
    ts: Float[Array, " n"],
    watched: dict[str, Metric],
    solver: diffrax.AbstractSolver,
    rtol: float | Scalar,
    atol: float | Scalar | None,
    max_steps: int,
    progress: bool = False,
    adjoint: diffrax.AbstractAdjoint | None = None,
) -> tuple:
    """The arguments of `solve`, of the types for which it is compiled once for all
    tolerances, weight decays and times of the same number."""
    # A metric that is the loss itself is recorded as exactly as the loss is.
    same = frozenset(k for k, metric in watched.items() if metric.fn is term.loss)
    return (
        term,
        params,
        jnp.asarray(weight_decay),
        ts,
        watched,
        same,
        solver,
        jnp.asarray(rtol, ts.dtype),
        None if atol is None else jnp.asarray(atol, ts.dtype),
        max_steps,
        diffrax.RecursiveCheckpointAdjoint() if adjoint is None else adjoint,
        progress,
    )


@eqx.filter_jit
def solve(*arguments: Any) -> Path:
    """`simulate` without its checks and defaults; see `solve_arguments`."""
    return _solve(*arguments)[0]


def run_again(args: tuple, params: PyTree, ts: Float[Array, " n"]) -> Path:
    """`solve` with the arguments of an earlier run, from elsewhere and through other
    times. It is compiled already if these are as many."""
    term, _, weight_decay, _, *rest = args
    return solve(term, params, weight_decay, ts, *rest, False)


@eqx.filter_jit
def solve_part(*arguments: Any) -> tuple[Path, Solved, Bool[Array, ""]]:
    """The first or the next part of it: with the state after the last one, or `None`,
    and a number of steps as two more arguments. Returns the path so far, the state, and
    whether that is all."""
    path, state, ended = _solve(*arguments)
    assert state is not None
    return path, state, ended


def _solve(
    term: FlowTerm,
    params: PyTree,
    weight_decay: Scalar,
    ts: Float[Array, " n"],
    watched: dict[str, Metric],
    same: frozenset[str],
    solver: diffrax.AbstractSolver,
    rtol: Scalar,
    atol: Scalar | None,
    max_steps: int,
    adjoint: diffrax.AbstractAdjoint,
    progress: bool,
    before: Solved | None = None,
    steps: Int[Array, ""] | None = None,
) -> tuple[Path, Solved | None, Bool[Array, ""]]:
    check_scalars(term.loss, watched, term.model(params))
    # The error of RKC2 falls as the 2/3 power of what it is told.
    share = jnp.minimum(1, rtol / 1e-6) ** 0.5 if isinstance(solver, RKC2) else 1.0
    if curvature_jumps(term) and not isinstance(solver, AbstractKKT):
        share = share * _ACROSS
    # What is not defined at its start is not run.
    defined = _defined(term, params, weight_decay) & jnp.all(jnp.isfinite(ts))
    asked, ts = ts, jnp.where(defined, ts, 0.0)
    scale = jnp.minimum(time_scale(term, params, weight_decay, asked[-1]), asked[-1])
    scale = jnp.where(defined, scale, 1.0)
    # Growth while accepting is bounded so that one lucky error estimate cannot carry
    # the solver across the whole fast phase.
    controller = diffrax.ClipStepSizeController(
        Relative(
            share * rtol,
            None if atol is None else share * atol,
            dtmin=1e-12 * scale,
            factormax=6.0,
            parts_of=_parameters,
            growth=not isinstance(solver, AbstractKKT | RKC2),
            # Along kinks all of θ may reach zero in finite time.
            least=0.0 if term.penalty.smooth else SHARE * rtol * rms(params),
        ),
        step_ts=ts,
    )
    name = type(solver).__name__
    y0, params_of = params, lambda y: y
    loss_of = lambda y, model: term.loss(model)
    if not term.penalty.smooth:
        solver, controller = _with_kinks(term, params, solver, controller)
    if isinstance(solver, ActiveSet):
        term, y0 = solver.track(term, params, weight_decay)
        params_of = lambda y: y.params
        loss_of = lambda y, model: solver.loss_of(term, y)
    elif isinstance(solver, AbstractKKT):
        term, y0 = solver.track(term, params)
        params_of = lambda y: y.params
        loss_of = lambda y, model: solver.loss_of(term, y)
    start: dict[str, Any] = dict(t0=jnp.zeros_like(ts[0]), dt0=1e-3 * scale, y0=y0)
    if steps is not None:
        taken = 0 if before is None else before.counts[0]
        steps = jnp.minimum(steps, max_steps - taken)
        following = None if before is None else before.next
        controller = Pausing(controller, steps, following)
    to_save = ts
    if before is not None:
        to_save = jnp.maximum(ts, before.t)
        start = dict(
            t0=before.t, dt0=None, y0=before.y, made_jump=before.made_jump,
            solver_state=before.solver,
            controller_state=(before.controller, before.next, jnp.zeros((), int)),
        )  # fmt: skip

    with jax.default_matmul_precision("highest"):
        solution = diffrax.diffeqsolve(
            term,
            solver,
            t1=ts[-1],
            **start,
            args=weight_decay,
            saveat=diffrax.SaveAt(
                subs=[
                    diffrax.SubSaveAt(ts=to_save),
                    diffrax.SubSaveAt(t1=True),
                ],
                solver_state=True,
                controller_state=steps is not None,
                made_jump=steps is not None,
            ),
            stepsize_controller=controller,
            max_steps=max_steps,
            throw=False,
            adjoint=adjoint,
            progress_meter=Bar(name) if progress else diffrax.NoProgressMeter(),
        )
        saved: Any = list(solution.ys)
        ended: Any = solution.ts
        counts = jnp.stack(
            [solution.stats[f"num_{k}steps"] for k in ("", "accepted_", "rejected_")]
        )
        if before is not None:
            # The start is saved with the first step that is accepted.
            past = (ts <= before.t) & (before.counts[1] > 0)
            there = lambda x: jnp.reshape(past, (-1,) + (1,) * (x.ndim - 1))
            earlier = lambda old, new: jnp.where(there(new), old, new)
            saved[0] = jax.tree.map(earlier, before.saved, saved[0])
            counts = counts + before.counts
        state = None
        if steps is not None:
            reached: Any = solution.controller_state
            inner, following, _ = reached
            state = strong(
                Solved(
                    ended[1][0],
                    following,
                    jax.tree.map(lambda y: y[0], saved[1]),
                    solution.solver_state,
                    inner,
                    jnp.asarray(solution.made_jump),
                    saved[0],
                    counts,
                )  # fmt: skip
            )

        def record(y):
            params = params_of(y)
            model = term.model(params)
            loss = loss_of(y, model)
            seen = {k: loss if k in same else fn(model) for k, fn in watched.items()}
            # Diffrax fills what it did not reach with infinities.
            reached = jnp.isfinite(norm(params))
            values = (params, seen, loss, term.penalty(params))
            return jax.tree.map(lambda x: jnp.where(reached, x, jnp.nan), values)

        models, seen, train_loss, penalty = jax.lax.map(record, saved[0])
        static = place(params, term.static)[1]
        models = jax.vmap(lambda p: place(p, term.static)[0])(models)
        end = params_of(jax.tree.map(lambda y: y[0], saved[1]))
        result = _translate(solution.result)
        whole = (result == RESULTS.out_of_steps) & (ended[1][0] >= ts[-1])
        result = RESULTS.where(whole, RESULTS.successful, result)
        paused = (result == RESULTS.out_of_steps) & (counts[0] < max_steps)
        speed = term.velocity(end, weight_decay)
        lost = ~jnp.isfinite(term.loss(term.model(end)) + norm(end) + norm(speed))
        lost = lost & (result != RESULTS.out_of_steps)
        # What reaches infinity in finite time stalls on its way there.
        fled = (result == RESULTS.stalled) & flees(end, speed, ended[1][0])
        result = RESULTS.where(lost | fled, RESULTS.diverged, result)
        result = RESULTS.where(defined, result, RESULTS.undefined_start)
        work: dict[str, Array] = {}
        if isinstance(solver, (AbstractKKT, ActiveSet, RKC2)):
            work = solver.work(term, solution.solver_state)
        slid = (result == RESULTS.successful) & (work.get("sliding", 0) > 0)
        result = RESULTS.where(slid, RESULTS.slid, result)
        if isinstance(solver, diffrax.AbstractERK):
            reach = _stiffness(term, models, ts)
            taken = counts[0].astype(reach.dtype)
            limited = (reach > taken) | (counts[2] > counts[1])
            noisy = limited & (jnp.maximum(reach, taken) * rtol > _NOISE)
            noisy = noisy & (result == RESULTS.successful)
            result = RESULTS.where(noisy, RESULTS.unstable, result)
    stats = {
        "solver": name,
        "rtol": rtol,
        "atol": 0.0 if atol is None else atol,
        "steps": counts[0],
        "accepted": counts[1],
        "rejected": counts[2],
        **work,
    }
    path = Path(
        t=asked,
        weight_decay=weight_decay,
        params=models,
        static=static,
        metrics=seen,
        train_loss=train_loss,
        penalty=penalty,
        result=result,
        stats=stats,
        watched=watched,
    )
    return path, state, ~paused


def _with_kinks(
    term: FlowTerm,
    params: PyTree,
    solver: diffrax.AbstractSolver,
    controller: diffrax.AbstractAdaptiveStepSizeController,
) -> tuple[diffrax.AbstractSolver, diffrax.AbstractAdaptiveStepSizeController]:
    """The solver and the controller that follow a flow along the kinks of its
    penalty."""
    kinked = [part for _, part in term.penalty.terms() if not part.smooth]
    kind = type(kinked[0]).__name__
    remedy = f"give gradflow.Moreau({kind}(…), epsilon=…), which is smooth."
    if type(kinked[0]).prox is AbstractPenalty.prox:
        remedy = "there is no smooth form of it here."
    if isinstance(term.static, Sphere):
        raise ValueError(
            f"penalty: a flow that holds the norm has no use for the kinks of {kind}; "
            + remedy
        )
    if term.penalty.absolute_weights(params) is None:
        raise ValueError(
            f"penalty: the kinks of {kind} are not coordinates at zero; {remedy}"
        )
    if not isinstance(solver, AbstractKKT):
        raise ValueError(
            f"solver: only the KKT solvers follow a flow along the kinks of {kind}, "
            f"got {type(solver).__name__}; or {remedy}"
        )
    return ActiveSet(solver), Landing(controller)


def _stiffness(term: FlowTerm, models: PyTree, ts: Float[Array, " n"]) -> Scalar:
    """∫L dt along the saved models, about the number of steps that an explicit method
    takes at its stability limit. L may change a lot from one to the next: its geometric
    mean is taken."""
    logs = jnp.log(jax.lax.map(lambda p: sharpness(term, p), models))
    steps = jnp.diff(ts, prepend=0.0)
    before = jnp.concatenate([logs[:1], logs[:-1]])
    return jnp.sum(steps * jnp.exp(0.5 * (before + logs)))


# What an explicit solver is told, who does not see the jumps of the curvature.
_ACROSS = 0.3
# At the stability limit of an explicit method, where up to two of three steps are
# rejected, the error of a path was 17 rtol at ∫L dt · rtol = 0.2, and 26 at 2 (Tsit5 in
# random problems; in others it is far less).
_NOISE = 0.15


def _parameters(y: PyTree) -> PyTree:
    """Those in a state, as the solver sees them."""
    y = y.tracked if isinstance(y, Signed) else y
    return y.params if isinstance(y, Tracked) else y


def _defined(term: FlowTerm, params: PyTree, weight_decay: Scalar) -> Bool[Array, ""]:
    """Whether loss and velocity are finite at the start."""
    speed = norm(term.velocity(params, weight_decay))
    return jnp.isfinite(term.loss(term.model(params)) + speed)


def flees(params: PyTree, velocity: PyTree, t: Scalar) -> Bool[Array, ""]:
    """Whether θ is about to be infinite: at this speed it would double in far less time
    than has passed."""
    products = jax.tree.map(lambda p, v: jnp.vdot(p, v), params, velocity)
    outward = sum(jax.tree.leaves(products)) > 0
    return outward & (norm(params) < 1e-6 * t * norm(velocity))


def _translate(result: diffrax.RESULTS) -> RESULTS:
    """Diffrax's result in gradflow's words."""
    out = RESULTS.promote(result)
    for theirs, ours in (
        (RESULTS.max_steps_reached, RESULTS.out_of_steps),
        (RESULTS.event_occurred, RESULTS.diverged),
    ):
        out = RESULTS.where(out == theirs, ours, out)
    # All else that can go wrong in a solver goes wrong in a step.
    named = (out == RESULTS.successful) | (out == RESULTS.out_of_steps)
    named = named | (out == RESULTS.diverged)
    return RESULTS.where(named, out, RESULTS.stalled)
