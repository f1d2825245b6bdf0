"""Laws of the path: its principal component, and the commutator of its gradients."""

import dataclasses
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray as xr
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree
from matplotlib.figure import Figure

import gradflow as gf

from ..shared.figures import COLOURS, finish, panels
from ..shared.record import table
from ..shared.rows import check, law, Row
from .common import adam, FLOWS, Law, lone, NETWORKS, OTHERS


def component_share(points: Float[np.ndarray, "n d"]) -> float:
    """The part of the variance of n points that is along their first principal
    component."""
    values = np.linalg.svd(points - points.mean(axis=0), compute_uv=False) ** 2
    return float(values[0] / values.sum())


@dataclasses.dataclass(frozen=True)
class PathLaw(Law):
    """Of networks that may be named."""

    networks: tuple[Literal["diagonal", "tanh", "transformer"], ...] = (
        "diagonal",
        "tanh",
    )
    """The last, of 14 080 parameters, is on a + b mod 23."""

    def task(self, network: str, seed: int) -> gf.tasks.Task:
        return (NETWORKS | OTHERS)[network](seed)


def flat(path: gf.Path) -> Float[np.ndarray, "n d"]:
    """The parameters of a path, a row for each time; of a transformer those of its
    attention."""
    params = path.params
    if isinstance(params, gf.models.Transformer):
        params = [block.attention for block in params.blocks]
    leaves = [np.asarray(p) for p in jax.tree.leaves(params)]
    return np.concatenate([p.reshape(len(p), -1) for p in leaves], axis=1)


@dataclasses.dataclass(frozen=True)
class Component(PathLaw):
    """One principal component holds 68 to 83 % of the path until it generalises.

    (arXiv 2602.16746, of attention weights under AdamW, saved evenly: "essentially
    one-dimensional".) Of flows, under λ = 10⁻³, and AdamW, under 0.03, with 101 points
    evenly from the start to T_grok; of a transformer the path of its attention.
    Refuted, for a kind of network and an optimiser, by a median share outside of 0.68 …
    0.83. What it would mean: a random walk of many dimensions has 6/π² = 61 % (its
    covariance is that of Brownian motion), a straight line all. The rival, that the
    path is one of a drift and no walk, is refuted by a median share below 0.83.

    No files. Time: a minute of a core; quick, half of one.
    """

    points: int = 101
    """Saved models."""
    decay: float = 3e-2
    """Of AdamW, whose steps are of 10⁻³."""
    slow_time: float = 5.0
    """How far to run, s = λt."""

    QUICK = dict(seeds=2)

    def compute(self) -> xr.Dataset:
        axes = dict(network=list(self.networks), seed=self.each_seed())
        return table(axes, self.cell, "runs")

    def cell(self, network: str, seed: int) -> dict[str, Any]:
        task = self.task(network, seed)
        run: dict[str, Any] = dict(metrics=task.metrics, throw=False)
        along: dict[str, Any] = dict(weight_decay=1e-3, **FLOWS.get(network, {}))
        s = self.slow_time
        flow = gf.simulate(task.flow, task.model, slow_time=s, **along, **run)
        time = flow.crossing_time("test")
        run |= dict(weight_decay=self.decay, learning_rate=1e-3, method="decoupled")
        run |= dict(optimiser=adam(1e-8))
        at = gf.log_spaced_steps(int(s / (1e-3 * self.decay)), 400)
        steps = gf.descent(task.flow, task.model, at=at, **run).crossing_time("test")
        steps = np.rint(steps / 1e-3)
        found = dict(flow=np.nan, adam=np.nan, walk=np.nan, time=time, steps=steps)
        if time > 0:
            ts = jnp.linspace(0, time, self.points)
            path = gf.simulate(task.flow, task.model, ts=ts, **along)
            found["flow"] = component_share(flat(path))
        if steps > 0:
            at = np.unique(np.linspace(0, steps, self.points).astype(int))
            path = gf.descent(task.flow, task.model, at=at, **run)
            found["adam"] = component_share(flat(path))
        # As many points, and dimensions, of no direction at all.
        size = flat(flow).shape[1]
        walk = np.random.default_rng(seed).normal(size=(self.points, size))
        return found | dict(walk=component_share(walk.cumsum(axis=0)))

    def cases(self, data: xr.Dataset) -> dict[str, np.ndarray]:
        """Shares, by network and optimiser, of those that generalise."""
        words = {"flow": "flow", "adam": "AdamW"}
        return {
            f"{name}, {word}": lone(data[key].sel(network=name))
            for name in data.network.values
            for key, word in words.items()
        }

    def controls(self, data: xr.Dataset) -> list[Row]:
        walk = float(np.median(data.walk))
        sentence = "share of random walks of as many points and dimensions, median"
        return [check("walk", walk, "0.608 ± 0.05", sentence)]

    def claims(self, data: xr.Dataset) -> list[Row]:
        return [self.row(name, shares, "0.68 … 0.83", "")
                for name, shares in self.cases(data).items()]  # fmt: skip

    def rivals(self, data: xr.Dataset) -> list[Row]:
        return [self.row(name, shares, "≥ 0.83", ": no walk")
                for name, shares in self.cases(data).items()]  # fmt: skip

    def row(self, name: str, shares: np.ndarray, bound: str, more: str) -> Row:
        told = f"share of the first component, median of {shares.size}"
        if shares.size:
            told += f" ({shares.min():.3g} … {shares.max():.3g})"
        value = np.median(shares) if shares.size else np.nan
        return check(name + more, value, bound, told, given=shares.size)

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        fig, (ax,) = panels(1, columns=1, size=(6.4, 3.8))
        cases = {
            name: shares for name, shares in self.cases(data).items() if shares.size
        }
        cases["random walk"] = data.walk.values.ravel()
        for i, (shares, colour) in enumerate(
            zip(cases.values(), COLOURS, strict=False)
        ):
            ax.plot(shares, np.full(shares.size, i), "o", color=colour, mfc="none")
        ax.set_yticks(range(len(cases)), list(cases))
        ax.axvspan(0.68, 0.83, color="grey", alpha=0.2, label="the paper's range")
        ax.axvline(6 / np.pi**2, color="black", ls=":", lw=1, label=r"$6/\pi^2$")
        ax.set_xlim(0.5, 1.01)
        ax.invert_yaxis()
        finish(ax, "variance of the path along one direction", "share", log="")
        return {"component": fig}


