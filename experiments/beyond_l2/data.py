"""The same target, more coherent measurements."""

import dataclasses
from math import comb
from typing import Any

import jax.random as jr
import numpy as np
import xarray as xr
from matplotlib.figure import Figure

import gradflow as gf

from ..shared.command import Settings
from ..shared.figures import COLOURS, finish, panels
from ..shared.record import table
from ..shared.rows import check, rank_correlation, relative, Row
from .common import flow, flow_times, least, padded, Sparse
from .samples import SAMPLES


@dataclasses.dataclass(frozen=True)
class CS6(Sparse):
    """Figures 19a, 21 and 22: the more rows see one coordinate only, the later, and the
    less often, a flow recovers.

    No files. Time: five minutes of a core; quick, a quarter of one.
    """

    samples: tuple[int, ...] = SAMPLES
    taus: tuple[float, ...] = tuple(np.linspace(0, 1, 11).round(1).tolist())
    steps: int = 10**7
    """The flow runs to t = α · steps."""
    trials: int = 3
    """Instances; t₂ and errors are their medians."""

    QUICK = dict(samples=samples[2:9:2], taus=taus[::5], trials=1)

    def compute(self) -> xr.Dataset:
        ts = flow_times(self.alpha * self.steps, 129)

        def cell(trial: int, tau: float, n: int) -> dict[str, Any]:
            one = self.task(self.seed + trial, samples=n, coherence=tau)
            path = flow(padded(one, self.features), self.beta, ts, 1e-6)
            x = np.asarray(one.truth.features)
            each = np.abs(x).max(axis=1) / np.linalg.norm(x, axis=1)
            support = np.flatnonzero(one.truth.target)
            return {
                "t2": path.crossing_time("test") / self.alpha,
                "error": path.metrics["test"][-1],
                "oracle": relative(one.truth.end_point(), one.truth.target),
                "seen": float((np.abs(x[:, support]).max(axis=0) > 0).all()),
                "largest": each.max(),
                "mean": each.mean(),
            }

        trials = range(self.trials)
        axes = {"trial": trials, "tau": self.taus, "N": self.samples}
        return table(axes, cell, "trial, τ, N")

    def judge(self, data: xr.Dataset) -> list[Row]:
        taus, n = data.tau.values, self.features
        inner = data.isel(N=data.N.values < n)
        error, mean = (inner[k].median("trial").values for k in ("error", "mean"))
        worse = [rank_correlation(taus, column) for column in error.T]
        late = [rank_correlation(taus, column) for column in self.middle(inner).T]
        recovered, oracle = data.error.values < 1e-2, data.oracle.values < 1e-3
        last = inner.sel(tau=1.0)
        at_one, seen = last.error.values < 1e-2, last.seen.values > 0
        hits = inner.N.values[np.nonzero(at_one)[1]].tolist()
        chance = sum(comb(n - self.sparsity, int(N) - self.sparsity) / comb(n, int(N))
                     for N in inner.N.values)  # fmt: skip
        told = ", ".join(f"{r:.2f}" for r in late)
        expected = chance * data.sizes["trial"]
        return [
            check("coherence", np.diff(mean, axis=0).min(), "≥ 0", "mean over rows of "
                  "max|Xᵢⱼ|/‖Xᵢ‖ does not fall as τ rises (the largest one is 1 from "
                  "the first such row on)"),
            check("t₂", np.nanmean(late), "≥ 0.5", "rank correlation of t₂ (late if "
                  f"never) with τ, mean over N < n: {told}"),
            check("error", np.nanmean(worse), "≥ 0.5",
                  "the same of the error at the end"),
            check("never", len(hits), "= 0", "instances of τ = 1, N < n that recover, "
                  f"at N in {hits}; the support is seen in {expected:.1f} on average"),
            check("seen", (at_one == seen).mean(), "= 1", "at τ = 1 a "
                  "flow recovers exactly where each entry of the support is measured"),
            check("oracle", (recovered == oracle).mean(), "≥ 0.95", "instances where "
                  "the flow recovers (1e-2) if and only if basis pursuit does (1e-3)"),
        ]  # fmt: skip

    def middle(self, data: xr.Dataset) -> np.ndarray:
        """The median of t₂ over the instances, for τ and N."""
        t2 = data.t2.values
        return np.median(np.where(np.isfinite(t2), t2, 10 * self.steps), axis=0)

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        fig, axes = panels(3, 3)
        data = data.isel(N=data.N.values < self.features)
        t2 = self.middle(data)
        t2 = np.where(t2 > self.steps, np.nan, t2)
        error, mean = (data[k].median("trial").values for k in ("error", "mean"))
        for j, colour in zip(range(data.sizes["N"]), COLOURS * 2, strict=False):
            label = f"N = {data.N.values[j]}"
            axes[0].plot(data.tau, mean[:, j], color=colour, label=label)
            axes[1].plot(data.tau, t2[:, j], "o-", color=colour)
            axes[2].plot(data.tau, error[:, j], "o-", color=colour)
        finish(axes[0], "mean coherence of the rows", "τ", log="")
        finish(axes[1], "steps to recovery", "τ", log="y")
        finish(axes[2], "recovery error at the end", "τ", log="y")
        return {"coherence": fig}


