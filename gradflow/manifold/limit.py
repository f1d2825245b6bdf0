"""The limit map Φ: where the flow without weight decay ends."""

import functools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from .._checks import check_arguments, check_given, finest, is_concrete, resolvable
from .._host import as_array, known
from .._norms import norm
from ..flow.flat import FlatLoss, flatten_on
from ..flow.flow import GradientFlow, partition
from ..flow.nonsmooth import loss_may_have_kinks
from ..flow.term import FlowTerm
from ..flow.vector import on_vector
from ..losses import AbstractCompositeLoss, AbstractLoss
from ..precision import exact_products
from ..results import among, named_wrong, only_if_successful, RESULTS
from ..runs.integrate import Integration, Reached
from ..runs.parts import ALL
from ..runs.progress import Bar, run_in_parts
from ..runs.solve import flees
from ..runs.stats import Stats
from ..solvers import KKT5
from ..solvers.controllers import Relative
from ..solvers.kernel import fits
from ._growth import FollowGrowth, timescale
from ._normal import close
from ._separable import has_underflown, limit_direction, smallest_margin
from ._variational import tie
from .choice import begin, first_form, Form
from .forms import AbstractForm
from .hessian_form import HessianForm
from .jacobian_form import count_outputs
from .retraction import failed, nearest
from .spectra import measure

# The tolerance of the integration, where the precision of the parameters resolves it.
_RTOL = 1e-9
# Outputs, or parameters, up to which JJᵀ, or JᵀJ, is made whatever the other number.
_FEW = 500


class Limit(eqx.Module):
    """The limit Φ(θ₀) of a flow without weight decay. Print it for a summary."""

    model: PyTree
    """The model with the parameters Φ(θ₀)."""
    residual: Float[Array, ""]
    """The distance to M that is left; see [`gradflow.manifold.Retraction`][]."""
    time: Float[Array, ""]
    """The time t at which the flow was near enough to M for its end to be computed."""
    result: RESULTS
    """Whether there is a limit, and why not: see [`gradflow.manifold.limit_map`][]."""
    stats: Stats
    """The solver, its tolerance, and the steps it took."""
    direction: PyTree
    """Where there is no minimiser, the model with the parameters lim θ/‖θ‖ instead, of
    norm one: the direction of what they gained over the last decade of time. Else
    zero."""
    margin: Float[Array, ""]
    """The least margin of `direction` over the samples that count, of a loss of classes
    (`CrossEntropy`, `Logistic`, `SoftMargin`, `Exponential`), which for a model
    homogeneous of degree L is the normalised one, minᵢ margin(θ)/‖θ‖ᴸ. It is positive
    where the direction separates the data. Zero where there is a limit, NaN for other
    losses."""

    def __str__(self) -> str:
        if among(self.result, RESULTS.successful):
            end = f"reached, to a relative distance of {float(self.residual):.1g}"
        else:
            end = f"FAILED: {RESULTS[self.result]}"
        if among(self.result, RESULTS.no_minimiser):
            margin = float(self.margin)  # NaN where there are no classes
            of = "" if np.isnan(margin) else f", of normalised margin {margin:.3g}"
            end += f" In its stead: `direction`{of}."
        steps = int(self.stats.steps)
        return f"Limit Φ(θ₀) {end} (t = {float(self.time):.3g}, {steps} steps)"


