"""Trainings by AdamW from several scales and under several weight decays; what is
judged of them, and figures."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.random as jr
import numpy as np
import optax
import xarray as xr
from matplotlib.axes import Axes
from scipy.ndimage import median_filter

import gradflow as gf

from ..shared.command import Settings
from ..shared.figures import COLOURS, finish, marks
from ..shared.rows import check, Row
from ..shared.runs import (
    AXIS_SYMBOLS,
    Lane,
    runs_of,
    save_steps,
    single,
    train,
    Trained,
    with_times,
    words,
)

NOISE = 5
"""Saved steps, in the median of which a metric is to be at its threshold: one that is
noise does not count."""

PARTS = ("train", "test")


def lane(
    alpha: float, gamma: float = 0.0, *, hold: bool = False, share: float = 1.0
) -> Lane:
    """One training: from α times the initial weights, under γ, or at a held norm.
    `share` is that of all steps: a control that is through early needs no more."""
    return dict(alpha=alpha, gamma=gamma, hold=int(hold), share=share)


@dataclasses.dataclass(frozen=True)
class Rule:
    """How to train: AdamW, with decay decoupled from the steps of Adam."""

    learning_rate: float
    steps: int
    batch_size: int | None = None
    """Of minibatches, where there are more samples than that."""
    clip: float | None = None
    """The largest norm of the gradient."""
    seed: int = 0
    """Of the minibatches."""

    def options(self, loss: Any) -> dict[str, Any]:
        """As `gf.sweep` takes it, for this loss."""
        samples = jax.tree.leaves(loss.x)[0].shape[0]
        batches: dict[str, Any] = {}
        if self.batch_size is not None and self.batch_size < samples:
            key = jr.key(self.seed + 1000)
            batches = dict(batch_size=self.batch_size, key=key)
        adam: Any = optax.adam
        if self.clip is not None:
            adam = clipped_adam(self.clip, self.learning_rate)
        return dict(
            learning_rate=self.learning_rate, method="decoupled", optimiser=adam,
            **batches,
        )  # fmt: skip


@functools.cache
def clipped_adam(largest: float, learning_rate: float) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(largest), optax.adam(learning_rate))


@dataclasses.dataclass(frozen=True)
class Scans(Settings):
    """Of every experiment on data of the paper, or on what stands in for them."""

    STAND_IN: ClassVar[str] = ""
    """What is learnt where no files are at hand; the settings of quick are for it."""

    data: str | None = None
    """Folder with the published files, or a file .npz of arrays of your own;
    GRADFLOW_DATA unless given."""
    published: bool = True
    """Whether files must have the checksums of the published ones."""
    learning_rate: float = 1e-3

    def unlike(self, *free: str) -> str:
        """Which settings are not as in the paper, in words; "" where all are, but for
        those that are `free`. A number of the paper is judged under these only."""
        about = {f.name for f in dataclasses.fields(Scans)} - {"learning_rate"}
        own = [f for f in dataclasses.fields(self) if f.name not in about | {*free}]
        other = [f.name for f in own if getattr(self, f.name) != f.default]
        return f"not the paper's {', '.join(other)}" if other else ""

    def misfit(self, data: xr.Dataset) -> str:
        """Why a criterion is not judged under the settings of `quick`, "" where it is:
        they are for what stands in for the paper's data."""
        if not self.quick or data.attrs["data"] == self.STAND_IN:
            return ""
        return f"the settings of --quick are for {self.STAND_IN}"

    def delays(self, data: xr.Dataset) -> list[Row]:
        """`delay_rows` of the runs, the first of which is from the large start."""
        large, *controls = runs_of(data)
        never = data.attrs["data"] == self.STAND_IN
        rows = delay_rows(large, controls, never=never)
        return not_judged(rows, self.misfit(data))

    def rule(self, steps: int, batch_size: int | None, **more: Any) -> Rule:
        return Rule(self.learning_rate, steps, batch_size, seed=self.seed, **more)


def there(sizes: Sequence[int], most: int | None, name: str) -> list[int]:
    """The `sizes` that the data have, `most` samples or any number; tells the others.

    **Raises:** `SystemExit` where they have none of them.
    """
    found = [n for n in sizes if most is None or n <= most]
    others = ", ".join(str(n) for n in sizes if n not in found)
    told = f"{name}: the data have {most} samples, not {others}"
    if not found:
        raise SystemExit(f"{told}.")
    if others:
        print(f"{told}: left out.", flush=True)
    return found


