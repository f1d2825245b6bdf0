"""The spectrum of the critical manifold: rank, dimension and normal curvature."""

import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._checks import check_given, is_concrete
from .._host import as_array, known, numpy_of
from ..flow.flat import FlatLoss, flatten_on
from ..flow.flow import GradientFlow
from ..flow.term import AbstractChart
from ..losses import AbstractLoss
from ..precision import exact_products
from ..results import RESULTS
from ._matrix_free import extremes
from ._normal import GAP, numerical_rank
from .choice import begin, choose_form, Form, is_dense, Method
from .forms import AbstractForm


class Spectrum(eqx.Module):
    """What the curvature of the loss says of M at a point. Print it for a summary."""

    values: Float[Array, " k"]
    """Descending: singular values σ of (ℓ'')^½ J (Jacobian form), or |eigenvalues| of
    ∇²F (Hessian form)."""
    rank: Int[Array, ""]
    """The rank of ∇²F, by the largest gap in `values`."""
    gap: Float[Array, ""]
    """The last value kept over the first one dropped (or over the rounding level)."""
    ambiguous: Bool[Array, ""]
    """Whether there is no such gap to speak of: the rank is then a guess."""
    negative: Bool[Array, ""]
    """Whether ∇²F has a negative eigenvalue above the gap: a saddle, or not in M.
    Always false in the Jacobian form, which cannot see it."""
    parameters: int = eqx.field(static=True)
    """d, how many there are."""
    source: AbstractForm
    """What `values` are of."""
    expected: int = eqx.field(static=True)
    """The largest rank there can be: min(m, d), or d."""
    resolved: Bool[Array, ""]
    """Whether `values` decide the rank. Always so where they are all there are; a
    matrix-free process may have stopped before."""

    @property
    def form(self) -> str:
        """`"jacobian"` or `"hessian"`."""
        return self.source.name

    @property
    def curvatures(self) -> Float[Array, " k"]:
        """|eigenvalues| of ∇²F, descending: σ² in the Jacobian form (where d − k more
        are zero)."""
        return as_array(self.source.curvatures(known(self.values)))

    @property
    def dimension(self) -> Int[Array, ""]:
        """The dimension d − rank of M."""
        return as_array(self.parameters - known(self.rank))

    @property
    def smallest_curvature(self) -> Float[Array, ""]:
        """η, the smallest curvature of F normal to M; infinite where rank = 0."""
        values, rank = known(self.curvatures), known(self.rank)
        xp = numpy_of(values, rank)
        # (Of a large matrix only the first of them are known.)
        last = values[xp.clip(rank - 1, 0, values.size - 1)]
        return as_array(xp.where(rank == 0, xp.inf, last), last.dtype)

    @property
    def deficient(self) -> Bool[Array, ""]:
        """Whether J has less than full rank: some data are redundant, or M is singular
        here. False in the Hessian form, where there is no rank to expect."""
        if self.source.interpolating:
            return as_array(known(self.rank) < self.expected)
        return jnp.zeros_like(self.ambiguous)

    def __str__(self) -> str:
        if not is_concrete(self.rank) or self.rank.ndim > 0:
            return repr(self)
        values = np.asarray(self.values)
        lines = [
            f"Critical manifold of dimension {self.dimension}: rank {self.rank}"
            f"{' (rank ambiguous)' if self.ambiguous else ''} in {self.parameters} "
            f"parameters",
            f"  {self.source.measured}: {values[0]:.3g} … {values[-1]:.3g}; "
            f"gap {self.gap:.1e} (at least {GAP:.0e} is asked)",
            f"  smallest normal curvature {self.smallest_curvature:.3g}",
        ]
        if self.negative:
            lines[-1] += "; negative curvature: a saddle, or not on the manifold"
        if not self.resolved:
            lines[-1] += f" at most; {RESULTS[RESULTS.unresolved]}"
        elif self.deficient:
            lines[-1] += (
                f"; J is rank-deficient ({self.rank} of {self.expected}): redundant "
                "data, or a singular point"
            )
        return "\n".join(lines)


