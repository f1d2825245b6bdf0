"""λ₁(∇²F), which sharpness-aware minimisation of all samples brings down."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

from ..flow.flow import GradientFlow
from ..flow.lanczos import Lanczos
from ..losses import AbstractLoss
from ..penalties.base import AbstractOwnGradient
from .curvature import Curvature, CurvatureAt, Form

_STEPS = 300  # of Lanczos' process at most
_CLOSE = 1e-11  # how near to an eigenvalue, relative: its vector is as near over a gap


class LargestCurvature(AbstractOwnGradient):
    """R(θ) = λ₁(∇²F(θ)), the largest eigenvalue; ∇R = ∇(uᵀ∇²F u) with u its vector held
    fixed, and ∇²R has 2 Σⱼ (uᵀ∂∇²F vⱼ)²/(λ₁ − λⱼ) beside.

    As a penalty it is what `gradflow.sharpness` measures. Of a composite loss it is
    that of Jᵀℓ''J unless asked otherwise, see [`gradflow.drifts.Trace`][]: the same on
    the manifold of perfect fits.

    By Lanczos' process, one product with a vector for each of up to 300 steps; of m
    outputs it takes m + 1 at most. Where it has not converged R is NaN, and so is what
    it is part of. (∇²R takes as many steps of conjugate gradients, which come short of
    it where the gap is small.)

    Where two eigenvalues are equally large R has a kink, and what is called its
    gradient is one of many, not that of least norm: it belongs to one vector among
    those of λ₁. Drifts down λ₁ tend to end where that is so, and there this one no
    longer stands: a solver takes ever smaller steps, and says so. `gap` tells how far
    that is.

    Source: Wen, Ma, Li, arXiv 2211.05729.
    """

    curvature_of: Curvature

    def __init__(
        self,
        loss: AbstractLoss | GradientFlow,
        model: PyTree,
        *,
        form: Form = "auto",
        trainable: PyTree = eqx.is_inexact_array,
    ):
        """**Arguments:** as [`gradflow.drifts.Trace`][]; of a flow with `rates` G it is
        λ₁(√G ∇²F √G).

        **Raises:** `ValueError` as that.
        """
        self.curvature_of, _ = Curvature.of(loss, model, form, trainable)

    def value(self, params: PyTree) -> Scalar:
        return self._along(params, _first(self.curvature_of, params))

    def gradient(self, params: PyTree) -> PyTree:
        u = _first(self.curvature_of, params)
        return jax.grad(lambda p: self._along(p, u))(params)

    def gap(self, params: PyTree) -> Scalar:
        """(λ₁ − λ₂)/λ₁ at the parameters `params`, zero where the largest eigenvalue
        has company."""
        at = self.curvature_of.at(params)
        if at.theta.size == 1:
            return jnp.ones((), at.theta.dtype)
        values, _ = _converged(at, 2).ritz()
        return (values[-1] - values[-2]) / values[-1]

    def _along(self, params: PyTree, u: Float[Array, " d"]) -> Scalar:
        return self.curvature_of.at(params).quadratic(u)


def _converged(at: CurvatureAt, count: int = 1) -> Lanczos:
    """Lanczos' process, at the end of which the `count` largest eigenvalues are told;
    its `scale` is NaN where they are not."""
    theta = at.theta
    most = min(theta.size, _STEPS)
    close = max(_CLOSE, 100 * float(jnp.finfo(theta.dtype).eps))

    def told(process):
        values, bounds = process.ritz()
        largest = jnp.max(jnp.abs(values[-count:]))
        return jnp.all(bounds[-count:] <= close * largest) & (process.steps >= count)

    def unsettled(process):
        more = (process.steps < most) & jnp.isfinite(process.scale)
        return more & ~told(process)

    def further(process):
        until = process.steps + process.steps // 2 + max(count, 4)
        return process.onward(at.product, jnp.minimum(until, most))

    begin = Lanczos.begin(theta.size, theta.dtype, most, count)
    process = jax.lax.while_loop(unsettled, further, begin)
    okay = told(process) | (process.steps >= theta.size)
    scale = jnp.where(okay, process.scale, jnp.nan)
    return eqx.tree_at(lambda p: p.scale, process, scale)


@eqx.filter_custom_jvp
def _first(curvature: Curvature, params: PyTree) -> Float[Array, " d"]:
    """u, of length one; NaN where it was not found."""
    process = _converged(curvature.at(params))
    return jnp.where(jnp.isfinite(process.scale), process.first(), jnp.nan)


@_first.def_jvp
def _(primals, tangents):
    """u' = (λ₁ − A)⁺ A'u, in which the part along u is none."""
    curvature, params = primals
    u = _first(curvature, params)

    def turned(curvature, params):
        return curvature.at(params).product(u)

    product, change = eqx.filter_jvp(turned, primals, tangents)
    value = jnp.vdot(u, product)
    at = curvature.at(params)

    def across(v):
        return v - jnp.vdot(u, v) * u

    def shifted(v):
        v = across(v)
        return across(value * v - at.product(v))

    close = max(1e-10, 100 * float(jnp.finfo(u.dtype).eps))
    found, _ = jax.scipy.sparse.linalg.cg(
        shifted, across(change), tol=close, maxiter=_STEPS
    )
    return u, across(found)
