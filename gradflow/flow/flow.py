"""The gradient flow θ' = −∇F(θ) − λ∇R(θ), as a Diffrax term."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree, Scalar

from .._checks import check_init_scale, check_model, is_concrete, word
from .._host import as_array
from .._typing import Given
from ..losses import AbstractLoss
from ..penalties import AbstractPenalty, check_declared, L2, least_norm
from .term import Flat, FlowTerm, Sphere, Tangential


class GradientFlow(eqx.Module):
    """The flow θ' = −∇F(θ) − λ∇R(θ) of the trainable parameters of a model.

    λ, the weight decay, is given when the flow is run; so one flow serves them all.
    """

    loss: AbstractLoss
    penalty: AbstractPenalty
    trainable: PyTree = eqx.field(static=True)
    hold_norm: bool = eqx.field(static=True)

    def __init__(
        self,
        loss: AbstractLoss,
        *,
        penalty: AbstractPenalty | None = None,
        trainable: PyTree = eqx.is_inexact_array,
        hold_norm: bool = False,
    ):
        """**Arguments:**

        - `loss`: the training loss F.
        - `penalty`: R; ½‖θ‖² unless given.
        - `trainable`: a filter, as for `eqx.partition`: a function of a leaf, or a
            pytree of booleans. Leaves that it leaves out stay as they are.
        - `hold_norm`: keep the norm ‖θ‖ of the trainable parameters at its initial
            value: the flow on a sphere, θ' = −(I − θ̂θ̂ᵀ)(∇F(θ) + λ∇R(θ)), θ̂ = θ/‖θ‖.

        **Raises:** `ValueError` where loss or penalty is none of gradflow's, or a
            penalty has more to tell than its class declares.
        """
        if not isinstance(loss, AbstractLoss):
            raise ValueError(
                f"loss: expected a gradflow loss, got {word(loss)}; wrap a function of "
                "the model as gradflow.Loss(fn)."
            )
        if not (penalty is None or isinstance(penalty, AbstractPenalty)):
            raise ValueError(
                f"penalty: expected a gradflow penalty, got {word(penalty)}; see "
                "gradflow.AbstractPenalty for one of your own."
            )
        if penalty is not None:
            check_declared(penalty)
        self.loss = loss
        self.penalty = L2() if penalty is None else penalty
        self.trainable = trainable
        self.hold_norm = hold_norm

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

        **Raises:** `ValueError` as `partition`, and for parameters that are all zero
        where `hold_norm`.
        """
        params, static = self.partition(model)
        if not self.hold_norm:
            return FlowTerm(self.loss, self.penalty, Flat(static)), params
        norm = optax.tree.norm(params)
        if is_concrete(norm) and not norm > 0:
            raise ValueError("model: parameters of norm 0 leave no direction to hold.")
        sphere = Sphere(static, norm)
        return FlowTerm(self.loss, Tangential(self.penalty, sphere), sphere), params

    def velocity(self, model: PyTree, weight_decay: float | Scalar) -> PyTree:
        """θ' = −∇F(θ) − λ∇R(θ) at `model`, a pytree like its parameters. At a kink of R
        it is minus the element of least norm of ∇F(θ) + λ∂R(θ)."""
        term, params = self.term(model)
        force = jax.grad(lambda p: term.loss(term.model(p)))(params)
        slope = least_norm(term.penalty, params, force, weight_decay)
        return jax.tree.map(jnp.negative, slope)


def partition(
    model: PyTree, trainable: PyTree = eqx.is_inexact_array
) -> tuple[PyTree, PyTree]:
    """Splits `model` into trainable parameters and the rest; see
    `GradientFlow.partition`."""
    params, static = _split(model, trainable)
    check_model(params)
    return params, static


def _split(model: PyTree, trainable: PyTree) -> tuple[PyTree, PyTree]:
    try:
        params, static = eqx.partition(model, trainable)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "trainable: expected a function of a leaf, or booleans in the structure of "
            f"the model, got {word(trainable)}."
        ) from error
    for at, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not eqx.is_inexact_array(leaf):
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            raise ValueError(
                "trainable: expected to choose arrays of floating-point numbers, but "
                f"model{jax.tree_util.keystr(at)} is of type {kind}."
            )
    return params, static


def check_flow(flow: Given) -> None:
    """Raises unless it is a flow. A loss alone does not say which penalty."""
    if not isinstance(flow, GradientFlow):
        loss = isinstance(flow, AbstractLoss)
        remedy = "; make one as gradflow.GradientFlow(loss)" if loss else ""
        raise ValueError(f"flow: expected a GradientFlow, got {word(flow)}{remedy}.")


def flow_of(loss: Given, trainable: PyTree = eqx.is_inexact_array) -> GradientFlow:
    """The flow of a loss alone, whatever the penalty: from the loss, or from a flow.

    **Raises:** `ValueError` for anything else; for a flow that holds the norm; and
    where `trainable` is not that of the flow.
    """
    if isinstance(loss, GradientFlow):
        check_free(loss)
        if trainable not in (eqx.is_inexact_array, loss.trainable):
            raise ValueError("trainable: the flow says already what is trainable.")
        loss, trainable = loss.loss, loss.trainable
    return GradientFlow(loss, trainable=trainable)


def check_free(flow: Given) -> None:
    """Raises unless it is a flow, of parameters whose norm is not held."""
    check_flow(flow)
    if flow.hold_norm:
        raise ValueError(
            "flow: it holds the norm, for which there is no theory of the critical "
            "manifold here; give one without hold_norm."
        )


def scaled(
    model: PyTree,
    alpha: float | Scalar,
    *,
    trainable: PyTree = eqx.is_inexact_array,
) -> PyTree:
    """The model with all trainable parameters, biases too, multiplied by α.

    **Arguments:**

    - `model`: any Equinox module.
    - `alpha`: α > 0.
    - `trainable`: which leaves, as for `GradientFlow`.

    **Raises:** `ValueError` where α is not one positive number.
    """
    check_init_scale(alpha, "alpha")
    params, static = _split(model, trainable)

    return eqx.combine(_times(as_array(alpha), params), static)


@jax.jit
def _times(alpha: Scalar, params: PyTree) -> PyTree:
    return jax.tree.map(lambda p: alpha.astype(p.dtype) * p, params)
