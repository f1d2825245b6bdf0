"""How regular the critical manifold is, at a point: rank, distance, curvature."""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._checks import check_given
from ..flow.flat import FlatLoss, flatten_on
from ..flow.flow import check_free, GradientFlow
from ..flow.term import FlowTerm
from ..precision import exact_products
from ..results import RESULTS
from ..runs.problem import check_problem
from ._matrix_free import (
    curvature_inverse,
    frobenius,
    least_squares,
    Operator,
    project,
)
from ._normal import GAP, outer_root
from .choice import choose_form, Form, is_dense, Method
from .forms import AbstractForm
from .spectra import compiled_spectrum, Spectrum

# How far beside a point the rank is looked at again, relative to ‖θ‖.
_BESIDE = 1e-3
_SETTLED = 1e-6  # and how small, over its length, the last Newton step is to be
# The relative distance from M beyond which what is measured is not that of M.
_NEAR = 1e-6


class Diagnosis(eqx.Module):
    """The critical manifold at a point. Print it for a summary."""

    spectrum: Spectrum
    """Rank, dimension, singular values and their gap, smallest normal curvature η."""
    distance: Float[Array, ""]
    """From the point to M, relative to ‖θ‖ and to first order."""
    speed: Float[Array, ""]
    """‖u‖, u = P∇R: how fast the drift starts, in slow time."""
    bending: Float[Array, ""]
    """‖II(u, u)‖: the acceleration that keeps the drift on M."""
    result: RESULTS
    """`successful`, `not_critical`, `saddle`, `ambiguous_rank`, `unresolved`, or
    `singular_point` where the rank is higher beside the point."""

    @property
    def curvature(self) -> Float[Array, ""]:
        """‖II(u, u)‖/‖u‖², the curvature of M along the drift: one over the radius of
        the circle that its geodesic follows. Zero where the drift is at rest."""
        moving = self.speed > 0
        return jnp.where(
            moving, self.bending / jnp.where(moving, self.speed, 1) ** 2, 0
        )

    def __str__(self) -> str:
        lines = [
            str(self.spectrum),
            f"  relative distance {float(self.distance):.1g}; drift of speed "
            f"{float(self.speed):.3g}, along which M has curvature "
            f"{float(self.curvature):.3g} (‖II(u, u)‖ = {float(self.bending):.3g})",
        ]
        if bool(self.result != RESULTS.successful):
            lines.append(f"  {RESULTS[self.result]}")
        return "\n".join(lines)


@exact_products
def diagnose(
    flow: GradientFlow,
    model: PyTree,
    *,
    form: Form = "auto",
    rtol: float | None = None,
    method: Method = None,
    max_steps: int | None = None,
) -> Diagnosis:
    """Everything the theory asks of the critical manifold at a point.

    The second fundamental form is II(a, b) = −(∇²F)⁺ D³F[a, b] on M: it is what bends
    the drift w' = −u, u = P∇R, off its tangent.

    **Arguments:**

    - `flow`: its loss makes M, its penalty is R. With `rates` G all lengths and angles
        are those of the metric G⁻¹.
    - `model`: a model on M.
    - `form`, `rtol`, `method`, `max_steps`: as for
        [`gradflow.manifold.spectrum`][]. Matrix-free, distance, u and II come from
        LSMR.

    **Returns:** a [`gradflow.manifold.Diagnosis`][]. What is doubtful is named in its
    `result`; nothing is raised. Where M is regular the rank is the same beside the
    point: it is looked at again 1e-3 ‖θ‖ σ_min/σ_max away along M.

    **Raises:** `ValueError` for a Jacobian form of a loss that is not composite.

    Source: the formula is D of P∇F = 0 along M; do Carmo, Riemannian Geometry, ch. 6.
    """
    check_free(flow)
    check_given(rtol=rtol, max_steps=max_steps)
    term, params = flow.term(model)
    check_problem(term, params)
    source = choose_form(flow.loss, params, term.chart, form)
    dense = is_dense(method, source, flow.loss, params, term.static)

    def spectrum(params: PyTree) -> Spectrum:
        return compiled_spectrum(
            term.loss, params, term.chart, source, rtol, dense, max_steps
        )

    found = spectrum(params)
    displaced, settled = _displaced(term, params, found, dense)
    rises = settled & _rises(found, spectrum(displaced), rtol)
    return _diagnose(term, params, found, rises, dense)


