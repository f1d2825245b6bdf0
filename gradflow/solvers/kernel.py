"""The matrix of a KKT step: made, kept, drifted, factorised."""

import abc
import functools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve, lu_factor, lu_solve
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Scalar

from ..flow.flat import AbstractFlatLoss, in_blocks, linearized
from .lockstep import where_needed


class Thin(eqx.Module):
    """What stands for the m × m kernel ℓ''JJᵀ where there are fewer parameters than
    outputs: its factors, of which the d × d matrix Jᵀℓ''J is made."""

    right: Float[Array, "d m"]
    """Jᵀ."""
    curved: Float[Array, "d m"] | None
    """Jᵀℓ''; `None` where ℓ'' is a multiple of I."""

    @property
    def left(self) -> Float[Array, "d m"]:
        return self.right if self.curved is None else self.curved


Kernel = Float[Array, "m m"] | Thin


class Factor(eqx.Module):
    """The matrix of the chord iteration: factorised, or inverted where it is small. Its
    size k is that of the smaller one of two: m of the outputs, d of the parameters."""

    matrix: Float[Array, "k k"]  # L; or L and U packed; or the inverse
    pivots: Int[Array, " k"]
    shift: Float[Array, ""]
    smallest: Float[Array, ""]  # pivot: about the smallest eigenvalue


# Up to this size the inverse is cheaper than to solve by a factor in each iteration.
_INVERTED = 128
_DRIFT = 0.1  # contraction that a factor made for another shift may cost
KERNEL_LIMIT = 10_000  # outputs, or parameters, up to which their matrix is affordable
DENSE_LIMIT = 5000  # parameters up to which the Hessian of an opaque loss is factorised


KEPT, RENEWED, WHOLE = range(3)  # the kernel; the last with all curvature
# Up to how many parameters the whole is cheap.
FEW = 100


def is_small(loss: AbstractFlatLoss, theta: Float[Array, " d"]) -> bool:
    """Whether the Hessian Σ μᵢ∇²zᵢ is cheap. (Of an opaque loss it is zero.)"""
    return theta.size <= FEW and not loss.opaque


def is_thin(theta: Float[Array, " d"], multiplier: Float[Array, " m"]) -> bool:
    """Whether the kernel is kept as its factors."""
    return theta.size < multiplier.size


def fits(parameters: int, outputs: int) -> bool:
    """Whether there is memory for a kernel, or for its factors."""
    few = min(parameters, outputs)
    return few <= KERNEL_LIMIT and few * outputs <= KERNEL_LIMIT**2


def no_kernel(
    loss: AbstractFlatLoss, theta: Float[Array, " d"], multiplier: Float[Array, " m"]
) -> tuple[Kernel, Factor]:
    """Room for a kernel and its factor."""
    m, d = multiplier.size, theta.size
    kernel: Kernel = jnp.zeros((m, m), theta.dtype)
    if is_thin(theta, multiplier):
        rows = jnp.zeros((d, m), theta.dtype)
        kernel = Thin(rows, None if loss.outer_curvature is not None else rows)
    return kernel, no_factor(min(m, d), theta.dtype)


def no_factor(k: int, dtype: DTypeLike) -> Factor:
    """Room for the factor of k × k numbers."""
    none = jnp.zeros((), dtype)
    return Factor(jnp.zeros((k, k), dtype), jnp.zeros(k, jnp.int32), none, none)


def stage_curvature(
    loss: AbstractFlatLoss,
    theta: Float[Array, " d"],
    multiplier: Float[Array, " m"],
    alpha: Float[Array, "d d"],
    c: Scalar,
) -> Float[Array, "d d"]:
    """α + c Σ μᵢ∇²zᵢ, with α = 1 + cλ∇²R: what a change of θ does to a stage, μ being
    fixed."""

    def weighted(th):
        return jnp.vdot(multiplier, loss.outputs(th))

    _, hvp, _ = linearized(jax.grad(weighted), theta)
    eye = jnp.eye(theta.size, dtype=theta.dtype)
    return alpha + c * in_blocks(hvp, eye, multiplier.size)


