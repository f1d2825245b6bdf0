"""The law of the scale-invariant layer: what weight decay does to it, and what not."""

import dataclasses
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray as xr
from jaxtyping import Array, Float, Int, Scalar
from matplotlib.figure import Figure

import gradflow as gf

from ..shared.figures import COLOURS, finish, panels
from ..shared.record import variables
from ..shared.rows import check, relative, Row
from .common import Law, tanh


class DirectionEntries(eqx.Module):
    """The entry (i, j) of c W/‖W‖: a matrix whose scale makes no difference."""

    weight: Float[Array, "m n"]
    size: float = eqx.field(static=True)
    """c."""

    @property
    def matrix(self) -> Float[Array, "m n"]:
        return self.size * self.weight / jnp.linalg.norm(self.weight)

    def __call__(self, place: Int[Array, "2"]) -> Scalar:
        return self.matrix[place[0], place[1]]


class DirectionNetwork(eqx.Module):
    """f(x) = ⟨a, tanh(c W x/‖W‖ + b)⟩: two layers, the first without a scale."""

    inner: Float[Array, "h d"]
    biases: Float[Array, " h"]
    outer: Float[Array, " h"]
    size: float = eqx.field(static=True)
    """c."""

    def __call__(self, x: Float[Array, " d"]) -> Scalar:
        matrix = self.size * self.inner / jnp.linalg.norm(self.inner)
        return jnp.dot(self.outer, jnp.tanh(matrix @ x + self.biases))


class Completion(eqx.Module):
    """A matrix of rank one, of which some entries are seen, and a start."""

    loss: gf.SquaredError
    model: DirectionEntries
    target: Float[Array, "m n"]

    def error(self, model: DirectionEntries) -> Scalar:
        """‖cŴ − W*‖/‖W*‖, over all entries."""
        away = model.matrix - self.target
        return jnp.linalg.norm(away) / jnp.linalg.norm(self.target)


