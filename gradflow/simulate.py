"""One path of the gradient flow."""

from collections.abc import Callable

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Scalar

from ._checks import check_horizon, check_tolerance, check_weight_decay
from .flow import FlowTerm, GradientFlow
from .losses import AbstractLoss
from .metrics import Metric
from .path import Path
from .results import RESULTS
from .solvers import choose_solver


def simulate(
    flow: GradientFlow,
    model: PyTree,
    *,
    weight_decay: float | Scalar,
    slow_time: float | Scalar | None = None,
    t1: float | Scalar | None = None,
    ts: Float[Array, " n"] | None = None,
    saves: int = 65,
    metrics: dict[str, Callable | Metric] | None = None,
    solver: diffrax.AbstractSolver | None = None,
    rtol: float = 1e-6,
    atol: float | None = None,
    max_steps: int = 100_000,
    throw: bool = True,
    progress: bool = False,
) -> Path:
    """Runs the flow θ' = −∇F(θ) − λ∇R(θ) from `model`.

    **Arguments:**

    - `flow`: the flow: loss, penalty and what is trainable.
    - `model`: the initial model θ₀, any Equinox module.
    - `weight_decay`: λ ≥ 0.
    - `slow_time`, `t1`, `ts`: give one. Run to slow time s = λt, to time t, or through
        the given increasing times t ≥ 0.
    - `saves`: how many times are saved when `ts` is not given: zero, and then evenly
        in log t from the time in which θ would move by 1 %. The solver lands on each;
        interpolating would leave the manifold.
    - `metrics`: functions of the model, by name; `Metric` adds a threshold.
    - `solver`: a gradflow or Diffrax solver; see `choose_solver` for the default.
    - `rtol`: relative tolerance. The relative error of the parameters, ‖θ − θ*‖/‖θ*‖,
        stays of this size (less than 5 `rtol` on every task in the tests).
    - `atol`: absolute tolerance; by default 0.02 · `rtol` · rms(θ₀).
    - `max_steps`: the budget of steps.
    - `throw`: raise if the run fails; otherwise see `path.result`.
    - `progress`: show a progress bar.

    **Returns:** a `Path`.

    **Raises:** `ValueError` for arguments that make no sense, before any compute;
    `RuntimeError` if the run fails and `throw`.
    """
    term, params = flow.term(model)
    watched = as_metrics(metrics)
    check_weight_decay(weight_decay)
    if np.ndim(weight_decay) != 0:
        raise ValueError("weight_decay: expected one number; sweep takes many.")
    check_tolerance(rtol, params)
    check_horizon(weight_decay, slow_time, t1, ts, saves)
    check_scalars(flow.loss, watched, model)

    dtype = jax.tree.leaves(params)[0].dtype
    lam = jnp.asarray(weight_decay, dtype)
    if ts is None:
        end = jnp.asarray(t1, dtype) if slow_time is None else slow_time / lam
        times = save_times(term, params, lam, end.astype(dtype), saves)
    else:
        times = jnp.asarray(ts, dtype)
    if solver is None:
        solver = choose_solver(term, params, lam, times[-1])
    path = solve(
        term, params, lam, times, watched, solver, rtol, atol, max_steps, progress
    )
    if throw:
        path = path.result.error_if(path, ~path.succeeded)
    return path


def as_metrics(metrics: dict[str, Callable | Metric] | None) -> dict[str, Metric]:
    """Plain functions of the model, as metrics without a threshold."""
    return {
        name: fn if isinstance(fn, Metric) else Metric(fn)
        for name, fn in (metrics or {}).items()
    }


def check_scalars(
    loss: AbstractLoss, watched: dict[str, Metric], model: PyTree
) -> None:
    """Raises unless loss and metrics are real scalars; nothing is computed."""
    _check_scalar(loss, model, "loss")
    for name, metric in watched.items():
        _check_scalar(metric, model, f"metrics[{name!r}]")


def _check_scalar(fn: Callable, model: PyTree, name: str) -> None:
    out = eqx.filter_eval_shape(fn, model)
    if getattr(out, "shape", None) != () or not jnp.issubdtype(out.dtype, jnp.floating):
        kind = f"shape {out.shape}" if hasattr(out, "shape") else type(out).__name__
        raise ValueError(f"{name}: expected a real scalar, got {kind}.")


@eqx.filter_jit
def save_times(
    term: FlowTerm, params: PyTree, weight_decay: Scalar, t1: Scalar, saves: int
) -> Float[Array, " saves"]:
    """Zero, and `saves` − 1 times evenly spaced in log t up to `t1`, from the time in
    which θ would move by 1 % at its initial speed."""
    start = jnp.minimum(0.01 * _time_scale(term, params, weight_decay), 0.1 * t1)
    fraction = jnp.linspace(0.0, 1.0, saves - 1, dtype=t1.dtype)
    later = (start * (t1 / start) ** fraction).at[-1].set(t1)
    return jnp.concatenate([jnp.zeros_like(later[:1]), later])


def _norm(tree: PyTree) -> Scalar:
    return jnp.sqrt(sum(jnp.sum(x * x) for x in jax.tree.leaves(tree)))


