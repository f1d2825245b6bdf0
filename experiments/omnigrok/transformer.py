"""Modular addition by a transformer, full batch, by AdamW.

In single precision but for the loss, where the authors have double. At the paper's
sizes a step takes 0.07 s on a free core, so that figure 7 is 17 minutes, and the scans
of figures 9 and 10 about two hours each (10: for each seed). Each is a sweep, whose
store has the runs that are done, so that an interrupted one goes on where it was.
`--quick` takes a smaller modulus and network and more of the pairs, which groks in
minutes; that is said in the titles. (There the test accuracy first rises to about the
part that is seen: the network has learnt that a + b is b + a, and nothing else.)
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import xarray as xr
from matplotlib.figure import Figure

import gradflow as gf

from ..shared.command import Settings
from ..shared.figures import COLOURS, finish, marks, panels
from ..shared.rows import check, Row
from ..shared.runs import AXIS_SYMBOLS, reached, save_steps, single, trained
from .teacher import draw, scan_rows

ADAM = functools.partial(optax.adam, b1=0.9, b2=0.98)


@dataclasses.dataclass(frozen=True)
class Addition(Settings):
    """Of all experiments on modular addition."""

    modulus: int = 113
    """p."""
    fraction: float = 0.3
    """Of all pairs, that are seen."""
    width: int = 128
    hidden: int = 512
    learning_rate: float = 1e-3
    precision: Literal["single", "double"] = "single"

    QUICK = dict(modulus=31, fraction=0.7, width=64, hidden=128)

    @property
    def title(self) -> str:
        name = f"a + b mod {self.modulus}, {100 * self.fraction:g} % seen"
        return name + ("" if self.modulus == 113 else " (small)")

    def train(self, *, hold_norm: bool = False, **options: Any) -> xr.Dataset:
        """Trains the transformer for all values of the axes, seed, fraction, alpha and
        weight_decay; see `trained`. With the steps of all, also those of earlier
        calls."""
        runs = trained(
            functools.partial(self.problem, hold_norm=hold_norm),
            self.store(),
            learning_rate=self.learning_rate,
            optimiser=ADAM,
            method="decoupled",
            progress=not self.quick and AXIS_SYMBOLS,
            **options,
        )
        return runs.assign(steps_in_all=runs.step.max("time").sum())

    def problem(
        self,
        *,
        hold_norm: bool,
        seed: int | None = None,
        fraction: float | None = None,
        alpha: float = 1.0,
    ) -> tuple[gf.GradientFlow, Any, dict[str, Any]]:
        """Flow, model and metrics, as `gf.sweep` takes them. (The weights are scaled
        here, by α, and not by it: in double precision, before they are rounded.)"""
        task = gf.tasks.modular_transformer(
            jr.key(self.seed if seed is None else seed),
            modulus=self.modulus,
            fraction=self.fraction if fraction is None else fraction,
            width=self.width,
            hidden=self.hidden,
            init_scale=alpha,
        )
        model = single(task.model) if self.precision == "single" else task.model
        flow = gf.GradientFlow(in_double(task.loss), hold_norm=hold_norm)
        test_loss = in_double(task.metrics["test"].fn)
        return flow, model, {**task.metrics, "test_loss": test_loss}


def in_double(data: Any) -> gf.CrossEntropy:
    """The cross-entropy with its logits in double precision. In single precision one
    minus the probability of the right symbol is rounding from 1e-7 on; Adam, which
    divides by the gradient's size, then jumps."""
    return gf.CrossEntropy(data.x, data.labels, predict=logits_in_double)


def logits_in_double(model: Any, x: jax.Array) -> jax.Array:
    return jax.vmap(model)(x).astype(jnp.float64)


def learnt(runs: xr.Dataset, level: float, name: str = "test") -> float:
    """When the one run has learnt."""
    return reached(runs, name, level).item()


