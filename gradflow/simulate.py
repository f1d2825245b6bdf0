"""One path of the gradient flow."""

import contextlib
import dataclasses
import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar
from tqdm.auto import tqdm

from ._bar import Bar
from ._checks import (
    check_arguments,
    check_callable,
    check_given,
    check_horizon,
    check_logits,
    check_one,
    is_concrete,
    resolvable,
    word,
    Wrong,
)
from ._controllers import Relative, SHARE
from ._norms import norm, rms
from ._parts import FIRST, in_part, Pausing, Solved, strong
from .flow import (
    check_flow,
    flatten,
    FlowTerm,
    GradientFlow,
    may_have_kinks,
    place,
    scaled,
    Sphere,
    Tracked,
)
from .losses import AbstractCompositeLoss, AbstractLoss, CrossEntropy
from .metrics import Accuracy, Metric
from .path import Path
from .penalties import AbstractPenalty
from .results import RESULTS
from .solvers import (
    AbstractKKT,
    ActiveSet,
    as_choice,
    Choice,
    curvature_jumps,
    Landing,
    measure_size,
    RKC2,
    second_choice,
    sharpness,
    Signed,
    Size,
    TRIAL_STEPS,
)


def simulate(
    flow: GradientFlow,
    model: PyTree,
    *,
    weight_decay: float | Scalar,
    init_scale: float | Scalar = 1.0,
    slow_time: float | Scalar | None = None,
    t1: float | Scalar | None = None,
    ts: Float[Array, " n"] | None = None,
    saves: int = 65,
    metrics: dict[str, Callable | Metric] | None = None,
    solver: diffrax.AbstractSolver | None = None,
    rtol: float | Scalar = 1e-6,
    atol: float | Scalar | None = None,
    max_steps: int = 100_000,
    adjoint: diffrax.AbstractAdjoint | None = None,
    throw: bool = True,
    progress: bool = False,
) -> Path:
    """Runs the flow θ' = −∇F(θ) − λ∇R(θ) from `model`.

    Where the penalty has kinks at zero coordinates, as ℓ1, it runs the differential
    inclusion θ' ∈ −∇F(θ) − λ∂R(θ), with the element of least norm on the right:
    coordinates that reach zero and may stay there do stay, exactly. Steps end where one
    is caught or let go. (A force that would let one go, and fades again, all within a
    step, is not seen: give close `ts` where forces come in short pulses.)

    **Arguments:**

    - `flow`: the flow: loss, penalty and what is trainable.
    - `model`: the initial model θ₀, any Equinox module.
    - `weight_decay`: λ ≥ 0.
    - `init_scale`: α, the factor by which all initial parameters are multiplied. (A
        flow that holds the norm holds that of αθ₀.)
    - `slow_time`, `t1`, `ts`: give one. Run to slow time s = λt, to time t, or through
        the given increasing times t ≥ 0.
    - `saves`: how many times are saved when `ts` is not given: zero, and then evenly
        in log t from the time in which θ would move by 1 % (a millionth of the last
        where θ₀ is zero). The solver lands on each;
        interpolating would leave the manifold.
    - `metrics`: functions of the model, by name; `Metric` adds a threshold.
    - `solver`: a gradflow or Diffrax solver; see `choose_solver` for the default.
    - `rtol`: relative tolerance. The relative error of the parameters, ‖θ − θ*‖/‖θ*‖,
        stays of this size: below 5 `rtol` on every task in the tests, 6 were seen with
        the kinks of a Huber loss.
    - `atol`: absolute tolerance for each coordinate; by default 0.02 · `rtol` · rms(θ)
        of the θ at that time, so that it means the same in every unit.
    - `max_steps`: the budget of steps.
    - `adjoint`: how the run is differentiated, with Diffrax's own solvers: one of its
        adjoints, by default `diffrax.RecursiveCheckpointAdjoint()`, for `jax.grad`;
        `diffrax.ForwardMode()` is for `jax.jvp`. KKT solvers and RKC2 have none: give
        `solver=diffrax.Tsit5()`, or take `gradflow.manifold.limit_map`, which has one.
    - `throw`: raise if the run fails; otherwise see `path.result`.
    - `progress`: show a progress bar.

    **Returns:** a `Path`. With a KKT solver its `train_loss` is computed from the
    multiplier, to about the relative accuracy of the parameters (but for the time
    between the phases, when it is below the tolerance and not yet on its plateau).

    **Raises:** `ValueError` for arguments that make no sense, before any compute (of
    what is being traced, the result says so: `wrong_argument`, and nothing is run);
    `RuntimeError` if the run fails and `throw`.
    """
    check_flow(flow)
    check_one(weight_decay, "weight_decay")
    wrong = check_arguments(
        weight_decay=weight_decay, init_scale=init_scale, rtol=rtol, max_steps=max_steps
    ) | check_given(atol=atol, solver=solver)
    watched = as_metrics(metrics)
    model = scaled(model, init_scale, trainable=flow.trainable)
    term, params = flow.term(model)
    dtype = jax.tree.leaves(params)[0].dtype
    wrong = wrong | check_horizon(weight_decay, slow_time, t1, ts, saves, dtype)
    check_problem(term, params, watched)
    rtol = resolvable(rtol, params)

    lam = jnp.asarray(weight_decay, dtype)
    times, size = prepare(
        term, params, lam, slow_time, t1, ts, saves, watched, measure=solver is None
    )

    def run(choice: Choice) -> Path:
        most = min(max_steps, TRIAL_STEPS) if choice.trial else max_steps
        given = (term, params, lam, times)
        if isinstance(choice.solver, (AbstractKKT, RKC2)):
            given = _underivable(given, type(choice.solver).__name__, adjoint)
        args = solve_arguments(
            *given,
            watched,
            choice.solver,
            rtol,
            atol,
            most,
            progress,
            adjoint,
        )
        path = solve_watching(*args) if kinked else solve(*args)
        path.stats["why"] = choice.why
        if is_concrete(path.t):
            again = functools.partial(run_again, args[:-1])
            path = dataclasses.replace(path, again=again)
        return path

    if wrong is not False:  # then nothing is run
        lam, times = (jnp.where(wrong, jnp.zeros_like(x), x) for x in (lam, times))
    kinked = all(map(is_concrete, jax.tree.leaves((term, params, lam, times))))
    kinked = kinked and _kinked(term, params)
    choice = as_choice(solver, size, rtol)
    path = run(choice)
    if choice.trial and bool(wants_another(path.result)):
        tried = path.stats["steps"]
        then = second_choice(size, rtol)
        if progress:
            tqdm.write(given_up(path, then.solver), file=sys.stderr)
        path = run(then)
        path.stats["trial_steps"] = tried
    path = named_wrong(path, wrong)
    return fail_unless_reached(path, path) if throw else path