@exact_products
def limit_map(
    loss: AbstractLoss | GradientFlow,
    model: PyTree,
    *,
    form: Form = "auto",
    rtol: float | Scalar | None = None,
    atol: float | Scalar | None = None,
    residual_tol: float | Scalar | None = None,
    t_max: float | Scalar | None = None,
    solver: diffrax.AbstractSolver | None = None,
    max_steps: int = 100_000,
    throw: bool = True,
    trainable: PyTree = eqx.is_inexact_array,
    progress: bool = False,
) -> Limit:
    """Φ(θ₀) = lim t→∞ θ(t) of the flow θ' = −∇F(θ) from the model θ₀.

    The flow is integrated until the distance ‖J⁺r‖ (or ‖(∇²F)⁺∇F‖) to M is below
    ε‖θ‖, with ε = eps^0.4 = 5e-7 in float64. There DΦ = P up to O(ε), so
    Φ(θ) = θ − J⁺r + O(ε²), and a retraction takes the place of the infinite rest of the
    path at a cost of 1e-12. What is left is the error of the integration, about ten
    times `rtol`. Close to a saddle, where J or ∇²F explains too little of the force,
    the flow goes on as long as some force above rounding leads away.

    Convergence is checked, not assumed. At `t_max` the result is `no_minimiser` if the
    norm ‖θ‖ has grown by about as much in each of the last three decades of time while
    the loss fell (‖θ‖ ~ log t), else `not_converged`.

    **Arguments:**

    - `loss`: the training loss, or a flow of it. With `rates` G the flow is θ' = −G∇F,
        and the distance to M that of the metric G⁻¹; tolerances are for θ as always.
    - `model`: the initial model θ₀.
    - `form`: how the distance to M is measured, `"jacobian"`, `"hessian"` or `"auto"`;
        see [`gradflow.manifold.retract`][].
    - `rtol`, `atol`: the tolerances of the integration; see [`gradflow.simulate`][].
        `rtol` is 1e-9 unless given, or what the precision of the parameters resolves
        (1e-4 in float32).
    - `residual_tol`: the tolerance of the retraction, its `rtol`.
    - `t_max`: the time at which to give up, in units of t: 1e10, or 1e10 times the
        time in which θ₀ changes if that is longer, unless given. Steps grow with t, so
        it costs little.
    - `solver`: a gradflow or a Diffrax solver.
    - `max_steps`: the most steps of the solver.
    - `throw`: whether to raise an error where there is no limit.
    - `trainable`: a filter, as for [`gradflow.GradientFlow`][].
    - `progress`: show a progress bar (none while it is being traced): how far it is to
        `t_max`, in the logarithm of t. It mostly ends far from there.

    **Returns:** a [`gradflow.manifold.Limit`][]. Its `result` is `successful`,
    `saddle`, `not_converged`, `no_minimiser` (then there is a `direction`, and its
    `margin`, in its stead), `diverged`, `out_of_steps` or `stalled`; or `not_critical`
    where it came to rest off M, which the Hessian form may resolve.

    Its model has a derivative in θ₀, forward and reverse, under `jit` and `vmap`: on M
    DΦ = P; off M, DΦ(θ₀)v = P v(∞) with v' = −∇²F(θ(t))v, v(0) = v, and the transpose
    by the adjoint equation. It costs a few paths and 512 linear steps, with ∇²F made
    and factorised in each up to d = 1500, by conjugate gradients above; it is exact to
    about 1e-8, and NaN where there is no limit. Derivatives in the loss or its data
    raise an error.

    **Raises:** `ValueError` for arguments that make no sense, or a Jacobian form of a
    loss that is not composite; `RuntimeError` where `throw` and there is no limit.

    Source: Li, Wang, Arora, arXiv 2110.06914, definition 4.1 and lemma 4.3; Boursier,
    Pesme, Dragomir, arXiv 2505.20172.
    """
    wrong = check_arguments(max_steps=max_steps) | check_given(
        rtol=rtol, atol=atol, residual_tol=residual_tol, t_max=t_max, solver=solver
    )
    term, params = begin(loss, model, trainable)
    rtol = max(_RTOL, finest(params)) if rtol is None else resolvable(rtol, params)
    if isinstance(loss, GradientFlow):
        loss, trainable = loss.loss, loss.trainable
    first = first_form(loss, params, term.static, form)
    solver = default_solver(loss, params, term.static) if solver is None else solver
    search = Search(rtol, atol, residual_tol, t_max, solver, max_steps)
    fixed, start = (_without_derivative(x) for x in (term, params))
    out = _limit(fixed, start, first, search, progress)
    if form == "auto" and first.interpolating and failed(out.result):
        # It came to rest where the loss is not interpolated, so M is not {r = 0}. The
        # limit from there is the limit from the start.
        if np.all(known(among(out.result, RESULTS.not_critical))):
            first = HessianForm()
            start = _state_of(out.model, term, trainable)
            rest = _limit(fixed, start, first, search, progress)
            stats = rest.stats.with_work_of(out.stats)
            time = out.time + rest.time
            out = eqx.tree_at(lambda o: (o.time, o.stats), rest, (time, stats))
    end = _state_of(out.model, term, trainable)
    end = tie(params, end, term, first, out.time, out.result)
    out = eqx.tree_at(lambda o: o.model, out, term.model(end))
    out = named_wrong(out, wrong, lambda o: (o.model, o.residual))
    if throw:
        out = only_if_successful(out, out.result)
    return out


def _state_of(model: PyTree, term: FlowTerm, trainable: PyTree) -> PyTree:
    return term.chart.state(partition(model, trainable)[0])


def _without_derivative(tree: PyTree) -> PyTree:
    arrays, rest = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.lax.stop_gradient(arrays), rest)


