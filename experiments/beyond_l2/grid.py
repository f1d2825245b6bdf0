"""Grids of descents over penalties, learning rates α and strengths β, that resume."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import xarray as xr
from matplotlib.figure import Figure
from scipy.stats import spearmanr

import gradflow as gf

from ..shared.common import bar, check, COLOURS, finish, marks, panels, Row
from ..shared.runs import first, save_steps, single, stored

# As in the paper's code: sums over the layers, and norms that are not squared.
PENALTIES: dict[str, gf.AbstractPenalty] = {
    "l1": gf.L1(),
    "l2": gf.GroupLasso("leaf"),
    "nuclear": gf.Nuclear(),
}
NAMES = {
    "l1": r"$\ell_1$",
    "l2": r"$\ell_2$",
    "nuclear": r"$\ell_*$",
    "sobolev": "Sobolev",
}
NORMS = {
    "l1": gf.L1(),
    "l2": lambda model: jnp.sqrt(2 * gf.L2()(model)),
    "nuclear": gf.Nuclear(),
}


class Cell(NamedTuple):
    """One run of a grid."""

    penalty: str
    alpha: float
    beta: float

    def __str__(self) -> str:
        return f"{self.penalty} alpha={self.alpha:g} beta={self.beta:g}"

    @property
    def title(self) -> str:
        strengths = rf"$\alpha$ = {self.alpha:g}, $\beta$ = {self.beta:g}"
        return f"{NAMES[self.penalty]}, {strengths}"


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run recorded, and when it learnt: steps, `inf` where it did not."""

    cell: Cell
    steps: np.ndarray
    arrays: dict[str, np.ndarray]
    memorised: float
    half: float
    """When the test metric was half way to its threshold; of accuracies, at 0.5."""
    grokked: float

    @property
    def delay(self) -> float:
        """Steps from memorisation to generalisation."""
        late = self.grokked - self.memorised
        return late if math.isfinite(self.memorised) else math.nan

    def at(self, name: str, step: float) -> float:
        """A recorded quantity at the first saved step from `step` on."""
        i = np.searchsorted(self.steps, step)
        return float(self.arrays[name][i]) if i < len(self.steps) else math.nan


def train(
    task: gf.tasks.Task,
    cells: Sequence[Cell],
    *,
    steps: int,
    every: int,
    seed: int,
    folder: Path,
    batch_size: int | None = None,
    penalties: dict[str, gf.AbstractPenalty] | None = None,
) -> list[Trained]:
    """Trains every cell by Adam, or reads it where it has been trained before with the
    same settings. An interrupted grid goes on where it was."""
    penalties = PENALTIES | (penalties or {})
    task = single(task)
    at = save_steps(steps, every)
    start = [float(task.loss(task.model)), *map(_norm, jax.tree.leaves(task.model))]
    out = []
    for cell in bar(cells, "runs"):
        settings = dict(
            task=task.name, start=start, steps=steps, every=every, seed=seed,
            batch_size=batch_size, **cell._asdict(),
        )  # fmt: skip
        path = folder / f"{str(cell).replace(' ', '_')}_seed={seed}.npz"
        penalty = single(penalties[cell.penalty])
        descend = partial(_descend, task, penalty, cell, at, seed, batch_size)
        arrays = stored(path, settings, descend)
        out.append(_trained(task, cell, at, arrays))
    return out


def _norm(x: jax.Array) -> float:
    return float(jnp.linalg.norm(x))


def _descend(
    task: gf.tasks.Task,
    penalty: gf.AbstractPenalty,
    cell: Cell,
    at: np.ndarray,
    seed: int,
    batch_size: int | None,
) -> dict[str, np.ndarray]:
    norms = {f"norm_{name}": norm for name, norm in NORMS.items()}
    batches = {}
    if batch_size is not None:
        batches = dict(batch_size=batch_size, key=jr.key(seed + 1000))
    path = gf.descent(
        gf.GradientFlow(task.loss, penalty=penalty),
        task.model,
        weight_decay=cell.beta,
        learning_rate=cell.alpha,
        optimiser=optax.adam,
        at=at,
        metrics={**task.metrics, **norms},
        throw=False,
        **batches,
    )
    arrays = {**path.metrics, "train_loss": path.train_loss, "value": path.penalty}
    return {name: np.asarray(values) for name, values in arrays.items()}


def _trained(task, cell, at, arrays) -> Trained:
    times = {}
    for name, metric in task.metrics.items():
        higher = metric.higher_is_better
        times[name] = first(at, arrays[name], metric.threshold, higher)
        if name == "test":
            half = 0.5 if higher else 2 * metric.threshold
            times["half"] = first(at, arrays[name], half, higher)
    return Trained(cell, at, arrays, times["train"], times["half"], times["test"])


def grid(
    penalties: Sequence[str], alphas: Sequence[float], betas: Sequence[float]
) -> list[Cell]:
    return [Cell(*values) for values in itertools.product(penalties, alphas, betas)]


