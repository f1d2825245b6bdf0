"""Depth recovers sparse targets without any penalty."""

import dataclasses
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from ..shared.figures import COLOURS, finish, panels
from ..shared.record import table
from ..shared.rows import check, Row
from ..shared.runs import steps_until
from .common import descend, padded, Sparse
from .samples import SAMPLES


@dataclasses.dataclass(frozen=True)
class D1(Sparse):
    """Figures 9, 17 and 18: a = A₁ ⊙ ⋯ ⊙ A_L by gradient descent alone.

    No files. Time: six minutes of a core; quick, half a minute.
    """

    samples: tuple[int, ...] = SAMPLES
    depths: tuple[int, ...] = (1, 2, 3, 4)
    beta: float = 0.0
    zeta: float = 1e-2
    """Of the start where L > 1: Gaussian factors, which break the symmetry of signs. At
    L = 1 it is 1e-6."""
    steps: int = 10**6
    shown: int = 50
    """The number of measurements whose runs are drawn."""

    QUICK = dict(samples=samples[2:9:2], depths=depths[:3])

    def compute(self) -> xr.Dataset:
        at = steps_until(self.steps, 129)

        def cell(depth: int, n: int) -> dict[str, Any]:
            scale = self.zeta if depth > 1 else 1e-6
            one = self.task(samples=n, depth=depth, scale=scale)
            path = descend(padded(one, self.features), self.alpha, self.beta, at)
            return {
                "error": path.metrics["test"][-1],
                "fit": path.metrics["train"][-1],
                "t1": path.crossing_time("train") / self.alpha,
                "t2": path.crossing_time("test") / self.alpha,
                "unseen": one.truth.unseen(),
                "recovers": one.truth.recovers_target(),
                "target": one.truth.target,
                "curve": path.metrics["test"],
                "a": one.truth.coefficients(path.models),
            }

        data = table({"L": self.depths, "N": self.samples}, cell, "L, N")
        return data.assign(step=("curve_0", at))

    def judge(self, data: xr.Dataset) -> list[Row]:
        errors, fits = data.error.values, data.fit.values
        depths, n = data.L.values, data.N.values
        inner = n < self.features
        enough = inner & (n >= 40) & (data.recovers.values[-1] > 0)
        off = np.abs(errors[0] / data.unseen.values[-1] - 1)[inner].max()
        sentence = "recovery error of L = 1 is ‖P a*‖/‖a*‖"
        rows = [check("L = 1", off, "≤ 1e-4", sentence)]
        for i, depth in enumerate(depths[1:], start=1):
            gain = (errors[0] / errors[i])[enough].min(initial=np.inf)
            late = n[fits[i] > 1e-3].tolist()
            sentence = f"error of L = 1 over that of L = {depth}, least over 40 ≤ N < n"
            if depth > 2:
                sentence += f"; not fitted to 1e-3 by the end: N in {late}"
            # What has not fitted the data yet can't be judged.
            given = depth == 2 or fits[i][enough].max(initial=0) < 0.1
            rows.append(check(f"L = {depth}", gain, "≥ 5", sentence, given=given))
        t1, t2 = (data[k].fillna(np.inf).values for k in ("t1", "t2"))
        middle = [float(np.median(row[enough])) for row in t1]
        delays = [
            float(np.median(((late - early) / early)[on])) if on.any() else np.nan
            for early, late in zip(t1[1:, enough], t2[1:, enough], strict=True)
            for on in [np.isfinite(early) & np.isfinite(late)]
        ]
        told = ", ".join(f"{m:.3g}" for m in middle)
        late = ", ".join(f"{delay:.3g}" for delay in delays)
        sentence = f"steps until fitted, median over N ≥ 40, grow with L: {told}; "
        sentence += f"delays (t₂ − t₁)/t₁ of L > 1: {late}"
        return [*rows, check("slower", np.diff(middle).min(), "> 0", sentence)]

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        depths, steps = data.L.values, data.step.values[1:]
        there = self.shown in data.N
        fig, axes = panels(2 + len(depths) * there, 3)
        for depth, row, colour in zip(depths, data.error.values, COLOURS, strict=False):
            axes[0].plot(data.N, row, "o-", color=colour, label=f"L = {depth}")
        axes[0].plot(data.N, data.unseen[-1], "k:", label="$\\|Pa^*\\|/\\|a^*\\|$")
        finish(axes[0], "recovery error", "measurements N", log="y")
        where = f"N = {self.shown}"
        for i, (ax, colour) in enumerate(zip(axes[2:], COLOURS, strict=False)):
            one, label = data.sel(N=self.shown).isel(L=i), f"L = {depths[i]}"
            a, on = one.a.values[1:], one.target.values != 0
            axes[1].plot(steps, one.curve[1:], color=colour, label=label)
            ax.plot(steps, a[:, ~on], color="lightgrey", lw=0.5)
            ax.plot(steps, a[:, on], color=colour, lw=1.2)
            finish(ax, f"components, {label}, {where}", log="x")
        finish(axes[1], f"recovery error, {where}")
        return {"depth": fig}


EXPERIMENTS = {"d1": D1}
