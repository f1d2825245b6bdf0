"""Gradient descent whose steps are not small, as a flow: beyond the edge of stability.

Steps θ ← θ − h g(θ), g = ∇F + λ∇R, that overshoot go to and fro: θₖ = wₖ + (−1)ᵏ xₖ.
With s and a half the sum and half the difference of g(w + x) and g(w − x) that is

    wₖ₊₁ = wₖ − h s,    xₖ₊₁ = h a − xₖ,

exactly, whatever is called w and what x. Where both change little in a step they follow
a flow. As a = Ax, A the mean of ∇g from w − x to w + x, with x = ρu and q = uᵀAu it is

    w' = −s − ½h d/dt(−s),
    ρ'/ρ = r − ½h dr/dt,    r = ln(hq − 1)/h,
    u' = (A − q)u / (hq − 1),

whose error is O(h²) in w and ρ: the terms with ½h, derivatives along the motion, are
those of a modified equation (Hairer, Lubich, Wanner, Geometric Numerical Integration,
ch. IX). Where ρ = 0 what is left is w' = −∇(E + ¼h‖∇E‖²), E = F + λR (Barrett & Dherin,
arXiv 2009.11162; Smith et al., arXiv 2101.12176). Without them it is the Edge Flow
(arXiv 2606.18080; a relative of the Rod Flow, arXiv 2602.01480). The sharpness stays
near 2/h, for ρ grows where q > 2/h, and w' has then −½ρ²∇q, which lowers q (Damian et
al., arXiv 2209.15594).
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

from .._norms import norm, rms
from .._typing import RealScalarLike
from ..losses import AbstractLoss
from ..penalties import AbstractPenalty
from .decay import decay_at
from .lanczos import random, unit
from .term import AbstractChart, AbstractFlowTerm

FIRST_STEPS = 16
"""How many steps are taken as they are: what is fast in them, at rates of 1/h, no flow
describes."""

# What is smooth in seven steps, and not alternating: exact for cubics in the number of
# the step, and for cubics times (−1)ᵏ.
_SMOOTH = (-1 / 32, 0.0, 9 / 32, 0.5, 9 / 32, 0.0, -1 / 32)

# Below q = 1.25/h, where ρ falls to rounding within some dozen steps, how fast it falls
# is no longer told apart: the logarithm goes to −∞ at 1/h, where x changes its sign.
_KNOWN = 0.25
_TURNS = 0.5  # u turns no faster than at this hq − 1
_DEEP = 2.0  # ln ρ is lifted no faster than from so far below rounding

# In the place of a direction that rounding gives: this part of it is the same always.
_KICK = 0.01


class Alternating(eqx.Module):
    """The state of a descent that goes to and fro between w + ρu and w − ρu."""

    centre: Float[Array, "*times d"]
    """w."""
    direction: Float[Array, "*times d"]
    """u, of length one but for errors of the solver."""
    log_size: Float[Array, " *times"]
    """ln ρ."""
    deviation: Float[Array, " *times"]
    """About how far w is from that of the descent, relative to ‖w‖."""

    @property
    def ends(self) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
        """w + ρu and w − ρu."""
        offset = jnp.exp(self.log_size) * unit(self.direction)
        return self.centre + offset, self.centre - offset


class FiniteStepTerm(AbstractFlowTerm):
    """The flow of descent in steps of `learning_rate`, of vectors, with an
    `Alternating` state.

    Far below the edge ρ does not fall to zero: each step is rounded, which adds ε² to
    ρ² on average, ε = ½ eps rms(w), and so r has ε²/(2hρ²) added to it. From there ρ
    grows where the edge is passed, and how far q goes beyond 2/h is by the logarithm
    of that floor. Of the direction of rounding u has a hundredth, for it to leave an
    eigenvector that is no longer the first.

    Differences of g are taken over ±ρu, or ±eps^⅓ ‖w‖ u where that is longer.
    """

    loss: AbstractLoss
    penalty: AbstractPenalty
    chart: AbstractChart
    learning_rate: Scalar
    """h, a time t."""
    kick: Float[Array, " d"]
    """The direction that rounding gives."""

    def vf(self, t: RealScalarLike, y: Alternating, args: PyTree) -> Alternating:
        h, decay, w = self.learning_rate, decay_at(args, t), y.centre
        speed, push = jax.linearize(lambda y: self._to_first_order(y, decay), y)
        bend = jax.tree.map(lambda change: 0.5 * h * change, push(speed))
        tiny = jnp.finfo(w.dtype).tiny
        below = jnp.minimum(_log_rounding(w) - y.log_size, _DEEP)
        rounding = 0.5 * jnp.exp(2 * below) / h
        u = unit(y.direction)
        along = jnp.vdot(self.kick, u)
        aside = jnp.sign(along) * (self.kick - along * u)
        # (Nothing depends on the deviation; at rest both speeds are rounding.)
        size, fast, bent = map(norm, (w, speed.centre, bend.centre))
        missed = bent / (size + tiny) * jnp.minimum(bent / (fast + tiny), 1)
        return Alternating(
            speed.centre - bend.centre,
            speed.direction + _KICK * rounding * aside,
            speed.log_size - bend.log_size + rounding,
            jax.lax.stop_gradient(missed),
        )

    def _to_first_order(self, y: Alternating, decay: Scalar) -> Alternating:
        """Without the terms with ½h, and without rounding."""
        h, u = self.learning_rate, unit(y.direction)
        size = norm(jax.lax.stop_gradient(y.centre))
        least = (
            jnp.finfo(u.dtype).eps ** (1 / 3) * size + jnp.finfo(u.dtype).tiny ** 0.5
        )
        rho = jnp.sqrt(jnp.exp(2 * y.log_size) + least**2)
        ends = jnp.stack([y.centre + rho * u, y.centre - rho * u])
        there, back = -jax.vmap(lambda p: self.velocity(p, decay))(ends)
        mean = 0.5 * (there - back) / rho  # Au
        q = jnp.vdot(u, mean)
        factor = h * q - 1
        turn = (mean - q * u) / jnp.maximum(factor, _TURNS)
        still = jnp.zeros_like(y.deviation)
        return Alternating(-0.5 * (there + back), turn, _log(factor) / h, still)


def _log_rounding(w: Float[Array, " d"]) -> Scalar:
    """ln ε, below which rounding lets no ρ fall."""
    info = jnp.finfo(w.dtype)
    return jnp.log(0.5 * info.eps * rms(w) + info.tiny)


def _log(factor: Scalar) -> Scalar:
    """Its logarithm; where it is small or negative one that is finite."""
    below = jnp.log(_KNOWN) + jnp.tanh((factor - _KNOWN) / _KNOWN)
    return jnp.where(factor > _KNOWN, jnp.log(jnp.maximum(factor, _KNOWN)), below)


class Begun(NamedTuple):
    """A descent after its first steps."""

    term: FiniteStepTerm
    steps: Float[Array, "k d"]
    """θ before each of them, and after the last."""
    state: Alternating

    def before(self, t: Scalar) -> Alternating:
        """The state at a time before: on the straight line between two steps."""
        last = self.steps.shape[0] - 1
        at = jnp.clip(t / self.term.learning_rate, 0, last)
        k = jnp.minimum(at.astype(int), last - 1)
        part = at - k.astype(at.dtype)
        centre = (1 - part) * self.steps[k] + part * self.steps[k + 1]
        none = jnp.full_like(self.state.log_size, -jnp.inf)
        return Alternating(centre, self.term.kick, none, jnp.zeros_like(none))


def begin_steps(
    term: AbstractFlowTerm,
    params: Float[Array, " d"],
    weight_decay: Scalar,
    learning_rate: Scalar,
) -> Begun:
    """The first `FIRST_STEPS` steps of a descent in steps of h, and what goes on from
    them: w and x by a filter of the last of them and the three before and after."""
    theta = params
    kick = unit(random(1, theta.size, theta.dtype))
    out = FiniteStepTerm(term.loss, term.penalty, term.chart, learning_rate, kick)

    def step(theta: Array, _: None) -> tuple[Array, Array]:
        return theta + learning_rate * term.velocity(theta, weight_decay), theta

    _, steps = jax.lax.scan(step, theta, None, length=FIRST_STEPS + 4)
    last = steps[FIRST_STEPS - 3 :]
    centre = jnp.asarray(_SMOOTH, theta.dtype) @ last
    x = last[3] - centre
    size = norm(x)
    tiny = jnp.finfo(theta.dtype).tiny
    direction = jnp.where(size > tiny, x / jnp.maximum(size, tiny), kick)
    # Nothing alternates where the descent has come to rest: that is rounding, too.
    log_size = jnp.maximum(jnp.log(jnp.maximum(size, tiny)), _log_rounding(centre))
    state = Alternating(centre, direction, log_size, jnp.zeros_like(size))
    return Begun(out, steps[: FIRST_STEPS + 1], state)
