"""How a run was made, and what it took."""

import dataclasses
from typing import TypeAlias

import diffrax
import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Int, Real

from .._host import as_array, taken

Number: TypeAlias = Real[Array | np.ndarray, " *lanes"] | float | int
Words: TypeAlias = str | tuple[str, ...]

COUNTS = (
    "steps",
    "accepted",
    "rejected",
    "trial_steps",
    "iterations",
    "kernels",
    "sliding",
    "evaluations",
    "products",
)
"""What adds up from run to run."""
NUMBERS = (*COUNTS, "atol", "conditioning", "deviation")
"""What labelled results have by these names, too. (`rtol` and `learning_rate` are
coordinates there, where they vary.)"""


class Stats(eqx.Module):
    """How a run was made, and what it took. What does not apply to it is `None`.

    `stats["steps"]` is `stats.steps`, for names that are not known beforehand.

    In a `Sweep` numbers have the lanes as their axis, NaN for those that they do not
    apply to; and words that differ from lane to lane are a tuple.
    """

    solver: Words = eqx.field(static=True)
    """The name of the solver, or the kind of the descent."""
    steps: Number
    """The steps taken."""
    accepted: Number | None = None
    """Those that were accepted."""
    rejected: Number | None = None
    """Those that were tried again, shorter."""
    rtol: Number | None = None
    """The tolerance, relative to ‖θ‖."""
    atol: Number | None = None
    """The one added to it, in the units of θ."""
    learning_rate: Number | None = None
    """Of a descent, also where its flow is solved, the time t of one step; its mean, on
    a schedule."""
    deviation: Number | None = None
    """Where the flow of a descent is solved, how far it is from the descent at the end,
    relative to ‖θ‖: an estimate."""
    why: Words = eqx.field(static=True, default="")
    """Why this solver."""
    until: Words = eqx.field(static=True, default="")
    """What was to end it early, if anything."""
    trial_steps: Number | None = None
    """The steps lost to a solver that was tried first, and failed."""
    iterations: Number | None = None
    """Of KKT solvers: the iterations on the equations of all stages."""
    kernels: Number | None = None
    """Of KKT solvers: the tangent kernels JJᵀ that were made."""
    sliding: Number | None = None
    """Of KKT solvers: the steps along kinks of the loss."""
    conditioning: Number | None = None
    """Of KKT solvers: about σ_min²/σ_max² of J at the end, at most."""
    evaluations: Number | None = None
    """Of RKC2: the evaluations of θ'."""
    products: Number | None = None
    """Of RKC2: the products with the Jacobian of θ', for its largest eigenvalue. Of KKT
    solvers without a matrix: those with JJᵀ, to solve with and to precondition."""

    @classmethod
    def of(
        cls,
        solver: diffrax.AbstractSolver,
        counts: Int[Array, " 3"],
        rtol: Number,
        atol: Number | None,
    ) -> "Stats":
        """Those of an integration by `solver` to `rtol` and `atol`: `counts` are steps,
        and those accepted and rejected."""
        atol = 0.0 if atol is None else atol
        return cls(type(solver).__name__, *counts, rtol=rtol, atol=atol)

    def __getitem__(self, name: str) -> Number | Words | None:
        if name not in (field.name for field in dataclasses.fields(self)):
            raise KeyError(name)
        return getattr(self, name)

    def __str__(self) -> str:
        of = ""
        if self.learning_rate is not None:
            rate = float(self.learning_rate)
            of = f" for descent in steps of {rate:.3g}"
        if of and self.rtol is None:
            return f"{self.solver}, {int(self.steps)} steps of {rate:.3g}"
        rtol = "" if self.rtol is None else f", rtol {float(self.rtol):.1g}"
        rejected = "" if self.rejected is None else f", {int(self.rejected)} rejected"
        return f"{self.solver}{of}{rtol}: {int(self.steps)} steps{rejected}"

    def lane(self, i: int | np.integer) -> "Stats":
        """Those of lane `i`, of those of many."""
        words = {name: getattr(self, name) for name in ("solver", "why", "until")}
        own = {k: v if isinstance(v, str) else v[i] for k, v in words.items()}
        numbers = jax.tree.map(lambda x: taken(x, i), self)
        return dataclasses.replace(numbers, **own)

    def with_work_of(self, *others: "Stats") -> "Stats":
        """The same, with what the runs of `others` took added to it."""
        work = {}
        for name in COUNTS:
            each = [getattr(stats, name) for stats in (self, *others)]
            known = [count for count in each if count is not None]
            work[name] = as_array(sum(map(np.asarray, known))) if known else None
        return dataclasses.replace(self, **work)
