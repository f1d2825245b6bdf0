"""The ends of the spectrum of a symmetric matrix by products with vectors alone."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


class Lanczos(eqx.Module):
    """A Lanczos process with full reorthogonalisation, after k steps from b vectors.

    Its basis Q has k + b orthonormal columns. The first k have the products
    HQₖ = Qₖ₊ᵦ T, one more with each step; T without its last b rows is symmetric, with
    b diagonals on either side (Ruhe, Math. Comp. 33, 1979). b = 1 is the process of
    Lanczos, which sees an eigenvalue once however many eigenvectors it has; from b
    vectors it is seen b times.
    """

    basis: Float[Array, "rows n"]
    """Qᵀ, with room for what is to come."""
    coefficients: Float[Array, "rows most"]
    """T."""
    scale: Float[Array, ""]
    """The largest ‖Hq‖ so far, a lower bound of ‖H‖."""
    steps: Int[Array, ""]
    """k."""

    @classmethod
    def begin(cls, n: int, dtype: DTypeLike, most: int, block: int = 1) -> "Lanczos":
        """From b = `block` random vectors in ℝⁿ, always the same, with room for `most`
        steps."""
        basis = jnp.zeros((most + block, n), dtype)
        for i in range(block):
            basis = basis.at[i].set(unit(orthogonal(basis, random(i, n, dtype))))
        none = jnp.zeros((most + block, most), dtype)
        return cls(basis, none, jnp.zeros((), dtype), jnp.asarray(0))

    @property
    def most(self) -> int:
        """How many steps there is room for."""
        return self.coefficients.shape[1]

    def onward(
        self, apply: Callable[[Array], Array], until: int | Int[Array, ""]
    ) -> "Lanczos":
        """On to step number `until`, by one product v ↦ Hv for each."""
        block = self.basis.shape[0] - self.most

        def step(i: Array, at: tuple) -> tuple:
            basis, coefficients, scale = at
            v = apply(basis[i])
            scale = jnp.maximum(scale, jnp.linalg.norm(v))
            key = jr.fold_in(jr.key(1), i)
            q, coefficient = next_unit(basis, v, key, scale)
            column = (basis @ v).at[i + block].set(coefficient)
            coefficients = coefficients.at[:, i].set(column)
            return basis.at[i + block].set(q), coefficients, scale

        start = self.basis, self.coefficients, self.scale
        until = jnp.asarray(until, self.steps.dtype)
        basis, coefficients, scale = jax.lax.fori_loop(self.steps, until, step, start)
        return Lanczos(basis, coefficients, scale, until)

    def ritz(self) -> tuple[Float[Array, " most"], Float[Array, " most"]]:
        """The eigenvalues of QₖᵀHQₖ, ascending, and how near each is to one of H at
        least. The first are for steps that were not taken yet, below all others."""
        values, vectors = self._decomposed()
        done = jnp.arange(self.most) < self.steps
        rows = jnp.arange(self.basis.shape[0]) >= self.steps
        outside = jnp.where(rows[:, None] & done[None, :], self.coefficients, 0)
        return values, jnp.linalg.norm(outside @ vectors, axis=0)

    def first(self) -> Float[Array, " n"]:
        """The vector that belongs to the largest of these values, of length one."""
        _, vectors = self._decomposed()
        return unit(self.basis[: self.most].T @ vectors[:, -1])

    def _decomposed(self) -> tuple[Float[Array, " most"], Float[Array, "most most"]]:
        """The eigenvalues and eigenvectors of QₖᵀHQₖ."""
        done = jnp.arange(self.most) < self.steps
        block = self.basis.shape[0] - self.most
        t = self.coefficients[: self.most]
        t = jnp.where(done[:, None] & done[None, :], 0.5 * (t + t.T), 0)
        # No column is larger than `scale`, so ‖T‖ is at most √(2b + 1) of that.
        t = t - jnp.diag(jnp.where(done, 0, 2 * (block + 1) * self.scale))
        values, vectors = jnp.linalg.eigh(t)
        return values, vectors


def random(i: int, n: int, dtype: DTypeLike) -> Float[Array, " n"]:
    """A random vector, number i, always the same."""
    return jr.normal(jr.fold_in(jr.key(0), i) if i else jr.key(0), (n,), dtype)


def unit(v: Float[Array, " n"]) -> Float[Array, " n"]:
    """v/‖v‖."""
    return v / jnp.linalg.norm(v)


def orthogonal(basis: Float[Array, "k n"], v: Float[Array, " n"]) -> Array:
    """v less its part in the span of the rows of `basis`; twice is enough."""
    for _ in range(2):
        v = v - basis.T @ (basis @ v)
    return v


def next_unit(
    basis: Array, v: Array, key: Array, scale: Float[Array, ""]
) -> tuple[Float[Array, " n"], Float[Array, ""]]:
    """The next unit vector and its coefficient. Where v lies in the span already, a
    random new direction, with coefficient zero; zero where there is none left."""
    v = orthogonal(basis, v)
    size = jnp.linalg.norm(v)
    floor = 10 * v.size * jnp.finfo(v.dtype).eps
    kept = size > floor * scale
    fresh = orthogonal(basis, jr.normal(key, v.shape, v.dtype))
    length = jnp.linalg.norm(fresh)
    fresh = jnp.where(length > floor * v.size**0.5, fresh / length, 0)
    return (
        jnp.where(kept, v / jnp.where(kept, size, 1), fresh),
        jnp.where(kept, size, 0),
    )
