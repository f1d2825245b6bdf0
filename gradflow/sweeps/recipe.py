"""What each lane of a sweep runs."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from .._checks import (
    check_arguments,
    check_given,
    check_horizon,
    check_integer,
    is_concrete,
    is_key,
    resolvable,
)
from ..flow.flow import GradientFlow, scaled
from ..flow.term import place
from ..metrics import Metric
from ..runs.descent import prepare_descent
from ..runs.problem import as_metrics, check_problem
from ..runs.solve import Solve
from ..runs.steps import Descend
from ..runs.times import prepare
from ..solvers import as_choice, Choice, measure_size, second_choice, TRIAL_STEPS
from ..tasks import Task
from .axes import Axes
from .stack import Owned

RUN = ("weight_decay", "init_scale", "rtol", "learning_rate")
"""The arguments of a run that may be vectors; the axes of a problem are the others."""
RECORDED = frozenset(
    "t time slow_time train_loss penalty result steps accepted rejected atol why "
    "trial_steps iterations kernels sliding conditioning".split()
)
"""Names in the results, which axes cannot have."""


class Problem(NamedTuple):
    """What is run: the flow, from where, and what is watched."""

    flow: GradientFlow
    model: PyTree
    watched: dict[str, Metric]
    slow_time: float | None = None
    """How far a task asks to be run."""


class Lane(NamedTuple):
    """One run of a sweep."""

    run: Solve | Descend
    why: str
    """The reason for its solver."""
    again: "Lane | None" = None
    """What to do if its solver, which was only tried, fails."""
    cost: float = 0.0
    """Grows with the work that is to be expected."""
    name: str = ""
    """Of its checkpoint."""
    shares: bool = False
    """Whether its term, the flow, is that of all lanes."""
    state: PyTree | None = None
    """Of a part of it: where the last one ended."""
    steps: Array | None = None
    """Of a part of it: how many."""


class Unlike(ValueError):
    """A lane whose results are not of the shape of the others'."""


def placed(tree: PyTree, name: str = "problem") -> PyTree:
    """With arrays that were put on devices, or shared out among them, free to go
    wherever a lane is run.

    **Raises:** `ValueError` for an array that other processes hold a part of.
    """

    def free(x: Any) -> Any:
        if not _committed(x):
            return x
        if not (x.is_fully_addressable or x.is_fully_replicated):
            raise ValueError(
                f"{name}: expected arrays of this process, got one of shape {x.shape} "
                "that is shared out among several; give each process all of it."
            )
        if is_key(x):
            data = jnp.asarray(np.asarray(jax.random.key_data(x)))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        return jnp.asarray(np.asarray(x))

    if not any(map(_committed, jax.tree.leaves(tree))):
        return tree
    return jax.tree.map(free, tree)


def _committed(x: Any) -> bool:
    return isinstance(x, jax.Array) and is_concrete(x) and x.committed


def placed_problem(problem: Problem) -> Problem:
    """The same, where a metric that is the loss is still the loss."""
    out = placed(problem)
    loss = problem.flow.loss
    same = {k: out.flow.loss for k, m in problem.watched.items() if m.fn is loss}
    watched = {
        k: dataclasses.replace(m, fn=same[k]) if k in same else m
        for k, m in out.watched.items()
    }
    return out._replace(watched=watched)


