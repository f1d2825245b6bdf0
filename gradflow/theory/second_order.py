"""The terms of order λ in the two-phase prediction, uniform in time.

With H = ∇²F, h = −H⁺∇R and D³F[a, b] the derivative of ∇²F(w) a along b:

- outer: θ_λ = w° + λ(w₁ + h(w°)) + O(λ²), where w₁ is tangent and
  w₁' = Df[w₁] − D²Φ[h, ∇R] − P∇²R h, with f = −P∇R the field of the drift;
- inner: θ_λ = θ_GF + λθ₁ + O(λ²), where θ₁' = −H(θ_GF)θ₁ − ∇R(θ_GF), θ₁(0) = 0;
- they meet: θ₁(t) → −tP∇R(Φ) + w₁(0) + h(Φ), which gives w₁(0).

This expands dy/ds = −DΦ(θ_λ)∇R(θ_λ), which y = Φ(θ_λ) obeys exactly, in λ.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from .._host import as_array, taken
from ..flow.flat import FlatLoss, flatten_on
from ..flow.flow import GradientFlow
from ..flow.term import AbstractChart, FlowTerm
from ..manifold import Drift, Spectrum
from ..manifold.diagnosis import third_derivative
from ..manifold.forms import AbstractForm
from ..margin_losses import Hinge
from ..penalties import AbstractPenalty
from ..runs.integrate import Integration
from ..runs.interpolate import interpolate, place
from ..runs.path import Path
from ..runs.refine import FEWEST, MOST
from ..runs.times import even_times
from ..solvers.kernel import DENSE_LIMIT

_ORDER = 5  # of the formula of backward differences
_MISMATCH = 1e-3  # above it, the grid of θ₁ is refined


class SecondOrder(eqx.Module):
    """The terms of order λ, along the fast path and at the nodes of the drift."""

    inner: PyTree
    """e₁(t) = θ₁ + tP∇R(Φ) − w₁(0) − h(Φ), which is gone with the fast phase; at times
    of its own, even in log(1 + t/τ) up to the end of the fast path."""
    tangent: PyTree
    """w₁(s), the drift's own correction, along M; up to `until`."""
    offset: PyTree
    """h(s) = −(∇²F)⁺∇R, the offset normal to M; up to `until`."""
    ratio: Float[Array, " n"]
    """‖b‖/‖h‖ along the drift, b the part normal to M of the next term, that of λ²: how
    fast the series falls is λ times this."""
    fast_ratio: Float[Array, " k"]
    """max(‖a‖/‖Φ‖, (‖q‖/‖Φ‖)^½) along the fast path, at the times of `inner`, for the
    terms λa and λ²q: how fast the series falls there is λ times this. (By the root, as
    a may be small by chance, and as what counts is how far λ moves the solution.)"""
    next: PyTree
    """q = θ₂ − ½t²w°''(0) − t(w₁ + h)'(0) at these times, the term of order λ² inside
    the fast phase; its end is that at the start of the drift."""
    until: Float[Array, ""]
    """The slow time up to which w₁ was found."""
    mismatch: Float[Array, ""]
    """How far w₁(0) is off at most, relative to the term of order λ at s = 0: the error
    of the finer of the two grids that it is extrapolated from."""
    fast_mismatch: Float[Array, ""]
    """The same for `inner`, the largest along the fast path."""

    def __str__(self) -> str:
        ratio, fast = np.asarray(self.ratio), np.asarray(self.fast_ratio)
        text = (
            f"second order known to s = {float(self.until):.3g}; its terms fall as "
            f"{ratio[0]:.2g} λ at s = 0, {ratio[-1]:.2g} λ at the end, "
            f"{fast.max():.2g} λ in the fast phase"
        )
        if float(self.mismatch) > 1e-2:
            text += (
                f"; uncertain by {100 * float(self.mismatch):.1g} %, as the fast phase "
                "changes abruptly, late in its course"
            )
        return text


