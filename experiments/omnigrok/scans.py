"""Trainings by AdamW from several scales and under several weight decays; what is
judged of them, and figures."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import optax
import xarray as xr
from matplotlib.axes import Axes
from scipy.ndimage import median_filter

import gradflow as gf

from ..shared.common import check, COLOURS, finish, marks, Row, Settings
from ..shared.runs import first, for_good, read, save_steps, single, stored, write

NOISE = 5


class Lane(NamedTuple):
    """One training: from α times the initial weights, under γ, or at a held norm."""

    alpha: float
    weight_decay: float = 0.0
    hold: bool = False
    share: float = 1.0
    """Of the steps of the rule: a control that is through early needs no more."""

    @property
    def title(self) -> str:
        end = "norm held" if self.hold else rf"$\gamma$ = {self.weight_decay:g}"
        return rf"$\alpha$ = {self.alpha:g}, {end}"

    @property
    def file(self) -> str:
        kind = "held" if self.hold else f"gamma={self.weight_decay:g}"
        return f"alpha={self.alpha:g}_{kind}"

    def __str__(self) -> str:
        end = "norm held" if self.hold else f"γ = {self.weight_decay:g}"
        return f"α = {self.alpha:g}, {end}"


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a training recorded, and when it learnt: steps, `inf` where it did not."""

    lane: Lane
    steps: np.ndarray
    arrays: dict[str, np.ndarray]
    """`train` and `test`, the metrics; `train_loss`; `norm`."""
    memorised: float
    """The first step at which `train` is at its threshold, in the median of `NOISE`
    saved steps: one that is noise does not count."""
    grokked: float
    """The first step at which `test` is."""

    @property
    def ratio(self) -> float:
        """t_test/t_train."""
        if not math.isfinite(self.memorised):
            return math.nan
        return self.grokked / max(self.memorised, 1.0)

    def at(self, name: str, step: float) -> float:
        """What was recorded last, up to a step."""
        i = np.searchsorted(self.steps, step, side="right") - 1
        return float(self.arrays[name][i])


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


@dataclasses.dataclass(frozen=True)
class Scans(Settings):
    """Of every experiment on data of the paper, or on what stands in for them."""

    data: str | None = None
    """Folder with the published files; GRADFLOW_DATA unless given."""
    published: bool = True
    """Whether they must have the checksums of the published ones."""
    learning_rate: float = 1e-3

    def folder(self, name: str, part: str = "") -> Path:
        return (self.out or Path("results/omnigrok") / name) / "runs" / part

    def rule(self, steps: int, batch_size: int | None, **more: Any) -> Rule:
        return Rule(self.learning_rate, steps, batch_size, seed=self.seed, **more)


def with_level(task: gf.tasks.Task, level: float | None) -> gf.tasks.Task:
    """The task with another level of the test metric that counts, if one is given."""
    if level is None:
        return task
    test = dataclasses.replace(task.metrics["test"], threshold=level)
    return dataclasses.replace(task, metrics={**task.metrics, "test": test})


@functools.cache
def clipped_adam(largest: float, learning_rate: float) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(largest), optax.adam(learning_rate))