def curved_kernel(
    loss: AbstractFlatLoss,
    theta: Float[Array, " d"],
    weights: Float[Array, " d"] | Float[Array, "d d"] | None,
) -> Kernel:
    """J W Jᵀ with the diagonal or the whole of W, times ℓ'' unless that is a number. As
    factors it is without W, which comes in later."""
    z = loss.outputs(theta)

    def curved(rows: Float[Array, "n m"]) -> Float[Array, "n m"]:
        def hvp(u):
            return loss.outer_hvp(z, u)

        return jax.lax.map(hvp, rows, batch_size=256)

    constant = loss.outer_curvature is not None
    if is_thin(theta, z):
        rows = loss.jacobian(theta).T
        return Thin(rows, None if constant else curved(rows))
    if weights is not None and weights.ndim == 2:
        jac = loss.jacobian(theta)
        kernel = jac @ weights @ jac.T
    else:
        kernel = loss.tangent_kernel(theta, weights)
    return kernel if constant else curved(kernel.T).T


def _factorise(
    loss: AbstractFlatLoss,
    shift: Scalar,
    kernel: Kernel,
    stiffness: Scalar | Float[Array, " d"] | Float[Array, "d d"],
    definite: bool,
) -> Factor:
    """The matrix shift I + ℓ''K, or of factors A/c + Jᵀℓ''J with the `stiffness` A/c;
    over w where ℓ'' = w I."""
    w = loss.outer_curvature or 1.0
    added = shift
    if isinstance(kernel, Thin):
        kernel, added = kernel.right @ kernel.left.T, stiffness
    # Rounding may make a singular kernel indefinite; the ridge moves only how fast the
    # multiplier converges where it has no bearing on the parameters.
    ridge = jnp.finfo(kernel.dtype).eps * jnp.abs(jnp.trace(kernel))
    eye = jnp.eye(kernel.shape[0], dtype=kernel.dtype)
    if jnp.ndim(added) == 0:
        matrix = (added + ridge) / w * eye + kernel
    else:
        added = jnp.diag(added) if jnp.ndim(added) == 1 else added
        matrix = (added + ridge * eye) / w + kernel
    if definite:
        matrix = cho_factor(matrix, lower=True)[0]
        pivots = jnp.zeros(kernel.shape[0], jnp.int32)
        smallest = w * jnp.min(jnp.diag(matrix)) ** 2
        solve = functools.partial(cho_solve, (matrix, True))
    else:
        matrix, pivots = lu_factor(matrix)
        smallest = w * jnp.min(jnp.abs(jnp.diag(matrix)))
        solve = functools.partial(lu_solve, (matrix, pivots))
    if len(eye) <= _INVERTED:
        matrix = solve(eye)
    return Factor(matrix, pivots, jnp.asarray(shift, kernel.dtype), smallest)


def _drifted(factor: Factor, shift: Scalar) -> Bool[Array, ""]:
    """Whether a factor made for another shift would slow the iteration: its contraction
    is at most |change of the shift|/(smallest eigenvalue). On the critical manifold the
    shift is far below all eigenvalues, and one factor serves many step sizes."""
    return ~(jnp.abs(shift - factor.shift) <= _DRIFT * factor.smallest)


class AbstractStageMatrix(eqx.Module):
    """What solves the linear system of a chord iteration, for all stages of a step."""

    alpha: eqx.AbstractVar[Scalar | Float[Array, " d"]]
    shift: eqx.AbstractVar[Scalar]
    """α/c where α is a number, else 1/c."""
    factor: eqx.AbstractVar[Factor]
    fresh: eqx.AbstractVar[Bool[Array, ""]]
    """Whether it is as good as new."""
    whole: eqx.AbstractVar[Bool[Array, ""]]
    """Whether it has all curvature."""

    @abc.abstractmethod
    def change(
        self,
        lack: Float[Array, " d"],
        off: Float[Array, " m"],
        z: Float[Array, " m"],
        push: Callable,
        pull: Callable,
    ) -> tuple[Float[Array, " d"], Float[Array, " m"], Int[Array, ""]]:
        """How far θ and μ are from where A δθ + c Jᵀδμ = `lack`, δμ = `off` + ℓ''J δθ,
        about, at the outputs z, with the products by J and Jᵀ; and how many of these
        were taken beside the usual ones."""

    @abc.abstractmethod
    def solve(
        self,
        p: Float[Array, " m"],
        q: Float[Array, " m"],
        z: Float[Array, " m"],
        push: Callable,
        pull: Callable,
    ) -> tuple[Float[Array, " m"], Int[Array, ""]]:
        """The u with (shift I + ℓ''K) u = shift (ℓ''p + q), ℓ'' at the outputs z; NaN
        where it is not found. And the products taken."""