@dataclasses.dataclass(frozen=True)
class Commutator(PathLaw):
    """The defect of commuting gradient steps rises before T_grok by a lead ∝ T_grok^α,
    α = 1.1 … 1.2; two-phase theory has α → 1, as everything but the fast phase scales
    with 1/λ.

    The defect is ‖H_A g_B − H_B g_A‖/(‖g_A‖‖g_B‖), of gradients and Hessians on two
    batches A and B, what ‖θ_AB − θ_BA‖/‖hg_A‖‖hg_B‖ tends to for small steps h; median
    of five pairs of halves of the data. (arXiv 2602.16967: 1.18, 1.13 over learning
    rates. Its onset is where the defect is ten times what it was at the start.) Of
    flows over λ. Refuted, for a kind of network, by a fitted exponent, median of the
    seeds, outside of 1.1 … 1.2. The rival is refuted by an exponent between the two
    least λ that is not 1 ± 0.05.

    No files. Time: half a minute of a core.
    """

    lams: tuple[float, ...] = tuple(np.geomspace(3e-1, 3e-6, 11).tolist())
    """Weight decays λ."""
    slow_time: float = 5.0
    """How far to run, s = λt."""

    QUICK = dict(seeds=2, lams=tuple(np.geomspace(3e-1, 3e-5, 5).tolist()))

    def compute(self) -> xr.Dataset:
        axes = dict(network=list(self.networks), seed=self.each_seed())
        data = table(axes, self.cell, "runs")
        names = {"grokked_0": "lam", "onset_0": "lam", "last_t_0": "time"}
        names |= {"last_defect_0": "time", "last_test_0": "time"}
        return data.rename(names).assign_coords(lam=list(self.lams))

    def cell(self, network: str, seed: int) -> dict[str, Any]:
        task = self.task(network, seed)
        loss: Any = task.loss
        halves = pairs_of_halves(jr.key(seed), loss.x.shape[0], 5)
        defect = gf.Metric(Defect(loss, halves))
        sweep = gf.sweep(
            task.flow, task.model, weight_decay=self.lams, slow_time=self.slow_time,
            saves=129, metrics={**task.metrics, "defect": defect}, progress=False,
            **FLOWS.get(network, {}),
        )  # fmt: skip
        paths = list(sweep)
        values = [np.asarray(path.metrics["defect"]) for path in paths]
        last = paths[len(paths) // 2]
        times = [np.asarray(path.t) for path in paths]
        return dict(
            grokked=[path.crossing_time("test") for path in paths],
            onset=[onset(t, v) for t, v in zip(times, values, strict=True)],
            last_t=last.t,
            last_defect=last.metrics["defect"],
            last_test=last.metrics["test"],
        )

    def leads(
        self, data: xr.Dataset, network: str
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """T_grok and lead of every seed, from the largest λ, where there is a lead."""
        out = []
        one = data.sel(network=network)
        for grokked, began in zip(one.grokked.values, one.onset.values, strict=True):
            lead = grokked - began
            good = np.isfinite(lead) & (lead > 0)
            out.append((grokked[good], lead[good]))
        return out

    def claims(self, data: xr.Dataset) -> list[Row]:
        rows = []
        for name in map(str, data.network.values):
            fits = lone([law(t, lead) for t, lead in self.leads(data, name)])
            told = f"exponent of the lead in T, median of {fits.size} seeds"
            if fits.size:
                told += f" ({fits.min():.3g} … {fits.max():.3g})"
            value = np.median(fits) if fits.size else np.nan
            rows.append(check(name, value, "1.1 … 1.2", told, given=fits.size))
        return rows

    def rivals(self, data: xr.Dataset) -> list[Row]:
        rows = []
        for name in map(str, data.network.values):
            last = lone([
                np.diff(np.log(lead[-2:])) / np.diff(np.log(t[-2:]))
                for t, lead in self.leads(data, name) if t.size > 1
            ])  # fmt: skip
            value = np.median(last) if last.size else np.nan
            told = f"the same between the two least λ, median of {last.size}"
            rows.append(check(f"{name}: local", value, "1 ± 0.05", told,
                              given=last.size))  # fmt: skip
        return rows

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        fig, axes = panels(2)
        for name, colour in zip(map(str, data.network.values), COLOURS, strict=False):
            for i, (t, lead) in enumerate(self.leads(data, name)):
                label = name if i == 0 else None
                axes[0].plot(t, lead / t, ".-", color=colour, lw=1, label=label)
            one = data.sel(network=name).isel(seed=0)
            lam = data.lam.values[data.sizes["lam"] // 2]
            axes[1].plot(one.last_t[1:], one.last_defect[1:], color=colour,
                         label=f"{name}: defect")  # fmt: skip
            axes[1].plot(one.last_t[1:], one.last_test[1:], "--", color=colour,
                         label="test")  # fmt: skip
        finish(axes[0], "lead over grokking time", "$T$", "lead$/T$", log="x")
        finish(axes[1], rf"one run each, $\lambda$ = {lam:.1g}", "$t$")
        return {"commutator": fig}


def onset(t: np.ndarray, defect: np.ndarray) -> float:
    """The first saved time at which the defect is ten times what it was at first, the
    median of the first three; NaN where it never is."""
    high = defect > 10 * np.median(defect[:3])
    return float(t[np.argmax(high)]) if high.any() else np.nan


def pairs_of_halves(key: Array, samples: int, count: int) -> Int[Array, "k 2 m"]:
    """Samples of two halves of the data that have none in common, `count` times."""
    half = samples // 2
    orders = [jr.permutation(one, samples) for one in jr.split(key, count)]
    return jnp.stack([order[: 2 * half].reshape(2, half) for order in orders])


class Defect(eqx.Module):
    """‖H_A g_B − H_B g_A‖/(‖g_A‖‖g_B‖), median of some pairs of batches."""

    loss: gf.SquaredError | gf.CrossEntropy
    halves: Int[Array, "k 2 m"]

    def __call__(self, model: PyTree) -> Float[Array, ""]:
        params, static = eqx.partition(model, eqx.is_inexact_array)
        theta, unravel = ravel_pytree(params)

        def data(loss):
            classes = isinstance(loss, gf.CrossEntropy)
            return loss.x, loss.labels if classes else loss.y

        def gradient(samples):
            some = [array[samples] for array in data(self.loss)]
            loss = eqx.tree_at(data, self.loss, some)
            return jax.grad(lambda v: loss(eqx.combine(unravel(v), static)))

        def of_pair(pair):
            first, second = gradient(pair[0]), gradient(pair[1])
            a, b = first(theta), second(theta)
            ab = jax.jvp(first, (theta,), (b,))[1]
            ba = jax.jvp(second, (theta,), (a,))[1]
            return jnp.linalg.norm(ab - ba) / (jnp.linalg.norm(a) * jnp.linalg.norm(b))

        return jnp.median(jax.lax.map(of_pair, self.halves))


EXPERIMENTS = {"component": Component, "commutator": Commutator}
