"""Toy addition, in the plane of norm w and messiness m.

Of the three trainings in the paper's table 1 these are the first, the landscape, where
the decoder alone is trained, at a norm and a messiness that are held; and the second,
the reduced trajectory of (w, m), on a cliff whose law is known.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import xarray as xr
from matplotlib.figure import Figure

import gradflow as gf

from ..shared.command import Settings
from ..shared.figures import cells, COLOURS, finish, panels
from ..shared.record import table
from ..shared.rows import check, Row
from ..shared.runs import AXIS_SYMBOLS, single


@functools.cache
def falling_adam(rate: float, every: int) -> optax.GradientTransformation:
    """Adam whose learning rate falls to a fifth every so many steps."""
    schedule = optax.exponential_decay(rate, every, 0.2, staircase=True)
    return optax.adam(schedule, b1=0.9, b2=0.99)


@dataclasses.dataclass(frozen=True)
class AD(Settings):
    """Figures 1 and 6: train and test loss of a decoder at held norm w and messiness m,
    for several numbers of the 55 pairs to learn from.

    Each point of the maps is a run of its own, and all are one sweep with a store, so
    that interrupted maps go on where they were. The paper has 1680 runs of 15 000
    steps. Norms are relative to that of the usual start, biases counted once (the
    authors' code counts the first layer twice); single precision.

    No files. Time: two hours of a core; quick, a few minutes.
    """

    seed: int = 58
    sizes: tuple[int, ...] = (25, 35, 45, 54)
    alphas: tuple[float, ...] = tuple(np.linspace(0, 9, 21)[1:].round(4).tolist())
    messiness: tuple[float, ...] = tuple(np.linspace(0, 0.2, 21).round(4).tolist())
    steps: int = 15_000
    learning_rate: float = 1e-2
    width: int = 200
    level: float = 0.05
    """The train loss at the edge of the plain: region II is below."""

    QUICK = dict(
        sizes=(25, 45), alphas=(1.35, 1.8, 2.25, 2.7, 3.6),
        messiness=(0.0, 0.1, 0.2), steps=3000,
    )  # fmt: skip

    def compute(self) -> xr.Dataset:
        descent = gf.Descent(
            self.learning_rate,
            optimiser=falling_adam(self.learning_rate, max(self.steps // 3, 1)),
            at=[0, self.steps],
        )
        runs = gf.sweep(
            self.problem,
            axes={"size": self.sizes, "messiness": self.messiness},
            init_scale=self.alphas,
            weight_decay=0.0,
            run=descent,
            store=self.store(),
            progress=AXIS_SYMBOLS | {"messiness": "m"},
        )
        ends = runs.to_xarray().isel(time=-1).astype(float)
        dims = ("size", "messiness", "alpha")
        axes = dict(zip(dims, (self.sizes, self.messiness, self.alphas), strict=True))
        maps = {k: (dims, ends[f"metric_{k}"].values) for k in ("train", "test")}
        return xr.Dataset(maps, {k: list(v) for k, v in axes.items()})

    def edges(self, data: xr.Dataset) -> np.ndarray:
        alphas = data.alpha.values
        return np.array([edge(alphas, row, self.level) for row in data.train.values])

    def judge(self, data: xr.Dataset) -> list[Row]:
        sizes, m, edges = data["size"].values, data.messiness.values, self.edges(data)
        rows, tests = [], []
        maps = zip(sizes, data.train.values, data.test.values, strict=True)
        for size, train, test in maps:
            rows += spread_rows(size, train, test, self.level)
            tests.append(inside(train, test, self.level))
        rows += tip_rows(sizes, m, edges, np.array(tests))
        return rows + angle_rows(sizes, m, edges)[0]

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        sizes, m, edges = data["size"].values, data.messiness.values, self.edges(data)
        fig, axes = panels(2 * len(sizes), columns=len(sizes), size=(4.2, 3.6))
        for i, size in enumerate(sizes):
            for ax, key in zip(axes[i :: len(sizes)], ("train", "test"), strict=True):
                values = np.log10(np.maximum(data[key].values[i], 1e-6))
                style = dict(vmin=-6, vmax=0.5, shading="nearest")
                label = rf"$\log_{{10}}$ {key} loss"
                cells(ax, data.alpha.values, m, values, label, **style)
                ax.plot(edges[i], m, "o-", color=COLOURS[1], ms=3)
                title = f"{size} of 55 pairs, {key}"
                finish(ax, title, r"norm $\alpha$", "messiness $m$", log="x")
        return {"ad": fig}

    def problem(self, size: int, messiness: float) -> tuple:
        """Flow, model and metrics, as `gf.sweep` takes them."""
        task = single(
            gf.tasks.symbol_addition(
                jr.key(self.seed), train=size, messiness=messiness, width=self.width
            )
        )
        decoder = task.model.only_decoder()
        flow = gf.GradientFlow(task.loss, trainable=decoder, hold_norm=True)
        return flow, task.model, task.metrics


def edge(alphas: np.ndarray, losses: np.ndarray, level: float) -> np.ndarray:
    """The least norm at which the train loss is at a level, for each m: between two
    norms by a straight line in the logarithms, NaN where it is at none. (At norms much
    larger the optimiser may not get there in time.)"""
    out = []
    for row in losses:
        below = np.flatnonzero(row <= level)
        if below.size == 0:
            out.append(np.nan)
        elif below[0] == 0:
            out.append(alphas[0])
        else:
            i = below[0] - 1
            x, y = np.log(alphas[i : i + 2]), np.log(np.maximum(row[i : i + 2], 1e-12))
            share = (np.log(level) - y[0]) / (y[1] - y[0])
            out.append(np.exp(x[0] + share * (x[1] - x[0])))
    return np.array(out)


def inside(train: np.ndarray, test: np.ndarray, level: float) -> np.ndarray:
    """The test loss at the least norm at which the train loss is below a level, for
    each m; NaN where there is none."""
    below = train <= level
    first = np.argmax(below, axis=1)
    return np.where(below.any(axis=1), test[np.arange(len(test)), first], np.nan)


def spread_rows(
    size: int, train: np.ndarray, test: np.ndarray, level: float
) -> list[Row]:
    """In region II, at norms where the train loss is below the level for every m, the
    test loss varies with m five times as much as the train loss; for the paper's 45."""
    plain = (train < level).all(axis=0)
    sentence = f"{size} pairs: over m, of the test loss in region II, over train's"
    if not plain.any():
        sentence += ": no norm is in it"
        return [check("spread", math.nan, "≥ 5", sentence, given=False)]
    least = np.maximum(np.ptp(train[:, plain], axis=0), 1e-12)
    ratio = np.min(np.ptp(test[:, plain], axis=0) / least)
    return [check("spread", ratio, "≥ 5", f"{sentence} (least over w)")]


def tip_rows(
    sizes: Sequence[int], messiness: np.ndarray, edges: np.ndarray, tests: np.ndarray
) -> list[Row]:
    """Weight decay takes w along the edge to its tip, where the least norm fits the
    data. With 45 pairs or more that is to be a point that generalises, with 35 or fewer
    it is not: judged by the messiness there, which is to be 0 or not, and by the test
    loss `tests` there, which is to be less than 1 or not (that of telling the mean)."""
    rows = []
    near = 0.125 * messiness[-1]
    for size, row, test in zip(sizes, edges, tests, strict=True):
        if np.isnan(row).all():
            sentence = f"{size} pairs: the train loss is nowhere below the level"
            rows.append(check("tip", math.nan, "", sentence))
            continue
        i, many = int(np.nanargmin(row)), size >= 45
        sentence = f"{size} pairs: messiness where the edge has its least norm"
        bound = f"≤ {near:.3g}" if many else f"> {near:.3g}"
        ok = bool((messiness[i] <= near) == many)
        rows.append(Row("tip", float(messiness[i]), bound, ok, sentence))
        bound = "< 1" if many else "≥ 1"
        sentence = f"{size} pairs: test loss at the tip, just inside"
        rows.append(check("tip", test[i], bound, sentence))
    return rows


def angle_rows(
    sizes: Sequence[int], messiness: np.ndarray, edges: np.ndarray
) -> tuple[list[Row], np.ndarray]:
    """The edge turns with the number of pairs: tan θ = dm/d log w, by least squares,
    falls from each to the next. And the angles."""
    slopes = []
    for row in edges:
        good = np.isfinite(row)
        if good.sum() < 2:
            slopes.append(np.nan)
            continue
        slopes.append(np.polyfit(messiness[good], np.log(row[good]), 1)[0])
    angles = np.arctan2(1.0, np.array(slopes))
    told = ", ".join(f"{a:.3g}" for a in angles)
    fall = float(np.max(np.diff(angles), initial=-np.inf))
    given = len(angles) > 1 and np.isfinite(angles).all()
    sentence = f"largest change of the edge's angle θ from {list(sizes)} pairs on: "
    return [check("angle", fall, "< 0", sentence + told, given=given)], angles


@dataclasses.dataclass(frozen=True)
class ADT(Settings):
    """Equation 6: the time to generalise against t η_Dγ = L + h tan θ, on cliffs.

    The paper's law holds where the loss pushes back at right angles to the edge: where
    the ratio w²η_R/η_D is about one on it. The general one, t η_Dγ = L + tan²θ
    ∫ η_D/(η_R w²) d log w, holds for every ratio as γ → 0 and the edge becomes sharp.

    No files. Time: a quarter of a minute.
    """

    angles: tuple[float, ...] = (0.7, 0.9, 1.1, 1.3)
    """θ, between the edge and the axis of log w."""
    ratios: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    """w²η_R/η_D, half way along the edge."""
    weight_decays: tuple[float, ...] = (0.01, 0.003)
    messiness: tuple[float, float] = (0.5, 0.05)
    """At the start, and where it counts as generalised."""
    above: float = 2.0
    """The norm at the start, relative to the critical one."""
    softness: float = 0.003

    QUICK = dict(angles=(0.9, 1.2), ratios=(0.1, 1.0, 10.0), weight_decays=(0.01,))

    def compute(self) -> xr.Dataset:
        axes = {
            "weight_decay": self.weight_decays,
            "angle": self.angles,
            "ratio": self.ratios,
        }
        return table(axes, self.times, "cliffs")

    def judge(self, data: xr.Dataset) -> list[Row]:
        paper, general = (
            np.abs(data.measured / data[key] - 1).values for key in ("paper", "general")
        )
        matched = np.abs(np.log(data.ratio.values)) < math.log(1.2)
        near = paper[..., matched].max() if matched.any() else math.nan
        sentence = "off by, where w²η_R = η_D half way along the edge"
        far = "off by, at all ratios, as it leaves the ratio out"
        return [
            check("paper's law", near, "≤ 0.2", sentence),
            check("general law", general.max(), "≤ 0.05", "off by"),
            check("paper's law", paper.max(), "", far),
        ]

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        fig, axes = panels(2)
        ideal = [data.paper.min() / 2, data.measured.max() * 2]
        law = r"$(L + h\,\tan\theta)/\eta_D\gamma$"
        for ax, key, title in zip(
            axes, ("paper", "general"), (law, "the general law"), strict=True
        ):
            for i, ratio in enumerate(data.ratio.values):
                label = rf"$w^2\eta_R/\eta_D$ = {ratio:g}"
                times = [data[k].values[..., i].ravel() for k in (key, "measured")]
                ax.plot(*times, "o", color=COLOURS[i % len(COLOURS)], label=label)
            ax.plot(ideal, ideal, "--", color="black", lw=1)
            finish(ax, title, "time by the law", "time measured")
        return {"ad_t": fig}

    def times(
        self, weight_decay: float, angle: float, ratio: float
    ) -> dict[str, float]:
        """How long it takes, by the dynamics and by both laws."""
        start, end = self.messiness
        cliff = gf.Cliff(1.0, angle, softness=self.softness)
        middle = float(cliff.critical_norm((start + end) / 2))
        dynamics = gf.ReducedDynamics(cliff, representation_rate=ratio / middle**2)
        norm = self.above * float(cliff.critical_norm(start))
        law = functools.partial(
            dynamics.time_law, norm, start, end, weight_decay=weight_decay
        )
        general = law(exact=True)
        # With numbers as arrays, so that all runs share one compilation.
        numbers = jax.tree.map(
            lambda x: jnp.asarray(x, float),
            (dynamics, norm, start, weight_decay, 1.5 * general),
        )
        path = simulated(*numbers)
        return {
            "measured": float(path.time_until(end)),
            "paper": law(exact=False),
            "general": general,
        }


@jax.jit
def simulated(dynamics, norm, messiness, weight_decay, t1):
    return dynamics.simulate(norm, messiness, weight_decay=weight_decay, t1=t1)


EXPERIMENTS = {"ad": AD, "ad-t": ADT}
