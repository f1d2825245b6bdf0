"""What a run of the flow asks of a solver, beside Diffrax's steps."""

import abc
from collections.abc import Callable
from typing import ClassVar, NamedTuple, TYPE_CHECKING

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree, Scalar

from ..flow.term import AbstractFlowTerm
from ..results import RESULTS
from .curvature import steps_at_the_limit

if TYPE_CHECKING:
    from typing import ClassVar as AbstractClassVar
else:
    from equinox import AbstractClassVar

Controller = diffrax.AbstractAdaptiveStepSizeController

# What stands in a root finder for the tolerances of the controller.
_OPEN = diffrax.with_stepsize_controller_tols(diffrax.VeryChord)().rtol  # pyright: ignore[reportAttributeAccessIssue]


class Followed(NamedTuple):
    """What an integration is given to follow a flow."""

    solver: diffrax.AbstractSolver
    """What makes the steps."""
    term: AbstractFlowTerm
    """What is integrated."""
    state: PyTree
    """The initial state: the parameters, and what the solver carries beside them."""
    since: Scalar | float = 0.0
    """The time at which that is the state."""
    before: Callable[[Scalar], PyTree] | None = None
    """The states before that time, of a run that begins earlier."""


class Saved(NamedTuple):
    """A run of n saved times, for the judgement of its solver."""

    term: AbstractFlowTerm
    """The flow."""
    params: PyTree
    """States at all times, stacked."""
    ts: Float[Array, " n"]
    """These times t."""
    counts: Int[Array, " 3"]
    """Steps; those accepted, and rejected."""
    rtol: Scalar
    """The tolerance of the run."""


class AbstractFlowSolver(eqx.Module):
    """A solver that knows it is a gradient flow that it solves.

    gradflow's own are such. Any other solver of Diffrax's is taken for one by
    `as_flow_solver`, so that all that a run asks is asked here; a solver of your own
    that answers for itself needs no change elsewhere. Solvers are told by their types:
    a subclass is a `diffrax.AbstractAdaptiveSolver` too, or wraps one.
    """

    differentiable: AbstractClassVar[bool]
    """Whether Diffrax's adjoints lead through its steps."""
    sees_growth: AbstractClassVar[bool]
    """Whether it counts an error for more that later steps do not damp, as where the
    flow leaves a saddle; otherwise the controller of the steps does."""
    sees_jumps: AbstractClassVar[bool]
    """Whether its estimate sees errors where the curvature jumps, as Huber's does."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The name that it has in `path.stats`."""

    @abc.abstractmethod
    def follow(
        self, term: AbstractFlowTerm, params: PyTree, weight_decay: Scalar
    ) -> Followed:
        """With what, and from where, the flow `term` is integrated from `params` with
        λ = `weight_decay`: a [`gradflow.solvers.base.Followed`][]."""

    @abc.abstractmethod
    def controlled(self, controller: Controller) -> Controller:
        """`controller`, or one that ends steps early as well."""

    @staticmethod
    @abc.abstractmethod
    def coordinates(y: PyTree) -> PyTree:
        """What in a state `y`, or in the error of one, the tolerance is for."""

    @abc.abstractmethod
    def params_of(self, y: PyTree) -> PyTree:
        """The parameters in a state `y`, a pytree."""

    @abc.abstractmethod
    def points(self, y: PyTree) -> tuple[PyTree, ...]:
        """The parameters in a state `y` over which is averaged what is recorded of
        it."""

    @abc.abstractmethod
    def loss_of(self, term: AbstractFlowTerm, y: PyTree) -> Scalar:
        """F in a state `y`, a number, for the flow `term`."""

    @abc.abstractmethod
    def gradient_of(self, term: AbstractFlowTerm, y: PyTree) -> PyTree:
        """∇F in a state `y`, a pytree like the parameters, for the flow `term`."""

    @abc.abstractmethod
    def tolerance_share(self, rtol: Scalar) -> Scalar | float:
        """The part of `rtol` that a step is given, so that the path is within it."""

    @abc.abstractmethod
    def work(
        self, term: AbstractFlowTerm, state: PyTree, end: PyTree
    ) -> dict[str, Array]:
        """What the accepted steps took beside their number, by the names of fields of
        [`gradflow.Stats`][], from the final `state` of the solver and the `end` of what
        is integrated, for the flow `term`; of these `sliding` are steps along kinks of
        the loss."""

    @abc.abstractmethod
    def reservation(self, saved: Saved) -> RESULTS:
        """`successful`, or why a run that reached its end is not to be trusted: from
        `saved`, a [`gradflow.solvers.base.Saved`][]."""