@exact_products
def spectrum(
    loss: AbstractLoss | GradientFlow,
    model: PyTree,
    *,
    form: Form = "auto",
    rtol: float | None = None,
    method: Method = None,
    max_steps: int | None = None,
    trainable: PyTree = eqx.is_inexact_array,
) -> Spectrum:
    """The singular values of J or the eigenvalues of ∇²F at a point of M, and the rank.

    At an interpolating point ∇²F = Jᵀℓ''J, so σ((ℓ'')^½ J)² are its nonzero
    eigenvalues: the Jacobian form costs one m × d singular value decomposition and
    resolves curvatures down to eps² of the largest. The Hessian form costs O(d³), is
    right at any critical point, and resolves them down to eps.

    The rank is read off the largest gap between consecutive values. It is `ambiguous`
    where that ratio is below 1000, or less than 10 times the next largest.

    Matrix-free, `values` are those that a Golub–Kahan process (Lanczos, in the Hessian
    form) with full reorthogonalisation finds in `max_steps` products. They are all the
    nonzero ones where the rank is lower than that; else the large ones and a bound on
    the smallest, and the rank is known only if the smallest has converged: see
    `resolved`.

    **Arguments:**

    - `loss`: the training loss, or a flow of it. With `rates` G these are the values of
        (ℓ'')^½ J √G, or of √G ∇²F √G: the rates at which the flow comes down to M.
    - `model`: a model on M, or near it.
    - `form`: `"jacobian"`, `"hessian"`, or `"auto"`: the Jacobian form where the loss
        is composite and the residuals are negligible, ‖ρ‖ ≤ eps^0.4 ‖A‖‖θ‖ with
        A = (ℓ'')^½ J, ρ = (ℓ'')^{−½}∇ℓ. Under `jit` or `vmap`, where their size is not
        known: the Jacobian form where the loss is composite and m ≤ d.
    - `rtol`: counts as rank the values above `rtol` times the largest, instead of
        looking for the gap.
    - `method`: `"dense"`, `"matrix-free"`, or `None`; see
        [`gradflow.manifold.tangent_projection`][].
    - `max_steps`: of the matrix-free process, k. It keeps kd numbers, and unless given
        takes 300 steps, fewer where these would be more than 800 MB.
    - `trainable`: a filter, as for [`gradflow.GradientFlow`][].

    **Returns:** a [`gradflow.manifold.Spectrum`][].

    **Raises:** `ValueError` for a Jacobian form of a loss that is not composite.

    Source: assumption 2 (Morse–Bott) of Boursier, Pesme, Dragomir, arXiv 2505.20172:
    the rank is constant along M, and η > 0.
    """
    check_given(rtol=rtol, max_steps=max_steps)
    term, params = begin(loss, model, trainable)
    loss, chart = term.loss, term.chart
    source = choose_form(loss, params, chart, form)
    dense = is_dense(method, source, loss, params, chart.static)
    return compiled_spectrum(loss, params, chart, source, rtol, dense, max_steps)


@eqx.filter_jit
def compiled_spectrum(
    loss: AbstractLoss,
    params: PyTree,
    chart: AbstractChart,
    form: AbstractForm,
    rtol: float | None,
    dense: bool,
    max_steps: int | None,
) -> Spectrum:
    theta, flat = flatten_on(loss, params, chart)
    return measure(flat, theta, form, rtol, dense, max_steps)


def measure(
    loss: FlatLoss,
    theta: Float[Array, " d"],
    form: AbstractForm,
    rtol: float | None = None,
    dense: bool = True,
    max_steps: int | None = None,
) -> Spectrum:
    """`spectrum` for a vector."""
    if not dense:
        return _measure_matrix_free(loss, theta, form, rtol, max_steps)
    values, lowest = form.values(loss, theta)
    ranked = numerical_rank(values, theta.size, rtol)
    return Spectrum(
        values=values,
        rank=ranked.rank,
        gap=ranked.gap,
        ambiguous=ranked.ambiguous,
        negative=_negative(values, ranked.rank, lowest),
        parameters=theta.size,
        source=form,
        expected=values.size,
        resolved=jnp.ones_like(ranked.ambiguous),
    )


def _negative(
    values: Float[Array, " k"], rank: Int[Array, ""], lowest: Float[Array, ""]
) -> Bool[Array, ""]:
    """Whether the lowest eigenvalue is negative, and above the gap in size."""
    last = values[jnp.maximum(rank - 1, 0)]
    return (rank > 0) & (lowest < 0) & (-lowest >= last)


def _measure_matrix_free(
    loss: FlatLoss,
    theta: Float[Array, " d"],
    form: AbstractForm,
    rtol: float | None,
    max_steps: int | None,
) -> Spectrum:
    op = form.operator(loss, theta)
    seen = extremes(op, theta.dtype, max_steps)
    order = jnp.argsort(-jnp.abs(seen.values))
    values, bounds = jnp.abs(seen.values)[order], seen.bounds[order]
    expected = min(op.rows, op.columns)
    # All that was not seen counts as one value more.
    every = jnp.append(values, seen.rest)
    place = jnp.sum(values >= seen.rest)
    every = -jnp.sort(-every)
    rank, gap, ambiguous = numerical_rank(every, theta.size, rtol)
    settled = bounds <= 0.01 * values
    below = rank <= place
    kept = jnp.arange(values.size) < rank
    resolved = below & jnp.all(settled | ~kept)
    # Or none is zero: the smallest has converged, far above rounding.
    floor = jnp.finfo(theta.dtype).eps * math.sqrt(theta.size) * values[0]
    full = settled[-1] & (values[-1] > GAP * floor) & form.interpolating
    rank = jnp.where(full & ~resolved, expected, rank)
    gap = jnp.where(full & ~resolved, values[-1] / floor, gap)
    ambiguous = jnp.where(full & ~resolved, False, ambiguous | ~resolved)
    resolved = resolved | full
    return Spectrum(
        values=values,
        rank=rank,
        gap=gap,
        ambiguous=ambiguous,
        negative=_negative(values, rank, jnp.min(seen.values)),
        parameters=theta.size,
        source=form,
        expected=expected,
        resolved=resolved,
    )
