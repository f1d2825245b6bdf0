"""Laws of the held norm: how long grokking takes on a sphere ‖θ‖ = ρW_c, without decay.

The networks are linear in their inputs and homogeneous of degree L in their weights,
f(x) = ⟨β(θ), x⟩, β(ρθ) = ρ^L β(θ); they learn the signs of a sparse teacher. W_c is the
norm at which the same network generalises under weight decay.
"""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import xarray as xr
from jaxtyping import Array, Float, PyTree, Scalar
from matplotlib.figure import Figure

import gradflow as gf

from ..shared.figures import COLOURS, finish, panels
from ..shared.record import table
from ..shared.rows import check, Row, spread
from .common import Law, lone

DEPTHS = {"depth 2": 2, "depth 3": 3}
"""β = u ⊙ u − v ⊙ v, and the product of three vectors."""


class Angle(eqx.Module):
    """The share of Gaussian inputs whose sign is wrong: the angle of β to β*, by π."""

    target: Float[Array, " d"]

    def __call__(self, model: PyTree) -> Scalar:
        beta = model.beta
        size = jnp.linalg.norm(beta) * jnp.linalg.norm(self.target)
        return jnp.arccos(jnp.clip(jnp.dot(beta, self.target) / size, -1, 1)) / jnp.pi


class Signs(NamedTuple):
    """A network that is to learn the signs of ⟨β*, x⟩."""

    x: Float[Array, "n d"]
    labels: Float[Array, " n"]
    model: PyTree
    test: gf.Metric

    def loss(self, temperature: float = 1.0, squared: bool = False) -> gf.AbstractLoss:
        """Of outputs over a temperature: the logistic loss, or the squared error of
        outputs that are to be ±1."""
        x = self.x / temperature
        if squared:
            return gf.SquaredError(x, 2 * self.labels - 1)
        return gf.Logistic(x, self.labels)

    @property
    def norm(self) -> float:
        return float(optax.tree.norm(eqx.filter(self.model, eqx.is_inexact_array)))

    def held(self, norm: float, loss: gf.AbstractLoss, latest: float) -> gf.Path:
        """The flow at a held norm, until it generalises."""
        return gf.simulate(
            gf.GradientFlow(loss, hold_norm=True), self.model, weight_decay=0.0,
            init_scale=norm / self.norm, t1=latest, until="test",
            metrics={"test": self.test}, throw=False, max_steps=2000,
        )  # fmt: skip

    def critical_norm(self) -> float:
        """W_c, under λ = 10⁻³; NaN where it does not generalise."""
        path = gf.simulate(
            gf.GradientFlow(self.loss()), self.model, weight_decay=1e-3, slow_time=12.0,
            until="test", metrics={"test": self.test}, throw=False,
        )  # fmt: skip
        found = bool(path.met) and path.crossing_time("test") > 0
        return float(np.sqrt(2 * path.penalty[-1])) if found else np.nan


def signs(seed: int, depth: int) -> Signs:
    """2 of 40 coefficients, ±1, from 60 samples; a tenth may be wrong at the end."""
    x_key, *keys = jr.split(jr.key(seed), 4)
    x = jr.normal(x_key, (60, 40))
    target = jnp.zeros(40).at[:2].set(jnp.array([1.0, -1.0]))
    if depth == 2:
        u, v = (1 + 0.1 * jr.normal(key, (40,)) for key in keys[:2])
        model = gf.models.DifferenceNetwork(u, v)
    else:
        model = gf.models.HadamardProduct(jr.normal(keys[2], (depth, 40)))
    labels = (x @ target > 0).astype(x.dtype)
    return Signs(x, labels, model, gf.Metric(Angle(target), threshold=0.1))


def explained(y: np.ndarray, *columns: np.ndarray) -> float:
    """R² of y by a linear model of the columns; NaN of fewer than two points more."""
    matrix = np.stack([np.ones_like(y), *columns], axis=1)
    if len(y) < matrix.shape[1] + 2:
        return np.nan
    rest = y - matrix @ np.linalg.lstsq(matrix, y, rcond=None)[0]
    return float(1 - rest.var() / y.var())