def _underivable(values: PyTree, solver: str, adjoint: Any) -> PyTree:
    """`values`; who differentiates what comes of them gets an error."""
    told = (
        f"adjoint: a run by {solver} has no derivative; give solver=diffrax.Tsit5(), "
        "and adjoint=diffrax.ForwardMode() for jax.jvp; or take "
        "gradflow.manifold.limit_map, which has one for jax.grad."
    )
    if adjoint is not None:
        raise ValueError(told)
    arrays, rest = eqx.partition(values, eqx.is_array)
    if all(map(is_concrete, jax.tree.leaves(arrays))):
        return values

    @jax.custom_jvp
    def same(arrays):
        return arrays

    @same.defjvp
    def refuse(primals, tangents):
        raise ValueError(told)

    return eqx.combine(same(arrays), rest)


@eqx.filter_jit
def _kinked(term: FlowTerm, params: PyTree) -> bool:
    theta, loss = flatten(term.loss, params, term.static)
    return may_have_kinks(loss, theta)


def solve_watching(*arguments: Any) -> Path:
    """`solve`, in two parts: after the first it says where kinks make steps short."""
    with in_part():
        path, state, ended = solve_part(*arguments, None, jnp.asarray(FIRST))
    if bool(ended):
        return path
    steps, rejected = int(path.stats["steps"]), int(path.stats["rejected"])
    slid = path.stats.get("sliding")
    far = float(state.t) < 0.1 * float(path.t[-1])
    if far and (rejected if slid is None else int(slid)) > steps / 4:
        told = f"{rejected} rejected" if slid is None else f"{int(slid)} along kinks"
        warnings.warn(
            f"simulate: after {steps} steps ({told}) t = {float(state.t):.2g} of "
            f"{float(path.t[-1]):.2g}. Steps are short where the loss has kinks, as of "
            "ReLU or max-pooling; the run goes on, and may take long. A smooth "
            "activation (softplus, GELU) has none; or loosen rtol, or give an earlier "
            "end.",
            stacklevel=4,
        )
    return solve_part(*arguments, state, jnp.asarray(arguments[MAX_STEPS]))[0]


