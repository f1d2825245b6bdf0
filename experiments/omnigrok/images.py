"""P3-MN: handwritten digits by a ReLU network, in single precision, by AdamW.

MNIST where its files are at hand (--data, or the environment variable GRADFLOW_DATA),
else scikit-learn's 1797 digits of 8 × 8 pixels, as every title says: another data set,
and easier. On these no number of the paper is judged, but what it claims: the delay and
its absence, the L and the U. Defaults are the paper's settings, but for sizes that the
data do not have. Errors are at the end of a run (the authors take the best so far).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray as xr
from matplotlib.axes import Axes

import gradflow as gf

from ..shared.common import check, COLOURS, finish, law, Outcome, panels, Row
from .scans import (
    dataset,
    delay_rows,
    draw,
    draw_landscape,
    draw_norms,
    draw_times,
    held,
    Lane,
    lines,
    lu_rows,
    not_judged,
    scan,
    Scans,
    Trained,
    with_level,
)


@dataclasses.dataclass(frozen=True)
class Images(Scans):
    """Of every experiment on images."""

    width: int = 200

    def task(self, samples: int, *, loss: str = "squared") -> gf.tasks.Task:
        return gf.tasks.image_mlp(
            jr.key(self.seed),
            samples=samples,
            width=self.width,
            loss=loss,
            data=self.data,
            published=self.published,
        )


def of_mnist(task: gf.tasks.Task) -> bool:
    return task.truth.data == "MNIST"


@dataclasses.dataclass(frozen=True)
class MNG(Images):
    """Figure 3d: grokking induced by a large start, and removed by holding the norm.

    Quick: 200 samples at once, a test accuracy of 0.8 (from the usual start they come
    to 0.84), five times the weight decay, 30 % of the steps.
    """

    samples: int = 1000
    alpha: float = 8.0
    """Of the large start; the usual one is 1."""
    weight_decay: float = 0.01
    steps: int = 100_000
    batch_size: int | None = 200
    threshold: float | None = None
    """The test accuracy that counts; the task's unless given."""

    def quick_changes(self) -> dict[str, Any]:
        return dict(
            samples=200, threshold=0.8, batch_size=None, weight_decay=0.05, steps=30_000
        )

    def run(self) -> Outcome:
        name, mine = "P3-MN-G", self.effective()
        task = with_level(mine.task(mine.samples), mine.threshold)
        lanes = [
            Lane(mine.alpha, mine.weight_decay),
            Lane(mine.alpha, hold=True),
            Lane(1.0, mine.weight_decay, share=0.2),
            Lane(1.0, hold=True, share=0.2),
        ]
        rule = mine.rule(mine.steps, mine.batch_size)
        runs = scan(task, lanes, rule, self.folder("mn-g"))
        rows = [*delay_rows(name, runs[0], runs[1:]), *grok_rows(name, task, runs[0])]
        fig, axes = panels(2)
        draw(axes[0], runs, f"{name}: {task.truth.title}")
        draw_times(axes[0], runs[0])
        draw_norms(axes[1], runs)
        numbers = {"data": task.truth.data, "runs": lines(runs)}
        return Outcome(numbers, rows, dataset(runs), {"mn_g": fig})


