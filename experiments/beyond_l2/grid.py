"""Grids of descents over penalties, learning rates α and strengths β, that resume."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import jax.random as jr
import optax
import xarray as xr
from matplotlib.figure import Figure

import gradflow as gf

from ..shared.figures import COLOURS, finish, marks, panels
from ..shared.rows import check, rank_correlation, Row
from ..shared.runs import (
    Lane,
    PENALTIES as NAMES,
    save_steps,
    single,
    train,
    Trained,
    with_times,
    words,
)

# As in the paper's code: sums over the layers, and norms that are not squared.
PENALTIES: dict[str, gf.AbstractPenalty] = {
    "l1": gf.L1(),
    "l2": gf.GroupLasso("leaf"),
    "nuclear": gf.Nuclear(),
}
NORMS = {
    "l1": gf.L1(),
    "l2": lambda model: jnp.sqrt(2 * gf.L2()(model)),
    "nuclear": gf.Nuclear(),
}


def grid(
    penalties: Sequence[str], alphas: Sequence[float], betas: Sequence[float]
) -> list[Lane]:
    cells = itertools.product(penalties, alphas, betas)
    return [dict(penalty=p, alpha=a, beta=b) for p, a, b in cells]


def train_grid(
    task: gf.tasks.Task,
    lanes: Sequence[Lane],
    store: Path,
    *,
    steps: int,
    every: int,
    seed: int,
    batch_size: int | None = None,
    penalties: dict[str, gf.AbstractPenalty] | None = None,
) -> xr.Dataset:
    """Trains every lane by Adam, or reads it where it has been trained before. An
    interrupted grid goes on where it was."""
    task = single(task)
    known = PENALTIES | (penalties or {})
    norms = {f"norm_{name}": norm for name, norm in NORMS.items()}

    def problem(kind: str) -> tuple:
        flow = gf.GradientFlow(task.loss, penalty=single(known[kind]))
        return flow, task.model, {**task.metrics, **norms}

    batches: dict[str, Any] = {}
    if batch_size is not None:
        batches = dict(batch_size=batch_size, key=jr.key(seed + 1000))
    axes = dict(penalty="kind", alpha="learning_rate", beta="weight_decay")
    at = lambda lane: save_steps(steps, every)
    runs = train(problem, lanes, store, at, axes, optimiser=optax.adam, **batches)
    runs = runs.drop_vars("norm").rename(penalty_value="value")
    return with_times(runs, task.metrics)


def of_each(runs: Sequence[Trained]) -> dict[tuple[str, float], list[Trained]]:
    """The runs of each penalty and α."""
    out: dict[tuple[str, float], list[Trained]] = {}
    for run in runs:
        out.setdefault((run.lane["penalty"], run.lane["alpha"]), []).append(run)
    return out


def order_rows(runs: Sequence[Trained]) -> list[Row]:
    """The rank correlation of the delay with β, for each penalty and each α. A run that
    memorised, but did not generalise in time, counts as later than all others."""
    rows = []
    for (penalty, alpha), each in of_each(runs).items():
        mine = [r for r in each if r.lane["beta"] > 0 and math.isfinite(r.memorised)]
        done, rank = sum(math.isfinite(run.grokked) for run in mine), math.nan
        if len(mine) > 1 and done:
            delays = [min(run.delay, 1e300) for run in mine]
            rank = rank_correlation([run.lane["beta"] for run in mine], delays)
        sentence = (
            f"{penalty}, α = {alpha:g}: Spearman's correlation of delay and β, "
            f"{done} of {len(mine)} runs generalised"
        )
        rows.append(check("order", rank, "≤ −0.8", sentence, given=done >= 3))
    return rows


def first_fit_rows(runs: Sequence[Trained], what: str = "half") -> list[Row]:
    """Memorisation comes before generalisation, in every run that generalises: before
    the test metric is half way to its threshold, or there (`what="grokked"`)."""
    done = [run for run in runs if math.isfinite(run.grokked)]
    early = [run for run in done if run.memorised < getattr(run, what)]
    place = "half way" if what == "half" else "at its threshold"
    sentence = (
        f"{len(early)} of {len(done)} runs that generalise memorise before the test "
        f"metric is {place}"
    )
    return [check("first", len(early), f"= {len(done)}", sentence, given=done)]


def norm_rows(run: Trained) -> list[Row]:
    """‖θ‖₂ under ℓ1 grows from memorisation to generalisation: to a test accuracy of
    one half, to its threshold, and to the end, where the network still generalises."""
    if run.lane["penalty"] != "l1" or run.lane["beta"] == 0:
        return []
    start = run.at("norm_l2", run.memorised)
    end = run.steps[-1] if math.isfinite(run.grokked) else math.inf
    rows = []
    for place, when in (
        ("at test accuracy 0.5", run.half),
        ("at test accuracy 0.99", run.grokked),
        ("at the end", end),
    ):
        if math.isinf(when):
            continue
        sentence = (
            f"{words(run.lane)}: ℓ2 norm {place} (step {when:.0f}), relative to "
            f"memorisation (step {run.memorised:.0f})"
        )
        rows.append(check("norm", run.at("norm_l2", when) / start, "> 1", sentence))
    return rows


def control_rows(runs: Sequence[Trained]) -> list[Row]:
    """Whether a run without penalty generalises too: then the penalty is not why."""
    best = lambda run: float(run.arrays["test"].max())
    sentence = lambda run: f"{words(run.lane)}: best test accuracy without penalty"
    plain = [run for run in runs if run.lane["beta"] == 0]
    return [check("control", best(run), "", sentence(run)) for run in plain]


def curves(
    runs: Sequence[Trained], what: str, title: str, levels: dict[str, float]
) -> Figure:
    """A panel for each penalty and α, of the test metric (train dashed) for every β;
    and the delay against αβ."""
    groups = of_each(runs)
    accuracy = what == "accuracy"
    fig, axes = panels(len(groups) + 1, columns=min(3, len(groups) + 1))
    for ax, ((penalty, alpha), mine) in zip(axes, groups.items(), strict=False):
        for run, colour in zip(mine, itertools.cycle(COLOURS), strict=False):
            x, label = run.steps[1:], rf"$\beta$ = {run.lane['beta']:g}"
            ax.plot(x, run.arrays["test"][1:], color=colour, label=label)
            ax.plot(x, run.arrays["train"][1:], color=colour, ls="--", lw=0.8)
        for word, level in levels.items():
            ax.axhline(level, color="grey", lw=0.7, ls=":")
            ax.annotate(word, (1, level), color="grey", fontsize=8, va="bottom")
        if not accuracy:
            ax.set_ylim(bottom=1e-7)
        name = rf"{NAMES[penalty]}, $\alpha$ = {alpha:g}"
        finish(ax, f"{name} (dashed: train)", y=what, log="x" if accuracy else "xy")
        points = [(r.lane["alpha"] * r.lane["beta"], r.delay) for r in mine]
        good = [p for p in points if p[0] > 0 and math.isfinite(p[1]) and p[1] > 0]
        if good:
            axes[-1].plot(*zip(*good, strict=True), "o-", label=name)
    finish(axes[-1], "delay in steps", x=r"$\alpha\beta$", y="")
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
