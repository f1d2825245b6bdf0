"""The same flow for many weight decays, seeds, initial scales: along any axes."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import diffrax
import jax
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._checks import (
    check_arguments,
    check_choice,
    check_given,
    check_horizon,
    check_integer,
    is_concrete,
    word,
)
from .._typing import Given
from ..flow.flow import check_flow, GradientFlow
from ..losses import AbstractLoss
from ..metrics import Metric
from ..precision import exact_products
from ..runs.outcome import fail_unless_reached
from ..runs.problem import as_metrics
from ..runs.until import Until
from .axes import make_axes, Numbers
from .lanes import AbstractLanes, DescentLanes, FlowLanes
from .options import as_store, Descent, Store
from .plan import Plan, Problem, RECORDED, RUN, Span
from .problems import placed, placed_problem, Problems
from .programs import Batch
from .progress import ProgressBars
from .result import Sweep
from .runner import fitting, Runner
from .stored import run_stored

Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")

_MOVED = {f.name: "run=gf.Descent(…)" for f in dataclasses.fields(Descent)} | {
    f.name: "store=gf.Store(path, …)" for f in dataclasses.fields(Store)
}


def _told_where(
    function: Callable[Arguments, Returned],
) -> Callable[Arguments, Returned]:
    """With an error for what is an option of `run` or `store`, which says so."""

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
        for name in kwargs:
            if name in _MOVED:
                raise TypeError(f"{name}: give it as an option of {_MOVED[name]}.")
        return function(*args, **kwargs)

    return call


@_told_where
@exact_products
def sweep(
    problem: GradientFlow | Callable[..., Any],
    model: PyTree = None,
    *,
    weight_decay: Numbers,
    init_scale: Numbers = 1.0,
    rtol: Numbers | None = None,
    axes: Mapping[str, Any] | None = None,
    zipped: Sequence[Sequence[str]] = (),
    slow_time: float | None = None,
    t1: float | None = None,
    ts: Float[Array | np.ndarray, " n"] | None = None,
    saves: int = 65,
    metrics: dict[str, Callable | Metric] | None = None,
    solver: diffrax.AbstractSolver | None = None,
    atol: float | None = None,
    max_steps: int = 100_000,
    until: Until | None = None,
    run: Descent | None = None,
    batch: Batch | None = None,
    store: str | os.PathLike | Store | None = None,
    throw: bool = False,
    progress: bool | Mapping[str, str] = True,
) -> Sweep:
    """Runs a flow, or a descent, for every combination of values along some axes, with
    one compilation for each shape of the problem.

    For one problem, its weight decays: `gf.sweep(flow, model, weight_decay=lams, ...)`.
    For fresh data and models, a function of the other axes:

        make = lambda seed: gf.tasks.diagonal_network(jr.key(seed))
        gf.sweep(make, axes={"seed": range(5)}, weight_decay=lams, init_scale=scales)

    For descents instead of flows `run=gf.Descent(learning_rate=rates, steps=1000)`.

    **Arguments:** as for `simulate`, and

    - `problem`, `model`: a flow and its initial model; or a function that, called with
        one value of each of `axes` by name, returns a `Task`, or `(flow, model)`, or
        `(flow, model, metrics)`. What it gives may differ in data and in size. (A
        number that is part of a penalty or a loss is best made an array,
        `jnp.asarray(c) * gf.L1()`: for each plain number a program is compiled.)
    - `weight_decay`, `init_scale`, `rtol`: a number, or a vector: an axis of that name.
        (No schedule: those are for `simulate`.)
        `rtol` is 1e-6 unless given. Descents have their `learning_rate`.
    - `axes`: values for `problem`, by name: seeds, sample sizes, penalty weights, …
    - `zipped`: groups of names of axes that run together, along the dimension of the
        first, instead of making a product: `[("samples", "weight_decay")]`.
    - `slow_time`, `t1`, `ts`: give one; that of the `Task` by default. For descents
        `slow_time` or `t1`, unless `run` tells how many steps to take.
    - `metrics`: in addition to those that `problem` gives.
    - `until`: what ends a lane early; see `simulate` and `descent`. Each lane has its
        own end, which is repeated in the arrays of the sweep up to the number of times
        of the others; `sweep[i]` is without that.
    - `run`: a [`gradflow.Descent`][] for descents; `rtol`, `ts`, `solver`, `atol` and
        `max_steps` are for flows alone.
    - `batch`: `"loop"` runs lane after lane, `"vmap"` as many in lockstep as fit into
        memory. The default is to loop on a CPU, where lockstep only costs, and to vmap
        on an accelerator. Lanes are shared among all devices of this process.
    - `store`: a folder to keep the results in, such as `"sweep.zarr"`; or a
        [`gradflow.Store`][] with a path and options. See below.
    - `throw`: raise if any lane fails; by default failures are marked in `result`.
    - `progress`: show a bar with the lanes done and failed; or symbols by which it is
        to name axes, as `{"weight_decay": "γ"}`.

    The dimensions are those of `axes`, then `init_scale`, `rtol`, `learning_rate` and
    `weight_decay` as far as they are vectors. A solver is chosen for each problem and
    tolerance, by its stiffest lane.

    With `store`, results go to disk chunk by chunk, each whole or not at all, and not
    into memory. Whatever ends the run, the same call goes on where it stopped: finished
    chunks are not computed again (but for those whose checksums are wrong, which are
    named), and long lanes go on from their checkpoints. Where there are many processes
    (`jax.distributed.initialize`) each computes its share of the chunks. A store of
    another configuration is refused, with the differences. What is compared are arrays
    and options, and what `problem` makes for the first lane; of functions their names,
    and what they close over. (By default JAX ends all processes five minutes after the
    first has left: give `initialize` a `shutdown_timeout_seconds` where one goes on.)

    **Returns:** a `Sweep`. With `store` it reads from there what it is asked for; of
    its labelled arrays, `to_xarray()`, `gf.open_results(path)` is a way to those of an
    unfinished run.

    **Raises:** `ValueError` for arguments that make no sense, before any compute;
    `RuntimeError` if a lane fails and `throw`. If `problem` is a function, a lane for
    which it, or the run, raises an error is marked instead; the error is raised if that
    is so for all.
    """
    if not isinstance(run, Descent | None):
        raise ValueError(f"run: expected a gradflow.Descent, got {word(run)}.")
    if run is None and rtol is None:
        rtol = 1e-6
    arguments: dict[str, Any] = dict(
        init_scale=init_scale, rtol=rtol, learning_rate=run and run.learning_rate,
        weight_decay=weight_decay, slow_time=slow_time, t1=t1, ts=ts,
        steps=run and run.steps, at=run and run.at, saves=saves, solver=solver,
        atol=atol, max_steps=max_steps, until=until, method=run and run.method,
        optimiser=run and run.optimiser, batch_size=run and run.batch_size,
        label_noise=run and run.label_noise,
        gradient_noise=run and run.gradient_noise, key=run and run.key,
    )  # fmt: skip
    check_choice(batch, "batch", ("loop", "vmap", None))
    kept = as_store(store)
    lanes = make_lanes(problem, model, arguments, axes, zipped, as_metrics(metrics))
    if batch is None:
        batch = "loop" if jax.default_backend() == "cpu" else "vmap"
    if kept is not None:
        if throw:
            raise ValueError("throw: a sweep with a store marks the lanes that fail.")
        return run_stored(lanes, batch, progress, kept)
    out = _run(lanes, batch, progress)
    if throw:
        worst = int(np.argmin(np.asarray(out.succeeded)))
        if worst in out.causes:
            raise RuntimeError(f"lane {worst}: {out.causes[worst]}")
        out = fail_unless_reached(out, out[worst])
    return out


def make_lanes(
    problem: GradientFlow | Callable[..., Any],
    model: PyTree,
    arguments: dict[str, Any],
    axes: Mapping[str, Any] | None,
    zipped: Sequence[Sequence[str]],
    metrics: dict[str, Metric],
) -> FlowLanes | DescentLanes:
    """What makes the lanes, from what `sweep` was given, checked; `arguments` are those
    of the runs, by name, and what is not given is `None`.

    **Raises:** `ValueError` for arguments that make no sense, before any compute.
    """
    for name, value in arguments.items():
        if not all(map(is_concrete, jax.tree.leaves(value))):
            raise ValueError(
                f"{name}: expected numbers known before tracing; under jit or vmap "
                "take simulate or descent."
            )
    axes = dict(axes or {})
    _check_axes(axes)
    make = _maker(problem, model, axes, metrics)
    runs = {name: arguments[name] for name in _ORDER}
    rest = {name: value for name, value in arguments.items() if name not in runs}
    if runs["weight_decay"] is None:
        raise ValueError("weight_decay: expected a number or a vector, got None.")
    if callable(runs["weight_decay"]):
        raise ValueError(
            "weight_decay: a sweep takes numbers; a schedule is for gradflow.simulate, "
            "and many of them for a jax.vmap of that."
        )
    vectors = {k: v for k, v in runs.items() if v is not None and np.ndim(v) > 0}
    for name, v in vectors.items():
        if np.ndim(v) > 1:
            raise ValueError(f"{name}: expected a number or a vector, got {v!r}.")
    fixed = {k: _number(v) for k, v in runs.items() if k not in vectors}
    asked = placed(rest, "ts, key")
    span = Span(*(asked[name] for name in Span._fields))
    product = make_axes(axes | vectors, zipped)
    plan = Plan(product, make, metrics, fixed, span, asked["saves"], asked)
    _check(plan)
    if runs["learning_rate"] is None:
        options = (asked[k] for k in ("solver", "atol", "max_steps"))
        return FlowLanes(plan, Problems(plan, mixed=False), *options)
    # A loss that is computed in double precision for weights in single is no obstacle.
    names = (
        "method", "optimiser", "batch_size", "label_noise", "gradient_noise", "key",
    )  # fmt: skip
    options = (asked[name] for name in names)
    return DescentLanes(plan, Problems(plan, mixed=True), *options)


_ORDER = ("init_scale", "rtol", "learning_rate", "weight_decay")
"""Of the dimensions of what may be a vector."""


def _check_axes(axes: dict[str, Any]) -> None:
    """Raises `ValueError` for names that axes cannot have."""
    for name in axes:
        if name == "learning_rate":
            raise ValueError("axes: give the values of learning_rate to gf.Descent.")
        if name in RUN:
            raise ValueError(f"axes: give the values of {name} as the argument itself.")
        if name in RECORDED or name.startswith(("metric_", "threshold_", "params_")):
            raise ValueError(f"axes: {name!r} is what is recorded; name it otherwise.")


def _maker(
    problem: GradientFlow | Callable[..., Any],
    model: PyTree,
    axes: dict[str, Any],
    metrics: dict[str, Metric],
) -> Any:
    """The problem, where there is one; or the function that makes them."""
    if isinstance(problem, AbstractLoss):
        check_flow(problem)
    if isinstance(problem, GradientFlow):
        if model is None or axes:
            kind = "axes: they are for a function" if axes else "model: expected one"
            raise ValueError(f"{kind}, where the problem is a flow.")
        problem.term(model)
        return placed_problem(Problem(problem, model, metrics))
    if not callable(problem):
        kind = type(problem).__name__
        raise ValueError(f"problem: expected a GradientFlow or a function, got {kind}.")
    if model is not None:
        raise ValueError("model: the function that makes the problem gives it.")
    return problem


def _check(plan: Plan) -> None:
    """Raises `ValueError` for values that make no sense."""
    for name in RUN:
        for value in plan.all_values(name):
            check_given(**{name: value})
    asked = plan.asked
    check_arguments(max_steps=asked["max_steps"])
    check_given(atol=asked["atol"], solver=asked["solver"])
    descends = plan.all_values("learning_rate") != (None,)
    if descends:
        given = asked | {"rtol": plan.all_values("rtol")[0]}
        for name in ("ts", "solver", "atol", "rtol"):
            if given[name] is not None:
                raise ValueError(f"{name}: has no meaning for descents.")
    # What a function gives may be a task, which tells how far it asks to be run.
    if not descends and (plan.span.given or isinstance(plan.make, Problem)):
        lams = np.asarray(plan.all_values("weight_decay"))
        check_horizon(lams, **plan.span.of_flow, saves=plan.saves)
    else:
        check_integer(plan.saves, "saves", 3)


def _number(value: Given) -> Given:
    """As a plain number of Python's, if it is one."""
    return value if value is None or callable(value) else np.asarray(value).item()


def _run(
    lanes: AbstractLanes, batch: Batch, progress: bool | Mapping[str, str]
) -> Sweep:
    """All lanes, in memory."""
    plan = lanes.plan
    count = len(plan.axes)
    with ProgressBars(plan.axes, count, progress) as bars:
        size = fitting(lanes, batch, count)
        ran = Runner(lanes, batch, bars, size).run(range(count))
    if not ran.done:
        assert ran.error is not None
        raise ran.error
    first = ran.problems[0]
    paths = dataclasses.replace(
        ran.paths,
        static=None if ran.many else first.static,
        watched=first.watched,
    )
    owned = ran.problems if ran.many else ()
    return Sweep(paths, plan.axes, owned, ran.causes, plan.fixed_numbers, lanes)
