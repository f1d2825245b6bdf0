"""Laws of the free norm: how long grokking takes while weight decay shrinks it."""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, PyTree
from matplotlib.figure import Figure

import gradflow as gf

from ..shared.figures import COLOURS, finish, panels
from ..shared.record import table
from ..shared.rows import check, law, Row
from .common import (
    adam,
    at_level,
    contraction,
    from_limit,
    Law,
    lone,
    NETWORKS,
    size_at,
)


class Delay(NamedTuple):
    """What a run tells of its delay."""

    memorised: float
    delay: float
    """T_grok − T_mem."""
    log_ratio: float
    """½ ln(V_mem/V_grok)."""

    @classmethod
    def of(cls, path: gf.Path) -> "Delay":
        """NaN where it does not memorise, or not generalise after that."""
        memorised, grokked = path.crossing_time("train"), path.crossing_time("test")
        if not grokked > memorised:
            return cls(memorised, np.nan, np.nan)
        ratio = size_at(path, memorised) / size_at(path, grokked)
        return cls(memorised, grokked - memorised, np.log(ratio) / 2)


def slow_crossing(drift: gf.manifold.Drift, test: gf.Metric) -> float:
    """The slow time at which the test metric of a drift passes its threshold for good;
    NaN where it does not, or did at the start."""
    s = gf.crossing_time(np.asarray(drift.s), np.asarray(drift.metrics["test"]), test)
    return s if s > 0 else np.nan