class StageMatrix(AbstractStageMatrix):
    """The matrix of the chord iteration of all stages of a step: shift I + ℓ''K with
    K = J A⁻¹Jᵀ, A = α, or, where the `whole` curvature is in it, A = α + c Σ μᵢ∇²zᵢ.
    Where there are fewer parameters than outputs it is A/c + Jᵀℓ''J."""

    loss: AbstractFlatLoss
    kernel: Kernel
    inverse: Float[Array, "d d"] | None
    """(α + c Σ μᵢ∇²zᵢ)⁻¹, where it is affordable, and needed."""
    alpha: Scalar | Float[Array, " d"]
    c: Scalar
    shift: Scalar
    factor: Factor
    fresh: Bool[Array, ""]
    whole: Bool[Array, ""]

    @classmethod
    def of(
        cls,
        loss: AbstractFlatLoss,
        kernel: Kernel,
        curvature: Float[Array, "d d"] | None,
        alpha: Scalar | Float[Array, " d"],
        c: Scalar,
        effort: Int[Array, ""],
        factor: Factor,
        live: Bool[Array, ""],
    ) -> "StageMatrix":
        """With the `factor` there is, where it serves, or a new one (of a lane that
        is `live`). The whole `curvature` is A, or its inverse where the kernel has
        m × m entries."""
        fresh, whole = effort >= RENEWED, effort == WHOLE
        shift = (alpha if jnp.ndim(alpha) == 0 else 1) / c
        definite = loss.outer_curvature is not None
        thin = isinstance(kernel, Thin)
        if curvature is not None:
            shift = jnp.where(whole, 1 / c, shift)

        def plain():
            return _factorise(loss, shift, kernel, alpha / c, definite)

        def make():
            if curvature is None:
                return plain()
            stiffness = curvature / c if thin else shift

            def curved():
                return _factorise(loss, shift, kernel, stiffness, False)

            return where_needed(whole, curved, where_needed(~whole, plain, factor))

        factor = where_needed(live & (fresh | _drifted(factor, shift)), make, factor)
        inverse = None if thin else curvature
        return cls(
            loss=loss, kernel=kernel, inverse=inverse, alpha=alpha, c=c, shift=shift,
            factor=factor, fresh=fresh, whole=whole,
        )  # fmt: skip

    def change(
        self,
        lack: Float[Array, " d"],
        off: Float[Array, " m"],
        z: Float[Array, " m"],
        push: Callable,
        pull: Callable,
    ) -> tuple[Float[Array, " d"], Float[Array, " m"], Int[Array, ""]]:
        kernel = self.kernel
        if isinstance(kernel, Thin):
            # (With the frozen J throughout: two products in place of six.)
            w = self.loss.outer_curvature or 1.0
            dy = self._divide((lack / self.c - kernel.right @ off) / w)
            return dy, off + w * (dy @ kernel.left), jnp.array(0)
        dmu, none = self.solve(push(self._damp(lack)), off, z, push, pull)
        return self._damp(lack - self.c * pull(dmu)), dmu, none

    def _damp(self, v: Float[Array, " d"]) -> Float[Array, " d"]:
        """A⁻¹v: what a change of the stage equation moves θ, μ being fixed."""
        if self.inverse is None:
            return v / self.alpha
        inverse = self.inverse
        return jax.lax.cond(self.whole, lambda: inverse @ v, lambda: v / self.alpha)

    def solve(
        self,
        p: Float[Array, " m"],
        q: Float[Array, " m"],
        z: Float[Array, " m"],
        push: Callable,
        pull: Callable,
    ) -> tuple[Float[Array, " m"], Int[Array, ""]]:
        w = self.loss.outer_curvature
        right = p + q / w if w is not None else self.loss.outer_hvp(z, p) + q
        if isinstance(self.kernel, Thin):
            kernel = self.kernel
            # (Woodbury)
            inner = self._divide(kernel.right @ right) @ kernel.left
            return (w or 1.0) * (right - inner), jnp.array(0)
        return self.shift * self._divide(right), jnp.array(0)

    def _divide(self, v: Float[Array, " k"]) -> Float[Array, " k"]:
        """By the factorised matrix."""
        factor = self.factor
        if len(factor.matrix) <= _INVERTED:
            return factor.matrix @ v
        if self.loss.outer_curvature is not None:
            return cho_solve((factor.matrix, True), v)
        return lu_solve((factor.matrix, factor.pivots), v)

    def resolved(self, v: Float[Array, " m"]) -> Float[Array, " m"]:
        """ℓ''K v, without A where K is kept as factors."""
        if isinstance(self.kernel, Thin):
            return (self.kernel.right @ v) @ self.kernel.left
        return self.kernel @ v