def scan(
    task: gf.tasks.Task, lanes: Sequence[Lane], rule: Rule, folder: Path, *,
    lasting: bool = False,
) -> list[Trained]:  # fmt: skip
    """Trains every lane, or reads it where it has been trained. On a CPU, where lanes
    are run one after the other anyway, each is written when it is done; else those of
    the same kind and length are one sweep. Times are those of the first steps at the
    threshold, or, if `lasting`, of those from which on it is kept."""
    task = single(task)
    base = fingerprint(task, rule)
    files = {lane: folder / f"{lane.file}.npz" for lane in lanes}
    known = {lane: read(path, base | lane._asdict()) for lane, path in files.items()}
    kind = lambda lane: (lane.hold, lane.share)
    missing = sorted((lane for lane in lanes if known[lane] is None), key=kind)
    groups = [list(group) for _, group in itertools.groupby(missing, key=kind)]
    if jax.default_backend() == "cpu":
        groups = [[lane] for lane in missing]
    at = save_steps(rule.steps, max(rule.steps // 200, 1))
    for group in groups:
        some = at[at <= group[0].share * rule.steps]
        swept = _sweep(
            task, rule, group[0].hold, some,
            init_scale=[lane.alpha for lane in group],
            weight_decay=[lane.weight_decay for lane in group],
            zipped=[("init_scale", "weight_decay")],
        )  # fmt: skip
        recorded = {
            **swept.metrics,
            "train_loss": swept.train_loss,
            "norm": np.sqrt(2 * np.asarray(swept.penalty)),
        }
        for i, lane in enumerate(group):
            arrays = {name: np.asarray(v[i]) for name, v in recorded.items()}
            known[lane] = {**arrays, "step": some}
            write(files[lane], base | lane._asdict(), known[lane])
    return [_trained(task, lane, known[lane], lasting) for lane in lanes]


def held(
    task: gf.tasks.Task, alphas: Sequence[float], rule: Rule, path: Path
) -> dict[str, np.ndarray]:
    """The metrics at the end of trainings at held norms, for every α; read where they
    have been done."""
    task = single(task)

    def ends() -> dict[str, np.ndarray]:
        at = np.array([0, rule.steps])
        swept = _sweep(task, rule, True, at, init_scale=alphas, weight_decay=0.0)
        return {name: np.asarray(v[:, -1]) for name, v in swept.metrics.items()}

    settings = fingerprint(task, rule) | {"alphas": list(alphas)}
    # (Not with_suffix: a name may have a point in it, as m=0.05.)
    return stored(path.with_name(path.name + ".npz"), settings, ends)


def fingerprint(task: gf.tasks.Task, rule: Rule) -> dict[str, Any]:
    """What tells whether a stored run is of these data, this start and this rule."""
    weights = jax.tree.leaves(eqx.filter(task.model, eqx.is_inexact_array))
    size = lambda x: float(np.linalg.norm(x))
    start = [float(task.loss(task.model)), *map(size, weights)]
    return dict(
        task=task.name, data=task.truth.title, start=start, **dataclasses.asdict(rule)
    )


def _sweep(
    task: gf.tasks.Task, rule: Rule, hold: bool, at: np.ndarray, **axes: Any
) -> gf.Sweep:
    loss = task.loss
    assert isinstance(loss, gf.SquaredError | gf.CrossEntropy | gf.Logistic)
    samples = jax.tree.leaves(loss.x)[0].shape[0]
    batches: dict[str, Any] = {}
    if rule.batch_size is not None and rule.batch_size < samples:
        batches = dict(batch_size=rule.batch_size, key=jr.key(rule.seed + 1000))
    optimiser: Any = optax.adam
    if rule.clip is not None:
        optimiser = clipped_adam(rule.clip, rule.learning_rate)
    return gf.sweep(
        gf.GradientFlow(loss, hold_norm=hold),
        task.model,
        learning_rate=rule.learning_rate,
        method="decoupled",
        optimiser=optimiser,
        at=at,
        metrics=task.metrics,
        **batches,
        **axes,
    )


def _trained(task: gf.tasks.Task, lane: Lane, arrays: dict, lasting: bool) -> Trained:
    arrays = dict(arrays)
    steps = arrays.pop("step")
    times = {}
    for name in ("train", "test"):
        metric = task.metrics[name]
        level = metric.threshold
        calm = median_filter(arrays[name], NOISE, mode="nearest")
        find = for_good if lasting else first
        times[name] = find(steps, calm, level, metric.higher_is_better)
    return Trained(lane, steps, arrays, times["train"], times["test"])


def dataset(runs: Sequence[Trained], **columns: Sequence) -> xr.Dataset:
    """Everything recorded, of dimensions run and step, with NaN after the end of a run;
    further columns of the runs."""
    steps = max((r.steps for r in runs), key=len)
    table = lambda r, name: np.pad(
        r.arrays[name].astype(float), (0, len(steps) - len(r.steps)),
        constant_values=np.nan,
    )  # fmt: skip
    stack = {
        name: (("run", "step"), np.stack([table(r, name) for r in runs]))
        for name in runs[0].arrays
    }
    names = {
        "alpha": [r.lane.alpha for r in runs],
        "weight_decay": [r.lane.weight_decay for r in runs],
        "hold": [r.lane.hold for r in runs],
        **columns,
    }
    times = {
        name: ("run", [getattr(r, name) for r in runs])
        for name in ("memorised", "grokked")
    }
    coordinates = {name: ("run", list(values)) for name, values in names.items()}
    return xr.Dataset({**stack, **times}, {"step": steps, **coordinates})


def lines(runs: Sequence[Trained]) -> list[dict[str, Any]]:
    """A line of the summary for each run."""
    return [
        {
            **run.lane._asdict(),
            "memorised": run.memorised,
            "grokked": run.grokked,
            **{f"{name}_at_end": float(v[-1]) for name, v in run.arrays.items()},
        }
        for run in runs
    ]


def delay_rows(
    name: str, large: Trained, controls: Sequence[Trained], times: float = 10.0
) -> list[Row]:
    """Grokking from a large start, with weight decay: generalisation at least ten times
    later than memorisation. None in the controls: they generalise before that; or, at a
    norm that is held and larger than usual, never. A control tells nothing that does
    not memorise, or has not generalised when it ends before ten times that."""
    ok = bool(math.isfinite(large.ratio) and large.ratio >= times)
    words = (
        f"{large.lane}: t_test/t_train, of steps {large.grokked:.0f} and "
        f"{large.memorised:.0f}"
    )
    rows = [check(name, large.ratio, f"≥ {times:g}", ok, words)]
    for run in controls:
        words = (
            f"{run.lane}: t_test/t_train; test at the end {run.arrays['test'][-1]:.3g}"
        )
        never = run.lane.hold and run.lane.alpha > 1
        ok = None
        if not math.isfinite(run.memorised):
            words += ", not memorised"
        elif math.isfinite(run.grokked):
            ok = run.ratio < times
        elif run.steps[-1] < times * run.memorised:
            words += ", ended too early to tell"
        else:
            ok = never
        bound = f"< {times:g}" + ", or never" * never
        rows.append(check(name, run.ratio, bound, ok, words))
    return rows


def lu_rows(
    name: str,
    scales: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    *,
    level: float = 0.02,
    rise: float = 1.5,
) -> list[Row]:
    """The L and the U, of errors at norms that are held. U: the test error is least
    inside the range, and at both ends at least `rise` times as high. L: as the norm
    grows, the train error falls from at least five times `level` to at most `level`,
    and never rises by more than that."""
    best = int(np.nanargmin(test))
    ends = float(np.nanmin([test[0], test[-1]]) / max(test[best], 1e-12))
    inside = 0 < best < len(test) - 1
    back = float(np.max(train - np.minimum.accumulate(train)))
    falls = train[0] >= 5 * level and np.min(train) <= level
    words = f"U: test error {test[best]:.3g}, best at α = {scales[best]:.3g}"
    higher = "the lower end relative to it"
    fall = (
        f"train error, {train[0]:.3g} at the smallest and {np.min(train):.3g} at best"
    )
    return [
        check(
            name, ends, f"≥ {rise:g}, the best inside", inside and ends >= rise,
            f"{words}; {higher}",
        ),
        check(
            name, back, f"≤ {level:g}, from ≥ {5 * level:g} to ≤ {level:g}",
            falls and back <= level, f"L: largest rise of the {fall}",
        ),
    ]  # fmt: skip


def not_judged(name: str, bound: str, data: str, what: str) -> Row:
    """The paper's own numbers, where its data are not at hand."""
    words = f"{what}: not judged, the data are {data}"
    return check(name, math.nan, bound, None, words)


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
        ax.plot(x, norm, color=colour, lw=2, label=run.lane.title)
    finish(ax, "norm of the weights", y=r"$\|\theta\|$", log="x")


def draw_times(ax: Axes, run: Trained) -> None:
    marks(ax, {"memorised": run.memorised, "generalised": run.grokked})


def draw_landscape(
    ax: Axes, scales: np.ndarray, train: np.ndarray, test: np.ndarray, title: str,
    y: str = "error", log: str = "x",
) -> None:  # fmt: skip
    ax.plot(scales, train, "o--", color=COLOURS[0], ms=4, label="train")
    ax.plot(scales, test, "o-", color=COLOURS[1], ms=4, lw=2, label="test")
    finish(ax, title, x=r"norm, relative to the usual start, $\alpha$", y=y, log=log)
