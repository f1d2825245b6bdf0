"""Diagonal linear networks: linear models whose coefficients are products."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from ._checks import check_same_shape


class DiagonalNetwork(eqx.Module):
    """f(x) = ⟨u ⊙ v, x⟩, a linear model with coefficients β = u ⊙ v.

    Under weight decay the flow ends at coefficients of small ℓ1 norm, since the least
    of ½(‖u‖² + ‖v‖²) over u ⊙ v = β is ‖β‖₁ (Boursier, Pesme, Dragomir, arXiv
    2505.20172, appendix C). A coordinate with uᵢ = ±vᵢ can never change the sign of βᵢ.

    **Arguments:**

    - `u`, `v`: the two layers, of shape (d,).

    **Raises:** `ValueError` where `u` and `v` differ in shape.
    """

    u: Float[Array, " *d"]
    v: Float[Array, " *d"]

    def __check_init__(self):
        check_same_shape(self.u, self.v)

    @property
    def beta(self) -> Float[Array, " *d"]:
        """The coefficients β = u ⊙ v."""
        return self.u * self.v

    def __call__(self, x: Float[Array, " d"]) -> Scalar:
        return jnp.dot(self.beta, x)


class DifferenceNetwork(eqx.Module):
    """f(x) = ⟨u ⊙ u − v ⊙ v, x⟩, a linear model with coefficients β = u ⊙ u − v ⊙ v.

    The same network as `DiagonalNetwork` in rotated parameters, (u + v) ⊙ (u − v): at
    u = v it starts from β = 0 and is free to go to either sign (Lyu et al., arXiv
    2311.18817).

    **Arguments:**

    - `u`, `v`: of shape (d,).

    **Raises:** `ValueError` where `u` and `v` differ in shape.
    """

    u: Float[Array, " *d"]
    v: Float[Array, " *d"]

    def __check_init__(self):
        check_same_shape(self.u, self.v)

    @property
    def beta(self) -> Float[Array, " *d"]:
        """The coefficients β = u ⊙ u − v ⊙ v."""
        return self.u * self.u - self.v * self.v

    def __call__(self, x: Float[Array, " d"]) -> Scalar:
        return jnp.dot(self.beta, x)
