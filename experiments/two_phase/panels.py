"""The figures that belong to one task, after those of the paper."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import gradflow as gf

from ..shared.figures import finish, marks, panels, SIZE

TRAIN, TEST, PENALTY = gf.plot.TRAIN, gf.plot.TEST, gf.plot.PENALTY
SNAPSHOTS = (("x", "#999999"), ("s", "#56B4E9"), ("o", "black"))
WIDE: dict[str, Any] = dict(columns=2, size=(6.2, 4.4))
TIME = "time $t$"


def linear(sweep: gf.Sweep, truth: Any) -> Figure:
    """The distance to the solution of least norm, and to the closed form."""
    fig, (left, right) = panels(2, **WIDE)
    colours = gf.plot.Colours(np.asarray(sweep.weight_decay))
    end = np.asarray(truth.end_point())
    plateau = float(np.linalg.norm(np.asarray(truth.kernel_part)))
    distance = lambda w: np.linalg.norm(w - end, axis=1)
    for i, path in enumerate(sweep):
        t, w = np.asarray(path.t), np.asarray(path.params.weights)
        exact = np.asarray(truth.path(path.t, path.weight_decay))
        left.plot(t[1:], distance(exact)[1:], color=colours(i), lw=2)
        left.plot(t[1::4], distance(w)[1::4], ".", color="black")
        off = np.linalg.norm(w - exact, axis=1) / np.linalg.norm(exact, axis=1)
        right.plot(t[1:], np.maximum(off[1:], 1e-17), color=colours(i), lw=1.6)
    left.plot([], [], color="grey", lw=2, label="closed form")
    left.plot([], [], ".", color="black", label="simulation")
    left.axhline(plateau, color="grey", ls=":")
    words = "plateau: $w(0)$ projected on the solutions of $Xw = y$"
    left.annotate(words, (1.0, 1.01 * plateau), va="bottom", fontsize=SIZE - 1)
    title = "data are fitted at once; the rest decays at rate $\\lambda$"
    finish(left, title, TIME, "distance to the least-norm solution", log="x")
    off = "$\\|w - w^\\lambda\\|/\\|w^\\lambda\\|$"
    finish(right, "simulation against the closed form", TIME, off)
    colours.bar(fig, [left, right])
    return fig


def coefficients(path: gf.Path, truth: Any) -> Figure:
    """Losses and norm in time, and the coefficients β at some times."""
    ts = (0.0, 1e2, 1e5)
    fig, (left, right) = panels(2, **WIDE)
    _losses(left, path, ts)
    x = np.arange(truth.target.shape[0])
    beta = np.asarray(path.models.beta)
    right.axhline(0, color="lightgrey", lw=0.8)
    right.bar(x, np.asarray(truth.target), width=1.8, color="#F0E442", label="target")
    for t, (marker, colour) in zip(ts, SNAPSHOTS, strict=True):
        face = colour if marker == "x" else "none"
        style = dict(ms=5, color=colour, mfc=face, label=f"$t$ = {_time(t)}")
        right.plot(x, beta[_nearest(path, t)], marker, **style)
    title = "only the target's coefficients remain"
    finish(right, title, "index $k$", "coefficient $\\beta_k$", log="")
    return fig


def singular_values(path: gf.Path, truth: Any) -> Figure:
    """Losses and norm in time, and the singular values of UVᵀ."""
    fig, (left, right) = panels(2, **WIDE)
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
    right.set_ylim(top=1.25 * max(target[0], values[:, 0].max()))
    title = "most singular values die in the drift"
    finish(right, title, TIME, "singular values of $UV^\\top$", log="x")
    marks(right, {"$1/\\lambda$": 1 / float(path.weight_decay)})
    return fig


def functions(path: gf.Path, task: gf.tasks.Task, kinks: Any) -> Figure:
    """Losses and norm in time, and the function learnt at some times."""
    ts = (0.0, 1.0, float(path.t[-1]))
    fig, axes = panels(4, columns=4, size=(4.4, 4.4))
    _losses(axes[0], path, ts)
    grid = jnp.linspace(-2.0, 2.0, 801)
    evaluate = eqx.filter_jit(lambda m, x: jax.vmap(m)(x))
    teacher = evaluate(task.truth.teacher, grid)
    low, high = float(teacher.min()), float(teacher.max())
    data: Any = task.loss
    for t, ax in zip(ts, axes[1:], strict=True):
        model = path[_nearest(path, t)]
        ax.plot(grid, teacher, color="#BBBBBB", lw=3, label="teacher")
        learnt = np.asarray(evaluate(model, grid))
        ax.plot(grid, learnt, color=TEST, lw=1.8, label="learnt")
        ax.plot(data.x, data.y, "o", color="black", ms=6, label="training data")
        wide = 0.6 * (high - low)
        if t > 0:
            bottom, top = min(low, learnt.min()), max(high, learnt.max())
            bottom, top = max(bottom, low - 3 * wide), min(top, high + 3 * wide)
            ax.set_ylim(bottom - 0.3, top + 0.3)
        title = f"$t$ = {_time(t)}: {kinks(task, model)} kinks"
        finish(ax, title, "input $x$", "$f(x)$", log="", legend=ax is axes[1])
    return fig


def one_path(path: gf.Path) -> Figure:
    """Losses and norm of one path."""
    fig, (ax,) = panels(1, 1, WIDE["size"])
    _losses(ax, path)
    return fig


def _losses(ax: Axes, path: gf.Path, ts: tuple[float, ...] = ()) -> None:
    t, lam = np.asarray(path.t), float(path.weight_decay)
    train, test = np.asarray(path.train_loss), np.asarray(path.metrics["test"])
    ax.plot(t[1:], train[1:], color=TRAIN, lw=2, label="train loss")
    ax.plot(t[1:], test[1:], color=TEST, lw=2, label="test loss")
    size = 2 * np.asarray(path.penalty)
    ax.plot(t[1:], size[1:], color=PENALTY, lw=2, label="$\\|\\theta\\|^2$")
    finish(ax, f"loss, norm; $\\lambda$ = {gf.plot.power(lam)}", TIME)
    times = {f"$t_{k}$": time for k, time in enumerate(ts, start=1)}
    marks(ax, times | {"$1/\\lambda$": 1 / lam})


def _nearest(path: gf.Path, t: float) -> int:
    return int(np.argmin(np.abs(np.asarray(path.t) - t)))


def _time(t: float) -> str:
    return gf.plot.power(t) if t >= 100 else f"{t:g}"
