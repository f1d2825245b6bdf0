"""Matrices of low rank under the nuclear norm.

With the entries observed, 𝒳𝒳ᵀ = I, so that steps up to α < 2 are stable, and t₂αβ being
a constant (checked), large steps stand for the many small ones of the paper.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray as xr
from matplotlib.figure import Figure

import gradflow as gf

from ..shared.command import Settings
from ..shared.figures import COLOURS, finish, marks, panels
from ..shared.record import table, variables
from ..shared.rows import (
    check,
    decades,
    law_check,
    rank_correlation,
    relative,
    Row,
    spread,
)
from ..shared.runs import steps_until
from .common import descend, of_pairs


@dataclasses.dataclass(frozen=True)
class Matrices(Settings):
    """What the experiments on matrices share."""

    shape: tuple[int, int] = (10, 10)
    rank: int = 2
    zeta: float = 1e-6
    samples: int = 80
    """The notebook's; with the paper's 70 the least nuclear norm is often not at A*."""

    def task(self, seed: int | None = None, **options: Any) -> gf.tasks.Task:
        return gf.tasks.matrix_recovery(
            jr.key(self.seed if seed is None else seed), shape=self.shape,
            rank=self.rank, samples=self.samples, scale=self.zeta,
            penalty=gf.Nuclear(), **options,
        )  # fmt: skip


def known(truth: Any) -> xr.Dataset:
    """What is known of a task, and what the paper expects of (t₂ − t₁)αβ: ‖Â − A*‖₂."""
    operator = truth.operator()
    dense = operator if isinstance(operator, np.ndarray) else operator.toarray()
    return variables(
        target=truth.target,
        least=truth.end_point(),
        recovers=truth.recovers_target(),
        operator=dense,
        values=truth.values,
        heuristic=jnp.linalg.norm(truth.least_squares() - truth.target, 2),
    )


def oracle_row(data: xr.Dataset) -> Row:
    sentence = "the least nuclear norm (CVXPY, certified) is at A*"
    off = relative(data.least, data.target)
    return check("oracle", off, "≤ 1e-4", sentence, also=data.recovers)


def arrays(paths: dict[str, gf.Path]) -> xr.Dataset:
    """Paths, each under its name."""
    data: dict[str, Any] = {}
    for name, path in paths.items():
        print(f"{name}: {path}")
        alpha = float(path.stats.learning_rate)
        found = {key: path.crossing_time(key) for key in ("train", "test")}
        along = {"t": path.t, **path.metrics}
        data |= {
            f"{name}_{k}": (f"{name}_time", np.asarray(v)) for k, v in along.items()
        }
        matrices = np.asarray(path.models.matrix)
        data |= {
            f"{name}_matrix": ((f"{name}_time", "row", "column"), matrices),
            f"{name}_alpha": alpha,
            f"{name}_beta": float(path.weight_decay),
            f"{name}_speed": float(path.slow_speed),
            f"{name}_t1": found["train"],
            f"{name}_t2": found["test"],
        }
    return xr.Dataset(data)


def paths_of(data: xr.Dataset) -> dict[str, SimpleNamespace]:
    """What `arrays` was given."""
    names = [str(k).removesuffix("_speed") for k in data if str(k).endswith("_speed")]
    fields = "t train test matrix alpha beta speed t1 t2".split()
    one = lambda name: {f: data[f"{name}_{f}"].values[()] for f in fields}
    return {name: SimpleNamespace(**one(name)) for name in names}


def picture(data: xr.Dataset, title: str) -> dict[str, Figure]:
    """Errors, the ratio of forces, the nuclear norm, and singular values."""
    paths, target = paths_of(data), data.target.values
    fig, axes = panels(2 + 2 * len(paths), 2)
    operator, values = data.operator.values, data["values"].values
    for i, ((name, path), colour) in enumerate(
        zip(paths.items(), COLOURS, strict=False)
    ):
        steps, a = path.t / path.alpha, path.matrix
        axes[0].plot(steps[1:], path.test[1:], color=colour, label=name)
        axes[0].plot(steps[1:], np.maximum(path.train, 1e-17)[1:], "--", color=colour)
        pull = (a.reshape(len(a), -1) @ operator.T - values) @ operator
        pull = np.linalg.norm(pull, axis=1)
        size = np.linalg.svd(a, compute_uv=False)
        push = path.beta * (size > 1e-12).sum(axis=1) ** 0.5
        if pull[-1] > 1e-10:
            axes[1].plot(steps[1:], (push / pull)[1:], color=colour, label=name)
        away = np.linalg.svd(a - target, compute_uv=False)
        left, right = axes[2 + 2 * i : 4 + 2 * i]
        left.plot(steps[1:], np.maximum(size[1:], 1e-12), color=colour, lw=1)
        left.plot(steps[1:], size[1:].sum(axis=1), "k-", lw=1.5, label="$\\|A\\|_*$")
        norm = np.linalg.norm(target, "nuc")
        left.axhline(norm, color="black", ls=":", label="$\\|A^*\\|_*$")
        right.plot(steps[1:], np.maximum(away[1:], 1e-12), color=colour, lw=1)
        finish(left, f"singular values of A, {name}")
        finish(right, f"singular values of A − A*, {name}")
        for ax in (left, right):
            ax.set_ylim(1e-6)
            marks(ax, {"$t_1$": path.t1 / path.alpha, "$t_2$": path.t2 / path.alpha})
    finish(axes[0], f"{title}: recovery (dashed: train)", y="relative error")
    axes[1].axhline(1, color="black", lw=0.6)
    finish(axes[1], "ratio of forces $\\beta\\|H\\|/\\|G\\|$")
    return {"singular_values": fig}


@dataclasses.dataclass(frozen=True)
class MF1(Matrices):
    """Figure 5: completion; singular values die one after the other, then A = A*.

    No files. Time: a minute and a half of a core; quick, ten seconds.
    """

    alpha: float = 0.1
    beta: float = 1e-4
    steps: int = 10**6
    """Of subgradient descent (the paper: 1e7, an hour's worth of singular value
    decompositions here)."""
    slow_time: float = 100.0
    """Of the proximal run, of steps `large`: αβ · 1e7 of the paper."""
    large: float = 1.0

    QUICK = dict(beta=1e-3, steps=10**5)

    def compute(self) -> xr.Dataset:
        task = self.task()
        count = round(self.slow_time / (self.large * self.beta))
        at = steps_until(count, 193, dense=20)
        # The same times for both, as far as the smaller steps go.
        fine = at * round(self.large / self.alpha)
        fine = fine[fine <= self.steps]
        paths = {
            "subgradient": descend(task, self.alpha, self.beta, fine, "subgradient"),
            "proximal": descend(task, self.large, self.beta, at, "proximal"),
        }
        return known(task.truth).merge(arrays(paths))

    def judge(self, data: xr.Dataset) -> list[Row]:
        one, far = paths_of(data).values()
        end = "proximal descent ends at the least nuclear norm; of its last value "
        end += f"{relative(far.matrix[-1], data.target):.1e} from A*"
        end += "" if far.speed < 1e-6 else " (still moving)"
        expected = far.t1 + float(data.heuristic) / self.beta
        told = f"delay: t₁ = {far.t1:.3g}, t₂ = {far.t2:.3g}, heuristic {expected:.3g}"
        # Steps that large are not the flow while the data are being fitted.
        at = np.flatnonzero(one.t >= 100)
        apart = max(relative(one.matrix[i], far.matrix[i]) for i in at)
        agree = f"subgradient at α = {self.alpha} against proximal at {self.large}, "
        agree += f"t ≥ 100, to {one.t[-1]:g}"
        return [
            oracle_row(data),
            check("end", relative(far.matrix[-1], data.least), "≤ 1e-3", end),
            check("delay", far.t2 / far.t1, "≥ 100", told, given=data.recovers),
            *self.deaths(far),
            check("agree", apart, "≤ 0.02", agree),
        ]

    def deaths(self, path: Any) -> list[Row]:
        """When the singular values beyond the rank fall to zero, for good."""
        size = np.linalg.svd(path.matrix, compute_uv=False)[:, self.rank :]
        t, count = path.t, len(path.t)
        start = size[np.searchsorted(t, 3 * path.t1)]
        alive = size > 1e-3 * size.max()
        last = np.array([np.flatnonzero(a).max(initial=0) for a in alive.T])
        died = np.where(last < count - 1, t[np.minimum(last + 1, count - 1)], np.inf)
        fell = np.isfinite(died)
        order = bool((died[:-1] >= died[1:]).all())
        widest = died[fell].max() / died[fell].min() if fell.any() else np.nan
        # Were each to fall at the rate β, it would last its size over β.
        share = died[fell] / (start[fell] / path.beta)
        told = f"of {fell.sum()} of {died.size}: t = "
        told += ", ".join(f"{x:.2g}" for x in died[::-1])
        sentence = f"the smallest dies first; latest over earliest {told}"
        middle = np.median(share) if share.size else np.nan
        return [
            check("deaths", widest, "≥ 3", sentence, also=order),
            check("rate", middle, "", "median time of death over σ(t₁)/β"),
        ]

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        return picture(data, "completion")


@dataclasses.dataclass(frozen=True)
class MF2(Matrices):
    """Figures 6 and 29: t₂ ∝ 1/(αβ) for matrices too; the floor is ∝ β.

    No files. Time: five minutes of a core; quick, half a minute.
    """

    alphas: tuple[float, ...] = (0.0825, 0.1, 0.75, 0.825, 1.0, 1.5)
    betas: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    """The paper's, but for 1e-6."""
    max_steps: int = 1_500_000
    """Pairs (α, β) that would take longer are left out, and named."""
    method: str = "proximal"

    QUICK = dict(max_steps=300_000)

    def descend(self, task: gf.tasks.Task, alpha: float, beta: float, count: int):
        at = steps_until(count, 193, dense=20)
        return descend(task, alpha, beta, at, self.method)

    def compute(self) -> xr.Dataset:
        task = self.task()
        probe = self.descend(task, 1.5, 1e-3, round(100 / 1.5e-3))
        s2 = probe.crossing_time("test") * 1e-3
        length = lambda a, b: round(1.3 * s2 / (a * b)) + 100
        at = lambda count: steps_until(count, 193, dense=20)
        pairs = (task, self.alphas, self.betas, length, self.max_steps, at)
        data = known(task.truth).merge(of_pairs(*pairs, self.method))
        # The recovery error at s = 100, for some β.
        betas = np.geomspace(1e-4, 1e-1, 7)[1 if self.quick else 0 :]
        ends = [self.descend(task, 1.5, b, round(100 / (1.5 * b))) for b in betas]
        floors = [float(path.metrics["test"][-1]) for path in ends]
        return data.assign(floor=("floor_beta", floors)).assign_coords(floor_beta=betas)

    def judge(self, data: xr.Dataset) -> list[Row]:
        alpha, beta, t2 = data.alpha.values, data.beta.values, data.t2.values
        sizes, betas = data.floor.values, data.floor_beta.values
        # The threshold of t₂ is 1e-2: judged where the floor is far below. Below the
        # largest β that was seen to be fine it only gets smaller.
        most_fine = betas[sizes < 3e-3].max(initial=0.0)
        good = np.isfinite(t2) & (beta <= most_fine)
        product, constant = (alpha * beta)[good], (t2 * alpha * beta)[good]
        # Proportional to β as β → 0; the slopes between neighbours tell how far off.
        small = sizes < 1e-3
        local = np.diff(np.log(sizes)) / np.diff(np.log(betas))
        told = ", ".join(f"{slope:.2f}" for slope in local)
        middle = np.exp(np.log(constant).mean())
        return [
            oracle_row(data),
            check("t₂αβ", spread(constant), "≤ 0.1", f"it is constant, {middle:.4g} "
                  f"(heuristic {data.heuristic:.4g}), {good.sum()} descents"),
            law_check("law", product, t2[good], "-1 ± 0.05",
                  f"log t₂ on log αβ, {decades(product):.1f} decades"),
            law_check("floor", betas[small], sizes[small], "1 ± 0.05",
                  f"final recovery error for β ≤ {betas[small].max(initial=0):.0e}; "
                  f"slopes from one β to the next: {told}"),
        ]  # fmt: skip

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        fig, axes = panels(2)
        for a, colour in zip(self.alphas, COLOURS, strict=False):
            on = data.alpha == a
            product = (data.alpha * data.beta)[on]
            axes[0].plot(product, data.t2[on], "o", color=colour, label=f"α = {a}")
        axes[1].plot(data.floor_beta, data.floor, "ko-")
        finish(axes[0], "steps to recovery", "$\\alpha\\beta$", "$t_2$")
        finish(axes[1], "recovery error at the end", "$\\beta$")
        return {"law": fig}