def default_solver(
    loss: AbstractLoss, params: PyTree, static: PyTree
) -> diffrax.AbstractSolver:
    """KKT5 where the loss is composite and JJᵀ no larger than the Hessian, or one of
    JJᵀ and JᵀJ small; else Tsit5, the explicit one, which takes as many steps as the
    problem is stiff, and whose noise at the stability limit can keep it from coming to
    rest at all."""
    if isinstance(loss, AbstractCompositeLoss):
        parameters = sum(p.size for p in jax.tree.leaves(params))
        outputs = count_outputs(loss, params, static)
        if min(outputs, parameters) <= _FEW and fits(parameters, outputs):
            return KKT5()
    if first_form(loss, params, static, "auto").interpolating:
        return KKT5()
    return diffrax.Tsit5()


class Search(eqx.Module):
    """How the limit is looked for: see `limit_map`."""

    rtol: float | Scalar
    atol: float | Scalar | None
    residual_tol: float | Scalar | None
    t_max: float | Scalar | None
    solver: diffrax.AbstractSolver
    max_steps: int


def _limit(
    term: FlowTerm, params: PyTree, form: AbstractForm, search: Search, progress: bool
) -> Limit:
    follow = functools.partial(_follow, term, params, form, search)
    arrays = jax.tree.leaves(eqx.filter((term, params), eqx.is_array))
    if not progress or not all(map(is_concrete, arrays)):
        out, *_ = follow(None, as_array(ALL))
        return _settle(term, params, form, search, out)
    most = np.log1p(1e10 if search.t_max is None else search.t_max)

    def far(at: Reached, _: Reached) -> tuple[float, str]:
        t = float(at.t)
        words = f"t = {t:.3g}, {np.asarray(at.counts)[0]} steps"
        return min(np.log1p(t) / most, 1.0), words

    with Bar("limit map", shown=True) as bar:
        out, _ = run_in_parts(follow, None, bar, far)
        return _settle(term, params, form, search, out)


@eqx.filter_jit
def _settle(
    term: FlowTerm, params: PyTree, form: AbstractForm, search: Search, out: Reached
) -> Limit:
    """What the flow has come to: the nearest point of M, or why there is none."""
    theta, loss = flatten_on(term.loss, params, term.chart)
    dtype, t_max = theta.dtype, _last(term, params, search)
    time, thetas, end = out.t, out.saved, out.y
    losses = jax.lax.map(loss, thetas)
    last = loss.unravel(end)
    speed = term.velocity(last, 0.0)
    sound = jnp.isfinite(norm(end) + norm(speed) + loss(end))
    arrived = out.stopped & sound
    w, residual, on_manifold = jax.lax.cond(
        arrived,
        lambda: _finish(loss, end, form, search.residual_tol),
        lambda: (end, _distance(loss, end, form, time)[0], jnp.array(False)),
    )
    # At rest where J explains nothing, and maybe a saddle: for the other form to tell.
    resting = form.interpolating & (residual <= close(dtype))
    resting = resting & (time * norm(speed) <= 10 * close(dtype) * norm(end))
    endless = _grows_forever(thetas, losses)
    result = RESULTS.where(resting, RESULTS.not_critical, RESULTS.not_converged)
    result = RESULTS.where(endless, RESULTS.no_minimiser, result)
    done = RESULTS.where(on_manifold, RESULTS.successful, RESULTS.not_critical)
    result = RESULTS.where(arrived, done, result)
    unseen = has_underflown(loss, end)
    result = RESULTS.where(unseen, RESULTS.not_converged, result)
    if not form.interpolating:
        saddle = arrived & measure(loss, w, form).negative
        result = RESULTS.where(saddle, RESULTS.saddle, result)
    stalled = ~diffrax.is_okay(out.result)
    ran_out = ~(stalled | out.stopped) & (time < t_max)
    result = RESULTS.where(ran_out, RESULTS.out_of_steps, result)
    result = RESULTS.where(stalled, RESULTS.stalled, result)
    # What reaches infinity in finite time stalls on its way there.
    lost = ~sound | (stalled & flees(last, speed, time))
    result = RESULTS.where(lost, RESULTS.diverged, result)
    start = norm(term.velocity(params, 0.0)) + loss(theta)
    result = RESULTS.where(jnp.isfinite(start), result, RESULTS.undefined_start)
    w = jnp.where(result == RESULTS.successful, w, end)
    endless = result == RESULTS.no_minimiser
    roots = term.chart.roots
    placed = thetas if roots is None else roots[None] * thetas
    direction = jnp.where(endless, limit_direction(placed), 0)
    direction = direction if roots is None else direction / roots
    margin = jnp.where(endless, smallest_margin(loss, direction), 0)
    return Limit(
        model=loss.model(w),
        residual=residual,
        time=time,
        result=result,
        stats=Stats.of(search.solver, out.counts, search.rtol, search.atol),
        direction=loss.model(direction),
        margin=margin,
    )


