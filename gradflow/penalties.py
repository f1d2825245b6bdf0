"""Penalties R(θ) on the trainable parameters."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree, Scalar


class AbstractPenalty(eqx.Module):
    """A penalty R: a function of the trainable parameters, a pytree.

    Penalties add up, `L1() + 0.1 * L2()`.
    """

    @abc.abstractmethod
    def __call__(self, params: PyTree) -> Scalar:
        """R(θ)."""

    @abc.abstractmethod
    def gradient(self, params: PyTree) -> PyTree:
        """∇R(θ), a pytree like `params`; at a kink the subgradient of least norm."""

    @property
    def smooth(self) -> bool:
        """Whether R is differentiable everywhere."""
        return True

    def absolute_weights(self, params: PyTree) -> PyTree | None:
        """Where all kinks of R come from a part Σᵢ wᵢ|θᵢ|, its weights w ≥ 0, a pytree
        like `params`; `None` where R has no kinks, or others."""
        del params
        return None

    def prox(self, params: PyTree, step: float | Scalar) -> PyTree:
        """The proximal map argmin_u R(u) + ‖u − θ‖²/(2 step), a pytree like `params`.

        **Raises:** `NotImplementedError` where none is known in closed form.
        """
        raise NotImplementedError(
            f"penalty: no proximal map of {type(self).__name__} in closed form."
        )

    def curvature(self, params: PyTree) -> float | PyTree:
        """What the KKT solvers put for ∇²R(θ) in the stage equation: a number ρ where
        ∇²R ≈ ρ I, or the diagonal of ∇²R, a pytree like `params`, where it is large and
        uneven (then the tangent kernel is made anew every step). It changes how fast
        they converge, never what they converge to. The default is 0: not stiff."""
        del params
        return 0.0


class L2(AbstractPenalty):
    """R(θ) = ½‖θ‖², the sum over all trainable leaves; ∇R(θ) = θ."""

    def __call__(self, params: PyTree) -> Scalar:
        return 0.5 * jnp.asarray(sum(jnp.sum(p * p) for p in jax.tree.leaves(params)))

    def gradient(self, params: PyTree) -> PyTree:
        return params

    def prox(self, params: PyTree, step: float | Scalar) -> PyTree:
        return jax.tree.map(lambda p: p / (1 + step), params)

    def curvature(self, params: PyTree) -> float:
        return 1.0


class L1(AbstractPenalty):
    """R(θ) = Σᵢ |θᵢ| over the chosen leaves, or Σᵢ wᵢ|θᵢ|.

    Its kinks are the zeros of the coordinates. The flow stays in them where it may: see
    [`gradflow.simulate`][].
    """

    where: Callable[[PyTree], Any] | None = eqx.field(static=True)

    def __init__(self, *, where: Callable[[PyTree], Any] | None = None):
        """**Arguments:**

        - `where`: a function that picks leaves out of the model, as for `eqx.tree_at`:
            `lambda model: model.weight`; by default all trainable ones.
        """
        self.where = where

    def __call__(self, params: PyTree) -> Scalar:
        chosen = jax.tree.leaves(chosen_leaves(params, self.where))
        return jnp.asarray(sum(jnp.sum(jnp.abs(p)) for p in chosen))

    def gradient(self, params: PyTree) -> PyTree:
        return on_chosen(jnp.sign, jnp.zeros_like, params, self.where)

    @property
    def smooth(self) -> bool:
        return False

    def absolute_weights(self, params: PyTree) -> PyTree:
        return on_chosen(jnp.ones_like, jnp.zeros_like, params, self.where)

    def prox(self, params: PyTree, step: float | Scalar) -> PyTree:
        return on_chosen(
            lambda p: soft_threshold(p, step), lambda p: p, params, self.where
        )


def soft_threshold(x: Any, by: Any) -> Any:
    """sign(x) max(|x| − by, 0), to the bit 0 where |x| ≤ by."""
    return jnp.where(jnp.abs(x) > by, x - by * jnp.sign(x), jnp.zeros_like(x))


def chosen_leaves(params: PyTree, where: Callable[[PyTree], Any] | None) -> PyTree:
    """What `where` picks out of `params`; all of it where there is no choice."""
    return params if where is None else where(params)


def on_chosen(
    fn: Callable, other: Callable, params: PyTree, where: Callable[[PyTree], Any] | None
) -> PyTree:
    """`fn` of the chosen leaves, `other` of the rest."""
    if where is None:
        return jax.tree.map(fn, params)
    out = jax.tree.map(other, params)
    return eqx.tree_at(where, out, jax.tree.map(fn, where(params)))