@dataclasses.dataclass(frozen=True)
class MAN(Addition):
    """Figure 7a: grokking of modular addition, with a weight decay of 1.

    No files. Time: an hour of a core, and it goes on where it was interrupted; quick,
    for a + b mod 31, six minutes.
    """

    weight_decay: float = 1.0
    steps: int = 15_000

    QUICK = Addition.QUICK | dict(steps=3000)

    def compute(self) -> xr.Dataset:
        return self.train(
            at=save_steps(self.steps, max(1, self.steps // 150)),
            weight_decay=self.weight_decay,
            axes={"alpha": [1.0]},
        )

    def judge(self, data: xr.Dataset) -> list[Row]:
        norm = (data.norm / data.norm[:, 0]).values[0]
        return [
            check("train", learnt(data, 1.0, "train"), "≤ 300", "step of train 100 %"),
            check("norm", norm.max(), "≥ 1.3", "its peak, relative to the start"),
            check("norm", norm[-1], "< 1", "at the end"),
            check("test", learnt(data, 0.99), "≤ 1e4", "step of test 99 %"),
        ]

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        return {
            "curves": curves(data, rf"{self.title}, $\gamma$ = {self.weight_decay:g}")
        }


@dataclasses.dataclass(frozen=True)
class MAC(Addition):
    """Figure 7b: without decay, at a norm held at 0.8 of the usual one, there is no
    grokking: test samples are learnt with the others.

    No files. Time: four minutes of a core; quick, for a + b mod 31, one.
    """

    alpha: float = 0.8
    """The norm, relative to that of the usual start; 0.9 if quick."""
    steps: int = 1000

    QUICK = Addition.QUICK | dict(alpha=0.9)

    def compute(self) -> xr.Dataset:
        return self.train(
            at=save_steps(self.steps, 10),
            weight_decay=0.0,
            axes={"alpha": [self.alpha]},
            hold_norm=True,
        )

    def judge(self, data: xr.Dataset) -> list[Row]:
        train_at, test_at = learnt(data, 0.95, "train"), learnt(data, 0.95)
        late, change = test_at - train_at, np.ptp(data.norm.values)
        return [
            check("late", late, "≤ 200", "steps from train to test 95 %"),
            check("test", test_at, "≤ 1000", "step of test 95 %"),
            check("norm", change, "< 1e-3", "its change"),
        ]

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        title = rf"{self.title}, norm held at {self.alpha:g} $\|\theta_0\|$"
        return {"curves": curves(data, title)}


@dataclasses.dataclass(frozen=True)
class MAW(Addition):
    """Figure 10a: the time to generalise against the weight decay, for several seeds.

    No files. Time: 100 minutes of a core for each seed, and it goes on where it was
    interrupted; quick, for a + b mod 31, two minutes.
    """

    gammas: tuple[float, ...] = (0.3, 0.6, 1.0, 1.7, 3.0)
    seeds: int = 3
    slow_time: float = 12.0
    """How far each run goes: learning rate times γ times steps."""

    QUICK = Addition.QUICK | dict(gammas=(1.0, 2.0, 4.0), seeds=2, slow_time=4.0)

    def compute(self) -> xr.Dataset:
        return self.train(
            slow_time=self.slow_time,
            saves=200,
            weight_decay=np.array(self.gammas),
            axes={"seed": list(range(self.seed, self.seed + self.seeds))},
        )

    def judge(self, data: xr.Dataset) -> list[Row]:
        gammas = np.array(self.gammas)
        rows = [scan_rows(seed, gammas, each, "γ", within=0.2)
                for seed, each in times_of(data)]  # fmt: skip
        return [row for some in rows for row in some]

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        fig, (ax,) = panels(1, columns=1)
        for (seed, each), colour in zip(times_of(data), COLOURS, strict=False):
            draw(ax, np.array(self.gammas), each, colour, f"{seed}: ")
        finish(ax, self.title, x=r"weight decay $\gamma$", y="steps to 95 %")
        return {"scan": fig}


def times_of(data: xr.Dataset) -> list[tuple[str, np.ndarray]]:
    """Each seed with its steps to 95 %, for every γ, of train and test."""
    times = np.stack([reached(data, key) for key in ("train", "test")], axis=-1)
    return [(f"seed {s}", t) for s, t in zip(data.seed.values, times, strict=True)]


@dataclasses.dataclass(frozen=True)
class MAR(Addition):
    """Figure 9: test loss at held norms, α, from different parts of all pairs: below a
    critical part no norm generalises.

    No files. Time: two hours of a core, and it goes on where it was interrupted; quick,
    for a + b mod 31, one minute.
    """

    fractions: tuple[float, ...] = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6)
    alphas: tuple[float, ...] = (0.4, 0.8, 1.6, 3.2)
    steps: int = 3000

    QUICK = Addition.QUICK | dict(
        fractions=(0.2, 0.4, 0.6, 0.8), alphas=(0.5, 1.0, 2.0), steps=600
    )

    def compute(self) -> xr.Dataset:
        runs = self.train(
            steps=self.steps,
            saves=200,
            weight_decay=0.0,
            axes={"fraction": self.fractions, "alpha": self.alphas},
            hold_norm=True,
        )
        return (
            runs[["train", "test"]].max("time").assign(steps_in_all=runs.steps_in_all)
        )

    def judge(self, data: xr.Dataset) -> list[Row]:
        sentence = "part of all pairs from which on 90 % of the others are learnt"
        given = not self.quick
        return [check("critical", critical(data), "0.2 … 0.3", sentence, given=given)]

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        name = f"a + b mod {self.modulus}" + (" (small)" if self.quick else "")
        return {"accuracies": accuracies(name, data)}


def critical(data: xr.Dataset) -> float:
    """The critical part of all pairs, at the norm that is best for it. (A network that
    only learns that a + b is b + a knows as many of the others as are seen, so the
    level is high.)"""
    known = data.test.max("alpha").values
    return float(crossing(data.fraction.values, known))


def accuracies(name: str, data: xr.Dataset) -> Figure:
    """The best accuracy against the part that is seen, at each held norm."""
    fig, axes = panels(2)
    for ax, key in zip(axes, ("train", "test"), strict=True):
        for alpha, colour in zip(data.alpha.values, COLOURS, strict=False):
            values = data[key].sel(alpha=alpha)
            label = rf"norm held at {alpha:g} $\|\theta_0\|$"
            ax.plot(data.fraction, values, "o-", color=colour, label=label)
        ax.set_ylim(-0.05, 1.05)
        finish(ax, f"{name}: best {key} accuracy", x="part of all pairs seen", log="")
    axes[1].axhline(0.9, color="grey", lw=0.7)
    marks(axes[1], {"critical": critical(data)})
    return fig


def crossing(x: np.ndarray, values: np.ndarray, level: float = 0.9) -> float:
    """Where increasing values first reach a level, by interpolation; NaN if nowhere."""
    good = np.flatnonzero(values >= level)
    if not good.size or good[0] == 0:
        return np.nan
    i = slice(good[0] - 1, good[0] + 1)
    return np.interp(level, values[i], x[i])


def curves(runs: xr.Dataset, title: str) -> Figure:
    """Accuracies and the norm of the first run against steps."""
    fig, axes = panels(2)
    run = runs.isel(alpha=0, time=slice(1, None))
    for name, colour in (("train", COLOURS[0]), ("test", COLOURS[1])):
        axes[0].plot(run.step, run[name], color=colour, label=name)
    axes[1].plot(run.step, run.norm, color=COLOURS[2])
    axes[1].axhline(runs.norm[0, 0], color="grey", lw=0.7)
    finish(axes[0], title, y="accuracy", log="x")
    marks(axes[0], {f"{k} 95 %": reached(runs, k).item() for k in ("train", "test")})
    axes[1].set_ylim(0, 1.1 * float(runs.norm.max()))
    finish(axes[1], "norm of all weights", y=r"$\|\theta\|$", log="x")
    return fig


EXPERIMENTS = {"ma-n": MAN, "ma-c": MAC, "ma-w": MAW, "ma-r": MAR}
