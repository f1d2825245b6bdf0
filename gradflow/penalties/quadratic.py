"""½‖θ‖² with a weight for each parameter, and about another point than zero."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Scalar

from .._checks import as_data, is_concrete
from .base import AbstractCurved, AbstractProximal


class Quadratic(AbstractCurved, AbstractProximal):
    """R(θ) = ½ Σᵢ wᵢ(θᵢ − cᵢ)²; ∇R(θ) = w(θ − c). Its proximal map is
    (θ + hwc)/(1 + hw).

    With w = 1 and c = 0 it is `L2`. About the start, c = θ₀, weight decay pulls back to
    it (L2-SP: Li, Grandvalet, Davoine, arXiv 1802.01483); elastic weight consolidation
    has the Fisher information for w.
    """

    weights: PyTree[Array]
    centre: PyTree[Array] | None

    def __init__(
        self,
        *,
        weights: PyTree[float | Array] = 1.0,
        centre: PyTree | None = None,
    ):
        """**Arguments:**

        - `weights`: w, finite numbers from 0 on: one, or a pytree of them in the
            structure of the model or of its first levels (`jax.tree.map` makes one);
            each is a number for all parameters below it, or an array of the shape of
            the parameter.
        - `centre`: c, a model (or its parameters) of the structure of the one that is
            trained; zero unless given.

        **Raises:** `ValueError` for other weights, and for a centre that is not finite;
        where they do not fit the model, when R is first called.
        """
        weights = as_data(weights, "weights")
        for w in jax.tree.leaves(weights):
            real = w.dtype.kind in "fi"
            if not real or is_concrete(w) and not _are_weights(w):
                raise ValueError("weights: expected finite numbers from 0 on.")
        self.weights = jax.tree.map(lambda w: w.astype(float), weights)
        self.centre = eqx.filter(centre, eqx.is_inexact_array)
        for c in jax.tree.leaves(self.centre):
            if is_concrete(c) and not np.isfinite(c).all():
                raise ValueError("centre: holds a NaN or an infinity.")

    @property
    def diagonal(self) -> bool:
        return True

    def __call__(self, params: PyTree) -> Scalar:
        parts = [jnp.sum(w * a * a) for w, a in self._terms(params)]
        return 0.5 * jnp.asarray(sum(parts))

    def gradient(self, params: PyTree) -> PyTree:
        slopes = [w * a for w, a in self._terms(params)]
        return jax.tree.unflatten(jax.tree.structure(params), slopes)

    def curvature(self, params: PyTree) -> Scalar | PyTree:
        leaves, tree = jax.tree.flatten(params)
        if eqx.is_array(self.weights) and self.weights.ndim == 0:
            return self.weights.astype(leaves[0].dtype)
        return tree.unflatten([w for w, _ in self._terms(params)])

    def prox(self, params: PyTree, step: float | Scalar) -> PyTree:
        leaves, tree = jax.tree.flatten(params)
        rows = zip(leaves, self._terms(params), strict=True)
        # (As a change of θ, which is exact where that is small.)
        return tree.unflatten([x - step * w * a / (1 + step * w) for x, (w, a) in rows])

    def _terms(self, params: PyTree) -> list[tuple[Array, Array]]:
        """w and θ − c of each leaf."""
        leaves = jax.tree.leaves(params)
        try:
            spread = jax.tree.map(
                lambda w, below: jax.tree.map(lambda _: w, below), self.weights, params
            )
            weights = [
                jnp.broadcast_to(w.astype(x.dtype), x.shape)
                for w, x in zip(jax.tree.leaves(spread), leaves, strict=True)
            ]
        except ValueError as error:
            raise ValueError(
                "weights: expected a number, or numbers and arrays in the structure of "
                "the model, or of its first levels."
            ) from error
        if self.centre is None:
            return list(zip(weights, leaves, strict=True))
        try:
            centre = eqx.filter(self.centre, jax.tree.map(lambda _: True, params))
        except ValueError:
            centre = None
        centres = jax.tree.leaves(centre)
        if [c.shape for c in centres] != [x.shape for x in leaves]:
            raise ValueError(
                "centre: expected a model of the structure of the one that is trained, "
                f"with arrays of shapes {[x.shape for x in leaves]}."
            )
        rows = zip(weights, leaves, centres, strict=True)
        return [(w, x - c.astype(x.dtype)) for w, x, c in rows]


def _are_weights(w: Array) -> bool:
    values = np.asarray(w)
    return bool((np.isfinite(values) & (values >= 0)).all())
