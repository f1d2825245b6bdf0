"""Sparse recovery: settings, descents and flows, and traces of linear models."""

import dataclasses
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray as xr
from matplotlib.figure import Figure

import gradflow as gf

from ..shared.command import bar, Settings
from ..shared.figures import COLOURS, finish, marks, panels
from ..shared.rows import Row

METHODS = ("subgradient", "proximal", "projected")


@dataclasses.dataclass(frozen=True)
class Sparse(Settings):
    """Of all experiments on sparse vectors."""

    features: int = 100
    sparsity: int = 5
    alpha: float = 0.1
    """The step size α."""
    beta: float = 1e-5
    """The strength β of the penalty."""
    zeta: float = 1e-6
    """Of the start."""

    def task(self, seed: int | None = None, **options: Any) -> gf.tasks.Task:
        fixed = dict(features=self.features, sparsity=self.sparsity, scale=self.zeta)
        key = jr.key(self.seed if seed is None else seed)
        return gf.tasks.sparse_recovery(key, **(fixed | options))


def descend(
    task: gf.tasks.Task, alpha: float, beta: float, at: Any,
    method: Any = "subgradient", metrics: Any = None,
) -> gf.Path:  # fmt: skip
    """Through the steps `at`; with the task's metrics unless others are given."""
    watched = task.metrics if metrics is None else metrics
    return gf.descent(
        task.flow, task.model, weight_decay=beta, learning_rate=alpha, at=at,
        method=method, metrics=watched,
    )  # fmt: skip


def flow(task: gf.tasks.Task, beta: float, ts: Any, rtol: float = 1e-8) -> gf.Path:
    return gf.simulate(
        task.flow, task.model, weight_decay=beta, ts=jnp.asarray(ts),
        metrics=task.metrics, rtol=rtol, max_steps=10**6,
    )  # fmt: skip


def flow_times(t1: float, saves: int) -> np.ndarray:
    return np.concatenate([[0.0], np.geomspace(1e-2, t1, saves)])


def of_pairs(
    task: gf.tasks.Task, alphas: Any, betas: Any, length: Callable[[float, float], int],
    most: int, at: Callable[[int], np.ndarray], method: str = "subgradient",
) -> xr.Dataset:  # fmt: skip
    """t₂ and the last error of descents of a length, for every α and β. Pairs that
    would take more than so many steps are left out, and named."""
    rows, left_out = [], []
    for beta, alpha in bar(itertools.product(betas, alphas), "descents"):
        if (count := length(alpha, beta)) > most:
            left_out.append((alpha, beta))
            continue
        path = descend(task, alpha, beta, at(count), method)
        t2 = path.crossing_time("test") / alpha
        rows.append((alpha, beta, t2, float(path.metrics["test"][-1])))
    if left_out:
        print(f"left out, above {most:.1e} steps: {left_out}")
    columns = zip(("alpha", "beta", "t2", "last"), np.array(rows).T, strict=True)
    return xr.Dataset({name: ("descent", values) for name, values in columns})


def unless(rows: list[Row], gate: Any) -> list[Row]:
    """Rows that are judged only where the first of them, the oracle, holds."""
    if gate:
        return rows
    return [rows[0], *(dataclasses.replace(row, ok=None) for row in rows[1:])]


def timed(fn: Callable[[], gf.Path]) -> tuple[gf.Path, float, float]:
    """A path, and the seconds of a first run and of the median of three more, which
    are without compilation."""
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        path = fn()
        jax.block_until_ready(path.params)
        seconds.append(time.perf_counter() - start)
    return path, seconds[0], float(np.median(seconds[1:]))


def padded(task: gf.tasks.Task, rows: int) -> gf.tasks.Task:
    """The same task with measurements of zero added, which change nothing: tasks of
    different N then share what is compiled."""
    loss = task.loss
    if not isinstance(loss, gf.SquaredError):
        raise ValueError(f"task: expected a squared error, got {type(loss).__name__}.")
    more = rows - loss.y.shape[0]
    x, y = jnp.pad(loss.x, ((0, more), (0, 0))), jnp.pad(loss.y, (0, more))
    loss = gf.SquaredError(x, y, reduction="sum")
    train = gf.tasks.RelativeError(loss.outputs, loss.y)
    of_train = eqx.tree_at(lambda metric: metric.fn, task.metrics["train"], train)
    metrics = {**task.metrics, "train": of_train}
    return dataclasses.replace(task, loss=loss, metrics=metrics)


def from_there_on(good: np.ndarray) -> np.ndarray:
    """Whether it holds for this number of measurements, the last axis, and all larger
    ones."""
    return np.flip(np.logical_and.accumulate(np.flip(good, -1), -1), -1)


