"""Which form describes the critical manifold: from J, or from ∇²F."""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from .._checks import check_choice, is_concrete
from ..flow.flat import flatten
from ..flow.flow import flow_of, GradientFlow
from ..flow.term import FlowTerm
from ..losses import AbstractCompositeLoss, AbstractLoss
from ..runs.problem import check_problem
from ._matrix_free import choose_method, count_outputs, frobenius, operator
from ._normal import close, outer_root, weighted_jacobian

Form = Literal["auto", "jacobian", "hessian"]


def begin(
    loss: AbstractLoss | GradientFlow, model: PyTree, trainable: PyTree
) -> tuple[FlowTerm, PyTree]:
    """The flow of the loss as a term, and its parameters, checked: of the functions
    that take the loss, or a flow of it."""
    term, params = flow_of(loss, trainable).term(model)
    check_problem(term, params)
    return term, params


def choose_form(loss: AbstractLoss, params: PyTree, static: PyTree, form: str) -> str:
    """Resolves `form="auto"` at a point: the Jacobian form where it is exact."""
    check_choice(form, "form", ("auto", "jacobian", "hessian"))
    composite = isinstance(loss, AbstractCompositeLoss)
    if form == "jacobian" and not composite:
        raise ValueError(
            f"form: the Jacobian form needs a composite loss, got "
            f"{type(loss).__name__}; use form='hessian'."
        )
    if form != "auto":
        return form
    if not composite:
        return "hessian"
    if all(is_concrete(x) for x in jax.tree.leaves((loss, params, static))):
        return "jacobian" if _interpolates(loss, params, static) else "hessian"
    return likely_form(loss, params, static)


def likely_form(loss: AbstractLoss, params: PyTree, static: PyTree) -> str:
    """The form chosen from shapes alone: Jacobian for a composite loss that has no more
    outputs than there are parameters, so that interpolation is to be expected."""
    if not isinstance(loss, AbstractCompositeLoss):
        return "hessian"
    d = sum(p.size for p in jax.tree.leaves(params))
    return "jacobian" if count_outputs(loss, params, static) <= d else "hessian"


@eqx.filter_jit
def _interpolates(
    loss: AbstractLoss, params: PyTree, static: PyTree
) -> Bool[Array, ""]:
    """‖ρ‖ ≤ eps^0.4 ‖A‖ ‖θ‖: the residuals are no more than what a relative change of
    5e-7 of the parameters makes, and the part Σᵢ∇ℓᵢ∇²zᵢ that the Jacobian form leaves
    out of ∇²F is as small."""
    theta, flat = flatten(loss, params, static)
    if choose_method(None, loss, params, static, "jacobian") == "dense":
        a, rho = weighted_jacobian(flat, theta)
        size = jnp.linalg.norm(a)
    else:
        _, rho = outer_root(flat, theta)
        size = frobenius(operator(flat, theta, "jacobian"), theta)
    bound = close(theta.dtype) * size * jnp.linalg.norm(theta)
    return jnp.linalg.norm(rho) <= bound