SOLVER, MAX_STEPS = 6, 9
"""The places of `solver` and `max_steps` among the arguments of `solve`."""


def given_up(path: Path, then: diffrax.AbstractSolver) -> str:
    """Says that a solver on trial has failed, and which one follows."""
    return (
        f"{path.stats['solver']} is given up after {int(path.stats['steps'])} steps; "
        f"{type(then).__name__} begins anew."
    )


def wants_another(result: RESULTS) -> Array:
    """Whether a solver on trial failed for a reason of its own."""
    reasons = (RESULTS.out_of_steps, RESULTS.unstable, RESULTS.stalled)
    return jnp.any(jnp.stack([result == reason for reason in reasons]))


def fail_unless_reached(out: PyTree, path: Path) -> PyTree:
    """Raises unless `path` reached its last time; returns `out`."""
    if is_concrete(path.result._value):
        if not bool(path.succeeded):
            raise RuntimeError(path.verdict)
        return out
    return path.result.error_if(out, ~path.succeeded)


def named_wrong(path: Path, wrong: Wrong) -> Path:
    """`path`, with the result and without the values of one that was not run, where
    `wrong` says so."""
    if wrong is False:
        return path
    values = lambda p: (p.params, p.metrics, p.train_loss, p.penalty)
    none = jax.tree.map(lambda x: jnp.where(wrong, jnp.nan, x), values(path))
    result = RESULTS.where(wrong, RESULTS.wrong_argument, path.result)
    return eqx.tree_at(lambda p: (*values(p), p.result), path, (*none, result))


def as_metrics(metrics: dict[str, Callable | Metric] | None) -> dict[str, Metric]:
    """Plain functions of the model, as metrics without a threshold.

    **Raises:** `ValueError` where they are no functions by name.
    """
    metrics = {} if metrics is None else metrics
    if not isinstance(metrics, Mapping):
        raise ValueError(
            "metrics: expected functions of the model by name, such as "
            f"{{'test': loss}}, got {word(metrics)}."
        )
    for name, fn in metrics.items():
        if not isinstance(name, str):
            raise ValueError(f"metrics: expected strings for names, got {word(name)}.")
        check_callable(fn, f"metrics[{name!r}]")
    return {
        name: fn if isinstance(fn, Metric) else Metric(fn)
        for name, fn in metrics.items()
    }


def check_problem(
    term: FlowTerm,
    params: PyTree,
    watched: dict[str, Metric] | None = None,
    *,
    mixed: bool = False,
) -> None:
    """Raises unless loss and metrics are real scalars of the model, in its precision
    (or another, where that may be `mixed`), with a logit for each label. Nothing is
    computed, and it is traced once only."""
    watched = {} if watched is None else watched
    shapes = _look(term, params, watched, mixed)
    for name, fn in _watching(term.loss, watched).items():
        if name in shapes and is_concrete(fn.labels):
            with _named(name):
                check_logits(fn.labels, shapes[name])


