"""Depth recovers sparse targets without any penalty."""

import dataclasses

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from ..shared.command import bar
from ..shared.figures import COLOURS, finish, panels
from ..shared.rows import check, Row
from ..shared.runs import steps_until
from .common import descend, padded, Sparse
from .samples import SAMPLES


@dataclasses.dataclass(frozen=True)
class D1(Sparse):
    """Figures 9, 17 and 18: a = A₁ ⊙ ⋯ ⊙ A_L by gradient descent alone."""

    samples: tuple[int, ...] = SAMPLES
    depths: tuple[int, ...] = (1, 2, 3, 4)
    beta: float = 0.0
    zeta: float = 1e-2
    """Of the start where L > 1: Gaussian factors, which break the symmetry of signs. At
    L = 1 it is 1e-6."""
    steps: int = 10**6
    shown: int = 50
    """The number of measurements whose runs are drawn."""

    def compute(self) -> xr.Dataset:
        samples = self.samples[2:9:2] if self.quick else self.samples
        depths = self.depths[:3] if self.quick else self.depths
        at = steps_until(self.steps, 129)
        names = ("error", "fit", "t1", "t2", "unseen", "recovers")
        found = {name: np.full((len(depths), len(samples)), np.nan) for name in names}
        shape = (len(depths), at.size)
        curves, target = np.full(shape, np.nan), np.full(self.features, np.nan)
        components = np.full((*shape, self.features), np.nan)
        for i, j in bar(np.ndindex(*found["t1"].shape), "L, N"):
            depth = depths[i]
            scale = self.zeta if depth > 1 else 1e-6
            one = self.task(samples=samples[j], depth=depth, scale=scale)
            path = descend(padded(one, self.features), self.alpha, self.beta, at)
            values = (
                path.metrics["test"][-1],
                path.metrics["train"][-1],
                path.crossing_time("train") / self.alpha,
                path.crossing_time("test") / self.alpha,
                one.truth.unseen(),
                one.truth.recovers_target(),
            )
            for name, value in zip(names, values, strict=True):
                found[name][i, j] = float(value)
            if samples[j] == self.shown:
                components[i] = np.asarray(one.truth.coefficients(path.models))
                curves[i], target = path.metrics["test"], np.asarray(one.truth.target)
        axes = {"L": list(depths), "N": list(samples), "step": at}
        return xr.Dataset(
            {
                **{k: (("L", "N"), v) for k, v in found.items()},
                "components": (("L", "step", "coordinate"), components),
                "curve": (("L", "step"), curves),
                "target": ("coordinate", target),
            },
            axes,
        )

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
        t1, t2 = (
            data[k].where(np.isfinite(data[k]), np.inf).values for k in ("t1", "t2")
        )
        middle = [float(np.median(row[enough])) for row in t1]
        delays = [
            float(np.median(((late - early) / early)[on])) if on.any() else np.nan
            for early, late in zip(t1[1:, enough], t2[1:, enough], strict=True)
            for on in [np.isfinite(early) & np.isfinite(late)]
        ]
        told = ", ".join(f"{m:.3g}" for m in middle)
        sentence = (
            f"steps until fitted, median over N ≥ 40, grow with L: {told}; delays "
        )
        sentence += f"(t₂ − t₁)/t₁ of L > 1: {', '.join(f'{d:.3g}' for d in delays)}"
        return [*rows, check("slower", np.diff(middle).min(), "> 0", sentence)]

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        depths, steps = data.L.values, data.step.values[1:]
        there = bool(np.isfinite(data.target).all())
        fig, axes = panels(2 + len(depths) * there, 3)
        for depth, row, colour in zip(depths, data.error.values, COLOURS, strict=False):
            axes[0].plot(data.N, row, "o-", color=colour, label=f"L = {depth}")
        axes[0].plot(data.N, data.unseen[-1], "k:", label="$\\|Pa^*\\|/\\|a^*\\|$")
        finish(axes[0], "recovery error", "measurements N", log="y")
        on, where = data.target.values != 0, f"N = {self.shown}"
        for i, (ax, colour) in enumerate(zip(axes[2:], COLOURS, strict=False)):
            a, label = data.components.values[i, 1:], f"L = {depths[i]}"
            axes[1].plot(steps, data.curve[i, 1:], color=colour, label=label)
            ax.plot(steps, a[:, ~on], color="lightgrey", lw=0.5)
            ax.plot(steps, a[:, on], color=colour, lw=1.2)
            finish(ax, f"components, {label}, {where}", log="x")
        finish(axes[1], f"recovery error, {where}")
        return {"depth": fig}


EXPERIMENTS = {"d1": D1}