@dataclasses.dataclass(frozen=True)
class MF3(Matrices):
    """Figures 14 and 15: sensing, by projected and by proximal descent.

    No files. Time: three minutes of a core; quick, a quarter of one.
    """

    samples: int = 70
    alpha: float = 0.1
    beta: float = 1e-4
    steps: int = 2 * 10**6

    QUICK = dict(beta=1e-3, steps=2 * 10**5)

    def compute(self) -> xr.Dataset:
        task = self.task(measurements="gaussian")
        at = steps_until(self.steps, 193, dense=20)
        paths = {m: descend(task, self.alpha, self.beta, at, m)
                 for m in ("projected", "proximal")}  # fmt: skip
        return known(task.truth).merge(arrays(paths))

    def judge(self, data: xr.Dataset) -> list[Row]:
        paths, gate = paths_of(data), data.recovers
        t2 = {name: path.t2 / self.alpha for name, path in paths.items()}
        share = t2["proximal"] / (data.heuristic / (self.alpha * self.beta))
        t1, fit = paths["proximal"].t1 / self.alpha, paths["projected"].train[1:].max()
        return [
            oracle_row(data),
            check("fit", fit, "≤ 1e-10", "projected: train from step 1"),
            check("t₁", t1, "≤ 1e3 steps", "proximal: train error ≤ 1e-3"),
            check("t₂", share, "1/3 … 3",
                  f"t₂ = {t2['proximal']:.3g} steps, over ‖Â − A*‖₂/(αβ)", given=gate),
            check("agree", spread(list(t2.values())), "≤ 0.02",
                  "the two methods in t₂", given=gate),
            *(check("end", relative(path.matrix[-1], data.least), "≤ 1e-3",
                    f"{name}: distance of the end from the least nuclear norm")
              for name, path in paths.items()),
        ]  # fmt: skip

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        return picture(data, "sensing")


