"""A one-layer transformer on a + b mod p, by the flow."""

import dataclasses
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray as xr
from jaxtyping import PyTree
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import gradflow as gf

from ..shared.command import parse_weight_decay, Settings
from ..shared.figures import COLOURS, finish, panels
from ..shared.record import variables
from ..shared.rows import check, law_check, Row


@dataclasses.dataclass(frozen=True)
class Addition(Settings):
    """The transformer groks along its gradient flow, at a time of order 1/λ."""

    modulus: int = 23
    """p; 113 is the paper's, for a GPU."""
    fraction: float = 0.6
    """Of all pairs, that are seen; 0.3 is the paper's."""
    width: int = 32
    """Of the transformer, with four times as many hidden units; 128 is the paper's."""
    activation: Literal["gelu", "relu"] = "gelu"
    """Of the hidden units: smooth, or the paper's."""
    weight_decay: tuple[str, ...] = ("1e-3:1e-6:4",)
    """Weight decays: numbers, or ranges such as 1e-3:1e-6:4 (evenly in the logarithm);
    1e-3:1e-4:2 if quick."""
    slow_time: float = 5.0
    """How far to follow."""
    rtol: float = 1e-3
    """Of the flow. ReLU's kinks ask for steps in proportion to it."""
    descent_steps: int = 6000
    """Of gradient descent, on each of two stretches."""

    QUICK = dict(weight_decay=("1e-3:1e-4:2",))

    @property
    def task(self) -> gf.tasks.Task:
        return gf.tasks.modular_transformer(
            jr.key(self.seed), modulus=self.modulus, fraction=self.fraction,
            width=self.width, hidden=4 * self.width, activation=self.activation,
        )  # fmt: skip

    @property
    def lams(self) -> np.ndarray:
        return parse_weight_decay(self.weight_decay)

    def compute(self) -> xr.Dataset:
        task, given = self.task, dict(solver=gf.RKC2(), rtol=self.rtol)
        runs = gf.sweep(
            task.flow, task.model, weight_decay=jnp.asarray(self.lams),
            slow_time=self.slow_time, saves=129, metrics=task.metrics,
            store=self.store(), **given,
        )  # fmt: skip
        # That of the largest λ once more, with all models.
        path = gf.simulate(
            task.flow, task.model, weight_decay=self.lams[0], slow_time=1.0, saves=129,
            metrics=task.metrics, progress=not self.quick, **given,
        )  # fmt: skip
        data = runs.to_xarray().drop_attrs().merge(self.descended(task, path))
        return data.assign(parameters=vector(task.model).size)

    def descended(self, task: gf.tasks.Task, path: gf.Path) -> xr.Dataset:
        """Gradient descent beside a path on two stretches: from its start until the
        data are memorised, and at its end, while it drifts; with a step, and with half
        of it."""
        t, found = np.asarray(path.t), {}
        memorised = np.asarray(path.metrics["train"]) >= 0.99
        if not memorised.any():
            return xr.Dataset()
        stretches = dict(start=(0, int(np.argmax(memorised))), drift=(-2, -1))
        for name, (i, j) in stretches.items():
            for part in (1, 2):
                steps = part * self.descent_steps // 2
                there = gf.descent(
                    task.flow, path[i], weight_decay=path.weight_decay,
                    learning_rate=(t[j] - t[i]) / steps, at=[0, steps],
                    progress=not self.quick,
                )  # fmt: skip
                found[f"{name}_{part}"] = vector(there[-1])
            found[f"{name}_flow"] = np.stack([vector(path[i]), vector(path[j])])
            found[f"{name}_t"] = t[[i, j]]
        return variables("descent_", **found)

    def judge(self, data: xr.Dataset) -> list[Row]:
        rows = []
        stretches = {"start": "‖θ‖", "drift": "the way gone"}
        if "descent_start_t" not in data:
            stretches = {}
        for name, told in stretches.items():
            before, flow = data[f"descent_{name}_flow"].values
            full, half = (data[f"descent_{name}_{k}"].values for k in (1, 2))
            unit = np.linalg.norm(flow - (before if name == "drift" else 0))
            off = [np.linalg.norm(theta - flow) / unit for theta in (full, half)]
            t0, t1 = data[f"descent_{name}_t"].values
            h = (t1 - t0) / self.descent_steps
            rows.append(
                check(
                    f"{name}: off", off[1], "≤ 0.01",
                    f"of {told}, from gradient descent with h = {h:.2g} for t = "
                    f"{t0:.4g} … {t1:.4g}; {off[0]:.2g} with twice that step",
                )
            )  # fmt: skip
        lams = data.weight_decay.values
        memorised, grokked = (times(data, key) for key in ("train", "test"))
        slow = lams * grokked
        each = ", ".join(f"{s:.3g}" for s in slow)
        last = slow[-1] / slow[-2] - 1 if slow.size > 1 else np.nan
        work = ", ".join(f"{n:.0f}" for n in evaluations(data))
        return rows + [
            check("memorised", np.isfinite(memorised).sum(), f"= {lams.size}", "runs"),
            check("grokked", np.isfinite(grokked).sum(), f"= {lams.size}", "runs"),
            check("delay", np.min(grokked / memorised), "≥ 10", "the least ratio"),
            law_check("law", lams, grokked, "-1 ± 0.1", "exponent of the time in λ"),
            check(
                "collapse", abs(last), "≤ 0.1",
                f"change of s = λt from the last λ but one; s = {each}",
                given=slow.size > 2,
            ),
            check("evaluations", evaluations(data)[-1], "", f"of the gradient: {work}"),
        ]  # fmt: skip

    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        fig, (left, right, low, cost) = panels(4)
        curves(left, data, "t")
        curves(right, data, "slow_time")
        lams = data.weight_decay.values
        colours = gf.plot.Colours(lams)
        norm = np.sqrt(2 * data.penalty.values)
        for k, s in enumerate(data.slow_time.values):
            low.plot(s[1:], norm[k, 1:], color=colours(k), lw=1.6)
        finish(low, "(c) the norm", "slow time $s = \\lambda t$", log="x")
        low.set_ylabel("$\\|\\theta\\|$")
        cost.plot(lams, evaluations(data), "o-", color=COLOURS[0], label="the flow")
        if "descent_start_t" in data:
            t0, t1 = data.descent_start_t.values
            h = (t1 - t0) / self.descent_steps
            label = f"gradient descent, $h = {h:.2g}$"
            descents = self.slow_time / lams / h
            cost.plot(lams, descents, "s--", color=COLOURS[1], label=label)
        finish(cost, "(d) gradients to the end", "weight decay $\\lambda$")
        gf.plot.colorbar(lams, fig, [left, right, low])
        fig.suptitle(
            f"a + b mod {self.modulus} by a transformer of {int(data.parameters)} "
            f"parameters, {self.activation.upper()}, {100 * self.fraction:g} % seen"
        )
        return {"transformer_flow": fig}


