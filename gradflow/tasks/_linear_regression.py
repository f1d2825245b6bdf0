"""Linear regression with fewer samples than features: everything in closed form."""

from typing import Literal

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, Real

from .._checks import check_choice, check_positive
from ..losses import SquaredError
from ..models import LinearModel
from ._checks import check_count
from ._task import Task, train_and_test


def linear_regression(
    key: PRNGKeyArray,
    *,
    samples: int = 20,
    dim: int = 50,
    init_scale: float = 1.0,
    reduction: Literal["mean", "sum"] = "mean",
) -> Task:
    """Noiseless linear regression y = Xw⋆ with fewer samples than features.

    X has standard Gaussian entries, w⋆ is uniform on the unit sphere, the initial
    weights are N(0, `init_scale`²). The fast phase projects them on the solutions of
    Xw = y, the drift lets what is left of them in ker X die as e^{−s} (Boursier, Pesme,
    Dragomir, arXiv 2505.20172, appendix C).

    The test loss is the expected loss on new inputs, E ½⟨w − w⋆, x⟩² = ½‖w − w⋆‖². It
    does not go to zero, as w⋆ is not in the span of the data; its threshold is the
    geometric mean of its values at both ends of the drift.

    **Arguments:**

    - `key`: of the data and the initial weights.
    - `samples`, `dim`: n and d, n < d.
    - `init_scale`: the standard deviation of the initial weights.
    - `reduction`: whether F = (1/2n)‖Xw − y‖² or ½‖Xw − y‖².

    **Returns:** a task whose truth is a `LinearTruth`.

    **Raises:** `ValueError` where an argument is out of range.
    """
    check_count(dim, "dim", least=2)
    check_count(samples, "samples", most=dim - 1)
    check_positive(init_scale, "init_scale")
    check_choice(reduction, "reduction", ("mean", "sum"))
    x_key, target_key, init_key = jr.split(key, 3)
    x = jr.normal(x_key, (samples, dim))
    target = jr.normal(target_key, (dim,))
    target = target / jnp.linalg.norm(target)
    y = x @ target
    model = LinearModel(init_scale * jr.normal(init_key, (dim,)))

    loss = SquaredError(x, y, reduction=reduction)
    truth = LinearTruth(x, y, target, model.weights, curvature=loss.outer_curvature)
    test_loss = SquaredError(None, target, reduction="sum", predict=_weights)
    ends = [LinearModel(truth.drift(0.0)), LinearModel(truth.end_point())]
    start, end = (float(test_loss(each)) for each in ends)
    return Task(
        name="linear_regression",
        model=model,
        loss=loss,
        metrics=train_and_test(model, loss, test_loss, grokked=(start * end) ** 0.5),
        truth=truth,
        codimension=samples,
        slow_time=5.0,
    )


def _weights(model: LinearModel, _: None) -> Array:
    return model.weights


class LinearTruth(eqx.Module):
    """The whole path of linear regression, in closed form.

    With X = UΣVᵀ, hᵢ = cσᵢ² (c = 1/n or 1) and w₊ = X⁺y, the coordinates along the rows
    of Vᵀ obey z' = −(h + λ)z + h z₊, and those in ker X obey z' = −λz.
    """

    target: Float[Array, " d"]
    basis: Float[Array, "n d"]
    rates: Float[Array, " n"]
    start: Float[Array, " n"]
    least: Float[Array, " n"]
    kernel_part: Float[Array, " d"]

    def __init__(
        self,
        x: Float[Array, "n d"],
        y: Float[Array, " n"],
        target: Float[Array, " d"],
        initial: Float[Array, " d"],
        *,
        curvature: float,
    ):
        """**Arguments:**

        - `x`, `y`: the data, x of full row rank.
        - `target`: the weights that made them.
        - `initial`: w(0).
        - `curvature`: c in F = (c/2)‖Xw − y‖².
        """
        left, singular, basis = np.linalg.svd(np.asarray(x), full_matrices=False)
        initial_np = np.asarray(initial)
        start = basis @ initial_np
        self.target = target
        self.basis = jnp.asarray(basis)
        self.rates = jnp.asarray(curvature * singular**2)
        self.start = jnp.asarray(start)
        self.least = jnp.asarray(left.T @ np.asarray(y) / singular)
        # Projected twice: the first leaves rounding errors in the row space.
        kernel_part = initial_np - basis.T @ start
        self.kernel_part = jnp.asarray(kernel_part - basis.T @ (basis @ kernel_part))

    def path(
        self,
        t: Real[ArrayLike, "*batch"],
        weight_decay: Real[ArrayLike, ""],
    ) -> Float[Array, "*batch d"]:
        """The weights w_λ(t), exactly.

        zᵢ(t) = e^{−(hᵢ+λ)t} zᵢ(0) + (1 − e^{−(hᵢ+λ)t}) hᵢ/(hᵢ+λ) z₊ᵢ on the row space,
        e^{−λt} w(0) on ker X.

        **Arguments:**

        - `t`: time, a number or an array of any shape.
        - `weight_decay`: λ ≥ 0.
        """

        weight_decay = jnp.asarray(weight_decay)

        def at(time):
            rate = self.rates + weight_decay
            forgotten = -jnp.expm1(-rate * time)
            row = (1 - forgotten) * self.start
            row = row + forgotten * (self.rates / rate) * self.least
            return row @ self.basis + jnp.exp(-weight_decay * time) * self.kernel_part

        return self._over(at, t)

    def drift(self, s: Real[ArrayLike, "*batch"]) -> Float[Array, "*batch d"]:
        """w°(s) = X⁺y + e^{−s} P w(0), P the projection onto ker X, at slow times
        `s` = λt, a number or an array of any shape."""
        return self._over(
            lambda slow: self.end_point() + jnp.exp(-slow) * self.kernel_part, s
        )

    def end_point(self) -> Float[Array, " d"]:
        """X⁺y, the interpolating weights of least norm."""
        return self.least @ self.basis

    def coefficients(self, model: LinearModel) -> Float[Array, " d"]:
        """The weights of `model`: what `path`, `drift` and `end_point` are about."""
        return model.weights

    def _over(self, fn, times):
        times = jnp.asarray(times, self.rates.dtype)
        return jnp.vectorize(fn, signature="()->(d)")(times)