@eqx.filter_jit
def _displaced(
    term: FlowTerm, params: PyTree, found: Spectrum, dense: bool
) -> tuple[PyTree, Bool[Array, ""]]:
    """A point of M beside, along a random tangent, if M is what it seems to be here:
    Newton steps in `rank` directions take h to h¹⁶. And whether the last one was
    small: without, the point tells nothing, for off M the rank is higher anyway."""
    theta, loss = flatten_on(term.loss, params, term.chart)
    v = jr.normal(jr.key(4), theta.shape, theta.dtype)
    form = found.source
    if dense:
        v = form.exact_normal(loss, theta, found.rank).tangential(v)
    else:
        op = form.operator(loss, theta)
        v, _ = project(op, v)

    def step(th: Float[Array, " d"]) -> Float[Array, " d"]:
        if dense:
            return form.exact_normal(loss, th, found.rank).step
        # With the operator at θ throughout: beside θ, and off M, LSMR would invert the
        # small values too. It converges linearly, by a factor of h or less.
        newton, _ = least_squares(op.apply, -_force(loss, th, op), op.columns)
        return jnp.where(found.rank > 0, newton, 0)

    size = jnp.linalg.norm(theta)
    size = jnp.where(size > 0, size, 1)
    # Within reach of Newton, where M bends the more the smaller its least σ.
    ratio = jnp.sqrt(found.smallest_curvature / found.curvatures[0])
    ratio = jnp.where(found.rank > 0, ratio, 1)
    length = jnp.linalg.norm(v)
    # Where M is a point, what is left of v is rounding.
    h = _BESIDE * ratio * size / jnp.where(length > _NEAR, length, 1)

    def iterate(_, carry):
        th, _ = carry
        change = step(th)
        return th + change, jnp.linalg.norm(change)

    first = (theta + h * v, jnp.zeros((), theta.dtype))
    steps = 3 if dense else 6
    theta, last = jax.lax.fori_loop(0, steps, iterate, first)
    return loss.unravel(theta), last <= _SETTLED * h * length


def _rises(found: Spectrum, beside: Spectrum, rtol: float | None) -> Bool[Array, ""]:
    """Whether the first value dropped is one beside the point, far above what it is at
    it, and above rounding."""
    last = found.values.size - 1
    first = jnp.minimum(found.rank, last)
    floor = jnp.finfo(found.values.dtype).eps * math.sqrt(found.parameters)
    dropped = jnp.maximum(found.values[first], floor * beside.values[0])
    least = jnp.maximum(GAP * dropped, (rtol or 0.0) * beside.values[0])
    return (found.rank <= last) & (beside.values[first] > least)


@eqx.filter_jit
def _diagnose(
    term: FlowTerm,
    params: PyTree,
    found: Spectrum,
    rises: Bool[Array, ""],
    dense: bool,
) -> Diagnosis:
    theta, loss = flatten_on(term.loss, params, term.chart)
    geometry = (
        dense_geometry(loss, theta, found.source, found.rank)
        if dense
        else matrix_free_geometry(loss, theta, found.source)
    )
    u, bend, okay = drift_and_bend(term, loss, theta, geometry)
    okay = okay & geometry.okay & found.resolved
    distance = geometry.distance / jnp.maximum(
        jnp.linalg.norm(theta), jnp.finfo(theta.dtype).tiny
    )
    result = RESULTS.where(rises, RESULTS.singular_point, RESULTS.successful)
    result = RESULTS.where(okay, result, RESULTS.unresolved)
    doubtful = found.ambiguous & found.resolved
    result = RESULTS.where(doubtful, RESULTS.ambiguous_rank, result)
    near = distance <= _NEAR
    result = RESULTS.where(found.negative & near, RESULTS.saddle, result)
    result = RESULTS.where(near, result, RESULTS.not_critical)
    return Diagnosis(found, distance, jnp.linalg.norm(u), jnp.linalg.norm(bend), result)


