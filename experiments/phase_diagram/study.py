"""The phase diagram of grokking: weight decay against initial scale.

Runs a task for every combination of λ, initial scale and seed, in one sweep; measures
the delay between memorisation and grokking; predicts it from two runs for each scale
and seed, by the two-phase theory; and shows where the two agree. The runs are kept in a
store: the same command goes on where it stopped. Writes summary.json, arrays.nc and a
figure.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import tyro
import xarray as xr
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm
from matplotlib.figure import Figure

import gradflow as gf
from gradflow.plot import SIZE

from ..shared.common import (
    bar,
    check,
    Clock,
    Distributed,
    parse_weight_decay,
    Row,
    write,
)

Name = Literal["diagonal", "teacher_student"]


@dataclasses.dataclass(frozen=True)
class Study:
    """A task, its initial scales, and how far to follow the drift."""

    make: Callable[..., gf.tasks.Task]
    scales: tuple[float, float]
    slow_time: float
    title: str


# The scales are factors of the usual start of each task.
STUDIES: dict[str, Study] = {
    "diagonal": Study(gf.tasks.diagonal_network, (0.2, 4.0), 6.0, "diagonal network"),
    "teacher_student": Study(
        gf.tasks.teacher_student, (0.5, 3.0), 4.0, "teacher–student"
    ),
}


@dataclasses.dataclass(frozen=True)
class Config:
    tasks: tuple[Name, ...] = ("diagonal", "teacher_student")
    """Which."""
    weight_decay: tuple[str, ...] = ()
    """Weight decays: numbers, or ranges such as 1e-1:1e-5:13 (evenly in the logarithm),
    the default; 1e-1:1e-5:5 if quick."""
    scales: int = 0
    """How many initial scales; 9, or 4 if quick."""
    seeds: int = 0
    """How many seeds, each with data and a start of its own; 5, or 2 if quick."""
    within: float = 0.05
    """How close measured and predicted delay are, if they agree."""
    order: Literal[1, 2] = 2
    """Of the theory."""
    out: Path = Path("results/phase_diagram")
    """Folder for the results."""
    quick: bool = False
    """A coarse diagram, in a minute or two."""
    processes: tyro.conf.OmitArgPrefixes[Distributed] = Distributed()
    """Share the runs with other processes."""

    def lams(self) -> np.ndarray:
        default = "1e-1:1e-5:5" if self.quick else "1e-1:1e-5:13"
        return parse_weight_decay(self.weight_decay or (default,))

    def init_scales(self, name: str) -> np.ndarray:
        count = self.scales or (4 if self.quick else 9)
        return np.geomspace(*STUDIES[name].scales, count)

    def all_seeds(self) -> list[int]:
        return list(range(self.seeds or (2 if self.quick else 5)))


class Share(eqx.Module):
    """A metric over its threshold. (A threshold is part of the compiled program; so
    that all seeds share one, it is made an array.)"""

    fn: Callable[[Any], Array]
    level: Array

    def __call__(self, model: Any) -> Array:
        return self.fn(model) / self.level


def problem(seed: int, *, name: str) -> tuple:
    """The flow, model and metrics of a seed, as `gf.sweep` takes them."""
    task = STUDIES[name].make(jr.key(seed))
    metrics = {
        key: gf.Metric(Share(metric.fn, jnp.asarray(metric.threshold)), threshold=1.0)
        for key, metric in task.metrics.items()
    }
    return task.flow, task.model, metrics


def main(config: Config) -> dict[str, Any]:
    """Runs the tasks; returns what is written to summary.json, or by a process that is
    not the first, nothing."""
    first = config.processes.connect()
    matplotlib.use("Agg")
    config.out.mkdir(parents=True, exist_ok=True)
    clock, found, checks = Clock(), {}, []
    for name in config.tasks:
        with clock(f"{name}: runs"):
            runs = simulated(name, config)
        if not first:
            continue
        with clock(f"{name}: theory"):
            found[name] = times(runs, predicted(name, config), config)
        checks += rows(name, found[name])
    if not first:
        return {}
    for row in checks:
        print(row)
    numbers = {
        "settings": {
            "weight_decay": list(config.lams()),
            "scales": {name: list(config.init_scales(name)) for name in found},
            "seeds": config.all_seeds(),
            "within": config.within,
            "order": config.order,
            "quick": config.quick,
        },
        "cells": {name: counts(data) for name, data in found.items()},
    }
    joined: Any = xr.concat(
        [data.assign_coords(init_scale=np.arange(data.sizes["init_scale"]))
         for data in found.values()],
        xr.DataArray(list(found), dims="task", name="task"),
    )  # fmt: skip
    joined.to_netcdf(config.out / "arrays.nc", engine="scipy")
    figures = {"phase_diagram": diagram(found, config)}
    summary = write(config.out, numbers, checks, figures, clock)
    print(f"Written to {config.out}: summary.json, arrays.nc, phase_diagram.png")
    return summary


def simulated(name: str, config: Config) -> xr.Dataset:
    """All runs of a task."""
    runs: Any = gf.sweep(
        functools.partial(problem, name=name),
        axes={"seed": config.all_seeds()},
        init_scale=config.init_scales(name),
        weight_decay=config.lams(),
        slow_time=STUDIES[name].slow_time,
        saves=97,
        solver=gf.KKT5(),
        rtol=1e-7,
        store=config.out / f"{name}.zarr",
    )
    return runs


def predicted(name: str, config: Config) -> xr.Dataset:
    """The times that theory gives, NaN where it gives none."""
    lams, scales, seeds = config.lams(), config.init_scales(name), config.all_seeds()
    shape = (len(seeds), len(scales), len(lams))
    out = {key: np.full(shape, np.nan) for key in ("train", "test")}
    for i, seed in enumerate(bar(seeds, f"{name}: theory")):
        flow, model, metrics = problem(seed, name=name)
        for j, scale in enumerate(scales):
            theory = gf.two_phase(
                flow,
                gf.scaled(model, scale),
                slow_time=STUDIES[name].slow_time,
                metrics=metrics,
                order=config.order,
                throw=False,
            )
            for k, lam in enumerate(lams):
                for key, values in out.items():
                    values[i, j, k] = theory.crossing_time(key, float(lam)).time
    dims = ("seed", "init_scale", "weight_decay")
    return xr.Dataset({key: (dims, values) for key, values in out.items()})


def times(runs: xr.Dataset, theory: xr.Dataset, config: Config) -> xr.Dataset:
    """Measured and predicted times and delays, and what they say of each run:

    - 0: failed, or did not memorise;
    - 1: memorised, and not generalised in the time it was run for;
    - 2: generalised at once: before it had memorised, or soon after;
    - 3: grokked, later than theory can tell;
    - 4: grokked, at another time than theory says;
    - 5: grokked when theory says."""
    level = gf.Metric(lambda model: model, threshold=1.0)
    cross = lambda t, v: gf.crossing_time(t, v, level)
    over = dict(input_core_dims=[["time"], ["time"]], vectorize=True)
    measured = {
        key: xr.apply_ufunc(cross, runs.t, runs[f"metric_{key}"], **over)
        for key in ("train", "test")
    }
    data = xr.Dataset(
        {
            "memorised": measured["train"],
            "grokked": measured["test"],
            "delay": measured["test"] - measured["train"],
            "predicted_memorised": (runs.result.dims, theory.train.values),
            "predicted_grokked": (runs.result.dims, theory.test.values),
        },
    )
    data["predicted_delay"] = data.predicted_grokked - data.predicted_memorised
    good = (runs.result == 0).values
    delay, told = data.delay.values, data.predicted_delay.values
    memorised, grokked = data.memorised.values, data.grokked.values
    phase = np.full(delay.shape, 4)
    phase[np.abs(told / delay - 1) <= config.within] = 5
    phase[~np.isfinite(told)] = 3
    # "Soon": a delay of less than the time to memorise.
    phase[np.isfinite(delay) & (delay < memorised)] = 2
    phase[~np.isfinite(grokked)] = 1
    phase[~good | ~np.isfinite(memorised)] = 0
    data["phase"] = (runs.result.dims, phase)
    data.phase.attrs["meanings"] = " ".join(PHASES)
    return data.reset_coords(drop=True)


PHASES = ("failed", "never", "at_once", "untold", "otherwise", "agree")
WORDS = (
    "failed, or not memorised",
    "memorised only",
    "no delay",
    "grokked; theory abstains",
    "grokked; theory differs",
    "grokked as predicted",
)
COLOURS = ("#d9d9d9", "#56B4E9", "#009E73", "#F0E442", "#D55E00", "#0072B2")


def counts(data: xr.Dataset) -> dict[str, int]:
    return {name: int((data.phase == k).sum()) for k, name in enumerate(PHASES)}


def rows(name: str, data: xr.Dataset) -> list[Row]:
    """What is asked of the theory: where it gives a delay, at λ ≤ 1e-3, it is right."""
    small = (data.weight_decay <= 1.001e-3).values
    due = small & np.isin(data.phase.values, (4, 5))
    off = np.abs(data.predicted_delay.values / data.delay.values - 1)[due]
    seen = np.isin(data.phase.values, (3, 4, 5))
    share = float(np.isfinite(data.predicted_delay.values)[seen].mean())
    sentence = f"of {due.sum()} runs at λ ≤ 1e-3 that grok, and are predicted to"
    if not due.any():
        return [check(f"{name}: off", np.nan, "≤ 0.05", None, sentence)]
    return [
        check(
            f"{name}: off", np.quantile(off, 0.95), "≤ 0.05",
            np.quantile(off, 0.95) <= 0.05,
            f"95 % quantile of |predicted/measured − 1| of the delay, {sentence}",
        ),
        check(f"{name}: told", share, "", None, "of the grokking runs are predicted"),
    ]  # fmt: skip


def diagram(found: dict[str, xr.Dataset], config: Config) -> Figure:
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
    phases = ListedColormap(COLOURS)
    steps = BoundaryNorm(np.arange(len(WORDS) + 1) - 0.5, len(WORDS))
    letters = iter("abcdef")
    for (name, data), (left, middle, right) in zip(found.items(), axes, strict=True):
        title = STUDIES[name].title
        # The median over seeds that grok; a cell is blank unless half of them do.
        middling = lambda v: (
            v.where(v > 0)
            .median("seed", skipna=True)
            .where((v > 0).mean("seed") >= 0.5)
        )
        for ax, key, words in (
            (left, "delay", "measured delay"),
            (middle, "predicted_delay", "predicted delay"),
        ):
            shown = middling(data[key])
            mesh = cells(ax, data, shown.values, cmap, norm)
            ax.set_title(
                f"({next(letters)}) {title}: {words}", fontsize=SIZE, loc="left"
            )
        common = (data.phase == xr.DataArray(range(len(WORDS)), dims="k")).sum("seed")
        mode = common.argmax("k")
        kinds = cells(right, data, mode.values, phases, steps)
        agree = (data.phase == 5).sum("seed").values
        for (j, k), n in np.ndenumerate(agree):
            if n and data.sizes["weight_decay"] <= 14:
                right.text(
                    data.weight_decay.values[k], data.init_scale.values[j], str(int(n)),
                    ha="center", va="center", fontsize=SIZE - 3, color="black",
                )  # fmt: skip
        right.set_title(
            f"({next(letters)}) {title}: outcome",
            fontsize=SIZE, loc="left",
        )  # fmt: skip
        left.set_ylabel("initial scale $\\alpha$", fontsize=SIZE)
    bar = fig.colorbar(mesh, ax=list(axes[:, 1]), aspect=35, pad=0.01)
    bar.set_label("delay $t_{grok} - t_{mem}$ (median)", fontsize=SIZE)
    bar = fig.colorbar(
        kinds, ax=list(axes[:, 2]), ticks=range(len(WORDS)), aspect=35, pad=0.01
    )
    bar.ax.set_yticklabels(WORDS, fontsize=SIZE - 1)
    seeds = next(iter(found.values())).sizes["seed"]
    off = f"{100 * config.within:.0f} %"
    within = f"most of {seeds} seeds; number:\nhow many are within {off}"
    bar.ax.set_title(within, fontsize=SIZE - 2, loc="left")
    return fig


def edges(x: np.ndarray) -> np.ndarray:
    """Of cells around values, halfway to their neighbours in the logarithm."""
    logs = np.log(x)
    step = np.diff(logs) if logs.size > 1 else np.ones(1)
    middle = logs[:-1] + np.diff(logs) / 2
    return np.exp([logs[0] - step[0] / 2, *middle, logs[-1] + step[-1] / 2])


def cells(ax: Axes, data: xr.Dataset, values: np.ndarray, cmap: Any, norm: Any) -> Any:
    mesh = ax.pcolormesh(
        edges(data.weight_decay.values), edges(data.init_scale.values), values,
        cmap=cmap, norm=norm, edgecolors="white", lw=0.4,
    )  # fmt: skip
    ax.set(xscale="log", yscale="log")
    ax.set_xlabel("weight decay $\\lambda$", fontsize=SIZE)
    ax.tick_params(labelsize=SIZE - 1)
    return mesh
