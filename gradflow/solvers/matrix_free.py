"""The system of a KKT stage without a matrix: conjugate gradients, preconditioned."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.scipy.linalg import cho_solve, solve_triangular
from jaxtyping import Array, Bool, Float, Int, Scalar

from .._norms import norm
from ..flow.flat import AbstractFlatLoss
from ..flow.term import AbstractFlowTerm
from .kernel import AbstractStageMatrix, Factor, no_factor
from .orthant import OnOrthant

_BLOCK = 32  # rows by which a preconditioner grows
_RANK, _NUMBERS = 512, 2**25  # of a preconditioner at most: rows, and numbers in them
_TAIL = 3.0  # curvature cσ²/α that is left to conjugate gradients
_INEXACT = 0.1  # what they leave of a change, relatively
_POLISH = 0.01  # and of what makes the multiplier exact
_MOST = 200  # products that they may take for one


def most_rows(parameters: int, outputs: int) -> int:
    """How many a preconditioner may have: whole blocks of them."""
    count, block = _blocks(parameters, outputs)
    return count * block


def _blocks(parameters: int, outputs: int) -> tuple[int, int]:
    """How many blocks there may be, and the rows of each, which are made at once."""
    rank = min(_RANK, max(1, _NUMBERS // outputs), parameters, outputs)
    count = -(-rank // _BLOCK)
    return count, rank // count


def check_free(term: AbstractFlowTerm, loss: AbstractFlatLoss) -> None:
    """That stages can be solved without a matrix."""
    if loss.opaque:
        raise ValueError(
            "matrix_free: expected a composite loss, such as SquaredError or "
            f"CrossEntropy, got {type(term.loss).__name__}; take RKC2."
        )
    if isinstance(term.penalty, OnOrthant):
        raise ValueError(
            "penalty: along its kinks stages are solved by a matrix, which does not "
            "fit, or is not wanted (matrix_free=True). Give a smooth penalty, such as "
            "gradflow.Moreau(…, epsilon=…) of it."
        )


class Nystrom(eqx.Module):
    """A low-rank part of the tangent kernel, K = J A⁻¹Jᵀ ≈ ZᵀZ/α (α the least of A),
    where there is no room for all of it. It preconditions. Without rows (all are zero)
    it is none."""

    rows: Float[Array, "r m"]
    """Z."""
    gram: Float[Array, "r r"] | None
    """Z ℓ''Zᵀ, where ℓ'' is always the same."""
    price: Int[Array, ""]
    """The products that it took; of none, those that the first rows take."""
    usual: Float[Array, ""]
    """The products an iteration took when it was new."""
    excess: Float[Array, ""]
    """How many more were taken since."""

    @classmethod
    def none(
        cls, loss: AbstractFlatLoss, theta: Float[Array, " d"], outputs: int
    ) -> "Nystrom":
        """Room for one."""
        count, block = _blocks(theta.size, outputs)
        rank = count * block
        rows = jnp.zeros((rank, outputs), theta.dtype)
        zero = jnp.zeros((), theta.dtype)
        constant = loss.outer_curvature is not None
        gram = jnp.zeros((rank, rank), theta.dtype) if constant else None
        return cls(rows, gram, jnp.array(block), zero + 1, zero)

    def renewed(
        self,
        loss: AbstractFlatLoss,
        theta: Float[Array, " d"],
        alpha: Scalar | Float[Array, " d"],
        c: Scalar,
    ) -> "Nystrom":
        """That of J at θ, with rows until little of c ℓ''K is found.

        By blocks of the randomised approximation of Nyström, each of what those before
        leave of K, with Gaussian ω:

            Z = L⁻¹Y,    Y = ΩᵀK,    L Lᵀ = YΩ,    Ω = ℓ''ω.

        There tr(Yℓ''Yᵀ)/tr(YΩ) is a mean of the eigenvalues of ℓ''K that are left,
        weighted by themselves.

        **Source:** Frangella, Tropp, Udell (SIAM J. Matrix Anal. Appl. 44, 2023)."""
        z, push, pull = loss.linearize(theta)
        rank, m = self.rows.shape
        _, block = _blocks(theta.size, m)
        least = jnp.min(alpha)

        def curved(u):
            return loss.outer_hvp(z, u)

        def product(u):
            return push(least / alpha * pull(u))

        def add(carry):
            rows, taken, _ = carry
            key = jr.fold_in(jr.key(0), taken)
            omega = jax.vmap(curved)(jr.normal(key, (block, m), rows.dtype))
            left = jax.vmap(product)(omega) - (omega @ rows.T) @ rows
            core = left @ omega.T
            total = jnp.trace(core)
            ridge = jnp.finfo(rows.dtype).eps * total
            core = 0.5 * (core + core.T) + ridge * jnp.eye(block, dtype=rows.dtype)
            new = solve_triangular(jnp.linalg.cholesky(core), left, lower=True)
            sound = jnp.all(jnp.isfinite(new))
            new = jnp.where(sound, new, 0)
            rows = jax.lax.dynamic_update_slice(rows, new, (taken, 0))
            tail = jnp.sum(left * jax.vmap(curved)(left)) / total
            return rows, taken + block, jnp.where(sound, c * tail / least, 0)

        def going(carry):
            _, taken, tail = carry
            return (taken + block <= rank) & (tail > _TAIL)

        first = (jnp.zeros_like(self.rows), jnp.zeros_like(self.price), c + jnp.inf)
        rows, taken, _ = jax.lax.while_loop(going, add, first)
        gram, w = None, loss.outer_curvature
        if w is not None:
            gram = w * rows @ rows.T
        none = jnp.zeros_like(self.excess)
        return Nystrom(rows, gram, taken, none, none)

    def served(
        self, iterations: Int[Array, ""], products: Int[Array, ""]
    ) -> tuple["Nystrom", Bool[Array, ""]]:
        """After a step, and whether it is stale: once it has cost as many products more
        than when it was new as a new one takes."""
        dtype = self.usual.dtype
        count, taken = jnp.maximum(iterations, 1).astype(dtype), products.astype(dtype)
        usual = jnp.where(self.usual == 0, taken / count, self.usual)
        excess = self.excess + jnp.maximum(taken - usual * count, 0)
        stale = excess > self.price.astype(dtype)
        return Nystrom(self.rows, self.gram, self.price, usual, excess), stale


class _Iterate(NamedTuple):
    """Of conjugate gradients for s."""

    s: Float[Array, " m"]
    pulled: Float[Array, " d"]  # Jᵀℓ''s
    left: Float[Array, " m"]  # the residual
    error: Float[Array, " m"]  # preconditioned: about what s lacks
    along: Float[Array, " m"]
    energy: Float[Array, ""]  # of the error: ⟨left, ℓ'' error⟩
    count: Int[Array, ""]
    sound: Bool[Array, ""]


class FreeMatrix(AbstractStageMatrix):
    """What `StageMatrix` is, by products alone: with s = J δθ as the unknown,

        (I + c K ℓ'') s = p,    K = J A⁻¹Jᵀ,  A = α.

    J is that of the iterate, and never out of date; ℓ'' is that at the start of the
    step. The matrix is symmetric in the product ⟨u, ℓ''v⟩, and so is its approximation
    by the rows of the kernel."""

    loss: AbstractFlatLoss
    kernel: Nystrom
    z: Float[Array, " m"]
    """The outputs at the start of the step."""
    alpha: Scalar | Float[Array, " d"]
    c: Scalar
    shift: Scalar
    factor: Factor
    """Of I + (c/α) Z ℓ''Zᵀ."""
    fresh: Bool[Array, ""]
    whole: Bool[Array, ""]

    @classmethod
    def of(
        cls,
        loss: AbstractFlatLoss,
        kernel: Nystrom,
        theta: Float[Array, " d"],
        alpha: Scalar | Float[Array, " d"],
        c: Scalar,
    ) -> "FreeMatrix":
        """For a step from θ."""
        z, rows = loss.outputs(theta), kernel.rows
        gram = kernel.gram
        if gram is None:
            gram = rows @ jax.vmap(lambda u: loss.outer_hvp(z, u))(rows).T
        inner = c / jnp.min(alpha) * gram
        ridge = 1 + jnp.finfo(inner.dtype).eps * jnp.trace(inner)
        inner = jnp.linalg.cholesky(inner + ridge * jnp.eye(len(inner), dtype=c.dtype))
        factor = eqx.tree_at(
            lambda f: f.matrix, no_factor(len(rows), rows.dtype), inner
        )
        shift = (alpha if jnp.ndim(alpha) == 0 else 1) / c
        yes = jnp.array(True)
        return cls(
            loss=loss, kernel=kernel, z=z, alpha=alpha, c=c, shift=shift,
            factor=factor, fresh=yes, whole=~yes,
        )  # fmt: skip

    def change(
        self,
        lack: Float[Array, " d"],
        off: Float[Array, " m"],
        z: Float[Array, " m"],
        push: Callable,
        pull: Callable,
    ) -> tuple[Float[Array, " d"], Float[Array, " m"], Int[Array, ""]]:
        lack = lack - self.c * pull(off)

        def moved(it: _Iterate):
            return (lack - self.c * it.pulled) / self.alpha

        def rough(it: _Iterate):
            # c times the energy is that of the error of δθ in the product with A.
            size = jnp.sum(self.alpha * moved(it) ** 2)
            return self.c * it.energy > _INEXACT**2 * size

        it = self._gradients(push(lack / self.alpha), push, pull, rough)
        return moved(it), off + self._curved(it.s), it.count

    def solve(
        self,
        p: Float[Array, " m"],
        q: Float[Array, " m"],
        z: Float[Array, " m"],
        push: Callable,
        pull: Callable,
    ) -> tuple[Float[Array, " m"], Int[Array, ""]]:
        if self.loss.outer_curvature is None:
            q = q + self.loss.outer_hvp(z, p) - self._curved(p)

        def found(it: _Iterate):
            return q + self._curved(it.s)

        def rough(it: _Iterate):
            return norm(self._curved(it.error)) > _POLISH * norm(found(it))

        right = p - self.c * push(pull(q) / self.alpha)
        it = self._gradients(right, push, pull, rough)
        return jnp.where(rough(it), jnp.nan, found(it)), it.count

    def _curved(self, u: Float[Array, " m"]) -> Float[Array, " m"]:
        return self.loss.outer_hvp(self.z, u)

    def _precondition(self, v: Float[Array, " m"]) -> Float[Array, " m"]:
        """(I + (c/α) ZᵀZ ℓ'')⁻¹v."""
        rows, scale = self.kernel.rows, self.c / jnp.min(self.alpha)
        inner = cho_solve((self.factor.matrix, True), rows @ self._curved(v))
        return v - scale * (inner @ rows)

    def _gradients(
        self, right: Float[Array, " m"], push: Callable, pull: Callable, rough: Callable
    ) -> _Iterate:
        """Conjugate gradients for s, as long as it is `rough`; or until the curvature
        is negative, as it may be where ℓ is not convex."""

        def going(it: _Iterate):
            return it.sound & (it.count < _MOST) & rough(it)

        def iterate(it: _Iterate) -> _Iterate:
            curved = self._curved(it.along)
            pulled = pull(curved)
            image = it.along + self.c * push(pulled / self.alpha)
            bend = jnp.vdot(curved, image)
            sound = (bend > 0) & (it.energy > 0)
            far = jnp.where(sound, it.energy / bend, 0)
            left = it.left - far * image
            error = self._precondition(left)
            energy = jnp.vdot(left, self._curved(error))
            turn = jnp.where(sound, energy / it.energy, 0)
            return _Iterate(
                s=it.s + far * it.along,
                pulled=it.pulled + far * pulled,
                left=left,
                error=error,
                along=error + turn * it.along,
                energy=energy,
                count=it.count + 1,
                sound=sound,
            )

        error = self._precondition(right)
        first = _Iterate(
            s=jnp.zeros_like(right),
            pulled=pull(jnp.zeros_like(right)),
            left=right,
            error=error,
            along=error,
            energy=jnp.vdot(right, self._curved(error)),
            count=jnp.array(0),
            sound=jnp.array(True),
        )
        return jax.lax.while_loop(going, iterate, first)