def with_tolerances_of(
    controller: Controller, solver: diffrax.AbstractSolver
) -> diffrax.AbstractSolver:
    """An implicit solver with the tolerances and the norm of a controller, where it has
    none of its own, as Diffrax gives them to it; any other as it is."""
    if not isinstance(solver, diffrax.AbstractImplicitSolver):
        return solver
    names = [
        name
        for name in ("rtol", "atol", "norm")
        if getattr(solver.root_finder, name) is _OPEN
    ]
    if not names:
        return solver
    return eqx.tree_at(
        lambda s: [getattr(s.root_finder, name) for name in names],
        solver,
        [getattr(controller, name) for name in names],
    )


def as_flow_solver(solver: diffrax.AbstractSolver) -> AbstractFlowSolver:
    """The `solver` as one that answers what a run asks: itself where it does; else an
    [`gradflow.solvers.Explicit`][] of it, or a [`gradflow.solvers.Plain`][]."""
    if isinstance(solver, AbstractFlowSolver):
        return solver
    explicit = isinstance(solver, diffrax.AbstractERK)
    return Explicit(solver) if explicit else Plain(solver)


class AbstractOnParams(AbstractFlowSolver):
    """One whose state is the parameters."""

    def controlled(self, controller: Controller) -> Controller:
        return controller

    @staticmethod
    def coordinates(y: PyTree) -> PyTree:
        return y

    def params_of(self, y: PyTree) -> PyTree:
        return y

    def points(self, y: PyTree) -> tuple[PyTree, ...]:
        return (y,)

    def loss_of(self, term: AbstractFlowTerm, y: PyTree) -> Scalar:
        return term.loss(term.model(y))

    def gradient_of(self, term: AbstractFlowTerm, y: PyTree) -> PyTree:
        return jax.grad(lambda p: term.loss(term.model(p)))(y)


class AbstractPlain(AbstractOnParams):
    """One of Diffrax's own solvers."""

    solver: eqx.AbstractVar[diffrax.AbstractSolver]

    @property
    def name(self) -> str:
        return type(self.solver).__name__

    def follow(
        self, term: AbstractFlowTerm, params: PyTree, weight_decay: Scalar
    ) -> Followed:
        return Followed(self.solver, term, params)

    def tolerance_share(self, rtol: Scalar) -> Scalar | float:
        return 1.0

    def work(
        self, term: AbstractFlowTerm, state: PyTree, end: PyTree
    ) -> dict[str, Array]:
        return {}


class Plain(AbstractPlain):
    """Any solver of Diffrax's but an explicit one.

    **Arguments:**

    - `solver`: which.
    """

    solver: diffrax.AbstractSolver
    differentiable: ClassVar[bool] = True
    sees_growth: ClassVar[bool] = False
    sees_jumps: ClassVar[bool] = False

    def reservation(self, saved: Saved) -> RESULTS:
        return RESULTS.successful


# At the stability limit of an explicit method the error of a path was 17 rtol at
# ∫L dt · rtol = 0.2, and 26 at 2 (Tsit5 in random problems; in others it is far less).
# Up to two of three steps are rejected there, in others at most 28 in a hundred. That
# tells of it where a path jitters about a steep valley: L, at what is saved, does not.
_NOISE = 0.15
_REJECTED = 1 / 3
_TO_LAND = 60  # steps are tried again, at most, to land on a criterion: a bisection


class Explicit(AbstractPlain):
    """An explicit solver of Diffrax's, which may run at its stability limit.

    **Arguments:**

    - `solver`: which.
    """

    solver: diffrax.AbstractERK
    differentiable: ClassVar[bool] = True
    sees_growth: ClassVar[bool] = False
    sees_jumps: ClassVar[bool] = False

    def reservation(self, saved: Saved) -> RESULTS:
        """`unstable` where the steps of `saved` were limited by stability, and so many
        that noise of the size of the tolerance makes up a drift of its own."""
        reach = steps_at_the_limit(saved.term, saved.params, saved.ts)
        taken, _, rejected = saved.counts.astype(reach.dtype)
        limited = (reach > taken) | (rejected - _TO_LAND > _REJECTED * taken)
        noisy = limited & (jnp.maximum(reach, taken) * saved.rtol > _NOISE)
        return RESULTS.where(noisy, RESULTS.unstable, RESULTS.successful)
