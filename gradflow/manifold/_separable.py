"""Where there is no limit: the direction in which θ grows, and its margin."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..flow.flat import FlatLoss
from ..losses import AbstractLoss, CrossEntropy, Logistic


def limit_direction(thetas: Float[Array, "decades d"]) -> Float[Array, " d"]:
    """What θ gained over the last decade of time, of norm one.

    For a linear model θ(t) = ŵ log t + ρ(t) with ρ bounded (Soudry et al., arXiv
    1710.10345): θ/‖θ‖ is off by 1/log t, while the gain is off by what ρ still changes,
    a negative power of t. Its exponent is small where samples lie just beyond the
    margin.
    """
    gain = thetas[-1] - thetas[-2]
    return gain / jnp.linalg.norm(gain)


def smallest_margin(loss: FlatLoss, theta: Float[Array, " d"]) -> Float[Array, ""]:
    """minᵢ of the margins of the network with parameters θ; NaN for other losses than
    cross-entropies."""
    margins = _margins(loss.loss, theta, loss)
    return jnp.asarray(jnp.nan, theta.dtype) if margins is None else jnp.min(margins)


def _margins(
    loss: AbstractLoss, theta: Float[Array, " d"], flat: FlatLoss
) -> Float[Array, " n"] | None:
    """How far each sample's logit is on the right side: of its label above the largest
    other one, or of a single logit from zero."""
    if isinstance(loss, Logistic):
        return (2 * loss.y.reshape(-1) - 1) * flat.outputs(theta)
    if isinstance(loss, CrossEntropy):
        logits = flat.outputs(theta).reshape(loss.labels.shape[0], -1)
        own = jnp.arange(logits.shape[1])[None] == loss.labels[:, None]
        others = jnp.max(jnp.where(own, -jnp.inf, logits), axis=1)
        return jnp.sum(jnp.where(own, logits, 0), axis=1) - others
    return None
