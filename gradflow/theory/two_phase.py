"""The two-phase theory: fast flow to the critical manifold, then a slow drift on it."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from .._checks import check_arguments, check_choice, resolvable
from .._host import as_array, size
from ..flow.flow import check_free, GradientFlow
from ..flow.term import FlowTerm
from ..losses import AbstractCompositeLoss
from ..manifold import Drift, Limit, limit_map, riemannian_flow, spectrum
from ..metrics import Metric
from ..precision import exact_products
from ..results import among, RESULTS
from ..runs.interpolate import DEGREE
from ..runs.path import Path
from ..runs.problem import as_metrics, check_problem
from ..runs.progress import Bar
from ..runs.refine import FEWEST, MOST, refined
from ..runs.simulate import simulate
from ..runs.times import even_times
from ..solvers import hessian_norm, KKT5
from .prediction import TwoPhase
from .second_order import check_second_order, second_order

_LOOSE = 1e-8  # tolerance of the limit map
_A_LOOK = 2000  # steps of a path that tends to no limit


@exact_products
def two_phase(
    flow: GradientFlow,
    model: PyTree,
    *,
    slow_time: float,
    metrics: dict[str, Callable | Metric] | None = None,
    order: int = 1,
    rtol: float = 1e-9,
    t_max: float = 1e10,
    max_steps: int = 100_000,
    throw: bool = True,
    progress: bool = False,
) -> TwoPhase:
    """Predicts the flow from `model` for all small weight decays.

    Three runs: the limit map, the fast path on a grid fit for interpolation, and the
    Riemannian flow from its end. Both paths are saved at 65 points, and run again for
    more where interpolating them would add more than 30 `rtol` to the error: where a
    phase changes abruptly. The terms of the second order take one linear equation
    along each of the two paths: from half a run to some runs more, the more the closer
    the drift comes to a singular point.

    **Arguments:**

    - `flow`: loss and penalty. With `rates` G the theory is that of the metric G⁻¹:
        Φ of θ' = −G∇F, the drift w' = −P G∇R, both orders; the curvatures η are those
        of √G ∇²F √G, and ratios of terms are taken in that metric, errors in θ.
    - `model`: the initial model θ₀.
    - `slow_time`: how far to follow the drift, s = λt.
    - `metrics`: as for `simulate`; recorded along both phases.
    - `order`: 1, or 2 to compute the terms of the second order too, which the error
        estimates come from; these need a loss and a penalty that are smooth, and in the
        Hessian form at most 5000 parameters.
    - `rtol`: the tolerance of the runs.
    - `t_max`: the time at which to give up the search for the limit.
    - `max_steps`: the budget of steps of each.
    - `throw`: raise where theory does not apply; otherwise see `result`. (Where there
        is no limit both paths are still run, for 2000 steps at most, to be looked at.)
    - `progress`: show progress bars: of the phases, and of the run of each.

    **Returns:** a `TwoPhase`.

    **Raises:** `ValueError` for arguments that make no sense; `RuntimeError` if `throw`
    and there is no limit (the loss has no minimiser, say) or the drift fails: it names
    the phase, the time that was reached, and the smallest curvatures of F there.

    Source: Boursier, Pesme, Dragomir, arXiv 2505.20172.
    """
    check_free(flow)
    check_arguments(slow_time=slow_time, rtol=rtol, max_steps=max_steps)
    check_choice(order, "order", (1, 2))
    term, params = flow.term(model)
    check_problem(term, params, as_metrics(metrics))
    rtol = resolvable(rtol, params)
    asked = _Asked(slow_time, metrics, order, rtol, t_max, max_steps, throw, progress)
    with Bar("two phases", shown=progress) as bar:
        return _predicted(flow, model, asked, bar)


class _Asked(NamedTuple):
    """What is asked of a prediction, see `two_phase`."""

    slow_time: float
    metrics: dict[str, Callable | Metric] | None
    order: int
    rtol: float
    t_max: float
    max_steps: int
    throw: bool
    progress: bool


def _predicted(flow: GradientFlow, model: PyTree, asked: _Asked, bar: Bar) -> TwoPhase:
    """The phases, one after another; where one fails there is no next."""
    term, params = flow.term(model)
    bar.tell(0.0, "limit map")
    limit = _search(flow, model, asked)
    found = bool(among(limit.result, RESULTS.successful))
    where = ""
    if not found:
        where = _place(flow, "limit", f"t = {float(limit.time):.3g}", limit.model)
        if asked.throw:
            raise RuntimeError(where + RESULTS[limit.result])
    at_limit = spectrum(flow, limit.model)
    if asked.order == 2:
        check_second_order(at_limit, flow)
    tau, until = _fast_scales(term, params, limit.time, at_limit.smallest_curvature)
    runs = _Runs(
        flow,
        dict(
            metrics=asked.metrics,
            rtol=asked.rtol,
            max_steps=asked.max_steps if found else min(asked.max_steps, _A_LOOK),
            throw=False,
            progress=asked.progress,
        ),
        30 * asked.rtol * float(size(flow.partition(limit.model)[0])),
        # Where there is no limit, the paths are to look at: as they come.
        MOST if found else FEWEST,
    )
    bar.tell(0.25, "fast path" if found else "there is no limit; fast path")
    fast, error = runs.fast(model, until, tau)
    if found and not bool(fast.succeeded):
        where = _end_of(flow, fast)
        if asked.throw:
            raise RuntimeError(where + RESULTS[fast.result])
    # A failed run ends in NaN: there the limit, wherever it got to, stands in.
    last = fast[-1] if bool(fast.succeeded) else limit.model
    bar.tell(0.5, "drift")
    drift, more = runs.drift(last, asked.slow_time)
    # Retracted, so that the two phases meet to all digits.
    end = drift[0]
    whole = float(size(flow.partition(end)[0]))
    if bool(drift.succeeded):
        at_limit = spectrum(flow, end)
    result = _first_failure(limit.result, fast.result, drift.result)
    # Past the loss of rank the drift still stands; its validity is for the report.
    if among(result, RESULTS.successful) and bool(at_limit.ambiguous):
        result = RESULTS.ambiguous_rank
    theory = TwoPhase(
        limit=end,
        fast=fast,
        drift=drift,
        spectrum=at_limit,
        fast_scale=tau,
        interpolation_error=_share(error + more, whole, fast.t.dtype),
        drift_interpolation_error=_share(more, whole, fast.t.dtype),
        fast_shift=_fast_shift(term, fast.t, fast.params),
        second=None,
        result=result,
        drift_degree=_degree(flow),
        where=where,
    )
    if not theory.stands:
        where = where or _end_of(flow, drift)
        if asked.throw:
            raise RuntimeError(where + RESULTS[result])
        return dataclasses.replace(theory, where=where)
    # Along kinks there are no second derivatives to go by.
    if asked.order == 2 and not among(result, RESULTS.slid):
        bar.tell(0.75, "second order")
        theory = _with_second_order(term, theory)
    bar.tell(1.0, "done")
    return theory


def _search(flow: GradientFlow, model: PyTree, asked: _Asked) -> Limit:
    """Whether there is a limit, when, and how curved F is there: a loose one will do.
    The limit itself is the end of the fast path."""
    return limit_map(
        flow,
        model,
        rtol=max(asked.rtol, _LOOSE),
        t_max=asked.t_max,
        max_steps=asked.max_steps,
        throw=False,
        progress=asked.progress,
    )


class _Runs(NamedTuple):
    """What the runs along the two phases have in common."""

    flow: GradientFlow
    options: dict[str, Any]
    """Of `simulate` and `riemannian_flow`."""
    target: float
    """The error that interpolating each may add, a length."""
    most: int
    """How many saved times each may take for that."""

    def fast(
        self, model: PyTree, until: Float[Array, ""], tau: Float[Array, ""]
    ) -> tuple[Path, float]:
        """The flow without weight decay, and what interpolating it adds."""

        def run(x: Float[np.ndarray, " n"]) -> Path:
            return simulate(
                self.flow,
                model,
                weight_decay=0.0,
                ts=even_times(x, until, tau),
                solver=_solver(self.flow),
                **self.options,
            )

        return refined(run, self.target, most=self.most)

    def drift(self, model: PyTree, slow_time: float) -> tuple[Drift, float]:
        """The Riemannian flow, and what interpolating it adds."""
        dtype = jax.tree.leaves(self.flow.partition(model)[0])[0].dtype
        end, unit = as_array(slow_time, dtype), as_array(1.0, dtype)

        def run(x: Float[np.ndarray, " n"]) -> Drift:
            return riemannian_flow(
                self.flow,
                model,
                slow_time=slow_time,
                ts=even_times(x, end, unit),
                **self.options,
            )

        return refined(
            run,
            self.target,
            most=self.most,
            degree=_degree(self.flow),
            clock="s",
            curvature="smallest_curvature",
        )


def _degree(flow: GradientFlow) -> int:
    """Of the interpolation of the drift."""
    return DEGREE if flow.penalty.smooth else 1


def _with_second_order(term: FlowTerm, theory: TwoPhase) -> TwoPhase:
    """The prediction with the terms of order λ, or word that they were not found."""
    terms = second_order(
        term, theory.fast, theory.drift, theory.spectrum, theory.fast_scale
    )
    result = theory.result
    if terms is None and among(result, RESULTS.successful):
        result = RESULTS.second_order_lost
    return dataclasses.replace(theory, second=terms, result=result)


def _end_of(flow: GradientFlow, run: Path | Drift) -> str:
    """`_place` of where the run along a phase ended."""
    reached = np.flatnonzero(np.isfinite(np.asarray(run.train_loss)))
    last = int(reached[-1]) if reached.size else 0
    phase, clock, times = ("fast", "t", run.slow_time)
    if isinstance(run, Drift):
        phase, clock, times = ("drift", "s", run.s)
    at = f"{clock} = {float(np.asarray(times)[last]):.3g}"
    return _place(flow, phase, at, run[last])


def _place(flow: GradientFlow, phase: str, reached: str, model: PyTree) -> str:
    """The phase in which a prediction failed, where, and the spectrum there."""
    text = f"{phase} phase, reached {reached}"
    leaves = jax.tree.leaves(flow.partition(model)[0])
    if all(np.isfinite(np.asarray(leaf)).all() for leaf in leaves):
        at = spectrum(flow, model)
        values = np.asarray(at.curvatures)[: max(int(at.rank), 1)]
        smallest = ", ".join(f"{value:.2g}" for value in values[-3:])
        text += (
            f", rank {int(at.rank)}, smallest normal curvatures {smallest} (largest "
            f"{values[0]:.2g})"
        )
    return text + ": "


def _solver(flow: GradientFlow) -> KKT5 | None:
    """The one that the drift takes too, so that both compile once."""
    return KKT5() if isinstance(flow.loss, AbstractCompositeLoss) else None


def _fast_scales(
    term: FlowTerm,
    params: PyTree,
    time: Float[Array, ""],
    curvature: Float[Array, ""],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """τ, and the end of the fast path, where e^{−ηt} has brought it from the 5e-7 of
    `limit_map`, at `time`, to 1e-12 of the limit."""
    largest, rate, time = map(np.asarray, (hessian_norm(term, params), curvature, time))
    with np.errstate(divide="ignore"):
        # Where ∇²F vanishes at θ₀ the limit's own time is all there is to go by.
        tau = np.minimum(0.2 / largest, 1e-3 * (1 + time))
    end = time + 13.0 / np.where(np.isfinite(rate), rate, 1.0)
    return as_array(tau), as_array(np.maximum(end, 10 * tau))


def _share(error: float, whole: float, dtype: np.dtype) -> Float[Array, ""]:
    """`error` relative to ‖Φ‖, which may be zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return as_array(np.divide(error, whole), dtype)


