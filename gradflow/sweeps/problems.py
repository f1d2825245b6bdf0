"""The problems of a sweep: made when they are needed, and only the last is kept."""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._checks import is_concrete, is_key
from .._typing import Given
from ..flow.flow import GradientFlow, scaled
from ..flow.term import FlowTerm
from ..metrics import Metric, without_thresholds
from ..runs.problem import as_metrics, check_problem, Shapes
from ..runs.until import AbstractCriterion, as_criterion
from ..tasks import Task
from .plan import Plan, Problem
from .stack import OfProblem

Made = TypeVar("Made")


class Last(Generic[Made]):
    """Remembers the last thing that was made, by its key. Lanes of one problem come in
    a row, and problems may be large: one is let go before the next is made."""

    def __init__(self) -> None:
        self._held: tuple[Hashable, Made] | None = None

    def get(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` gives, unless it was made for that key the last time."""
        if self._held is None or self._held[0] != key:
            self._held = None
            self._held = (key, make())
        return self._held[1]


class Problems:
    """The problem of each lane of a plan, checked."""

    def __init__(self, plan: Plan, *, mixed: bool):
        self.plan = plan
        self.mixed = mixed
        """Whether a loss may be computed in double precision for weights in single."""
        self._problem: Last[Problem] = Last()
        self._start: Last[tuple[FlowTerm, PyTree]] = Last()
        self._watched: Last[tuple[dict[str, Metric], Shapes]] = Last()
        self._criterion: Last[AbstractCriterion | None] = Last()

    @property
    def one(self) -> bool:
        """Whether it is the same for all lanes."""
        return isinstance(self.plan.make, Problem)

    def of(self, lane: int) -> Problem:
        """The problem of a lane.

        **Raises:** whatever the function that makes it raises, and `ValueError` for
        what it makes.
        """
        plan, given = self.plan, self.plan.make
        if isinstance(given, Problem):
            return given

        def make() -> Problem:
            made = given(**plan.values_of_problem(lane))
            return placed_problem(as_problem(made, plan.metrics))

        return self._problem.get(plan.owner(lane), make)

    def start(self, lane: int) -> tuple[FlowTerm, PyTree]:
        """The flow as a term, and the scaled parameters."""
        scale = self.plan.value(lane, "init_scale")

        def make() -> tuple[FlowTerm, PyTree]:
            flow, model, *_ = self.of(lane)
            return flow.term(scaled(model, scale, trainable=flow.trainable))

        return self._start.get((self.plan.owner(lane), scale), make)

    def metrics(self, lane: int) -> dict[str, Metric]:
        """What is watched, without thresholds: they would be part of the compiled
        program, which is for all.

        **Raises:** `ValueError` for a problem that makes no sense.
        """
        return self._checked(lane)[0]

    def metric_shapes(self, lane: int) -> Shapes:
        """The shapes of their values."""
        return self._checked(lane)[1]

    def _checked(self, lane: int) -> tuple[dict[str, Metric], Shapes]:
        def make() -> tuple[dict[str, Metric], Shapes]:
            problem = self.of(lane)
            term, params = problem.flow.term(problem.model)
            shapes = check_problem(term, params, problem.watched, mixed=self.mixed)
            return without_thresholds(problem.watched), shapes

        return self._watched.get(self.plan.owner(lane), make)

    def criterion(self, lane: int) -> AbstractCriterion | None:
        """What is to end the run of a lane early.

        **Raises:** `ValueError` where it is none of this problem.
        """

        def make() -> AbstractCriterion | None:
            problem, until = self.of(lane), self.plan.asked["until"]
            term, params = problem.flow.term(problem.model)
            return as_criterion(until, term, params, problem.watched)

        return self._criterion.get(self.plan.owner(lane), make)

    def parts(self, lane: int) -> OfProblem:
        """What the path of a lane has from its problem."""
        problem = self.of(lane)
        term, params = problem.flow.term(problem.model)
        return OfProblem(term.static, problem.watched)


def as_problem(made: Given, metrics: dict[str, Metric]) -> Problem:
    """What a user's function made: a task, or a flow, a model and perhaps metrics.

    **Raises:** `ValueError` for anything else.
    """
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


def placed(tree: PyTree, name: str = "problem") -> PyTree:
    """With arrays that were put on devices, or shared out among them, free to go
    wherever a lane is run.

    **Raises:** `ValueError` for an array that other processes hold a part of.
    """

    def free(x: PyTree) -> PyTree:
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


def _committed(x: object) -> bool:
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