def least(samples: Any, good: np.ndarray) -> np.ndarray:
    """The least N from which on all are good, for each row; one more than the largest
    where there is none."""
    number = lambda row: samples[int(row.argmax())] if row.any() else samples[-1] + 1
    rows = from_there_on(good).reshape(-1, good.shape[-1])
    return np.array([int(number(row)) for row in rows]).reshape(good.shape[:-1])


class Trace(NamedTuple):
    """A path of a linear model, and what the paper's panels show of it."""

    t: np.ndarray
    steps: np.ndarray
    """t/α; of a flow, what a descent of that α would take."""
    a: np.ndarray
    """Coefficients, one row a time."""
    train: np.ndarray
    test: np.ndarray
    ratio: np.ndarray
    """β‖H‖/‖G‖, of the penalty's and the data's force."""
    l1: np.ndarray
    l2: np.ndarray


def trace(
    path: gf.Path, truth: Any, alpha: float, subgradient: Callable = np.sign
) -> Trace:
    a = np.asarray(truth.coefficients(path.models))
    x, y = np.asarray(truth.features), np.asarray(truth.targets)
    pull = np.linalg.norm((a @ x.T - y) @ x, axis=1)
    push = float(path.weight_decay) * np.linalg.norm(subgradient(a), axis=1)
    with np.errstate(divide="ignore"):
        ratio = push / pull
    return Trace(
        t=np.asarray(path.t),
        steps=np.asarray(path.t) / alpha,
        a=a,
        train=np.asarray(path.metrics["train"]),
        test=np.asarray(path.metrics["test"]),
        ratio=ratio,
        l1=np.abs(a).sum(axis=1),
        l2=np.linalg.norm(a, axis=1),
    )


def dataset(traces: dict[str, Trace]) -> xr.Dataset:
    """Every trace under its name."""
    arrays: dict[str, Any] = {}
    for name, one in traces.items():
        for field, value in one._asdict().items():
            dims = (f"{name}_time", "coordinate")[: value.ndim]
            arrays[f"{name}_{field}"] = (dims, value)
    return xr.Dataset(arrays)


def traces_of(data: xr.Dataset) -> dict[str, Trace]:
    """What `dataset` was given."""
    names = [str(k).removesuffix("_ratio") for k in data if str(k).endswith("_ratio")]
    fields = Trace._fields
    return {n: Trace(*(data[f"{n}_{field}"].values for field in fields)) for n in names}


def story(
    traces: dict[str, Trace], target: np.ndarray, times: dict[str, float], title: str
) -> Figure:
    """The paper's panels: errors, the ratio of the forces, norms, components."""
    fig, axes = panels(4)
    for (name, one), colour in zip(traces.items(), COLOURS, strict=False):
        x = one.steps
        flow = name == "flow"
        style: dict[str, Any] = dict(color=colour, lw=3 if flow else 1.3)
        style["alpha"] = 0.45 if flow else 1.0
        axes[0].plot(x[1:], one.test[1:], label=f"recovery, {name}", **style)
        axes[0].plot(x[1:], np.maximum(one.train[1:], 1e-17), ls="--", **style)
        if one.ratio[-1] < 1e6:  # where data are fitted to rounding it means nothing
            axes[1].plot(x[1:], one.ratio[1:], label=name, **style)
        axes[2].plot(x[1:], one.l1[1:], label=f"$\\ell_1$, {name}", **style)
        axes[2].plot(x[1:], one.l2[1:], ls="--", **style)
    axes[0].set_ylim(bottom=1e-8)
    axes[2].axhline(np.abs(target).sum(), color="black", ls=":", lw=1)
    name, trace = next(iter(traces.items()))
    on = np.flatnonzero(target)
    off = np.setdiff1d(np.arange(target.size), on)
    axes[3].plot(trace.steps[1:], trace.a[1:, off], color="lightgrey", lw=0.5)
    for i, colour in zip(on, COLOURS * len(on), strict=False):
        axes[3].plot(trace.steps[1:], trace.a[1:, i], color=colour, lw=1.5)
        axes[3].axhline(target[i], color=colour, ls=":", lw=0.8)
    finish(axes[0], f"{title}: errors (dashed: train)", y="relative error")
    finish(axes[1], "ratio of forces $\\beta\\|H\\|/\\|G\\|$")
    finish(axes[2], "norms (dashed: $\\ell_2$; dotted: $\\|a^*\\|_1$)", log="x")
    finish(axes[3], f"components, {name} (grey: off the support)", log="x")
    axes[1].axhline(1, color="black", lw=0.6)
    for ax in axes:
        marks(ax, times)
    return fig
