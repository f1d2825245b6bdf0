"""Whether a loss may have kinks: by the operations of its program."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jaxtyping import Array, Float, PyTree

from ..losses import CrossEntropy, Huber, Logistic, SquaredError
from ..margin_losses import AbstractMarginLoss
from .flat import AbstractFlatLoss, flatten_on
from .term import AbstractFlowTerm


def may_have_kinks(loss: AbstractFlatLoss, theta: Float[Array, " d"]) -> bool:
    """Whether something in the outputs of the model (or in the loss, if it is none of
    gradflow's own) may have kinks, such as a ReLU, a maximum, an order, or a comparison
    of numbers. Nothing is computed; it is traced once."""
    own = isinstance(loss.loss, _OWN)
    return _kinked(jax.make_jaxpr(loss.outputs if own else loss.__call__)(theta))


def loss_may_have_kinks(term: AbstractFlowTerm, params: PyTree) -> bool:
    """Whether the loss of a flow may have kinks."""
    theta, loss = flatten_on(term.loss, params, term.chart)
    return may_have_kinks(loss, theta)


def _kinked(jaxpr: Jaxpr | ClosedJaxpr) -> bool:
    # The maximum in a softmax is one through which no derivative flows.
    shifts = any(one.primitive.name == "stop_gradient" for one in jaxpr.eqns)
    calls = [one for one in jaxpr.eqns if _function(one) == "_var"]
    variances = {v for one in calls for v in one.outvars}

    def kinked(one: Any) -> bool:
        inner = [p for p in jax.tree.leaves(
            list(one.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
        ) if hasattr(p, "eqns")]  # fmt: skip
        if _function(one) in ("logaddexp", "logaddexp2", "_var"):
            return False  # smooth, though written with a maximum or a comparison
        if any(map(_kinked, inner)):
            return True
        name = one.primitive.name
        if name not in _KINKS or (name in ("reduce_max", "max") and shifts):
            return False
        # Of numbers; a maximum with −∞ is none, nor one of a variance and 0, as in
        # Equinox's LayerNorm.
        numbers = jnp.issubdtype(one.invars[0].aval.dtype, jnp.floating)
        bounds = [np.asarray(v.val) for v in one.invars if hasattr(v, "val")]
        if name == "max" and not any(np.any(bound > 0) for bound in bounds):
            others = {v for v in one.invars if not hasattr(v, "val")}
            if others <= variances:
                return False
        return numbers and bool(np.isfinite(bounds).all())

    return any(map(kinked, jaxpr.eqns))


def _function(one: JaxprEqn) -> str | None:
    """The name of the function that is called: compiled by itself (`jax.jit`), or with
    a derivative given by hand (`jax.custom_jvp`)."""
    inner = one.params.get("call_jaxpr")
    about = getattr(getattr(inner, "jaxpr", None), "debug_info", None)
    return getattr(about, "func_name", one.params.get("name"))


_OWN = SquaredError | Huber | Logistic | CrossEntropy | AbstractMarginLoss
_KINKS = frozenset(
    "abs argmax argmin ceil clamp cummax cummin floor ge gt le lt max min reduce_max "
    "reduce_min reduce_window_max rem round sign sort top_k".split()
)
