"""The curvature of the loss that penalties are made of, by products and by rows."""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree, Scalar

from .._checks import check_choice
from ..flow.flat import FlatLoss, flatten
from ..flow.flow import flow_of, GradientFlow
from ..flow.term import Stretched
from ..losses import AbstractBySamples, AbstractCompositeLoss, AbstractLoss, samples

Form = Literal["auto", "jacobian", "hessian"]

PRODUCTS = 1000  # so many with basis vectors are taken for an exact sum at most


class Curvature(eqx.Module):
    """A(θ) = S H S, the curvature of F in the variables η of F(θ + Sη) at η = 0.

    H is Jᵀℓ''J, which is ∇²F wherever ∇ℓ = 0, or ∇²F itself; S is √G of the rates of a
    flow, or diag(θ) for η relative to the parameters, or one.
    """

    loss: AbstractLoss
    static: PyTree
    roots: PyTree | None
    """√G, like the parameters."""
    relative: bool = eqx.field(static=True)
    form: Literal["jacobian", "hessian"] = eqx.field(static=True)

    @classmethod
    def of(
        cls,
        loss: AbstractLoss | GradientFlow,
        model: PyTree,
        form: Form,
        trainable: PyTree,
        *,
        relative: bool = False,
    ) -> tuple["Curvature", PyTree]:
        """That of a loss, or a flow of it; and the parameters of `model`.

        **Raises:** `ValueError` for another form, a Jacobian one of a loss that is not
        composite, and as `GradientFlow` of its arguments.
        """
        flow = flow_of(loss, trainable)
        check_choice(form, "form", ("auto", "jacobian", "hessian"))
        composite = isinstance(flow.loss, AbstractCompositeLoss)
        if form == "jacobian" and not composite:
            raise ValueError(
                f"form: 'jacobian' is for a composite loss, got "
                f"{type(flow.loss).__name__}; give 'hessian'."
            )
        chart = flow.term(model)[0].chart
        roots = chart.root if isinstance(chart, Stretched) else None
        auto: Any = "jacobian" if composite else "hessian"
        form = auto if form == "auto" else form
        params = flow.partition(model)[0]
        return cls(flow.loss, chart.static, roots, relative, form), params

    @property
    def sampled(self) -> bool:
        """Whether A is a sum over samples, one Jacobian of the outputs of each."""
        by_samples = isinstance(self.loss, AbstractBySamples)
        known = by_samples and samples(self.loss) is not None
        return self.form == "jacobian" and known

    def at(self, params: PyTree) -> "CurvatureAt":
        """That at the parameters θ."""
        theta, loss = flatten(self.loss, params, self.static)
        scale = theta if self.relative else jnp.ones_like(theta)
        if self.roots is not None:
            scale = scale * ravel_pytree(self.roots)[0]
        return CurvatureAt(loss, theta, scale, self.form)


class CurvatureAt(eqx.Module):
    """A(θ) at one θ, of vectors."""

    loss: FlatLoss
    theta: Float[Array, " d"]
    scale: Float[Array, " d"]
    """S."""
    form: Literal["jacobian", "hessian"] = eqx.field(static=True)

    def quadratic(self, v: Float[Array, " d"]) -> Scalar:
        """vᵀAv, at the cost of two or three outputs."""
        v = self.scale * v
        if self.form == "jacobian":
            z, change = jax.jvp(self.loss.outputs, (self.theta,), (v,))
            return jnp.vdot(change, self.loss.outer_hvp(z, change))

        def slope(th):
            return jax.jvp(self.loss, (th,), (v,))[1]

        return jax.jvp(slope, (self.theta,), (v,))[1]

    def product(self, v: Float[Array, " d"]) -> Float[Array, " d"]:
        """Av."""
        v = self.scale * v
        if self.form == "jacobian":
            z, push, pull = self.loss.linearize(self.theta)
            return self.scale * pull(self.loss.outer_hvp(z, push(v)))
        return self.scale * jax.jvp(self.loss.gradient, (self.theta,), (v,))[1]

    def matrix(self) -> Float[Array, "d d"]:
        """A."""
        eye = jnp.eye(self.theta.size, dtype=self.theta.dtype)
        return jax.vmap(self.product)(eye)

    def rows(self) -> tuple[PyTree, Callable, int]:
        """Where A is a sum over samples, Σᵢ JᵢᵀBᵢJᵢ: what to go through, a function of
        each that gives Jᵢ and BᵢJᵢ, and how many numbers that takes."""
        x = samples(self.loss.composite)
        z = self.loss.outputs(self.theta)
        n = jax.tree.leaves(x)[0].shape[0]
        outputs = z.size // n

        # ℓ'' is a block for each sample: one product gives a column of every one.
        def column(e):
            return self.loss.outer_hvp(z, jnp.tile(e, n)).reshape(n, outputs)

        blocks = jax.vmap(column, out_axes=2)(jnp.eye(outputs, dtype=z.dtype))

        def row(at):
            x, block = at

            def predict(th):
                return self.loss.model(th)(x).reshape(-1)

            jac = jax.jacrev(predict)(self.theta) * self.scale[None]
            return jac, block @ jac

        return (x, blocks), row, outputs * self.theta.size


def check_products(curvature: Curvature, params: PyTree, name: str, remedy: str):
    """Raises where an exact sum over the basis takes too many products."""
    size = sum(p.size for p in jax.tree.leaves(params))
    if size > PRODUCTS and not curvature.sampled:
        raise ValueError(
            f"{name}: all of the curvature takes {size} products with vectors here, up "
            f"to {PRODUCTS} are taken; {remedy}."
        )