@dataclasses.dataclass(frozen=True)
class NormDelay(Law):
    """Norm-separation delay: T_grok − T_mem = Θ(ln(V_mem/V_grok)/λ), V = ‖θ‖²; along
    the drift it is (1/2λ) ∫ d ln V/κ, with κ = ‖Pθ̂‖² the part of θ that is tangent.

    (arXiv 2603.13331; the integral is exact for the drift, as d ln V/ds = −2κ.) Of
    flows of diagonal and tanh networks, from several starts. Refuted, for a kind of
    network: the integral, by a delay 2 % off it at the least λ; the bound from below,
    by a delay 1 % less than ln(V_mem/V_grok)/2λ; that of above, of any use if Θ has one
    constant, by delays whose λT/½ln(V_mem/V_grok) differ by more than twice between
    starts, or, as the test threshold falls from 50 % to 1 % of the loss of f = 0, on
    the same path.

    No files. Time: half a minute of a core.
    """

    scales: tuple[float, ...] = (0.7, 1.0, 1.5)
    """Of the initial weights, relative to the usual one."""
    lams: tuple[float, ...] = (1e-3, 1e-4, 1e-5)
    """Weight decays λ."""
    levels: tuple[float, ...] = (5.0, 2.0, 1.0, 0.5, 0.2, 0.1)
    """Test thresholds, relative to the usual one of 10 % of the loss of f = 0."""
    slow_time: float = 5.0
    """How far to run, s = λt."""

    QUICK = dict(seeds=2, scales=(1.0, 1.5))

    def compute(self) -> xr.Dataset:
        axes = dict(network=list(NETWORKS), seed=self.each_seed(), scale=self.scales)
        data = table(axes, self.cell, "starts")
        dims = {"level": list(self.levels), "lam": list(self.lams)}
        names = {f"{k}_0": "level" for k in ("slow", "drift_ratio", "integral")}
        names |= {f"{k}_0": "lam" for k in ("delay", "ratio", "expected")}
        return data.rename(names).assign_coords(dims)

    def cell(self, network: str, seed: int, scale: float) -> dict[str, Any]:
        task = NETWORKS[network](seed, scale)
        drift = from_limit(task, self.slow_time)
        falls = contraction(task.flow, drift)
        slow = [slow_crossing(drift, at_level(task, level)) for level in self.levels]
        sweep = gf.sweep(
            task.flow, task.model, weight_decay=self.lams, slow_time=self.slow_time,
            metrics=task.metrics, progress=False,
        )  # fmt: skip
        found = [Delay.of(path) for path in sweep]
        end = slow_crossing(drift, task.metrics["test"])
        begin = [lam * run.memorised for lam, run in zip(self.lams, found, strict=True)]
        return dict(
            slow=slow,
            drift_ratio=[falls.log_ratio(s) for s in slow],
            integral=[falls.until(s) for s in slow],
            delay=[run.delay for run in found],
            ratio=[run.log_ratio for run in found],
            expected=[falls.until(end) - falls.until(s) for s in begin],
        )

    def controls(self, data: xr.Dataset) -> list[Row]:
        off = lone(np.abs(data.integral / data.slow - 1))
        sentence = "the integral along a drift, over the slow time it takes, less 1"
        return [check("identity", off.max(), "≤ 0.001", sentence, given=off.size)]

    def claims(self, data: xr.Dataset) -> list[Row]:
        return [row for one in data.network.values for row in self.of(data, str(one))]

    def of(self, data: xr.Dataset, network: str) -> list[Row]:
        data = data.sel(network=network)
        last = data.isel(lam=-1)
        lam = float(last.lam)
        off = lone(np.abs(lam * last.delay / last.expected - 1))
        times = lone(lam * last.delay / last.ratio)
        tight = (data.slow / data.drift_ratio).isel(level=[0, -1])
        grows = lone(tight[..., -1] / tight[..., 0])
        least = f"{times.size} starts, λ = {lam:g}"
        return [
            check(f"{network}: integral", off.max(), "≤ 0.02",
                  f"{least}: λT off the integral along the drift, at most"),
            check(f"{network}: lower", times.min(), "≥ 0.99",
                  f"{least}: λT over ½ ln(V_mem/V_grok), at least"),
            check(f"{network}: one constant", times.max() / times.min(), "≤ 2",
                  f"{least}: the same, largest over least"),
            check(f"{network}: any threshold", np.median(grows), "≤ 2",
                  "s over ½ ln(V(0)/V), for a test threshold of "
                  f"{10 * self.levels[-1]:g} % over that for "
                  f"{10 * self.levels[0]:g} %, median of {grows.size}"),
        ]  # fmt: skip

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        fig, axes = panels(2)
        for name, colour in zip(data.network.values, COLOURS, strict=False):
            one = data.sel(network=name)
            last = one.isel(lam=-1)
            measured = float(last.lam) * last.delay.values.ravel()
            axes[0].plot(
                last.ratio.values.ravel(), measured, "o", color=colour, mfc="none",
                label=rf"{name}: $\frac{{1}}{{2}}\ln(V_{{mem}}/V_{{grok}})$",
            )  # fmt: skip
            axes[0].plot(
                last.expected.values.ravel(), measured, ".", color=colour,
                label=rf"{name}: $\frac{{1}}{{2}}\int d\ln V/\kappa$",
            )  # fmt: skip
            times = (one.slow / one.drift_ratio).values.reshape(-1, data.sizes["level"])
            for i, line in enumerate(times):
                label = str(name) if i == 0 else None
                axes[1].plot(10 * one.level, line, "-", color=colour, lw=1, label=label)
        axes[0].axline((1.0, 1.0), slope=1, color="grey", lw=0.8)
        finish(axes[0], "delay of the flow, measured", "predicted", r"$\lambda T$")
        finish(
            axes[1], "what Θ would have constant", "test threshold, % of that of f = 0",
            r"$s\,/\,\frac{1}{2}\ln(V(0)/V)$",
        )  # fmt: skip
        return {"delay": fig}


ADAM = {"flow": None, "AdamW": 1e-8, "AdamW, ε = 1": 1.0}
"""The flow, and ε of AdamW: with ε = 1, far above all gradients, it is gradient descent
with momentum."""


