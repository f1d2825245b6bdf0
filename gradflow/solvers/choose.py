"""Which solver to take when none is named."""

import dataclasses
import math
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree, Scalar

from .._checks import is_concrete
from .._host import as_array, known
from ..flow.operations import price
from ..flow.term import AbstractFlowTerm
from ..losses import AbstractCompositeLoss
from ..penalties import Moreau
from .curvature import hessian_norm
from .kernel import DENSE_LIMIT, fits, KERNEL_LIMIT
from .kkt import AbstractKKT, KKT4, KKT5
from .matrix_free import most_rows
from .rkc import RKC2

TRIAL_STEPS = 10_000  # after which Tsit5 is given up, if it was not asked for
_UNKNOWN = 1e6  # the stiffness L t₁ where it is not known
_CALL = 1e4  # what the smallest gradient, or iteration, takes, in operations
_MARGIN = 1.5  # by how much an explicit solver is to be cheaper
_LAUNCHES = 1e6  # operations that take a CPU about as long as a GPU their launches


class Size(eqx.Module):
    """What the cost of a run depends on; see `measure_size`."""

    stiffness: Scalar
    """L t₁, L = λ + ‖∇²F(θ₀)‖."""
    parameters: int = eqx.field(static=True)
    """How many there are to train."""
    outputs: int | None = eqx.field(static=True)
    """How many the loss has; `None` where it is not composite."""
    gradient: float = eqx.field(static=True)
    """The operations of one gradient, see `flow.operations.price`."""
    kinks: bool = eqx.field(static=True, default=False)
    """Whether the penalty has any."""
    rounded: bool = eqx.field(static=True, default=False)
    """Whether it is a Moreau envelope that couples coordinates: stiff across them."""


def measure_size(
    term: AbstractFlowTerm,
    params: PyTree,
    weight_decay: float | Scalar,
    t1: float | Scalar,
) -> Size:
    """The [`gradflow.solvers.Size`][] of the flow `term`, from `params` to time
    `t1`, with λ = `weight_decay`.

    `term` and `params` are those of `GradientFlow.term`. ‖∇²F(θ₀)‖ is found by some
    products with a vector.
    """
    outputs, loss = None, term.loss
    if isinstance(loss, AbstractCompositeLoss):
        outputs = jax.eval_shape(lambda p: loss.outputs(term.model(p)), params).size

    def gradient(p):
        return jax.grad(lambda p: loss(term.model(p)))(p)

    decay, roots = known(weight_decay), term.chart.roots
    if roots is not None:
        decay = decay * known(roots).max() ** 2
    largest = known(hessian_norm(term, params)) + decay
    return Size(
        as_array(largest * known(t1)),
        sum(p.size for p in jax.tree.leaves(params)),
        outputs,
        price(gradient, params),
        not term.penalty.smooth,
        any(
            isinstance(part, Moreau) and not part.separable
            for _, part in term.penalty.terms()
        ),
    )


class Choice(NamedTuple):
    """A solver, and why it was chosen."""

    solver: diffrax.AbstractSolver
    """The solver."""
    why: str
    """Why, in words."""
    trial: bool = False
    """Whether it is to be tried only: for at most 10 000 steps, and then another."""


def as_choice(
    solver: diffrax.AbstractSolver | None, size: Size | None, rtol: float | Scalar
) -> Choice:
    """The solver given, or the one that `choose_solver` finds for `size`."""
    if solver is not None:
        return Choice(solver, "given")
    assert size is not None  # it is measured where no solver is given
    return choose_solver(size, rtol=rtol)


def _iteration(size: Size) -> float:
    """The operations of one iteration of KKT."""
    d = size.parameters
    m = d if size.outputs is None else size.outputs
    products = 1.5 if d < m else 3.0
    return products * (size.gradient + _CALL) + 4 * min(d, m) * m + _CALL


def cpu_advice(size: Size, solver: diffrax.AbstractSolver, platform: str) -> str:
    """What to add to why a solver was chosen, where a single run was on an accelerator
    and an iteration, or a gradient, is little work (by estimate, not measured)."""
    work = _iteration(size) if isinstance(solver, AbstractKKT) else size.gradient
    if platform == "cpu" or work > _LAUNCHES:
        return ""
    return (
        f"; one run of so little work at a time ({work:.0e} operations) may be faster "
        'on the CPU: with jax.default_device(jax.devices("cpu")[0])'
    )


def second_choice(size: Size, rtol: float | Scalar) -> Choice:
    """What to take where a trial failed: for a flow that is stiffer than it looked."""
    if is_concrete(size.stiffness):
        stiffness = np.maximum(np.asarray(size.stiffness), _UNKNOWN)
        size = dataclasses.replace(size, stiffness=as_array(stiffness))
    solver, why, _ = choose_solver(size, rtol=rtol, classical=False)
    return Choice(solver, f"Tsit5 was tried first, and failed; then {why}")


