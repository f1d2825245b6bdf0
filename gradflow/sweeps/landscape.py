"""Losses against the norm of the parameters: the loss landscape, reduced to one
dimension."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from .._checks import as_level, check_times
from ..flow.flow import check_flow, GradientFlow
from ..losses import AbstractLoss
from ..metrics import Metric
from ..precision import exact_products
from ..runs.path import Path
from ..runs.problem import as_metrics, check_values
from .sweep import sweep


class Landscape(eqx.Module):
    """The reduced losses l̃(w) = l(argmin_{‖θ‖ = w} F) at n norms w, for each of several
    starts. Print it for a summary."""

    scale: Float[np.ndarray, " n"]
    """α: the norms, relative to those of the models given."""
    norm: Float[np.ndarray, "starts n"]
    """w = ‖θ‖ = α‖θ₀‖."""
    train_loss: Float[np.ndarray, "starts n"]
    """F at its minimiser on the sphere."""
    metrics: dict[str, Float[np.ndarray, "starts n"]]
    """The metrics there."""
    slope: Float[np.ndarray, "starts n"]
    """‖(I − θ̂θ̂ᵀ)∇F‖‖θ‖/F where the run ended, with F for what is left to fall: a run at
    rest has little of it. Zero where F itself is rounding."""
    succeeded: np.ndarray
    """Whether the run reached its end, of shape (starts, n)."""
    watched: dict[str, Metric]
    """The metrics themselves, with their thresholds."""

    def best(self, name: str = "test") -> Float[np.ndarray, " starts"]:
        """w_c: the norm at which metric `name` is best, for each start; between the
        norms by the parabola through the best and its neighbours, in the logarithms.
        NaN where no run reached its end.

        **Raises:** `ValueError` where no metric has that name.
        """
        values, _ = self._toward_low(name)
        out = []
        for w, v in zip(np.log(self.norm), values, strict=True):
            if np.isnan(v).all():  # no run reached its end
                out.append(np.nan)
                continue
            i = int(np.nanargmin(v))
            x = w[i]
            if 0 < i < len(w) - 1:
                y = v[i - 1 : i + 2]
                y = np.log(y) if (y > 0).all() else y
                p = np.polyfit(w[i - 1 : i + 2] - x, y, 2)
                shift = -p[1] / (2 * p[0]) if p[0] > 0 else 0.0
                x = x + np.clip(shift, w[i - 1] - x, w[i + 1] - x)
            out.append(np.exp(x))
        return np.asarray(out)

    def zone(self, name: str = "test", *, threshold: float | None = None) -> np.ndarray:
        """The Goldilocks zone: the range of norms around the best one where the metric
        passes its threshold; NaNs where it never does.

        **Arguments:**

        - `name`: the metric.
        - `threshold`: what it has to pass; that of the metric unless given.

        **Returns:** the smallest and the largest norm for each start, of shape
        (starts, 2); between the norms by interpolation in the logarithm of w.

        **Raises:** `ValueError` where no metric has that name; or where it has no
        threshold, and none is given.
        """
        values, sign = self._toward_low(name)
        own = self.watched[name].threshold
        level = own if threshold is None else as_level(threshold)
        if level is None:
            raise ValueError(f"threshold: the metric {name!r} has none; give one.")
        out = []
        for w, v in zip(np.log(self.norm), values, strict=True):
            i = 0 if np.isnan(v).all() else int(np.nanargmin(v))
            if not v[i] <= sign * level:
                out.append((np.nan, np.nan))
                continue
            ends = [self._edge(w, v, i, step, sign * level) for step in (-1, 1)]
            out.append(tuple(np.exp(ends)))
        return np.asarray(out)

    @staticmethod
    def _edge(w, v, i, step, level):
        while 0 <= i + step < len(w) and v[i + step] <= level:
            i += step
        if not 0 <= i + step < len(w) or not np.isfinite(v[i + step]):
            return w[i]
        part = (level - v[i]) / (v[i + step] - v[i])
        return w[i] + part * (w[i + step] - w[i])

    def _toward_low(self, name: str) -> tuple[np.ndarray, int]:
        if name not in self.metrics:
            raise ValueError(
                f"name: no metric is named {name!r}, but {list(self.metrics)}."
            )
        sign = -1 if self.watched[name].higher_is_better else 1
        return sign * self.metrics[name], sign

    def __str__(self) -> str:
        lines = [
            f"Loss landscape at {len(self.scale)} norms, {len(self.norm)} starts",
            f"  {'α':>8} {'norm':>9} {'train loss':>11}"
            + "".join(f" {k:>10}" for k in self.metrics)
            + f" {'slope':>8}",
        ]

        def middle(values: np.ndarray, i: int) -> float:
            return float(np.median(values[:, i]))

        for i, a in enumerate(self.scale):
            row = f"  {a:8.3g} {middle(self.norm, i):9.3g}"
            row += f" {middle(self.train_loss, i):11.3g}"
            row += "".join(f" {middle(v, i):10.3g}" for v in self.metrics.values())
            row += f" {middle(self.slope, i):8.1g}"
            failed = int((~self.succeeded[:, i]).sum())
            lines.append(row + (f"  {failed} FAILED" if failed else ""))
        if "test" in self.metrics:
            lines.append(f"  test is best at a norm of {np.median(self.best()):.3g}")
        return "\n".join(lines)

    def plot(self, **kwargs: Any) -> Any:
        """The figure of the L and the U, as [`gradflow.plot.landscape`][] draws it;
        `kwargs` are its options."""
        from .. import plot

        return plot.landscape(self, **kwargs)


@exact_products
def landscape(
    flow: GradientFlow | AbstractLoss,
    models: PyTree | Sequence[PyTree],
    *,
    scales: Float[Array | np.ndarray, " n"] | Sequence[float],
    t1: float | None = None,
    metrics: dict[str, Callable | Metric] | None = None,
    progress: bool = True,
    **options: Any,
) -> Landscape:
    """The reduced losses at the norms α‖θ₀‖.

    By default the flow on the sphere, θ' = −(I − θ̂θ̂ᵀ)∇F, runs from αθ₀ to time t₁. With
    `run=gf.Descent(learning_rate=…, steps=…)` it is stepped instead, each step of the
    optimiser followed by a rescaling to the norm, as in the paper; as the learning rate
    of plain gradient descent goes to zero, that is the flow. (An optimiser that scales
    coordinates, as Adam does, comes to rest elsewhere than at the minimum, unless F has
    a critical point on the sphere: what is radial in ∇F is no longer so in its step.)

    **Arguments:**

    - `flow`: the flow, or its loss; a penalty plays no part, and the norm is held.
    - `models`: an initial model, or a list of them (seeds).
    - `scales`: α, increasing and positive.
    - `t1`: the time to which the flow runs.
    - `metrics`: functions of the model, by name.
    - `progress`: show a bar.
    - `options`: for [`gradflow.sweep`][]: those of `simulate`; `run`, for descents; and
        `batch="vmap"`, the default on an accelerator, which runs all starts and norms
        in lockstep. (For many data sizes sweep with `axes`, over flows that hold the
        norm.)

    **Returns:** a [`gradflow.Landscape`][].

    **Raises:** `ValueError` for arguments that make no sense.

    Source: Liu, Michaud, Tegmark, arXiv 2210.01117, section 2.
    """
    if isinstance(flow, AbstractLoss):
        flow = GradientFlow(flow)
    check_flow(flow)
    if flow.rates is not None:
        raise ValueError("flow: it has rates, and where the norm is held there is one.")
    check_times(scales, "scales", 3)
    scales = np.asarray(scales, float)
    if not scales[0] > 0:
        raise ValueError("scales: expected three or more increasing positive numbers.")
    if options.get("run") is None and t1 is None:
        raise ValueError(
            "t1: give the time to run to, or run=gf.Descent(learning_rate=…, steps=…)."
        )
    seeds = list(models) if isinstance(models, (list, tuple)) else [models]
    held = GradientFlow(flow.loss, trainable=flow.trainable, hold_norm=True)
    watched = as_metrics(metrics)
    for name, shape in check_values(flow.loss, watched, seeds[0]).items():
        if shape != ():
            raise ValueError(
                f"metrics[{name!r}]: a landscape is of single numbers, and this gives "
                f"an array of shape {shape}."
            )
    lanes = sweep(
        lambda start: (held, seeds[start], watched),
        axes={"start": range(len(seeds))},
        init_scale=scales,
        weight_decay=0.0,
        **{"saves": 3, "t1": t1, "progress": progress, **options},
    )
    rows = [_end(held, path) for path in lanes]
    shape = (len(seeds), len(scales))
    table = {k: np.array([r[k] for r in rows]).reshape(shape) for k in rows[0]}
    fixed = {k: table.pop(k) for k in ("norm", "train_loss", "slope", "succeeded")}
    return Landscape(scale=scales, metrics=table, watched=watched, **fixed)


def _end(flow: GradientFlow, path: Path) -> dict[str, float]:
    last = jax.tree.map(lambda p: p[-1], path.params)
    norm = float(optax.tree.norm(last))
    out = {k: float(v[-1]) for k, v in path.metrics.items()}
    train = float(path.train_loss[-1])
    speed = float(_speed(flow, eqx.combine(last, path.static)))
    floor = np.finfo(path.t.dtype).eps ** 2
    slope = speed * norm / train if train > floor else 0.0
    return {
        **out,
        "norm": norm,
        "train_loss": train,
        "slope": slope,
        "succeeded": bool(path.succeeded),
    }


@eqx.filter_jit
def _speed(flow: GradientFlow, model: PyTree) -> Array:
    term, params = flow.term(model)
    return optax.tree.norm(term.vf(0.0, params, 0.0))
