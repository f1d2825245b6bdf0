"""P2-D1: depth recovers sparse targets without any penalty."""

import dataclasses

import jax.random as jr
import numpy as np
import xarray as xr

import gradflow as gf

from ..shared.common import (
    bar,
    below,
    check,
    COLOURS,
    finish,
    Outcome,
    panels,
    Settings,
    steps_until,
)
from .common import padded


@dataclasses.dataclass(frozen=True)
class D1(Settings):
    """Figures 9, 17 and 18: a = A₁ ⊙ ⋯ ⊙ A_L by gradient descent alone."""

    features: int = 100
    sparsity: int = 5
    samples: tuple[int, ...] = (10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
    depths: tuple[int, ...] = (1, 2, 3, 4)
    alpha: float = 0.1
    zeta: float = 1e-2
    """Of the start where L > 1: Gaussian factors, which break the symmetry of signs. At
    L = 1 it is 1e-6."""
    steps: int = 10**6

    def run(self) -> Outcome:
        samples = self.samples[2:9:2] if self.quick else self.samples
        depths = self.depths[:3] if self.quick else self.depths
        shape = (len(depths), len(samples))
        errors, fits, t1, t2 = (np.full(shape, np.nan) for _ in range(4))
        unseen = np.full(len(samples), np.nan)
        sparse = np.zeros(len(samples), bool)
        at = steps_until(self.steps, 129)
        shown = {}
        for i, depth in enumerate(depths):
            for j, n in enumerate(bar(samples, f"L = {depth}")):
                one = gf.tasks.sparse_recovery(
                    jr.key(self.seed),
                    features=self.features,
                    sparsity=self.sparsity,
                    samples=n,
                    depth=depth,
                    scale=self.zeta if depth > 1 else 1e-6,
                )
                unseen[j] = one.truth.unseen()
                sparse[j] = one.truth.recovers_target()
                task = padded(one, self.features)
                path = gf.descent(
                    task.flow,
                    task.model,
                    weight_decay=0.0,
                    learning_rate=self.alpha,
                    at=at,
                    metrics=task.metrics,
                )
                errors[i, j] = path.metrics["test"][-1]
                fits[i, j] = path.metrics["train"][-1]
                t1[i, j] = path.crossing_time("train") / self.alpha
                t2[i, j] = path.crossing_time("test") / self.alpha
                if n == 50:
                    a = np.asarray(one.truth.coefficients(path.models))
                    shown[depth] = (a, np.asarray(path.metrics["test"]), one.truth)
        numbers_n = np.array(samples)
        inner = numbers_n < self.features
        enough = inner & (numbers_n >= 40) & sparse
        gain = errors[0] / errors[1]
        off = np.abs(errors[0] / unseen - 1)[inner].max()
        checks = [
            below("P2-D1 L = 1", off, 1e-4, "recovery error of L = 1 is ‖P a*‖/‖a*‖"),
            check(
                "P2-D1 L = 2", gain[enough].min(initial=np.inf), "≥ 5",
                gain[enough].min(initial=np.inf) >= 5,
                "error of L = 1 over that of L = 2, least over 40 ≤ N < n",
            ),
        ]  # fmt: skip
        for i, depth in enumerate(depths[2:], start=2):
            ratio = errors[0] / errors[i]
            late = [n for n, f in zip(samples, fits[i], strict=True) if f > 1e-3]
            # What has not fitted the data yet can't be judged.
            judged = fits[i][enough].max(initial=0) < 0.1
            checks.append(
                check(
                    f"P2-D1 L = {depth}",
                    ratio[enough].min(initial=np.inf),
                    "≥ 5",
                    ratio[enough].min(initial=np.inf) >= 5 if judged else None,
                    f"the same of L = {depth}; not fitted to 1e-3 by the end: N in "
                    f"{late}",
                )  # fmt: skip
            )
        t1 = np.where(np.isnan(t1), np.inf, t1)
        middle = [float(np.median(row[enough])) for row in t1]
        checks.append(
            check(
                "P2-D1 slower",
                np.diff(middle).min(),
                "> 0",
                np.diff(middle).min() > 0,
                "steps until fitted, median over N ≥ 40, grow with L: "
                + ", ".join(f"{m:.3g}" for m in middle),
            )  # fmt: skip
        )
        t2 = np.where(np.isnan(t2), np.inf, t2)
        reached = (np.isfinite(t1) & np.isfinite(t2))[:, enough]
        with np.errstate(invalid="ignore"):
            apart = ((t2 - t1) / t1)[:, enough]
        delay = [
            float(np.median(d[on])) if on.any() else np.nan
            for d, on in zip(apart[1:], reached[1:], strict=True)
        ]
        print(f"delay (t₂ − t₁)/t₁ for L = {depths[1:]}: {delay}")
        fig, axes = panels(2 + len(shown), 3)
        for depth, row, colour in zip(depths, errors, COLOURS, strict=False):
            axes[0].plot(samples, row, "o-", color=colour, label=f"L = {depth}")
        axes[0].plot(samples, unseen, "k:", label="$\\|Pa^*\\|/\\|a^*\\|$")
        finish(axes[0], "recovery error", "measurements N", log="y")
        for (depth, (a, test, truth)), ax, colour in zip(
            shown.items(), axes[2:], COLOURS, strict=False
        ):
            axes[1].plot(at[1:], test[1:], color=colour, label=f"L = {depth}")
            on = np.asarray(truth.target != 0)
            ax.plot(at[1:], a[1:, ~on], color="lightgrey", lw=0.5)
            ax.plot(at[1:], a[1:, on], color=colour, lw=1.2)
            finish(ax, f"components, L = {depth}, N = 50", log="x")
        finish(axes[1], "recovery error, N = 50")
        dims = ("L", "N")
        data = xr.Dataset(
            {
                "error": (dims, errors),
                "fit": (dims, fits),
                "t1": (dims, t1),
                "t2": (dims, t2),
                "unseen": ("N", unseen),
                "basis_pursuit_recovers": ("N", sparse),
            },
            coords={"L": list(depths), "N": list(samples)},
        )
        numbers = {"delay": delay, "fitted": t1, "errors": errors, "gain": gain}
        return Outcome(numbers, checks, data, {"depth": fig})


EXPERIMENTS = {"d1": D1}