def grok_rows(name: str, task: gf.tasks.Task, run: Trained) -> list[Row]:
    """The numbers of table D, on MNIST."""
    wanted = (
        ("≤ 3000", "first step with train accuracy ≥ 0.99"),
        ("≤ 0.3", "test accuracy at step 5000"),
        ("≥ 0.8", "test accuracy at step 60000"),
    )
    if not of_mnist(task):
        return [not_judged(name, bound, task.truth.data, w) for bound, w in wanted]
    values = (run.memorised, run.at("test", 5000), run.at("test", 60_000))
    goods = (values[0] <= 3000, values[1] <= 0.3, values[2] >= 0.8)
    return [
        check(name, value, bound, ok, words)
        for value, ok, (bound, words) in zip(values, goods, wanted, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class MNL(Images):
    """Figures 3a-c and 3e: errors at held norms, against α and the number of samples
    N; and how long a large start takes to generalise for good, against N.

    Sizes that the data do not have are left out. Quick: few of them, all samples at
    once, a test accuracy of 0.75 (at the best of the held norms 50 digits come to 0.82,
    200 to 0.85), and γ = 0.3. (There the norm comes to rest at twice the usual one.)
    """

    alphas: tuple[float, ...] = tuple(np.geomspace(0.1, 10, 21).round(4).tolist())
    samples: tuple[int, ...] = tuple(
        np.unique(
            [
                *np.geomspace(10, 1e4, 22).astype(int),
                *np.geomspace(1e4, 1e5, 8).astype(int)[1:6],
                60_000,
            ]
        ).tolist()
    )
    steps: int = 10_000
    batch_size: int | None = 100
    start: float = 9.0
    """α of the runs of figure 3e."""
    weight_decay: float = 0.03
    """γ of these; the authors draw it between 1e-4 and 0.3."""
    times: tuple[int, ...] = tuple(2**k for k in range(7, 16))
    """N of these."""
    time_steps: int = 100_000
    threshold: float | None = None
    """The test accuracy that counts in them; the task's unless given."""

    def quick_changes(self) -> dict[str, Any]:
        return dict(
            alphas=(0.1, 0.3, 0.6, 1.0, 2.0, 4.0, 8.0), samples=(50, 200), steps=2500,
            times=(10, 25, 50, 100, 200, 400), time_steps=9000, batch_size=None,
            weight_decay=0.3, threshold=0.75,
        )  # fmt: skip

    def run(self) -> Outcome:
        name, mine = "P3-MN-L", self.effective()
        most = available(mine)
        sizes = [n for n in mine.samples if n <= most]
        times = [n for n in mine.times if n <= most]
        rule = mine.rule(mine.steps, mine.batch_size)
        tasks = {n: mine.task(n) for n in {*sizes, *times}}
        ends = [
            held(tasks[n], mine.alphas, rule, self.folder("mn-l", f"N={n}"))
            for n in sizes
        ]
        error = lambda key: 1 - np.array([end[key] for end in ends])
        train, test = error("train"), error("test")
        rule = mine.rule(mine.time_steps, mine.batch_size)
        lane = [Lane(mine.start, mine.weight_decay)]
        grown = [
            scan(
                with_level(tasks[n], mine.threshold),
                lane, rule, self.folder("mn-l", f"times_N={n}"), lasting=True,
            )[0]
            for n in times
        ]  # fmt: skip
        first = tasks[sizes[0]]
        rows = landscape_rows(name, first, np.array(mine.alphas), sizes, train, test)
        rows += size_rows(name, times, grown)
        fig, axes = panels(4)
        title = f"{name}: {first.truth.data}"
        for ax, values, what in zip(
            axes, (train, test), ("train", "test"), strict=False
        ):
            sides = between(mine.alphas), between(sizes)
            mesh = ax.pcolormesh(*sides, values, cmap="viridis", vmin=0, vmax=1)
            ax.figure.colorbar(mesh, ax=ax)
            finish(ax, f"{title}, {what} error", r"$\alpha$", "$N$", legend=False)
        at = int(np.argmin(np.abs(np.log(np.array(sizes) / 200))))
        draw_landscape(axes[2], np.array(mine.alphas), train[at], test[at],
            f"{first.truth.data}, $N$ = {sizes[at]}")  # fmt: skip
        draw_when(axes[3], times, grown)
        finish(axes[3], f"step from which on learnt, {lane[0].title}", x="$N$")
        coordinates = {"samples": sizes, "alpha": list(mine.alphas), "times": times}
        arrays = xr.Dataset(
            {
                "train_error": (("samples", "alpha"), train),
                "test_error": (("samples", "alpha"), test),
                "grokked": ("times", [run.grokked for run in grown]),
                "memorised": ("times", [run.memorised for run in grown]),
            },
            coordinates,
        )
        numbers = {"data": first.truth.data, "times": lines(grown)}
        return Outcome(numbers, rows, arrays, {"mn_l": fig})


def available(config: Images) -> int:
    """How many samples there may be; of scikit-learn's digits three in four, so that
    the others tell an accuracy."""
    task = config.task(1)
    if task.truth.data == "scikit-learn digits":
        return 1347
    return 60_000


def between(x: Sequence[float]) -> np.ndarray:
    """The sides of cells around some numbers, half way between them in the logarithm.
    (Of one alone, a factor of two away.)"""
    logs = np.log(np.asarray(x, float))
    gaps = np.diff(logs) / 2 if len(logs) > 1 else np.array([np.log(2)])
    middle = logs[:-1] + gaps[: len(logs) - 1]
    return np.exp([logs[0] - gaps[0], *middle, logs[-1] + gaps[-1]])


def draw_when(ax: Axes, x: Sequence[float], runs: Sequence[Trained]) -> None:
    """When each run learnt, of those that did."""
    for name, label, colour in (
        ("memorised", "train", COLOURS[0]),
        ("grokked", "test", COLOURS[1]),
    ):
        points = [(a, getattr(run, name)) for a, run in zip(x, runs, strict=True)]
        points = np.array([p for p in points if math.isfinite(p[1])])
        if points.size:
            ax.plot(*points.T, "o-", color=colour, label=label)


def landscape_rows(
    name: str, task: gf.tasks.Task, alphas: np.ndarray, sizes: list[int],
    train: np.ndarray, test: np.ndarray,
) -> list[Row]:  # fmt: skip
    """The L and the U at about 200 samples, the gap between the two errors at 8000, or
    as many as there are."""
    small = int(np.argmin(np.abs(np.log(np.array(sizes) / 200))))
    rows = lu_rows(f"{name} N={sizes[small]}", alphas, train[small], test[small])
    large = int(np.argmin(np.abs(np.log(np.array(sizes) / 8000))))
    near = int(np.argmin(np.abs(np.log(alphas))))
    far = int(np.argmin(np.abs(np.log(alphas / 8))))
    wanted = (
        (".1 to .25", f"N = {sizes[small]}: least test error",
         test[small].min(), 0.1 <= test[small].min() <= 0.25),
        ("≥ .6", f"N = {sizes[small]}: test error at α = {alphas[far]:.3g}",
         test[small, far], test[small, far] >= 0.6),
        ("≤ .1", f"N = {sizes[large]}: test less train error at α = {alphas[near]:.3g}",
         test[large, near] - train[large, near],
         test[large, near] - train[large, near] <= 0.1),
    )  # fmt: skip
    if not of_mnist(task):
        data = task.truth.data
        return rows + [
            not_judged(name, bound, data, f"{words} (here {value:.3g})")
            for bound, words, value, _ in wanted
        ]
    return rows + [check(name, v, bound, ok, words) for bound, words, v, ok in wanted]


def size_rows(name: str, sizes: list[int], runs: list[Trained]) -> list[Row]:
    """There is a critical number of samples, below which a run never generalises; from
    there on it takes the less time the more there are. A run that ends at a norm above
    the usual one has not come to where it might, so that "never" is not judged."""
    done = np.array([math.isfinite(run.grokked) for run in runs])
    norms = [usual(run) for run in runs]
    some = [n for n, d in zip(sizes, done, strict=True) if not d]
    short = [n for n, d, a in zip(sizes, done, norms, strict=True) if not d and a > 1]
    critical = bool(
        done.any() and not done[0] and (np.diff(done.astype(int)) >= 0).all()
    )
    times = np.array([run.grokked for run in runs])[done]
    fall = float(times[-1] / times[0]) if times.size > 1 else math.nan
    words = f"not for N in {some}"
    if short:
        words += f", of which {short} ended above the usual norm"
    words += "; the last time relative to the first that is finite"
    ok = None if short else critical and fall < 1
    return [check(f"{name} t(N)", fall, "< 1, a critical N", ok, words)]


def usual(run: Trained) -> float:
    """The norm at the end, relative to that of the usual start."""
    norm = run.arrays["norm"]
    return float(run.lane.alpha * norm[-1] / norm[0])


@dataclasses.dataclass(frozen=True)
class MNW(Images):
    """Figure 10b: the time to generalise against the weight decay γ, from α = 9.

    The law is t ∝ 1/γ between 0.1 and 1, in the paper; a larger γ keeps the network
    from learning, a smaller one generalises earlier than by the law. Quick: 200
    samples at once, a test accuracy of 0.8.
    """

    samples: int = 1000
    alpha: float = 9.0
    decays: tuple[float, ...] = (0.01, 0.03, 0.1, 0.18, 0.32, 0.56, 1.0, 3.0, 10.0)
    inside: tuple[float, float] = (0.1, 1.0)
    steps: int = 100_000
    batch_size: int | None = 200
    threshold: float | None = None

    def quick_changes(self) -> dict[str, Any]:
        return dict(
            samples=200, threshold=0.8, batch_size=None, steps=15_000,
            decays=(0.1, 0.2, 0.45, 1.0, 10.0),
        )  # fmt: skip

    def run(self) -> Outcome:
        name, mine = "P3-MN-W", self.effective()
        task = with_level(mine.task(mine.samples), mine.threshold)
        lanes = [Lane(mine.alpha, decay) for decay in mine.decays]
        rule = mine.rule(mine.steps, mine.batch_size)
        runs = scan(task, lanes, rule, self.folder("mn-w"))
        gamma, times = np.array(mine.decays), np.array([run.grokked for run in runs])
        low, high = self.inside
        within = (gamma >= low) & (gamma <= high)
        rows = decay_rows(name, gamma, times, within)
        fig, axes = panels(3, columns=3)
        draw(axes[0], runs, f"{name}: {task.truth.title}")
        draw_norms(axes[2], runs)
        draw_when(axes[1], mine.decays, runs)
        if np.isfinite(times[within]).any():
            guide = np.nanmedian((times * gamma)[within & np.isfinite(times)]) / gamma
            axes[1].plot(gamma, guide, ":", color="black", label=r"$\propto 1/\gamma$")
        finish(axes[1], "first step at the threshold", x=r"weight decay $\gamma$")
        numbers = {"data": task.truth.data, "runs": lines(runs)}
        return Outcome(numbers, rows, dataset(runs), {"mn_w": fig})


def decay_rows(
    name: str, gamma: np.ndarray, times: np.ndarray, within: np.ndarray
) -> list[Row]:
    """Inside, t ∝ 1/γ, and all generalise; outside not. Not judged inside by fewer than
    three runs."""
    slope = law(gamma[within], times[within])
    done, count = int(np.isfinite(times[within]).sum()), int(within.sum())
    words = f"slope of log t against log γ inside, {done} of {count} runs generalise"
    ok = done == count and abs(slope + 1) <= 0.3 if count >= 3 else None
    rows = [check(name, slope, "-1 ± 0.3, all of them", ok, words)]
    if not np.isfinite(times[within]).any():
        return rows
    constant = np.exp(np.mean(np.log((gamma * times)[within & np.isfinite(times)])))
    for g, t in zip(gamma[~within], times[~within], strict=True):
        off = g * t / constant
        words = f"γ = {g:g}, outside: t relative to the law"
        ok = not 0.7 <= off <= 1.4
        rows.append(check(name, off, "off by > 30 %, or never", ok, words))
    return rows


@dataclasses.dataclass(frozen=True)
class MNCE(Images):
    """Figures 11 and 12: cross-entropy has a broader Goldilocks zone than the squared
    error, and groks from α = 100.

    The zone is where the test error at a held norm is at most 1.5 times its least. The
    paper does not tell the weight decay of figure 12.
    """

    samples: int = 200
    alphas: tuple[float, ...] = tuple(np.geomspace(0.1, 100, 25).round(4).tolist())
    steps: int = 10_000
    batch_size: int | None = None
    start: float = 100.0
    weight_decay: float = 0.1
    time_steps: int = 60_000
    threshold: float | None = 0.8

    def quick_changes(self) -> dict[str, Any]:
        alphas = tuple(np.geomspace(0.1, 31.6, 9).round(4).tolist())
        return dict(alphas=alphas, steps=2000, weight_decay=0.3, time_steps=15_000)

    def run(self) -> Outcome:
        name, mine = "P3-MN-CE", self.effective()
        alphas = np.array(mine.alphas)
        rule = mine.rule(mine.steps, mine.batch_size)
        errors, widths, tasks = {}, {}, {}
        for loss in ("cross_entropy", "squared"):
            tasks[loss] = with_level(mine.task(mine.samples, loss=loss), mine.threshold)
            end = held(tasks[loss], mine.alphas, rule, self.folder("mn-ce", loss))
            errors[loss] = {key: 1 - values for key, values in end.items()}
            widths[loss] = zone(alphas, errors[loss]["test"])
        task = tasks["cross_entropy"]
        lanes = [
            Lane(mine.start, mine.weight_decay),
            Lane(mine.start, hold=True),
            Lane(1.0, mine.weight_decay, share=0.2),
        ]
        rule = mine.rule(mine.time_steps, mine.batch_size)
        runs = scan(task, lanes, rule, self.folder("mn-ce", "time"))
        broader = widths["cross_entropy"] / widths["squared"]
        words = "width of the zone in log α, relative to that of the squared error"
        rows = [
            check(name, broader, "> 1", broader > 1, words),
            *delay_rows(name, runs[0], runs[1:]),
            *plateau_rows(name, task, runs[0]),
        ]
        fig, axes = panels(4)
        for ax, (loss, error) in zip(axes, errors.items(), strict=False):
            title = f"{loss.replace('_', ' ')}: {task.truth.title}"
            draw_landscape(ax, alphas, error["train"], error["test"], title)
        draw(axes[2], runs, f"{name}: {task.truth.title}")
        draw_norms(axes[3], runs)
        numbers = {"data": task.truth.data, "runs": lines(runs), "zones": widths}
        arrays = dataset(runs).assign(
            {
                f"{loss}_{key}_error": ("scale", values)
                for loss, error in errors.items()
                for key, values in error.items()
            }
        )
        arrays = arrays.assign_coords(scale=alphas)
        return Outcome(numbers, rows, arrays, {"mn_ce": fig})


def plateau_rows(name: str, task: gf.tasks.Task, run: Trained) -> list[Row]:
    early = (
        run.at("test", 2 * run.memorised) if math.isfinite(run.memorised) else math.nan
    )
    last = float(run.arrays["test"][-1])
    wanted = (
        (
            ".3 to .4",
            "test accuracy soon after memorisation",
            early,
            0.3 <= early <= 0.4,
        ),
        ("≥ .65", "test accuracy at the end", last, last >= 0.65),
    )
    if not of_mnist(task):
        data = task.truth.data
        return [
            not_judged(name, bound, data, f"{words} (here {value:.3g})")
            for bound, words, value, _ in wanted
        ]
    return [check(name, v, bound, ok, words) for bound, words, v, ok in wanted]


def zone(scales: np.ndarray, error: np.ndarray, times: float = 1.5) -> float:
    """How wide the range around the best scale is where the error is at most `times`
    its least, in log α; ends between scales by straight lines."""
    x, best = np.log(scales), int(np.nanargmin(error))
    level = times * error[best]
    ends = []
    for step in (-1, 1):
        i = best
        while 0 <= i + step < len(x) and error[i + step] <= level:
            i += step
        end = x[i]
        if 0 <= i + step < len(x):
            rise = error[i + step] - error[i]
            end += (level - error[i]) / rise * (x[i + step] - x[i])
        ends.append(end)
    return float(ends[1] - ends[0])


@dataclasses.dataclass(frozen=True)
class MNR(Images):
    """Figure 8: losses at held norms against α and the messiness m of the inputs.

    An input is m x + (1 − m) t, where every pixel of t tells the label: ten numbers
    evenly from −½ to ½. With all of MNIST losses depend little on m, so that there is
    no representation to be found late.
    """

    samples: int = 60_000
    alphas: tuple[float, ...] = tuple(np.linspace(0, 10, 21)[1:].tolist())
    messiness: tuple[float, ...] = tuple(np.linspace(0, 1, 21).round(3).tolist())
    steps: int = 10_000
    batch_size: int | None = 100

    def quick_changes(self) -> dict[str, Any]:
        messiness = (0.0, 0.25, 0.5, 0.75, 1.0)
        return dict(messiness=messiness, alphas=(0.5, 1.0, 2.0, 4.0), steps=1000)

    def run(self) -> Outcome:
        name, mine = "P3-MN-R", self.effective()
        task = mine.task(min(mine.samples, available(mine)))
        rule = mine.rule(mine.steps, mine.batch_size)
        ends = [
            held(messy(task, m), mine.alphas, rule, self.folder("mn-r", f"m={m:g}"))
            for m in mine.messiness
        ]
        losses = {
            key: np.array([end[key] for end in ends]) for key in ("train", "test")
        }
        alphas = np.array(mine.alphas)
        good = int(np.argmin(losses["test"][-1]))  # best on plain images
        column = losses["test"][:, good]
        ratio = float(column.max() / max(column.min(), 1e-12))
        spread = lambda key: float(np.ptp(losses[key][:, good]))
        both = spread("test") / max(spread("train"), 1e-12)
        words = f"α = {alphas[good]:.3g}: largest over least test loss, over m"
        row = check(name, ratio, "≤ 2", ratio <= 2, words)
        if not of_mnist(task):
            words += f" (here {ratio:.3g})"
            row = not_judged(name, "≤ 2", task.truth.data, words)
        words = "spread over m, test loss relative to train loss (for information)"
        rows = [row, check(name, both, "", None, words)]
        fig, axes = panels(2)
        for ax, (key, values) in zip(axes, losses.items(), strict=True):
            mesh = ax.pcolormesh(alphas, mine.messiness, np.log10(values + 1e-12))
            bar = ax.figure.colorbar(mesh, ax=ax)
            bar.set_label(r"$\log_{10}$ loss")
            title = f"{name}: {task.truth.title}, {key}"
            finish(ax, title, r"$\alpha$", "messiness $m$", log="", legend=False)
        coordinates = {"messiness": list(mine.messiness), "alpha": alphas}
        arrays = xr.Dataset(
            {f"{k}_loss": (("messiness", "alpha"), v) for k, v in losses.items()},
            coordinates,
        )
        return Outcome({"data": task.truth.data}, rows, arrays, {"mn_r": fig})


def messy(task: gf.tasks.Task, messiness: float) -> gf.tasks.Task:
    """The task with inputs m x + (1 − m) t(label), watched by its mean squared error,
    train and test."""
    tell = jnp.linspace(-0.5, 0.5, 10)

    def mixed(x, labels):
        return messiness * x + (1 - messiness) * tell[labels][:, None]

    seen = task.metrics["test"].fn
    one_hot = jnp.eye(10)[seen.labels]
    learnt = task.loss
    assert isinstance(learnt, gf.SquaredError)
    loss = gf.SquaredError(mixed(learnt.x, learnt.y.argmax(1)), learnt.y)
    test = gf.SquaredError(mixed(seen.x, seen.labels), one_hot)
    metrics = {
        "train": gf.Metric(loss, threshold=0.05),
        "test": gf.Metric(test, threshold=0.05),
    }
    title = f"{task.truth.title}, m = {messiness:g}"
    truth = dataclasses.replace(task.truth, title=title)
    return dataclasses.replace(task, loss=loss, metrics=metrics, truth=truth)


EXPERIMENTS = {"mn-g": MNG, "mn-l": MNL, "mn-w": MNW, "mn-ce": MNCE, "mn-r": MNR}