def check_second_order(spectrum: Spectrum, flow: GradientFlow) -> None:
    penalty = flow.penalty
    if isinstance(flow.loss, Hinge):
        raise ValueError(
            "order: the second takes ∇²F, which jumps where samples of a Hinge reach "
            "their margin; give order=1."
        )
    if not penalty.smooth:
        raise ValueError(
            f"order: the second takes ∇²R, which {type(penalty).__name__} has not "
            "everywhere; give order=1."
        )
    if not spectrum.source.interpolating and spectrum.parameters > DENSE_LIMIT:
        raise ValueError(
            f"order: the second factorises the Hessian, for up to {DENSE_LIMIT} "
            f"parameters, got {spectrum.parameters}; give order=1."
        )


def second_order(
    term: FlowTerm, fast: Path, drift: Drift, spectrum: Spectrum, fast_scale: Array
) -> SecondOrder | None:
    """The terms of order λ for the two paths of a two-phase prediction; `None` where
    they could not be found."""
    chart = term.chart
    # All of it is of states, in which the flow is a plain one.
    path, slow = (jax.vmap(chart.state)(x.params) for x in (fast, drift))
    start = jax.tree.map(lambda p: taken(p, 0), slow)
    along = FastPath(term, path, fast_scale, spectrum.source)
    none = as_array(np.zeros(spectrum.parameters, fast.t.dtype))
    _, h, speed = match(term, start, none, spectrum)

    last = taken(fast.t, -1)

    def times(n: int) -> Float[Array, " n"]:
        return even_times(np.linspace(0, 1, n), last, fast_scale)

    def theta1(ts: Float[Array, " n"]) -> Float[Array, "n d"]:
        return inner(along, ts, last, speed)

    # Both by one program, for which the rough one goes on beyond the end.
    count = FEWEST
    rough = taken(theta1(_as_many_again(times(count), fast_scale)), slice(count))
    fine = theta1(times(2 * count - 1))
    while True:
        theta, end, fine_end, inside = _extrapolated(rough, fine)
        w1, *_ = match(term, start, end, spectrum)
        off, *_ = match(term, start, fine_end, spectrum)
        mismatch = _relative(w1, off, h)
        if not np.maximum(mismatch, inside) > _MISMATCH or 2 * count > MOST:
            break
        count = 2 * count - 1
        rough, fine = fine, theta1(times(2 * count - 1))
    s = taken(drift.s, slice(_regular(drift)))
    tangent = outer(term, slow, drift.s, s, w1, spectrum)
    n = int(_count_finite(tangent))
    if n < 8 or not np.isfinite(mismatch):  # interpolation takes 8
        return None
    until = slice(n)
    nodes = jax.tree.map(lambda p: taken(p, until), slow)
    s, tangent = taken(s, until), taken(tangent, until)
    offset, ratio = _next(term, nodes, s, tangent, spectrum)
    bend, rise = _start(term, start, w1, offset, drift.s, spectrum)
    growth = Growth(speed, bend, rise)
    q = inner_next(along, times(2 * count - 1), last, fine, growth)
    stacks, fast_ratio = _stacked(chart, start, theta, q, w1, h, tangent, offset)
    return SecondOrder(
        **stacks,
        ratio=ratio,
        fast_ratio=fast_ratio,
        until=taken(s, -1),
        mismatch=as_array(mismatch, s.dtype),
        fast_mismatch=inside,
    )


def _as_many_again(ts: Float[Array, " n"], scale: Array) -> Float[Array, " N"]:
    """n even times, and n − 1 that go on from there."""
    times, unit = np.asarray(ts), np.asarray(scale)
    x = np.log1p(times / unit)
    return as_array(np.append(times, unit * np.expm1(x[1:] + x[-1])))


@eqx.filter_jit
def _extrapolated(
    rough: Float[Array, "n d"], fine: Float[Array, "N d"]
) -> tuple[
    Float[Array, "n d"], Float[Array, " d"], Float[Array, " d"], Float[Array, ""]
]:
    """θ₁ at n times, from values on a grid and on one twice as fine: the error falls 32
    times with the spacing, and one more is had. Also its end on the fine grid and here,
    and the largest share of the change."""
    change = (fine[::2] - rough) / (2**_ORDER - 1)
    theta = fine[::2] + change
    return theta, theta[-1], fine[-1], _largest_share(change, rough)


