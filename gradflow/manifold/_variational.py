"""The derivative of the limit map, by the variational equation along the path.

Off M, v(t) = Dθ(t)v obeys v' = −∇²F(θ(t))v, and DΦ(θ₀)v = P v(∞). The path is made
once, without derivatives; then v goes through a fixed chain of linear steps along it,
which JAX transposes: the transpose is the adjoint equation p' = ∇²F(θ(t))p, run
backwards from P u.
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from ..flow.flat import FlatLoss, flatten_on
from ..flow.term import FlowTerm
from ..losses import Loss
from ..results import RESULTS
from ..solvers import KKT5
from ..solvers.controllers import Relative
from ._growth import FollowGrowth, timescale
from .forms import AbstractForm

# Steps of the linear equation, and the tolerance of the path. The error falls as the
# fifth power of the steps, and grows with ‖DΦ‖: DΦ∇F, which is zero, is 4e-10 ‖∇F‖ at
# most in the 200 random cases of tests/test_limit_identity.py. In a narrower tanh
# network that turns a direction by a factor of 25 it was 5e-8 with 320 steps.
_STEPS = 512
_RTOL = 1e-11
# Forces below this part of the largest say nothing of the path: they are its error.
_NOISE = 1e-10
# Parameters up to which ∇²F is made and factorised; above, conjugate gradients.
_DENSE = 1500


@eqx.filter_custom_jvp
def tie(
    params: PyTree, end: PyTree, term: FlowTerm, form: AbstractForm, time, result
) -> PyTree:
    """`end`, the limit that was found from `params`, with the derivative of Φ."""
    del params, term, form, time, result
    return end


@tie.def_jvp
def _(primals, tangents):
    params, end, term, form, time, result = primals
    moved, *others = tangents
    if jax.tree.leaves(others):
        raise ValueError(
            "limit_map: only the derivative in the initial parameters is known, not "
            "that in the loss, its data, the rates or what is not trained."
        )
    full = jax.tree.map(
        lambda p, v: jnp.zeros_like(p) if v is None else v, params, moved
    )
    out = pushforward(term, params, end, form, time, ravel_pytree(full)[0])
    # There is no derivative where there is no limit; a factor says so in reverse too.
    out = out * jnp.where(result == RESULTS.successful, 1.0, jnp.nan).astype(out.dtype)
    return end, ravel_pytree(end)[1](out)


@eqx.filter_jit
def pushforward(
    term: FlowTerm,
    params: PyTree,
    end: PyTree,
    form: AbstractForm,
    time: Float[Array, ""],
    v: Float[Array, " d"],
) -> Float[Array, " d"]:
    """DΦ(θ₀)v, linear in v.

    **Arguments:**

    - `term`, `params`: the flow, and θ₀.
    - `end`: Φ(θ₀).
    - `form`: of the projection there.
    - `time`: when the path was within ε of M. It is followed for twice as long, to
        within ε²: there DΦ = P to rounding.
    - `v`: the direction.
    """
    theta, loss = flatten_on(term.loss, params, term.chart)
    w, _ = ravel_pytree(end)
    if not form.interpolating:
        # The Gauss–Newton matrix that KKT solvers iterate with is not ∇²F here.
        term = FlowTerm(Loss(term.loss), term.penalty, term.chart)
    tableau = KKT5.tableau
    lengths, nodes = _nodes(term, params, 2 * time, np.asarray(tableau.c))
    first = jnp.broadcast_to(theta, (1, theta.size))
    starts = jnp.concatenate([first, nodes[:-1, -1]])
    nodes = jnp.concatenate([starts[:, None], nodes], axis=1)

    # Kept are the points of the path alone: the backward pass makes ∇²F anew.
    @jax.checkpoint
    def step(v, at):
        length, points = at
        return _linear_step(loss, length, points, v, tableau), None

    v, _ = jax.lax.scan(step, v, (lengths, nodes))
    return form.exact_normal(loss, w).tangential(v)


def _nodes(
    term: FlowTerm, params: PyTree, time: Float[Array, ""], c: np.ndarray
) -> tuple[Float[Array, " steps"], Float[Array, "steps stages d"]]:
    """The lengths of the steps (see `_edges`), and the path at the stages `c` of each,
    landed on."""
    theta, _ = ravel_pytree(params)
    relative = Relative(_RTOL, growth=False, roots=term.chart.roots)
    controller = FollowGrowth(relative, term)

    def run(
        saveat: diffrax.SaveAt, controller: diffrax.AbstractStepSizeController
    ) -> PyTree:
        solution = diffrax.diffeqsolve(
            term,
            KKT5(),
            t0=jnp.zeros_like(time),
            t1=time,
            dt0=1e-3 * jnp.minimum(timescale(term, params), time),
            y0=params,
            args=jnp.zeros_like(time),
            saveat=saveat,
            stepsize_controller=controller,
            max_steps=16 * 8 * _STEPS,
            throw=False,
            adjoint=diffrax.ForwardMode(),
        )
        return solution.ys

    every = diffrax.SaveAt(t0=True, steps=True, fn=_force_along(term))
    times, force, change = run(every, controller)
    edges = _edges(times, force, change, time)
    lengths = jnp.diff(edges)
    order = np.argsort(c)
    ts = edges[:-1, None] + lengths[:, None] * jnp.asarray(c[order], time.dtype)[None]
    ts = ts.at[:, -1].set(edges[1:]).reshape(-1)
    landing = diffrax.ClipStepSizeController(controller, step_ts=ts)
    save = diffrax.SaveAt(ts=ts, fn=lambda t, y, args: ravel_pytree(y)[0])
    points = run(save, landing).reshape(_STEPS, c.size, theta.size)
    return lengths, points[:, np.argsort(order)]


def _force_along(term: FlowTerm):
    """A function of t and a point of the path: t, ‖∇F‖ and ‖∇²F∇F‖."""

    def fn(t, y, args):
        theta, loss = flatten_on(term.loss, y, term.chart)
        force = loss.gradient(theta)
        change = _hvp(loss, theta)(force)
        return t, jnp.linalg.norm(force), jnp.linalg.norm(change)

    return fn


def _edges(
    times: Float[Array, " n"],
    force: Float[Array, " n"],
    change: Float[Array, " n"],
    time: Float[Array, ""],
) -> Float[Array, " edges"]:
    """Where the steps of the linear equation begin and end.

    Half of them are spread as the path's own solver would have them. It takes many
    where its iteration is slow, for which the linear equation has no need; so the other
    half goes where v = ∇F makes the largest errors: h⁶κ⁶‖∇F‖ in a step of order five,
    with the rate κ = ‖∇²F∇F‖/‖∇F‖, the same in each step for a density of ‖∇F‖^⅙ κ.
    """
    # Diffrax fills what it did not reach with infinities.
    reached = jnp.isfinite(times)
    times = jnp.where(reached, times, time)
    largest = jnp.max(jnp.where(reached, force, 0))
    seen = reached & (force > _NOISE * largest)
    density = jnp.where(seen, change, 0) * jnp.where(seen, force, 1) ** (-5 / 6)
    pieces = 0.5 * (density[1:] + density[:-1]) * jnp.diff(times)
    taken = jnp.cumsum(reached[1:].astype(times.dtype))
    wanted = jnp.cumsum(pieces)
    tiny = jnp.finfo(times.dtype).tiny
    share = sum(0.5 * x / jnp.maximum(x[-1], tiny) for x in (taken, wanted))
    share = jnp.append(jnp.zeros_like(time), share)
    places = jnp.linspace(0, share[-1], _STEPS + 1, dtype=times.dtype)
    edges = jnp.interp(places, share, times)
    return edges.at[0].set(0).at[-1].set(time)


def _linear_step(
    loss: FlatLoss,
    length: Float[Array, ""],
    nodes: Float[Array, "stages d"],
    v: Float[Array, " d"],
    tableau: diffrax.ButcherTableau,
) -> Float[Array, " d"]:
    """One step of v' = −∇²F(θ(t))v, L-stable and stiffly accurate."""
    diagonal = tableau.a_diagonal
    assert diagonal is not None
    slopes = [-_hvp(loss, nodes[0])(v)]
    stage = v
    for theta, row, gamma in zip(nodes[1:], tableau.a_lower, diagonal[1:], strict=True):
        known = v + length * sum(float(a) * k for a, k in zip(row, slopes, strict=True))
        c = length * float(gamma)
        stage = _shifted_solve(loss, theta, c, known)
        # In −∇²F times the stage, stiff directions would magnify the rounding. A path
        # that starts on M has no length.
        slopes.append(jnp.where(c > 0, (stage - known) / jnp.where(c > 0, c, 1), 0))
    return stage