@dataclasses.dataclass
class Recipe:
    """Makes the lanes of a sweep. Problems are made when they are needed, and only the
    last is kept, with its start at the last scale."""

    axes: Axes
    make: Callable[..., Any] | Problem
    metrics: dict[str, Metric]
    fixed: dict[str, Any]
    """Those of `RUN` that are no axes; without `learning_rate` for a flow."""
    options: dict[str, Any]
    """All other arguments, as for `simulate` or `descent`."""

    def __post_init__(self) -> None:
        self._problem: tuple[Any, Any] = (None, None)
        self._like: tuple[int, set[str]] | None = None
        self._start: tuple[Any, Any] = (None, None)
        self._bare: tuple[Any, dict[str, Metric]] = (None, {})
        self._sized: dict[Any, Any] = {}
        self._siblings: dict[Any, list[int]] = {}

    @property
    def descends(self) -> bool:
        return self.value(0, "learning_rate") is not None

    def value(self, lane: int, name: str) -> Any:
        if name not in self.axes.along:
            return self.fixed.get(name)
        return self.axes.at(lane)[name]

    def check(self) -> None:
        """Raises `ValueError` for arguments that make no sense, before any compute."""
        for name in RUN:
            for value in self.axes.values.get(name, (self.fixed.get(name),)):
                check_given(**{name: value})
        check_arguments(max_steps=self.options["max_steps"])
        check_given(atol=self.options["atol"], solver=self.options["solver"])
        given = self.options | {"rtol": self.value(0, "rtol")}
        for name in _FLOW_ONLY if self.descends else ():
            if given[name] is not None:
                raise ValueError(f"{name}: has no meaning for descents.")
        told = any(self.options.get(k) is not None for k in _HORIZON)
        if not self.descends and (told or isinstance(self.make, Problem)):
            span = {k: self.options.get(k) for k in _SPAN}
            lams = self.axes.values.get("weight_decay", self.fixed.get("weight_decay"))
            check_horizon(np.asarray(lams), **span, saves=self.options["saves"])
        else:
            check_integer(self.options["saves"], "saves", 3)

    def problem(self, lane: int) -> Problem:
        """The problem of a lane, made anew unless it is that of the lane before."""
        if isinstance(self.make, Problem):
            return self.make
        values = {k: v for k, v in self.axes.at(lane).items() if k not in RUN}
        key = self.owner(lane)
        if self._problem[0] != key:
            self._problem = (None, None)  # let go of the last one first
            made = as_problem(self.make(**values), self.metrics)
            self._problem = (key, placed_problem(made))
        return self._problem[1]

    def owner(self, lane: int) -> tuple[int, ...]:
        """Which lanes have the same problem: their positions along its axes."""
        place = np.unravel_index(lane, self.axes.shape)
        own = {d for name, d in self.axes.along.items() if name not in RUN}
        return tuple(
            int(i) for i, d in zip(place, self.axes.dims, strict=True) if d in own
        )

    def siblings(self, lane: int) -> list[int]:
        """All lanes with the same problem and tolerance."""
        key = lambda k: (self.owner(k), self.value(k, "rtol"))
        if not self._siblings:
            for k in range(len(self.axes)):
                self._siblings.setdefault(key(k), []).append(k)
        return self._siblings[key(lane)]

    def owned(self, lane: int) -> Owned:
        problem = self.problem(lane)
        term, params = problem.flow.term(problem.model)
        return Owned(place(params, term.static)[1], problem.watched)

    def start(self, lane: int) -> tuple[Any, Any]:
        """The flow as a term, and the scaled parameters."""
        key = (self.owner(lane), self.value(lane, "init_scale"))
        if self._start[0] != key:
            flow, model, *_ = self.problem(lane)
            begin = scaled(model, key[1], trainable=flow.trainable)
            self._start = (key, flow.term(begin))
        return self._start[1]

    def lane(self, lane: int) -> Lane:
        """What a lane runs.

        **Raises:** whatever the function that makes the problem raises, and
        `ValueError` for what it makes.
        """
        problem = self.problem(lane)
        if self._bare[0] is not problem.watched:
            # Thresholds would be part of the compiled program, which is for all.
            bare = {k: Metric(metric.fn) for k, metric in problem.watched.items()}
            self._bare = problem.watched, bare
            term, params = problem.flow.term(problem.model)
            check_problem(term, params, bare, mixed=self.descends)
        bare = self._bare[1]
        times = {k: self.options[k] for k in _HORIZON if k in self.options}
        if all(v is None for v in times.values()):
            times["slow_time"] = problem.slow_time
        if self.descends:
            made = self._descent(lane, problem, bare, times)
        else:
            made = self._flow(lane, bare, times)
        self._compare(made, bare)
        shares = isinstance(self.make, Problem)
        made = made._replace(name=str(lane), shares=shares)
        if made.again is not None:
            again = made.again._replace(name=f"{lane}-again", shares=shares)
            made = made._replace(again=again)
        return made

    def compare_with_first(self) -> None:
        """Makes the first lane that can be made, with which `_compare` compares all
        others: the same, whichever are run, and by whom."""
        for lane in range(len(self.axes)):
            with contextlib.suppress(Exception):
                self.lane(lane)
                return

    def _compare(self, made: Lane, watched: dict[str, Metric]) -> None:
        """Raises `Unlike` unless a lane gives arrays like those of the first made."""
        saves = made.run.saves
        if self._like is None:
            self._like = saves, set(watched)
        if saves != self._like[0]:
            raise Unlike(
                f"saves: this lane has {saves} times to save, and others "
                f"{self._like[0]}, as some take few steps; give fewer saves, or at."
            )
        if set(watched) != self._like[1]:
            raise Unlike(
                f"metrics: this lane has {sorted(watched)}, and others "
                f"{sorted(self._like[1])}."
            )

    def _descent(
        self, lane: int, problem: Problem, bare: dict[str, Metric], times: dict
    ) -> Lane:
        names = ("weight_decay", "learning_rate", "init_scale")
        given = {name: self.value(lane, name) for name in names}
        rest = ("method", "optimiser", "batch_size", "key", "saves")
        given |= {name: self.options[name] for name in rest} | {
            k: v for k, v in times.items() if k != "ts"
        }
        method = given["method"] = given["method"] or "subgradient"
        run = prepare_descent(problem.flow, problem.model, bare, **given)
        why = f"{method} steps were asked for"
        return Lane(run, why, cost=self.cost(lane))

    def _flow(self, lane: int, bare: dict[str, Metric], times: dict) -> Lane:
        term, params = self.start(lane)
        dtype = jax.tree.leaves(params)[0].dtype
        lam = jnp.asarray(self.value(lane, "weight_decay"), dtype)
        rtol = resolvable(self.value(lane, "rtol"), params)
        span = {k: times.get(k) for k in _SPAN}
        saves: Any = self.options["saves"]
        check_horizon(
            self.value(lane, "weight_decay"), **span, saves=saves, dtype=dtype
        )
        ts, _ = prepare(
            term, params, lam, **span, saves=saves, watched=bare, measure=False
        )
        size = None
        if self.options["solver"] is None:
            size = self._size(lane, span)
        most = self.options["max_steps"]

        def made(choice: Choice, most: int) -> Solve:
            return Solve.of(
                term,
                params,
                lam,
                ts,
                bare,
                choice.solver,
                rtol=_scalar(rtol, ts.dtype),
                atol=self.options["atol"],
                max_steps=most,
            )

        choice = as_choice(self.options["solver"], size, rtol)
        if size is None or not choice.trial:
            return Lane(made(choice, most), choice.why, cost=self.cost(lane))
        then: Choice = second_choice(size, rtol)
        again = Lane(made(then, most), then.why, cost=self.cost(lane))
        first = made(choice, min(most, TRIAL_STEPS))
        return Lane(first, choice.why, again, self.cost(lane))

    def cost(self, lane: int) -> float:
        """A number that grows with the expected work of a lane: its time to the end for
        a flow (an explicit solver takes steps in proportion, the others a few more),
        and more for a smaller tolerance; its steps for a descent."""
        value = lambda name: self.value(lane, name)
        given: Any = self.options.get
        lam = max(float(value("weight_decay")), 1e-300)
        if given("ts") is not None:
            end = float(given("ts")[-1])
        elif given("at") is not None or given("steps") is not None:
            return float(given("steps") or given("at")[-1])
        else:
            end = given("t1") or (given("slow_time") or 1.0) / lam
        if self.descends:
            return end / float(value("learning_rate"))
        return end * float(value("rtol")) ** -0.2

    def bytes_per_lane(self, lane: int) -> int:
        """About what a lane takes on its device while it runs: its parameters at all
        times and in all stages, and the tangent kernel with what it is made of."""
        term, params = self.start(lane)
        size = measure_size(term, params, 0.0, 1.0)
        d, m = size.parameters, size.outputs or size.parameters
        saves = self.options["saves"]
        for name in ("ts", "at"):
            if self.options.get(name) is not None:
                saves = len(self.options[name])
        if self.descends:
            numbers = d * (saves + 8)
        else:
            numbers = d * (3 * saves + 40) + 6 * m * m + 2 * min(m * d, 2**25)
        return numbers * jax.tree.leaves(params)[0].dtype.itemsize

    def _size(self, lane: int, span: dict[str, Any]) -> Any:
        """What a solver is chosen by: of the stiffest among all lanes with the same
        problem and tolerance, so that they have the same, whichever are run."""
        key = (self.owner(lane), self.value(lane, "rtol"))
        if self._sized.get("key") != key:
            stiffest = 0.0
            sharpness: dict[Any, Any] = {}
            for k in self.siblings(lane):
                alpha = self.value(k, "init_scale")
                if alpha not in sharpness:
                    term, params = self.start(k)
                    sharpness[alpha] = measure_size(term, params, 0.0, 1.0)
                lam = self.value(k, "weight_decay")
                if span["slow_time"] is not None:
                    end = span["slow_time"] / lam
                else:
                    end = span["t1"] if span["ts"] is None else float(span["ts"][-1])
                curvature = float(sharpness[alpha].stiffness)
                stiffest = max(stiffest, (curvature + lam) * end)
            size = next(iter(sharpness.values()))
            size = dataclasses.replace(size, stiffness=jnp.asarray(stiffest))
            self._sized = {"key": key, "size": size}
        return self._sized["size"]


@functools.lru_cache(maxsize=8)
def _scalar(value: float, dtype: Any) -> Array:
    """One array for all lanes, which they then share."""
    return jnp.asarray(value, dtype)


_SPAN = ("slow_time", "t1", "ts")
_HORIZON = ("slow_time", "t1", "ts", "steps", "at")
_FLOW_ONLY = ("ts", "solver", "atol", "rtol")


def as_problem(made: Any, metrics: dict[str, Metric]) -> Problem:
    """What a user's function made: a task, or a flow, a model and perhaps metrics."""
    if isinstance(made, Task):
        return Problem(
            made.flow, made.model, {**made.metrics, **metrics}, made.slow_time
        )
    if isinstance(made, tuple) and len(made) in (2, 3):
        flow, model, *more = made
        if isinstance(flow, GradientFlow):
            own = as_metrics(more[0]) if more else {}
            return Problem(flow, model, {**own, **metrics})
    raise ValueError(
        "problem: expected it to return a Task, or (flow, model), or (flow, model, "
        f"metrics), got {type(made).__name__}."
    )
