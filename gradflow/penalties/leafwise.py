"""Penalties that are sums over the leaves of the parameters: L2, L1, group lasso."""

import abc
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Scalar

from .base import (
    AbstractAbsolute,
    AbstractByLeaf,
    AbstractCurved,
    AbstractKinked,
    AbstractLipschitz,
    AbstractOwnGradient,
    AbstractRidge,
)

Where = Callable[[Any], Any] | None


class AbstractLeafwise(AbstractOwnGradient, AbstractByLeaf):
    """R(θ) = Σ r(leaf), the sum over chosen leaves of the parameters.

    `where` picks them, as in `eqx.tree_at`: a function of the model that returns one
    part of it, or a tuple of parts, such as `lambda model: model.layers[0].weight`.
    Where it is `None`, these are all trainable leaves that `takes` accepts.
    """

    where: eqx.AbstractVar[Where]

    @abc.abstractmethod
    def leaf_value(self, x: Array) -> Scalar:
        """r(`x`)."""

    @abc.abstractmethod
    def leaf_least_norm(
        self, x: Array, force: Array, strength: float | Scalar
    ) -> Array:
        """The element of least norm of `force` + `strength` ∂r(`x`), an array like
        `x`."""

    @abc.abstractmethod
    def takes(self, x: Array) -> bool:
        """Whether r is a function of arrays of the shape of `x`."""

    def acts_on(self, params: PyTree) -> list[bool]:
        """Which of the leaves of `params`, in JAX's order, R depends on.

        **Raises:** `ValueError` where `where` picks nothing trainable, or an array that
        R is not made for.
        """
        leaves, tree = jax.tree.flatten(params)
        name = type(self).__name__
        if self.where is None:
            flags = [self.takes(x) for x in leaves]
            if not any(flags):
                raise ValueError(
                    f"params: {name} found nothing to act on among shapes "
                    f"{[x.shape for x in leaves]}."
                )
            return flags
        # A model whose leaves are their own numbers tells which of them are picked.
        picked = self.where(tree.unflatten(range(len(leaves))))
        parts = picked if isinstance(picked, tuple | list) else (picked,)
        numbers = [jax.tree.leaves(part) for part in parts]
        if not numbers or not all(numbers):
            raise ValueError(
                f"where: expected trainable parts of the model, got {picked!r}."
            )
        chosen = {n for part in numbers for n in part}
        for n in chosen:
            if not self.takes(leaves[n]):
                raise ValueError(
                    f"where: {name} does not take an array of shape {leaves[n].shape}."
                )
        return [n in chosen for n in range(len(leaves))]

    def _chosen(self, params: PyTree) -> list[Array]:
        """The leaves that R acts on."""
        pairs = zip(self.acts_on(params), jax.tree.leaves(params), strict=True)
        return [x for on, x in pairs if on]

    def _map(
        self, fn: Callable, other: Callable, params: PyTree, *rest: PyTree
    ) -> PyTree:
        """`fn` of the leaves that R acts on, `other` of the others."""
        leaves, tree = jax.tree.flatten(params)
        rows = zip(leaves, *map(tree.flatten_up_to, rest), strict=True)
        flags = self.acts_on(params)
        return tree.unflatten(
            [(fn if on else other)(*row) for on, row in zip(flags, rows, strict=True)]
        )

    def value(self, params: PyTree) -> Scalar:
        return jnp.asarray(sum(self.leaf_value(x) for x in self._chosen(params)))

    def gradient(self, params: PyTree) -> PyTree:
        return self._map(
            lambda x: self.leaf_least_norm(x, jnp.zeros_like(x), 1.0),
            jnp.zeros_like,
            params,
        )

    def least_norm(
        self, params: PyTree, force: PyTree, strength: float | Scalar
    ) -> PyTree:
        """The element of least norm of `force` + `strength` ∂R at `params`."""
        return self._map(
            lambda x, v: self.leaf_least_norm(x, v, strength),
            lambda x, v: v,
            params,
            force,
        )

    def prox(self, params: PyTree, step: float | Scalar) -> PyTree:
        return self._map(lambda x: self.leaf_prox(x, step), lambda x: x, params)


