"""The same flow for many weight decays."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree
from tqdm.auto import tqdm

from ._checks import check_horizon, check_tolerance, check_weight_decay, resolvable
from .flow import GradientFlow, place
from .metrics import Metric
from .path import Path
from .results import RESULTS
from .simulate import as_metrics, fail_unless_reached, prepare, solve, wants_another
from .solvers import as_choice, Choice, second_choice, TRIAL_STEPS


class Sweep(eqx.Module):
    """Paths for L weight decays. `sweep[i]` is one `Path`.

    A lane that failed is marked in `result`, and is NaN after its end; the others are
    as if it had not been there.
    """

    paths: Path
    """All paths as one: its arrays have the lanes as their first axis (but `static` and
    `watched`, which they share)."""

    @property
    def weight_decay(self) -> Float[Array, " L"]:
        return self.paths.weight_decay

    @property
    def t(self) -> Float[Array, "L n"]:
        return self.paths.t

    @property
    def slow_time(self) -> Float[Array, "L n"]:
        return self.paths.slow_time

    @property
    def metrics(self) -> dict[str, Float[Array, "L n"]]:
        return self.paths.metrics

    @property
    def train_loss(self) -> Float[Array, "L n"]:
        return self.paths.train_loss

    @property
    def penalty(self) -> Float[Array, "L n"]:
        return self.paths.penalty

    @property
    def result(self) -> RESULTS:
        return self.paths.result

    @property
    def succeeded(self) -> Bool[Array, " L"]:
        return self.paths.succeeded

    @property
    def stats(self) -> dict[str, Any]:
        return self.paths.stats

    def __len__(self) -> int:
        return self.weight_decay.shape[0]

    def __getitem__(self, index: int | np.integer) -> Path:
        """The path of one lane."""
        lane = jax.tree.map(
            lambda x: x[index] if eqx.is_array(x) else x, _without_shared(self.paths)
        )
        shared = dict(static=self.paths.static, watched=self.paths.watched)
        return dataclasses.replace(lane, **shared)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __str__(self) -> str:
        stats = self.stats
        lines = [
            f"Sweep of {len(self)} weight decays, "
            f"{stats['solver']}, rtol {float(np.min(stats['rtol'])):.1g}",
            f"  {'λ':>9} {'steps':>6} {'rejected':>8} {'train loss':>10}"
            + "".join(f" {name:>10}" for name in self.metrics),
        ]
        for i in np.argsort(-np.asarray(self.weight_decay)):
            row = (
                f"  {float(self.weight_decay[i]):9.2e} {int(stats['steps'][i]):6d} "
                f"{int(stats['rejected'][i]):8d} {float(self.train_loss[i, -1]):10.3g}"
                + "".join(f" {float(v[i, -1]):10.3g}" for v in self.metrics.values())
            )
            if not bool(self.succeeded[i]):
                row += f"  FAILED: {RESULTS[self[i].result]}"
            elif bool(self[i].result == RESULTS.slid):
                row += f"  slid along kinks in {int(stats['sliding'][i])} steps"
            lines.append(row)
        return "\n".join(lines)

    def plot(self, **kwargs: Any) -> Any:
        """Every lane in time t and slow time λt; see `gradflow.plot.sweep`."""
        from . import plot

        return plot.sweep(self, **kwargs)


def sweep(
    flow: GradientFlow,
    model: PyTree,
    *,
    weight_decay: Float[Array | np.ndarray, " L"],
    slow_time: float | None = None,
    t1: float | None = None,
    ts: Float[Array, " n"] | None = None,
    saves: int = 65,
    metrics: dict[str, Callable | Metric] | None = None,
    solver: diffrax.AbstractSolver | None = None,
    rtol: float = 1e-6,
    atol: float | None = None,
    max_steps: int = 100_000,
    batch: Literal["loop", "vmap"] | None = None,
    throw: bool = False,
    progress: bool = True,
) -> Sweep:
    """Runs the flow from `model` for every weight decay, with one compilation.

    **Arguments:** as for `simulate`, and

    - `weight_decay`: the L values of λ, a vector.
    - `batch`: `"loop"` runs lane after lane, `"vmap"` all of them in lockstep. The
        default is to loop on a CPU, where lockstep only costs, and to vmap on an
        accelerator.
    - `throw`: raise if any lane fails; by default failures are marked in `result`.
    - `progress`: show a bar with the lanes done and failed.

    **Returns:** a `Sweep`.

    **Raises:** `ValueError` for arguments that make no sense, before any compute;
    `RuntimeError` if a lane fails and `throw`.
    """
    term, params = flow.term(model)
    _, static = place(params, term.static)
    watched = as_metrics(metrics)
    check_weight_decay(weight_decay)
    if np.ndim(weight_decay) != 1 or np.size(weight_decay) == 0:
        raise ValueError("weight_decay: expected a vector of one or more values.")
    check_tolerance(rtol)
    rtol = resolvable(rtol, params)
    check_horizon(weight_decay, slow_time, t1, ts, saves)
    if batch not in (None, "loop", "vmap"):
        raise ValueError(f"batch: expected 'loop', 'vmap' or None, got {batch!r}.")
    if batch is None:
        batch = "loop" if jax.default_backend() == "cpu" else "vmap"

    dtype = jax.tree.leaves(params)[0].dtype
    lams = jnp.asarray(weight_decay, dtype)
    times, sizes = eqx.filter_vmap(
        lambda lam: prepare(
            term, params, lam, slow_time, t1, ts, saves, watched, measure=solver is None
        )
    )(lams)
    stiffest = sizes and dataclasses.replace(sizes, stiffness=jnp.max(sizes.stiffness))

    def run(choice: Choice) -> Sweep:
        most = min(max_steps, TRIAL_STEPS) if choice.trial else max_steps

        def lane(lam: Array, ts: Array, meter: bool) -> Path:
            return solve(
                term, params, lam, ts, watched, choice.solver, rtol, atol, most, meter
            )

        if batch == "vmap":
            paths = eqx.filter_vmap(
                lambda lam, ts: _without_shared(lane(lam, ts, progress))
            )(lams, times)
        else:
            paths = _stack(_each(lane, lams, times, progress))
        stats = {**paths.stats, "why": choice.why}
        return Sweep(
            dataclasses.replace(
                paths,
                static=place(params, term.static)[1],
                watched=watched,
                stats=stats,
            )
        )

    choice = as_choice(solver, stiffest, rtol)
    out = run(choice)
    if choice.trial and bool(wants_another(out.result)):
        tried = out.stats["steps"]
        out = run(second_choice(stiffest, rtol))
        out.stats["trial_steps"] = tried
    if throw:
        worst = int(jnp.argmin(out.succeeded))
        out = fail_unless_reached(out, out[worst])
    return out


def _each(lane: Callable, lams: Array, times: Array, progress: bool) -> list[Path]:
    done = []
    failed = 0
    with tqdm(total=len(lams), unit="λ", disable=not progress) as bar:
        for lam, ts in zip(lams, times, strict=True):
            bar.set_postfix_str(f"λ = {float(lam):.1e}, {failed} failed")
            path = lane(lam, ts, False)
            failed += not bool(path.succeeded)
            done.append(_without_shared(path))
            bar.update()
        bar.set_postfix_str(f"{failed} failed")
    return done


def _without_shared(path: Path) -> Path:
    """Without what all lanes have in common, which is not to be stacked."""
    return dataclasses.replace(path, static=None, watched={})


def _stack(lanes: list[Path]) -> Path:
    arrays, rest = zip(*(eqx.partition(p, eqx.is_array) for p in lanes), strict=True)
    return eqx.combine(jax.tree.map(lambda *x: jnp.stack(x), *arrays), rest[0])