@dataclasses.dataclass(frozen=True)
class Constant(Law):
    """First passage: T_grok − T_mem = ln(V_mem/V_grok)/(2κ_LL λ) with one fitted
    constant κ_LL, which is the harmonic mean of κ = ‖Pθ̂‖², weighted by ln V, along the
    drift: predicted from the network at T_mem, not fitted.

    (arXiv 2605.18845, for AdamW, with a fit of an error of 18 to 23 %.) Refuted, for a
    kind of network and an optimiser, by a median of |fitted/predicted − 1| above 2 %
    for the flow, 10 % for AdamW. Beside it, for AdamW: with the projection that is
    orthogonal in the metric of Adam's own rates, 1/(√v + ε), frozen just after T_mem.

    No files. Time: a minute of a core; quick, half of one.
    """

    slow_time: float = 4.0
    """How far to run, s = λt."""

    QUICK = dict(seeds=2)

    def compute(self) -> xr.Dataset:
        axes = dict(network=list(NETWORKS), optimiser=list(ADAM), seed=self.each_seed())
        return table(axes, self.cell, "runs")

    def cell(self, network: str, optimiser: str, seed: int) -> dict[str, Any]:
        task, eps = NETWORKS[network](seed), ADAM[optimiser]
        options: dict[str, Any] = dict(metrics=task.metrics)
        frozen = task.flow
        if eps is None:
            lam = 1e-5
            path = gf.simulate(
                task.flow, task.model, weight_decay=lam, slow_time=self.slow_time,
                saves=257, **options,
            )  # fmt: skip
        else:
            # In time t Adam's steps are of size 1, gradient descent's of the gradient.
            lam, rate = (3e-2, 1e-3) if eps < 1 else (1e-3, 1e-2)
            options |= dict(weight_decay=lam, learning_rate=rate, method="decoupled")
            options |= dict(optimiser=adam(eps))
            steps = int(self.slow_time / (lam * rate))
            at = gf.log_spaced_steps(steps, 1000)
            path = gf.descent(task.flow, task.model, at=at, **options)
        run = Delay.of(path)
        names = ("fitted", "predicted", "frozen", "slow")
        nothing: dict[str, Any] = dict.fromkeys(names, np.nan)
        if not np.isfinite(run.delay):
            return nothing
        i = int(np.searchsorted(np.asarray(path.t), run.memorised))
        if eps is not None:
            first = int(np.asarray(path.t)[i] / rate)
            steps = np.arange(first, first + 1000)
            after = gf.descent(task.flow, task.model, at=steps, **options)
            frozen = in_metric_of(after, task.flow, eps)
        mine = self.along(task, task.flow, path[i])
        return dict(
            fitted=run.log_ratio / (lam * run.delay),
            predicted=mine,
            frozen=mine if eps is None else self.along(task, frozen, path[i]),
            slow=lam * run.delay,
        )

    def along(self, task: gf.tasks.Task, flow: gf.GradientFlow, model: PyTree) -> float:
        """The constant of the drift from `model`, up to the threshold; NaN where the
        drift does not pass it."""
        drift = gf.manifold.riemannian_flow(
            flow, model, slow_time=2 * self.slow_time, metrics=task.metrics, rtol=1e-7,
            throw=False,
        )  # fmt: skip
        end = slow_crossing(drift, task.metrics["test"])
        return contraction(flow, drift).constant(end) if np.isfinite(end) else np.nan

    def claims(self, data: xr.Dataset) -> list[Row]:
        return [self.row(data, data.predicted, one) for one in self.cases(data)]

    def rivals(self, data: xr.Dataset) -> list[Row]:
        adams = [one for one in self.cases(data) if one[1] != "flow"]
        return [self.row(data, data.frozen, one, ", Adam's metric") for one in adams]

    def cases(self, data: xr.Dataset) -> list[tuple[str, str]]:
        return [(str(n), str(o)) for n in data.network.values
                for o in data.optimiser.values]  # fmt: skip

    def row(
        self, data: xr.Dataset, predicted: xr.DataArray, case: tuple[str, str],
        more: str = "",
    ) -> Row:  # fmt: skip
        here = dict(network=case[0], optimiser=case[1])
        off = lone(np.abs(data.fitted / predicted - 1).sel(here))
        grokked = int(np.isfinite(data.fitted.sel(here)).sum())
        bound = "≤ 0.02" if case[1] == "flow" else "≤ 0.1"
        sentence = (
            f"fitted κ off the predicted, median of {off.size} of {grokked} that "
        )
        sentence += "generalise"
        if off.size:
            sentence += f"; at most {off.max():.3g}"
        median = np.median(off) if off.size else np.nan
        name = f"{case[0]}, {case[1]}{more}"
        return check(name, median, bound, sentence, given=grokked, also=off.size)

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        fig, axes = panels(2)
        for ax, name in zip(axes, data.network.values, strict=True):
            for optimiser, colour in zip(data.optimiser.values, COLOURS, strict=False):
                one = data.sel(network=name, optimiser=optimiser)
                ax.plot(one.predicted, one.fitted, "o", color=colour, label=optimiser)
                if optimiser != "flow":
                    ax.plot(one.frozen, one.fitted, "x", color=colour)
            ax.axline((0.5, 0.5), slope=1, color="grey", lw=0.8)
            title = f"{name} (crosses: in Adam's metric)"
            finish(ax, title, r"$\kappa$ predicted", r"$\kappa$ fitted")
        return {"constant": fig}


