"""Completing a low-rank matrix from some of its entries."""

from typing import ClassVar, Literal

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .._checks import check_choice, check_positive
from ..losses import SquaredError
from ..models import MatrixFactorisation
from ._checks import check_count
from ._convex import Certified, least_nuclear, places
from ._task import at_zero, Task, train_and_test
from ._truths import AbstractConvexTruth


def matrix_completion(
    key: PRNGKeyArray,
    *,
    shape: tuple[int, int] = (20, 20),
    rank: int = 2,
    observed: float = 0.45,
    factor_rank: int | None = None,
    init_scale: float = 0.5,
    reduction: Literal["mean", "sum"] = "sum",
) -> Task:
    """Completion of a low-rank matrix: F(U, V) = ½ Σ_Ω (UVᵀ − M)ᵢⱼ².

    M = ABᵀ with standard Gaussian A and B of `rank` columns. The drift lowers
    ½(‖U‖² + ‖V‖²) among completions, and so the nuclear norm of UVᵀ (Boursier, Pesme,
    Dragomir, arXiv 2505.20172, section 5: 20 × 20, rank 3). Whether the completion of
    least nuclear norm is M depends on the instance: `truth.recovers_target()` tells.

    The test loss is ½ the mean square error of the entries not observed; its threshold
    is 20% of its value at UVᵀ = 0.

    **Arguments:**

    - `key`: of the matrix, the entries and the initial factors.
    - `shape`: (m, n).
    - `rank`: of M.
    - `observed`: the fraction of entries observed, drawn uniformly without replacement.
    - `factor_rank`: columns of U and V; min(m, n) unless given, enough for every
        matrix. With fewer, the codimension is not known.
    - `init_scale`: the standard deviation of the initial entries of U and V.
    - `reduction`: `"sum"` for the F above, `"mean"` to divide it by the number of
        observed entries.

    **Returns:** a task whose truth is a `CompletionTruth`.

    **Raises:** `ValueError` where an argument is out of range.
    """
    if len(shape) != 2:
        raise ValueError(f"shape: expected two numbers, got {shape!r}.")
    for side in shape:
        check_count(side, "shape", least=2)
    check_count(rank, "rank", most=min(shape))
    rows, columns = shape
    count = round(observed * rows * columns)
    if not 0 < count < rows * columns:
        raise ValueError(
            f"observed: expected a fraction that leaves entries of both kinds, got "
            f"{observed!r}."
        )
    factor_rank = min(shape) if factor_rank is None else factor_rank
    check_count(factor_rank, "factor_rank")
    check_positive(init_scale, "init_scale")
    check_choice(reduction, "reduction", ("mean", "sum"))

    a_key, b_key, entry_key, u_key, v_key = jr.split(key, 5)
    target = jr.normal(a_key, (rows, rank)) @ jr.normal(b_key, (rank, columns))
    shuffled = jr.permutation(entry_key, rows * columns)
    seen, hidden = jnp.sort(shuffled[:count]), jnp.sort(shuffled[count:])
    model = MatrixFactorisation(
        init_scale * jr.normal(u_key, (rows, factor_rank)),
        init_scale * jr.normal(v_key, (columns, factor_rank)),
    )
    values, hidden_values = target.reshape(-1)[seen], target.reshape(-1)[hidden]
    loss = SquaredError(seen, values, reduction=reduction, predict=entries)
    test_loss = SquaredError(hidden, hidden_values, predict=entries)
    grokked = 0.2 * at_zero(test_loss, model)
    return Task(
        name="matrix_completion",
        model=model,
        loss=loss,
        metrics=train_and_test(model, loss, test_loss, grokked=grokked),
        truth=CompletionTruth(
            target, jnp.stack([seen // columns, seen % columns], axis=1), values
        ),
        # With min(m, n) columns one of the factors has full row rank, and then every
        # change of the matrix is first-order reachable.
        codimension=count if factor_rank >= min(shape) else None,
        slow_time=10.0,
    )


def entries(model: PyTree, flat: Int[Array, " N"]) -> Float[Array, " N"]:
    """The entries of `model.matrix`, (m, n), at the places `flat` = n i + j.

    Forms the whole matrix once: a gather of rows of its factors for each entry is
    slower when a good part of the entries is asked for.
    """
    return jnp.take(model.matrix.reshape(-1), flat, unique_indices=True, mode="clip")


class CompletionTruth(AbstractConvexTruth):
    """What is known of a matrix factorisation's flow.

    - `target`: M, of shape (m, n).
    - `indices`, `values`: the observed entries, (i, j) and Mᵢⱼ.
    """

    target: Float[Array, "m n"]
    indices: Int[Array, "N 2"]
    values: Float[Array, " N"]
    # The solver finds the norm to about 1e-10, but the matrix only to the root of that.
    resolved: ClassVar[float] = 1e-4

    def coefficients(self, model: MatrixFactorisation) -> Float[Array, "m n"]:
        """UVᵀ of `model`."""
        return model.matrix

    def invariant(self, model: MatrixFactorisation) -> Float[Array, "r r"]:
        """UᵀU − VᵀV of `model`, which decays as e^{−2λt} along the flow, whatever the
        loss of UVᵀ."""
        return model.U.T @ model.U - model.V.T @ model.V

    def certificate(self) -> Certified:
        """The completion of least nuclear norm, with the dual point that proves it (by
        CVXPY, to be installed as `gradflow[experiments]`). It is the global minimum of
        ½(‖U‖² + ‖V‖²) on M with as many columns as it needs.

        **Raises:** `ImportError` where CVXPY is not installed; `RuntimeError` where
        none is found, or none certified.
        """
        shape = self.target.shape
        flat = np.ravel_multi_index(tuple(np.asarray(self.indices).T), shape)
        return least_nuclear(places(flat, shape), np.asarray(self.values), shape)