class AbstractLeafwiseLipschitz(AbstractLeafwise, AbstractLipschitz):
    """One whose r has a Lipschitz constant."""

    @abc.abstractmethod
    def leaf_lipschitz(self, x: Array) -> float:
        """That of r."""

    def lipschitz(self, params: PyTree) -> float:
        squares = [self.leaf_lipschitz(x) ** 2 for x in self._chosen(params)]
        return float(np.sqrt(sum(squares)))


class L2(AbstractLeafwise, AbstractRidge, AbstractCurved):
    """R(θ) = ½‖θ‖²; ∇R(θ) = θ. Its proximal map is θ/(1 + h).

    **Arguments:**

    - `where`: the leaves, as for [`gradflow.penalties.AbstractLeafwise`][]; unless
        given, all.
    """

    where: Where = eqx.field(static=True, default=None, kw_only=True)

    @property
    def diagonal(self) -> bool:
        return True

    def takes(self, x: Array) -> bool:
        return True

    def leaf_value(self, x: Array) -> Scalar:
        return 0.5 * jnp.sum(x * x)

    def leaf_least_norm(
        self, x: Array, force: Array, strength: float | Scalar
    ) -> Array:
        return force + strength * x

    def leaf_prox(self, x: Array, step: float | Scalar) -> Array:
        return x / (1 + step)

    def curvature(self, params: PyTree) -> float | PyTree:
        if self.where is None:
            return 1.0
        return self._map(jnp.ones_like, jnp.zeros_like, params)


class L1(AbstractLeafwiseLipschitz, AbstractAbsolute, AbstractCurved):
    """R(θ) = ‖θ‖₁ = Σ|θᵢ|; the subgradient of least norm is sign(θ), zero at zero.

    Its proximal map is soft thresholding, sign(θᵢ) max(|θᵢ| − h, 0).

    **Arguments:**

    - `where`: the leaves, as for [`gradflow.penalties.AbstractLeafwise`][]; unless
        given, all.
    """

    where: Where = eqx.field(static=True, default=None, kw_only=True)

    @property
    def kinked(self) -> bool:
        return True

    @property
    def diagonal(self) -> bool:
        return True

    def takes(self, x: Array) -> bool:
        return True

    def leaf_value(self, x: Array) -> Scalar:
        return jnp.sum(jnp.abs(x))

    def leaf_least_norm(
        self, x: Array, force: Array, strength: float | Scalar
    ) -> Array:
        return jnp.where(
            x == 0, soft_threshold(force, strength), force + strength * jnp.sign(x)
        )

    def leaf_prox(self, x: Array, step: float | Scalar) -> Array:
        return soft_threshold(x, step)

    def leaf_lipschitz(self, x: Array) -> float:
        return x.size**0.5

    def curvature(self, params: PyTree) -> float:
        return 0.0

    def absolute_weights(self, params: PyTree) -> PyTree:
        return self._map(jnp.ones_like, jnp.zeros_like, params)

    def smooth_gradient(self, params: PyTree) -> PyTree:
        return jax.tree.map(jnp.zeros_like, params)


class ElasticNet(AbstractLeafwise, AbstractAbsolute, AbstractCurved):
    """R(θ) = a‖θ‖₁ + ½b‖θ‖² (Zou and Hastie, 2005).

    Its proximal map is soft thresholding by ha, divided by 1 + hb.

    **Arguments:**

    - `l1`, `l2`: a and b, finite numbers from 0 on.
    - `where`: the leaves, as for [`gradflow.penalties.AbstractLeafwise`][]; unless
        given, all.

    **Raises:** `ValueError` for any other a or b.
    """

    l1: float = eqx.field(static=True)
    l2: float = eqx.field(static=True)
    where: Where = eqx.field(static=True, default=None, kw_only=True)

    def __check_init__(self):
        for name in ("l1", "l2"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{name}: expected a number from 0 on, got {getattr(self, name)}."
                )

    @property
    def kinked(self) -> bool:
        return True

    @property
    def diagonal(self) -> bool:
        return True

    def takes(self, x: Array) -> bool:
        return True

    def leaf_value(self, x: Array) -> Scalar:
        return self.l1 * jnp.sum(jnp.abs(x)) + 0.5 * self.l2 * jnp.sum(x * x)

    def leaf_least_norm(
        self, x: Array, force: Array, strength: float | Scalar
    ) -> Array:
        force = force + strength * self.l2 * x
        return L1().leaf_least_norm(x, force, strength * self.l1)

    def leaf_prox(self, x: Array, step: float | Scalar) -> Array:
        return soft_threshold(x, step * self.l1) / (1 + step * self.l2)

    def absolute_weights(self, params: PyTree) -> PyTree:
        weights = lambda x: jnp.full_like(x, self.l1)
        return self._map(weights, jnp.zeros_like, params)

    def smooth_gradient(self, params: PyTree) -> PyTree:
        slope, weights = self.gradient(params), self.absolute_weights(params)
        return jax.tree.map(lambda g, w, x: g - w * jnp.sign(x), slope, weights, params)

    def curvature(self, params: PyTree) -> float | PyTree:
        if self.where is None:
            return self.l2
        ridge = lambda x: jnp.full_like(x, self.l2)
        return self._map(ridge, jnp.zeros_like, params)


