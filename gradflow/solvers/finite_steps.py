"""Descent in steps that are not small, followed by a solver of its flow."""

from typing import ClassVar

from jaxtyping import Array, PyTree, Scalar

from ..flow.finite_steps import Alternating, begin_steps, FIRST_STEPS
from ..flow.term import AbstractFlowTerm
from ..results import RESULTS
from .base import AbstractFlowSolver, Controller, Followed, Saved
from .controllers import Alongside


class FiniteSteps(AbstractFlowSolver):
    """An explicit solver, for the flow of a descent; see
    [`gradflow.flow.finite_steps`][].

    What it records is the mean of what it is at w + ρu and at w − ρu, as of two steps
    of the descent; the parameters are w.

    **Arguments:**

    - `solver`: what answers for the solver that makes the steps.
    - `learning_rate`: h, a time t.
    """

    solver: AbstractFlowSolver
    learning_rate: Scalar
    differentiable: ClassVar[bool] = False
    sees_growth: ClassVar[bool] = False
    sees_jumps: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return self.solver.name

    def follow(
        self, term: AbstractFlowTerm, params: PyTree, weight_decay: Scalar
    ) -> Followed:
        """The flow of the descent, from where its first steps end that are taken as
        they are: `term`, `params` and `weight_decay` are those of the gradient flow."""
        begun = begin_steps(term, params, weight_decay, self.learning_rate)
        made = self.solver.follow(term, params, weight_decay).solver
        since = FIRST_STEPS * self.learning_rate
        return Followed(made, begun.term, begun.state, since, begun.before)

    def controlled(self, controller: Controller) -> Controller:
        return Alongside(self.solver.controlled(controller))

    @staticmethod
    def coordinates(y: PyTree) -> PyTree:
        return y.centre

    def params_of(self, y: Alternating) -> PyTree:
        return y.centre

    def points(self, y: Alternating) -> tuple[PyTree, ...]:
        return y.ends

    def loss_of(self, term: AbstractFlowTerm, y: Alternating) -> Scalar:
        there, back = (term.loss(term.model(p)) for p in self.points(y))
        return 0.5 * (there + back)

    def gradient_of(self, term: AbstractFlowTerm, y: Alternating) -> PyTree:
        there, back = (self.solver.gradient_of(term, p) for p in self.points(y))
        return 0.5 * (there + back)

    def tolerance_share(self, rtol: Scalar) -> Scalar | float:
        return self.solver.tolerance_share(rtol)

    def work(
        self, term: AbstractFlowTerm, state: PyTree, end: Alternating
    ) -> dict[str, Array]:
        told = {"learning_rate": self.learning_rate, "deviation": end.deviation}
        return self.solver.work(term, state, end.centre) | told

    def reservation(self, saved: Saved) -> RESULTS:
        return self.solver.reservation(saved)
