"""The orthogonal projection onto the tangent space of the critical manifold."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, PyTree

from .._checks import check_given
from ..flow.flat import flatten_on
from ..flow.flow import GradientFlow
from ..flow.term import AbstractChart
from ..losses import AbstractLoss
from ..precision import exact_products
from ..results import RESULTS, unless_failed
from ._matrix_free import project
from .choice import begin, choose_form, Form, is_dense, Method
from .forms import AbstractForm


@exact_products
def tangent_projection(
    loss: AbstractLoss | GradientFlow,
    model: PyTree,
    v: PyTree,
    *,
    form: Form = "auto",
    rtol: float | None = None,
    method: Method = None,
    max_steps: int | None = None,
    throw: bool = True,
    trainable: PyTree = eqx.is_inexact_array,
) -> PyTree:
    """P v, the part of v along the critical manifold: P = I − J⁺J, or the projection
    onto ker ∇²F.

    The rank is that of [`gradflow.manifold.spectrum`][], and P is a projection exactly:
    J is decomposed into singular values, so the rank is decided once, openly, and the
    condition number is not squared as it is by (JJᵀ)⁻¹.

    Matrix-free, it is v − Jᵀ argmin ‖Jᵀy − v‖ by LSMR, in about κ(J) products with J,
    with an error of about 4e-11 κ(J)‖v‖ at most: for d up to 1e6 and more.

    **Arguments:**

    - `loss`: the training loss, or a flow of it. With `rates` G it is the projection
        that is orthogonal in the metric G⁻¹, P = I − GJᵀ(J G Jᵀ)⁺J.
    - `model`: a model on M.
    - `v`: a pytree like the parameters: with the structure of `model`, or with `None`
        in place of what is not trained.
    - `form`: `"jacobian"`, `"hessian"` or `"auto"`; see
        [`gradflow.manifold.spectrum`][].
    - `rtol`: keeps as normal the directions of values above `rtol` times the largest
        (singular values of J, or eigenvalues), instead of looking for the gap. Dense
        only.
    - `method`: `"dense"`, `"matrix-free"`, or `None`: dense where J has at most 3e7
        entries (∇²F: 2e6).
    - `max_steps`: of LSMR, each a product with J and one with Jᵀ; 100 + 10 min(m, d)
        unless given.
    - `throw`: whether to raise an error where LSMR does not converge; else P v is NaN.
    - `trainable`: a filter, as for [`gradflow.GradientFlow`][].

    **Returns:** P v, a pytree like the trainable parameters.

    **Raises:** `ValueError` where `v` does not match the parameters, or for a Jacobian
    form of a loss that is not composite; `RuntimeError` where `throw` and LSMR did not
    converge (`RESULTS.unresolved`).

    Source: DΦ = P on M is lemma 4.3 of Li, Wang, Arora, arXiv 2110.06914.
    """
    check_given(rtol=rtol, max_steps=max_steps)
    term, params = begin(loss, model, trainable)
    loss, chart = term.loss, term.chart
    v = _like(v, params)
    source = choose_form(loss, params, chart, form)
    if is_dense(method, source, loss, params, chart.static):
        return _project(loss, params, chart, v, source, rtol)
    out, okay = _project_matrix_free(loss, params, chart, v, source, max_steps)
    if throw:
        result = RESULTS.where(okay, RESULTS.successful, RESULTS.unresolved)
        out = unless_failed(out, result, okay)
    return out


@eqx.filter_jit
def _project(
    loss: AbstractLoss,
    params: PyTree,
    chart: AbstractChart,
    v: PyTree,
    form: AbstractForm,
    rtol: float | None,
) -> PyTree:
    theta, flat = flatten_on(loss, params, chart)
    normal = form.exact_normal(flat, theta, rtol=rtol)
    along = normal.tangential(ravel_pytree(chart.state(v))[0])
    return chart.tangent(flat.unravel(along))


@eqx.filter_jit
def _project_matrix_free(
    loss: AbstractLoss,
    params: PyTree,
    chart: AbstractChart,
    v: PyTree,
    form: AbstractForm,
    max_steps: int | None,
) -> tuple[PyTree, Bool[Array, ""]]:
    theta, flat = flatten_on(loss, params, chart)
    op = form.operator(flat, theta)
    out, okay = project(op, ravel_pytree(chart.state(v))[0], max_steps)
    return chart.tangent(flat.unravel(jnp.where(okay, out, jnp.nan))), okay


def _like(v: PyTree, params: PyTree) -> PyTree:
    """The leaves of v where there are parameters."""
    is_none = lambda x: x is None
    wanted = jax.tree.map(lambda p: p is not None, params, is_leaf=is_none)
    try:
        v = eqx.filter(v, wanted)
        match = jax.tree.map(lambda p, q: p.shape == jnp.shape(q), params, v)
    except (TypeError, ValueError) as error:
        raise ValueError("v: expected a pytree like the model.") from error
    if not all(jax.tree.leaves(match)):
        raise ValueError("v: its leaves differ in shape from the model's parameters.")
    return v