@eqx.filter_jit
def _fast_shift(
    term: FlowTerm, t: Float[Array, " n"], path: PyTree
) -> Float[Array, ""]:
    """sup c‖θ'‖/‖Φ‖, c = ∫|⟨∇R, θ'⟩|/‖θ'‖² dt: see `TwoPhase.fast_shift`. θ' itself
    solves v' = −∇²F v, so −cθ' is the part along the path of what
    θ₁' = −∇²F θ₁ − ∇R makes. (All of it is of states, in which the flow is a plain
    one.)"""
    path = jax.vmap(term.chart.state)(path)
    end = jax.tree.map(lambda p: p[-1], path)
    size = optax.tree.norm(end)

    def at(p):
        speed = term.vf(0.0, p, 0.0)
        left = optax.tree.norm(jax.tree.map(jnp.subtract, p, end))
        along = optax.tree.vdot(term.penalty.gradient(p), speed)
        return optax.tree.norm(speed), jnp.abs(along), left

    speed, along, left = jax.lax.map(at, path)
    # Near its end what is left of the speed is rounding.
    moving = (left > 1e-6 * size) & (speed > 0)
    rate = jnp.where(moving, along / jnp.where(moving, speed, 1.0) ** 2, 0.0)
    steps = 0.5 * (rate[1:] + rate[:-1]) * jnp.diff(t)
    shift = jnp.cumsum(steps) * jnp.where(moving, speed, 0.0)[1:]
    return jnp.max(shift) / size


def _first_failure(*results: RESULTS) -> RESULTS:
    failures = (r for r in results if not among(r, RESULTS.successful))
    return next(failures, results[-1])
