"""A model less what it was at its start, times a number: from lazy to rich."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree, Shaped


class Centred(eqx.Module):
    """f(x) = α (g(θ, x) − g(θ₀, x)): a model g with its own start θ₀ subtracted.

    f is zero at the start, whatever g is, and α says how far θ has to move to fit the
    data: the larger α the lazier the training. As α → ∞ θ moves by O(1/α), and f by
    kernel regression with the tangent kernel at θ₀; as α → 0 features are learned.

    The usual loss is F/α², F of f (so α = 1 is F itself): f then moves at a rate that
    does not depend on α, by α²JJᵀ/α². As gradflow's losses are F, take its clock
    instead: the flow of F/α² with weight decay λ, at time t, is that of F with weight
    decay α²λ, at time t/α².

    θ₀ is kept as integers, the bits of its numbers: nothing that looks for arrays of
    floating-point numbers (`GradientFlow`, `gradflow.scaled`, `eqx.filter_grad`,
    Optax) takes it for parameters, and no derivative flows through it. Outputs have an
    error of α times the rounding of g.

    **Arguments:**

    - `model`: g with the parameters θ₀, any Equinox module that is a function of x. It
        is `centred.model` that is trained.
    - `alpha`: α, a positive number.

    Source: Chizat, Oyallon, Bach, arXiv 1812.07956, sections 1.2 and 2.
    """

    model: Any
    start: PyTree[Shaped[Array, "..."]]
    """The parts of the model as they were, floating-point numbers as integers."""
    factor: Shaped[Array, ""]
    """α as an integer."""

    def __init__(self, model: Any, alpha: float | Array = 1.0):
        """**Raises:** `ValueError` where `model` is no function, or α is not one
        positive number."""
        if not callable(model) or isinstance(model, type):
            raise ValueError(
                "model: expected a module that is a function of x, got "
                f"{type(model).__name__}."
            )
        number = alpha if isinstance(alpha, jax.Array) else np.asarray(alpha)
        real = number.ndim == 0 and number.dtype.kind in "fi"
        known = real and not isinstance(number, Tracer)
        if not real or known and not (np.isfinite(number) and number > 0):
            raise ValueError(f"alpha: expected one positive number, got {alpha!r}.")
        self.model = model
        self.start = jax.tree.map(_bits, eqx.filter(model, eqx.is_inexact_array))
        self.factor = _bits(jnp.asarray(number, float))

    @property
    def alpha(self) -> Array:
        """α."""
        return _number(self.factor)

    @property
    def initial(self) -> Any:
        """The model g with the parameters θ₀."""
        now, rest = eqx.partition(self.model, eqx.is_inexact_array)
        then = jax.tree.map(lambda p, b: _number(b).astype(p.dtype), now, self.start)
        return eqx.combine(then, rest)

    def __call__(self, x: PyTree) -> Array:
        now, then = self.model(x), self.initial(x)
        return self.alpha.astype(now.dtype) * (now - then)


def _bits(x: Array) -> Array:
    kind = jnp.asarray(x).dtype.name
    if kind not in ("float32", "float64"):
        raise ValueError(f"model: expected parameters of float32 or 64, got {kind}.")
    return jax.lax.bitcast_convert_type(x, jnp.dtype(kind.replace("float", "uint")))


def _number(bits: Array) -> Array:
    kind = jnp.dtype(bits.dtype.name.replace("uint", "float"))
    return jax.lax.bitcast_convert_type(bits, kind)
