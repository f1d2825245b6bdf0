"""P2-CS6 and CS7: the same target, more coherent measurements."""

import dataclasses
from math import comb

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
    rank_correlation,
    relative,
    Settings,
)
from .common import padded
from .samples import first
from .sparse import flow, flow_times


@dataclasses.dataclass(frozen=True)
class CS6(Settings):
    """Figures 19a, 21 and 22: the more rows see one coordinate only, the later, and the
    less often, a flow recovers."""

    features: int = 100
    sparsity: int = 5
    samples: tuple[int, ...] = (10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
    taus: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    alpha: float = 0.1
    beta: float = 1e-5
    zeta: float = 1e-6
    steps: int = 10**7
    """The flow runs to t = α · steps."""
    trials: int = 3
    """Instances; t₂ and errors are their medians."""

    def run(self) -> Outcome:
        samples = self.samples[2:9:2] if self.quick else self.samples
        taus = self.taus[::5] if self.quick else self.taus
        shape = (1 if self.quick else self.trials, len(taus), len(samples))
        names = ("t2", "error", "oracle", "seen", "largest", "mean")
        found = {name: np.full(shape, np.nan) for name in names}
        ts = flow_times(self.alpha * self.steps, 129)
        for index in bar(np.ndindex(*shape), "trial, τ, N"):
            trial, i, j = index
            one = gf.tasks.sparse_recovery(
                jr.key(self.seed + trial),
                features=self.features,
                sparsity=self.sparsity,
                samples=samples[j],
                coherence=taus[i],
                scale=self.zeta,
            )
            task = padded(one, self.features)
            path = flow(task, self.beta, ts, 1e-6)
            x = np.asarray(one.truth.features)
            each = np.abs(x).max(axis=1) / np.linalg.norm(x, axis=1)
            support = np.flatnonzero(one.truth.target)
            values = (
                path.crossing_time("test") / self.alpha,
                path.metrics["test"][-1],
                relative(one.truth.end_point(), one.truth.target),
                (np.abs(x[:, support]).max(axis=0) > 0).all(),
                each.max(),
                each.mean(),
            )
            for name, value in zip(names, values, strict=True):
                found[name][index] = float(value)
        inner = [j for j, n in enumerate(samples) if n < self.features]
        t2 = np.where(np.isfinite(found["t2"]), found["t2"], 10 * self.steps)
        middle = np.median(t2, axis=0)
        error, mean = np.median(found["error"], 0), np.median(found["mean"], 0)
        late = [rank_correlation(taus, middle[:, j]) for j in inner]
        worse = [rank_correlation(taus, error[:, j]) for j in inner]
        recovered = found["error"] < 1e-2
        at_one = recovered[:, taus.index(1.0), :][:, inner]
        seen = found["seen"][:, taus.index(1.0), :][:, inner] > 0
        hits = np.array(samples)[inner][np.nonzero(at_one)[1]].tolist()
        n, s = self.features, self.sparsity
        chance = {N: comb(n - s, N - s) / comb(n, N) for N in samples if N < n}
        expected = sum(chance.values()) * shape[0]
        agree = (recovered == (found["oracle"] < 1e-3)).mean()
        checks = [
            check(
                "P2-CS6 coherence", np.diff(mean[:, inner], axis=0).min(), "≥ 0",
                (np.diff(mean[:, inner], axis=0) >= 0).all(),
                "mean over rows of max|Xᵢⱼ|/‖Xᵢ‖ does not fall as τ rises (the largest "
                "one is 1 from the first such row on)",
            ),
            check(
                "P2-CS6 t2", np.nanmean(late), "≥ 0.5", np.nanmean(late) >= 0.5,
                "rank correlation of t₂ (late if never) with τ, mean over N < n: "
                + ", ".join(f"{r:.2f}" for r in late),
            ),
            check(
                "P2-CS6 error", np.nanmean(worse), "≥ 0.5", np.nanmean(worse) >= 0.5,
                "the same of the error at the end",
            ),
            check(
                "P2-CS6 never", len(hits), "= 0", not hits,
                f"instances of τ = 1, N < n that recover, at N in {hits}; rows see "
                f"the whole support in {expected:.1f} on average",
            ),
            check(
                "P2-CS6 seen", (at_one == seen).mean(), "= 1", (at_one == seen).all(),
                "at τ = 1 a flow recovers exactly where each entry of the support is "
                "measured",
            ),
            check(
                "P2-CS6 oracle", agree, "≥ 0.95", agree >= 0.95,
                "instances where the flow recovers (1e-2) if and only if basis pursuit "
                "does (1e-3)",
            ),
        ]  # fmt: skip
        fig, axes = panels(3, 3)
        for j, colour in zip(inner, COLOURS * 2, strict=False):
            label = f"N = {samples[j]}"
            axes[0].plot(taus, mean[:, j], color=colour, label=label)
            never = np.where(middle[:, j] > self.steps, np.nan, middle[:, j])
            axes[1].plot(taus, never, "o-", color=colour)
            axes[2].plot(taus, error[:, j], "o-", color=colour)
        finish(axes[0], "mean coherence of the rows", "τ", log="")
        finish(axes[1], "steps to recovery", "τ", log="y")
        finish(axes[2], "recovery error at the end", "τ", log="y")
        data = xr.Dataset(
            {k: (("trial", "tau", "N"), v) for k, v in found.items()},
            coords={"tau": list(taus), "N": list(samples)},
        )
        numbers = {"late": late, "worse": worse, "chance_all_seen": chance}
        return Outcome(numbers, checks, data, {"coherence": fig})


@dataclasses.dataclass(frozen=True)
class CS7(Settings):
    """Figures 19b and 20: how many measurements basis pursuit itself needs."""

    features: int = 100
    sparsities: tuple[int, ...] = (2, 4, 6, 8, 10, 12, 14, 16, 18, 20)
    samples: tuple[int, ...] = (10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
    taus: tuple[float, ...] = (0.0, 0.5, 1.0)
    trials: int = 4
    tolerance: float = 1e-6

    def run(self) -> Outcome:
        sparsities = self.sparsities[::3] if self.quick else self.sparsities
        trials = 2 if self.quick else self.trials
        shape = (len(self.taus), len(sparsities), len(self.samples), trials)
        errors = np.full(shape, np.nan)
        for index in bar(np.ndindex(*shape), "linear programs"):
            i, j, k, trial = index
            task = gf.tasks.sparse_recovery(
                jr.fold_in(jr.key(self.seed), trial),
                features=self.features,
                sparsity=sparsities[j],
                samples=self.samples[k],
                coherence=self.taus[i],
            )
            errors[index] = relative(task.truth.end_point(), task.truth.target)
        good = (errors < self.tolerance).all(axis=-1)
        enough = np.flip(np.logical_and.accumulate(np.flip(good, -1), -1), -1)
        least = np.array(
            [[first(self.samples, row) for row in each] for each in enough]
        )
        in_s = [rank_correlation(sparsities, row) for row in least[:-1]]
        checks = [
            check(
                "P2-CS7 s", min(in_s), "≥ 0.9", min(in_s) >= 0.9,
                f"rank correlation of N_min with s, for τ < 1: {least[:-1].tolist()}",
            ),
            check(
                "P2-CS7 τ", np.diff(least, axis=0).min(), "≥ 0",
                (np.diff(least, axis=0) >= 0).all(), "N_min does not fall as τ rises",
            ),
            check(
                "P2-CS7 τ = 1", least[-1].min(), f"= {self.features}",
                (least[-1] == self.features).all(), "then all measurements are needed",
            ),
            below(
                "P2-CS7 N = n", errors[:, :, -1].max(), self.tolerance,
                "with N = n all are recovered",
            ),
        ]  # fmt: skip
        fig, (ax,) = panels(1, 1)
        for tau, row, colour in zip(self.taus, least, COLOURS, strict=False):
            ax.plot(sparsities, row, "o-", color=colour, label=f"τ = {tau}")
        title = f"N at which all of {trials} instances are recovered"
        finish(ax, title, "sparsity s", "$N_{min}$", log="")
        data = xr.Dataset(
            {"error": (("tau", "s", "N", "trial"), errors)},
            coords={"tau": list(self.taus), "s": list(sparsities)},
        )
        return Outcome({"n_min": least}, checks, data, {"n_min": fig})


EXPERIMENTS = {"cs6": CS6, "cs7": CS7}
