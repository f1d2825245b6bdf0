"""What flow an optimiser follows along the manifold, and how fast: from its settings.

Each of these drifts comes from the second order of a step about the manifold M, where
∇F = Hδ + ½∇³F[δ, δ] for a displacement δ: the mean of the first term vanishes, that of
the second moves θ along M by −½P∇³F[C] in a unit of time t = h · steps, C = E δδᵀ. And
⟨f(H), ∇H⟩ = ∇ tr 𝓕(H), 𝓕' = f, so that a covariance f(H) drifts down tr 𝓕(H).
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree, Scalar

from .._checks import (
    check_arguments,
    check_integer,
    check_number,
    check_positive,
    is_concrete,
    word,
)
from .._host import numpy_of
from .._typing import Given
from ..flow.flow import check_free, GradientFlow
from ..losses import AbstractLoss, AbstractTargetLoss, CrossEntropy, Logistic, SquaredError
from ..penalties import AbstractPenalty
from .trace import Trace


class Effective(NamedTuple):
    """A flow that an optimiser follows on average, off noise that vanishes with its
    settings: `flow, weight_decay = gf.drifts.label_noise(...)`."""

    flow: GradientFlow
    """With what the optimiser amounts to for a penalty R. Weight decay of its own is
    part of that."""
    weight_decay: float | Scalar
    """λ: the optimiser is at time t = h · steps of the flow, so at slow time
    s = λh · steps of `two_phase` and `riemannian_flow`."""


def label_noise(
    loss: AbstractLoss | GradientFlow,
    model: PyTree,
    *,
    learning_rate: float | Scalar,
    label_noise: float | Scalar,
    weight_decay: float | Scalar = 0.0,
    batch_size: int | None = None,
    penalty: AbstractPenalty | None = None,
) -> Effective:
    """The drift of descent with noise on the labels: R = tr ∇²F, λ = hσ²/4n.

    """
    flow = _flow(loss)
    wrong = check_arguments(
        learning_rate=learning_rate, label_noise=label_noise, weight_decay=weight_decay
    )
    loss = flow.loss
    strength = label_noise**2 * loss.scale
    lam = 0.25 * learning_rate * strength
    R = Trace(flow, model, trainable=flow.trainable)
    return Effective(GradientFlow(loss, penalty=R, trainable=flow.trainable, rates=flow.rates), lam)


def _flow(loss):
    return loss if isinstance(loss, GradientFlow) else GradientFlow(loss)
