"""Losses of a margin y f(x), of two classes that are called −1 and 1."""

import math
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Scalar

from ._checks import as_data, is_concrete
from ._logits import logistic, logistic_from
from .losses import (
    AbstractByClasses,
    AbstractTargetLoss,
    check_delta,
    checked_targets,
    predict_each,
)


class AbstractMarginLoss(AbstractTargetLoss, AbstractByClasses):
    """ℓ(z) = c Σᵢ wᵢ φ(yᵢzᵢ), yᵢ = ±1, φ falling."""

    @property
    def outer_curvature(self) -> None:
        return None

    def margins(self, z: Float[Array, " m"]) -> Float[Array, " m"]:
        return self.counted(self.y.reshape(-1) * z, jnp.inf)


def _checked_sides(
    x: PyTree,
    y: Array,
    weights: Array | None,
    reduction: str,
    predict: Callable[[Any, PyTree], Array],
) -> tuple[PyTree, Array, Array | None]:
    """`x`, `y` and `weights` as arrays.

    **Raises:** `ValueError` as `SquaredError`, and unless `y` is of −1 and 1.
    """
    if is_concrete(y):
        sides = np.asarray(y)
        if not (np.isin(sides, (-1, 1)).all() and sides.dtype != bool):
            raise ValueError("y: expected -1 and 1 for the two classes (2 * y - 1).")
    y = as_data(y, "y")
    y = y if jnp.issubdtype(y.dtype, jnp.inexact) else y.astype(float)
    return checked_targets(x, y, weights, reduction, predict)


class Exponential(AbstractMarginLoss):
    """F(model) = meanᵢ exp(−yᵢ f(xᵢ)), or the sum: two classes, yᵢ = ±1, the loss of
    AdaBoost (Freund and Schapire, 1997).

    On separable data this loss has no minimiser: without weight decay ‖θ‖ grows like
    log t, towards the direction of the largest margin (Soudry et al., arXiv
    1710.10345). It and its derivatives have all digits down to the smallest number, at
    margins of 700 (87 in float32).
    """

    x: PyTree
    y: Float[Array, "n ..."]
    reduction: Literal["mean", "sum"] = eqx.field(static=True)
    predict: Callable[[Any, PyTree], Array] = eqx.field(static=True)
    weights: Float[Array, " n"] | None = None

    def __init__(
        self,
        x: PyTree,
        y: Array,
        *,
        weights: Array | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        predict: Callable[[Any, PyTree], Array] = predict_each,
    ):
        """**Arguments:** as for `SquaredError`; `y` holds −1 and 1, of the shape of the
        predictions.

        **Raises:** `ValueError` as `SquaredError`, and where `y` holds others.
        """
        self.x, self.y, self.weights = _checked_sides(x, y, weights, reduction, predict)
        self.reduction, self.predict = reduction, predict

    def each(self, z: Float[Array, " m"]) -> Float[Array, " m"]:
        return jnp.exp(-self.y.reshape(-1) * z)

    def each_from(
        self, slopes: Float[Array, " m"], z: Float[Array, " m"]
    ) -> Float[Array, " m"]:
        # By z itself: φ is off, relatively, by what the margin is off, however small φ
        # is, and the slope by what the solver leaves of it.
        return self.each(z)

    @property
    def positive(self) -> bool:
        return True


class SoftMargin(AbstractMarginLoss):
    """F(model) = meanᵢ log(1 + exp(−yᵢ f(xᵢ))), or the sum: `Logistic` for yᵢ = ±1 in
    place of 0 and 1.
    """

    x: PyTree
    y: Float[Array, "n ..."]
    reduction: Literal["mean", "sum"] = eqx.field(static=True)
    predict: Callable[[Any, PyTree], Array] = eqx.field(static=True)
    weights: Float[Array, " n"] | None = None

    def __init__(
        self,
        x: PyTree,
        y: Array,
        *,
        weights: Array | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        predict: Callable[[Any, PyTree], Array] = predict_each,
    ):
        """**Arguments:** as for `SquaredError`; `y` holds −1 and 1, of the shape of the
        predictions.

        **Raises:** `ValueError` as `SquaredError`, and where `y` holds others.
        """
        self.x, self.y, self.weights = _checked_sides(x, y, weights, reduction, predict)
        self.reduction, self.predict = reduction, predict

    @property
    def _second(self) -> Float[Array, " m"]:
        """The targets of `Logistic`: 1 for the second class, else 0."""
        return 0.5 * (1 + self.y.reshape(-1))

    def each(self, z: Float[Array, " m"]) -> Float[Array, " m"]:
        return logistic(z, self._second)

    def each_from(
        self, slopes: Float[Array, " m"], z: Float[Array, " m"]
    ) -> Float[Array, " m"]:
        return logistic_from(slopes, z, self._second)

    @property
    def positive(self) -> bool:
        return True


