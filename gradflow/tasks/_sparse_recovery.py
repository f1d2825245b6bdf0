"""Recovering a sparse vector from fewer linear measurements than unknowns."""

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from .._checks import check_positive
from ..losses import SquaredError
from ..models import HadamardProduct, LinearModel
from ..penalties import L1
from ._checks import check_count, check_part
from ._task import fit_and_recovery, Task
from ._truths import AbstractSparseTruth


def sparse_recovery(
    key: PRNGKeyArray,
    *,
    features: int = 100,
    sparsity: int = 5,
    samples: int = 30,
    snr: float = float("inf"),
    coherence: float = 0.0,
    depth: int = 1,
    scale: float | None = None,
) -> Task:
    """Compressed sensing: F(a) = ½‖Xa − y‖², y = Xa⋆ + ξ, under R = ‖a‖₁.

    a⋆ has `sparsity` entries N(0, 1/`features`) at random places; X has entries
    N(0, 1/`samples`), but its first ⌊τ `samples`⌋ rows are different rows of the
    identity, τ = `coherence`: such a row sees one entry of a⋆, likely a zero. This is
    the data of Notsawo, Dumas, Rabusseau, arXiv 2506.05718, as their code makes it
    (its text says variance 1/`features`).

    With depth L the coefficients are a = A₁ ⊙ ⋯ ⊙ A_L, the penalty is still the ℓ1 norm
    of the parameters, and the start breaks the symmetry of the signs: Gaussian. (From
    equal factors, as in the paper's code, an even L never reaches a negative entry.)

    The metrics are ‖Xa − y‖/‖y‖, with threshold 1e-3, and ‖a − a⋆‖/‖a⋆‖, with threshold
    1e-2. Whether the least ℓ1 norm is at a⋆ depends on the instance:
    `truth.recovers_target()` tells.

    **Arguments:**

    - `key`: of target, measurements, noise and start.
    - `features`, `sparsity`, `samples`: n, s and N ≤ n.
    - `snr`: ‖Xa⋆‖²/‖ξ‖² in the mean; no noise unless given.
    - `coherence`: τ, from 0 to 1.
    - `depth`: L.
    - `scale`: of the start, ζ. All entries are ζ at depth 1, and 1e-6 unless given;
        N(0, ζ²) where deeper, and 1e-2.

    **Returns:** a task whose truth is a `SparseTruth`.

    **Raises:** `ValueError` where an argument is out of range.
    """
    check_count(features, "features")
    check_count(sparsity, "sparsity", most=features)
    check_count(samples, "samples", most=features)
    check_count(depth, "depth")
    if not snr > 0:
        raise ValueError(f"snr: expected a positive number, got {snr!r}.")
    check_part(coherence, "coherence")
    scale = (1e-6 if depth == 1 else 1e-2) if scale is None else scale
    check_positive(scale, "scale")

    place_key, value_key, x_key, row_key, noise_key, init_key = jr.split(key, 6)
    place = jr.choice(place_key, features, (sparsity,), replace=False)
    values = jr.normal(value_key, (sparsity,)) / features**0.5
    target = jnp.zeros(features).at[place].set(values)
    x = jr.normal(x_key, (samples, features)) / samples**0.5
    coherent = int(coherence * samples)
    rows = jr.choice(row_key, features, (coherent,), replace=False)
    x = x.at[:coherent].set(jnp.eye(features)[rows])
    # E‖Xa*‖² = E‖a*‖² = s/n at τ = 0.
    deviation = (sparsity / (features * samples * snr)) ** 0.5
    y = x @ target + deviation * jr.normal(noise_key, (samples,))

    if depth == 1:
        model = LinearModel(jnp.full(features, scale))
    else:
        model = HadamardProduct(scale * jr.normal(init_key, (depth, features)))
    loss = SquaredError(x, y, reduction="sum")
    return Task(
        name="sparse_recovery",
        model=model,
        loss=loss,
        metrics=fit_and_recovery(
            loss, coefficients, target, fitted=1e-3, recovered=1e-2
        ),
        truth=SparseTruth(x, y, target),
        codimension=samples,
        slow_time=2.0,
        penalty=L1(),
    )


def coefficients(model: PyTree) -> Float[Array, "*batch d"]:
    """The coefficients a of a linear model, of any depth."""
    return model.weights if isinstance(model, LinearModel) else model.beta


class SparseTruth(AbstractSparseTruth):
    """What is known of a sparse recovery.

    - `features`, `targets`: X and y.
    - `target`: a⋆.
    """

    features: Float[Array, "n d"]
    targets: Float[Array, " n"]
    target: Float[Array, " d"]

    def coefficients(self, model: PyTree) -> Float[Array, "*batch d"]:
        """a of `model`."""
        return coefficients(model)

    def least_squares(self) -> Float[Array, " d"]:
        """â = X⁺y, where the fit ends from a start at zero."""
        return jnp.linalg.pinv(self.features) @ self.targets

    def unseen(self) -> Scalar:
        """‖P a⋆‖/‖a⋆‖, P the projection onto ker X: the error of what is known of a⋆
        through X alone, which no method without another preference goes below."""
        seen = jnp.linalg.pinv(self.features) @ (self.features @ self.target)
        return jnp.linalg.norm(self.target - seen) / jnp.linalg.norm(self.target)

    def coherence(self) -> Scalar:
        """maxᵢⱼ |Xᵢⱼ|/‖Xᵢ‖, between measurements and coordinates: 1/√d at best, and 1
        where a measurement sees one coordinate alone."""
        return jnp.max(
            jnp.abs(self.features) / jnp.linalg.norm(self.features, axis=1)[:, None]
        )
