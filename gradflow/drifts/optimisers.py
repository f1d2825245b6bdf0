"""What flow an optimiser follows along the manifold, and how fast: from its settings.

These drifts come from the second order of a step about the manifold M of perfect fits.
A displacement δ from M has ∇F = Hδ + ½∇³F[δ, δ] + …, H = ∇²F. The mean of the first
term over many steps vanishes, that of the second moves θ along M, in a unit of time
t = h · steps, by −½P∇³F[C] with C the mean of δδᵀ where gradients are taken. And where
C = f(H) this is −½P∇ tr 𝓕(H), 𝓕' = f, as ⟨f(H), ∂H⟩ = ∂ tr 𝓕(H).
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree, Scalar

from .._checks import (
    check_arguments,
    check_fraction,
    check_integer,
    check_positive,
    is_concrete,
    Wrong,
)
from .._host import as_array
from .._typing import Given
from ..flow.flow import check_free, GradientFlow
from ..losses import (
    AbstractBySamples,
    AbstractLoss,
    CrossEntropy,
    Logistic,
    SquaredError,
)
from ..penalties import AbstractPenalty, L2, Quadratic
from .diagonal import RootDiagonal
from .finite_step import LogTrace
from .largest import LargestCurvature
from .trace import Trace


class Effective(NamedTuple):
    """The flow that an optimiser follows on average: `flow, weight_decay =
    gf.drifts.label_noise(...)`, for `two_phase`, `simulate` and all that take both."""

    flow: GradientFlow
    """With the penalty R that the optimiser amounts to. Weight decay of its own is part
    of that."""
    weight_decay: float | Scalar
    """λ. After k steps of size h the optimiser is at t = hk, so at s = λhk of slow
    time; NaN where an argument is traced and makes no sense."""


def label_noise(
    loss: AbstractLoss | GradientFlow,
    model: PyTree,
    *,
    learning_rate: float | Scalar,
    label_noise: float | Scalar,
    batch_size: int | None = None,
    weight_decay: float | Scalar = 0.0,
    finite_step: bool = False,
) -> Effective:
    """The drift of `gradflow.descent` with `label_noise`: R = tr ∇²F and λ = ch/4, with
    c = σ²/n for the mean squared error of n samples.

    Targets y + σξ make a noise of the gradient with covariance cH on M, and steps
    δ ← (I − hH)δ + h(cH)^½ξ have the stationary covariance C = hc(2 − hH)⁻¹ on the
    normal space: ½hc I for h → 0. So θ drifts by −¼hc ∇ tr H; for h that is not small
    by −¼hc ∇R with R = −(2/h) tr log(I − ½hH) (Damian, Ma, Lee, arXiv 2106.06530; Li,
    Wang, Arora, arXiv 2110.06914). One run is off this mean by O(√h), the mean by O(h).

    With minibatches of b, c is σ²/b. Of labels that are flipped, M is where the model
    gives the probabilities of what is drawn, on which c = 1/n whatever these are: the
    loss of the flow has them for labels.

    **Arguments:**

    - `loss`: `SquaredError`, `CrossEntropy` or `Logistic`, without weights of samples;
        or a flow of it, of which the penalty, ½‖θ‖² unless given, is that of
        `weight_decay`. With `rates` G, R is tr √G ∇²F √G.
    - `model`: the model; of its parameters only the shapes count.
    - `learning_rate`, `label_noise`, `batch_size`: h, σ and b, as given to `descent`.
    - `weight_decay`: that of the descent beside, by the method `"subgradient"`.
    - `finite_step`: for h that is not small, see [`gradflow.drifts.LogTrace`][]; of all
        samples at a time.

    **Returns:** an [`gradflow.drifts.Effective`][].

    **Raises:** `ValueError` for arguments that make no sense, and for other losses.
    """
    flow = _as_flow(loss)
    wrong = check_arguments(weight_decay=weight_decay)
    wrong = wrong | check_positive(learning_rate, "learning_rate")
    wrong = wrong | _check_label_noise(flow.loss, label_noise)
    strength = _noise_of_labels(flow.loss, label_noise, batch_size)
    if finite_step and batch_size is not None:
        raise ValueError("finite_step: it is for all samples, without batch_size.")
    flow = eqx.tree_at(lambda f: f.loss, flow, _smoothed(flow, model, label_noise))
    if finite_step:
        drift = LogTrace(flow, model, learning_rate=learning_rate)
    else:
        drift = Trace(flow, model)
    return _effective(flow, drift, 0.25 * learning_rate * strength, weight_decay, wrong)


def parameter_noise(
    loss: AbstractLoss | GradientFlow,
    model: PyTree,
    *,
    noise: float | Scalar,
    relative: bool = False,
    weight_decay: float | Scalar = 0.0,
    probes: int | None = None,
    key: Given = None,
) -> Effective:
    """The drift of descent on F(θ + ση), η of standard normal numbers drawn in each
    step: R = tr ∇²F and λ = ½σ², or Σᵢ θᵢ² ∂ᵢ²F for F(θ + σθ ⊙ η).

    The mean of the loss over η is F + ½σ² Δ_ηF + O(σ⁴), and O(σ³) for other laws of
    independent entries of mean 0 and variance 1. (Dropped connections are not small
    changes: with probability p, the others scaled by 1/(1 − p), σ² = p/(1 − p) stands
    for them where F is quadratic in each parameter by itself, as that of a linear
    network is.) The step h is not in it to first order (Shalova, Schlichting,
    Peletier, arXiv 2404.12293, of which R = ½Δ_ηF and slow time is σ²t): with the noise
    of the gradient C = σ²(I − ½hH)⁻¹, for which R is [`gradflow.drifts.LogTrace`][].

    **Arguments:** `loss`, `model` and `weight_decay` as `label_noise`, for any loss; of
    a flow with `rates` R is tr ∇²F all the same. And

    - `noise`: σ > 0.
    - `relative`: noise in proportion to each parameter.
    - `probes`, `key`: as for [`gradflow.drifts.Trace`][].

    **Returns:** an [`gradflow.drifts.Effective`][].

    **Raises:** `ValueError` for arguments that make no sense.
    """
    flow = _as_flow(loss)
    wrong = check_arguments(weight_decay=weight_decay) | check_positive(noise, "noise")
    drift = Trace(
        flow.loss, model, relative=relative, probes=probes, key=key,
        trainable=flow.trainable,
    )  # fmt: skip
    return _effective(flow, drift, 0.5 * noise**2, weight_decay, wrong)


def sharpness_aware(
    loss: AbstractLoss | GradientFlow,
    model: PyTree,
    *,
    radius: float | Scalar,
    batch_size: int | None = None,
    weight_decay: float | Scalar = 0.0,
) -> Effective:
    """The drift of sharpness-aware minimisation (SAM), θ ← θ − h∇F(θ + ρ∇F/‖∇F‖), by
    Wen, Ma, Li, arXiv 2211.05729: λ = ½ρ², and R = λ₁(∇²F); or tr ∇²F, where each step
    takes one sample.

    Gradients are taken ρ away from M along ∇F/‖∇F‖. With all samples that direction
    turns to ±u, the first eigenvector of ∇²F, and C = ρ²uuᵀ. With one sample i and one
    output it is ±∇zᵢ/‖∇zᵢ‖, and the mean of uᵀ∂Hᵢu is ∂ tr H. The step h is not in it
    to first order: hλ₁ is to be small, as with all samples C = ρ²/(1 − ½hλ₁)² uuᵀ.
    There ρ is to be small beside h too: otherwise ‖∇F‖ comes so near to zero that its
    direction leaves u.

    **Arguments:** `loss`, `model` and `weight_decay` as `label_noise`, for any loss,
    and a flow without `rates`. And

    - `radius`: ρ > 0.
    - `batch_size`: 1 for one sample in each step, which has one output; all unless
        given. In between the drift is no gradient.

    **Returns:** an [`gradflow.drifts.Effective`][].

    **Raises:** `ValueError` for arguments that make no sense.
    """
    flow = _as_flow(loss)
    wrong = check_arguments(weight_decay=weight_decay)
    wrong = wrong | check_positive(radius, "radius")
    _refuse_rates(flow)
    if batch_size is None:
        drift = LargestCurvature(flow.loss, model, trainable=flow.trainable)
    else:
        _check_one_by_one(flow.loss, model, batch_size)
        drift = Trace(flow.loss, model, trainable=flow.trainable)
    return _effective(flow, drift, 0.5 * radius**2, weight_decay, wrong)


def adam(
    loss: AbstractLoss | GradientFlow,
    model: PyTree,
    *,
    learning_rate: float | Scalar,
    label_noise: float | Scalar,
    batch_size: int | None = None,
    weight_decay: float | Scalar = 0.0,
    eps: float = 1e-8,
) -> Effective:
    """The drift of Adam with `label_noise`: R = tr Diag(∇²F)^½ and λ = ½h√c, with rates
    G = 1/(√(c∂ᵢ²F) + ε) and the c of [`gradflow.drifts.label_noise`][].

    The squares that Adam averages become v = c Diag(H) on M, and steps those of rates
    G = 1/(√v + ε), which drift by −¼hc G⟨G, ∇H⟩ = −½h√c G∇R, R = Σᵢ φ(∂ᵢ²F) as in
    [`gradflow.drifts.RootDiagonal`][]: to first order in h, whatever β₁ (Li, Wen, Lyu,
    arXiv 2511.02773). For that v has to follow the drift, through many times 1/(1 − β₂)
    steps, and hardly fluctuate: what its fluctuations add is small with 1 − β₂, not
    with h, and at 1 − β₂ = 0.01 it may be a good part of the drift.

    Adam's G changes along M. A flow has one G: that at `model`, which is best a point
    of M, such as the limit map. So the path is right as far as ∂ᵢ²F stay what they are
    there, and further for a while if asked again from its end; where the drift comes to
    rest, P G∇R = 0, does not depend on that.

    **Arguments:** as `label_noise`, and of a flow without `rates`.

    - `model`: also where G is taken.
    - `weight_decay`: decoupled, of ½‖θ‖², as in AdamW: no rates apply to it.
    - `eps`: Adam's ε > 0.

    **Returns:** an [`gradflow.drifts.Effective`][].

    **Raises:** `ValueError` for arguments that make no sense, and for other losses.
    """
    flow = _as_flow(loss)
    wrong = check_arguments(weight_decay=weight_decay)
    wrong = wrong | check_positive(learning_rate, "learning_rate")
    wrong = wrong | check_positive(eps, "eps")
    wrong = wrong | _check_label_noise(flow.loss, label_noise)
    _refuse_rates(flow)
    if not isinstance(flow.penalty, L2):
        raise ValueError("loss: decoupled decay is here that of L2(), got another one.")
    strength = _noise_of_labels(flow.loss, label_noise, batch_size)
    root = strength**0.5
    trainable = flow.trainable
    loss = _smoothed(flow, model, label_noise)
    drift = RootDiagonal(loss, model, eps=eps / root, trainable=trainable)
    rates = _adaptive(drift, flow.partition(model)[0], as_array(root))
    undone = Quadratic(weights=jax.tree.map(lambda g: 1 / g, rates))
    flow = GradientFlow(loss, penalty=undone, trainable=trainable, rates=rates)
    return _effective(flow, drift, 0.5 * learning_rate * root, weight_decay, wrong)


@eqx.filter_jit
def _adaptive(drift: RootDiagonal, params: PyTree, root: Scalar) -> PyTree:
    """G, like the parameters."""
    curvatures = drift.diagonal(params)
    root = root.astype(curvatures.dtype)
    eps = as_array(drift.eps).astype(curvatures.dtype)
    found = 1 / (root * (jnp.sqrt(curvatures) + eps))
    return ravel_pytree(params)[1](found)


def _as_flow(loss: AbstractLoss | GradientFlow) -> GradientFlow:
    flow = loss if isinstance(loss, GradientFlow) else GradientFlow(loss)
    check_free(flow)
    return flow


def _effective(
    flow: GradientFlow,
    drift: AbstractPenalty,
    lam: float | Scalar,
    weight_decay: float | Scalar,
    wrong: Wrong,
) -> Effective:
    """λR and the weight decay of the optimiser, by one λ."""
    if not is_concrete(weight_decay) or weight_decay > 0:
        drift = drift + (weight_decay / lam) * flow.penalty
    if wrong is not False:
        lam = jnp.where(wrong, jnp.nan, lam)
    flow = GradientFlow(
        flow.loss, penalty=drift, trainable=flow.trainable, rates=flow.rates
    )
    return Effective(flow, lam)


def _refuse_rates(flow: GradientFlow) -> None:
    if flow.rates is not None:
        raise ValueError(
            "loss: expected a flow without rates, which none is known for."
        )


def _check_label_noise(loss: AbstractLoss, label_noise: Given) -> Wrong:
    """Raises unless it is σ > 0 of targets, or a probability for labels."""
    if isinstance(loss, CrossEntropy | Logistic):
        return check_fraction(label_noise, "label_noise")
    return check_positive(label_noise, "label_noise")


def _noise_of_labels(
    loss: AbstractLoss, label_noise: float | Scalar, batch_size: int | None
) -> float | Scalar:
    """c: the covariance of the gradient on M is cH.

    **Raises:** `ValueError` where it is not a multiple of H.
    """
    if not isinstance(loss, SquaredError | CrossEntropy | Logistic):
        raise ValueError(
            "loss: expected SquaredError, CrossEntropy or Logistic, whose noise on "
            f"labels is known to be like ∇²F, got {type(loss).__name__}."
        )
    if loss.weights is not None:
        raise ValueError("loss: with weights of samples the noise is not like ∇²F.")
    labels = loss.labels if isinstance(loss, CrossEntropy) else loss.y
    n = labels.shape[0]
    strength = loss.scale
    if batch_size is not None:
        check_integer(batch_size, "batch_size")
        if batch_size > n:
            raise ValueError(f"batch_size: there are {n} samples, got {batch_size}.")
        strength = strength * n / batch_size
    return strength * label_noise**2 if isinstance(loss, SquaredError) else strength


def _smoothed(
    flow: GradientFlow, model: PyTree, label_noise: float | Scalar
) -> AbstractLoss:
    """The mean of the loss over labels that are drawn.

    **Raises:** `ValueError` where they are no labels to flip.
    """
    loss = flow.loss
    if isinstance(loss, SquaredError):
        return loss  # but for a constant
    p = as_array(label_noise)
    if isinstance(loss, Logistic):
        if is_concrete(loss.y) and bool(jnp.any((loss.y != 0) & (loss.y != 1))):
            raise ValueError("label_noise: probabilities are no labels to flip.")
        p = p.astype(loss.y.dtype)
        return eqx.tree_at(lambda one: one.y, loss, loss.y + p * (1 - 2 * loss.y))
    assert isinstance(loss, CrossEntropy)
    if loss.labels.ndim > 1:
        raise ValueError("label_noise: probabilities are no labels to flip.")
    logits = eqx.filter_eval_shape(loss.outputs, model)
    n = loss.labels.shape[0]
    classes = logits.size // n
    own = jnp.arange(classes)[None] == loss.labels.astype(int)[:, None]
    p = p.astype(logits.dtype)
    labels = jnp.where(own, 1 - p, p / max(classes - 1, 1))
    return CrossEntropy(loss.x, labels, predict=loss.predict)


def _check_one_by_one(loss: AbstractLoss, model: PyTree, batch_size: Given) -> None:
    """Raises unless a step takes one sample, with one output."""
    check_integer(batch_size, "batch_size")
    if batch_size != 1:
        raise ValueError(f"batch_size: expected 1, or none for all, got {batch_size}.")
    if not isinstance(loss, AbstractBySamples) or loss.samples is None:
        raise ValueError("batch_size: the loss has no samples that are known.")
    outputs = eqx.filter_eval_shape(loss.outputs, model).size
    n = jax.tree.leaves(loss.samples)[0].shape[0]
    if outputs != n:
        raise ValueError(
            f"batch_size: of one sample with one output the drift is a gradient, got "
            f"{outputs // n} outputs."
        )