def bend(x: np.ndarray, y: np.ndarray) -> float:
    """The largest slope of y between neighbours over the least: 1 of a line, `inf`
    where one is not positive."""
    slopes = np.diff(y) / np.diff(x)
    if slopes.size < 2:
        return np.nan
    return float(slopes.max() / slopes.min()) if slopes.min() > 0 else np.inf


@dataclasses.dataclass(frozen=True)
class Held(Law):
    """Of both laws of the held norm."""

    degrees: tuple[int, ...] = tuple(DEPTHS.values())
    """L, 2 or 3."""

    def each_degree(self) -> list[str]:
        return [name for name, depth in DEPTHS.items() if depth in self.degrees]


@dataclasses.dataclass(frozen=True)
class Pinned(Held):
    """At a held norm ρW_c, T_grok ∝ e^{αρ}; a homogeneous network of degree L under the
    logistic loss has T ∝ e^{cρ^L} instead, to exponential accuracy, as its gradient
    falls like e^{−margin} and its margins grow like ρ^L.

    (arXiv 2606.13753: α = 7.5 with R² = 0.996, over a factor of 19 in T: ρ from 1 to
    1.4.) Of networks of degree 2 and 3. Refuted, for a degree: in the paper's range,
    by an R² of ln T by ρ below 0.99, median of the seeds; beyond it, up to 2, by a
    slope d ln T/dρ that is not constant within a factor of 1.5. The rival is refuted if
    d ln T/dρ^L is not, for ρ ≥ 1.4.

    No files. Time: two minutes of a core; quick, one.
    """

    seeds: int = 4
    """How many, from `seed` on."""
    norms: tuple[float, ...] = (1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2.0)
    """ρ, of which the first five are the paper's range."""
    latest: float = 1e15
    """The time t up to which to wait."""

    QUICK = dict(seeds=2)

    def compute(self) -> xr.Dataset:
        axes = dict(network=self.each_degree(), seed=self.each_seed())
        data = table(axes, self.cell, "runs")
        return data.rename(time_0="norm").assign_coords(norm=list(self.norms))

    def cell(self, network: str, seed: int) -> dict[str, Any]:
        task = signs(seed, DEPTHS[network])
        critical = task.critical_norm()
        times = np.full(len(self.norms), np.nan)
        for i, rho in enumerate(self.norms if np.isfinite(critical) else ()):
            path = task.held(rho * critical, task.loss(), self.latest)
            times[i] = path.crossing_time("test")
            if not times[i] > 0:  # the larger the later
                break
        return dict(critical=critical, time=times)

    def reached(
        self, data: xr.Dataset, network: str
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """ρ and ln T of every seed, up to the last ρ that generalises in time."""
        norms = data.norm.values
        times = data.time.sel(network=network).values
        good = [np.isfinite(t) & (t > 0) for t in times]
        return [(norms[g], np.log(t[g])) for t, g in zip(times, good, strict=True)]

    def claims(self, data: xr.Dataset) -> list[Row]:
        rows = []
        for name in map(str, data.network.values):
            lines = self.reached(data, name)
            near = [(x[x < 1.45], y[x < 1.45]) for x, y in lines]
            fits = lone([explained(y, x) for x, y in near])
            slopes = [np.polyfit(x, y, 1)[0] for x, y in near if len(x) > 2]
            bends = lone([bend(x, y) for x, y in lines])
            told = f"median of {fits.size} seeds"
            if slopes:
                told += f" (α = {min(slopes):.3g} … {max(slopes):.3g})"
            rows += [
                check(f"{name}: ρ ≤ 1.4", np.median(fits), "≥ 0.99",
                      f"R² of ln T by ρ, {told}", given=fits.size),
                check(f"{name}: one α", np.median(bends), "≤ 1.5",
                      f"slope of ln T in ρ, largest over least up to ρ = 2, median of "
                      f"{bends.size} seeds", given=bends.size),
            ]  # fmt: skip
        return rows

    def rivals(self, data: xr.Dataset) -> list[Row]:
        rows = []
        for name in map(str, data.network.values):
            far = [(x[x > 1.35] ** DEPTHS[name], y[x > 1.35])
                   for x, y in self.reached(data, name)]  # fmt: skip
            bends = lone([bend(x, y) for x, y in far])
            rows += [
                check(f"{name}: one slope in ρ^L", np.median(bends), "≤ 1.5",
                      "slope of ln T in ρ^L, largest over least for ρ ≥ 1.4, median "
                      f"of {bends.size} seeds", given=bends.size),
            ]  # fmt: skip
        return rows

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        fig, axes = panels(2)
        for name, colour in zip(map(str, data.network.values), COLOURS, strict=False):
            for i, (x, y) in enumerate(self.reached(data, name)):
                label = name if i == 0 else None
                axes[0].plot(x, np.exp(y), ".-", color=colour, lw=1, label=label)
                power = x ** DEPTHS[name]
                axes[1].plot(power, np.exp(y), ".-", color=colour, lw=1, label=label)
        axes[0].axvspan(1, 1.4, color="grey", alpha=0.15, label="the paper's range")
        finish(axes[0], "a line, if $T ∝ e^{αρ}$", r"held norm $\rho$", "$T$", log="y")
        finish(axes[1], r"a line, if $T ∝ e^{cρ^L}$", r"$\rho^L$", "$T$", log="y")
        return {"pinned": fig}


@dataclasses.dataclass(frozen=True)
class Logits(Held):
    """Under cross-entropy the delay depends on the held norm through the scale of the
    logits alone, σ = ρ^L/τ at an output temperature τ; under squared error not.

    (arXiv 2606.18465: R² = 0.97 of ln T by the logit scale, the norm adds 1 to 2 %;
    under squared error the scale of the outputs is pinned.) For a homogeneous network
    T = ρ² g(σ) exactly, whatever the loss: θ = ρφ has φ' = −∇ℓ(σ f(φ))/ρ². Refuted,
    for a degree: under cross-entropy, by an R² of ln T by a quadratic in ln σ below
    0.95, or by more than 0.02 that ln ρ adds; "under squared error not", by an R² of
    0.95 or more.

    No files. Time: three minutes of a core; quick, two.
    """

    seeds: int = 3
    """How many, from `seed` on."""
    norms: tuple[float, ...] = (1.0, 1.15, 1.3225)
    """ρ; the temperatures are as far apart in σ."""
    latest: float = 1e12
    """The time t up to which to wait."""

    QUICK = dict(seeds=2)

    def compute(self) -> xr.Dataset:
        axes = dict(network=self.each_degree(), seed=self.each_seed())
        data = table(axes, self.cell, "runs")
        names = {f"{k}_{i}": d for k in ("logistic", "squared", "outputs")
                 for i, d in enumerate(("norm", "cold"))}  # fmt: skip
        # The k-th temperature undoes what the k-th norm does to the logits.
        coords = dict(norm=list(self.norms), cold=list(self.norms))
        return data.rename(names).assign_coords(coords)

    def cell(self, network: str, seed: int) -> dict[str, Any]:
        depth = DEPTHS[network]
        task = signs(seed, depth)
        critical = task.critical_norm()
        shape = (len(self.norms),) * 2
        found = {k: np.full(shape, np.nan) for k in ("logistic", "squared", "outputs")}
        for i, rho in enumerate(self.norms if np.isfinite(critical) else ()):
            for k, cold in enumerate(self.norms):
                for name in ("logistic", "squared"):
                    # The norm is W_c at the first of all; σ is ρ^L/τ.
                    loss: Any = task.loss(cold**depth, squared=name == "squared")
                    path = task.held(rho * critical, loss, self.latest)
                    found[name][i, k] = path.crossing_time("test")
                    if name == "squared" and bool(path.met):
                        last = loss.outputs(path[-1])
                        found["outputs"][i, k] = float(jnp.sqrt(jnp.mean(last**2)))
        return found

    def points(
        self, data: xr.Dataset, network: str, loss: str
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """ln σ, ln ρ and ln T of every seed, of all that generalise."""
        rho, cold = np.meshgrid(data.norm, data.cold, indexing="ij")
        sigma = DEPTHS[network] * np.log(rho / cold)
        out = []
        for times in data[loss].sel(network=network).values:
            good = np.isfinite(times) & (times > 0)
            out.append((sigma[good], np.log(rho[good]), np.log(times[good])))
        return out

    def fits(self, data: xr.Dataset, network: str, loss: str) -> np.ndarray:
        """R² by σ, and by σ and ρ, of every seed."""
        each = [
            (explained(t, s, s**2), explained(t, s, s**2, r))
            for s, r, t in self.points(data, network, loss)
        ]
        return np.array([pair for pair in each if np.isfinite(pair).all()])

    def controls(self, data: xr.Dataset) -> list[Row]:
        """T/ρ² is the same wherever σ is."""
        off = [0.0]
        for name in map(str, data.network.values):
            for loss in ("logistic", "squared"):
                for s, r, t in self.points(data, name, loss):
                    same = [t[np.isclose(s, one)] - 2 * r[np.isclose(s, one)]
                            for one in np.unique(s.round(6))]  # fmt: skip
                    off += [spread(np.exp(one)) for one in same if one.size]
        sentence = "T/ρ² where ρ^L/τ is the same: off their mean, at most"
        return [check("exact", max(off), "≤ 0.01", sentence)]

    def claims(self, data: xr.Dataset) -> list[Row]:
        rows = []
        for name in map(str, data.network.values):
            fits = self.fits(data, name, "logistic")
            other = self.fits(data, name, "squared")
            pinned = lone(data.outputs.sel(network=name))
            many, few = f"median of {len(fits)} seeds", f"median of {len(other)} seeds"
            wide = spread(pinned) if pinned.size else np.nan
            by, more = np.median(fits, axis=0) if len(fits) else (np.nan, np.nan)
            alone = np.median(other[:, 0]) if len(other) else np.nan
            rows += [
                check(f"{name}: cross-entropy", by, "≥ 0.95",
                      f"R² of ln T by the logit scale, {many}", given=len(fits)),
                check(f"{name}: norm adds", more - by, "≤ 0.02",
                      f"R² that the norm adds, {many}", given=len(fits)),
                check(f"{name}: squared", alone, "< 0.95",
                      f"R² of ln T by ρ^L/τ under squared error, {few}",
                      given=len(other)),
                check(f"{name}: outputs", wide, "", "squared error: how far the rms of "
                      "the outputs at T is from its mean, at most"),
                check(f"{name}: share", pinned.size / data.outputs[0].size, "",
                      "share of the runs that generalise under squared error"),
            ]  # fmt: skip
        return rows

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        fig, axes = panels(2)
        for ax, loss in zip(axes, ("logistic", "squared"), strict=True):
            names = map(str, data.network.values)
            for name, colour in zip(names, COLOURS, strict=False):
                for i, (s, r, t) in enumerate(self.points(data, name, loss)):
                    label, order = name if i == 0 else None, np.argsort(s)
                    ax.plot(np.exp(s), np.exp(t), "o", color=colour, ms=4, mfc="none",
                            label=label)  # fmt: skip
                    by = np.exp((t - 2 * r)[order])
                    ax.plot(np.exp(s[order]), by, "x-", color=colour, ms=4, lw=0.6)
            if not np.isfinite(data[loss]).any():
                ax.text(0.5, 0.5, "none generalises", ha="center",
                        transform=ax.transAxes)  # fmt: skip
            title = {"logistic": "cross-entropy", "squared": "squared error"}[loss]
            title += r" (crosses: $T/\rho^2$)"
            finish(ax, title, r"logit scale $\rho^L/\tau$", "$T$")
        return {"logits": fig}


EXPERIMENTS = {"pinned": Pinned, "logits": Logits}
