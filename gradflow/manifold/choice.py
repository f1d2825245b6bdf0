"""Which form describes the critical manifold, and whether its matrix is made: decided
once, from what users write."""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from .._checks import check_choice, is_concrete
from ..flow.flat import flatten_on
from ..flow.flow import flow_of, GradientFlow
from ..flow.term import AbstractChart, FlowTerm
from ..losses import AbstractCompositeLoss, AbstractLoss
from ..margin_losses import Hinge
from ..runs.problem import check_problem
from ._matrix_free import frobenius
from ._normal import close, outer_root, weighted_jacobian
from .forms import AbstractForm
from .hessian_form import HessianForm
from .jacobian_form import count_outputs, JacobianForm

Form = Literal["auto", "jacobian", "hessian"]
Method = Literal["dense", "matrix-free"] | None


def begin(
    loss: AbstractLoss | GradientFlow, model: PyTree, trainable: PyTree
) -> tuple[FlowTerm, PyTree]:
    """The flow of the loss as a term, and its parameters, checked: of the functions
    that take the loss, or a flow of it."""
    term, params = flow_of(loss, trainable).term(model)
    check_problem(term, params)
    return term, params


def choose_form(
    loss: AbstractLoss, params: PyTree, chart: AbstractChart, form: Form
) -> AbstractForm:
    """The form asked for; with `"auto"`, at a point of M: the Jacobian form where it is
    exact. (`params` are those of a state.)

    **Raises:** `ValueError` for a Jacobian form of a loss that is not composite.
    """
    if form == "auto" and isinstance(loss, AbstractCompositeLoss):
        if all(is_concrete(x) for x in jax.tree.leaves((loss, params, chart))):
            exact = _interpolates(loss, params, chart)
            return JacobianForm() if exact else HessianForm()
    return first_form(loss, params, chart.static, form)


def first_form(
    loss: AbstractLoss, params: PyTree, static: PyTree, form: Form
) -> AbstractForm:
    """The form asked for; with `"auto"`, off M or where nothing is known yet but
    shapes: the Jacobian form for a composite loss that has no more outputs than there
    are parameters, so that interpolation is to be expected; or for a hinge, which asks
    of each output no more than to be on one side.

    **Raises:** `ValueError` for a Jacobian form of a loss that is not composite.
    """
    check_choice(form, "form", ("auto", "jacobian", "hessian"))
    composite = isinstance(loss, AbstractCompositeLoss)
    if form == "jacobian" and not composite:
        raise ValueError(
            f"form: the Jacobian form needs a composite loss, got "
            f"{type(loss).__name__}; use form='hessian'."
        )
    if form == "auto" and composite:
        d = sum(p.size for p in jax.tree.leaves(params))
        likely = isinstance(loss, Hinge) or count_outputs(loss, params, static) <= d
        return JacobianForm() if likely else HessianForm()
    return JacobianForm() if form == "jacobian" else HessianForm()


def is_dense(
    method: Method,
    form: AbstractForm,
    loss: AbstractLoss,
    params: PyTree,
    static: PyTree,
) -> bool:
    """Whether the matrix of the form is made; with `None`, where it is small."""
    check_choice(method, "method", (None, "dense", "matrix-free"))
    if method is None:
        return form.fits(loss, params, static)
    return method == "dense"


@eqx.filter_jit
def _interpolates(
    loss: AbstractLoss, params: PyTree, chart: AbstractChart
) -> Bool[Array, ""]:
    """‖ρ‖ ≤ eps^0.4 ‖A‖ ‖θ‖: the residuals are no more than what a relative change of
    5e-7 of the parameters makes, and the part Σᵢ∇ℓᵢ∇²zᵢ that the Jacobian form leaves
    out of ∇²F is as small."""
    theta, flat = flatten_on(loss, params, chart)
    form = JacobianForm()
    if form.fits(loss, params, chart.static):
        a, rho = weighted_jacobian(flat, theta)
        size, seen = jnp.linalg.norm(a), a.T @ rho
    else:
        _, rho = outer_root(flat, theta)
        op = form.operator(flat, theta)
        size, seen = frobenius(op, theta), op.transpose(rho)
    # (Where ℓ'' is zero on a sample ρ leaves it out.)
    unseen = jnp.linalg.norm(flat.gradient(theta) - seen)
    bound = close(theta.dtype) * size * jnp.linalg.norm(theta)
    return (jnp.linalg.norm(rho) <= bound) & (unseen <= bound * size)