def completion(seed: int) -> Completion:
    """10 × 10 of rank 1, three fifths of it seen."""
    keys = jr.split(jr.key(seed), 4)
    target = jnp.outer(jr.normal(keys[0], (10,)), jr.normal(keys[1], (10,)))
    seen = jr.permutation(keys[2], 100)[:60]
    places = jnp.stack([seen // 10, seen % 10], axis=1)
    values = target[places[:, 0], places[:, 1]]
    size = float(jnp.linalg.norm(target))
    model = DirectionEntries(jr.normal(keys[3], (10, 10)), size)
    return Completion(gf.SquaredError(places, values, reduction="sum"), model, target)


def normalised(seed: int) -> tuple[gf.SquaredError, DirectionNetwork]:
    """The tanh student, its first layer without a scale of its own."""
    task = tanh(seed)
    inner, biases, outer = task.model.inner, task.model.biases, task.model.outer
    size = float(jnp.linalg.norm(inner))
    loss: Any = task.loss
    return loss, DirectionNetwork(inner, biases, outer, size)


def turned(first: Array, last: Array) -> float:
    """How far a matrix has turned: ‖Ŵ₁ − Ŵ₀‖."""
    unit = lambda w: np.asarray(w) / np.linalg.norm(w)
    return float(np.linalg.norm(unit(last) - unit(first)))


@dataclasses.dataclass(frozen=True)
class Invariance(Law):
    """ℓ2 decay does nothing to a scale-invariant layer, and a nuclear one makes it
    grok.

    (arXiv 2606.04405. The gradient of ½‖W‖² is radial, and what depends on W/‖W‖ alone
    does not see it; that of ‖W‖_*, UVᵀ, is not.) Of a matrix of rank one, completed by
    cW/‖W‖, and of a tanh network whose first layer is cW/‖W‖. Refuted: for the matrix,
    if under ℓ2 its test error changes by 1 % after it has memorised; the nuclear half,
    if it does not fall below a tenth; for the network, decayed in that layer alone, if
    the layer turns by 10⁻³; decayed in all layers, if it turns by 10⁻² (as nothing then
    keeps the others from turning it).

    No files. Time: three minutes of a core; quick, a minute and a half.
    """

    seeds: int = 4
    """How many, from `seed` on."""
    steps: int = 60_000
    """Of the descent of the matrix, of size 0.1, its norm held at the start's."""
    lam: float = 3e-3
    """λ of it."""

    QUICK = dict(seeds=2)

    def compute(self) -> xr.Dataset:
        seeds = self.each_seed()
        matrices = [self.matrices(seed) for seed in seeds]
        networks = [self.networks(seed) for seed in seeds]
        found = {k: [each[k] for each in matrices] for k in matrices[0]}
        found |= {k: [each[k] for each in networks] for k in networks[0]}
        return variables(**found).assign_attrs(seeds=seeds)

    def matrices(self, seed: int) -> dict[str, Any]:
        """The test error of the matrix, under each penalty; that of ℓ2 is free, of the
        flow to s = 1, that of the nuclear norm descends with its norm held."""
        task = completion(seed)
        metrics = {"train": gf.Metric(task.loss, threshold=1e-4), "test": task.error}
        free = gf.simulate(
            gf.GradientFlow(task.loss), task.model, weight_decay=1e-3, slow_time=1.0,
            metrics=metrics,
        )  # fmt: skip
        held = gf.GradientFlow(task.loss, penalty=gf.Nuclear(), hold_norm=True)
        low = gf.descent(
            held, task.model, weight_decay=self.lam, learning_rate=0.1,
            steps=self.steps, saves=129, metrics=metrics,
        )  # fmt: skip
        unit = lambda models: np.asarray(models.matrix) / task.model.size
        ends = map(unit, (free[-1], low[-1]))
        values = [np.linalg.svd(m, compute_uv=False) for m in ends]
        return dict(
            l2_t=free.t, l2_test=free.metrics["test"],
            l2_memorised=free.crossing_time("train"),
            nuclear_t=low.t, nuclear_test=low.metrics["test"],
            nuclear_memorised=low.crossing_time("train"),
            l2_values=values[0], nuclear_values=values[1],
        )  # fmt: skip

    def networks(self, seed: int) -> dict[str, Any]:
        """How far the layer turns from Φ(θ₀) on, decayed alone and with the others."""
        loss, model = normalised(seed)
        limit = gf.manifold.limit_map(loss, model).model
        none = eqx.tree_at(
            lambda m: (m.inner, m.biases, m.outer), model, (1.0, 0.0, 0.0)
        )
        found = {}
        for name, penalty in (("alone", gf.Quadratic(weights=none)), ("all", gf.L2())):
            flow = gf.GradientFlow(loss, penalty=penalty)
            path = gf.simulate(flow, limit, weight_decay=1e-4, slow_time=1.0)
            found[f"turned_{name}"] = turned(limit.inner, path[-1].inner)
            found[f"shrunk_{name}"] = relative(path[-1].inner, limit.inner)
        return found

    def claims(self, data: xr.Dataset) -> list[Row]:
        count = len(data.attrs["seeds"])
        t, test = data.l2_t.values, data.l2_test.values
        at = [np.interp(m, x, y) for m, x, y in
              zip(data.l2_memorised.values, t, test, strict=True)]  # fmt: skip
        change = np.abs(test[:, -1] / np.array(at) - 1)
        last = data.nuclear_test.values[:, -1]
        alone, everything = data.turned_alone.values, data.turned_all.values
        return [
            check("matrix, ℓ2", change.max(), "< 0.01", "change of the test error "
                  f"from memorisation to s = 1, at most, of {count}"),
            check("matrix, nuclear", np.median(last), "≤ 0.1", "relative error of the "
                  f"whole matrix at the end, median of {count} (under ℓ2: "
                  f"{np.median(test[:, -1]):.2g})"),
            check("network, that layer", alone.max(), "< 0.001", "how far the layer "
                  f"turns to s = 1, decayed alone, at most, of {count}"),
            check("network, all layers", np.median(everything), "< 0.01", "the same, "
                  f"all decayed, median of {count}"),
        ]  # fmt: skip

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        fig, axes = panels(2)
        kinds = {"l2": r"$\ell_2$, flow", "nuclear": "nuclear, descent"}
        for (key, label), colour in zip(kinds.items(), COLOURS, strict=False):
            for i in range(len(data.attrs["seeds"])):
                words = label if i == 0 else None
                axes[0].plot(data[f"{key}_t"][i, 1:], data[f"{key}_test"][i, 1:],
                             color=colour, lw=1.2, label=words)  # fmt: skip
                values = data[f"{key}_values"].values[i]
                count = range(1, 11)
                axes[1].plot(count, values, ".-", color=colour, lw=1, label=words)
        axes[0].axhline(0.1, color="grey", ls=":", lw=1, label="a tenth")
        axes[1].set_ylim(1e-5, 1.5)
        finish(axes[0], r"completion by $cW/\|W\|$", "$t$", "relative error")
        finish(axes[1], "at the end", "number", r"singular value of $W/\|W\|$", log="y")
        return {"invariance": fig}


EXPERIMENTS = {"invariance": Invariance}