@dataclasses.dataclass(frozen=True)
class MF4(Matrices):
    """Figures 8 and 23: entries of large leverage score make completion faster.

    No files. Time: five minutes of a core; quick, a quarter of one.
    """

    samples: int = 70
    taus: tuple[float, ...] = tuple(np.linspace(0, 1, 11).round(1).tolist())
    alpha: float = 1.5
    beta: float = 1e-4
    """The paper: α = 0.1 (1 in its notebook), β = 1e-5, 1e7 steps; as t₂αβ is constant
    (MF2), s = αβ · steps is what counts."""
    slow_time: float = 50.0
    seeds: int = 3

    QUICK = dict(taus=(0.0, 0.5, 1.0), seeds=2, slow_time=25.0)

    def compute(self) -> xr.Dataset:
        count = round(self.slow_time / (self.alpha * self.beta))
        at = steps_until(count, 193, dense=20)

        def cell(seed: int, tau: float) -> dict[str, Any]:
            task = self.task(self.seed + seed, leverage=tau)
            path = descend(task, self.alpha, self.beta, at, "proximal")
            return {
                "t2": path.crossing_time("test") * self.beta,
                "error": path.metrics["test"][-1],
                "oracle": relative(task.truth.end_point(), task.truth.target),
                "curve": path.metrics["test"],
            }

        data = table({"seed": range(self.seeds), "tau": self.taus}, cell, "τ")
        return data.assign(s=("curve_0", at * self.alpha * self.beta))

    def judge(self, data: xr.Dataset) -> list[Row]:
        late = np.where(np.isfinite(data.t2), data.t2, np.inf)
        middle = np.median(late, axis=0)
        most = 10 * self.slow_time
        ranks = [rank_correlation(data.tau, row) for row in np.minimum(late, most)]
        least = (data.oracle.values < 1e-3).sum(axis=0)
        return [
            check("t₂", middle[-1] / middle[0], "≤ 0.5",
                  f"t₂ of τ = 1 over that of τ = 0, medians of {len(late)} instances: "
                  f"{middle[-1]:.3g} and {middle[0]:.3g} in s"),
            check("trend", np.nanmedian(ranks), "≤ -0.5",
                  "rank correlation of t₂ with τ, median"),
            check("oracle", least[-1] - least[0], "≥ 0", "instances that the least "
                  f"nuclear norm recovers, for each τ: {least.tolist()}"),
        ]  # fmt: skip

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        fig, axes = panels(3, 3)
        for tau, curve in zip(data.tau.values, data.curve.values[0], strict=True):
            grey = str(0.85 - 0.85 * tau)
            axes[0].plot(data.s[1:], curve[1:], color=grey, label=f"τ = {tau}")
        for i in range(data.sizes["seed"]):
            axes[1].plot(data.tau, data.t2[i], "o-", label=f"instance {i}")
            axes[2].plot(data.tau, data.error[i], "o-")
        finish(axes[0], "recovery error, instance 0", "$s = \\alpha\\beta$ · step")
        finish(axes[1], "slow time of recovery", "τ", log="y")
        finish(axes[2], f"recovery error at s = {self.slow_time:g}", "τ", log="y")
        return {"leverage": fig}


EXPERIMENTS = {"mf1": MF1, "mf2": MF2, "mf3": MF3, "mf4": MF4}
