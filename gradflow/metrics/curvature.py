"""Sharpness: the largest eigenvalues of the Hessian of the loss."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

from .._checks import check_arguments, check_given, check_integer
from ..flow.flat import linearized
from ..flow.flow import flow_of, GradientFlow
from ..flow.lanczos import Lanczos
from ..flow.term import FlowTerm
from ..flow.vector import on_vector
from ..losses import AbstractLoss
from ..precision import exact_products
from ..results import only_if_successful, RESULTS

_BASIS = 10**8  # numbers that are kept of all vectors at most: 800 MB
_STEPS = 200  # unless more are asked for
_FIRST = 8  # after so many it is looked whether they were enough


class Sharpness(eqx.Module):
    """The sharpness as a metric: [`gradflow.sharpness`][] of a model.

    NaN where it has not converged, and where the model is not finite.
    """

    flow: GradientFlow
    weight_decay: float | Scalar | None
    count: int | None = eqx.field(static=True)
    rtol: float = eqx.field(static=True)
    max_steps: int | None = eqx.field(static=True)

    def __init__(
        self,
        loss: AbstractLoss | GradientFlow,
        *,
        weight_decay: float | Scalar | None = None,
        count: int | None = None,
        rtol: float = 1e-4,
        max_steps: int | None = None,
        trainable: PyTree = eqx.is_inexact_array,
    ):
        """**Arguments:** as for [`gradflow.sharpness`][].

        **Raises:** `ValueError` as that.
        """
        bare = flow_of(loss, trainable)
        self.flow = loss if isinstance(loss, GradientFlow) else bare
        check_given(weight_decay=weight_decay, max_steps=max_steps)
        check_arguments(rtol=rtol)
        if count is not None:
            check_integer(count, "count")
        if weight_decay is not None and not self.flow.penalty.smooth:
            kind = type(self.flow.penalty).__name__
            raise ValueError(
                f"weight_decay: {kind} has kinks, and no Hessian there; leave it out "
                "for the sharpness of the loss alone."
            )
        self.weight_decay, self.count = weight_decay, count
        self.rtol, self.max_steps = float(rtol), max_steps

    def __call__(self, model: PyTree) -> Float[Array, "*count"]:
        term, params = self.flow.term(model)
        lam = 0.0 if self.weight_decay is None else self.weight_decay
        values = _largest(term, params, lam, *self.numbers(params), self.rtol)
        return values[0] if self.count is None else values

    def numbers(self, params: PyTree) -> tuple[int, int]:
        """How many values of the Hessian in `params`, and how many steps at most.

        **Raises:** `ValueError` where there are not as many values.
        """
        d = sum(p.size for p in jax.tree.leaves(params))
        count = 1 if self.count is None else self.count
        if count > d:
            raise ValueError(f"count: the Hessian has {d} eigenvalues, got {count}.")
        most = self.max_steps or min(_STEPS, _BASIS // d)
        return count, min(max(most, count), d)


def _largest(
    term: FlowTerm,
    params: PyTree,
    weight_decay: float | Scalar,
    count: int,
    most: int,
    rtol: float,
) -> Float[Array, " count"]:
    """The `count` largest eigenvalues of ∇²F + λ∇²R; NaN for those that have not
    converged in so many steps at `most`."""
    flow, theta = on_vector(term, params)
    lam = jnp.asarray(weight_decay, theta.dtype)
    _, hvp, _ = linearized(lambda th: -flow.velocity(th, lam), theta)
    rtol = max(rtol, 100 * float(jnp.finfo(theta.dtype).eps))

    def unsettled(carry: tuple) -> Array:
        at, values = carry
        settled = jnp.all(jnp.isfinite(values))
        return (at.steps < most) & jnp.isfinite(at.scale) & ~settled

    def further(carry: tuple) -> tuple:
        at, _ = carry
        least = max(count, _FIRST)
        at = at.onward(hvp, jnp.minimum(at.steps + at.steps // 2 + least, most))
        values, bounds = at.ritz()
        seen = jnp.arange(most) >= most - at.steps
        largest = jnp.max(jnp.where(seen, jnp.abs(values), 0))
        told = jnp.where(bounds <= rtol * largest, values, jnp.nan)
        return at, told[::-1][:count]

    start = Lanczos.begin(theta.size, theta.dtype, most, count)
    none = jnp.full(count, jnp.nan, theta.dtype)
    return jax.lax.while_loop(unsettled, further, (start, none))[1]


@exact_products
def sharpness(
    loss: AbstractLoss | GradientFlow,
    model: PyTree,
    *,
    weight_decay: float | Scalar | None = None,
    count: int | None = None,
    rtol: float = 1e-4,
    max_steps: int | None = None,
    trainable: PyTree = eqx.is_inexact_array,
    throw: bool = True,
) -> Float[Array, "*count"]:
    """The largest eigenvalue of ∇²F(θ), or the largest of them.

    Gradient descent with step h is stable at a minimum where the sharpness is below
    2/h; above, it leaves along the first eigenvector, and training tends to bring the
    sharpness there (Cohen et al., arXiv 2103.00065).

    By Lanczos' process with full reorthogonalisation (Ruhe's, from as many random
    vectors as values are asked for, so that equal eigenvalues are all found), at the
    cost of a Hessian-vector product for each step: about two gradients.

    **Arguments:**

    - `loss`: the training loss F, or a flow of it.
    - `model`: the model.
    - `weight_decay`: λ, for the eigenvalues of ∇²F + λ∇²R. R is the penalty of the
        flow, ½‖θ‖² for a loss alone. Without λ those of ∇²F.
    - `count`: how many of the largest, descending, as a vector. One number unless
        given.
    - `rtol`: each value is that near to an eigenvalue, relative to the largest in size
        (or 100 times the distance of two numbers, where that is more); the error is
        mostly the square of that. That nothing larger was missed is as likely as that
        a random vector is not orthogonal to its eigenvector.
    - `max_steps`: of the process, k. It keeps kd numbers, d that of parameters, and
        unless given takes 200 steps, fewer where these would be more than 800 MB. With
        d steps the values are those of the whole matrix.
    - `trainable`: a filter, as for [`gradflow.GradientFlow`][].
    - `throw`: raise where a value has not converged; otherwise it is NaN.

    **Returns:** the value, or the `count` values.

    **Raises:** `ValueError` for arguments that make no sense; `RuntimeError` where a
    value has not converged and `throw`.
    """
    metric = Sharpness(
        loss, weight_decay=weight_decay, count=count, rtol=rtol, max_steps=max_steps,
        trainable=trainable,
    )  # fmt: skip
    metric.numbers(metric.flow.term(model)[1])
    values = _compiled(metric, model)
    okay = jnp.all(jnp.isfinite(values))
    result = RESULTS.where(okay, RESULTS.successful, RESULTS.unresolved)
    return only_if_successful(values, result) if throw else values


@eqx.filter_jit
def _compiled(metric: Sharpness, model: PyTree) -> Float[Array, "*count"]:
    return metric(model)