def _last(term: FlowTerm, params: PyTree, search: Search) -> Float[Array, ""]:
    """The time at which to give up."""
    dtype = jax.tree.leaves(params)[0].dtype
    if search.t_max is not None:
        return jnp.asarray(search.t_max, dtype)
    pace = timescale(term, params)
    pace = jnp.where(pace < jnp.inf, pace, 1)
    return (1e10 * jnp.clip(pace, 1, jnp.finfo(dtype).max ** 0.5)).astype(dtype)


@eqx.filter_jit
def _follow(
    term: FlowTerm,
    params: PyTree,
    form: AbstractForm,
    search: Search,
    before: Reached | None,
    steps: Int[Array, ""],
) -> tuple[Reached, Reached, Bool[Array, ""]]:
    """The flow until it has settled on M, or to the last of a few decades of time, with
    θ at each of them to see how it ends; or so many `steps` on from `before`. What is
    reached, twice, and whether that is all."""
    flat, theta = on_vector(term, params)
    last = _last(term, params, search)
    decades = last * 10.0 ** np.arange(-3, 1).astype(theta.dtype)
    kinked = loss_may_have_kinks(term, params)
    relative = Relative(
        search.rtol,
        search.atol,
        growth=False,
        kinked=kinked,
        roots=term.chart.roots,
    )
    integration = Integration(
        flat,
        search.solver,
        FollowGrowth(relative, flat),
        decades,
        jnp.zeros_like(last),
        search.max_steps,
        until=_settled(term, params, form),
    )
    if before is None:
        pace = timescale(flat, theta)
        before = integration.begin(theta, 1e-3 * jnp.minimum(pace, 1e-3 * last))
    at = integration.run(before, steps)
    over = at.stopped | (at.t >= last) | ~diffrax.is_successful(at.result)
    return at, at, over | (at.counts[0] >= search.max_steps)


def _distance(
    loss: FlatLoss, theta: Float[Array, " d"], form: AbstractForm, t: Float[Array, ""]
) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    """The distance to M, relative to ‖θ‖ and to first order; and whether θ is leaving
    what it is close to. By the exact rank, so that a flow at rest is seen to be at rest
    even where it does not interpolate."""
    normal = form.exact_normal(loss, theta, time=t)
    size = jnp.maximum(norm(theta), jnp.finfo(theta.dtype).tiny)
    return norm(normal.step) / size, jnp.asarray(normal.leaving)


def _finish(
    loss: FlatLoss,
    theta: Float[Array, " d"],
    form: AbstractForm,
    rtol: float | Scalar | None,
) -> tuple[Float[Array, " d"], Float[Array, ""], Bool[Array, ""]]:
    """The nearest point of M, its residual, and whether it is on M, and as near as it
    seemed to be: else it is not the limit."""
    w, residual, _, on_manifold = nearest(loss, theta, form, rtol)
    near = norm(w - theta) <= 10 * close(theta.dtype) * norm(theta)
    return w, residual, on_manifold & near


def _settled(term: FlowTerm, params: PyTree, form: AbstractForm):
    """A condition of t and θ as a vector: whether M is within ε‖θ‖, and not to be left
    again; or nothing is finite."""

    _, loss = flatten_on(term.loss, params, term.chart)

    def cond(t: Float[Array, ""], theta: Float[Array, " d"]) -> Bool[Array, ""]:
        force = norm(loss.gradient(theta))
        # Exponential convergence makes t‖∇F‖ small as well; while it is not, the normal
        # space need not be computed.
        hopeful = t * force <= 10 * close(theta.dtype) * norm(theta)

        def near():
            distance, leaving = _distance(loss, theta, form, t)
            return (distance <= close(theta.dtype)) & ~leaving

        settled = jax.lax.cond(hopeful, near, lambda: jnp.array(False))
        return settled | ~jnp.isfinite(force + norm(theta))

    return cond


def _grows_forever(
    thetas: Float[Array, "decades d"], losses: Float[Array, " decades"]
) -> Bool[Array, ""]:
    """Whether ‖θ‖ grew alike in each decade while the loss kept falling.

    ‖θ‖ ~ log t gives equal growth and ‖θ‖ ~ t^p a factor of 10^p < 3; an exponential
    that is still relaxing, however slow, gives 10 before its time and 0 after it.
    """
    # What was not reached is not finite.
    reached = jnp.all(jnp.isfinite(losses)) & jnp.all(jnp.isfinite(thetas))
    norms = jnp.linalg.norm(jnp.where(reached, thetas, 0), axis=1)
    losses = jnp.where(reached, losses, 0)
    growth = jnp.diff(norms)
    growing = jnp.all(growth > 0)
    ratios = growth[1:] / jnp.where(growing, growth[:-1], 1)
    alike = growing & jnp.all((ratios > 1 / 3) & (ratios < 3))
    return reached & alike & jnp.all(jnp.diff(losses) < 0)