@dataclasses.dataclass(frozen=True)
class CS7(Settings):
    """Figures 19b and 20: how many measurements basis pursuit itself needs.

    No files. Time: half a minute of a core; quick, ten seconds.
    """

    features: int = 100
    sparsities: tuple[int, ...] = (2, 4, 6, 8, 10, 12, 14, 16, 18, 20)
    samples: tuple[int, ...] = SAMPLES
    taus: tuple[float, ...] = (0.0, 0.5, 1.0)
    trials: int = 4
    tolerance: float = 1e-6

    QUICK = dict(sparsities=sparsities[::3], trials=2)

    def compute(self) -> xr.Dataset:
        def cell(tau: float, sparsity: int, n: int, trial: int) -> dict[str, Any]:
            task = gf.tasks.sparse_recovery(
                jr.fold_in(jr.key(self.seed), trial), features=self.features,
                sparsity=sparsity, samples=n, coherence=tau,
            )  # fmt: skip
            return {"error": relative(task.truth.end_point(), task.truth.target)}

        sparsities, trials = self.sparsities, range(self.trials)
        axes = {"tau": self.taus, "s": sparsities, "N": self.samples, "trial": trials}
        return table(axes, cell, "linear programs")

    def fewest(self, data: xr.Dataset) -> np.ndarray:
        """The least N at which all instances are recovered, for τ and s."""
        return least(data.N.values, (data.error.values < self.tolerance).all(axis=-1))

    def judge(self, data: xr.Dataset) -> list[Row]:
        few = self.fewest(data)
        in_s = min(rank_correlation(data.s.values, row) for row in few[:-1])
        all_needed = (few[-1] == self.features).all()
        full = data.error.values[:, :, -1].max()
        return [
            check("s", in_s, "≥ 0.9", "rank correlation of N_min with s, for τ < 1: "
                  f"{few[:-1].tolist()}"),
            check("τ", np.diff(few, axis=0).min(), "≥ 0", "N_min does not fall as τ "
                  "rises"),
            check("τ = 1", few[-1].min(), f"= {self.features}",
                  "then all measurements are needed", also=all_needed),
            check("N = n", full, f"≤ {self.tolerance:g}", "with N = n all are "
                  "recovered"),
        ]  # fmt: skip

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        fig, (ax,) = panels(1, 1)
        for tau, row, colour in zip(
            self.taus, self.fewest(data), COLOURS, strict=False
        ):
            ax.plot(data.s, row, "o-", color=colour, label=f"τ = {tau}")
        title = f"N at which all of {data.sizes['trial']} instances are recovered"
        finish(ax, title, "sparsity s", "$N_{min}$", log="")
        return {"n_min": fig}


EXPERIMENTS = {"cs6": CS6, "cs7": CS7}
