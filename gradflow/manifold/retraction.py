"""The nearest point of the critical manifold."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from .._checks import check_arguments, check_given
from .._host import known
from ..flow.flat import FlatLoss, flatten_on
from ..flow.flow import GradientFlow
from ..flow.term import AbstractChart
from ..losses import AbstractLoss
from ..precision import exact_products
from ..results import among, is_known, named_wrong, only_if_successful, RESULTS
from .choice import begin, first_form, Form
from .forms import AbstractForm
from .hessian_form import HessianForm

# Of the Hessian form, while it is away from M; see there.
_DAMPING = 3.0


class Retraction(eqx.Module):
    """A point of the critical manifold, and how it was reached."""

    model: PyTree
    """The model at that point."""
    residual: Float[Array, ""]
    """The distance to M that is left, relative to ‖θ‖ and to first order: the larger of
    ‖J⁺r‖ and ‖r‖/‖J‖ (or ‖(∇²F)⁺∇F‖ and ‖∇F‖/‖∇²F‖)."""
    steps: Int[Array, ""]
    """How many Gauss–Newton steps it took."""
    result: RESULTS
    """`successful`, or `not_critical`."""

    def __str__(self) -> str:
        end = f"FAILED: {RESULTS[self.result]}"
        if among(self.result, RESULTS.successful):
            end = "reached"
        return (
            f"Point of the critical manifold {end} ({int(self.steps)} steps, relative "
            f"distance left {float(self.residual):.1g})"
        )


@exact_products
def retract(
    loss: AbstractLoss | GradientFlow,
    model: PyTree,
    *,
    form: Form = "auto",
    rtol: float | Scalar | None = None,
    max_steps: int = 64,
    throw: bool = True,
    trainable: PyTree = eqx.is_inexact_array,
) -> Retraction:
    """The point w of M nearest to the model, by Gauss–Newton.

    Jacobian form: least-norm steps w ← w − J⁺(ℓ'')⁻¹∇ℓ(z(w)), until r = 0; Hessian
    form: w ← w − (∇²F)⁺∇F. Once on M, tangential steps w ← w + P(w)(θ − w) are added
    for as long as they shrink; they end where θ − w is normal to M, at the nearest
    point (where θ is too far away for that, at a near one). The first part converges
    quadratically, the second linearly, at the rate distance × curvature of M.

    **Arguments:**

    - `loss`: the training loss, or a flow of it. With `rates` G the nearest point is
        that in the metric G⁻¹, and so are all lengths.
    - `model`: where to start.
    - `form`: `"jacobian"`, `"hessian"`, or `"auto"`: Jacobian where the loss is
        composite and has no more outputs m than parameters d, so that interpolation is
        to be expected; and Hessian should that fail (not under `jit` or `vmap`).
    - `rtol`: the relative size of the last step; 10 eps^⅔ unless given (4e-10 in
        float64).
    - `max_steps`: the most steps.
    - `throw`: whether to raise an error where M is not reached.
    - `trainable`: a filter, as for [`gradflow.GradientFlow`][].

    **Returns:** a [`gradflow.manifold.Retraction`][], its `result` `successful` or
    `not_critical`.

    **Raises:** `ValueError` for arguments that make no sense, or a Jacobian form of a
    loss that is not composite; `RuntimeError` where `throw` and M is not reached.
    """
    wrong = check_arguments(max_steps=max_steps) | check_given(rtol=rtol)
    term, params = begin(loss, model, trainable)
    _, out = retract_in_form(term.loss, params, term.chart, form, rtol, max_steps)
    out = named_wrong(out, wrong, lambda o: (o.model, o.residual))
    if throw:
        out = only_if_successful(out, out.result)
    return out


def retract_in_form(
    loss: AbstractLoss,
    params: PyTree,
    chart: AbstractChart,
    form: Form,
    rtol: float | Scalar | None = None,
    max_steps: int = 64,
) -> tuple[AbstractForm, Retraction]:
    """The retraction, and the form that served: `"auto"` tries the likely one first."""
    served = first_form(loss, params, chart.static, form)
    out = _retract(loss, params, chart, served, rtol, max_steps)
    if form == "auto" and served.interpolating and failed(out.result):
        served = HessianForm()
        out = _retract(loss, params, chart, served, rtol, max_steps)
    return served, out


@eqx.filter_jit
def _retract(
    loss: AbstractLoss,
    params: PyTree,
    chart: AbstractChart,
    form: AbstractForm,
    rtol: float | Scalar | None,
    max_steps: int,
) -> Retraction:
    theta, flat = flatten_on(loss, params, chart)
    w, residual, steps, ok = nearest(flat, theta, form, rtol, max_steps)
    result = RESULTS.where(ok, RESULTS.successful, RESULTS.not_critical)
    return Retraction(flat.model(w), residual, steps, result)


def nearest(
    loss: FlatLoss,
    theta: Float[Array, " d"],
    form: AbstractForm,
    rtol: float | Scalar | None = None,
    max_steps: int = 64,
) -> tuple[Float[Array, " d"], Float[Array, ""], Int[Array, ""], Bool[Array, ""]]:
    """`retract` for a vector: the point, residual, steps, and whether it is on M."""
    eps = jnp.finfo(theta.dtype).eps
    small = 10 * eps ** (2 / 3) if rtol is None else rtol

    def body(carry):
        w, last, steps, _ = carry
        normal = form.normal(loss, w, damping=_DAMPING)
        size = jnp.linalg.norm(normal.step)
        tangent = normal.tangential(theta - w)
        slide = jnp.linalg.norm(tangent)
        away = jnp.linalg.norm(theta - w)
        goal = small * jnp.linalg.norm(w)
        # Off M the tangent space is not yet the right one; and tangential steps that do
        # not shrink will not converge.
        useful = (size <= 0.1 * away + goal) & (slide < 0.9 * last)
        w = w + normal.step + jnp.where(useful, tangent, 0)
        done = (size <= goal) & (~useful | (slide <= goal))
        return w, jnp.where(useful, slide, last), steps + 1, done

    start = (theta, jnp.full_like(theta[0], jnp.inf), jnp.array(0), jnp.array(False))
    w, _, steps, _ = jax.lax.while_loop(
        lambda carry: ~carry[3] & (carry[2] < max_steps), body, start
    )
    end = form.normal(loss, w)
    size = jnp.maximum(jnp.linalg.norm(w), jnp.finfo(w.dtype).tiny)
    # A step that does not see the residuals, as where J lacks rank, proves nothing: so
    # their own size counts as well.
    residual = jnp.maximum(jnp.linalg.norm(end.step), end.force) / size
    return w, residual, steps, residual <= small


def failed(result: RESULTS) -> bool:
    """Whether it is known now that `result` is a failure."""
    return is_known(result) and not np.all(known(among(result, RESULTS.successful)))