class GroupLasso(AbstractLeafwiseLipschitz, AbstractKinked):
    """R(θ) = Σ_g ‖θ_g‖, the sum over groups of parameters of their norms, not squared.

    It sets whole groups to zero (Yuan and Lin, 2006). The subgradient of least norm is
    θ_g/‖θ_g‖, zero at zero; the proximal map shrinks each group by h in norm,
    max(1 − h/‖θ_g‖, 0) θ_g.

    **Arguments:**

    - `groups`: `"rows"`, where each slice of a leaf along its first axis is a group,
        such as the incoming weights of a neuron in an `eqx.nn.Linear`; `"columns"`,
        where it is each slice along the last axis; or `"leaf"`, where each leaf is one
        group: then R = Σ‖W‖ over the layers.
    - `where`: the leaves. Unless given, all of them; with rows and columns, all of two
        axes or more.

    **Raises:** `ValueError` for other groups; where `where` picks what has no rows and
    columns, when R is first called.
    """

    groups: Literal["rows", "columns", "leaf"] = eqx.field(static=True, default="rows")
    where: Where = eqx.field(static=True, default=None, kw_only=True)

    @property
    def kinked(self) -> bool:
        return True

    def __check_init__(self):
        if self.groups not in ("rows", "columns", "leaf"):
            raise ValueError(
                f"groups: expected 'rows', 'columns' or 'leaf', got {self.groups!r}."
            )

    def takes(self, x: Array) -> bool:
        return x.ndim >= 2 or self.groups == "leaf"

    def _norms(self, x: Array) -> Array:
        """‖x_g‖, to be broadcast against x."""
        one = {"rows": (0,), "columns": (x.ndim - 1,), "leaf": ()}[self.groups]
        axes = tuple(a for a in range(x.ndim) if a not in one)
        # Squares of small entries would underflow, and their direction be lost.
        largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
        unit = x / jnp.where(largest > 0, largest, 1)
        return largest * jnp.sqrt(jnp.sum(unit * unit, axis=axes, keepdims=True))

    def leaf_value(self, x: Array) -> Scalar:
        return jnp.sum(self._norms(x))

    def leaf_least_norm(
        self, x: Array, force: Array, strength: float | Scalar
    ) -> Array:
        norms = self._norms(x)
        moving = norms > 0
        away = force + strength * x / jnp.where(moving, norms, 1)
        return jnp.where(moving, away, self.leaf_prox(force, strength))

    def leaf_prox(self, x: Array, step: float | Scalar) -> Array:
        norms = self._norms(x)
        left = jnp.maximum(norms - step, 0) / jnp.where(norms > 0, norms, 1)
        return left * x

    def leaf_lipschitz(self, x: Array) -> float:
        axis = {"rows": 0, "columns": -1}.get(self.groups)
        return 1.0 if axis is None else x.shape[axis] ** 0.5


def soft_threshold(x: Array, by: float | Scalar) -> Array:
    """sign(x) max(|x| − by, 0), entry by entry; to the bit 0 where |x| ≤ by."""
    return jnp.where(jnp.abs(x) > by, x - by * jnp.sign(x), jnp.zeros_like(x))
