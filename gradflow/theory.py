"""The two-phase theory: fast flow to the critical manifold, then a slow drift on it."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ._checks import check_horizon, check_tolerance, resolvable
from ._interpolate import interpolate
from .flow import GradientFlow
from .losses import AbstractCompositeLoss
from .manifold import Limit, limit_map, retract, riemannian_flow, Spectrum, spectrum
from .metrics import Metric
from .path import Path
from .results import RESULTS
from .simulate import as_metrics, check_scalars, simulate
from .solvers import KKT5, sharpness

_NODES = 257  # of the fast path, evenly spaced in log(1 + t/τ)


class TwoPhase(eqx.Module):
    """The prediction for every small weight decay at once.

    θ_λ(t) ≈ θ_GF(t) + w°(λt) − Φ(θ₀), uniformly in t with an error of O(λ), as long as
    λ is small against the smallest normal curvature of F along the drift. Convergence:
    Boursier, Pesme, Dragomir, arXiv 2505.20172, propositions 1 and 2.
    """

    limit: PyTree
    """The model Φ(θ₀) at which the fast phase ends and the drift begins."""
    fast: Path
    """θ_GF, the flow without weight decay, in time t."""
    drift: Path
    """w°, the Riemannian flow of R on the critical manifold, in slow time s."""
    spectrum: Spectrum
    """The curvature of F at Φ(θ₀): rank, dimension of the manifold, gap."""
    fast_scale: Float[Array, ""]
    """τ: the fast path is saved evenly in log(1 + t/τ)."""
    interpolation_error: Float[Array, ""]
    """A bound on what interpolating the two paths adds to the error, relative to
    ‖Φ(θ₀)‖: what it would add with every second point left out."""
    result: RESULTS

    @property
    def smallest_curvature(self) -> Float[Array, " n"]:
        """η(s) along the drift; theory needs λ ≪ η."""
        return self.drift.stats["smallest_curvature"]

    def predict(
        self,
        t: Float[Array, " *n"] | float,
        weight_decay: float | Float[Array, ""],
    ) -> PyTree:
        """The composite prediction θ_GF(t) + w°(λt) − Φ(θ₀).

        **Arguments:**

        - `t`: one time or a vector of n, in time t (not λt).
        - `weight_decay`: λ.

        **Returns:** a model; its trainable leaves are stacked along `t` if that is a
        vector. NaN beyond the slow time to which the drift was computed.
        """
        dtype = self.fast.t.dtype
        t, lam = jnp.asarray(t, dtype), jnp.asarray(weight_decay, dtype)
        at_once = lambda x: self.predict_params(x, lam)
        params = at_once(t) if t.ndim == 0 else jax.lax.map(at_once, t)
        return eqx.combine(params, self.drift.static)

    def predict_params(self, t: Float[Array, ""], lam: Float[Array, ""]) -> PyTree:
        """As `predict`, for one time: the trainable parameters alone."""
        end_t, end_s = self.fast.t[-1], self.drift.t[-1]
        spacing = lambda end, scale, n: jnp.log1p(end / scale) / (n - 1)
        fast = interpolate(
            self.fast.params,
            jnp.log1p(t / self.fast_scale)
            / spacing(end_t, self.fast_scale, len(self.fast)),
        )
        s = lam * t
        drift = interpolate(
            self.drift.params, jnp.log1p(s) / spacing(end_s, 1.0, len(self.drift))
        )
        # Beyond its last time the fast path has arrived.
        arrived = t >= end_t
        known = s <= end_s * (1 + 8 * jnp.finfo(s.dtype).eps)
        return jax.tree.map(
            lambda w, th, ths: jnp.where(
                known, w + jnp.where(arrived, 0.0, th - ths[-1]), jnp.nan
            ),
            drift,
            fast,
            self.fast.params,
        )

    def __str__(self) -> str:
        eta = self.smallest_curvature
        lines = [
            f"Two-phase theory: {self.spectrum}",
            f"  fast phase to t = {float(self.fast.t[-1]):.3g}, drift to "
            f"s = {float(self.drift.t[-1]):.3g}; smallest normal curvature η = "
            f"{float(eta[0]):.2g} at its start, {float(eta[-1]):.2g} at its end",
        ]
        if float(self.interpolation_error) > 1e-6:
            lines.append(
                "  interpolated with a relative error of up to "
                f"{float(self.interpolation_error):.1g}: a phase changes abruptly, "
                "late in its course"
            )
        if not bool(self.result == RESULTS.successful):
            lines.append(f"  FAILED: {RESULTS[self.result]}")
        return "\n".join(lines)


def two_phase(
    flow: GradientFlow,
    model: PyTree,
    *,
    slow_time: float,
    metrics: dict[str, Callable | Metric] | None = None,
    rtol: float = 1e-9,
    max_steps: int = 100_000,
    throw: bool = True,
) -> TwoPhase:
    """Predicts the flow from `model` for all small weight decays.

    Three runs: the limit map, the fast path on a grid fit for interpolation, and the
    Riemannian flow from its end.

    **Arguments:**

    - `flow`: loss and penalty.
    - `model`: the initial model θ₀.
    - `slow_time`: how far to follow the drift, s = λt.
    - `metrics`: as for `simulate`; recorded along both phases.
    - `rtol`: the tolerance of the runs.
    - `max_steps`: the budget of steps of each.
    - `throw`: raise where theory does not apply; otherwise see `result`.

    **Returns:** a `TwoPhase`.

    **Raises:** `ValueError` for arguments that make no sense; `RuntimeError` if `throw`
    and there is no limit (the loss has no minimiser, say) or the drift fails.
    """
    term, params = flow.term(model)
    check_tolerance(rtol)
    rtol = resolvable(rtol, params)
    check_horizon(1.0, slow_time, None, None, _NODES)
    check_scalars(flow.loss, as_metrics(metrics), model)
    limit = limit_map(
        flow.loss,
        model,
        rtol=rtol,
        max_steps=max_steps,
        throw=throw,
        trainable=flow.trainable,
    )
    # A failed run ends in NaN: there the limit, wherever it got to, stands in.
    at_limit = spectrum(flow.loss, limit.model, trainable=flow.trainable)
    tau, ts = _fast_times(term, params, limit, at_limit.smallest_curvature)
    fast = simulate(
        flow,
        model,
        weight_decay=0.0,
        ts=ts,
        metrics=metrics,
        solver=_solver(flow),
        rtol=rtol,
        max_steps=max_steps,
        throw=False,
    )
    # The end of the fast path itself, so that the two phases meet to all digits.
    last = fast[-1] if bool(fast.succeeded) else limit.model
    end = retract(flow.loss, last, throw=False, trainable=flow.trainable)
    drift = riemannian_flow(
        flow,
        end.model,
        slow_time=slow_time,
        metrics=metrics,
        rtol=rtol,
        max_steps=max_steps,
        throw=False,
    )
    result = _first_failure(limit.result, fast.result, end.result, drift.result)
    error = _interpolation_error(fast, drift)
    out = TwoPhase(end.model, fast, drift, at_limit, tau, error, result)
    # Past the loss of rank the drift still stands; its validity is for the report.
    standing = (RESULTS.successful, RESULTS.rank_lost, RESULTS.slid)
    fatal = jnp.all(jnp.stack([result != r for r in standing]))
    return result.error_if(out, fatal) if throw else out


def _solver(flow: GradientFlow) -> KKT5 | None:
    """The one that the drift takes too, so that both compile once."""
    return KKT5() if isinstance(flow.loss, AbstractCompositeLoss) else None


def _fast_times(
    term: Any, params: PyTree, limit: Limit, curvature: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, " nodes"]]:
    """τ and the times of the fast path, evenly spaced in log(1 + t/τ), to where e^{−ηt}
    has brought it from the 5e-7 of `limit_map` to 1e-12 of the limit."""
    # Where ∇²F vanishes at θ₀ the limit's own time is all there is to go by.
    tau = jnp.minimum(0.2 / sharpness(term, params), 1e-3 * (1 + limit.time))
    end = limit.time + 13.0 / jnp.where(jnp.isfinite(curvature), curvature, 1.0)
    end = jnp.maximum(end, 10 * tau)
    x = jnp.linspace(0.0, 1.0, _NODES, dtype=end.dtype) * jnp.log1p(end / tau)
    ts = (tau * jnp.expm1(x)).at[-1].set(end)
    return tau, ts


@eqx.filter_jit
def _interpolation_error(fast: Path, drift: Path) -> Float[Array, ""]:
    """The error of paths thinned to every second point, at the points left out."""

    def off(path):
        thin = jax.tree.map(lambda p: p[::2], path.params)
        odd = jnp.arange(1, len(path), 2)
        at = jax.lax.map(lambda i: interpolate(thin, i / 2), odd.astype(path.t.dtype))
        squares = jax.tree.map(
            lambda a, p: jnp.sum((a - p[1::2]).reshape(odd.size, -1) ** 2, axis=1),
            at,
            path.params,
        )
        return jnp.sqrt(jnp.max(sum(jax.tree.leaves(squares))))

    size = jnp.sqrt(sum(jnp.sum(w[0] ** 2) for w in jax.tree.leaves(drift.params)))
    return (off(fast) + off(drift)) / size


def _first_failure(*results: RESULTS) -> RESULTS:
    out = results[-1]
    for result in reversed(results[:-1]):
        out = RESULTS.where(result == RESULTS.successful, out, result)
    return out