def with_level(task: gf.tasks.Task, level: float | None) -> gf.tasks.Task:
    """The task with another level of the test metric that counts, if one is given."""
    if level is None:
        return task
    test = dataclasses.replace(task.metrics["test"], threshold=level)
    return dataclasses.replace(task, metrics={**task.metrics, "test": test})


def problem(task: gf.tasks.Task) -> Callable[..., tuple]:
    """Flow, model and metrics, as `gf.sweep` takes them, in single precision."""
    task = single(task)

    def make(hold: int) -> tuple:
        flow = gf.GradientFlow(task.loss, hold_norm=bool(hold))
        return flow, task.model, task.metrics

    return make


def scan(
    task: gf.tasks.Task, lanes: Sequence[Lane], rule: Rule, store: Path, *,
    lasting: bool = False,
) -> xr.Dataset:  # fmt: skip
    """Trains every lane, or reads it where it has been trained; see `train` and
    `with_times`."""
    at = save_steps(rule.steps, max(rule.steps // 200, 1))
    until = lambda lane: at[at <= lane["share"] * rule.steps]
    runs = train(problem(task), lanes, store, until, **rule.options(task.loss))
    calm = lambda values: median_filter(values, NOISE, mode="nearest")
    runs = with_times(runs, task.metrics, lasting=lasting, calm=calm)
    return runs.drop_vars("half").assign_attrs(named(task))


def named(task: gf.tasks.Task) -> dict[str, str]:
    """What the data are, in words."""
    return dict(data=task.truth.data, title=task.truth.title)


def held(
    task: gf.tasks.Task, alphas: Sequence[float], rule: Rule, store: Path
) -> np.ndarray:
    """The metrics, train and test, at the end of trainings at held norms, for every α;
    read where they have been done."""
    descent = gf.Descent(at=np.array([0, rule.steps]), **rule.options(task.loss))
    runs = gf.sweep(
        problem(task), axes={"hold": [1]}, init_scale=list(alphas), weight_decay=0.0,
        run=descent, store=store, progress=AXIS_SYMBOLS,
    )  # fmt: skip
    ends = runs.to_xarray().isel(hold=0, time=-1)
    return np.stack([ends[f"metric_{part}"].values for part in PARTS])


def not_judged(rows: Sequence[Row], why: str) -> list[Row]:
    """The rows, none of them judged if there is a reason why not."""
    if not why:
        return list(rows)
    told = [f"{row.sentence}: not judged, {why}" for row in rows]
    return [
        dataclasses.replace(row, ok=None, sentence=sentence)
        for row, sentence in zip(rows, told, strict=True)
    ]


def delay_rows(
    large: Trained, controls: Sequence[Trained], times: float = 10.0, *,
    never: bool = True,
) -> list[Row]:  # fmt: skip
    """Grokking from a large start, with weight decay: generalisation at least ten times
    later than memorisation. None in the controls: they generalise before that; or, at a
    norm that is held and larger than usual, `never`. That is so for what stands in for
    the paper's data, as scikit-learn's digits; MNIST is learnt there too, as late as
    with weight decay, so that for other data it is told, and not judged. A control
    tells nothing that does not memorise, or has not generalised when it ends before ten
    times that."""
    told = f"t_test/t_train, of steps {large.grokked:.0f} and {large.memorised:.0f}"
    words_of = f"{words(large.lane)}: {told}"
    finite = math.isfinite(large.ratio)
    rows = [check("delay", large.ratio, f"≥ {times:g}", words_of, also=finite)]
    for run in controls:
        words_of = f"{words(run.lane)}: t_test/t_train; test at the end "
        words_of += f"{run.arrays['test'][-1]:.3g}"
        above = bool(run.lane["hold"]) and run.lane["alpha"] > 1
        if above and not never:
            words_of += ", at a norm that is large and held: for information"
            rows.append(Row("held", run.ratio, "", None, words_of))
            continue
        ok = None
        if not math.isfinite(run.memorised):
            words_of += ", not memorised"
        elif math.isfinite(run.grokked):
            ok = run.ratio < times
        elif run.steps[-1] < times * run.memorised:
            words_of += ", ended too early to tell"
        else:
            ok = above
        bound = f"< {times:g}" + ", or never" * above
        rows.append(Row("no delay", run.ratio, bound, ok, words_of))
    return rows


def lu_rows(
    scales: np.ndarray, train: np.ndarray, test: np.ndarray, *, level: float = 0.02,
    rise: float = 1.5, where: str = "",
) -> list[Row]:  # fmt: skip
    """The L and the U, of errors at norms that are held. U: the test error is least
    inside the range, and at both ends at least `rise` times as high. L: as the norm
    grows, the train error falls from at least five times `level` to at most `level`,
    and never rises by more than that."""
    best = int(np.nanargmin(test))
    ends = float(np.nanmin([test[0], test[-1]]) / max(test[best], 1e-12))
    inside = 0 < best < len(test) - 1
    back = float(np.max(train - np.minimum.accumulate(train)))
    falls = train[0] >= 5 * level and np.min(train) <= level
    return [
        check(
            f"U{where}", ends, f"≥ {rise:g}, the best inside",
            f"test error {test[best]:.3g}, best at α = {scales[best]:.3g}; the lower "
            "end relative to it", also=inside,
        ),
        check(
            f"L{where}", back, f"≤ {level:g}, from ≥ {5 * level:g} to ≤ {level:g}",
            f"largest rise of the train error, {train[0]:.3g} at the smallest and "
            f"{np.min(train):.3g} at best", also=falls,
        ),
    ]  # fmt: skip


def published_rows(
    sources: Sequence[str],
    data: xr.Dataset,
    wanted: Sequence[tuple[str, float, str]],
    unlike: str = "",
) -> list[Row]:
    """The paper's own numbers, bound, value and words; not judged where the data are
    not one of its `sources`, where settings are `unlike` its own, or where the value is
    of a step, as NaN, that the run did not come to."""
    found = data.attrs["data"]
    why = unlike if found in sources else f"the data are {found}"
    rows = []
    for bound, value, sentence in wanted:
        reason = why or "the run ends before" * math.isnan(value)
        if reason:
            told = f"{sentence} (here {value:.3g}): not judged, {reason}"
            rows.append(Row("paper", math.nan, bound, None, told))
        else:
            rows.append(check("paper", value, bound, sentence))
    return rows


def draw(
    ax: Axes, runs: Sequence[Trained], title: str, y: str = "accuracy", log: str = "x"
) -> None:
    """The test metric of every run, and its train metric dashed, against steps. (Names
    are beside their norms.)"""
    for run, colour in zip(runs, itertools.cycle(COLOURS), strict=False):
        x = run.steps[1:]
        ax.plot(x, run.arrays["test"][1:], color=colour, lw=2)
        ax.plot(x, run.arrays["train"][1:], color=colour, lw=1, ls="--")
    finish(ax, f"{title} (dashed: train)", y=y, log=log)


def draw_norms(ax: Axes, runs: Sequence[Trained]) -> None:
    for run, colour in zip(runs, itertools.cycle(COLOURS), strict=False):
        x, norm = run.steps[1:], run.arrays["norm"][1:]
        ax.plot(x, norm, color=colour, lw=2, label=words(run.lane, latex=True))
    finish(ax, "norm of the weights", y=r"$\|\theta\|$", log="x")


def draw_runs(axes: Sequence[Axes], data: xr.Dataset, y: str = "accuracy") -> None:
    """Metrics of all runs, with the times of the first, and norms."""
    runs = runs_of(data)
    log = "x" if y == "accuracy" else "xy"
    draw(axes[0], runs, data.attrs["title"], y=y, log=log)
    marks(axes[0], {"memorised": runs[0].memorised, "generalised": runs[0].grokked})
    draw_norms(axes[1], runs)


def draw_landscape(
    ax: Axes, scales: np.ndarray, errors: np.ndarray, title: str, y: str = "error",
    log: str = "x",
) -> None:  # fmt: skip
    """Errors, train and test, against the norm."""
    ax.plot(scales, errors[0], "o--", color=COLOURS[0], ms=4, label="train")
    ax.plot(scales, errors[1], "o-", color=COLOURS[1], ms=4, lw=2, label="test")
    finish(ax, title, x=r"norm, relative to the usual start, $\alpha$", y=y, log=log)