@eqx.filter_jit
def _look(
    term: FlowTerm, params: PyTree, watched: dict[str, Metric], mixed: bool
) -> dict[str, tuple[int, int]]:
    """Checks all but labels, which are not known here; and the shapes of the logits
    that they go with, by the names of loss and metrics."""
    model = term.model(params)
    check_scalars(term.loss, watched, model)
    dtype = jax.tree.leaves(params)[0].dtype
    composite = isinstance(term.loss, AbstractCompositeLoss) and not mixed
    for fn in (term.loss.outputs, term.loss) if composite else ():
        found = eqx.filter_eval_shape(fn, model).dtype
        if found != dtype:
            held = {a.dtype.name for a in jax.tree.leaves(term.loss) if eqx.is_array(a)}
            raise ValueError(
                f"model: its parameters are {dtype}, and the loss, with data of "
                f"{', '.join(sorted(held)) or 'none'}, gives {found}; cast the data to "
                f"{dtype}, or the model to {found}."
            )
    shapes = {}
    for name, fn in _watching(term.loss, watched).items():
        if isinstance(fn, CrossEntropy):
            n = fn.labels.shape[0]
            shapes[name] = (n, eqx.filter_eval_shape(fn.outputs, model).size // n)
        elif isinstance(fn, Accuracy):
            shapes[name] = eqx.filter_eval_shape(fn.logits, model).shape
    return shapes


def _watching(loss: AbstractLoss, watched: dict[str, Metric]) -> dict[str, Any]:
    """What is evaluated, by the name of its argument."""
    return {"loss": loss} | {f"metrics[{k!r}]": m.fn for k, m in watched.items()}


@contextlib.contextmanager
def _named(name: str):
    """Says of which metric an error is."""
    try:
        yield
    except ValueError as error:
        if name == "loss":
            raise
        first = str(error).partition("\n")[0]
        raise ValueError(f"{name}: {first}") from error


def check_scalars(
    loss: AbstractLoss, watched: dict[str, Metric], model: PyTree
) -> None:
    """Raises unless loss and metrics are real scalars; nothing is computed. Where it is
    called while tracing it costs nothing in later calls."""
    for name, fn in _watching(loss, watched).items():
        with _named(name):
            out = eqx.filter_eval_shape(fn, model)
        scalar = getattr(out, "shape", None) == ()
        if not scalar or not jnp.issubdtype(out.dtype, jnp.floating):
            shape = f"shape {out.shape}" if hasattr(out, "shape") else None
            kind = (scalar and str(out.dtype)) or shape or type(out).__name__
            raise ValueError(f"{name}: expected a real scalar, got {kind}.")


def prepare(
    term: FlowTerm,
    params: PyTree,
    weight_decay: Scalar,
    slow_time: float | Scalar | None,
    t1: float | Scalar | None,
    ts: Array | None,
    saves: int,
    watched: dict[str, Metric],
    *,
    measure: bool,
) -> tuple[Float[Array, " n"], Size | None]:
    """The times to save; and, if asked for, what `choose_solver` wants to know."""
    if ts is not None and not measure:
        return jnp.asarray(ts, weight_decay.dtype), None
    array = lambda x: None if x is None else jnp.asarray(x, weight_decay.dtype)
    return _prepare(
        term, params, weight_decay, array(slow_time), array(t1), array(ts), saves,
        watched, measure,
    )  # fmt: skip


@eqx.filter_jit
def _prepare(
    term: FlowTerm,
    params: PyTree,
    weight_decay: Scalar,
    slow_time: Scalar | None,
    t1: Scalar | None,
    ts: Float[Array, " n"] | None,
    saves: int,
    watched: dict[str, Metric],
    measure: bool,
) -> tuple[Float[Array, " n"], Size | None]:
    check_scalars(term.loss, watched, term.model(params))
    if ts is None:
        end = t1 if slow_time is None else slow_time / weight_decay
        ts = _save_times(term, params, weight_decay, end, saves)
    if not measure:
        return ts, None
    return ts, measure_size(term, params, weight_decay, ts[-1])


def _save_times(
    term: FlowTerm, params: PyTree, weight_decay: Scalar, t1: Scalar, saves: int
) -> Float[Array, " saves"]:
    """Zero, and `saves` − 1 times evenly spaced in log t up to `t1`, from the time in
    which θ would move by 1 % at its initial speed."""
    start = jnp.minimum(0.01 * _time_scale(term, params, weight_decay, t1), 0.1 * t1)
    fraction = jnp.linspace(0.0, 1.0, saves - 1, dtype=t1.dtype)
    later = (start * (t1 / start) ** fraction).at[-1].set(t1)
    return jnp.concatenate([jnp.zeros_like(later[:1]), later])


def _time_scale(
    term: FlowTerm, params: PyTree, weight_decay: Scalar, t1: Scalar
) -> Scalar:
    """‖θ₀‖/‖θ₀'‖, infinite at rest; a ten-thousandth of t₁ where θ₀ is zero."""
    size, speed = norm(params), norm(term.velocity(params, weight_decay))
    return jnp.where(size > 0, size / speed, 1e-4 * t1)


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
    scale = jnp.minimum(_time_scale(term, params, weight_decay, asked[-1]), asked[-1])
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