def lines(runs: Sequence[Trained]) -> list[dict[str, Any]]:
    """A line of the summary for each run."""
    return [
        {
            **run.cell._asdict(),
            "memorised": run.memorised,
            "half": run.half,
            "grokked": run.grokked,
            **{f"{k}_at_end": float(v[-1]) for k, v in run.arrays.items()},
        }
        for run in runs
    ]


def order_rows(name: str, runs: Sequence[Trained]) -> list[Row]:
    """The rank correlation of the delay with β, for each penalty and each α. A run that
    memorised, but did not generalise in time, counts as later than all others."""
    rows = []
    for penalty, alpha in dict.fromkeys((r.cell.penalty, r.cell.alpha) for r in runs):
        mine = [
            run
            for run in runs
            if (run.cell.penalty, run.cell.alpha) == (penalty, alpha)
            and run.cell.beta > 0
            and math.isfinite(run.memorised)
        ]
        done = sum(math.isfinite(run.grokked) for run in mine)
        rank = math.nan
        if len(mine) > 1 and done:
            beta = [run.cell.beta for run in mine]
            rank = float(spearmanr(beta, [run.delay for run in mine])[0])
        enough = done >= 3
        words = (
            f"{penalty}, α = {alpha:g}: Spearman's correlation of delay and β, "
            f"{done} of {len(mine)} runs generalised"
        )
        ok = bool(rank <= -0.8) if enough else None
        rows.append(check(name, rank, "≤ −0.8", ok, words))
    return rows


def dataset(runs: Sequence[Trained]) -> xr.Dataset:
    """Everything recorded, of dimensions run and step."""
    names = runs[0].arrays
    stack = {n: (("run", "step"), np.stack([r.arrays[n] for r in runs])) for n in names}
    columns = {
        field: ("run", [getattr(run.cell, field) for run in runs])
        for field in Cell._fields
    }
    times = {
        field: ("run", [getattr(run, field) for run in runs])
        for field in ("memorised", "half", "grokked")
    }
    return xr.Dataset({**stack, **times}, {"step": runs[0].steps, **columns})


def curves(
    runs: Sequence[Trained], what: str, title: str, levels: dict[str, float]
) -> Figure:
    """A panel for each penalty and α, of the test metric (train dashed) for every β;
    and the delay against αβ."""
    keys = list(dict.fromkeys((r.cell.penalty, r.cell.alpha) for r in runs))
    accuracy = what == "accuracy"
    fig, axes = panels(len(keys) + 1, columns=min(3, len(keys) + 1))
    for ax, key in zip(axes, keys, strict=False):
        mine = [r for r in runs if (r.cell.penalty, r.cell.alpha) == key]
        for run, colour in zip(mine, itertools.cycle(COLOURS), strict=False):
            label = rf"$\beta$ = {run.cell.beta:g}"
            ax.plot(run.steps[1:], run.arrays["test"][1:], color=colour, label=label)
            ax.plot(
                run.steps[1:], run.arrays["train"][1:], color=colour, ls="--", lw=0.8
            )
        for word, level in levels.items():
            ax.axhline(level, color="grey", lw=0.7, ls=":")
            ax.annotate(word, (1, level), color="grey", fontsize=8, va="bottom")
        if not accuracy:
            ax.set_ylim(bottom=1e-7)
        finish(
            ax,
            rf"{NAMES[key[0]]}, $\alpha$ = {key[1]:g} (dashed: train)",
            y=what,
            log="x" if accuracy else "xy",
        )
    ax = axes[-1]
    for key, colour in zip(keys, itertools.cycle(COLOURS), strict=False):
        points = [
            (r.cell.alpha * r.cell.beta, r.delay)
            for r in runs
            if (r.cell.penalty, r.cell.alpha) == key and r.cell.beta > 0
        ]
        good = [p for p in points if math.isfinite(p[1]) and p[1] > 0]
        if good:
            label = rf"{NAMES[key[0]]}, $\alpha$ = {key[1]:g}"
            ax.plot(*zip(*good, strict=True), "o-", color=colour, label=label)
    finish(ax, "delay in steps", x=r"$\alpha\beta$", y="")
    fig.suptitle(title)
    return fig


def norms(run: Trained, title: str) -> Figure:
    """Accuracies above, and the norms below, each relative to where it was when the
    training set was memorised."""
    fig, axes = panels(2, columns=1, size=(8.5, 3.4))
    x = run.steps[1:]
    axes[0].plot(x, run.arrays["train"][1:], color=COLOURS[0], label="train")
    axes[0].plot(x, run.arrays["test"][1:], color=COLOURS[1], label="test")
    finish(axes[0], title, y="accuracy", log="x")
    for name, colour in zip(NORMS, COLOURS[2:], strict=False):
        values = run.arrays[f"norm_{name}"][1:]
        there = run.at(f"norm_{name}", run.memorised)
        label = f"{NAMES[name]} (at memorisation: {there:.3g})"
        axes[1].plot(x, values / there, color=colour, label=label)
    axes[1].axhline(1, color="grey", lw=0.7)
    finish(axes[1], "norms of all weights, relative to memorisation", log="xy")
    times = {"memorised": run.memorised, "generalised": run.grokked}
    for ax in axes:
        marks(ax, times)
    return fig
