"""A matrix as the product of two factors."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Scalar

from ._checks import check_ndim


class MatrixFactorisation(eqx.Module):
    """The matrix UVᵀ; `model(ij)` is its entry (UVᵀ)ᵢⱼ = ⟨Uᵢ, Vⱼ⟩.

    Under weight decay the flow ends at a matrix of small nuclear norm, since the least
    of ½(‖U‖² + ‖V‖²) over UVᵀ = M is ‖M‖⁎ where there are min(m, n) columns or more
    (Boursier, Pesme, Dragomir, arXiv 2505.20172, appendix C).

    **Arguments:**

    - `U`, `V`: the factors, of shapes (m, r) and (n, r).

    **Raises:** `ValueError` where they are not matrices with as many columns.
    """

    U: Float[Array, "*batch m r"]
    V: Float[Array, "*batch n r"]

    def __check_init__(self):
        check_ndim(self.U, "U", 2)
        check_ndim(self.V, "V", 2)
        if self.U.shape[1] != self.V.shape[1]:
            raise ValueError(
                f"V: expected as many columns as U, {self.U.shape[1]}, got "
                f"{self.V.shape[1]}."
            )

    @property
    def matrix(self) -> Float[Array, "*batch m n"]:
        """UVᵀ; of a stack of models, the stack of matrices."""
        return self.U @ jnp.swapaxes(self.V, -1, -2)

    def __call__(self, ij: Int[Array, "2"]) -> Scalar:
        return jnp.dot(self.U[ij[0]], self.V[ij[1]])
