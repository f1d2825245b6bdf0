"""Sparse recovery under ℓ1, and the law of its delay."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import xarray as xr
from matplotlib.figure import Figure

import gradflow as gf

from ..shared.command import bar
from ..shared.figures import COLOURS, finish, panels
from ..shared.record import variables
from ..shared.rows import check, decades, law_check, relative, Row, spread
from ..shared.runs import steps_until
from .common import (
    dataset,
    descend,
    flow,
    flow_times,
    METHODS,
    of_pairs,
    Sparse,
    story,
    timed,
    trace,
    traces_of,
    unless,
)
from .loop import subgradient_loop


def heuristic(truth: Any) -> float:
    """‖â − a*‖_∞: what the paper expects of (t₂ − t₁)αβ."""
    return float(jnp.max(jnp.abs(truth.least_squares() - truth.target)))


@dataclasses.dataclass(frozen=True)
class CS1(Sparse):
    """Figures 3 and 25: fit first, recover at t₂ of order 1/(αβ), by four methods.

    No files. Time: two minutes of a core; quick, half a minute.
    """

    samples: int = 30
    snr: float = 1e8
    steps: int = 10**6
    """Of each descent, and of the NumPy loop (of which a tenth if quick)."""
    timed_rtol: float = 1e-3
    """Of the flow that is timed against the loop: far more exact than that is."""

    def instance(self, seed: int) -> gf.tasks.Task:
        return self.task(seed, samples=self.samples, snr=self.snr)

    def memorised(self, seed: int) -> float:
        """t₁ in steps of another instance."""
        task = self.instance(seed)
        watched = {"train": task.metrics["train"]}
        at = np.arange(1000)
        path = descend(task, self.alpha, self.beta, at, metrics=watched)
        return path.crossing_time("train") / self.alpha

    def compute(self) -> xr.Dataset:
        task = self.instance(self.seed)
        truth = task.truth
        at = steps_until(self.steps, 257, dense=200)
        paths = {m: descend(task, self.alpha, self.beta, at, m) for m in METHODS}
        ts = self.alpha * at[at > 0]
        ts = np.concatenate([[0.0], np.geomspace(1e-3, ts[0], 20)[:-1], ts])
        paths["flow"] = flow(task, self.beta, ts)
        traces = {k: trace(p, truth, self.alpha) for k, p in paths.items()}
        for name, path in paths.items():
            print(f"{name}: {path}")
        lasso = np.asarray(truth.lasso(self.beta))
        crossing = lambda key: [
            p.crossing_time(key) / self.alpha for p in paths.values()
        ]
        data = variables(
            target=truth.target,
            lasso=lasso,
            lasso_train=relative(truth.features @ lasso, truth.targets),
            basis_pursuit=relative(truth.end_point(), truth.target),
            recovers=truth.recovers_target(tolerance=1e-3),
            heuristic=heuristic(truth) / (self.alpha * self.beta),
            t1_of_others=[self.memorised(seed) for seed in range(16)],
            **self.order(task),
            **self.timing(task),
        )
        times = {"t1": ("path", crossing("train")), "t2": ("path", crossing("test"))}
        data = data.assign(times).assign_coords(path=list(paths))
        return data.merge(dataset(traces))

    def order(self, task: gf.tasks.Task) -> dict[str, Any]:
        """The flow and ISTA, in sup norm, as α falls."""
        alphas = self.alpha / 2.0 ** np.arange(2, 5 if self.quick else 7)
        end = self.steps * self.alpha / (10 if self.quick else 1)
        numbers = gf.log_spaced_steps(round(end / self.alpha), 129)
        exact = flow(task, self.beta, self.alpha * numbers, 1e-9)
        errors = []
        for alpha in bar(alphas, "order in α"):
            at = numbers * round(self.alpha / alpha)
            path = descend(task, alpha, self.beta, at, "proximal", {})
            away = np.asarray(path.params.weights - exact.params.weights)
            errors.append(np.abs(away).max())
        return {"order_alpha": alphas, "order_error": errors}

    def timing(self, task: gf.tasks.Task) -> dict[str, float]:
        truth, part = task.truth, 10 if self.quick else 1
        given = (truth.features, truth.targets, truth.target, task.model.weights)
        loop = subgradient_loop(
            *map(np.asarray, given), alpha=self.alpha, beta=self.beta,
            steps=self.steps // part,
        )  # fmt: skip
        at = gf.log_spaced_steps(self.steps)
        ts = jnp.asarray(self.alpha * at)
        run = functools.partial(
            gf.simulate, task.flow, task.model, weight_decay=self.beta, ts=ts,
            rtol=self.timed_rtol,
        )  # fmt: skip
        path, first, again = timed(run)
        stepped = functools.partial(
            descend, task, self.alpha, self.beta, at, metrics={}
        )
        descended, _, ours = timed(stepped)
        exact = flow(task, self.beta, ts, 1e-9).params.weights
        away = lambda path: float(jnp.abs(path.params.weights - exact).max())
        return {
            "numpy_seconds": loop.seconds * part,
            "flow_seconds": again,
            "flow_first_seconds": first,
            "descent_seconds": ours,
            "flow_error": away(path),
            "descent_error": away(descended),
        }

    def judge(self, data: xr.Dataset) -> list[Row]:
        traces, gate = traces_of(data), bool(data.recovers)
        t1, t2 = ({k: float(data[n].sel(path=k)) for k in traces} for n in ("t1", "t2"))
        others, lasso = data.t1_of_others.values, data.lasso.values
        expected = t1["subgradient"] + float(data.heuristic)
        told = f"{min(others):.0f} to {max(others):.0f} steps; "
        told += f"this one {t1['subgradient']:.1f}"
        rows = [
            check("oracle", data.basis_pursuit, "≤ 1e-3",
                  "basis pursuit recovers a* (what follows is judged only if it does)",
                  also=gate),
            check("t₁", np.median(others), "50 … 150 steps",
                  f"train error ≤ 1e-3, median of 16 instances: {told}"),
            check("t₁", t1["projected"], "≤ 1 step",
                  "projected descent fits at its first step"),
            check("t₂", t2["subgradient"] / expected, "1/3 … 3",
                  "recovery ≤ 1e-2 against t₁ + ‖â − a*‖_∞/(αβ)"),
            check("t₂", spread(list(t2.values())), "≤ 0.02",
                  "the methods and the flow agree in t₂"),
        ]  # fmt: skip
        flow = traces["flow"]
        settled = np.abs(flow.a[-1] - flow.a[-2]).max() < 1e-9
        off = {k: relative(one.a[-1], lasso) for k, one in traces.items()}
        fit = flow.train[-1] / float(data.lasso_train)
        first = np.flatnonzero(flow.ratio[1:] >= 0.9)
        crossing = float(flow.steps[1 + first[0]]) if first.size else np.nan
        return [
            *unless(rows, gate),
            *(check("end", off[name], "≤ 1e-5", f"{name} ends at the LASSO",
                    given=settled) for name in ("flow", "proximal")),
            check("fit", fit, "1 ± 0.1",
                  "train error at the end over that of the LASSO, ∝ β", given=settled),
            check("forces", crossing / t1["flow"], "0.5 … 10",
                  "β‖H‖/‖G‖ first reaches 0.9, in units of t₁"),
            *self.rates(data),
        ]  # fmt: skip

    def rates(self, data: xr.Dataset) -> list[Row]:
        alphas, errors = data.order_alpha.values, data.order_error.values
        told = ", ".join(f"{error:.2g}" for error in errors)
        told = f"sup |ISTA − flow| against α: {told} at α = {alphas[0]:g}/2ᵏ"
        speed = data.numpy_seconds / data.flow_seconds
        sentence = (
            f"flow to t = {self.steps * self.alpha:g} (error {data.flow_error:.1g}) "
            f"against {self.steps:.0e} steps of NumPy (error {data.descent_error:.1g})"
        )
        sentence += " (extrapolated from a tenth)" * self.quick
        return [
            law_check("order", alphas, errors, "1 ± 0.1", told),
            check("speed", speed, "≥ 100", sentence),
        ]

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        t1, t2 = (float(data[name].sel(path="flow")) for name in ("t1", "t2"))
        expected = float(data.t1.sel(path="subgradient") + data.heuristic)
        times = {"$t_1$": t1, "$t_2$": t2, "heuristic": expected}
        figure = story(traces_of(data), data.target.values, times, "sparse recovery")
        return {"story": figure}


@dataclasses.dataclass(frozen=True)
class CS2(Sparse):
    """Figures 4 and 26: t₂ ∝ 1/(αβ), t₁ ∝ 1/α, and the floor, which is ∝ β.

    No files. Time: two minutes of a core; quick, forty seconds.
    """

    samples: int = 30
    alphas: tuple[float, ...] = (0.005, 0.01, 0.0275, 0.055, 0.0825, 0.1)
    betas: tuple[float, ...] = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    """The paper's, and 1e-7."""
    threshold: float = 1e-2
    """Of the recovery error, for t₂; judged where the LASSO is below a third of it."""
    max_steps: int = 15 * 10**7
    """Pairs (α, β) that would take longer are left out, and named."""

    QUICK = dict(max_steps=max_steps // 20)

    def compute(self) -> xr.Dataset:
        task = self.task(samples=self.samples)
        truth = task.truth
        metric = dataclasses.replace(task.metrics["test"], threshold=self.threshold)
        task = dataclasses.replace(task, metrics={**task.metrics, "test": metric})
        more = np.sort(np.append(self.betas, [1e-8, 1e-9]))
        flows = [
            flow(task, beta, flow_times(20.0 / beta, 257), 1e-7)
            for beta in bar(more, "flows")
        ]
        t2 = np.array([path.crossing_time("test") for path in flows])
        s2 = float(np.nanmin(t2 * more))
        length = lambda a, b: round(max(1.25 * s2 / (a * b), 3e3 / a))
        at = lambda n: steps_until(n, 257)
        most = self.max_steps
        descents = of_pairs(task, self.alphas, self.betas, length, most, at)
        data = variables(
            basis_pursuit=relative(truth.end_point(), truth.target),
            recovers=truth.recovers_target(),
            heuristic=heuristic(truth),
            **self.memorisation(task),
            **self.oscillation(task),
        )
        return data.merge(descents).assign(
            flow_beta=("flow", more),
            flow_t2=("flow", t2),
            flow_floor=("flow", [float(path.metrics["test"][-1]) for path in flows]),
            lasso_bias=("flow", [relative(truth.lasso(b), truth.target) for b in more]),
        )

    def memorisation(self, task: gf.tasks.Task) -> dict[str, Any]:
        """t₁ against α and β: descents of 200 time units, every step kept."""
        alphas, betas = self.alphas[-3:], (1e-8, 1e-7, 1e-6, 1e-5)
        watched, found = {"train": task.metrics["train"]}, []
        for alpha in alphas:
            at = np.arange(round(40 / alpha))
            paths = [descend(task, alpha, b, at, metrics=watched) for b in betas]
            found.append([path.crossing_time("train") / alpha for path in paths])
        return {"t1": found, "t1_alpha": alphas}

    def oscillation(self, task: gf.tasks.Task) -> dict[str, Any]:
        """How far descents at rest are from the LASSO, against α."""
        beta, alphas = 1e-4, np.array(self.alphas[2:])
        lasso, away = task.truth.lasso(beta), {}
        for method in METHODS[:2]:
            away[method] = []
            for alpha in alphas:
                at = np.arange(*round(20.0 / (alpha * beta)) + np.array([-64, 1]))
                path = descend(task, alpha, beta, at, method, {})
                apart = np.abs(np.asarray(path.params.weights - lasso))
                away[method].append(float(apart.max()))
        return {"band_alpha": alphas, **{f"band_{k}": v for k, v in away.items()}}

    def judge(self, data: xr.Dataset) -> list[Row]:
        alpha, beta, t2 = data.alpha.values, data.beta.values, data.t2.values
        more, flow_t2, floor, bias = (
            data[k].values for k in ("flow_beta", "flow_t2", "flow_floor", "lasso_bias")
        )
        ok, small = bias < self.threshold / 3, bias < 0.1
        good = np.isfinite(t2) & np.isin(beta, more[ok])
        product, constant = (alpha * beta)[good], (t2 * alpha * beta)[good]
        wide, middle = decades(product), np.exp(np.log(constant).mean())
        t1, band = data.t1.values, data.band_alpha.values
        sentence = f"log t₂ on log αβ, {good.sum()} descents over {wide:.1f} decades"
        change = (t1.max(axis=1) / t1.min(axis=1) - 1).max()
        rows = [
            check("oracle", data.basis_pursuit, "≤ 1e-6", "basis pursuit recovers a*",
                  also=data.recovers),
            law_check("law", product, t2[good], "-1 ± 0.05", sentence),
            check("law", wide, "≥ 4", "decades of αβ that the law is fitted to",
                  given=not self.quick),
            check("t₂αβ", spread(constant), "≤ 0.05",
                  f"it is constant, {middle:.4g} (heuristic {data.heuristic:.4g})"),
            law_check("law of flows", more[ok], flow_t2[ok], "-1 ± 0.05",
                  f"log t₂ on log β, {decades(more[ok]):.1f} decades"),
            law_check("floor", more[small], floor[small], "1 ± 0.05",
                  "final recovery error of flows against β"),
            check("floor", np.abs(floor / bias - 1).max(), "≤ 0.1",
                  "it is the LASSO's own error, at every β"),
            check("t₁", change, "≤ 0.1", "its change over three decades of β"),
            law_check("t₁", data.t1_alpha.values, t1[:, -1], "-1 ± 0.05",
                  "log t₁ on log α"),
            law_check("band", band, data.band_subgradient.values, "1 ± 0.2",
                  "sup |a − LASSO| of subgradient descent at rest on α (β = 0.0001)"),
            check("band", data.band_proximal.max(), "≤ 1e-9",
                  "the same of soft thresholding"),
        ]  # fmt: skip
        return unless(rows, data.recovers)

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        fig, axes = panels(2)
        alpha, beta, more = data.alpha.values, data.beta.values, data.flow_beta.values
        s2 = np.nanmin(data.flow_t2.values * more)
        for a, colour in zip(self.alphas, COLOURS, strict=False):
            on, label = alpha == a, f"α = {a}"
            axes[0].plot(
                (alpha * beta)[on], data.t2[on], "o", color=colour, label=label
            )
            axes[1].plot(beta[on], data["last"][on], "o", color=colour, ms=4)
        span = np.geomspace((alpha * beta).min(), 1e-4, 9)
        axes[0].plot(span, s2 / span, "k--", lw=1, label="flow: constant/(αβ)")
        axes[1].plot(more, data.flow_floor, "k-", lw=1, label="flow")
        axes[1].plot(more, data.lasso_bias, "r:", lw=2, label="LASSO")
        finish(axes[0], "steps to recovery", "$\\alpha\\beta$", "$t_2$")
        finish(axes[1], "last recovery error", "$\\beta$")
        return {"law": fig}


EXPERIMENTS = {"cs1": CS1, "cs2": CS2}