def _relative(w1: Array, off: Array, h: Array) -> float:
    """‖w₁ − off‖/‖w₁ + h‖."""
    w1, off, h = map(np.asarray, (w1, off, h))
    with np.errstate(all="ignore"):
        return float(np.linalg.norm(w1 - off) / np.linalg.norm(w1 + h))


@eqx.filter_jit
def _count_finite(tangent: Float[Array, "n d"]) -> Int[Array, ""]:
    """How far the solver came: beyond, there are no numbers."""
    return jnp.sum(jnp.all(jnp.isfinite(tangent), axis=1))


@eqx.filter_jit
def _stacked(
    chart: AbstractChart,
    start: PyTree,
    theta: Float[Array, "n d"],
    fine: Float[Array, "N d"],
    w1: Float[Array, " d"],
    h: Float[Array, " d"],
    tangent: Float[Array, "k d"],
    offset: Float[Array, "k d"],
) -> tuple[dict[str, PyTree], Float[Array, " n"]]:
    """The terms in the shape of parameters, of which q comes on the `fine` grid, by the
    fields of `SecondOrder`; and its `fast_ratio`."""
    vector, unravel = ravel_pytree(start)
    q, whole = fine[::2], jnp.linalg.norm(vector)
    first, more = (jnp.linalg.norm(x, axis=1) / whole for x in (theta, q))
    e1 = (theta - (w1 + h)[None]).at[-1].set(0.0)
    terms = dict(inner=e1, tangent=tangent, offset=offset, next=q)

    def placed(term: Float[Array, " d"]) -> PyTree:
        return chart.tangent(unravel(term))

    stacks = {name: jax.vmap(placed)(term) for name, term in terms.items()}
    return stacks, jnp.maximum(first, jnp.sqrt(more))


def _largest_share(part: Float[Array, "n d"], whole: Float[Array, "n d"]) -> Array:
    """The largest ‖part‖ along a path, of the ‖whole‖ up to there."""
    part, whole = (jnp.linalg.norm(x, axis=1) for x in (part, whole))
    whole = jax.lax.cummax(whole)
    return jnp.max(jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1.0), 0.0))


@eqx.filter_jit
def _start(
    term: FlowTerm,
    start: PyTree,
    w1: Float[Array, " d"],
    offset: Float[Array, "n d"],
    nodes: Float[Array, " nodes"],
    spectrum: Spectrum,
) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
    """w°''(0) and a'(0), a = w₁ + h, at the start of the drift."""
    at = Point(term, start, spectrum)

    def h(s: Float[Array, ""]) -> Float[Array, " d"]:
        return interpolate(offset, place(s, nodes[-1], 1.0, nodes.size))

    # At 0 itself the position is clipped, and its derivative halved.
    beside = 1e-6 * nodes[1]
    rise = jax.jvp(h, (beside,), (jnp.ones_like(beside),))[1]
    return at.field_jvp(-at.drift), rise + at.tangent_rate(w1)