class Geometry(eqx.Module):
    """Projection and inverse curvature at a point, however they are come by."""

    project: Callable[[Array], tuple[Array, Bool[Array, ""]]]
    inverse: Callable[[Array], tuple[Array, Bool[Array, ""]]]  # (∇²F)⁺
    step: Float[Array, " d"]  # to M, to first order
    distance: Float[Array, ""]
    okay: Bool[Array, ""]


def dense_geometry(
    loss: FlatLoss, theta: Float[Array, " d"], form: AbstractForm, rank: Int[Array, ""]
) -> Geometry:
    """From singular values or eigenvalues, `rank` of them."""
    curvatures, basis = form.decomposition(loss, theta)
    normal = form.exact_normal(loss, theta, rank)
    kept = jnp.arange(curvatures.size) < rank
    yes = jnp.array(True)
    basis = jnp.where(kept[None], basis, 0)
    inverse = jnp.where(kept, 1 / jnp.where(kept, curvatures, 1), 0)
    return Geometry(
        lambda v: (v - basis @ (basis.T @ v), yes),
        lambda x: (basis @ (inverse * (basis.T @ x)), yes),
        normal.step,
        jnp.maximum(jnp.linalg.norm(normal.step), normal.force),
        yes,
    )


def matrix_free_geometry(
    loss: FlatLoss, theta: Float[Array, " d"], form: AbstractForm
) -> Geometry:
    """From products with A or ∇²F, by LSMR."""
    op = form.operator(loss, theta)
    force = _force(loss, theta, op)
    step, okay = least_squares(op.apply, -force, op.columns)
    scale = frobenius(op, theta) + jnp.finfo(theta.dtype).tiny
    return Geometry(
        lambda v: project(op, v),
        lambda x: curvature_inverse(op, x),
        step,
        jnp.maximum(jnp.linalg.norm(step), jnp.linalg.norm(force) / scale),
        # Residuals of rounding size need not be solved for.
        okay | (jnp.linalg.norm(step) <= _NEAR * jnp.linalg.norm(theta)),
    )


def _force(loss: FlatLoss, theta: Float[Array, " d"], op: Operator) -> Array:
    """∇F, or ρ in the Jacobian form."""
    return loss.gradient(theta) if op.symmetric else outer_root(loss, theta)[1]


def drift_and_bend(
    term: FlowTerm, loss: FlatLoss, theta: Float[Array, " d"], geometry: Geometry
) -> tuple[Float[Array, " d"], Float[Array, " d"], Bool[Array, ""]]:
    """u = P∇R, II(u, u) = −(∇²F)⁺D³F[u, u], and whether both were found."""
    force = ravel_pytree(term.penalty.gradient(loss.unravel(theta)))[0]
    u, first = geometry.project(force)
    bend, second = geometry.inverse(-third_derivative(loss, theta, u, u))
    return u, bend, first & second


def third_derivative(
    loss: FlatLoss,
    theta: Float[Array, " d"],
    a: Float[Array, " d"],
    b: Float[Array, " d"],
) -> Float[Array, " d"]:
    """D³F[a, b], a vector: the derivative along b of ∇²F a."""

    def curved(th: Float[Array, " d"]) -> Float[Array, " d"]:
        return jax.jvp(loss.gradient, (th,), (a,))[1]

    return jax.jvp(curved, (theta,), (b,))[1]
