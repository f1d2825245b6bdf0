"""What each lane of a sweep runs: of a flow, or of a descent."""

import abc
import dataclasses
import functools
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
from jaxtyping import Array, DTypeLike, PRNGKeyArray, PyTree

from .._checks import check_horizon, resolvable
from .._host import as_array, platform
from ..flow.flat import rows_at_once
from ..flow.operations import numbers
from ..losses import AbstractCompositeLoss
from ..runs.descent import prepare_descent
from ..runs.methods import Method, Optimiser
from ..runs.solve import Solve
from ..runs.steps import Descend
from ..runs.times import prepare
from ..solvers import (
    AbstractKKT,
    as_choice,
    Choice,
    measure_size,
    second_choice,
    TRIAL_STEPS,
)
from ..solvers.choose import Size
from ..solvers.kernel import FEW, fits
from ..solvers.matrix_free import most_rows
from .plan import Plan, Problem, Span
from .problems import Last, Problems


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
    trial_steps: Array | None = None
    """How many the solver took that was tried before."""
    state: PyTree | None = None
    """Of a part of it: where the last one ended."""
    steps: Array | None = None
    """Of a part of it: how many."""

    def named(self, number: int, shares: bool) -> "Lane":
        """The same, by its number in the sweep."""
        again = self.again
        if again is not None:
            again = again._replace(name=f"{number}-again", shares=shares)
        return self._replace(name=str(number), shares=shares, again=again)


class AbstractLanes(eqx.Module):
    """Makes the lanes of a plan, one by one."""

    plan: eqx.AbstractVar[Plan]
    problems: eqx.AbstractVar[Problems]

    @abc.abstractmethod
    def lane(self, number: int) -> Lane:
        """What a lane runs.

        **Raises:** whatever the function that makes the problem raises, and
        `ValueError` for what it makes.
        """

    @abc.abstractmethod
    def cost(self, number: int) -> float:
        """A number that grows with the expected work of a lane."""

    @abc.abstractmethod
    def bytes_per_lane(self, number: int) -> int:
        """About what a lane takes on its device while it runs."""


class FlowLanes(AbstractLanes):
    """Lanes of flows."""

    plan: Plan
    problems: Problems
    solver: diffrax.AbstractSolver | None
    atol: float | None
    max_steps: int
    sizes: Last = eqx.field(default_factory=Last)
    """What the solver was chosen by, for the last problem and tolerance."""

    def lane(self, number: int) -> Lane:
        plan, watched = self.plan, self.problems.metrics(number)
        span = _span(plan, self.problems.of(number))
        term, params = self.problems.start(number)
        dtype = jax.tree.leaves(params)[0].dtype
        decay = plan.value(number, "weight_decay")
        lam = as_array(decay, dtype)
        rtol = float(resolvable(plan.value(number, "rtol"), params))
        check_horizon(decay, **span.of_flow, saves=plan.saves, dtype=dtype)
        ts, _ = prepare(
            term, params, lam, **span.of_flow, saves=plan.saves, measure=False
        )

        def lane(choice: Choice, most: int, again: Lane | None = None) -> Lane:
            run = Solve.of(
                term, params, lam, ts, watched, choice.solver,
                rtol=_shared_scalar(rtol, ts.dtype), atol=self.atol, max_steps=most,
                until=self.problems.criterion(number),
            )  # fmt: skip
            return Lane(run, choice.why, again, self.cost(number))

        size = self._size(number, span) if self.solver is None else None
        choice, most, again = as_choice(self.solver, size, rtol), self.max_steps, None
        if size is not None and choice.trial:
            again = lane(second_choice(size, rtol), most)
            most = min(most, TRIAL_STEPS)
        return lane(choice, most, again).named(number, self.problems.one)

    def cost(self, number: int) -> float:
        """Its time to the end: an explicit solver takes steps in proportion, the others
        a few more; and more for a smaller tolerance."""
        rtol = float(self.plan.value(number, "rtol"))
        return _end(self.plan, number) * rtol**-0.2

    def bytes_per_lane(self, number: int) -> int:
        """That of its solver, or of the one that follows where that is only tried."""
        lane = self.lane(number)
        lanes = (lane,) if lane.again is None else (lane, lane.again)
        return max(_bytes_of_flow(each.run) for each in lanes) + _bytes_of_data(lane)

    def _size(self, number: int, span: Span) -> Size:
        """What a solver is chosen by: of the stiffest among all lanes with the same
        problem and tolerance, so that they have the same, whichever are run."""
        plan = self.plan
        key = (plan.owner(number), plan.value(number, "rtol"))
        return self.sizes.get(key, lambda: self._stiffest(number, span))

    def _stiffest(self, number: int, span: Span) -> Size:
        plan, stiffest = self.plan, 0.0
        sizes: dict[float, Size] = {}
        for k in plan.siblings(number):
            alpha = plan.value(k, "init_scale")
            if alpha not in sizes:
                sizes[alpha] = measure_size(*self.problems.start(k), 0.0, 1.0)
            lam = plan.value(k, "weight_decay")
            if span.slow_time is not None:
                end = span.slow_time / lam
            else:
                end = span.t1 if span.ts is None else float(span.ts[-1])
            stiffest = max(stiffest, (float(sizes[alpha].stiffness) + lam) * end)
        first = next(iter(sizes.values()))
        return dataclasses.replace(first, stiffness=as_array(stiffest))


