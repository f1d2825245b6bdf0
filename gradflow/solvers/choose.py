"""Which solver to take when none is named."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optimistix as optx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree, Scalar

from .._checks import is_concrete
from ..flow import FlowTerm
from ..losses import AbstractCompositeLoss
from .kkt import KKT5

_EXPLICIT_RANGE = 300  # L t₁ up to which Tsit5 needs some hundred steps, no more
_DENSE = 2000  # parameters up to which a d × d Jacobian is affordable


def choose_solver(
    term: FlowTerm,
    params: PyTree,
    weight_decay: float | Scalar,
    t1: float | Scalar,
) -> diffrax.AbstractSolver:
    """The solver that `simulate` takes when none is named.

    Tsit5 for a run that is short and not stiff, L t₁ ≤ 300, where L = λ + ‖∇²F(θ₀)‖₂ is
    found by power iteration; otherwise KKT5 where the loss is composite; and Kvaerno5
    with a dense Newton iteration where it is not but the model is small (d ≤ 2000).
    What is left, a large model with an opaque loss, gets Tsit5 too: it is slow for
    small λ, and says so if it runs out of steps.

    While values are traced (under `jit` or `vmap`) L t₁ is unknown: taken as large.
    """
    composite = isinstance(term.loss, AbstractCompositeLoss)
    size = sum(p.size for p in jax.tree.leaves(params))
    known = all(is_concrete(x) for x in jax.tree.leaves((params, weight_decay, t1)))
    if known and (sharpness(term, params) + weight_decay) * t1 <= _EXPLICIT_RANGE:
        return diffrax.Tsit5()
    if composite:
        return KKT5()
    if size <= _DENSE:
        # Diffrax's default root finder takes slow convergence for divergence.
        newton = diffrax.with_stepsize_controller_tols(optx.Newton)()
        return diffrax.Kvaerno5(root_finder=newton)
    return diffrax.Tsit5()


@eqx.filter_jit
def sharpness(term: FlowTerm, params: PyTree) -> Float[Array, ""]:
    """L = ‖∇²F(θ₀)‖₂, from below, by 20 power iterations."""
    theta, unravel = ravel_pytree(params)
    gradient = jax.grad(lambda th: term.loss(term.model(unravel(th))))
    _, hvp = jax.linearize(gradient, theta)

    def iterate(_, carry):
        v, _ = carry
        w = hvp(v)
        size = jnp.linalg.norm(w)
        return w / jnp.maximum(size, jnp.finfo(w.dtype).tiny), size

    v = jr.normal(jr.key(0), theta.shape, theta.dtype)
    first = (v / jnp.linalg.norm(v), jnp.zeros((), theta.dtype))
    return jax.lax.fori_loop(0, 20, iterate, first)[1]
