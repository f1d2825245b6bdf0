"""Losses of infinitely many samples, in closed form."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

from ._checks import check_finite, word
from ._typing import Given
from .losses import AbstractLoss
from .models import TwoLayer


class PopulationError(AbstractLoss):
    """F(model) = ½ E‖f(x) − f⋆(x)‖², x ~ N(0, I): the squared error, against a teacher,
    of infinitely many samples, without a sample of it.

    Teacher and student are networks of erf units without biases,
    [`gradflow.models.TwoLayer`][] with `activation="erf"`, of any widths. Of units
    φ(u) = erf(u/√2) with weights v, w

        E φ(⟨v, x⟩)φ(⟨w, x⟩) = (2/π) arcsin(⟨v, w⟩ / √((1 + ‖v‖²)(1 + ‖w‖²))),

    so that F is a quadratic form in the outer weights of both. The overlaps of the
    inner weights move by a closed set of equations, with long plateaus where student
    units are alike.

    It also is a metric: the exact test error of a student that learns from samples.

    F is a sum of numbers of size (Σ|aⱼ| + Σ|a⋆ⱼ|)², by whose rounding it may be off,
    and below zero, where the student is all but the teacher. It is not composite: where
    a KKT solver or the theory is to be used, ∇²F is made, for up to 5000 parameters.

    Source: Williams, Neural Computation 10, 1203 (1998), for the expectation; Saad and
    Solla, Phys. Rev. E 52, 4225 (1995), for teacher and student.
    """

    teacher: TwoLayer

    def __init__(self, teacher: TwoLayer):
        """**Arguments:**

        - `teacher`: f⋆.

        **Raises:** `ValueError` unless it is such a network, of finite weights; as does
        the loss of a model that is none, or of another number of inputs or outputs.
        """
        _check_units(teacher, "teacher")
        check_finite(teacher, "teacher")
        self.teacher = teacher

    def __call__(self, model: PyTree) -> Scalar:
        _check_units(model, "model")
        one, two = (
            (f.inner.shape[1], f.outer.shape[:-1]) for f in (self.teacher, model)
        )
        if one != two:
            raise ValueError(
                "model: expected {} inputs and outputs of shape {}, as of the teacher, "
                "got {} and {}.".format(*one, *two)
            )
        inner = jnp.concatenate([model.inner, self.teacher.inner])
        outer = jnp.concatenate([model.outer, -self.teacher.outer], axis=-1)
        return 0.5 * jnp.sum(outer * (outer @ _products(inner)))


def _products(weights: Float[Array, "h d"]) -> Float[Array, "h h"]:
    """E φ(⟨v, x⟩)φ(⟨w, x⟩), of all pairs of rows v, w."""
    overlaps = weights @ weights.T
    sizes = jnp.diagonal(overlaps)
    one, two = sizes[:, None], sizes[None, :]
    # (1 + v²)(1 + w²) − ⟨v, w⟩² is 1 + v² + w² or more, and so kept against rounding
    # where v and w are aligned and large: all derivatives of the angle are finite.
    spanned = one * two - overlaps**2
    spanned += jax.lax.stop_gradient(jnp.maximum(-spanned, 0))
    angle = jnp.arctan2(overlaps, jnp.sqrt(1 + one + two + spanned))
    return (2 / math.pi) * angle


def _check_units(x: Given, name: str) -> None:
    """Raises unless it is a network of erf units without biases."""
    got = word(x)
    if isinstance(x, TwoLayer):
        if x.activation == "erf" and x.bias is None:
            return
        got = f"{x.activation} units, {'no' if x.bias is None else 'with'} biases"
    raise ValueError(
        f'{name}: expected a gradflow.models.TwoLayer with activation="erf" and '
        f"bias=None, got {got}."
    )