def vector(model: PyTree) -> np.ndarray:
    """All parameters in one."""
    leaves = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    return np.concatenate([np.ravel(leaf) for leaf in leaves])


def times(data: xr.Dataset, name: str) -> np.ndarray:
    """When the accuracy has passed 0.99 for good, of each λ; infinite if never."""
    level = gf.Metric(abs, threshold=0.99, higher_is_better=True)
    pairs = zip(data.t.values, data[f"metric_{name}"].values, strict=True)
    return np.array([gf.crossing_time(t, v, level) for t, v in pairs])


def evaluations(data: xr.Dataset) -> np.ndarray:
    """Gradients that the accepted steps of each run took, all but a few percent; a
    product of the Hessian counts as two."""
    return data.evaluations.values + 2 * data.products.values


def curves(ax: Axes, data: xr.Dataset, clock: str) -> None:
    """Train and test accuracy against a clock."""
    colours = gf.plot.Colours(data.weight_decay.values)
    for k, x in enumerate(data[clock].values):
        ax.plot(x[1:], data.metric_train.values[k, 1:], "--", color=colours(k), lw=1.2)
        ax.plot(x[1:], data.metric_test.values[k, 1:], color=colours(k), lw=1.8)
    ax.plot([], [], "--", color="grey", label="train")
    ax.plot([], [], color="grey", label="test")
    letter, label = ("a", "time $t$") if clock == "t" else ("b", "slow time $s$")
    finish(ax, f"({letter}) accuracy", label, log="x")