def _time_scale(term: FlowTerm, params: PyTree, weight_decay: Scalar) -> Scalar:
    """‖θ₀‖/‖θ₀'‖; infinite at rest."""
    speed = _norm(term.vf(jnp.zeros_like(weight_decay), params, weight_decay))
    size = _norm(params)
    return jnp.where(size > 0, size, 1.0) / speed


def solve(
    term: FlowTerm,
    params: PyTree,
    weight_decay: Scalar,
    ts: Float[Array, " n"],
    watched: dict[str, Metric],
    solver: diffrax.AbstractSolver,
    rtol: float | Scalar,
    atol: float | Scalar | None,
    max_steps: int,
    progress: bool = False,
) -> Path:
    """`simulate` without its checks and defaults. Compiled once for all tolerances,
    weight decays and times of the same number."""
    return _solve(
        term,
        params,
        jnp.asarray(weight_decay),
        ts,
        watched,
        solver,
        jnp.asarray(rtol, ts.dtype),
        None if atol is None else jnp.asarray(atol, ts.dtype),
        max_steps,
        progress,
    )


@eqx.filter_jit
def _solve(
    term: FlowTerm,
    params: PyTree,
    weight_decay: Scalar,
    ts: Float[Array, " n"],
    watched: dict[str, Metric],
    solver: diffrax.AbstractSolver,
    rtol: Scalar,
    atol: Scalar | None,
    max_steps: int,
    progress: bool,
) -> Path:
    count = sum(p.size for p in jax.tree.leaves(params))
    if atol is None:
        atol = 0.02 * rtol * _norm(params) / count**0.5
    scale = jnp.minimum(_time_scale(term, params, weight_decay), ts[-1])
    # Growth while accepting is bounded so that one lucky error estimate cannot carry
    # the solver across the whole fast phase.
    controller = diffrax.ClipStepSizeController(
        diffrax.PIDController(
            rtol=rtol,
            atol=atol,
            factormax=6.0,
            dtmin=1e-12 * scale,
            force_dtmin=False,
        ),
        step_ts=ts,
    )
    size = 1 + _norm(params)

    def left_the_finite_range(t, y, args, **kwargs):
        finite = jnp.isfinite(term.loss(term.model(y)))
        return ~finite | (_norm(y) > size / jnp.finfo(ts.dtype).eps ** 0.5)

    def record(t, y, args):
        model = term.model(y)
        seen = {name: metric(model) for name, metric in watched.items()}
        return y, seen, term.loss(model), term.penalty(y)

    with jax.default_matmul_precision("highest"):
        solution = diffrax.diffeqsolve(
            term,
            solver,
            jnp.zeros_like(ts[0]),
            ts[-1],
            1e-3 * scale,
            params,
            args=weight_decay,
            saveat=diffrax.SaveAt(
                subs=[
                    diffrax.SubSaveAt(ts=ts, fn=record),
                    diffrax.SubSaveAt(t1=True, fn=lambda t, y, args: _norm(y)),
                ]
            ),
            stepsize_controller=controller,
            event=diffrax.Event(left_the_finite_range),
            max_steps=max_steps,
            throw=False,
            progress_meter=diffrax.TqdmProgressMeter()
            if progress
            else diffrax.NoProgressMeter(),
        )
    saved_t: Any = solution.ts
    saved_y: Any = solution.ys
    # Diffrax fills what it did not reach with infinities.
    reached = jnp.isfinite(saved_t[0])
    saved = jax.tree.map(
        lambda x: jnp.where(reached.reshape((-1,) + (1,) * (x.ndim - 1)), x, jnp.nan),
        saved_y[0],
    )
    models, seen, train_loss, penalty = saved
    result = _translate(solution.result)
    # What reaches infinity in finite time stalls on its way there.
    lost = (result == RESULTS.stalled) & (saved_y[1][0] > 100 * size)
    result = RESULTS.where(lost, RESULTS.diverged, result)
    stats = {
        "solver": type(solver).__name__,
        "rtol": rtol,
        "atol": atol,
        "steps": solution.stats["num_steps"],
        "accepted": solution.stats["num_accepted_steps"],
        "rejected": solution.stats["num_rejected_steps"],
    }
    return Path(
        t=ts,
        weight_decay=weight_decay,
        params=models,
        static=term.static,
        metrics=seen,
        train_loss=train_loss,
        penalty=penalty,
        result=result,
        stats=stats,
        watched=watched,
    )


def _translate(result: diffrax.RESULTS) -> RESULTS:
    """Diffrax's result in gradflow's words."""
    out = RESULTS.promote(result)
    for theirs, ours in (
        (RESULTS.max_steps_reached, RESULTS.out_of_steps),
        (RESULTS.event_occurred, RESULTS.diverged),
    ):
        out = RESULTS.where(out == theirs, ours, out)
    # All else that can go wrong in a solver goes wrong in a step.
    named = (out == RESULTS.successful) | (out == RESULTS.out_of_steps)
    named = named | (out == RESULTS.diverged)
    return RESULTS.where(named, out, RESULTS.stalled)