class Point(eqx.Module):
    """M at a point: its curvature H = GᵀG in the normal directions, and the penalty."""

    loss: FlatLoss
    penalty: AbstractPenalty
    w: Float[Array, " d"]
    root: Float[Array, "k d"]  # G, with orthogonal rows
    curvature: Float[Array, " k"]  # of the rows, that is their squares; ∞ if not kept
    sign: Float[Array, " k"]  # −1 for a negative curvature: at a saddle
    drift: Float[Array, " d"]  # P∇R
    offset: Float[Array, " d"]  # h = −H⁺∇R

    def __init__(self, term: FlowTerm, params: PyTree, spectrum: Spectrum):
        """M at the state `params`, with the form and the rank of `spectrum`, of another
        point."""
        w, loss = flatten_on(term.loss, params, term.chart)
        values, root = spectrum.source.root(loss, w)
        place = jnp.argsort(jnp.argsort(-jnp.abs(values)))
        self.loss, self.penalty, self.w, self.root = loss, term.penalty, w, root
        self.curvature = jnp.where(place < spectrum.rank, jnp.abs(values), jnp.inf)
        self.sign = jnp.sign(values)
        gradient = self._gradient(w)
        self.drift = self.project(gradient)
        self.offset = -self.inverse(gradient)

    def _gradient(self, w: Float[Array, " d"]) -> Float[Array, " d"]:
        return ravel_pytree(self.penalty.gradient(self.loss.unravel(w)))[0]

    def project(self, v: Float[Array, " d"]) -> Float[Array, " d"]:
        """P v, along M."""
        return v - self.root.T @ (self.root @ v / self.curvature)

    def inverse(self, v: Float[Array, " d"]) -> Float[Array, " d"]:
        """H⁺ v."""
        return self.root.T @ (self.sign * (self.root @ v) / self.curvature**2)

    def penalty_hvp(self, v: Float[Array, " d"]) -> Float[Array, " d"]:
        """∇²R v."""
        return jax.jvp(self._gradient, (self.w,), (v,))[1]

    def third(
        self, a: Float[Array, "p d"], b: Float[Array, "p d"]
    ) -> Float[Array, "p d"]:
        """D³F[a, b] for p pairs."""
        one = partial(third_derivative, self.loss, self.w)
        return jax.vmap(one)(a, b)

    def bending(self) -> Float[Array, " d"]:
        """D²Φ[h, ∇R] = −P D³F[H⁺h, P∇R] + ½P D³F[h, h]."""
        h = self.offset
        first, second = self.third(
            jnp.stack([self.inverse(h), h]), jnp.stack([self.drift, h])
        )
        return self.project(0.5 * second - first)

    def field_jvp(self, v: Float[Array, " d"]) -> Float[Array, " d"]:
        """Df[v] of the field f = −P∇R for a tangent v:
        H⁺D³F[v, P∇R] − P(D³F[h, v] + ∇²R v)."""
        first, second = self.third(
            jnp.stack([v, self.offset]), jnp.stack([self.drift, v])
        )
        return self.inverse(first) - self.project(second + self.penalty_hvp(v))

    def tangent_rate(self, w1: Float[Array, " d"], bend: float = 1.0) -> Array:
        """w₁' = Df[w₁] − D²Φ[h, ∇R] − P∇²R h."""
        source = bend * self.bending() + self.project(self.penalty_hvp(self.offset))
        return self.field_jvp(w1) - source


@eqx.filter_jit
def match(
    term: FlowTerm,
    start: PyTree,
    theta1: Float[Array, " d"],
    spectrum: Spectrum,
) -> tuple[Float[Array, " d"], Float[Array, " d"], Float[Array, " d"]]:
    """w₁(0) = P(Φ)[θ₁ + tP∇R(Φ)], given what is in the brackets at a large time; h(Φ)
    and P∇R(Φ)."""
    at = Point(term, start, spectrum)
    return at.project(theta1), at.offset, at.drift


@eqx.filter_jit
def outer(
    term: FlowTerm,
    path: PyTree,
    nodes: Float[Array, " nodes"],
    ts: Float[Array, " n"],
    w1: Float[Array, " d"],
    spectrum: Spectrum,
    bend: float = 1.0,
) -> Float[Array, "n d"]:
    """w₁ at the slow times `ts`, along the drift known at `nodes`. It is smooth, and
    not held to M: a plain solver and its dense output will do. `bend` is 1; with 0 the
    term D²Φ[h, ∇R] is left out."""

    def field(s, v, args):
        here = interpolate(path, place(s, nodes[-1], 1.0, nodes.size))
        return Point(term, here, spectrum).tangent_rate(v, bend)

    size = jnp.linalg.norm(w1) + jnp.linalg.norm(ravel_pytree(path)[0])
    scale = size / (w1.size * nodes.size) ** 0.5
    integration = Integration(
        diffrax.ODETerm(field),
        diffrax.Tsit5(),
        diffrax.PIDController(rtol=1e-6, atol=1e-6 * scale),
        ts,
        None,
        # Tens are enough but near a singular point, where w₁ grows without bound.
        max_steps=300,
        land=False,
    )
    return integration.run(integration.begin(w1, 0.01 * ts[-1])).saved