class DescentLanes(AbstractLanes):
    """Lanes of descents."""

    plan: Plan
    problems: Problems
    method: Method | None
    optimiser: Optimiser | None
    batch_size: int | None
    label_noise: float | None
    gradient_noise: float | None
    key: PRNGKeyArray | None

    def lane(self, number: int) -> Lane:
        plan, watched = self.plan, self.problems.metrics(number)
        problem = self.problems.of(number)
        span, method = _span(plan, problem), self.method or "subgradient"
        run = prepare_descent(
            problem.flow, problem.model, watched, self.problems.criterion(number),
            weight_decay=plan.value(number, "weight_decay"),
            learning_rate=plan.value(number, "learning_rate"),
            init_scale=plan.value(number, "init_scale"),
            steps=span.steps, slow_time=span.slow_time, t1=span.t1, at=span.at,
            saves=plan.saves, method=method, optimiser=self.optimiser,
            batch_size=self.batch_size, label_noise=self.label_noise,
            gradient_noise=self.gradient_noise, key=self.key,
        )  # fmt: skip
        why = f"{method} steps were asked for"
        lane = Lane(run, why, cost=self.cost(number))
        return lane.named(number, self.problems.one)

    def cost(self, number: int) -> float:
        """Its steps."""
        plan, span = self.plan, self.plan.span
        if span.steps is not None:
            return float(span.steps)
        if span.at is not None:
            return float(span.at[-1])
        return _end(plan, number) / float(plan.value(number, "learning_rate"))

    def bytes_per_lane(self, number: int) -> int:
        """Its parameters at all saved steps, and what the optimiser holds."""
        lane = self.lane(number)
        run = lane.run
        d, unit = _numbers_of(run.params)
        saved = (4 * d + 3 * _watched(run)) * run.saves
        passing = int(0.8 * _passing(run))
        return (saved + 8 * d + passing) * unit + _bytes_of_data(lane)


def _bytes_of_flow(run: Solve | Descend) -> int:
    """About what the run of a flow takes: of the programs that were measured between
    1.0 and 1.8 times what XLA reports."""
    term, params, loss = run.term, run.params, run.term.loss
    d, unit = _numbers_of(params)
    assert isinstance(run, Solve)
    if not isinstance(run.solver, AbstractKKT):
        # States that are saved, and carried from part to part; models; and stages.
        saved = (6 * d + 2 * _watched(run)) * run.saves
        return (saved + 30 * d + _passing(run)) * unit
    m = d
    if isinstance(loss, AbstractCompositeLoss):
        m = jax.eval_shape(lambda p: loss.outputs(term.model(p)), params).size
    state = d + m
    kernel = 6 * m**2 + 2 * min(m * d, 2**25)
    if run.solver.matrix_free or not fits(d, m):
        rows = most_rows(d, m)
        kernel = 4 * rows * (m + rows)
    elif d < m:
        factors = 4 if getattr(loss, "outer_curvature", None) is not None else 6
        kernel = 6 * d**2 + factors * m * d
    if d <= FEW:  # a Hessian, all columns at once, of an eighth of the lanes or fewer
        kernel += 2 * d**2
        kernel += int(0.05 * d * numbers(lambda p: loss(term.model(p)), params))
    saved = (4 * state + 2 * d + 2 * _watched(run)) * run.saves
    return (saved + 30 * state + kernel + _passing(run)) * unit


def _numbers_of(params: PyTree) -> tuple[int, int]:
    """How many there are, and the bytes of each."""
    leaves = jax.tree.leaves(params)
    return sum(p.size for p in leaves), leaves[0].dtype.itemsize


def _passing(run: Solve | Descend) -> int:
    """How many numbers a gradient, or the metrics, hold on their way: of those that
    they bring out most are let go, or never stored."""
    term, params = run.term, run.params
    gradient = numbers(jax.grad(lambda p: term.loss(term.model(p))), params)
    recorded = max(numbers(functools.partial(_seen, run), params), 1)
    if platform() != "cpu":  # of many saved times at once
        recorded *= min(run.saves, rows_at_once(recorded))
    return int(max(0.6 * gradient, 0.3 * recorded))


def _watched(run: Solve | Descend) -> int:
    """How many numbers the metrics give at each time."""
    values = jax.eval_shape(functools.partial(_seen, run), run.params)
    return sum(v.size for v in values)


def _seen(run: Solve | Descend, params: PyTree) -> list[Array]:
    """The metrics."""
    return [metric(run.term.model(params)) for metric in run.watched.values()]


def _bytes_of_data(lane: Lane) -> int:
    """Where each lane has its own problem: that, and its copy in the program."""
    data = eqx.filter((lane.run.term, lane.run.watched), eqx.is_array)
    return 0 if lane.shares else 2 * sum(x.nbytes for x in jax.tree.leaves(data))


def _span(plan: Plan, problem: Problem) -> Span:
    """How far a lane of a problem goes."""
    return plan.span if plan.span.given else Span(slow_time=problem.slow_time)


def _end(plan: Plan, number: int) -> float:
    """About the time t at which a lane ends."""
    span = plan.span
    if span.ts is not None:
        return float(span.ts[-1])
    lam = max(float(plan.value(number, "weight_decay")), 1e-300)
    return float(span.t1 or (span.slow_time or 1.0) / lam)


@functools.lru_cache(maxsize=8)
def _shared_scalar(value: float, dtype: DTypeLike) -> Array:
    """One array for all lanes, which they then share."""
    return as_array(value, dtype)
