"""One path of the gradient flow."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar
from tqdm.auto import tqdm

from .._checks import (
    check_arguments,
    check_given,
    check_horizon,
    check_one,
    is_concrete,
    resolvable,
)
from .._typing import Given, Schedule
from ..flow.decay import DecaySchedule, InSlowTime
from ..flow.flow import check_flow, GradientFlow, scaled
from ..flow.nonsmooth import loss_may_have_kinks
from ..flow.term import FlowTerm
from ..metrics import Metric, without_thresholds
from ..precision import exact_products
from ..results import named_wrong
from ..solvers import (
    AbstractFlowSolver,
    as_choice,
    as_flow_solver,
    Choice,
    cpu_advice,
    second_choice,
    TRIAL_STEPS,
)
from .again import Again
from .finite_steps import check_end, check_steps, CHOICE, NO_DERIVATIVE
from .outcome import fail_unless_reached, given_up, recorded, wants_another
from .path import Path
from .problem import as_metrics, check_problem
from .progress import Bar
from .solve import Solve
from .times import as_decay, check_decay, prepare
from .until import as_criterion, Until, words_of
from .windows import solve_through


@exact_products
def simulate(
    flow: GradientFlow,
    model: PyTree,
    *,
    weight_decay: float | Scalar | Schedule | InSlowTime,
    learning_rate: float | Scalar | None = None,
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
    until: Until | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
    throw: bool = True,
    progress: bool = False,
) -> Path:
    """Runs the flow θ' = −∇F(θ) − λ∇R(θ) from `model`; θ' = −G(∇F(θ) + λ∇R(θ)) where
    it has `rates` G.

    Where the penalty has kinks at zero coordinates, as ℓ1, it runs the differential
    inclusion θ' ∈ −∇F(θ) − λ∂R(θ), with the element of least norm on the right:
    coordinates that reach zero and may stay there do stay, exactly. Steps end where one
    is caught or let go. (A force that would let one go, and fades again, all within a
    step, is not seen: give close `ts` where forces come in short pulses.)

    With a `learning_rate` h it runs gradient descent, θ ← θ − h(∇F + λ∇R), also where h
    is beyond 2/L, L the largest curvature of F + λR, by solving a flow that its steps
    follow: descent goes to and fro between w + ρu and w − ρu, with

        w' = −½(g(w + ρu) + g(w − ρu)) + O(h),    g = ∇F + λ∇R,
        ρ' = (ρ/h) ln(hq − 1) + O(h),    q = uᵀ(g(w + ρu) − g(w − ρu))/(2ρ),

    u near the first eigenvector of ∇²F; see `gradflow.flow.finite_steps` for the terms
    of order h and the sources. Parameters are w, and what is recorded is the mean over
    both points, as over two steps. Below the edge, ρ = 0, that is the modified equation
    θ' = −∇(E + ¼h‖∇E‖²), E = F + λR. The first 16 steps are taken as they are. Then w
    is that of the descent but for O(h²), as long as it changes little in a step: in the
    tests to 1e-3 over a thousand steps at the edge, the sharpness there to 2 % of 2/h.
    `path.stats.deviation` is an estimate of the error, and from 0.05 on the run has
    failed, as `coarse`: so it is where steps far beyond 2/L lead to chaos. Where ρ
    rises from rounding, the descent itself is not the same on every machine. θ' takes
    some six gradients of F: for less than some 10⁵ steps [`gradflow.descent`][] is
    quicker. F is to be smooth: at kinks, as of ReLU, steps of the solver are short, and
    `deviation` does not see them.

    **Arguments:**

    - `flow`: the flow: loss, penalty and what is trainable.
    - `model`: the initial model θ₀, any Equinox module.
    - `weight_decay`: λ ≥ 0; or a schedule, a function of t such as one of Optax's, with
        `t1` or `ts`; or `gradflow.InSlowTime` of a function of s, with a `slow_time`.
        On a schedule s = ∫λ dt. It is compiled for: give the same function again, or
        an Equinox module that holds numbers as arrays. Steps are as short as its
        changes ask for; what it jumps by at a time in `ts` is not passed over.
    - `learning_rate`: h > 0, of time t, for descent in steps of h instead of the flow;
        it may be traced. Needs float64, a smooth penalty, a `weight_decay` that is a
        number, an end after more than 16 steps, and an explicit solver: RKC2 unless
        given. No derivative leads through it, and times of crossings are interpolated.
    - `init_scale`: α, the factor by which all initial parameters are multiplied. (A
        flow that holds the norm holds that of αθ₀.)
    - `slow_time`, `t1`, `ts`: give one. Run to slow time s = λt, to time t, or through
        the given increasing times t ≥ 0.
    - `saves`: how many times are saved when `ts` is not given: zero, and then evenly
        in log t from the time in which θ would move by 1 % (a millionth of the last
        where θ₀ is zero). The solver lands on each;
        interpolating would leave the manifold.
    - `metrics`: functions of the model, by name, that give a number or an array;
        `Metric` adds a threshold.
    - `solver`: a gradflow or Diffrax solver; see
        [`gradflow.solvers.choose_solver`][] for the default.
    - `rtol`: relative tolerance. The relative error of the parameters, ‖θ − θ⋆‖/‖θ⋆‖,
        stays of this size: below 5 `rtol` on every task in the tests, 6 were seen with
        the kinks of a Huber loss. (Of θ itself where the flow has `rates`, too: over
        four decades of G errors were 0.2 to 2.3 `rtol` with KKT, up to 6 with RKC2.)
    - `atol`: absolute tolerance for each coordinate; by default 0.02 · `rtol` · rms(θ)
        of the θ at that time, so that it means the same in every unit.
    - `max_steps`: the budget of steps.
    - `until`: end the run before that, at the first time at which a criterion holds:
        the name of one of `metrics`, to pass its threshold (for the first time, not for
        good); [`gradflow.SmallGradient`][] or [`gradflow.SteadyState`][]; or a function
        of the model that gives a boolean of JAX's. It is looked at when the run starts
        and after each step, so one that holds for a part of a step only is not seen
        (close `ts` are more looks). Where it holds, steps to times before are tried,
        until the first is known to 0.1 · `rtol` of it; and there the path ends, its
        result `criterion_met`. One that never holds is no failure: the run ends as
        without, and is printed as such.
    - `adjoint`: how the run is differentiated, with Diffrax's own solvers: one of its
        adjoints, by default `diffrax.RecursiveCheckpointAdjoint()`, for `jax.grad`;
        `diffrax.ForwardMode()` is for `jax.jvp`. KKT solvers and RKC2 have none: give
        `solver=diffrax.Tsit5()`, or take `gradflow.manifold.limit_map`, which has one.
    - `throw`: raise if the run fails; otherwise see `path.result`.
    - `progress`: show a progress bar (none while it is being traced).

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
        init_scale=init_scale, rtol=rtol, max_steps=max_steps
    ) | check_given(atol=atol, solver=solver)
    if learning_rate is not None:
        wrong = wrong | check_steps(
            flow, model, learning_rate, weight_decay, solver, adjoint
        )
    if not callable(weight_decay):
        wrong = wrong | check_arguments(weight_decay=weight_decay)
    watched = as_metrics(metrics)
    bare = without_thresholds(watched)  # as in a sweep: what is compiled serves both
    model = scaled(model, init_scale, trainable=flow.trainable)
    term, params = flow.term(model)
    dtype = jax.tree.leaves(params)[0].dtype
    lam, slow_time, t1 = as_decay(weight_decay, slow_time, t1, ts, dtype)
    decay = 1.0 if isinstance(lam, DecaySchedule) else weight_decay
    wrong = wrong | check_horizon(decay, slow_time, t1, ts, saves, dtype)
    check_problem(term, params, watched)
    criterion = as_criterion(until, term, params, watched)
    rtol = resolvable(rtol, params)

    times, size = prepare(
        term, params, lam, slow_time, t1, ts, saves,
        measure=solver is None and learning_rate is None,
    )  # fmt: skip
    if learning_rate is not None:
        wrong = wrong | check_end(times, learning_rate)
    wrong = wrong | check_decay(lam, times)

    def run(choice: Choice) -> Path:
        given: dict[str, Any] = dict(
            term=term, params=params, weight_decay=lam, ts=times,
            learning_rate=learning_rate,
        )  # fmt: skip
        known = as_flow_solver(choice.solver)
        if told := _no_derivative(known, criterion, learning_rate):
            given = _underivable(given, adjoint, told)
        one = Solve.of(
            **given,
            watched=bare,
            solver=choice.solver,
            rtol=rtol,
            atol=atol,
            max_steps=min(max_steps, TRIAL_STEPS) if choice.trial else max_steps,
            adjoint=adjoint,
            until=criterion,
        )
        with Bar(known.name, shown=progress and concrete) as bar:
            path = solve_through(one, bar, kinked=kinked)
        path = dataclasses.replace(path, watched=watched).to_its_end()
        path = path.told(until=words_of(until))
        why = choice.why
        if is_concrete(path.t) and learning_rate is None:
            path = dataclasses.replace(path, again=Again(one))
            if size is not None:
                why += cpu_advice(size, choice.solver, _platform(path))
        return path.told(why=why)

    if wrong is not False:  # then nothing is run
        times = jnp.where(wrong, jnp.zeros_like(times), times)
        if not isinstance(lam, DecaySchedule):
            lam = jnp.where(wrong, jnp.zeros_like(lam), lam)
        if learning_rate is not None:
            learning_rate = jnp.where(wrong, 1.0, learning_rate)
    arrays = jax.tree.leaves(
        eqx.filter(
            (term, params, lam, times, bare, rtol, atol, criterion, learning_rate),
            eqx.is_array,
        )
    )
    concrete = all(map(is_concrete, arrays))
    kinked = concrete and _kinked(term, params)
    steps = learning_rate is not None and solver is None
    choice = CHOICE if steps else as_choice(solver, size, rtol)
    path = run(choice)
    if choice.trial and size is not None and bool(wants_another(path.result)):
        then = second_choice(size, rtol)
        if progress:
            tqdm.write(given_up(path, then.solver), file=sys.stderr)
        path = run(then).told(trial_steps=path.stats.steps)
    path = named_wrong(path, wrong, recorded)
    return fail_unless_reached(path, path) if throw else path


def _platform(path: Path) -> str:
    """Of the device that it was run on."""
    (device, *_) = path.train_loss.devices()
    return device.platform


Values = TypeVar("Values")

_BY = (
    "adjoint: a run by {} has no derivative; give solver=diffrax.Tsit5(), and "
    "adjoint=diffrax.ForwardMode() for jax.jvp; or take gradflow.manifold.limit_map, "
    "which has one for jax.grad."
)
_UNTIL = "until: a run that a criterion ends has no derivative; give t1 or slow_time."


def _no_derivative(solver: AbstractFlowSolver, until: Given, rate: Given) -> str:
    """Why a run has no derivative; nothing where it has one."""
    if until is not None:
        return _UNTIL
    if rate is not None:
        return NO_DERIVATIVE
    return "" if solver.differentiable else _BY.format(solver.name)


def _underivable(values: Values, adjoint: Given, told: str) -> Values:
    """`values`; who differentiates what comes of them gets an error, which is told."""
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
    return loss_may_have_kinks(term, params)
