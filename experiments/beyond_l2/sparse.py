"""P2-CS1 and P2-CS2: sparse recovery under ℓ1, and the law of its delay."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray as xr

import gradflow as gf

from ..shared.common import (
    bar,
    below,
    check,
    COLOURS,
    decades,
    finish,
    law,
    Outcome,
    panels,
    relative,
    Row,
    Settings,
    slope_row,
    spread,
    steps_until,
)
from .common import dataset, story, timed, trace
from .loop import subgradient_loop

METHODS = ("subgradient", "proximal", "projected")


def heuristic(truth: Any) -> float:
    """‖â − a*‖_∞: what the paper expects of (t₂ − t₁)αβ."""
    return float(jnp.max(jnp.abs(truth.least_squares() - truth.target)))


def flow(task: gf.tasks.Task, beta: float, ts: Any, rtol: float = 1e-8) -> gf.Path:
    return gf.simulate(
        task.flow,
        task.model,
        weight_decay=beta,
        ts=jnp.asarray(ts),
        metrics=task.metrics,
        rtol=rtol,
        max_steps=10**6,
    )


def flow_times(t1: float, saves: int) -> np.ndarray:
    return np.concatenate([[0.0], np.geomspace(1e-2, t1, saves)])


@dataclasses.dataclass(frozen=True)
class CS1(Settings):
    """Figures 3 and 25: fit first, recover at t₂ of order 1/(αβ), by four methods."""

    features: int = 100
    sparsity: int = 5
    samples: int = 30
    snr: float = 1e8
    alpha: float = 0.1
    beta: float = 1e-5
    zeta: float = 1e-6
    steps: int = 10**6
    """Of each descent, and of the NumPy loop (of which a tenth if quick)."""
    timed_rtol: float = 1e-3
    """Of the flow that is timed against the loop: far more exact than that is."""

    def task(self, seed: int) -> gf.tasks.Task:
        return gf.tasks.sparse_recovery(
            jr.key(seed),
            features=self.features,
            sparsity=self.sparsity,
            samples=self.samples,
            snr=self.snr,
            scale=self.zeta,
        )

    def memorised(self, seed: int) -> float:
        """t₁ in steps of another instance."""
        task = self.task(seed)
        path = gf.descent(
            task.flow,
            task.model,
            weight_decay=self.beta,
            learning_rate=self.alpha,
            at=np.arange(1000),
            metrics={"train": task.metrics["train"]},
        )
        return path.crossing_time("train") / self.alpha

    def run(self) -> Outcome:
        task = self.task(self.seed)
        truth = task.truth
        target = np.asarray(truth.target)
        gate = truth.recovers_target(tolerance=1e-3)
        end = self.steps * self.alpha
        saves = 257
        at = steps_until(self.steps, saves, dense=200)
        paths = {
            method: gf.descent(
                task.flow,
                task.model,
                weight_decay=self.beta,
                learning_rate=self.alpha,
                at=at,
                method=method,
                metrics=task.metrics,
            )
            for method in METHODS
        }
        ts = self.alpha * at[at > 0]
        ts = np.concatenate([[0.0], np.geomspace(1e-3, ts[0], 20)[:-1], ts])
        paths["flow"] = flow(task, self.beta, ts)
        traces = {k: trace(p, truth, self.alpha) for k, p in paths.items()}
        for name, path in paths.items():
            print(f"{name}: {path}")
        t1 = {k: p.crossing_time("train") / self.alpha for k, p in paths.items()}
        t2 = {k: p.crossing_time("test") / self.alpha for k, p in paths.items()}
        others = [self.memorised(seed) for seed in range(16)]
        expected = t1["subgradient"] + heuristic(truth) / (self.alpha * self.beta)
        lasso = np.asarray(truth.lasso(self.beta))
        floor = relative(lasso, target)

        checks = [
            check(
                "oracle", relative(truth.end_point(), target), "≤ 1e-3", gate,
                "basis pursuit recovers a* (what follows is judged only if it does)",
            ),
            check(
                "P2-CS1 t1", float(np.median(others)), "50 … 150 steps",
                50 <= np.median(others) <= 150,
                f"train error ≤ 1e-3, median of 16 instances: {min(others):.0f} to "
                f"{max(others):.0f} steps; this one {t1['subgradient']:.1f}",
            ),
            check(
                "P2-CS1 t1", t1["projected"], "≤ 1 step", t1["projected"] <= 1,
                "projected descent fits at its first step",
            ),
            check(
                "P2-CS1 t2", t2["subgradient"] / expected, "1/3 … 3",
                gate and 1 / 3 <= t2["subgradient"] / expected <= 3,
                "recovery ≤ 1e-2 against t₁ + ‖â − a*‖_∞/(αβ)",
            ),
            check(
                "P2-CS1 t2", spread([t2[k] for k in paths]), "≤ 2e-02",
                gate and spread([t2[k] for k in paths]) <= 0.02,
                "the methods and the flow agree in t₂",
            ),
        ]  # fmt: skip
        if not gate:
            checks = [dataclasses.replace(c, ok=None) for c in checks]
        settled = np.abs(traces["flow"].a[-1] - traces["flow"].a[-2]).max() < 1e-9
        off = {k: relative(one.a[-1], lasso) for k, one in traces.items()}
        for name in ("flow", "proximal"):
            row = below("P2-CS1 end", off[name], 1e-5, f"{name} ends at the LASSO")
            checks.append(row if settled else dataclasses.replace(row, ok=None))
        plateau = relative(truth.features @ lasso, truth.targets)
        fit = traces["flow"].train[-1] / plateau
        checks.append(
            check(
                "P2-CS1 fit",
                fit,
                "1 ± 0.1",
                abs(fit - 1) <= 0.1 if settled else None,
                "train error at the end over that of the LASSO, ∝ β",
            )  # fmt: skip
        )
        ratio = traces["flow"].ratio
        first = np.flatnonzero(ratio[1:] >= 0.9)
        crossing = float(traces["flow"].steps[1 + first[0]]) if first.size else np.nan
        checks.append(
            check(
                "P2-CS1 ratio",
                crossing / t1["flow"],
                "0.5 … 10",
                0.5 <= crossing / t1["flow"] <= 10,
                "β‖H‖/‖G‖ first reaches 0.9, in units of t₁",
            )  # fmt: skip
        )
        checks += self.order(task)
        timing = self.timing(task)
        checks.append(
            check(
                "P2-CS1 speed",
                timing["ratio"],
                "≥ 100",
                timing["ratio"] >= 100,
                f"flow to t = {end:g} (error {timing['flow_error']:.1g}) against "
                f"{self.steps:.0e} steps of NumPy (error "
                f"{timing['descent_error']:.1g})"
                + (" (extrapolated from a tenth)" if self.quick else ""),
            )  # fmt: skip
        )
        numbers = {
            "t1": t1,
            "t2": t2,
            "t2_heuristic": expected,
            "end_against_lasso": off,
            "lasso_bias": floor,
            "final_recovery": {k: one.test[-1] for k, one in traces.items()},
            "l1": {
                "target": np.abs(target).sum(),
                **{k: v.l1[-1] for k, v in traces.items()},
            },
            "timing": timing,
        }
        times = {"$t_1$": t1["flow"], "$t_2$": t2["flow"], "heuristic": expected}
        figure = story(traces, target, times, "P2-CS1")
        return Outcome(numbers, checks, dataset(traces), {"story": figure})

    def order(self, task: gf.tasks.Task) -> list[Row]:
        """The flow and ISTA, in sup norm, as α falls."""
        alphas = self.alpha / 2.0 ** np.arange(2, 5 if self.quick else 7)
        end = self.steps * self.alpha / (10 if self.quick else 1)
        numbers = gf.log_spaced_steps(round(end / self.alpha), 129)
        exact = flow(task, self.beta, self.alpha * numbers, 1e-9)
        errors = []
        for alpha in bar(alphas, "order in α"):
            path = gf.descent(
                task.flow,
                task.model,
                weight_decay=self.beta,
                learning_rate=alpha,
                at=numbers * round(self.alpha / alpha),
                method="proximal",
            )
            away = np.asarray(path.params.weights - exact.params.weights)
            errors.append(np.abs(away).max())
        slope = law(alphas, errors)
        words = ", ".join(f"{e:.2g}" for e in errors)
        what = f"sup |ISTA − flow| against α: {words} at α = {alphas[0]:g}/2ᵏ"
        return [slope_row("P2-CS1 order", slope, 1.0, 0.1, what)]

    def timing(self, task: gf.tasks.Task) -> dict[str, float]:
        truth = task.truth
        loop = subgradient_loop(
            np.asarray(truth.features),
            np.asarray(truth.targets),
            np.asarray(truth.target),
            np.asarray(task.model.weights),
            alpha=self.alpha,
            beta=self.beta,
            steps=self.steps // (10 if self.quick else 1),
        )
        numpy = loop.seconds * (10 if self.quick else 1)
        at = gf.log_spaced_steps(self.steps)
        ts = jnp.asarray(self.alpha * at)
        run = functools.partial(
            gf.simulate, task.flow, task.model, weight_decay=self.beta, ts=ts,
            rtol=self.timed_rtol,
        )  # fmt: skip
        path, first, again = timed(run)
        descend = functools.partial(
            gf.descent, task.flow, task.model, weight_decay=self.beta,
            learning_rate=self.alpha, at=at,
        )  # fmt: skip
        descended, _, ours = timed(descend)
        exact = flow(task, self.beta, ts, 1e-9).params.weights
        away = lambda path: float(jnp.abs(path.params.weights - exact).max())
        errors = {"flow": away(path), "descent": away(descended)}
        steps = int(path.stats["steps"])
        print(
            f"NumPy loop {numpy:.3g} s; descent {ours:.3g} s; flow {again:.3g} s "
            f"({first:.3g} s with compilation, {steps} steps); largest errors along "
            f"the path: {errors['descent']:.1g} of the loop and descent, "
            f"{errors['flow']:.1g} of the flow"
        )
        return {
            "numpy_seconds": numpy,
            "flow_seconds": again,
            "flow_first_seconds": first,
            "descent_seconds": ours,
            "flow_error": errors["flow"],
            "descent_error": errors["descent"],
            "ratio": numpy / again,
            "descent_ratio": numpy / ours,
        }


@dataclasses.dataclass(frozen=True)
class CS2(Settings):
    """Figures 4 and 26: t₂ ∝ 1/(αβ), t₁ ∝ 1/α, and the floor, which is ∝ β."""

    features: int = 100
    sparsity: int = 5
    samples: int = 30
    zeta: float = 1e-6
    alphas: tuple[float, ...] = (0.005, 0.01, 0.0275, 0.055, 0.0825, 0.1)
    betas: tuple[float, ...] = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    """The paper's, and 1e-7."""
    threshold: float = 1e-2
    """Of the recovery error, for t₂; judged where the LASSO is below a third of it."""
    max_steps: int = 15 * 10**7
    """Pairs (α, β) that would take longer are left out, and named."""

    def run(self) -> Outcome:
        task = gf.tasks.sparse_recovery(
            jr.key(self.seed),
            features=self.features,
            sparsity=self.sparsity,
            samples=self.samples,
            scale=self.zeta,
        )
        truth = task.truth
        gate = truth.recovers_target()
        target = np.asarray(truth.target)
        most = self.max_steps // (20 if self.quick else 1)
        metric = dataclasses.replace(task.metrics["test"], threshold=self.threshold)
        task = dataclasses.replace(task, metrics={**task.metrics, "test": metric})
        betas = np.array(self.betas)
        bias = np.array([relative(truth.lasso(b), target) for b in betas])
        judged = bias < self.threshold / 3

        more = np.sort(np.append(betas, [1e-8, 1e-9]))
        flows = [self.flow(task, beta) for beta in bar(more, "flows")]
        flow_t2 = np.array([p.crossing_time("test") for p in flows])
        flow_floor = np.array([float(p.metrics["test"][-1]) for p in flows])
        slow = flow_t2 * more
        s2 = float(np.nanmin(slow))

        rows, left_out = [], []
        pairs = [(a, float(b)) for b in betas for a in self.alphas]
        for alpha, beta in bar(pairs, "descents"):
            length = max(1.25 * s2 / (alpha * beta), 3e3 / alpha)
            if length > most:
                left_out.append((alpha, beta))
                continue
            path = gf.descent(
                task.flow,
                task.model,
                weight_decay=beta,
                learning_rate=alpha,
                at=steps_until(round(length), 257),
                metrics=task.metrics,
            )
            t2 = path.crossing_time("test") / alpha
            rows.append((alpha, beta, t2, float(path.metrics["test"][-1])))
        alpha, beta, t2, last = np.array(rows).T
        good = np.isfinite(t2) & np.isin(beta, betas[judged])
        product = (alpha * beta)[good]
        constant = (t2 * alpha * beta)[good]
        slope = law(product, t2[good])
        if left_out:
            print(f"left out, above {most:.1e} steps: {left_out}")

        checks = [
            check(
                "oracle", relative(truth.end_point(), target), "≤ 1e-6", gate,
                "basis pursuit recovers a*",
            ),
            slope_row(
                "P2-CS2 law", slope, -1.0, 0.05,
                f"log t₂ on log αβ, {good.sum()} descents over "
                f"{decades(product):.1f} decades",
            ),
            check(
                "P2-CS2 law", decades(product), "≥ 4",
                None if self.quick else decades(product) >= 4,
                "decades of αβ that the law is fitted to",
            ),
            check(
                "P2-CS2 t2αβ", spread(constant), "≤ 5e-02", spread(constant) <= 0.05,
                f"t₂αβ is constant, {np.exp(np.log(constant).mean()):.4g} "
                f"(heuristic {heuristic(truth):.4g})",
            ),
        ]  # fmt: skip
        with_bias = np.array([relative(truth.lasso(b), target) for b in more])
        ok = with_bias < self.threshold / 3
        checks.append(
            slope_row(
                "P2-CS2 flow",
                law(more[ok], flow_t2[ok]),
                -1.0,
                0.05,
                f"the same of flows, log t₂ on log β, {decades(more[ok]):.1f} decades",
            )  # fmt: skip
        )
        small = with_bias < 0.1
        checks += [
            slope_row(
                "P2-CS2 floor", law(more[small], flow_floor[small]), 1.0, 0.05,
                "final recovery error of flows against β",
            ),
            below(
                "P2-CS2 floor", spread2(flow_floor, with_bias), 0.1,
                "it is the LASSO's own error, at every β",
            ),
        ]  # fmt: skip
        checks += self.memorisation(task)
        checks += self.oscillation(task)
        fig = self.figure(rows, more, flow_floor, with_bias, s2)
        numbers = {
            "t2_alpha_beta": constant,
            "slow_t2_of_flows": slow,
            "heuristic": heuristic(truth),
            "floors": flow_floor,
            "lasso_bias": with_bias,
            "left_out": left_out,
        }
        data = xr.Dataset(
            {
                "t2": ("descent", t2),
                "last_error": ("descent", last),
                "alpha": ("descent", alpha),
                "beta": ("descent", beta),
                "flow_t2": ("flow", flow_t2),
                "flow_floor": ("flow", flow_floor),
                "lasso_bias": ("flow", with_bias),
                "flow_beta": ("flow", more),
            }
        )
        if not gate:
            checks = [checks[0]] + [dataclasses.replace(c, ok=None) for c in checks[1:]]
        return Outcome(numbers, checks, data, {"law": fig})

    def flow(self, task: gf.tasks.Task, beta: float) -> gf.Path:
        return flow(task, beta, flow_times(20.0 / beta, 257), 1e-7)

    def memorisation(self, task: gf.tasks.Task) -> list[Row]:
        """t₁ against α and β: descents of 200 time units, every step kept."""
        found = {}
        alphas, betas = self.alphas[-3:], (1e-8, 1e-7, 1e-6, 1e-5)
        for alpha in alphas:
            for beta in betas:
                path = gf.descent(
                    task.flow,
                    task.model,
                    weight_decay=beta,
                    learning_rate=alpha,
                    at=np.arange(round(40 / alpha)),
                    metrics={"train": task.metrics["train"]},
                )
                found[alpha, beta] = path.crossing_time("train") / alpha
        change = max(
            max(found[a, b] for b in betas) / min(found[a, b] for b in betas) - 1
            for a in alphas
        )
        slope = law(alphas, [found[a, betas[-1]] for a in alphas])
        return [
            below("P2-CS2 t1", change, 0.1, "change of t₁ over three decades of β"),
            slope_row("P2-CS2 t1", slope, -1.0, 0.05, "log t₁ on log α"),
        ]

    def oscillation(self, task: gf.tasks.Task) -> list[Row]:
        """Beside the LASSO's, the error of subgradient descent has a part ∝ αβ, which
        soft thresholding has not."""
        beta, alphas = 1e-4, np.array(self.alphas[2:])
        lasso = task.truth.lasso(beta)
        away: dict[str, list[float]] = {"subgradient": [], "proximal": []}
        for method, found in away.items():
            for alpha in alphas:
                path = gf.descent(
                    task.flow,
                    task.model,
                    weight_decay=beta,
                    learning_rate=alpha,
                    at=np.arange(*round(20.0 / (alpha * beta)) + np.array([-64, 1])),
                    method=method,
                )
                apart = np.abs(np.asarray(path.params.weights - lasso))
                found.append(float(apart.max()))
        slope = law(alphas, away["subgradient"])
        largest = max(away["proximal"])
        return [
            slope_row(
                "P2-CS2 band", slope, 1.0, 0.2,
                f"sup |a − LASSO| of subgradient descent at rest on α (β = {beta})",
            ),
            below("P2-CS2 band", largest, 1e-9, "the same of soft thresholding"),
        ]  # fmt: skip

    def figure(self, rows, more, floors, bias, s2) -> Any:
        fig, axes = panels(2)
        alpha, beta, t2, last = np.array(rows).T
        for a, colour in zip(self.alphas, COLOURS, strict=False):
            on = alpha == a
            axes[0].plot(
                (alpha * beta)[on], t2[on], "o", color=colour, label=f"α = {a}"
            )
            axes[1].plot(beta[on], last[on], "o", color=colour, ms=4)
        span = np.geomspace((alpha * beta).min(), 1e-4, 9)
        axes[0].plot(span, s2 / span, "k--", lw=1, label="flow: constant/(αβ)")
        axes[1].plot(more, floors, "k-", lw=1, label="flow")
        axes[1].plot(more, bias, "r:", lw=2, label="LASSO")
        finish(axes[0], "P2-CS2: steps to recovery", "$\\alpha\\beta$", "$t_2$")
        finish(axes[1], "last recovery error", "$\\beta$")
        return fig


def spread2(a: np.ndarray, b: np.ndarray) -> float:
    """max |a/b − 1|."""
    return float(np.abs(np.asarray(a) / np.asarray(b) - 1).max())


EXPERIMENTS = {"cs1": CS1, "cs2": CS2}
