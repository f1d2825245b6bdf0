"""The gradient flow θ' = −∇F(θ) − λ∇R(θ), as a Diffrax term."""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree, Scalar

from ._checks import check_model
from .losses import AbstractCompositeLoss, AbstractLoss
from .penalties import AbstractPenalty, L2


class GradientFlow(eqx.Module):
    """The flow θ' = −∇F(θ) − λ∇R(θ) of the trainable parameters of a model.

    λ, the weight decay, is given when the flow is run; so one flow serves them all.
    """

    loss: AbstractLoss
    penalty: AbstractPenalty
    trainable: PyTree = eqx.field(static=True)

    def __init__(
        self,
        loss: AbstractLoss,
        *,
        penalty: AbstractPenalty | None = None,
        trainable: PyTree = eqx.is_inexact_array,
    ):
        """**Arguments:**

        - `loss`: the training loss F.
        - `penalty`: R; ½‖θ‖² unless given.
        - `trainable`: a filter, as for `eqx.partition`: a function of a leaf, or a
            pytree of booleans. Leaves that it leaves out stay as they are.
        """
        if not isinstance(loss, AbstractLoss):
            raise ValueError(
                f"loss: expected a gradflow loss, got {type(loss).__name__}; wrap a "
                "function of the model as gradflow.Loss(fn)."
            )
        self.loss = loss
        self.penalty = L2() if penalty is None else penalty
        self.trainable = trainable

    def partition(self, model: PyTree) -> tuple[PyTree, PyTree]:
        """Splits `model` into its trainable parameters and all the rest.

        **Raises:** `ValueError` where there are no parameters, or where they are
        complex or of mixed precision.
        """
        return partition(model, self.trainable)

    def term(self, model: PyTree) -> tuple["FlowTerm", PyTree]:
        """The flow as a Diffrax term, and its initial state, for use with
        `diffrax.diffeqsolve(term, solver, ..., y0=params, args=weight_decay)`.

        **Returns:** `(term, params)`; the state is the pytree of parameters.
        """
        params, static = self.partition(model)
        return FlowTerm(self.loss, self.penalty, static), params

    def velocity(self, model: PyTree, weight_decay: float | Scalar) -> PyTree:
        """θ' = −∇F(θ) − λ∇R(θ) at `model`, a pytree like its parameters."""
        term, params = self.term(model)
        return term.vf(jnp.zeros(()), params, weight_decay)


def partition(
    model: PyTree, trainable: PyTree = eqx.is_inexact_array
) -> tuple[PyTree, PyTree]:
    """Splits `model` into trainable parameters and the rest; see
    `GradientFlow.partition`."""
    params, static = eqx.partition(model, trainable)
    check_model(params)
    return params, static


class FlowTerm(diffrax.AbstractTerm):
    """θ' = −∇F(θ) − λ∇R(θ) as a Diffrax term that knows its loss.

    The state is the pytree of trainable parameters; `args` is the weight decay λ. Made
    by `GradientFlow.term`.
    """

    loss: AbstractLoss
    penalty: AbstractPenalty
    static: PyTree

    def model(self, params: PyTree) -> PyTree:
        """The model with parameters `params`."""
        return eqx.combine(params, self.static)

    def vf(self, t: Any, y: PyTree, args: Any) -> PyTree:
        force = jax.grad(lambda p: self.loss(self.model(p)))(y)
        decay = self.penalty.gradient(y)
        return jax.tree.map(lambda f, r: -f - args * r, force, decay)

    def contr(self, t0: Any, t1: Any, **kwargs: Any) -> Any:
        return t1 - t0

    def prod(self, vf: PyTree, control: Any) -> PyTree:
        return jax.tree.map(lambda v: v * control, vf)


class FlatLoss(eqx.Module):
    """A loss as a function of one vector θ ∈ ℝᵈ, for what needs a matrix.

    To be made inside a jitted function: it holds the closure that rebuilds the pytree.
    """

    loss: AbstractLoss
    static: PyTree
    unravel: Callable[[Array], PyTree] = eqx.field(static=True)

    def model(self, theta: Float[Array, " d"]) -> PyTree:
        return eqx.combine(self.unravel(theta), self.static)

    def __call__(self, theta: Float[Array, " d"]) -> Scalar:
        return self.loss(self.model(theta))

    def gradient(self, theta: Float[Array, " d"]) -> Float[Array, " d"]:
        return jax.grad(self)(theta)

    def outputs(self, theta: Float[Array, " d"]) -> Float[Array, " m"]:
        """z(θ)."""
        return self.composite.outputs(self.model(theta))

    def residuals(self, theta: Float[Array, " d"]) -> Float[Array, " m"]:
        """∇ℓ(z(θ))."""
        return jax.grad(self.composite.outer)(self.outputs(theta))

    def jacobian(self, theta: Float[Array, " d"]) -> Float[Array, "m d"]:
        """J = ∂z/∂θ, by m vector-Jacobian products."""
        return jax.jacrev(self.outputs)(theta)

    @property
    def composite(self) -> AbstractCompositeLoss:
        """The loss, if it is composite.

        **Raises:** `ValueError` if it is not.
        """
        if not isinstance(self.loss, AbstractCompositeLoss):
            raise ValueError(
                f"loss: {type(self.loss).__name__} is not composite; outputs and their "
                "Jacobian need SquaredError, CrossEntropy or another composite loss."
            )
        return self.loss


def flatten(
    loss: AbstractLoss, params: PyTree, static: PyTree
) -> tuple[Float[Array, " d"], FlatLoss]:
    """The parameters as one vector, and the loss as a function of it."""
    theta, unravel = ravel_pytree(params)
    return theta, FlatLoss(loss, static, unravel)
