"""The figures that belong to one task, after those of the paper."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import gradflow as gf

from ..shared.figures import SIZE

TRAIN, TEST, PENALTY = gf.plot.TRAIN, gf.plot.TEST, gf.plot.PENALTY

SNAPSHOTS = ("#999999", "#56B4E9", "black")


def linear(sweep: gf.Sweep, truth: Any) -> Figure:
    """The distance to the solution of least norm, and to the closed form."""
    fig, (left, right) = _figure(2)
    colours = gf.plot.Colours(np.asarray(sweep.weight_decay))
    end = np.asarray(truth.end_point())
    for i, path in enumerate(sweep):
        t, w = np.asarray(path.t), np.asarray(path.params.weights)
        exact = np.asarray(truth.path(path.t, path.weight_decay))
        distance = lambda w: np.linalg.norm(w - end, axis=1)
        left.plot(t[1:], distance(exact)[1:], color=colours(i), lw=2)
        left.plot(t[1::4], distance(w)[1::4], ".", color="black")
        off = np.linalg.norm(w - exact, axis=1) / np.linalg.norm(exact, axis=1)
        right.plot(t[1:], np.maximum(off[1:], 1e-17), color=colours(i), lw=1.6)
    left.plot([], [], color="grey", lw=2, label="closed form")
    left.plot([], [], ".", color="black", label="simulation")
    left.axhline(np.linalg.norm(np.asarray(truth.kernel_part)), color="grey", ls=":")
    left.annotate(
        "plateau: $w(0)$ projected on the solutions of $Xw = y$",
        (1.0, 1.01 * np.linalg.norm(np.asarray(truth.kernel_part))),
        va="bottom",
        fontsize=SIZE - 1,
    )
    left.set(xscale="log")
    right.set(xscale="log", yscale="log")
    _label(left, "distance to the least-norm solution, $\\|w - X^+y\\|$")
    _label(right, "relative error $\\|w - w^\\lambda\\|/\\|w^\\lambda\\|$")
    _legend(left, loc="lower left")
    title = "data are fitted at once; the rest decays at rate $\\lambda$"
    left.set_title(title, fontsize=SIZE)
    right.set_title("simulation against the closed form", fontsize=SIZE)
    colours.bar(fig, [left, right])
    return fig


def coefficients(path: gf.Path, truth: Any) -> Figure:
    """Losses and norm in time, and the coefficients β at some times."""
    ts = (0.0, 1e2, 1e5)
    fig, (left, right) = _figure(2, widths=(1, 1.3))
    _losses(left, path, ts)
    x = np.arange(truth.target.shape[0])
    beta = np.asarray(path.models.beta)
    right.axhline(0, color="lightgrey", lw=0.8)
    right.bar(x, np.asarray(truth.target), width=1.8, color="#F0E442", label="target")
    markers = ("x", "s", "o")
    for t, colour, marker in zip(ts, SNAPSHOTS, markers, strict=True):
        i = _nearest(path, t)
        label = f"$t$ = {_time(t)}"
        style = {"ms": 5, "color": colour, "mfc": colour if marker == "x" else "none"}
        right.plot(x, beta[i], marker, label=label, **style)
    _label(right, "coefficient $\\beta_k$", "index $k$")
    right.set_title("only the target's coefficients remain", fontsize=SIZE)
    _legend(right, loc="best", ncols=2)
    return fig


def singular_values(path: gf.Path, truth: Any) -> Figure:
    """Losses and norm in time, and the singular values of UVᵀ."""
    fig, (left, right) = _figure(2)
    _losses(left, path)
    values = np.linalg.svd(np.asarray(path.models.matrix), compute_uv=False)
    target = np.linalg.svd(np.asarray(truth.target), compute_uv=False)
    rank = int(np.sum(target > 1e-9 * target[0]))
    t = np.asarray(path.t)
    for k in range(values.shape[1]):
        colour, width = (TRAIN, 1.8) if k < rank else ("#BBBBBB", 1.0)
        label = {0: f"first {rank}", rank: "the rest"}.get(k)
        right.plot(t[1:], values[1:, k], color=colour, lw=width, label=label)
    for k in range(rank):
        label = None if k else "target"
        right.axhline(target[k], color="black", ls=":", lw=1.2, label=label)
    _mark(right, 1 / float(path.weight_decay))
    right.set_xscale("log")
    _label(right, "singular values of $UV^\\top$")
    right.set_title("most singular values die in the drift", fontsize=SIZE)
    right.set_ylim(top=1.25 * max(target[0], values[:, 0].max()))
    _legend(right, loc="upper left")
    return fig


def functions(path: gf.Path, task: gf.tasks.Task, kinks: Any) -> Figure:
    """Losses and norm in time, and the function learnt at some times."""
    ts = (0.0, 1.0, float(path.t[-1]))
    fig, axes = _figure(4, widths=(1.5, 1, 1, 1), width=16)
    _losses(axes[0], path, ts)
    grid = jnp.linspace(-2.0, 2.0, 801)
    evaluate = eqx.filter_jit(lambda m, x: jax.vmap(m)(x))
    teacher = evaluate(task.truth.teacher, grid)
    low, high = float(teacher.min()), float(teacher.max())
    for t, ax in zip(ts, axes[1:], strict=True):
        model = path[_nearest(path, t)]
        ax.plot(grid, teacher, color="#BBBBBB", lw=3, label="teacher")
        learnt = np.asarray(evaluate(model, grid))
        ax.plot(grid, learnt, color=TEST, lw=1.8, label="learnt")
        data: Any = task.loss
        x, y = np.asarray(data.x), np.asarray(data.y)
        ax.plot(x, y, "o", color="black", ms=6, label="training data")
        ax.set_title(f"$t$ = {_time(t)}: {kinks(task, model)} kinks", fontsize=SIZE)
        wide = 0.6 * (high - low)
        if t > 0:
            bottom, top = min(low, learnt.min()), max(high, learnt.max())
            bottom, top = max(bottom, low - 3 * wide), min(top, high + 3 * wide)
            ax.set_ylim(bottom - 0.3, top + 0.3)
        _label(ax, "$f(x)$", "input $x$")
    _legend(axes[1], loc="best")
    return fig


def one_path(path: gf.Path) -> Figure:
    """Losses and norm of one path."""
    fig, (ax,) = _figure(1)
    _losses(ax, path)
    return fig


def _figure(n: int, widths: Any = None, width: float | None = None) -> Any:
    width = 6.2 * n if width is None else width
    fig = plt.figure(figsize=(width, 4.4), layout="constrained")
    return fig, list(fig.subplots(1, n, width_ratios=widths, squeeze=False)[0])


def _losses(ax: Axes, path: gf.Path, ts: tuple[float, ...] = ()) -> None:
    t, lam = np.asarray(path.t), float(path.weight_decay)
    train, test = np.asarray(path.train_loss), np.asarray(path.metrics["test"])
    ax.plot(t[1:], train[1:], color=TRAIN, lw=2, label="train loss")
    ax.plot(t[1:], test[1:], color=TEST, lw=2, label="test loss")
    size = 2 * np.asarray(path.penalty)
    ax.plot(t[1:], size[1:], color=PENALTY, lw=2, label="$\\|\\theta\\|^2$")
    ax.set(xscale="log", yscale="log")
    _mark(ax, 1 / lam)
    for k, time in enumerate(ts):
        if time > 0:
            ax.axvline(time, color="grey", ls=":", lw=1.2)
            ax.text(
                time,
                1.0,
                f"$t_{k + 1}$",
                transform=ax.get_xaxis_transform(),
                ha="center",
                va="bottom",
                fontsize=SIZE - 1,
            )
    _label(ax, f"loss, norm; $\\lambda$ = {gf.plot.power(lam)}")
    _legend(ax, loc="lower left")


def _mark(ax: Axes, time: float) -> None:
    ax.axvline(time, color="black", ls="--", lw=1)
    ax.text(
        time * 0.85,
        0.98,
        "$1/\\lambda$",
        transform=ax.get_xaxis_transform(),
        ha="right",
        va="top",
        fontsize=SIZE,
    )


def _label(ax: Axes, y: str, x: str = "time $t$") -> None:
    ax.set_xlabel(x, fontsize=SIZE)
    ax.set_ylabel(y, fontsize=SIZE)
    ax.tick_params(labelsize=SIZE - 1)
    ax.spines[["top", "right"]].set_visible(False)


def _legend(ax: Axes, **kwargs: Any) -> None:
    ax.legend(fontsize=SIZE - 1, frameon=False, **kwargs)


def _nearest(path: gf.Path, t: float) -> int:
    return int(np.argmin(np.abs(np.asarray(path.t) - t)))


def _time(t: float) -> str:
    return gf.plot.power(t) if t >= 100 else f"{t:g}"
