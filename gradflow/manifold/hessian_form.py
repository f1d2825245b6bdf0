"""The critical manifold from ∇²F: for any loss, at any critical point."""

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ..flow.flat import FlatLoss
from ..losses import AbstractLoss
from ._matrix_free import Operator
from ._normal import close, GAP, NormalSpace, numerical_rank, ROUNDINGS
from .forms import AbstractForm

# Entries of ∇²F up to which it is made: what a second decomposes.
_DENSE = 2**21


class HessianForm(AbstractForm):
    """M = {∇F = 0}, normal to the eigenvectors of ∇²F whose eigenvalue is not zero;
    −(∇²F)⁺∇F leads back to it."""

    name: ClassVar[str] = "hessian"
    measured: ClassVar[str] = "|eigenvalues| of ∇²F"
    interpolating: ClassVar[bool] = False

    def normal(
        self,
        loss: FlatLoss,
        theta: Float[Array, " d"],
        rank: Int[Array, ""] | None = None,
        damping: float = 0.0,
    ) -> NormalSpace:
        return _normal(loss, theta, rank, damping=damping)

    def exact_normal(
        self,
        loss: FlatLoss,
        theta: Float[Array, " d"],
        rank: Int[Array, ""] | None = None,
        *,
        rtol: float | None = None,
        time: float | Float[Array, ""] = 0.0,
    ) -> NormalSpace:
        return _normal(loss, theta, rank, rtol=rtol, time=time)

    def values(
        self, loss: FlatLoss, theta: Float[Array, " d"]
    ) -> tuple[Float[Array, " k"], Float[Array, ""]]:
        eigenvalues = jnp.linalg.eigvalsh(jax.hessian(loss)(theta))
        return -jnp.sort(-jnp.abs(eigenvalues)), eigenvalues[0]

    def curvatures(
        self, values: Float[Array | np.ndarray, " k"]
    ) -> Float[Array | np.ndarray, " k"]:
        return values

    def told_curvatures(
        self,
        loss: FlatLoss,
        theta: Float[Array, " d"],
        rank: Int[Array, ""],
        rtol: float,
    ) -> tuple[Float[Array, " k"], Float[Array, ""]]:
        """The least is where the gap has closed, whatever `rtol`."""
        values, _ = self.values(loss, theta)
        dropped = jnp.append(values, jnp.zeros_like(values[:1]))[rank]
        return values, GAP * dropped

    def decomposition(
        self, loss: FlatLoss, theta: Float[Array, " d"]
    ) -> tuple[Float[Array, " k"], Float[Array, "d k"]]:
        eigenvalues, vectors = jnp.linalg.eigh(jax.hessian(loss)(theta))
        order = jnp.argsort(-jnp.abs(eigenvalues))
        return eigenvalues[order], vectors[:, order]

    def root(
        self, loss: FlatLoss, theta: Float[Array, " d"]
    ) -> tuple[Float[Array, " k"], Float[Array, "k d"]]:
        values, vectors = jnp.linalg.eigh(jax.hessian(loss)(theta))
        return values, jnp.sqrt(jnp.abs(values))[:, None] * vectors.T

    def solve_shifted(
        self,
        loss: FlatLoss,
        theta: Float[Array, " d"],
        alpha: Float[Array, ""],
        h: Float[Array, ""],
        right: Float[Array, " d"],
        guess: Float[Array, " d"],
    ) -> Float[Array, " d"]:
        eye = jnp.eye(theta.size, dtype=theta.dtype)
        return jnp.linalg.solve(alpha * eye + h * jax.hessian(loss)(theta), right)

    def operator(self, loss: FlatLoss, theta: Float[Array, " d"]) -> Operator:
        d = theta.size
        _, hvp = jax.linearize(loss.gradient, theta)
        return Operator(apply=hvp, transpose=hvp, rows=d, columns=d, symmetric=True)

    def fits(self, loss: AbstractLoss, params: PyTree, static: PyTree) -> bool:
        d = sum(p.size for p in jax.tree.leaves(params))
        return d * d <= _DENSE


def _normal(
    loss: FlatLoss,
    theta: Float[Array, " d"],
    rank: Int[Array, ""] | None = None,
    *,
    rtol: float | None = None,
    damping: float = 0.0,
    time: float | Float[Array, ""] = 0.0,
) -> NormalSpace:
    """From the eigenvectors of ∇²F whose |eigenvalue| is among the `rank` largest (the
    numerical rank unless given).

    At a distance δ from M the kernel of ∇²F is gone: its eigenvalues are O(δ), as is
    μ = `damping` ‖∇F‖/‖θ‖. With the weights κ²/(κ² + μ²) a Newton step leaves these
    directions alone, and its convergence is quadratic all the same.

    Where the curvature κ is negative the flow leaves, unless it is at rest to rounding:
    that of θ, moved along the eigenvector, and what e^{|κ|t} has made of it in the
    `time` t since the start. And it leaves where most of the force is along directions
    without curvature.
    """
    eigenvalues, vectors = HessianForm().decomposition(loss, theta)
    if rank is None:
        rank = numerical_rank(jnp.abs(eigenvalues), theta.size, rtol).rank
    kept = jnp.arange(theta.size) < rank
    gradient = loss.gradient(theta)
    tiny = jnp.finfo(theta.dtype).tiny
    mu = damping * jnp.linalg.norm(gradient) / (jnp.linalg.norm(theta) + tiny)
    weight = jnp.where(kept, 1 / (1 + (mu / jnp.where(kept, eigenvalues, 1)) ** 2), 0)
    inverse = weight / jnp.where(kept, eigenvalues, 1)
    along = vectors.T @ gradient
    force = jnp.linalg.norm(gradient)
    grown = jnp.exp(
        jnp.minimum(jnp.abs(eigenvalues) * time, -math.log(close(theta.dtype)))
    )
    terms = jnp.abs(eigenvalues[0]) * (jnp.abs(vectors).T @ jnp.abs(theta)) * grown
    noise = ROUNDINGS * jnp.finfo(theta.dtype).eps * (terms + force)
    moving = jnp.abs(along) > noise
    unseen = jnp.linalg.norm(jnp.where(kept | ~moving, 0, along))
    drawn = unseen > jnp.linalg.norm(jnp.where(kept, along, 0))
    return NormalSpace(
        vectors * jnp.sqrt(weight)[None, :],
        -(vectors @ (inverse * along)),
        force / (jnp.linalg.norm(eigenvalues) + tiny),
        jnp.any(kept & (eigenvalues < 0) & moving) | drawn,
    )
