"""Settings, runs and figures; `measure` has what the rows are made of."""

import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import tyro
import xarray as xr
from matplotlib.figure import Figure

import gradflow as gf

from ..shared.command import Distributed, parse_weight_decay, Settings
from ..shared.record import pack, unpack
from ..shared.rows import attempt, Row
from . import measure, panels, rows
from .measure import Run

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
Name: TypeAlias = Literal[*TASKS]  # pyright: ignore[reportInvalidTypeForm]


@dataclasses.dataclass(frozen=True)
class TwoPhase(Settings):
    """The two-phase theory against simulation.

    No files. Time: quick, for the diagonal network, a quarter of a minute.
    """

    task: Name = "diagonal_network"
    """What to train. The paper's experiments are linear_regression (appendix C),
    completion_rank3 (figure 2), relu_1d (figure 3; outside the theory) and
    fourier_diagonal (figure 4)."""
    weight_decay: tuple[str, ...] = ()
    """Weight decays: numbers, or ranges such as 1e-2:1e-6:9 (evenly in the logarithm).
    By default that range; 1e-2:1e-6:5 if quick; 1e-3 for relu_1d."""
    slow_time: float | None = None
    """How far to follow the drift, s = λt; by default what the task asks for."""
    rtol: float | None = None
    """Relative tolerance of the runs: 1e-8; 1e-10 for linear_regression, which has a
    closed form; 1e-4 for relu_1d, which is not smooth."""
    saves: int = 129
    """Saved times of each run."""
    store: Path | None = None
    """A folder such as sweep.zarr, to keep the runs in: the same command goes on where
    it stopped."""
    processes: tyro.conf.OmitArgPrefixes[Distributed] = Distributed()
    """Share the runs of the store with other processes."""

    QUICK = dict(saves=65)

    def folder(self, name: str) -> str:
        return self.task

    @property
    def lams(self) -> np.ndarray:
        default = "1e-2:1e-6:5" if self.quick else "1e-2:1e-6:9"
        default = "1e-3" if self.task == "relu_1d" else default
        return parse_weight_decay(self.weight_decay or (default,))

    @property
    def tolerance(self) -> float:
        default = {"linear_regression": 1e-10, "relu_1d": 1e-4}.get(self.task, 1e-8)
        return default if self.rtol is None else self.rtol

    def make(self, **options: Any) -> gf.tasks.Task:
        return TASKS[self.task](jr.key(self.seed), **options)

    def compute(self) -> xr.Dataset | None:
        if self.processes.distributed and self.store is None:
            raise ValueError(
                "store: processes share their runs through one; give a path."
            )
        if self.processes.distributed and self.task == "relu_1d":
            raise ValueError("distributed: relu_1d is one run.")
        first, task = self.processes.connect(), self.make()
        size = measure.vector(task.model).size
        print(f"{self.task}: {size} parameters, seed {self.seed}", flush=True)
        if self.task == "relu_1d":
            return self.simulate(task)
        sweep = self.sweep(task)
        return self.compare(task, sweep) if first else None

    def sweep(self, task: gf.tasks.Task) -> gf.Sweep:
        """The runs, in memory or by way of a store."""
        kept: dict[str, Any] = {}
        if self.store is not None:
            kept = dict(store=gf.Store(self.store, chunk=1, parameters=True))
        found = gf.sweep(
            task.flow, task.model, weight_decay=jnp.asarray(self.lams),
            slow_time=self.slow_time or task.slow_time, saves=self.saves,
            metrics=task.metrics, solver=gf.KKT5(), rtol=self.tolerance, **kept,
        )  # fmt: skip
        return found.load()

    def compare(self, task: gf.tasks.Task, sweep: gf.Sweep) -> xr.Dataset:
        """Theory against the runs, what is measured of both, and paths to be drawn."""
        s = self.slow_time or task.slow_time
        theory = gf.two_phase(
            task.flow, task.model, slow_time=s, metrics=task.metrics, throw=False
        )
        report = gf.compare(sweep, theory)
        print(theory, report, sep="\n", flush=True)
        run = Run(task, self.task, report, self.saves, self.tolerance, self.quick)
        lam, shown = min(1e-4, float(self.lams[-1])), sweep[len(sweep) // 2]
        rest = run.path(lam, max(20.0, s) / lam)
        if self.task in measure.SHOWN:
            shown = run.path(*measure.SHOWN[self.task])
        run = dataclasses.replace(run, rest=rest, shown=shown)
        parts = measure.of_task(self.task, self.make)
        data = dataset(report).merge(measure.all_of(parts, run))
        data = data.merge(pack(report=report, shown=shown, truth=task.truth))
        return data.assign_attrs(task=self.task, text=str(report))

    def judge(self, data: xr.Dataset) -> list[Row]:
        return [
            row for name, found in measure.parts(data) for row in judged(name, found)
        ]

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        shown, truth = unpack(data, "shown"), unpack(data, "truth")
        if self.task == "relu_1d":
            figure = panels.functions(shown, unpack(data, "task"), measure.count_kinks)
            return {"functions": figure}
        report = unpack(data, "report")
        if importlib.util.find_spec("plotly"):
            report.to_html(Path(self.out or ".") / "report.html", bundle="directory")
        figures = {"report": report.plot(), "collapse": collapse(report)}
        if self.task == "linear_regression":
            return figures | {"linear": panels.linear(report.sweep, truth)}
        if "diagonal" in self.task:
            return figures | {"coefficients": panels.coefficients(shown, truth)}
        if "completion" in self.task:
            return figures | {"singular_values": panels.singular_values(shown, truth)}
        return figures | {"path": panels.one_path(shown)}

    def simulate(self, task: gf.tasks.Task) -> xr.Dataset:
        """Simulation alone: the theory does not hold for functions with kinks."""
        print("ReLU networks are outside the theory: simulation only.")
        lam = float(self.lams[0])
        s = self.slow_time or (5.0 if self.quick else 20.0)
        path = gf.simulate(
            task.flow, task.model, weight_decay=lam, metrics=task.metrics,
            ts=jnp.asarray(measure.times(s / lam, self.saves)), rtol=self.tolerance,
            throw=False, progress=sys.stderr.isatty(),
        )  # fmt: skip
        print(path)
        wanted = float(path.t[-1])
        path = arrived(path)
        series = {"train_loss": path.train_loss, "penalty": path.penalty}
        series |= {"t": path.t, "test": path.metrics["test"]}
        data = xr.Dataset({k: ("time", np.asarray(v)) for k, v in series.items()})
        parts = {"relu": functools.partial(measure.relu, wanted=wanted)}
        data = data.merge(measure.all_of(parts, task, path))
        data = data.merge(pack(shown=path, truth=task.truth, task=task))
        return data.assign_attrs(task=self.task, text=str(path))


def judged(part: str, found: Any) -> list[Row]:
    """The rows of a part that was measured; one that fails, if it was not."""
    if isinstance(found, str):
        return [Row(part, np.nan, "", False, found)]
    return attempt(getattr(rows, part), found)


def arrived(path: gf.Path) -> gf.Path:
    """The part of a path that was reached."""
    n = int(np.sum(np.isfinite(np.asarray(path.train_loss))))
    fields = ("t", "params", "metrics", "train_loss", "penalty")
    cut = {k: jax.tree.map(lambda x: x[:n], getattr(path, k)) for k in fields}
    return dataclasses.replace(path, **cut)


def collapse(report: gf.Report) -> Figure:
    """All λ on both clocks."""
    fig, axes = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    gf.plot.sweep(report.sweep, axes[0], colorbar=False)
    axes[0].set_title("time $t$: the smaller $\\lambda$, the later", fontsize=11)
    gf.plot.collapse(report, axes[1])
    axes[1].set_title("slow time $s = \\lambda t$: one curve", fontsize=11)
    gf.plot.colorbar(report.weight_decay, fig, list(axes))
    return fig


def dataset(report: gf.Report) -> xr.Dataset:
    """All lanes, labelled, with the drift beside them."""
    sweep, theory = report.sweep, report.theory
    lanes, drift = ("weight_decay", "time"), report.theory.drift
    first, rate = report.orders[1], report.orders[1].rate
    each = {
        "sup_error": first.sup_all,
        "sup_error_regular": first.sup,
        "sup_error_slow": report.drift.sup,
        "memorisation_time": report.memorised.measured,
        "grokking_time": report.grokked.measured,
        "predicted_memorisation_time": report.memorised.predicted,
        "predicted_grokking_time": report.grokked.predicted,
    }
    arrays = {
        "error": (lanes, first.error),
        "drift_error": (lanes, report.drift.error),
        **{name: ("weight_decay", values) for name, values in each.items()},
        "rate_used": ("weight_decay", rate.used),
        "rate": ((), rate.exponent),
        "regular_until": ((), report.regular_until),
        "rank": ((), theory.spectrum.rank),
        "dimension": ((), theory.spectrum.dimension),
        "drift_time": ("drift_time", drift.s),
        "drift_penalty": ("drift_time", drift.penalty),
        "smallest_curvature": ("drift_time", theory.smallest_curvature),
        **{f"drift_metric_{k}": ("drift_time", v) for k, v in drift.metrics.items()},
    }
    out = sweep.to_xarray().drop_attrs()
    out = out.assign({k: (dims, np.asarray(v)) for k, (dims, v) in arrays.items()})
    out.attrs["why_this_rate"] = rate.why
    out.attrs["theory_result"] = gf.RESULTS[theory.result]
    out["error"].attrs["long_name"] = "error of the composite prediction over |Phi|"
    return out
