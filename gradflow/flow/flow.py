"""The gradient flow θ' = −∇F(θ) − λ∇R(θ), as a Diffrax term."""

from collections.abc import Callable

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
from .rates import as_rates, check_kinks, roots_of
from .term import Flat, FlowTerm, OfStretched, Sphere, Stretched, Tangential


class GradientFlow(eqx.Module):
    """The flow θ' = −∇F(θ) − λ∇R(θ) of the trainable parameters of a model.

    λ, the weight decay, is given when the flow is run; so one flow serves them all.

    With `rates` G it is θ' = −G(∇F(θ) + λ∇R(θ)), G diagonal and positive: as gradient
    descent with a learning rate for each layer. It is the plain flow of φ = G^{−½}θ,
    and all that is known of plain flows holds in the metric G⁻¹, in which v has the
    length √(vᵀG⁻¹v): the critical manifold M is the same, and

    - the tangent kernel is J G Jᵀ, the curvatures are those of √G ∇²F √G;
    - the limit map has DΦ = P on M, P = I − GJᵀ(J G Jᵀ)⁺J, the projection that is
      orthogonal in that metric, and the nearest point of M is the nearest in it;
    - the drift is w' = −P(w) G∇R(w), and the two-phase theory is that of this drift.
    """

    loss: AbstractLoss
    penalty: AbstractPenalty
    trainable: PyTree = eqx.field(static=True)
    hold_norm: bool = eqx.field(static=True)
    rates: PyTree | Callable[[PyTree], PyTree] = None

    def __init__(
        self,
        loss: AbstractLoss,
        *,
        penalty: AbstractPenalty | None = None,
        trainable: PyTree = eqx.is_inexact_array,
        hold_norm: bool = False,
        rates: PyTree | Callable[[PyTree], PyTree] = None,
    ):
        """**Arguments:**

        - `loss`: the training loss F.
        - `penalty`: R; ½‖θ‖² unless given.
        - `trainable`: a filter, as for `eqx.partition`: a function of a leaf, or a
            pytree of booleans. Leaves that it leaves out stay as they are.
        - `hold_norm`: keep the norm ‖θ‖ of the trainable parameters at its initial
            value: the flow on a sphere, θ' = −(I − θ̂θ̂ᵀ)(∇F(θ) + λ∇R(θ)), θ̂ = θ/‖θ‖.
        - `rates`: G, without a unit; all one unless given. A pytree of positive numbers
            that begins as the trainable parameters do: a number serves all leaves below
            it, one number alone all parameters; in the place of a leaf an array of its
            shape serves too. Or a function that returns such a pytree, given the
            trainable parameters with a `jax.ShapeDtypeStruct` for each leaf: shapes are
            all that G may depend on. As for `lambda p: jax.tree.map(lambda x: 1 /
            x.shape[-1], p)`, or

                ones = lambda params: jax.tree.map(lambda x: 1.0, params)
                first = lambda params: params.layers[0].weight
                rates = lambda params: eqx.tree_at(first, ones(params), 0.1)

            Numbers may be traced, for `jax.vmap` over them.

        **Raises:** `ValueError` where loss or penalty is none of gradflow's, or a
            penalty has more to tell than its class declares; for rates that are not
            positive, or where the norm is held.
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
        if hold_norm and rates is not None:
            raise ValueError(
                "rates: a flow that holds the norm has one rate for all parameters."
            )
        self.rates = None if rates is None else as_rates(rates)

    def partition(self, model: PyTree) -> tuple[PyTree, PyTree]:
        """Splits `model` into its trainable parameters and all the rest.

        **Returns:** both, pytrees like `model` with `None` in place of what is in the
        other; `eqx.combine` puts them together again.

        **Raises:** `ValueError` where there are no parameters, or where they are
        complex or of mixed precision.
        """
        return partition(model, self.trainable)

    def term(self, model: PyTree) -> tuple["FlowTerm", PyTree]:
        """The flow from `model` as a Diffrax term, and its initial state, for use with
        `diffrax.diffeqsolve(term, solver, ..., y0=params, args=weight_decay)`.

        **Returns:** `(term, params)`; the state is the pytree of parameters, or with
        `rates` that of G^{−½}θ. `term.model(state)` is the model.

        **Raises:** `ValueError` as `partition`, for parameters that are all zero where
        `hold_norm`, and for `rates` that do not fit the parameters, or the kinks of the
        penalty.
        """
        params, static = self.partition(model)
        if self.rates is not None:
            check_kinks(self.penalty, self.rates, params)
            chart = Stretched(static, roots_of(self.rates, params))
            penalty = OfStretched(self.penalty, chart)
            return FlowTerm(self.loss, penalty, chart), chart.state(params)
        if not self.hold_norm:
            return FlowTerm(self.loss, self.penalty, Flat(static)), params
        norm = optax.tree.norm(params)
        if is_concrete(norm) and not norm > 0:
            raise ValueError("model: parameters of norm 0 leave no direction to hold.")
        sphere = Sphere(static, norm)
        return FlowTerm(self.loss, Tangential(self.penalty, sphere), sphere), params

    def velocity(self, model: PyTree, weight_decay: float | Scalar) -> PyTree:
        """θ' = −∇F(θ) − λ∇R(θ), times G, at `model` for the λ of `weight_decay`: a
        pytree like its parameters. At a kink of R it is minus the element of least norm
        of ∇F(θ) + λ∂R(θ).

        **Raises:** `ValueError` as `term`.
        """
        term, params = self.term(model)
        force = jax.grad(lambda p: term.loss(term.model(p)))(params)
        slope = least_norm(term.penalty, params, force, weight_decay)
        return term.chart.tangent(jax.tree.map(jnp.negative, slope))


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
    except (AttributeError, TypeError, ValueError) as error:
        got = word(trainable)
        if callable(trainable) and not isinstance(error, ValueError):
            got = f"one that says: {error}"
        raise ValueError(
            "trainable: expected a function of a leaf, or booleans in the structure of "
            f"the model, got {got}."
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
        return GradientFlow(loss.loss, trainable=loss.trainable, rates=loss.rates)
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
