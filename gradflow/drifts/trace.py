"""tr ∇²F, which noise on labels brings down; exact, or by random probes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from .._checks import check_integer, is_key, word
from ..flow.flat import summed
from ..flow.flow import GradientFlow
from ..losses import AbstractLoss
from ..penalties import AbstractPenalty
from .curvature import check_products, Curvature, Form


class Trace(AbstractPenalty):
    """R(θ) = tr ∇²F(θ): the Laplacian of F, which is that of η ↦ F(θ + η) at zero.

    Of a composite loss it is tr Jᵀℓ''J unless asked otherwise, a sum of the squares of
    all derivatives of the outputs: the same wherever ∇ℓ = 0, so on the manifold of
    perfect fits, and never negative off it. The two differ by tr Σⱼ ∂ⱼℓ ∇²zⱼ, first
    order in the residuals. `form="hessian"` is ∇²F itself, as for any other loss.

    Label noise brings it down (Blanc et al., arXiv 1904.09080; Damian, Ma, Lee, arXiv
    2106.06530; Li, Wang, Arora, arXiv 2110.06914), and so do noise on the parameters
    (Shalova, Schlichting, Peletier, arXiv 2404.12293) and sharpness-aware minimisation
    of one sample at a time (Wen, Ma, Li, arXiv 2211.05729): see
    [`gradflow.drifts.label_noise`][] and its neighbours.

    It is exact where samples are known, one Jacobian of the outputs of each at a time,
    and otherwise by one product with each of up to 1000 basis vectors. With `probes` it
    is Hutchinson's estimate, the mean of vₖᵀAvₖ over k fixed vectors of random signs: a
    function as smooth as the trace, whose mean over keys is that, with the variance
    (2/k) Σᵢ≠ⱼ Aᵢⱼ²; so are the values of its gradient, (2/k) Σᵢ≠ⱼ (∂Aᵢⱼ)² each.
    `standard_error` estimates its root from the probes themselves.
    """

    curvature_of: Curvature
    probes: int | None = eqx.field(static=True)
    key: PRNGKeyArray | None

    def __init__(
        self,
        loss: AbstractLoss | GradientFlow,
        model: PyTree,
        *,
        relative: bool = False,
        form: Form = "auto",
        probes: int | None = None,
        key: PRNGKeyArray | None = None,
        trainable: PyTree = eqx.is_inexact_array,
    ):
        """**Arguments:**

        - `loss`: F, or a flow of it. With the `rates` G of a flow R is tr √G ∇²F √G.
        - `model`: the model; all but its parameters is kept.
        - `relative`: η relative to the parameters, R = Σᵢ θᵢ² ∂ᵢ²F, as where
            connections are dropped at random.
        - `form`: `"jacobian"`, for Jᵀℓ''J in place of ∇²F, `"hessian"` for ∇²F itself;
            `"auto"` is the first for a composite loss.
        - `probes`: k, how many random vectors; exact unless given.
        - `key`: for these.
        - `trainable`: as for [`gradflow.GradientFlow`][]; a flow says so itself.

        **Raises:** `ValueError` for arguments that make no sense, and where an exact
        trace takes more than 1000 products.
        """
        self.curvature_of, params = Curvature.of(
            loss, model, form, trainable, relative=relative
        )
        self.probes, self.key = probes, key
        if probes is None:
            remedy = "give the number of random ones as probes, and a key"
            check_products(self.curvature_of, params, "probes", remedy)
        else:
            check_integer(probes, "probes")
        legacy = getattr(key, "dtype", None) == jnp.uint32
        if (probes is not None) != (is_key(key) or legacy):
            kind = (
                "none without probes" if probes is None else "one to draw probes with"
            )
            raise ValueError(f"key: expected {kind}, got {word(key)}.")

    def __call__(self, params: PyTree) -> Scalar:
        at = self.curvature_of.at(params)
        if self.probes is None and self.curvature_of.sampled:
            rows, row, size = at.rows()

            def of_sample(one):
                jac, curved = row(one)
                return jnp.sum(jac * curved)

            return summed(of_sample, rows, size)
        if self.probes is None:
            basis = jnp.eye(at.theta.size, dtype=at.theta.dtype)
            return summed(at.quadratic, basis, at.theta.size)
        return summed(at.quadratic, self._signs(at.theta), at.theta.size) / self.probes

    def gradient(self, params: PyTree) -> PyTree:
        return jax.grad(self)(params)

    def standard_error(self, params: PyTree) -> Scalar:
        """The standard error of R(θ) with `probes`, θ the parameters `params`,
        estimated from how these differ: zero without any, NaN with one."""
        at = self.curvature_of.at(params)
        if self.probes is None:
            return jnp.zeros((), at.theta.dtype)
        each = jax.lax.map(at.quadratic, self._signs(at.theta))
        spread = jnp.sum((each - jnp.mean(each)) ** 2)
        few = jnp.asarray(self.probes * (self.probes - 1), each.dtype)
        return jnp.sqrt(spread / few)

    def _signs(self, theta: Float[Array, " d"]) -> Float[Array, "k d"]:
        assert self.probes is not None and self.key is not None
        return jr.rademacher(self.key, (self.probes, theta.size), theta.dtype)
