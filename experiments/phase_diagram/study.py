"""Settings, rows and the figure."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import tyro
import xarray as xr
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm
from matplotlib.figure import Figure

import gradflow as gf

from ..shared.command import Distributed, parse_weight_decay, Settings
from ..shared.figures import between, SIZE
from ..shared.record import table
from ..shared.rows import check, Row

Name = Literal["diagonal", "teacher_student"]


@dataclasses.dataclass(frozen=True)
class Case:
    """A task, its initial scales, and how far to follow the drift."""

    make: Callable[..., gf.tasks.Task]
    scales: tuple[float, float]
    slow_time: float
    title: str


# The scales are factors of the usual start of each task.
CASES: dict[str, Case] = {
    "diagonal": Case(gf.tasks.diagonal_network, (0.2, 4.0), 6.0, "diagonal network"),
    "teacher_student": Case(
        gf.tasks.teacher_student, (0.5, 3.0), 4.0, "teacher–student"
    ),
}


@dataclasses.dataclass(frozen=True)
class PhaseDiagram(Settings):
    """Delays over weight decay and initial scale, measured and predicted."""

    tasks: tuple[Name, ...] = ("diagonal", "teacher_student")
    """Which."""
    weight_decay: tuple[str, ...] = ("1e-1:1e-5:13",)
    """Weight decays: numbers, or ranges such as 1e-1:1e-5:13 (evenly in the logarithm);
    1e-1:1e-5:5 if quick."""
    scales: int = 9
    """How many initial scales; 4 if quick."""
    seeds: int = 5
    """How many seeds, each with data and a start of its own; 2 if quick."""
    within: float = 0.05
    """How close measured and predicted delay are, if they agree."""
    order: Literal[1, 2] = 2
    """Of the theory."""
    processes: tyro.conf.OmitArgPrefixes[Distributed] = Distributed()
    """Share the runs with other processes."""

    QUICK = dict(weight_decay=("1e-1:1e-5:5",), scales=4, seeds=2)

    @property
    def lams(self) -> np.ndarray:
        return parse_weight_decay(self.weight_decay)

    def init_scales(self, name: str) -> np.ndarray:
        return np.geomspace(*CASES[name].scales, self.scales)

    def compute(self) -> xr.Dataset | None:
        first, found = self.processes.connect(), []
        for name in self.tasks:
            runs = self.simulated(name)
            if not first:
                continue
            data = times(runs, self.predicted(name))
            # Scales differ from task to task: they are numbered, and kept beside.
            scales = ("scale", data.init_scale.values)
            data = data.rename(init_scale="scale").drop_vars("scale")
            found.append(data.assign(init_scale=scales))
        if not first:
            return None
        return xr.concat(found, "task").assign_coords(task=list(self.tasks))

    def simulated(self, name: str) -> xr.Dataset:
        """All runs of a task."""
        runs = gf.sweep(
            functools.partial(problem, name=name),
            axes={"seed": list(range(self.seeds))},
            init_scale=self.init_scales(name),
            weight_decay=self.lams,
            slow_time=CASES[name].slow_time,
            saves=97,
            solver=gf.KKT5(),
            rtol=1e-7,
            store=self.store(f"_{name}"),
        )
        return runs.to_xarray()

    def predicted(self, name: str) -> xr.Dataset:
        """The times that theory gives, NaN where it gives none."""

        def cell(seed: int, scale: float) -> dict[str, Any]:
            flow, model, metrics = problem(seed, name=name)
            theory = gf.two_phase(
                flow, gf.scaled(model, scale), slow_time=CASES[name].slow_time,
                metrics=metrics, order=self.order, throw=False,
            )  # fmt: skip
            time = lambda key, lam: theory.crossing_time(key, float(lam)).time
            return {k: [time(k, lam) for lam in self.lams] for k in ("train", "test")}

        axes = {"seed": range(self.seeds), "init_scale": self.init_scales(name)}
        return table(axes, cell, f"{name}: theory")

    def judge(self, data: xr.Dataset) -> list[Row]:
        return [row for name, each in self.cases(data) for row in rows(name, each)]

    def cases(self, data: xr.Dataset) -> Iterator[tuple[str, xr.Dataset]]:
        """The runs of each task, with their initial scales and what they are."""
        for name in data.task.values:
            each = data.sel(task=name).set_coords("init_scale")
            each = each.swap_dims(scale="init_scale")
            yield str(name), with_phase(each, self.within)

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        return {"phase_diagram": diagram(dict(self.cases(data)), self.within)}


class Share(eqx.Module):
    """A metric over its threshold. (A threshold is part of the compiled program; so
    that all seeds share one, it is made an array.)"""

    fn: Callable[[Any], Array]
    level: Array

    def __call__(self, model: Any) -> Array:
        return self.fn(model) / self.level


def problem(seed: int, *, name: str) -> tuple:
    """The flow, model and metrics of a seed, as `gf.sweep` takes them."""
    task = CASES[name].make(jr.key(seed))
    metrics = {
        key: gf.Metric(Share(metric.fn, jnp.asarray(metric.threshold)), threshold=1.0)
        for key, metric in task.metrics.items()
    }
    return task.flow, task.model, metrics


def times(runs: xr.Dataset, theory: xr.Dataset) -> xr.Dataset:
    """Measured and predicted times and delays."""
    level = gf.Metric(lambda model: model, threshold=1.0)
    cross = lambda t, v: gf.crossing_time(t, v, level)
    over = dict(input_core_dims=[["time"], ["time"]], vectorize=True)
    memorised, grokked = (
        xr.apply_ufunc(cross, runs.t, runs[f"metric_{key}"], **over)
        for key in ("train", "test")
    )
    data = xr.Dataset(
        {
            "memorised": memorised,
            "grokked": grokked,
            "delay": grokked - memorised,
            "predicted_memorised": (runs.result.dims, theory.train.values),
            "predicted_grokked": (runs.result.dims, theory.test.values),
            "succeeded": (runs.result.dims, (runs.result == 0).values),
        },
    )
    data["predicted_delay"] = data.predicted_grokked - data.predicted_memorised
    return data.reset_coords(drop=True)


def with_phase(data: xr.Dataset, within: float) -> xr.Dataset:
    """What delays say of each run:

    - 0: failed, or did not memorise;
    - 1: memorised, and not generalised in the time it was run for;
    - 2: generalised at once: before it had memorised, or soon after;
    - 3: grokked, later than theory can tell;
    - 4: grokked, at another time than theory says;
    - 5: grokked when theory says."""
    delay, told = data.delay.values, data.predicted_delay.values
    memorised, grokked = data.memorised.values, data.grokked.values
    phase = np.full(delay.shape, 4)
    phase[np.abs(told / delay - 1) <= within] = 5
    phase[~np.isfinite(told)] = 3
    # "Soon": a delay of less than the time to memorise.
    phase[np.isfinite(delay) & (delay < memorised)] = 2
    phase[~np.isfinite(grokked)] = 1
    phase[~data.succeeded.values.astype(bool) | ~np.isfinite(memorised)] = 0
    return data.assign(phase=(data.delay.dims, phase))


PHASES = {
    "failed": ("#d9d9d9", "failed, or not memorised"),
    "never": ("#56B4E9", "memorised only"),
    "at_once": ("#009E73", "no delay"),
    "untold": ("#F0E442", "grokked; theory abstains"),
    "otherwise": ("#D55E00", "grokked; theory differs"),
    "agree": ("#0072B2", "grokked as predicted"),
}


def rows(name: str, data: xr.Dataset) -> list[Row]:
    """What is asked of the theory: where it gives a delay, at λ ≤ 1e-3, it is right."""
    small = (data.weight_decay <= 1.001e-3).values
    due = small & np.isin(data.phase.values, (4, 5))
    off = np.abs(data.predicted_delay.values / data.delay.values - 1)[due]
    seen = np.isin(data.phase.values, (3, 4, 5))
    counts = ", ".join(
        f"{int((data.phase == k).sum())} {words}"
        for k, (_, words) in enumerate(PHASES.values())
    )
    sentence = f"of {due.sum()} runs at λ ≤ 1e-3 that grok, and are predicted to"
    if not due.any():
        return [check(f"{name}: off", np.nan, "≤ 0.05", sentence, given=False)]
    sentence = f"95 % quantile of |predicted/measured − 1| of the delay, {sentence}"
    share = np.isfinite(data.predicted_delay.values)[seen].mean()
    return [
        check(f"{name}: off", np.quantile(off, 0.95), "≤ 0.05", sentence),
        check(f"{name}: told", share, "", f"of the grokking runs; of all: {counts}"),
    ]


def diagram(found: dict[str, xr.Dataset], within: float) -> Figure:
    """Measured delay, predicted delay, and where they agree: a row for each task."""
    fig, axes = plt.subplots(
        len(found), 3, figsize=(14.5, 4.1 * len(found) + 0.5), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    every = [d[k].values for d in found.values() for k in ("delay", "predicted_delay")]
    values = np.concatenate([v.ravel() for v in every])
    values = values[np.isfinite(values) & (values > 0)]
    norm = LogNorm(values.min(), values.max()) if values.size else LogNorm(1, 10)
    cmap = plt.get_cmap("viridis").with_extremes(bad="#eeeeee")
    colours, words = zip(*PHASES.values(), strict=True)
    phases = ListedColormap(colours)
    steps = BoundaryNorm(np.arange(len(words) + 1) - 0.5, len(words))
    letters = iter("abcdef")
    for (name, data), (left, middle, right) in zip(found.items(), axes, strict=True):
        title = CASES[name].title
        for ax, key, kind in (
            (left, "delay", "measured delay"),
            (middle, "predicted_delay", "predicted delay"),
        ):
            mesh = cells(ax, data, middling(data[key]).values, cmap, norm)
            label = f"({next(letters)}) {title}: {kind}"
            ax.set_title(label, fontsize=SIZE, loc="left")
        common = (data.phase == xr.DataArray(range(len(words)), dims="k")).sum("seed")
        mode = common.argmax("k")
        kinds = cells(right, data, mode.values, phases, steps)
        agree = (data.phase == 5).sum("seed").values
        for (j, k), n in np.ndenumerate(agree):
            if n and data.sizes["weight_decay"] <= 14:
                right.text(
                    data.weight_decay.values[k], data.init_scale.values[j], str(int(n)),
                    ha="center", va="center", fontsize=SIZE - 3, color="black",
                )  # fmt: skip
        label = f"({next(letters)}) {title}: outcome"
        right.set_title(label, fontsize=SIZE, loc="left")
        left.set_ylabel("initial scale $\\alpha$", fontsize=SIZE)
    scale = fig.colorbar(mesh, ax=list(axes[:, 1]), aspect=35, pad=0.01)
    scale.set_label("delay $t_{grok} - t_{mem}$ (median)", fontsize=SIZE)
    scale = fig.colorbar(
        kinds, ax=list(axes[:, 2]), ticks=range(len(words)), aspect=35, pad=0.01
    )
    scale.ax.set_yticklabels(words, fontsize=SIZE - 1)
    seeds = next(iter(found.values())).sizes["seed"]
    off = f"{100 * within:.0f} %"
    title = f"most of {seeds} seeds; number:\nhow many are within {off}"
    scale.ax.set_title(title, fontsize=SIZE - 2, loc="left")
    return fig


def middling(values: xr.DataArray) -> xr.DataArray:
    """The median over seeds that grok; a cell is blank unless half of them do."""
    positive = values > 0
    median = values.where(positive).median("seed", skipna=True)
    return median.where(positive.mean("seed") >= 0.5)


def cells(ax: Axes, data: xr.Dataset, values: np.ndarray, cmap: Any, norm: Any) -> Any:
    mesh = ax.pcolormesh(
        between(data.weight_decay.values), between(data.init_scale.values), values,
        cmap=cmap, norm=norm, edgecolors="white", lw=0.4,
    )  # fmt: skip
    ax.set(xscale="log", yscale="log")
    ax.set_xlabel("weight decay $\\lambda$", fontsize=SIZE)
    ax.tick_params(labelsize=SIZE - 1)
    return mesh
