"""The size of parameters, and the singular values of the matrices among them."""

from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

from .._checks import check_callable, check_integer
from .._norms import norm

Part: TypeAlias = Callable[[Any], PyTree]
"""Takes what is meant out of a model."""


def whole(model: PyTree) -> PyTree:
    """All of it."""
    return model


def size(tree: PyTree) -> Scalar:
    """‖·‖ of all arrays of floating-point numbers together."""
    return norm(eqx.filter(tree, eqx.is_inexact_array))


class Norm(eqx.Module):
    """‖θ‖ = (Σᵢ θᵢ²)^½, of all arrays of floating-point numbers in a model (frozen ones
    too), or of those that are chosen."""

    where: Part = eqx.field(static=True)

    def __init__(self, *, where: Part = whole):
        """**Arguments:**

        - `where`: a function of the model that gives what to take the norm of, such as
            `lambda model: model.layers[0]`.

        **Raises:** `ValueError` where that is no function.
        """
        check_callable(where, "where")
        self.where = where

    def __call__(self, model: PyTree) -> Scalar:
        return size(self.where(model))


class SingularValues(eqx.Module):
    """The singular values of a matrix, descending: a vector of as many numbers as its
    shorter side has, or of the largest of them."""

    where: Part = eqx.field(static=True)
    count: int | None = eqx.field(static=True)

    def __init__(self, where: Part, *, count: int | None = None):
        """**Arguments:**

        - `where`: a function of the model that gives the matrix: a leaf, such as
            `lambda model: model.layers[0].weight`, a product of some, or features and
            outputs, `lambda model: jax.vmap(model)(x)`.
        - `count`: how many; all unless given.

        **Raises:** `ValueError` where these are no function and no number from 1 on;
        when it is called, where there is no matrix, or not as many.
        """
        check_callable(where, "where")
        if count is not None:
            check_integer(count, "count")
        self.where, self.count = where, count

    def __call__(self, model: PyTree) -> Float[Array, " k"]:
        values = singular_values(self.where(model))
        if self.count is not None and self.count > values.size:
            raise ValueError(
                f"count: the matrix has {values.size} singular values, got "
                f"{self.count}."
            )
        return values[: self.count]


class EffectiveRank(eqx.Module):
    """The effective rank exp(H) of a matrix, H = −Σ pᵢ log pᵢ, pᵢ = σᵢ/Σσ: the entropy
    of its singular values (Roy and Vetterli, EUSIPCO 2007).

    It is from 1, where one σ is all, to their number, where all are equal; and 0 for a
    matrix of zeros. It does not change with the size of the matrix.
    """

    where: Part = eqx.field(static=True)

    def __init__(self, where: Part):
        """**Arguments:**

        - `where`: as for [`gradflow.metrics.SingularValues`][]. (The kernel ZZᵀ of
            outputs Z has the singular values σ², so that its effective rank is smaller
            than that of Z.)

        **Raises:** `ValueError` where that is no function; when it is called, where
        there is no matrix.
        """
        check_callable(where, "where")
        self.where = where

    def __call__(self, model: PyTree) -> Scalar:
        values = singular_values(self.where(model))
        largest = jnp.max(values)
        values = values / jnp.where(largest > 0, largest, 1)
        p = values / jnp.where(largest > 0, jnp.sum(values), 1)
        entropy = -jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1)))
        return jnp.where(largest == 0, 0, jnp.exp(entropy))


def singular_values(matrix: PyTree) -> Float[Array, " k"]:
    """Descending; NaN where the matrix is not finite, as where a run has ended.

    **Raises:** `ValueError` where there is no matrix.
    """
    shape = getattr(matrix, "shape", None)
    if not eqx.is_inexact_array(matrix) or shape is None or len(shape) != 2:
        got = type(matrix).__name__ if shape is None else f"one of shape {shape}"
        raise ValueError(f"where: expected to choose one real matrix, got {got}.")
    finite = jnp.all(jnp.isfinite(matrix))
    values = jnp.linalg.svd(jnp.where(finite, matrix, 0), compute_uv=False)
    return jnp.where(finite, values, jnp.nan)