def _regular(drift: Drift) -> int:
    """How many nodes of the drift there are before η has fallen to a thousandth."""
    eta = np.asarray(drift.smallest_curvature)
    fallen = np.flatnonzero(~(eta >= 1e-3 * eta[0]))
    return max(int(fallen[0]) if fallen.size else eta.size, 8)


@eqx.filter_jit
def _next(
    term: FlowTerm,
    nodes: PyTree,
    s: Float[Array, " n"],
    tangent: Float[Array, "n d"],
    spectrum: Spectrum,
) -> tuple[Float[Array, "n d"], Float[Array, " n"]]:
    """h, and ‖b‖/‖h‖: b = −H⁺(½D³F[a, a] + ∇²R a + da/ds), a = w₁ + h, is what the
    terms of order λ² in λ dθ/ds = −∇F − λ∇R leave normal to M."""
    offset = jax.lax.map(lambda p: Point(term, p, spectrum).offset, nodes)
    first = tangent + offset
    rise, run = jnp.gradient(first, axis=0), jnp.gradient(s)
    rate = jnp.asarray(rise) / jnp.asarray(run)[:, None]

    def at(args):
        p, a, rate, h = args
        here = Point(term, p, spectrum)
        force = 0.5 * here.third(a[None], a[None])[0] + here.penalty_hvp(a) + rate
        size = jnp.linalg.norm(h)
        ratio = jnp.linalg.norm(here.inverse(force)) / jnp.where(size > 0, size, 1.0)
        return jnp.where(size > 0, ratio, 0.0)

    return offset, jax.lax.map(at, (nodes, first, rate, offset))


class FastPath(eqx.Module):
    """The fast path θ_GF, interpolated, and what drives it."""

    term: FlowTerm
    params: PyTree
    """States at n even times, see `even_times`."""
    scale: Float[Array, ""]
    """τ of these times."""
    form: AbstractForm

    def at(
        self, t: Float[Array, ""], end: Float[Array, ""]
    ) -> tuple[Float[Array, " d"], FlatLoss]:
        """θ_GF(t) as a vector, `end` being its last time, and F."""
        nodes = jax.tree.leaves(self.params)[0].shape[0]
        params = interpolate(self.params, place(t, end, self.scale, nodes))
        return flatten_on(self.term.loss, params, self.term.chart)


class Growth(NamedTuple):
    """How the terms grow along the fast path: as the drift that follows begins."""

    speed: Float[Array, " d"]
    """P∇R(Φ) = −w°'(0)."""
    bend: Float[Array, " d"]
    """w°''(0)."""
    rise: Float[Array, " d"]
    """a'(0), a = w₁ + h."""


@eqx.filter_jit
def inner(
    fast: FastPath,
    ts: Float[Array, " n"],
    end: Float[Array, ""],
    speed: Float[Array, " d"],
) -> Float[Array, "n d"]:
    """u = θ₁ + tv at the times `ts`, where v = `speed` = P∇R(Φ): what is left of θ₁
    without its growth, u' = −H(u − tv) − ∇R + v. Beyond the `end` of the fast path
    the numbers mean nothing."""

    def source(t, w, loss):
        grown = t * jax.jvp(loss.gradient, (w,), (speed,))[1]
        return grown - _pull(fast.term, w, loss) + speed

    return _march(fast, ts, end, source)


