"""How regular the critical manifold stays along a drift, and up to where λ is small
enough for the theory."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._checks import (
    check_arguments,
    check_given,
    check_positive,
    is_concrete,
    word,
)
from ..flow.flat import flatten_on
from ..flow.flow import flow_of, GradientFlow
from ..flow.term import FlowTerm
from ..losses import AbstractLoss
from ..precision import exact_products
from ..results import RESULTS
from ..runs.interpolate import holds_until
from .choice import choose_form, Form
from .diagnosis import dense_geometry, drift_and_bend
from .drift import Drift
from .forms import AbstractForm
from .spectra import measure


class Regularity(eqx.Module):
    """The critical manifold along a drift, at n slow times. Print it for a summary."""

    slow_time: Float[Array, " n"]
    """s, at which the drift was saved."""
    rank: Int[Array, " n"]
    """The numerical rank at each."""
    ambiguous: Bool[Array, " n"]
    """Whether there it is a guess."""
    smallest_curvature: Float[Array, " n"]
    """η(s): the curvature that was the smallest normal one at the start, followed by
    its place in the order."""
    curvature: Float[Array, " n"]
    """‖II(u, u)‖/‖u‖², u = P∇R: that of M along the drift."""
    form: str = eqx.field(static=True)
    """`"jacobian"` or `"hessian"`."""
    result: RESULTS
    """`successful`; `rank_lost` where the rank falls, `ambiguous_rank` where it is a
    guess from the start; else that of the path."""

    @property
    def sigma_min(self) -> Float[Array, " n"]:
        """√η: the smallest singular value of (ℓ'')^½J that counts."""
        return jnp.sqrt(self.smallest_curvature)

    @property
    def regular_until(self) -> float:
        """The last slow time up to which the rank is that of the start, and no guess;
        NaN where it is a guess from the start."""
        lost = np.asarray((self.rank != self.rank[0]) | self.ambiguous)
        first = int(np.argmax(lost)) if lost.any() else lost.size
        return float(self.slow_time[first - 1]) if first else np.nan

    def valid_until(self, weight_decay: float, *, margin: float = 10.0) -> float:
        """The slow time at which η falls below `margin` times λ: fast and slow are then
        no longer apart, and the two-phase theory ends.

        **Arguments:**

        - `weight_decay`: λ > 0.
        - `margin`: how much larger than λ η has to be. The error of the prediction is
            about λ/η.

        **Returns:** the slow time, between saved ones by interpolation of log η; the
        last one if η stays above, 0 if it is below, or the rank a guess, from the
        start. Never later than `regular_until`.

        **Raises:** `ValueError` unless λ is a positive number.
        """
        check_positive(weight_decay, "weight_decay")
        check_arguments(margin=margin)
        if np.isnan(self.regular_until):
            return 0.0
        share = np.asarray(self.smallest_curvature) / (margin * weight_decay)
        end = holds_until(np.asarray(self.slow_time), share)
        return min(end, self.regular_until)

    def __str__(self) -> str:
        eta, s = np.asarray(self.smallest_curvature), np.asarray(self.slow_time)
        bend = np.asarray(self.curvature)
        decades = ", ".join(
            f"{self.valid_until(lam):.3g} (λ = {lam:.0e})" for lam in (1e-2, 1e-4, 1e-6)
        )
        until = self.regular_until
        regular = "not regular" if np.isnan(until) else f"regular up to s = {until:.3g}"
        lines = [
            f"Critical manifold along a drift to s = {s[-1]:.3g}: rank "
            f"{int(self.rank[0])} → {int(self.rank[-1])}, {regular}",
            f"  smallest normal curvature η {eta[0]:.2g} → {eta[-1]:.2g}; curvature "
            f"of M along the drift {bend[0]:.2g} → {bend[-1]:.2g}, at most "
            f"{np.nanmax(bend):.2g}",
            f"  theory valid up to s = {decades}",
        ]
        if bool(self.result != RESULTS.successful):
            lines.append(f"  {RESULTS[self.result]}")
        return "\n".join(lines)


@exact_products
def regularity(
    flow: GradientFlow | AbstractLoss,
    path: Drift,
    *,
    form: Form = "auto",
    rtol: float | None = None,
) -> Regularity:
    """Rank, smallest normal curvature and curvature of M along a drift.

    **Arguments:**

    - `flow`: the flow whose drift `path` is, or its loss, if all is trainable. With
        `rates` G curvatures are those of the metric G⁻¹.
    - `path`: from [`gradflow.manifold.riemannian_flow`][].
    - `form`, `rtol`: as for [`gradflow.manifold.spectrum`][]; one form for all points,
        chosen at the first. Dense: one decomposition for each point.

    **Returns:** a [`gradflow.manifold.Regularity`][].

    **Raises:** `ValueError` for a Jacobian form of a loss that is not composite, and
    for a drift that failed before its last time.

    Source: assumption 2 of Boursier, Pesme, Dragomir, arXiv 2505.20172.
    """
    flow = flow_of(flow)
    check_given(rtol=rtol)
    if not isinstance(path, Drift):
        raise ValueError(
            f"path: expected a drift from riemannian_flow, got {word(path)}."
        )
    for leaf in jax.tree.leaves(path.params):
        if is_concrete(leaf) and not np.isfinite(leaf).all():
            raise ValueError(
                "path: the drift failed before its last time, its parameters are not "
                f"finite. {RESULTS[path.result]}"
            )
    term, params = flow.term(path[0])
    source = choose_form(flow.loss, params, term.chart, form)
    return _regularity(term, path, source, rtol)


@eqx.filter_jit
def _regularity(
    term: FlowTerm, path: Drift, form: AbstractForm, rtol: float | None
) -> Regularity:
    first = jax.tree.map(lambda p: p[0], path.params)
    theta, loss = flatten_on(term.loss, term.chart.state(first), term.chart)
    start = measure(loss, theta, form, rtol)

    def at(params):
        theta, loss = flatten_on(term.loss, term.chart.state(params), term.chart)
        found = measure(loss, theta, form, rtol)
        geometry = dense_geometry(loss, theta, form, found.rank)
        u, bend, _ = drift_and_bend(term, loss, theta, geometry)
        speed = jnp.linalg.norm(u)
        relative = jnp.linalg.norm(bend) / jnp.where(speed > 0, speed, 1) ** 2
        last = found.curvatures[jnp.maximum(start.rank - 1, 0)]
        eta = jnp.where(start.rank > 0, last, jnp.inf)
        # Of a path that is traced, NaNs are found here alone.
        ambiguous = found.ambiguous | ~jnp.all(jnp.isfinite(theta))
        return found.rank, ambiguous, eta, relative

    # One at a time: a Jacobian for each of the saved points would fill the memory.
    rank, ambiguous, eta, bend = jax.lax.map(at, path.params)
    changed = jnp.any((rank != rank[0]) | ambiguous)
    result = RESULTS.where(changed, RESULTS.rank_lost, RESULTS.successful)
    result = RESULTS.where(ambiguous[0], RESULTS.ambiguous_rank, result)
    failed = (result == RESULTS.successful) & ~path.succeeded
    result = RESULTS.where(failed, path.result, result)
    return Regularity(path.s, rank, ambiguous, eta, bend, form.name, result)
