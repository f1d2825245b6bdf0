"""Recovering a matrix of low rank from fewer measurements than entries."""

from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._checks import check_choice, check_positive
from ..losses import SquaredError
from ..models import DeepLinear
from ..penalties import AbstractPenalty, L2
from ._checks import check_count, check_part
from ._convex import Certified, least_nuclear, places
from ._matrix_completion import entries
from ._task import fit_and_recovery, Task
from ._truths import AbstractConvexTruth


def matrix_recovery(
    key: PRNGKeyArray,
    *,
    measurements: Literal["entries", "gaussian"] = "entries",
    shape: tuple[int, int] = (10, 10),
    rank: int = 2,
    samples: int = 70,
    leverage: float = 0.0,
    depth: int = 1,
    scale: float | None = None,
    penalty: AbstractPenalty | None = None,
) -> Task:
    """F(A) = ½ Σᵢ (⟨Xᵢ, A⟩ − ⟨Xᵢ, A⋆⟩)², the matrix itself for parameters: completion,
    where each Xᵢ picks an entry, or sensing, where it has entries N(0, 1/`samples`).

    A⋆ = UVᵀ with Gaussian U and V, scaled to ‖A⋆‖_F = √(mn). Of the entries observed,
    the first ⌊τ `samples`⌋, τ = `leverage`, are those of largest leverage score
    (m/r)‖Uᵢ‖² + (n/r)‖Vⱼ‖² (of the singular vectors of A⋆), the others drawn uniformly
    from the rest. This is the setting of Notsawo, Dumas, Rabusseau, arXiv 2506.05718.

    With depth L the matrix is a product W_L ⋯ W₁, its hidden sizes max(m, n), and the
    start is Gaussian.

    The metrics are ‖𝒳(A) − y‖/‖y‖, with threshold 1e-3, and ‖A − A⋆‖/‖A⋆‖, with
    threshold 1e-2, of Frobenius norms. Whether the least nuclear norm is at A⋆ depends
    on the instance: `truth.recovers_target()` tells.

    **Arguments:**

    - `key`: of target, measurements and start.
    - `measurements`: `"entries"` or `"gaussian"`.
    - `shape`, `rank`, `samples`: (m, n), the rank of A⋆ and N < mn.
    - `leverage`: τ, from 0 to 1; of entries only.
    - `depth`: L.
    - `scale`: of the start, ζ: A = ζI at depth 1, and 1e-6 unless given; W_l of entries
        N(0, ζ²) where deeper, and 1e-2.
    - `penalty`: R; ½‖θ‖² unless given.

    **Returns:** a task whose truth is a `MatrixTruth`.

    **Raises:** `ValueError` where an argument is out of range.
    """
    check_choice(measurements, "measurements", ("entries", "gaussian"))
    if len(shape) != 2:
        raise ValueError(f"shape: expected two numbers, got {shape!r}.")
    rows, columns = shape
    for side in shape:
        check_count(side, "shape", least=2)
    check_count(rank, "rank", most=min(shape))
    check_count(samples, "samples", most=rows * columns - 1)
    check_part(leverage, "leverage")
    if leverage > 0 and measurements != "entries":
        raise ValueError("leverage: only entries have leverage scores.")
    check_count(depth, "depth")
    scale = (1e-6 if depth == 1 else 1e-2) if scale is None else scale
    check_positive(scale, "scale")

    u_key, v_key, x_key, init_key = jr.split(key, 4)
    target = jr.normal(u_key, (rows, rank)) @ jr.normal(v_key, (rank, columns))
    target = target * ((rows * columns) ** 0.5 / jnp.linalg.norm(target))
    if measurements == "entries":
        x = _observed(x_key, target, rank, samples, leverage)
        predict = entries
    else:
        x = jr.normal(x_key, (samples, rows * columns)) / samples**0.5
        predict = _products
    if depth == 1:
        weights = (scale * jnp.eye(rows, columns),)
    else:
        width = max(shape)
        sizes = (columns, *[width] * (depth - 1), rows)
        weights = tuple(
            scale * jr.normal(layer_key, (after, before))
            for layer_key, before, after in zip(
                jr.split(init_key, depth), sizes[:-1], sizes[1:], strict=True
            )
        )
    loss = SquaredError(
        x, predict(DeepLinear((target,)), x), reduction="sum", predict=predict
    )
    return Task(
        name="matrix_recovery",
        model=DeepLinear(weights),
        loss=loss,
        metrics=fit_and_recovery(loss, _matrix, target, fitted=1e-3, recovered=1e-2),
        truth=MatrixTruth(target, x, loss.y),
        codimension=samples,
        slow_time=10.0,
        penalty=L2() if penalty is None else penalty,
    )


def _observed(
    key: PRNGKeyArray, target: Array, rank: int, samples: int, leverage: float
) -> Int[Array, " N"]:
    """The places n i + j of the entries observed, in order."""
    left, _, right = np.linalg.svd(np.asarray(target))
    m, n = target.shape
    score = (m / rank) * (left[:, :rank] ** 2).sum(axis=1)[:, None]
    score = (score + (n / rank) * (right[:rank] ** 2).sum(axis=0)).reshape(-1)
    order = np.argsort(-score)
    first = int(leverage * samples)
    rest = np.asarray(jr.permutation(key, order[first:]))[: samples - first]
    return jnp.asarray(np.sort(np.concatenate([order[:first], rest])))


def _products(model: DeepLinear, x: Float[Array, "N mn"]) -> Float[Array, " N"]:
    """⟨Xᵢ, A⟩, of matrices read row by row."""
    return x @ model.matrix.reshape(-1)


def _matrix(model: DeepLinear) -> Float[Array, "m n"]:
    return model.matrix


class MatrixTruth(AbstractConvexTruth):
    """What is known of a matrix recovery.

    - `target`: A⋆, of shape (m, n).
    - `measured`: the places n i + j of the entries observed, of shape (N,), or the
        matrices Xᵢ, of shape (N, mn).
    - `values`: y = 𝒳(A⋆).
    """

    target: Float[Array, "m n"]
    measured: Int[Array, " N"] | Float[Array, "N mn"]
    values: Float[Array, " N"]
    # The solver finds the norm to about 1e-10, but the matrix only to the root of that.
    resolved: ClassVar[float] = 1e-4

    def coefficients(self, model: DeepLinear) -> Float[Array, "*batch m n"]:
        """A of `model`."""
        return model.matrix

    def operator(self) -> Any:
        """𝒳, of shape (N, mn): dense, or sparse where entries are observed."""
        measured = np.asarray(self.measured)
        return measured if measured.ndim == 2 else places(measured, self.target.shape)

    def certificate(self) -> Certified:
        """The matrix of least nuclear norm with these measurements, with the dual point
        that proves it (by CVXPY, to be installed as `gradflow[experiments]`).

        **Raises:** `ImportError` where CVXPY is not installed; `RuntimeError` where
        none is found, or none certified.
        """
        shape = self.target.shape
        return least_nuclear(self.operator(), np.asarray(self.values), shape)

    def least_squares(self) -> Float[Array, "m n"]:
        """Â = 𝒳⁺y, where the fit ends from a start at zero."""
        operator = self.operator()
        dense = operator if isinstance(operator, np.ndarray) else operator.toarray()
        flat = np.linalg.pinv(dense) @ np.asarray(self.values)
        return jnp.asarray(flat.reshape(self.target.shape), self.target.dtype)