@eqx.filter_jit
def inner_next(
    fast: FastPath,
    ts: Float[Array, " n"],
    end: Float[Array, ""],
    first: Float[Array, "n d"],
    growth: Growth,
) -> Float[Array, "n d"]:
    """q = θ₂ − ½t²w°'' − ta', the term of order λ² without its growth, at the times
    `ts` at which u is `first`: θ₂' = −Hθ₂ − ½D³F[θ₁, θ₁] − ∇²Rθ₁."""
    speed, bend, rise = growth

    def source(t, w, loss):
        u = interpolate(first, place(t, end, fast.scale, ts.size))
        theta1 = u - t * speed
        third = third_derivative(loss, w, theta1, theta1)
        growing = 0.5 * t**2 * bend + t * rise
        grown = jax.jvp(loss.gradient, (w,), (growing,))[1]
        decay = jax.jvp(lambda x: _pull(fast.term, x, loss), (w,), (theta1,))[1]
        return -0.5 * third - decay - grown - t * bend - rise

    return _march(fast, ts, end, source)


def _pull(term: FlowTerm, w: Float[Array, " d"], loss: FlatLoss) -> Float[Array, " d"]:
    """∇R."""
    return ravel_pytree(term.penalty.gradient(loss.unravel(w)))[0]


def _march(
    fast: FastPath,
    ts: Float[Array, " n"],
    end: Float[Array, ""],
    source: Callable[[Array, Array, FlatLoss], Array],
) -> Float[Array, "n d"]:
    """u' = −H(θ_GF)u + source(t, θ_GF, F), u(0) = 0, at the times `ts`.

    The times are even in x = log(1 + t/τ), as are those of the fast path, however many,
    and u is smooth there: the implicit formula of backward differences needs no other
    point, and H only there. The spectrum is real, so that its stability is that of an
    L-stable method.
    """
    alpha, scale = backward_differences(_ORDER), fast.scale
    zero = jnp.zeros_like(ravel_pytree(jax.tree.map(lambda p: p[0], fast.params))[0])
    dx = jnp.log1p(ts[-1] / scale) / (ts.size - 1)

    def rate(x, u):
        """du/dx, where the problem is not stiff yet."""
        t = scale * jnp.expm1(x)
        w, loss = fast.at(t, end)
        hu = jax.jvp(loss.gradient, (w,), (u,))[1]
        return scale * jnp.exp(x) * (source(t, w, loss) - hu)

    # The classical method: a stage for each node, each from the one before it.
    nodes = jnp.asarray([0.0, 0.5, 0.5, 1.0], zero.dtype)
    weights = jnp.asarray([1.0, 2.0, 2.0, 1.0], zero.dtype) / 6

    def runge_kutta(v, k):
        def stage(done, at):
            slope, total = done
            node, weight = at
            slope = rate((k + node) * dx, v + node * dx * slope)
            return (slope, total + weight * slope), None

        (_, mean), _ = jax.lax.scan(stage, (zero, zero), (nodes, weights))
        v = v + dx * mean
        return v, v

    def advance(past, t):
        w, loss = fast.at(t, end)
        h = dx * (t + scale)
        right = h * source(t, w, loss) - alpha[1:] @ past
        v = fast.form.solve_shifted(loss, w, alpha[0], h, right, past[0])
        return jnp.concatenate([v[None], past[:-1]]), v

    count = jnp.arange(alpha.size - 2, dtype=zero.dtype)
    early = jax.lax.scan(runge_kutta, zero, count)[1]
    early = jnp.concatenate([zero[None], early])
    late = jax.lax.scan(advance, early[::-1], ts[alpha.size - 1 :])[1]
    return jnp.concatenate([early, late])


def backward_differences(order: int) -> Float[Array, " 6"]:
    """α with Σⱼ αⱼ v(x − j) = v'(x) to an order of at most 5: Σₖ ∇ᵏ/k."""
    alpha = np.zeros(6)
    difference = np.array([1.0])
    for k in range(1, order + 1):
        difference = np.convolve(difference, [1.0, -1.0])
        alpha[: k + 1] += difference / k
    return jnp.asarray(alpha)
