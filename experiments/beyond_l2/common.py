"""Traces of linear models, for the experiments of `beyond_l2.py`."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from matplotlib.figure import Figure

import gradflow as gf

from ..shared.common import COLOURS, finish, marks, panels


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
    metrics = {**task.metrics, "train": eqx.tree_at(_fn, task.metrics["train"], train)}
    return dataclasses.replace(task, loss=loss, metrics=metrics)


def _fn(metric: gf.Metric) -> Any:
    return metric.fn


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


def dataset(traces: dict[str, Trace], **attrs: Any) -> xr.Dataset:
    """Every trace under its name."""
    arrays: dict[str, Any] = {}
    for name, one in traces.items():
        key = name.replace(" ", "_")
        for field, value in one._asdict().items():
            dims = (f"{key}_time", "coordinate")[: value.ndim]
            arrays[f"{key}_{field}"] = (dims, value)
    return xr.Dataset(arrays, attrs=attrs)


def story(
    traces: dict[str, Trace],
    target: np.ndarray,
    times: dict[str, float],
    title: str,
    support: np.ndarray | None = None,
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
    on = np.flatnonzero(target) if support is None else support
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
