"""Grokking in two phases: the theory of small weight decay against simulation.

Runs a task for many weight decays, predicts all of them from one fast and one slow run
(Boursier, Pesme, Dragomir, arXiv 2505.20172), compares, and checks the paper's claims
one by one. Writes summary.json, paths.nc and figures.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import tyro
import xarray as xr

import gradflow as gf

from ..shared.common import attempt, Clock, Distributed, parse_weight_decay, Row, write
from . import panels as panels, rows as rows
from .rows import Run

TASKS: dict[str, Callable[..., gf.tasks.Task]] = {
    "linear_regression": gf.tasks.linear_regression,
    "diagonal_network": gf.tasks.diagonal_network,
    "fourier_diagonal": gf.tasks.fourier_diagonal,
    "matrix_completion": gf.tasks.matrix_completion,
    "completion_rank3": functools.partial(
        gf.tasks.matrix_completion, rank=3, observed=0.8, factor_rank=40
    ),
    "teacher_student": gf.tasks.teacher_student,
    "deep_linear": gf.tasks.deep_linear,
    "relu_1d": gf.tasks.relu_1d,
}


@dataclasses.dataclass(frozen=True)
class Config:
    task: Literal[
        "linear_regression",
        "diagonal_network",
        "fourier_diagonal",
        "matrix_completion",
        "completion_rank3",
        "teacher_student",
        "deep_linear",
        "relu_1d",
    ] = "diagonal_network"
    """What to train. The paper's experiments are linear_regression (appendix C),
    completion_rank3 (figure 2), relu_1d (figure 3; outside the theory) and
    fourier_diagonal (figure 4)."""
    weight_decay: tuple[str, ...] = ()
    """Weight decays: numbers, or ranges such as 1e-2:1e-6:9 (evenly in the logarithm).
    By default that range; 1e-2:1e-6:5 if quick; 1e-3 for relu_1d."""
    slow_time: float | None = None
    """How far to follow the drift, s = λt; by default what the task asks for."""
    seed: int = 0
    """Of the data and the initial weights."""
    out: Path | None = None
    """Folder for the results; results/two_phase/TASK by default."""
    quick: bool = False
    """Fewer weight decays and saved times, the same checks."""
    rtol: float | None = None
    """Relative tolerance of the runs: 1e-8; 1e-10 for linear_regression, which has a
    closed form; 1e-4 for relu_1d, which is not smooth."""
    store: Path | None = None
    """A folder such as sweep.zarr, to keep the runs in: the same command goes on where
    it stopped."""
    processes: tyro.conf.OmitArgPrefixes[Distributed] = Distributed()
    """Share the runs of the store with other processes."""

    def lams(self) -> np.ndarray:
        default = "1e-3" if self.task == "relu_1d" else "1e-2:1e-6:9"
        if self.quick and self.task != "relu_1d":
            default = "1e-2:1e-6:5"
        return parse_weight_decay(self.weight_decay or (default,))

    def tolerance(self) -> float:
        default = {"linear_regression": 1e-10, "relu_1d": 1e-4}.get(self.task, 1e-8)
        return default if self.rtol is None else self.rtol

    def saves(self) -> int:
        return 65 if self.quick else 129

    def folder(self) -> Path:
        return self.out or Path("results/two_phase") / self.task


def main(config: Config) -> dict[str, Any]:
    """Runs one task; returns what is written to summary.json, or by a process that is
    not the first, nothing."""
    if config.processes.distributed and config.store is None:
        raise ValueError("store: processes share their runs through one; give a path.")
    if config.processes.distributed and config.task == "relu_1d":
        raise ValueError("distributed: relu_1d is one run.")
    first = config.processes.connect()
    matplotlib.use("Agg")
    out = config.folder()
    out.mkdir(parents=True, exist_ok=True)
    clock = Clock()
    task = TASKS[config.task](jr.key(config.seed))
    print(f"{config.task}: {count(task.model)} parameters, seed {config.seed}")
    if not first:
        simulated(config, task)
        return {}
    run = relu if config.task == "relu_1d" else two_phase
    numbers, checks, data, figures = run(config, task, clock)

    numbers = {
        "task": config.task,
        **numbers,
        "settings": {
            "weight_decay": list(config.lams()),
            "slow_time": config.slow_time or task.slow_time,
            "seed": config.seed,
            "quick": config.quick,
            "rtol": config.tolerance(),
            "saves": config.saves(),
        },
    }
    data.to_netcdf(out / "paths.nc", engine="scipy")
    summary = write(out, numbers, checks, figures, clock)
    names = ", ".join(f"{name}.png" for name in figures)
    print(f"Written to {out}: summary.json, paths.nc, {names}")
    return summary


def two_phase(config: Config, task: gf.tasks.Task, clock: Clock) -> tuple:
    """Theory, sweep, comparison and checks."""
    s = config.slow_time or task.slow_time
    with clock("theory"):
        theory = gf.two_phase(
            task.flow, task.model, slow_time=s, metrics=task.metrics, throw=False
        )
    print(theory)
    with clock("sweep"):
        sweep = simulated(config, task)
    with clock("compare"):
        report = gf.compare(sweep, theory)
    print(report)
    print("Checks:")
    solve = lambda lam, t1: rows.run_paths(
        task, task.model, [lam], rows.times(t1, config.saves()), config.tolerance()
    )[0]
    with clock("checks"):
        lam = min(1e-4, float(config.lams()[-1]))
        rest = solve(lam, max(20.0, s) / lam)
        run = Run(
            task,
            theory,
            sweep,
            report,
            rest,
            config.saves(),
            config.tolerance(),
            config.quick,
        )
        checks: list[Row] = []
        for check in rows.THEORY_ROWS:
            checks += attempt(check, run)
        special, shown, figures = specials(config, task, run, solve)
        checks += special
    with clock("figures"):
        figures = {"report": report.plot(), "collapse": collapse(report), **figures}
    numbers = {"report": report_numbers(report), "text": str(report)}
    if shown is not None:
        numbers["shown"] = {
            "weight_decay": float(shown.weight_decay),
            "t": float(shown.t[-1]),
        }
    return numbers, checks, dataset(sweep, report), figures


def simulated(config: Config, task: gf.tasks.Task) -> gf.Sweep:
    """The runs, in memory or by way of a store."""
    options: dict[str, Any] = (
        {}
        if config.store is None
        else dict(store=config.store, chunk=1, parameters=True)
    )
    found = gf.sweep(
        task.flow,
        task.model,
        weight_decay=jnp.asarray(config.lams()),
        slow_time=config.slow_time or task.slow_time,
        saves=config.saves(),
        metrics=task.metrics,
        solver=gf.KKT5(),
        rtol=config.tolerance(),
        **options,
    )
    if config.store is None:
        return found
    return gf.as_sweep(found, task.flow, task.model, metrics=task.metrics)


def specials(config: Config, task: gf.tasks.Task, run: Run, solve: Callable) -> tuple:
    """The checks and the figure of one task."""
    name, bound = config.task, 1e-3
    if name == "linear_regression":
        checks = attempt(rows.linear, run) + attempt(rows.end_point, run, bound)
        return checks, None, {"linear": panels.linear(run.sweep, task.truth)}
    if name in ("fourier_diagonal", "diagonal_network"):
        path = solve(1e-4, 1e5)
        ts = (0.0, 1e2, 1e5)
        figures = {"coefficients": panels.coefficients(path, task.truth, ts)}
        checks = attempt(rows.end_point, run, bound)
        if name == "diagonal_network":
            checks += attempt(rows.invariant, run, path, "balance", 1e-6)
        else:
            scaled = lambda s: TASKS[name](jr.key(config.seed), init_scale=s)
            checks += attempt(rows.fourier, run, path)
            checks += attempt(rows.initial_scale, run, scaled)
        return checks, path, figures
    if name in ("matrix_completion", "completion_rank3"):
        path = solve(1e-3, 2e4)
        checks = attempt(rows.end_point, run, 1e-2)
        checks += attempt(rows.completion, run, path)
        figure = panels.singular_values(path, task.truth)
        return checks, path, {"singular_values": figure}
    path = run.sweep[len(run.sweep) // 2]
    checks = []
    if name == "deep_linear":
        checks += attempt(rows.end_point, run, bound)
        checks += attempt(rows.invariant, run, path, "balance", 1e-6)
    return checks, path, {"path": panels.one_path(path)}


def relu(config: Config, task: gf.tasks.Task, clock: Clock) -> tuple:
    """Simulation alone: the theory does not hold for functions with kinks."""
    print("ReLU networks are outside the theory: simulation only.")
    lam = float(config.lams()[0])
    s = config.slow_time or (5.0 if config.quick else 20.0)
    ts = rows.times(s / lam, config.saves())
    with clock("simulation"):
        path = gf.simulate(
            task.flow,
            task.model,
            weight_decay=lam,
            ts=jnp.asarray(ts),
            metrics=task.metrics,
            rtol=config.tolerance(),
            throw=False,
            progress=sys.stderr.isatty(),
        )
    print(path)
    wanted = float(path.t[-1])
    path = arrived(path)
    print("Checks:")
    end = float(path.t[-1])
    reached = f"time reached in {int(path.stats['steps'])} steps"
    checks = [Row("simulation", end, f"= {wanted:g}", end == wanted, reached)]
    print(checks[0])
    checks += attempt(rows.relu, task, path)
    data = xr.Dataset(
        {
            "train_loss": ("time", np.asarray(path.train_loss)),
            "test": ("time", np.asarray(path.metrics["test"])),
            "penalty": ("time", np.asarray(path.penalty)),
        },
        coords={"t": ("time", np.asarray(path.t))},
        attrs={"task": task.name, "weight_decay": lam},
    )
    figures = {
        "functions": panels.functions(path, task, (0.0, 1.0, end), rows.count_kinks)
    }
    kinks = [rows.count_kinks(task, path[i]) for i in (0, -1)]
    numbers = {"text": str(path), "kinks": {"first": kinks[0], "last": kinks[1]}}
    return numbers, checks, data, figures


def arrived(path: gf.Path) -> gf.Path:
    """The part of a path that was reached."""
    n = int(np.sum(np.isfinite(np.asarray(path.train_loss))))
    cut = lambda x: x[:n]
    return dataclasses.replace(
        path,
        t=cut(path.t),
        params=jax.tree.map(cut, path.params),
        metrics=jax.tree.map(cut, path.metrics),
        train_loss=cut(path.train_loss),
        penalty=cut(path.penalty),
    )


def collapse(report: gf.Report) -> Any:
    """All λ on both clocks."""

    fig, axes = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    gf.plot.sweep(report.sweep, axes[0], colorbar=False)
    axes[0].set_title("time $t$: the smaller $\\lambda$, the later", fontsize=11)
    gf.plot.collapse(report, axes[1])
    axes[1].set_title("slow time $s = \\lambda t$: one curve", fontsize=11)
    gf.plot.colorbar(report.weight_decay, fig, list(axes))
    return fig


def report_numbers(report: gf.Report) -> dict[str, Any]:
    names = (
        "weight_decay",
        "sup_error",
        "sup_error_regular",
        "sup_error_slow",
        "memorisation_time",
        "grokking_time",
        "predicted_memorisation_time",
        "predicted_grokking_time",
        "delay",
        "regular_until",
    )
    theory = report.theory
    eta = np.asarray(theory.smallest_curvature)
    return {
        **{name: getattr(report, name) for name in names},
        "rate": {
            "exponent": report.rate.exponent,
            "stderr": report.rate.stderr,
            "used": report.rate.used,
            "why": report.rate.why,
        },
        "rank": theory.spectrum.rank,
        "dimension": theory.spectrum.dimension,
        "rank_ambiguous": theory.spectrum.ambiguous,
        "smallest_curvature": {"start": eta[0], "end": eta[-1]},
        "theory_result": gf.RESULTS[theory.result],
        "steps": report.sweep.stats["steps"],
        "rejected": report.sweep.stats["rejected"],
        "succeeded": report.sweep.succeeded,
    }


def dataset(sweep: gf.Sweep, report: gf.Report) -> xr.Dataset:
    """All lanes, labelled, with the drift beside them."""
    lanes = ("weight_decay", "time")
    drift = report.theory.drift
    arrays = {
        "t": (lanes, sweep.t),
        "slow_time": (lanes, sweep.slow_time),
        "train_loss": (lanes, sweep.train_loss),
        "penalty": (lanes, sweep.penalty),
        "error": (lanes, report.error),
        "drift_error": (lanes, report.drift_error),
        **{f"metric_{k}": (lanes, v) for k, v in sweep.metrics.items()},
        "memorisation_time": ("weight_decay", report.memorisation_time),
        "grokking_time": ("weight_decay", report.grokking_time),
        "predicted_grokking_time": ("weight_decay", report.predicted_grokking_time),
        "drift_penalty": ("drift_time", drift.penalty),
        "smallest_curvature": ("drift_time", report.theory.smallest_curvature),
        **{f"drift_metric_{k}": ("drift_time", v) for k, v in drift.metrics.items()},
    }
    out = xr.Dataset(
        {name: (dims, np.asarray(v)) for name, (dims, v) in arrays.items()},
        coords={
            "weight_decay": np.asarray(sweep.weight_decay),
            "time": np.arange(sweep.t.shape[1]),
            "drift_time": np.asarray(drift.t),
        },
    )
    out["t"].attrs["long_name"] = "time t"
    out["slow_time"].attrs["long_name"] = "slow time s = lambda t"
    out["error"].attrs["long_name"] = "error of the composite prediction over |Phi|"
    return out.set_coords(["t", "slow_time"])


def count(model: Any) -> int:
    return rows.vector(model).size
