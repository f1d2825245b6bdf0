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

from .._checks import check_choice, is_concrete, word
from ..flow.flow import check_flow, GradientFlow
from ..losses import AbstractLoss
from ..metrics import Metric
from ..runs.outcome import fail_unless_reached
from ..runs.problem import as_metrics
from .axes import make_axes, Numbers
from .lanes import fitting, Runner
from .options import as_store, Descent, Store
from .programs import Batch
from .progress import Bars
from .recipe import placed, placed_problem, Problem, Recipe, RECORDED, RUN
from .result import Sweep
from .stored import run_stored

Given = ParamSpec("Given")
Returned = TypeVar("Returned")

_MOVED = {f.name: "run=gf.Descent(…)" for f in dataclasses.fields(Descent)} | {
    f.name: "store=gf.Store(path, …)" for f in dataclasses.fields(Store)
}


def _told_where(function: Callable[Given, Returned]) -> Callable[Given, Returned]:
    """With an error for what is an option of `run` or `store`, which says so."""

    @functools.wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Returned:
        for name in kwargs:
            if name in _MOVED:
                raise TypeError(f"{name}: give it as an option of {_MOVED[name]}.")
        return function(*args, **kwargs)

    return call


@_told_where
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
    run: Descent | None = None,
    batch: Batch | None = None,
    store: str | os.PathLike | Store | None = None,
    throw: bool = False,
    progress: bool = True,
) -> Sweep | Any:
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
        `rtol` is 1e-6 unless given. Descents have their `learning_rate`.
    - `axes`: values for `problem`, by name: seeds, sample sizes, penalty weights, …
    - `zipped`: groups of names of axes that run together, along the dimension of the
        first, instead of making a product: `[("samples", "weight_decay")]`.
    - `slow_time`, `t1`, `ts`: give one; that of the `Task` by default. For descents
        `slow_time` or `t1`, unless `run` tells how many steps to take.
    - `metrics`: in addition to those that `problem` gives.
    - `run`: a [`gradflow.Descent`][] for descents; `rtol`, `ts`, `solver`, `atol` and
        `max_steps` are for flows alone.
    - `batch`: `"loop"` runs lane after lane, `"vmap"` as many in lockstep as fit into
        memory. The default is to loop on a CPU, where lockstep only costs, and to vmap
        on an accelerator. Lanes are shared among all devices of this process.
    - `store`: a folder to keep the results in, such as `"sweep.zarr"`; or a
        [`gradflow.Store`][] with a path and options. See below.
    - `throw`: raise if any lane fails; by default failures are marked in `result`.
    - `progress`: show a bar with the lanes done and failed.

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

    **Returns:** a `Sweep`; with `store`, what `gf.open_results` gives.

    **Raises:** `ValueError` for arguments that make no sense, before any compute;
    `RuntimeError` if a lane fails and `throw`. If `problem` is a function, a lane for
    which it, or the run, raises an error is marked instead; the error is raised if that
    is so for all.
    """
    if not isinstance(run, Descent | None):
        raise ValueError(f"run: expected a gradflow.Descent, got {word(run)}.")
    if run is None and rtol is None:
        rtol = 1e-6
    runs: dict[str, Any] = dict(
        init_scale=init_scale, rtol=rtol,
        learning_rate=run and run.learning_rate,
        weight_decay=weight_decay,
    )  # fmt: skip
    options: dict[str, Any] = dict(
        slow_time=slow_time, t1=t1, ts=ts, steps=run and run.steps, at=run and run.at,
        saves=saves, solver=solver, atol=atol, max_steps=max_steps,
        method=run and run.method, optimiser=run and run.optimiser,
        batch_size=run and run.batch_size, key=run and run.key,
    )  # fmt: skip
    check_choice(batch, "batch", ("loop", "vmap", None))
    kept = as_store(store)
    recipe = make_recipe(
        problem, model, runs, axes, zipped, as_metrics(metrics), options
    )
    if batch is None:
        batch = "loop" if jax.default_backend() == "cpu" else "vmap"
    if kept is not None:
        if throw:
            raise ValueError("throw: a sweep with a store marks the lanes that fail.")
        return run_stored(recipe, batch, progress, kept)
    out = _run(recipe, batch, progress)
    if throw:
        worst = int(np.argmin(np.asarray(out.succeeded)))
        if worst in out.causes:
            raise RuntimeError(f"lane {worst}: {out.causes[worst]}")
        out = fail_unless_reached(out, out[worst])
    return out


def make_recipe(
    problem: GradientFlow | Callable[..., Any],
    model: PyTree,
    runs: dict[str, Any],
    axes: Mapping[str, Any] | None,
    zipped: Sequence[Sequence[str]],
    metrics: dict[str, Metric],
    options: dict[str, Any],
) -> Recipe:
    """How to make the lanes, from the arguments of `sweep`, checked.

    **Raises:** `ValueError` for arguments that make no sense.
    """
    axes = dict(axes or {})
    for name in axes:
        if name == "learning_rate":
            raise ValueError("axes: give the values of learning_rate to gf.Descent.")
        if name in RUN:
            raise ValueError(f"axes: give the values of {name} as the argument itself.")
        if name in RECORDED or name.startswith(("metric_", "threshold_", "params_")):
            raise ValueError(f"axes: {name!r} is what is recorded; name it otherwise.")
    if isinstance(problem, AbstractLoss):
        check_flow(problem)
    for name, value in (runs | options).items():
        if any(not is_concrete(leaf) for leaf in jax.tree.leaves(value)):
            raise ValueError(
                f"{name}: expected numbers known before tracing; under jit or vmap "
                "take simulate or descent."
            )
    if isinstance(problem, GradientFlow):
        if model is None or axes:
            kind = "axes: they are for a function" if axes else "model: expected one"
            raise ValueError(f"{kind}, where the problem is a flow.")
        problem.term(model)
        make: Any = placed_problem(Problem(problem, model, metrics))
    elif callable(problem):
        if model is not None:
            raise ValueError("model: the function that makes the problem gives it.")
        make = problem
    else:
        kind = type(problem).__name__
        raise ValueError(f"problem: expected a GradientFlow or a function, got {kind}.")
    if runs["weight_decay"] is None:
        raise ValueError("weight_decay: expected a number or a vector, got None.")
    vectors = {k: v for k, v in runs.items() if v is not None and np.ndim(v) > 0}
    for name, v in vectors.items():
        if np.ndim(v) > 1:
            raise ValueError(f"{name}: expected a number or a vector, got {v!r}.")
    fixed = {k: _number(v) for k, v in runs.items() if k not in vectors}
    options = placed(options, "ts, key")
    recipe = Recipe(make_axes(axes | vectors, zipped), make, metrics, fixed, options)
    recipe.check()
    return recipe


def _number(value: Any) -> Any:
    return value if value is None or callable(value) else np.asarray(value).item()


def _run(recipe: Recipe, batch: Batch, progress: bool) -> Sweep:
    """All lanes, in memory."""
    count = len(recipe.axes)
    with Bars(recipe.axes, count, progress) as bars:
        size = fitting(recipe, batch, count)
        lanes = Runner(recipe, batch, bars).run(range(count), size)
    if not lanes.done:
        assert lanes.error is not None
        raise lanes.error
    first = lanes.owned[0]
    paths = dataclasses.replace(
        lanes.paths,
        static=None if lanes.many else first.static,
        watched=first.watched,
    )
    owned = lanes.owned if lanes.many else ()
    fixed = {k: v for k, v in recipe.fixed.items() if isinstance(v, int | float)}
    return Sweep(paths, recipe.axes, owned, lanes.causes, fixed, recipe)