def in_metric_of(path: gf.Path, flow: gf.GradientFlow, eps: float) -> gf.GradientFlow:
    """The flow whose drift is that of decoupled decay under the rates G = 1/(√v + ε),
    v the mean square of the gradients along the path: w' = −P G∇R with R = ½ wᵀG⁻¹w."""
    rates = _rates(path.params, path.static, flow.loss, jnp.asarray(eps))
    weights = jax.tree.map(lambda rate: 1 / rate, rates)
    return gf.GradientFlow(
        flow.loss, rates=rates, penalty=gf.Quadratic(weights=weights)
    )


@eqx.filter_jit
def _rates(params: PyTree, static: PyTree, loss: gf.AbstractLoss, eps: Array) -> PyTree:
    """Of geometric mean 1."""
    force = jax.vmap(jax.grad(lambda p: loss(eqx.combine(p, static))))(params)
    each = jax.tree.map(lambda g: 1 / (jnp.sqrt(jnp.mean(g**2, axis=0)) + eps), force)
    leaves = jnp.concatenate([jnp.log(x).ravel() for x in jax.tree.leaves(each)])
    return jax.tree.map(lambda x: x / jnp.exp(jnp.mean(leaves)), each)


@dataclasses.dataclass(frozen=True)
class Exponent(Law):
    """T_grok ∝ λ^−0.757, where two-phase theory has a local exponent that tends to 1 as
    λ → 0.

    (arXiv 2605.20441: 0.757, in 0.725 … 0.799, from four λ in 0.1 … 2 of AdamW.)
    Refuted, for a kind of network and an optimiser, by an exponent, fitted to all
    λ of the flow and to the paper's range of AdamW, median of the seeds, outside of
    that interval. The rival is refuted by a local exponent that is not 1 ± 0.05 between
    the two least λ. For information: the λ at which the local exponent is nearest to
    0.757.

    No files. Time: a minute of a core; quick, a quarter of one.
    """

    lams: tuple[float, ...] = tuple(np.geomspace(1.0, 1e-7, 15).tolist())
    """Weight decays λ of the flow."""
    decays: tuple[float, ...] = (2.0, 1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
    """And of AdamW, at a learning rate of 10⁻³; the first five span the paper's."""
    slow_time: float = 4.0
    """How far to run, s = λt."""

    QUICK = dict(seeds=2, lams=tuple(np.geomspace(1.0, 1e-6, 9).tolist()))

    def compute(self) -> xr.Dataset:
        axes = dict(network=list(NETWORKS), seed=self.each_seed())
        data = table(axes, self.cell, "runs")
        dims = {"lam": list(self.lams), "decay": list(self.decays)}
        names = {"flow_0": "lam", "adam_0": "decay"}
        return data.rename(names).assign_coords(dims)

    def cell(self, network: str, seed: int) -> dict[str, Any]:
        task = NETWORKS[network](seed)
        options: dict[str, Any] = dict(metrics=task.metrics, progress=False)
        flows = gf.sweep(
            task.flow, task.model, weight_decay=self.lams, slow_time=self.slow_time,
            **options,
        )  # fmt: skip
        adams = []
        for decay in self.decays:
            steps = int(self.slow_time / (decay * 1e-3))
            run = gf.descent(
                task.flow, task.model, weight_decay=decay, learning_rate=1e-3,
                at=gf.log_spaced_steps(steps, 400), method="decoupled",
                optimiser=adam(1e-8), metrics=task.metrics, throw=False,
            )  # fmt: skip
            adams.append(run.crossing_time("test"))
        return dict(flow=[path.crossing_time("test") for path in flows], adam=adams)

    def series(self, data: xr.Dataset) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """λ, from the largest, and T of each seed: by network and optimiser, of those
        that generalise."""
        both = (("flow", "lam", "flow"), ("adam", "decay", "AdamW"))
        found = {
            f"{name}, {words}": (data[axis].values, data[key].sel(network=name).values)
            for name in data.network.values
            for key, axis, words in both
        }
        return {k: v for k, v in found.items() if np.isfinite(v[1]).any()}

    def claims(self, data: xr.Dataset) -> list[Row]:
        rows = []
        for name, (lams, times) in self.series(data).items():
            near = lams >= 0.1 if name.endswith("AdamW") else lams > 0
            fits = lone([-law(lams[near], each[near]) for each in times])
            fit = np.median(fits) if fits.size else np.nan
            sentence = f"exponent of 1/λ in T, median of {fits.size} seeds"
            if fits.size:
                sentence += f" ({fits.min():.3g} … {fits.max():.3g})"
            rows.append(check(name, fit, "0.725 … 0.799", sentence, given=fits.size))
        return rows

    def rivals(self, data: xr.Dataset) -> list[Row]:
        rows = []
        for name, (lams, times) in self.series(data).items():
            local = local_exponents(lams, times)
            last = lone(local[:, -1])
            value = np.median(last) if last.size else np.nan
            sentence = f"local exponent at λ = {lams[-1]:.1g}, median of {last.size}"
            rows.append(check(f"{name}: local", value, "1 ± 0.05", sentence,
                              given=last.size))  # fmt: skip
            columns = [lone(column) for column in local.T]
            mean = np.array([np.median(c) if c.size else np.nan for c in columns])
            if np.isfinite(mean).any():
                i = int(np.nanargmin(np.abs(mean - 0.757)))
                sentence = f"local exponent nearest to 0.757, at λ = {lams[i]:.2g}"
                rows.append(check(f"{name}: nearest", mean[i], "", sentence))
        return rows

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        fig, axes = panels(2)
        for (name, (lams, times)), colour in zip(
            self.series(data).items(), COLOURS, strict=False
        ):
            middle = np.sqrt(lams[1:] * lams[:-1])
            for i, (each, local) in enumerate(
                zip(times, local_exponents(lams, times), strict=True)
            ):
                label = name if i == 0 else None
                axes[0].plot(lams, each, ".-", color=colour, lw=1, label=label)
                axes[1].plot(middle, local, ".-", color=colour, lw=1)
        axes[1].axhline(0.757, color="grey", ls="--", lw=1, label="0.757")
        axes[1].axhline(1, color="black", ls=":", lw=1, label="1: slow time")
        axes[1].set_ylim(0.5, 1.5)
        finish(axes[0], "grokking time", r"$\lambda$", r"$T$")
        finish(axes[1], r"local exponent of $1/\lambda$", r"$\lambda$", log="x")
        return {"exponent": fig}


def local_exponents(lams: np.ndarray, times: np.ndarray) -> np.ndarray:
    """−d ln T/d ln λ between neighbours, for each row; NaN where one has no time."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.diff(np.log(times), axis=1) / np.diff(np.log(lams))


EXPERIMENTS = {"delay": NormDelay, "constant": Constant, "exponent": Exponent}
