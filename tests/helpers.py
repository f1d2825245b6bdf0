"""Small models and losses whose critical manifolds are known in closed form."""

import equinox as eqx
import jax.random as jr
from jaxtyping import Array, Float

import gradflow as gf


class Linear(eqx.Module):
    """f(x) = ⟨w, x⟩."""

    w: Float[Array, " d"]

    def __call__(self, x):
        return x @ self.w


class Diagonal(eqx.Module):
    """f(x) = ⟨u⊙u − v⊙v, x⟩; u⊙v is conserved by every flow without weight decay."""

    u: Float[Array, " d"]
    v: Float[Array, " d"]

    def __call__(self, x):
        return x @ (self.u**2 - self.v**2)


class Product(eqx.Module):
    """f(x) = u v x, two scalars; u² − v² is conserved without weight decay."""

    u: Float[Array, ""]
    v: Float[Array, ""]

    def __call__(self, x):
        return self.u * self.v * x


def linear_problem(key, *, samples, features):
    """A linear model and the squared error of `samples` equations in `features`
    unknowns."""
    kx, ky, kw = jr.split(key, 3)
    loss = gf.SquaredError(
        jr.normal(kx, (samples, features)), jr.normal(ky, (samples,))
    )
    return loss, Linear(jr.normal(kw, (features,)))


def diagonal_problem(key, *, samples, features, nonzero=2):
    """The network ⟨u² − v², x⟩ with a teacher of `nonzero` coefficients."""
    kx, ku, kv = jr.split(key, 3)
    x = jr.normal(kx, (samples, features))
    y = x[:, :nonzero].sum(axis=1)
    model = Diagonal(jr.normal(ku, (features,)), jr.normal(kv, (features,)))
    return gf.SquaredError(x, y), model