class Hinge(AbstractMarginLoss):
    """F(model) = meanᵢ ρ(max(0, 1 − yᵢ f(xᵢ))), or the sum: two classes, yᵢ = ±1, with
    ρ(a) = ½a² for a ≤ δ and δ(a − ½δ) beyond.

    With δ = ∞, the default, it is the squared hinge; with δ = 1 the smooth one of
    Rennie and Srebro (2005). Over δ it tends to the plain hinge max(0, 1 − yf) as
    δ → 0, which itself has a kink, and no gradient flow without sliding: it is refused.

    On separable data the minimisers are a region, {all yᵢf(xᵢ) ≥ 1}, on whose boundary
    flows end. There ∇²F jumps to zero, sample by sample: a sample counts whose margin
    is 1 or less (to eps^⅔, to which points of M are found). So rank, tangent space and
    spectrum at a limit are those of the face {yᵢf(xᵢ) = 1 for the samples that brought
    it there}. The drift moves on as samples join the face, and leave it; with ½‖θ‖² the
    drift of a linear model ends at the support vector machine.
    """

    x: PyTree
    y: Float[Array, "n ..."]
    reduction: Literal["mean", "sum"] = eqx.field(static=True)
    predict: Callable[[Any, PyTree], Array] = eqx.field(static=True)
    delta: float
    weights: Float[Array, " n"] | None = None

    def __init__(
        self,
        x: PyTree,
        y: Array,
        *,
        delta: float = math.inf,
        weights: Array | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        predict: Callable[[Any, PyTree], Array] = predict_each,
    ):
        """**Arguments:** as for `SquaredError`; `y` holds −1 and 1, of the shape of the
        predictions; and

        - `delta`: δ > 0, a number known before tracing.

        **Raises:** `ValueError` as `SquaredError`, where `y` holds others, and unless δ
        is such a number.
        """
        if is_concrete(delta) and np.ndim(delta) == 0 and delta == 0:
            raise ValueError(
                "delta: 0 is the plain hinge max(0, 1 - y f), which has a kink; give a "
                "small number for one that is smooth, times it."
            )
        self.x, self.y, self.weights = _checked_sides(x, y, weights, reduction, predict)
        self.reduction, self.predict = reduction, predict
        self.delta = check_delta(delta)

    def each(self, z: Float[Array, " m"]) -> Float[Array, " m"]:
        return _rho(1 - self.y.reshape(-1) * z, self.delta)

    def each_from(
        self, slopes: Float[Array, " m"], z: Float[Array, " m"]
    ) -> Float[Array, " m"]:
        # ρ′ = a up to δ.
        lack = 1 - self.y.reshape(-1) * z
        known = -self.y.reshape(-1) * slopes
        return _rho(jnp.where(lack < self.delta, known, lack), self.delta)

    @property
    def positive(self) -> bool:
        return False

    def stiffness(self, jacobian: Float[Array, "m d"]) -> Float[Array, ""]:
        """The largest curvature ‖Jᵀℓ''J‖ where all samples are within their margin, J
        the `jacobian` of the outputs."""
        weights = 1.0 if self.weights is None else jnp.max(self.weights)
        return self.scale * weights * jnp.linalg.norm(jacobian, 2) ** 2


@jax.custom_jvp
def _rho(a: Array, delta: float | Scalar) -> Array:
    """½a² up to δ, δ(a − ½δ) beyond, zero below 0."""
    inner = jnp.clip(a, 0, delta)
    return inner * (a - 0.5 * inner)


@_rho.defjvp
def _rho_jvp(primals, tangents):
    (a, delta), (da, _) = primals, tangents
    return _rho(a, delta), _slope(a, delta) * da


@jax.custom_jvp
def _slope(a: Array, delta: float | Scalar) -> Array:
    """ρ′."""
    return jnp.clip(a, 0, delta)


@_slope.defjvp
def _slope_jvp(primals, tangents):
    (a, delta), (da, _) = primals, tangents
    edge = -(float(jnp.finfo(a.dtype).eps) ** (2 / 3))
    return _slope(a, delta), jnp.where((a > edge) & (a < delta), da, 0)