def _hvp(loss: FlatLoss, theta: Float[Array, " d"]):
    return jax.linearize(jax.grad(loss), theta)[1]


def _shifted_solve(
    loss: FlatLoss,
    theta: Float[Array, " d"],
    c: Float[Array, ""],
    b: Float[Array, " d"],
) -> Float[Array, " d"]:
    """(I + c∇²F)⁻¹b."""
    if theta.size <= _DENSE:
        eye = jnp.eye(theta.size, dtype=theta.dtype)
        return jnp.linalg.solve(eye + c * jax.hessian(loss)(theta), b)
    hvp = _hvp(loss, theta)
    # Both ways, and each with its own failure: ∇²F is symmetric.
    return jax.lax.custom_linear_solve(
        lambda x: x + c * hvp(x), b, _conjugate_gradients, symmetric=True
    )


def _conjugate_gradients(matvec, b: Float[Array, " d"]) -> Float[Array, " d"]:
    """The solution, NaN where it was not found."""
    operator = lx.FunctionLinearOperator(
        matvec,
        jax.eval_shape(lambda: b),
        # Definite but for steps longer than 1/|κ|, κ a negative curvature, which the
        # accuracy of the path forbids.
        tags=lx.positive_semidefinite_tag,
    )
    # Relative to ‖b‖, since bᵢ = 0 leaves no scale for rᵢ. The residual is that of the
    # recursion: the true one stops at the rounding of c∇²F x, in stiff directions, in
    # which an error of x is smaller by 1 + cκ.
    most = 20 * b.size + 100
    solver = lx.CG(rtol=0.0, atol=1e-12, stabilise_every=None, max_steps=most)
    size = jnp.linalg.norm(b)
    unit = b / jnp.where(size > 0, size, 1)
    out = lx.linear_solve(operator, unit, solver, throw=False)
    # A breakdown is reported as success; the residual tells.
    found = jnp.linalg.norm(unit - matvec(out.value)) < 1e-3
    found = found & (out.result == lx.RESULTS.successful)
    found = found | (size == 0)
    return size * jnp.where(found, out.value, jnp.nan)
