"""Sparse regression with diagonal networks."""

from typing import Literal

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_choice, check_positive
from ..losses import SquaredError
from ..models import DiagonalNetwork, DifferenceNetwork
from ._checks import check_count
from ._task import at_zero, Task, train_and_test
from ._truths import AbstractSparseTruth


def diagonal_network(
    key: PRNGKeyArray,
    *,
    form: Literal["difference", "product"] = "difference",
    samples: int = 30,
    dim: int = 100,
    sparsity: int = 5,
    init_scale: float = 0.5,
) -> Task:
    """Sparse regression from Gaussian features: β = u ⊙ u − v ⊙ v, or β = u ⊙ v.

    F = (1/2n)‖Xβ − Xβ⋆‖² with `sparsity` nonzero entries in β⋆, of size 0.5 to 1.5 and
    random sign. The drift lowers ½(‖u‖² + ‖v‖²) among interpolants, and ends at the
    least ℓ1 norm (Boursier, Pesme, Dragomir, arXiv 2505.20172, appendix C).

    The test loss is the expected loss on new inputs, E ½⟨β − β⋆, x⟩² = ½‖β − β⋆‖²; its
    threshold is 10% of its value at β = 0.

    **Arguments:**

    - `key`: of the data and the initial weights.
    - `form`: `"difference"` starts from u and v near `init_scale` (within 10%), so from
        β ≈ 0; `"product"` from u and v ~ N(0, `init_scale`²).
    - `samples`, `dim`: n and d, n ≤ d.
    - `sparsity`: the number of nonzero entries of β⋆.
    - `init_scale`: the size of the initial weights. The larger, the longer the drift.

    **Returns:** a task whose truth is a `DiagonalTruth`.

    **Raises:** `ValueError` where an argument is out of range.
    """
    check_choice(form, "form", ("difference", "product"))
    check_count(dim, "dim")
    check_count(samples, "samples", most=dim)
    check_count(sparsity, "sparsity", most=dim)
    check_positive(init_scale, "init_scale")
    x_key, place_key, sign_key, size_key, u_key, v_key = jr.split(key, 6)
    x = jr.normal(x_key, (samples, dim))
    place = jr.choice(place_key, dim, (sparsity,), replace=False)
    entries = jr.rademacher(sign_key, (sparsity,), x.dtype)
    entries = entries * jr.uniform(size_key, (sparsity,), minval=0.5, maxval=1.5)
    target = jnp.zeros(dim).at[place].set(entries)
    u, v = jr.normal(u_key, (dim,)), jr.normal(v_key, (dim,))
    if form == "difference":
        model = DifferenceNetwork(
            init_scale * (1 + 0.1 * u), init_scale * (1 + 0.1 * v)
        )
    else:
        model = DiagonalNetwork(init_scale * u, init_scale * v)
    return _task("diagonal_network", model, x, target, slow_time=8.0)


def fourier_diagonal(
    key: PRNGKeyArray,
    *,
    samples: int = 20,
    frequencies: int = 40,
    init_scale: float = 0.1**0.5,
) -> Task:
    """A sparse Fourier series learnt by β = u ⊙ v from a few samples.

    Features 1, √2 cos kx, √2 sin kx for k ≤ `frequencies`, inputs uniform on [−π, π];
    β⋆ has three nonzero entries, 1, −0.7 and 0.8, at frequencies drawn among the lowest
    ten; F = (1/2n)‖Xβ − Xβ⋆‖²; u and v ~ N(0, `init_scale`²). This is the setting of
    figure 4 of Boursier, Pesme, Dragomir, arXiv 2505.20172 (which leaves n, d and β⋆
    open); there λ = 1e-4.

    The features are orthonormal, so the expected loss on new inputs, the test loss, is
    ½‖β − β⋆‖²; its threshold is 10% of its value at β = 0.

    **Arguments:**

    - `key`: of the inputs, the target and the initial weights.
    - `samples`: n, at most 2 `frequencies` + 1.
    - `frequencies`: the highest frequency k.
    - `init_scale`: the standard deviation of the initial weights.

    **Returns:** a task whose truth is a `DiagonalTruth`.

    **Raises:** `ValueError` where an argument is out of range.
    """
    check_count(frequencies, "frequencies", least=2)
    dim = 2 * frequencies + 1
    check_count(samples, "samples", most=dim)
    check_positive(init_scale, "init_scale")
    x_key, place_key, u_key, v_key = jr.split(key, 4)
    inputs = jr.uniform(x_key, (samples,), minval=-jnp.pi, maxval=jnp.pi)
    lowest = min(20, dim - 1)
    place = 1 + jr.choice(place_key, lowest, (3,), replace=False)
    target = jnp.zeros(dim).at[place].set(jnp.array([1.0, -0.7, 0.8]))
    model = DiagonalNetwork(
        init_scale * jr.normal(u_key, (dim,)), init_scale * jr.normal(v_key, (dim,))
    )
    x = fourier_features(inputs, frequencies)
    return _task("fourier_diagonal", model, x, target, slow_time=10.0)


def fourier_features(
    inputs: Float[Array, " n"], frequencies: int
) -> Float[Array, "n d"]:
    """1, then √2 cos kx and √2 sin kx for k = 1, …, `frequencies`, at each x of the
    `inputs`: orthonormal for the uniform distribution on [−π, π].

    **Returns:** an array of shape (n, 2 `frequencies` + 1).
    """
    angles = jnp.outer(inputs, jnp.arange(1, frequencies + 1, dtype=inputs.dtype))
    waves = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    waves = 2**0.5 * waves.reshape(inputs.shape[0], -1)
    return jnp.concatenate([jnp.ones((inputs.shape[0], 1), waves.dtype), waves], axis=1)


def _task(name, model, x, target, *, slow_time) -> Task:
    loss = SquaredError(x, x @ target)
    test_loss = SquaredError(None, target, reduction="sum", predict=_beta)
    grokked = 0.1 * at_zero(test_loss, model)
    return Task(
        name=name,
        model=model,
        loss=loss,
        metrics=train_and_test(model, loss, test_loss, grokked=grokked),
        truth=DiagonalTruth(x, loss.y, target),
        # Rank n as long as n features or more have (uᵢ, vᵢ) ≠ 0: at all finite s.
        codimension=x.shape[0],
        slow_time=slow_time,
    )


def _beta(model: DiagonalNetwork | DifferenceNetwork, _: None) -> Array:
    return model.beta


class DiagonalTruth(AbstractSparseTruth):
    """What is known of a diagonal network's flow.

    - `features`, `targets`: X and y.
    - `target`: β⋆, the coefficients that made y.
    """

    features: Float[Array, "n d"]
    targets: Float[Array, " n"]
    target: Float[Array, " d"]

    def coefficients(
        self, model: DiagonalNetwork | DifferenceNetwork
    ) -> Float[Array, " d"]:
        """β of `model`."""
        return model.beta

    def invariant(
        self, model: DiagonalNetwork | DifferenceNetwork
    ) -> Float[Array, " d"]:
        """What of `model` decays as e^{−2λt} along the flow, whatever the data:
        u ⊙ u − v ⊙ v where β = u ⊙ v, and u ⊙ v where β = u ⊙ u − v ⊙ v."""
        if isinstance(model, DifferenceNetwork):
            return model.u * model.v
        return model.u**2 - model.v**2