def choose_solver(
    size: Size, *, rtol: float | Scalar = 1e-6, classical: bool = True
) -> Choice:
    """The solver that `simulate` takes when none is named: the one of least cost.

    With d parameters, m outputs (m = d for an opaque loss, whose Hessian is taken),
    k = min(d, m), a gradient of g operations (counted; 10 000 more for the call) and
    x = L t₁, the number of operations is estimated as

    - `Tsit5`: 6 max(n, x/3) gradients, n = 4 rtol^(-1/5) steps;
    - `RKC2`: √(1.5 x n) + 4n gradients, n = 2 rtol^(-1/2) steps;
    - `KKT4`, or `KKT5` for rtol < 1e-6: n = 6 rtol^(-1/5) steps, each of 12 iterations
      at the price of three gradients (1.5 where d < m) and 4km operations, and one
      factorisation of k³/3; and in every fifth step a tangent kernel of 2kmd (a Hessian
      of 2d gradients);
    - the same without a matrix, where that would not fit, above k = 10 000 or km = 1e8:
      as many iterations of three gradients, with 2 + √x/100 products each; and in every
      fifth step r ≤ 512 products for the preconditioner of r rows. A product, with
      that, takes 1.5 gradients and 4rm operations.

    The numbers of steps were measured on the tasks of this package, that of products on
    digits (3000 outputs, of which 512 were preconditioned). An explicit solver is taken
    only where it is expected to be 1.5 times cheaper, for KKT is the most exact
    (`benchmarks/choice.py` says how good that choice is). KKT is left out for an opaque
    loss of more than 5000 parameters. A penalty with kinks leaves no choice: KKT, with
    its matrix. A Moreau envelope that couples coordinates goes to RKC2.

    The curvature may rise along the path. So Tsit5 is on trial: if it stalls, runs at
    its stability limit, or has not ended after 10 000 steps, the run (of all lanes, in
    a sweep) starts anew without it (`classical=False`), and the steps lost are counted
    in `stats.trial_steps`. Within a path the solver does not change: an explicit
    start would save a tenth to a third of a run (`benchmarks/README.md`).

    **Arguments:**

    - `size`: from [`gradflow.solvers.measure_size`][]. A stiffness that is traced
        (under `jit` or `vmap`) is taken as 1e6.
    - `rtol`: the tolerance; taken as 1e-6 where it is traced.
    - `classical`: whether Tsit5 may be chosen.

    **Returns:** a `Choice`.

    **Raises:** `ValueError` where there is none: for a penalty with kinks, of more
    outputs than KKT can take.
    """
    known = is_concrete(size.stiffness)
    x = float(size.stiffness) if known else _UNKNOWN
    tolerance = float(rtol) if is_concrete(rtol) else 1e-6
    d, opaque = size.parameters, size.outputs is None
    m = d if size.outputs is None else size.outputs
    gradient = size.gradient + _CALL
    small = min(d, m)
    enough = fits(d, m) and (not opaque or d <= DENSE_LIMIT)
    quick, slow = tolerance**-0.2, 2 * tolerance**-0.5
    costs = {
        "Tsit5": 6 * max(4 * quick, x / 3) * gradient,
        "RKC2": (math.sqrt(1.5 * x * slow) + 4 * slow) * gradient,
    }
    if not classical:
        del costs["Tsit5"]
    kkt = "KKT4" if tolerance >= 1e-6 else "KKT5"
    if size.kinks:
        if not enough:
            raise ValueError(
                "penalty: only KKT solvers follow a flow along its kinks, and their "
                f"matrix does not fit: the loss has {m} outputs and {d} parameters, of "
                f"which the fewer may be {KERNEL_LIMIT}, and times the outputs "
                f"{KERNEL_LIMIT**2:.0e}. Give a smooth penalty, such as "
                "gradflow.Moreau(…, epsilon=…) of it."
            )
        solver = KKT4() if kkt == "KKT4" else KKT5()
        return Choice(solver, "the penalty has kinks, which only KKT solvers follow")
    if size.rounded:
        return Choice(
            RKC2(),
            "the penalty is stiff across coordinates, in which KKT's iteration is slow",
        )
    best = min(costs, key=lambda name: costs[name])
    if enough:
        kernel = 2 * d * gradient if opaque else 2.0 * small * m * d
        costs[kkt] = 6 * quick * (12 * _iteration(size) + small**3 / 3 + kernel / 5)
    elif not opaque:
        rows = most_rows(d, m)
        product = 1.5 * gradient + 4 * rows * m
        products = 2 + math.sqrt(x) / 100
        iterations = 12 * (3 * gradient + products * product)
        costs[kkt] = 6 * quick * (iterations + rows * product / 5)
    if kkt in costs:
        best = best if _MARGIN * costs[best] < costs[kkt] else kkt
    stiffness = f"{x:.1g}" if known else f"unknown, taken as {x:.0e}"
    why = (
        f"estimated cost for L·t1 = {stiffness}, d = {d}, m = {m}"
        f"{' (opaque loss)' if opaque else ''}, a gradient of {size.gradient:.1g}: "
        + ", ".join(f"{name} {cost:.0e}" for name, cost in costs.items())
        + " operations"
    )
    solvers = {"Tsit5": diffrax.Tsit5, "RKC2": RKC2, "KKT4": KKT4, "KKT5": KKT5}
    return Choice(solvers[best](), why, trial=best == "Tsit5")
