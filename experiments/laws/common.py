"""What the laws share: the networks, the drift's κ, and how a verdict is reached."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import xarray as xr
from jaxtyping import Array, Float, PyTree, Scalar
from scipy.interpolate import CubicSpline

import gradflow as gf

from ..shared.command import Settings
from ..shared.rows import attempt, Row


def diagonal(seed: int, scale: float = 1.0) -> gf.tasks.Task:
    """β = u ⊙ u − v ⊙ v: 3 of 50 coefficients from 25 samples."""
    return gf.tasks.diagonal_network(
        jr.key(seed), samples=25, dim=50, sparsity=3, init_scale=0.5 * scale
    )


def tanh(seed: int, scale: float = 1.0) -> gf.tasks.Task:
    """A student of 40 neurons, 10 samples of a teacher of 3."""
    return gf.tasks.teacher_student(
        jr.key(seed), init_scale=1.5 * scale, test_samples=200
    )


def transformer(seed: int, scale: float = 1.0) -> gf.tasks.Task:
    """A small one on a + b mod 23, by cross-entropy."""
    return gf.tasks.modular_transformer(
        jr.key(seed), modulus=23, fraction=0.6, width=32, hidden=128,
        activation="gelu", init_scale=scale,
    )  # fmt: skip


NETWORKS: dict[str, Callable[..., gf.tasks.Task]] = dict(diagonal=diagonal, tanh=tanh)
OTHERS: dict[str, Callable[..., gf.tasks.Task]] = dict(transformer=transformer)
"""Of which laws may be asked."""
FLOWS: dict[str, dict[str, Any]] = dict(transformer=dict(solver=gf.RKC2(), rtol=1e-3))
"""How these are followed, where that is not the default."""


@dataclasses.dataclass(frozen=True)
class Law(Settings):
    """Of every law. It has claims, which are what it says, controls, without which they
    are not judged, and rivals, which are what theory says instead."""

    seeds: int = 6
    """How many, from `seed` on."""

    def each_seed(self) -> list[int]:
        return list(range(self.seed, self.seed + self.seeds))

    def controls(self, data: xr.Dataset) -> list[Row]:
        """What is exact, or known otherwise; nothing is concluded where it fails."""
        return []

    @abc.abstractmethod
    def claims(self, data: xr.Dataset) -> list[Row]:
        """What the law says, a row for each setting: where one fails it is refuted."""

    def rivals(self, data: xr.Dataset) -> list[Row]:
        """What two-phase theory says instead, where it is another thing."""
        return []

    def judge(self, data: xr.Dataset) -> list[Row]:
        controls = attempt(self.controls, data)
        claims = attempt(self.claims, data)
        rivals = attempt(self.rivals, data)
        return [*controls, *claims, *rivals, verdict(controls, claims)]


def verdict(controls: Sequence[Row], claims: Sequence[Row]) -> Row:
    """The part of the claims that hold, and what follows, in words: the law `holds`, is
    `refuted`, or `holds where` some do; `open` where a control fails or nothing is
    judged."""
    judged = [row for row in claims if row.ok is not None]
    good = [row.name for row in judged if row.ok]
    bad = [row.name for row in judged if not row.ok]
    if not judged or any(row.ok is False for row in controls):
        words = "open: " + ("a control failed" if judged else "nothing was judged")
    elif not bad:
        words = "holds: " + "; ".join(good)
    elif not good:
        words = "refuted: " + "; ".join(bad)
    else:
        words = f"holds where: {'; '.join(good)}. Refuted: {'; '.join(bad)}"
    share = len(good) / len(judged) if judged else float("nan")
    return Row("verdict", share, "", None, words)


class Contraction(NamedTuple):
    """How the squared norm falls along a drift, node by node."""

    s: Float[np.ndarray, " n"]
    """Slow time."""
    size: Float[np.ndarray, " n"]
    """V = ‖w‖²."""
    kappa: Float[np.ndarray, " n"]
    """κ = ‖Pŵ‖², or ŵᵀPŵ where P is oblique: d ln V/ds = −2κ."""

    def until(self, s: float) -> float:
        """½∫ d ln V/κ from the start to slow time s, by a spline in ln V: what the law
        has for λ times the delay. It does not look at s but to find where V ends. NaN
        at NaN."""
        if not np.isfinite(s):
            return np.nan
        x = -np.log(self.size)
        falls = np.append(np.diff(x) > 1e-12, True)
        end = CubicSpline(self.s, x)(s)
        curve = CubicSpline(x[falls], 0.5 / self.kappa[falls])
        return float(curve.integrate(x[0], end))

    def log_ratio(self, s: float) -> float:
        """½ ln(V(0)/V(s))."""
        x = CubicSpline(self.s, np.log(self.size))
        return float(x(0.0) - x(s)) / 2

    def constant(self, s: float) -> float:
        """The one κ with which ½ ln(V(0)/V(s))/κ is the slow time s: the harmonic mean
        of κ(V), weighted by ln V, as `until(s)` is s."""
        return self.log_ratio(s) / s


def contraction(flow: gf.GradientFlow, drift: gf.manifold.Drift) -> Contraction:
    """V and κ at all nodes of a drift of R = ½‖θ‖² (or of decoupled decay)."""
    size, kappa = _contraction(flow, drift.params, drift.static)
    return Contraction(np.asarray(drift.s), np.asarray(size), np.asarray(kappa))


@eqx.filter_jit
def _contraction(
    flow: gf.GradientFlow, params: PyTree, static: PyTree
) -> tuple[Array, Array]:
    def at(p: PyTree) -> tuple[Scalar, Scalar]:
        model = eqx.combine(p, static)
        along = gf.manifold.tangent_projection(flow, model, p)
        size, part = (jnp.asarray(optax.tree.vdot(p, v)) for v in (p, along))
        return size, part / size

    return jax.lax.map(at, params)


@functools.cache
def adam(eps: float) -> Any:
    """With the β₂ of the papers on grokking; a function of the learning rate."""
    return functools.partial(optax.adam, b2=0.98, eps=eps)


def size_at(path: gf.Path, t: float) -> float:
    """‖θ‖² of a path at time t, by a line in time between its nodes."""
    return float(np.interp(t, np.asarray(path.t), 2 * np.asarray(path.penalty)))


def lone(values: Any) -> np.ndarray:
    """Those that are numbers."""
    values = np.asarray(values, float)
    return values[np.isfinite(values)]


def from_limit(
    task: gf.tasks.Task, slow_time: float, **options: Any
) -> gf.manifold.Drift:
    """The drift from Φ(θ₀)."""
    limit = gf.manifold.limit_map(task.flow, task.model)
    return gf.manifold.riemannian_flow(
        task.flow, limit.model, slow_time=slow_time, metrics=task.metrics,
        throw=False, **options,
    )  # fmt: skip


def at_level(task: gf.tasks.Task, level: float) -> gf.Metric:
    """The test metric, with a threshold of so many times its usual one."""
    test = task.metrics["test"]
    assert test.threshold is not None
    return gf.Metric(test.fn, threshold=level * test.threshold)
