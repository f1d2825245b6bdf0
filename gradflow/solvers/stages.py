"""The stages of a KKT step: chord iteration with a frozen matrix.

A stage asks for θ and its multiplier μ,

    θ + cλ∇R(θ) + c J(θ)ᵀμ = base,        μ = ∇ℓ(z(θ)).
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, Scalar

from .._norms import norm
from ..flow.flat import AbstractFlatLoss
from ..flow.term import AbstractFlowTerm
from .controllers import tolerance
from .jumps import find_jumps
from .kernel import AbstractStageMatrix, StageMatrix
from .orthant import HELD, OnOrthant

SLIDING_RTOL = 1e-3  # what is resolved, relatively, while the flow slides along a kink
_AGREED = 0.02  # how far μ may be from ∇ℓ(z), relatively, where a stage is solved
_SLIDE = 0.2  # tolerances by which the mean may still move when a sliding stage ends


class ChordIteration(eqx.Module):
    """How the stages are solved: until the estimated error left in a stage is below
    `kappa` tolerances (below a fifth of one, of the mean of the iterates, where the
    flow slides along a kink). Tolerances and norm are the step size controller's."""

    rtol: Any
    atol: Any
    norm: Any
    kappa: float = 0.03

    def scale(
        self, start: Float[Array, " d"], stage: Float[Array, " d"]
    ) -> Float[Array, " d"]:
        """The tolerance of each coordinate, in a step from `start`."""
        size = jnp.maximum(jnp.abs(start), jnp.abs(stage))
        return tolerance(size, self.rtol, self.atol)


_GOING, _SOLVED, _SLID, _LOST = range(4)


class _Iterate(NamedTuple):
    """One iterate of a stage."""

    y: Float[Array, " d"]
    mu: Float[Array, " m"]
    status: Int[Array, ""]
    rate: Float[Array, ""]  # of contraction
    size: Float[Array, ""]  # of the last change, in tolerances
    count: Int[Array, ""]
    products: Int[Array, ""]  # of Jacobians, beside those of every iteration
    off: Float[Array, ""]  # ‖∇ℓ(z) − μ‖ before the last change
    weight: Float[Array, ""]  # of the next iterate in the mean; 1 where there is none
    drift: Float[Array, " d"]  # a running mean of the changes
    anchor: Float[Array, ""]  # `size` where the mean began

    @property
    def solved(self) -> Bool[Array, ""]:
        return (self.status == _SOLVED) | (self.status == _SLID)


class _Change(NamedTuple):
    """What one iteration would change."""

    y: Float[Array, " d"]
    mu: Float[Array, " m"]
    z: Float[Array, " m"]
    force: Float[Array, " m"]  # ∇ℓ(z)
    off: Float[Array, " m"]  # ∇ℓ(z) − μ
    products: Int[Array, ""]


class Solution(NamedTuple):
    """All stages of a step."""

    slopes: Float[Array, "stages d"]
    multipliers: Float[Array, "stages m"]
    rate: Float[Array, ""]  # of contraction of the last iteration
    ok: Bool[Array, ""]
    iterations: Int[Array, ""]
    products: Int[Array, ""]
    slid: Bool[Array, ""]


