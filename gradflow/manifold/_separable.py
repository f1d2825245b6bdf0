"""Where there is no limit: the direction in which θ grows, and its margin."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..flow.flat import FlatLoss
from ..losses import AbstractByClasses


def limit_direction(thetas: Float[Array, "decades d"]) -> Float[Array, " d"]:
    """What θ gained over the last decade of time, of norm one.

    For a linear model θ(t) = ŵ log t + ρ(t) with ρ bounded (Soudry et al., arXiv
    1710.10345): θ/‖θ‖ is off by 1/log t, while the gain is off by what ρ still changes,
    a negative power of t. Its exponent is small where samples lie just beyond the
    margin.
    """
    gain = thetas[-1] - thetas[-2]
    return gain / jnp.linalg.norm(gain)


def has_underflown(loss: FlatLoss, theta: Float[Array, " d"]) -> Bool[Array, ""]:
    """Whether a loss that is positive everywhere is zero at θ: all margins are beyond
    what numbers can tell, and nothing moves any more."""
    positive = isinstance(loss.loss, AbstractByClasses) and loss.loss.positive
    return (loss(theta) == 0) & positive


def smallest_margin(loss: FlatLoss, theta: Float[Array, " d"]) -> Float[Array, ""]:
    """minᵢ of the margins of the network with parameters θ; NaN where the loss knows no
    classes."""
    if not isinstance(loss.loss, AbstractByClasses):
        return jnp.asarray(jnp.nan, theta.dtype)
    return jnp.min(loss.loss.margins(loss.outputs(theta)))