class Stages(eqx.Module):
    """The stage equations of one step, from y0."""

    term: AbstractFlowTerm
    loss: AbstractFlatLoss
    y0: Float[Array, " d"]
    h: Scalar
    c: Scalar
    """γh."""
    weight_decay: Scalar
    """λ at the end of the step."""
    decays: Float[Array, " stages"] | None
    """λ at each stage, where it is not the same."""
    matrix: AbstractStageMatrix
    finder: ChordIteration
    most: int = eqx.field(static=True)
    """Iterations for a stage; four times as many for a mean, which converges slowly."""
    lasting: Scalar
    """By how much an error counts for more, see `lasting`."""
    kinked: bool = eqx.field(static=True)
    """Whether the loss may have kinks, so that the flow may slide along them."""

    @property
    def held(self) -> bool:
        """Whether coordinates may be held at zero."""
        return isinstance(self.term.penalty, OnOrthant)

    @property
    def blur(self) -> Scalar:
        """How much larger than the tolerance is what sliding leaves."""
        return jnp.maximum(1, SLIDING_RTOL / self.finder.rtol)

    def decay(self, y: Float[Array, " d"]) -> Float[Array, " d"]:
        """∇R."""
        return ravel_pytree(self.term.penalty.gradient(self.loss.unravel(y)))[0]

    def size_of(self, v: Float[Array, " d"], y: Float[Array, " d"]) -> Scalar:
        """A change v to y in tolerances, which are those of θ. A coordinate held at
        zero is none to resolve."""
        free, start, roots = 1.0, self.y0, self.term.chart.roots
        if isinstance(self.term.penalty, OnOrthant):
            free = jnp.abs(self.term.penalty.sign)
        if roots is not None:
            free, start = free * roots, roots * start
        return self.finder.norm(free * v / self.finder.scale(start, free * y))

    def solve(
        self,
        a: Float[Array, "stages stages"],
        predict: Float[Array, "stages stages"],
        slope: Float[Array, " d"],
        multiplier: Float[Array, " m"],
        rate: Scalar,
    ) -> Solution:
        """All stages, one after another, by the strictly lower part of the tableau
        `a`; each is guessed from those before it by the weights `predict`. The first
        is known: its slope and its multiplier are those of the end of the last step."""

        def stage(i: Array, done: Solution) -> Solution:
            base = self.y0 + self.h * (a[i] @ done.slopes)
            decay = self.weight_decay if self.decays is None else self.decays[i]
            guess = base + self.c * (predict[i] @ done.slopes)
            one = jnp.ones_like(done.rate)
            start = _Iterate(
                guess, predict[i] @ done.multipliers, jnp.array(_GOING), done.rate,
                one, jnp.array(0), jnp.array(0), jnp.zeros_like(one), one,
                jnp.zeros_like(self.y0), one,
            )  # fmt: skip

            def allowed(it):
                return jnp.where(it.weight < 1, 4, 1) * self.most

            it = jax.lax.while_loop(
                lambda it: (it.status == _GOING) & (it.count < allowed(it)) & done.ok,
                lambda it: self._iterate(base, decay, i == len(a) - 1, it),
                start,
            )
            return Solution(
                slopes=done.slopes.at[i].set((it.y - base) / self.c),
                multipliers=done.multipliers.at[i].set(it.mu),
                rate=it.rate,
                ok=done.ok & it.solved,
                iterations=done.iterations + it.count,
                products=done.products + it.products,
                slid=done.slid | (it.status == _SLID),
            )

        slopes = jnp.zeros((len(a), self.y0.size), self.y0.dtype).at[0].set(slope)
        mus = jnp.zeros((len(a), multiplier.size), self.y0.dtype)
        mus = mus.at[0].set(multiplier)
        yes = jnp.array(True)
        none = jnp.array(0)
        first = Solution(slopes, mus, rate, yes, none, none, ~yes)
        return jax.lax.fori_loop(1, len(a), stage, first)

    def _change(self, base: Float[Array, " d"], decay: Scalar, it: _Iterate) -> _Change:
        """Newton's, but for the frozen matrix."""
        z, push, pullback = self.loss.linearize(it.y)
        force = jax.grad(self.loss.outer)(z)
        pull = self.c * decay
        lack = base - it.y - pull * self.decay(it.y) - self.c * pullback(it.mu)
        off = force - it.mu
        dy, dmu, products = self.matrix.change(lack, off, z, push, pullback)
        return _Change(dy, dmu, z, force, off, products)

    def _iterate(
        self, base: Float[Array, " d"], decay: Scalar, last: Array, it: _Iterate
    ) -> _Iterate:
        change = self._change(base, decay, it)
        dy = change.y
        new = self.size_of(dy, it.y + dy)
        # The first iteration has no rate of its own: the last stage's, never trusted
        # below 0.3, lets an excellent guess pass after one. Later ones may contract by
        # chance, until what contracts slowly is all that is left.
        measured = jnp.maximum(new / it.size, 0.2 * it.rate)
        first = jnp.maximum(it.rate, 0.3)
        rate = jnp.where(it.count > 0, measured, first)
        left = new * rate / (1 - jnp.minimum(rate, 0.95))
        growing = (it.count > 0) & (rate > 2)
        failing = self.matrix.fresh & (growing | ((it.count > 3) & (rate > 0.9)))
        converged = (left < self._kappa()) & (self._agrees(change, it) | ~last)
        off = it.off
        if self.loss.outer_curvature is None:
            off = norm(change.off)
        after = it._replace(
            y=it.y + dy, mu=it.mu + change.mu, rate=rate, size=new, count=it.count + 1,
            status=jnp.where(converged, _SOLVED, _GOING), off=off,
            products=it.products + change.products,
        )  # fmt: skip
        lost = growing | failing
        if self.kinked:
            after, lost = self._averaged(it, change, after, failing, lost)
        lost = lost | ~jnp.isfinite(new)
        return after._replace(status=jnp.where(lost, _LOST, after.status))

    def _averaged(
        self,
        it: _Iterate,
        change: _Change,
        after: _Iterate,
        failing: Bool[Array, ""],
        lost: Bool[Array, ""],
    ) -> tuple[_Iterate, Bool[Array, ""]]:
        """What comes `after` an iterate, and whether that is `lost`, where the mean of
        the iterates is taken.

        Where ∇F jumps, as at the kinks of a ReLU, the flow may slide along the jump.
        Then the stage has a solution only with a mean of the gradients on both sides
        (Filippov), and the iteration goes to and fro between them even with a fresh
        kernel. The mean of its iterates converges, as 1/n, while the changes stay as
        large as they were. Without a jump the step is too long."""
        dy, new = change.y, after.size
        drift = 0.75 * it.drift + 0.25 * dy  # small where iterates go to and fro
        drifting = self.size_of(drift, it.y + dy)
        starting = failing & (it.weight == 1)
        jumps = find_jumps(self.loss, it.y, it.y + dy, it.mu + change.mu, starting)
        averaging = jumps | (it.weight < 1)
        anchor = jnp.where(jumps, new, it.anchor)
        weight = jnp.where(averaging, it.weight / (1 + it.weight), it.weight)
        bounded = (new > 0.3 * anchor) & (new < 3 * anchor) & (weight < 0.2)
        slid = averaging & bounded & (drifting < 0.5 * new)
        slid = slid & (weight * new < _SLIDE * self.blur)
        solved = jnp.where(new < self._kappa(), _SOLVED, _GOING)
        status = jnp.where(averaging, jnp.where(slid, _SLID, solved), after.status)
        lost = jnp.where(averaging, new > 30 * anchor, lost)
        mean = after._replace(
            y=it.y + weight * dy, mu=it.mu + weight * change.mu, status=status,
            weight=weight, drift=drift, anchor=anchor,
        )  # fmt: skip
        return mean, lost

    def _kappa(self) -> Scalar:
        """What the iteration leaves is part of the error estimate, see `lasting`; but
        rounding stays."""
        kappa = self.finder.kappa
        rounding = 4 * jnp.finfo(self.y0.dtype).eps / self.finder.rtol
        return jnp.minimum(kappa, jnp.maximum(kappa / self.lasting, rounding))

    def _agrees(self, change: _Change, it: _Iterate) -> Bool[Array, ""]:
        """Whether μ is ∇ℓ(z) too, to a few percent, as it must be at the end of a step.

        θ may be known to its tolerance, and the force not: where ℓ'' has changed by
        orders of magnitude since the kernel was made, the changes are small since the
        matrix is too stiff, and where the outputs are as steep as α² they mean a lot to
        ∇ℓ. (Where ℓ'' = w I neither can be.)"""
        loss, z, off = self.loss, change.z, change.off
        if loss.outer_curvature is not None:
            return jnp.array(True)
        eps = jnp.finfo(z.dtype).eps
        if loss.opaque:
            assert isinstance(self.matrix, StageMatrix)  # never without a matrix
            resolved = norm(self.matrix.resolved(z))
            settled = norm(off) < 0.5 * it.off
        else:
            resolved = norm(loss.outer_hvp(z, z))
            settled = jnp.array(False)
        small = norm(off) <= _AGREED * norm(it.mu) + 100 * eps * resolved
        return small | settled

    def polished(
        self,
        y1: Float[Array, " d"],
        multipliers: Float[Array, "stages m"],
        rates: Float[Array, " stages"],
        slid: Bool[Array, ""],
    ) -> tuple[Float[Array, " m"], Int[Array, ""]]:
        """The multiplier at the end y1 of a step, made as exact as θ; and the products
        of Jacobians that took, beside the usual ones.

        θ fixes cμ, and c may be small: μ is less exact than θ. But it also obeys
        μ' = −ℓ''J(Jᵀμ + λ∇R), to whose stiff part μ' adds little. `rates` are weights
        of the multipliers that give μ'."""
        mu = multipliers[-1]
        z, push, pull_back = self.loss.linearize(y1)
        alpha, shift = self.matrix.alpha, self.matrix.shift
        free = jnp.where(alpha < HELD**0.5, 1.0, 0.0) if self.held else 1.0
        pulled = push(self.weight_decay * self.decay(y1))
        past = rates[:-1] @ multipliers[:-1]

        def solve(p, q):
            return self.matrix.solve(p, q, z, push, pull_back)

        def polish(_, carry):
            mu, products = carry
            force = pulled + push(free * pull_back(mu))
            more, count = solve(-force / shift, -(past + rates[-1] * mu) / shift)
            return mu + more, products + count

        found, products = jax.lax.fori_loop(0, 2, polish, (mu, jnp.array(0)))
        change = found - mu
        # What is not stiff was exact before.
        soft, count = solve(jnp.zeros_like(z), change)
        change = change - soft
        # Nor is it right where μ changes fast against ℓ'', as on the way out of a
        # steep start: there it stays what ∇ℓ(z) is.
        far = norm(change) > 0.01 * norm(mu)
        far = far if self.loss.outer_curvature is None else jnp.array(False)
        # The matrix is to be that of μ', which the curvature of the outputs has no part
        # in: with it the polish goes astray, a little more in each step.
        kept = slid | far | self.matrix.whole | ~jnp.isfinite(norm(change))
        return jnp.where(kept, mu, mu + change), products + count
