"""The Riemannian flow of the penalty on the critical manifold: the slow phase."""

from collections.abc import Callable

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from .._checks import check_arguments, check_given, is_concrete, resolvable
from .._norms import norm
from ..flow.flat import FlatLoss, flatten_on
from ..flow.flow import check_free, GradientFlow
from ..flow.term import FlowTerm
from ..losses import CrossEntropy
from ..margin_losses import Hinge
from ..metrics import Metric, without_thresholds
from ..precision import exact_products
from ..results import among, named_wrong, only_if_successful, RESULTS
from ..runs.integrate import Integration, Reached
from ..runs.outcome import recorded
from ..runs.problem import as_metrics, check_problem
from ..runs.progress import Bar
from ..runs.solve import Solve
from ..runs.stats import Stats
from ..runs.times import drift_times
from ..runs.windows import solve_through
from ..solvers import AbstractKKT, KKT5
from ..solvers.controllers import Relative
from ._normal import numerical_rank, weighted_jacobian
from .choice import Form
from .drift import Drift
from .forms import AbstractForm
from .jacobian_form import JacobianForm
from .retraction import retract_in_form
from .spectra import measure, Spectrum

# Rate, in slow time, at which errors normal to M are pulled back to it. None (0) lets
# them grow as 1/σ_min (1e-5 at σ_min = 1e-6); faster ones (4, 20) cost steps.
_PULL = 1.0


def _vanishing(dtype: np.dtype) -> float:
    """The part of the largest curvature below which one is not told from zero."""
    return 1e-13 if dtype == jnp.float64 else 1e-5


@exact_products
def riemannian_flow(
    flow: GradientFlow,
    model: PyTree,
    *,
    slow_time: float | Scalar,
    ts: Float[Array, " n"] | None = None,
    metrics: dict[str, Callable | Metric] | None = None,
    form: Form = "auto",
    rtol: float | Scalar = 1e-9,
    atol: float | Scalar | None = None,
    solver: diffrax.AbstractSolver | None = None,
    max_steps: int = 100_000,
    throw: bool = True,
    progress: bool = False,
) -> Drift:
    """w' = −P(w)∇R(w) on M, in slow time s = λt, from the model; w' = −P(w) G∇R(w) for
    a flow with `rates` G, P orthogonal in the metric G⁻¹.

    In the Jacobian form the default is the flow itself, by KKT5, at a weight decay of
    1e-14 times the largest curvature: w° to O(λ/η), at the price of any other path. (Of
    a `Hinge`, 1e-8 times that with all samples: samples join and leave the face of M
    that the path is on, which rounding is not to decide. And 1e-8 times it of a
    `CrossEntropy`, of soft labels, which leaves one logit of each sample free.)
    With another `solver` the equation above is integrated: P comes from the QR
    decomposition of Jᵀ, with a ridge of eps^⅔‖J‖ (4e-11 in float64) that lets the path
    run on where J loses rank, or from the eigenvectors of ∇²F in the Hessian form; and
    the term −J⁺r (or −(∇²F)⁺∇F) holds the path on M. Either way the integrator lands on
    the times it saves at, since interpolated points are not on M.

    **Arguments:**

    - `flow`: the gradient flow; its loss makes M, its penalty is R.
    - `model`: a model w(0) on M, such as the limit Φ(θ₀). It is moved to the nearest
        point of M first.
    - `slow_time`: the last slow time s.
    - `ts`: the slow times to save at, increasing, from 0 to `slow_time`; unless given,
        0 and 256 more, uniform in log(1 + s).
    - `metrics`: functions of a model to evaluate along the path.
    - `form`: `"jacobian"`, `"hessian"` or `"auto"`; see
        [`gradflow.manifold.retract`][].
    - `rtol`, `atol`: the tolerances; see [`gradflow.simulate`][].
    - `solver`: a Diffrax solver for the equation above, such as `diffrax.Dopri8()`,
        the default in the Hessian form.
    - `max_steps`: the most steps of the solver.
    - `throw`: whether to raise an error where the flow fails.
    - `progress`: show a progress bar (none while it is being traced).

    **Returns:** a [`gradflow.manifold.Drift`][]. Its `smallest_curvature` is η(s), the
    smallest normal curvature of F, that is the last of the singular values of
    (ℓ'')^½ J that count at w(0), squared: the two-phase theory holds for λ ≪ η. The
    `result` is `successful`; `not_critical` where
    `model` is not near M; `rank_lost` where η fell to what cannot be told from zero
    (1e-13 of the largest curvature; with `solver`, where the ridge alters P by more
    than 1000 `rtol`) or the path left M by more than 1000 `rtol`‖w‖; `out_of_steps` or
    `stalled`.

    **Raises:** `ValueError` for times that do not increase from 0 to `slow_time`, and
    other arguments that make no sense; `RuntimeError` where `throw` and the flow fails.

    Source: equation 6 of Boursier, Pesme, Dragomir, arXiv 2505.20172.
    """
    check_free(flow)
    wrong = check_arguments(
        slow_time=slow_time, rtol=rtol, max_steps=max_steps
    ) | check_given(atol=atol, solver=solver)
    if isinstance(solver, AbstractKKT):
        raise ValueError(
            "solver: KKT solvers are for the flow of a loss, not for the equation of "
            "the drift; leave it out, or give one of Diffrax's."
        )
    watched = as_metrics(metrics)
    term, params = flow.term(model)
    check_problem(term, params, watched)
    rtol = resolvable(rtol, params)
    times = drift_times(ts, slow_time, params)
    if wrong is not False:  # then nothing is run
        times = jnp.where(wrong, jnp.zeros_like(times), times)
    served, start = retract_in_form(term.loss, params, term.chart, form)
    _, params = flow.term(start.model)
    run = DriftRun(term, params, start.result, times, watched, rtol, atol, max_steps)
    with Bar("drift", shown=progress and _known(run)) as bar:
        if solver is None and served.interpolating:
            out = _vanishing_decay(run, bar)
        else:
            out = _drift(run, served, diffrax.Dopri8() if solver is None else solver)
    out = named_wrong(out, wrong, lambda d: (*recorded(d), d.smallest_curvature))
    if throw:
        out = only_if_successful(out, out.result)
    return out


class DriftRun(eqx.Module):
    """A drift that is asked for: see `riemannian_flow`."""

    term: FlowTerm
    params: PyTree
    """Those of w(0), on M."""
    start: RESULTS
    """Of the retraction to M."""
    times: Float[Array, " n"]
    """The slow times s to save at."""
    watched: dict[str, Metric]
    rtol: float | Scalar
    atol: float | Scalar | None
    max_steps: int


def _known(run: DriftRun) -> bool:
    """Whether nothing is being traced."""
    return all(map(is_concrete, jax.tree.leaves(eqx.filter(run, eqx.is_array))))


def _vanishing_decay(run: DriftRun, bar: Bar) -> Drift:
    """The flow at a λ at which its distance from w° is rounding."""
    rank, lam, ts = _vanishing_flow(run.term, run.params, run.times)
    one = Solve.of(
        run.term,
        run.params,
        lam,
        ts,
        without_thresholds(run.watched),
        KKT5(),
        rtol=run.rtol,
        atol=run.atol,
        max_steps=run.max_steps,
    )
    path = solve_through(one, bar)
    smallest, result = _told(run, path.params, path.result, rank, lam)
    return Drift(
        s=run.times,
        params=path.params,
        static=path.static,
        metrics=path.metrics,
        train_loss=path.train_loss,
        penalty=path.penalty,
        result=result,
        stats=path.stats,
        smallest_curvature=smallest,
        watched=run.watched,
    )


@eqx.filter_jit
def _vanishing_flow(
    term: FlowTerm, params: PyTree, times: Float[Array, " n"]
) -> tuple[Int[Array, ""], Float[Array, ""], Float[Array, " n"]]:
    """The rank of J, below m where data are redundant; a λ that vanishes beside the
    largest curvature; and the times t of these slow times."""
    w, loss = flatten_on(term.loss, params, term.chart)
    found = measure(loss, w, JacobianForm())
    coarse = float(jnp.finfo(times.dtype).eps) ** 0.5
    if isinstance(term.loss, Hinge):
        lam = coarse * term.loss.stiffness(loss.jacobian(w))
    elif isinstance(term.loss, CrossEntropy):
        # ℓ'' is singular: to add to all logits of a sample changes nothing. What λ does
        # not hold there rounding would move, and θ with it.
        lam = coarse * found.curvatures[0]
    else:
        lam = _vanishing(times.dtype) / 10 * found.curvatures[0]
    return found.rank, lam, times / lam


@eqx.filter_jit
def _told(
    run: DriftRun,
    path: PyTree,
    result: RESULTS,
    rank: Int[Array, ""],
    lam: Float[Array, ""],
) -> tuple[Float[Array, " n"], RESULTS]:
    """η along the path, and the result of the drift from that of the flow."""
    # Where samples join and leave the face that the path is on, rank changes too.
    known = None if isinstance(run.term.loss, Hinge) else rank
    smallest, largest, moved, size = _curvature_along(run.term, path, known)
    # The largest along the path: at a point where all of J vanishes no value is small
    # beside another.
    lost = jnp.any(smallest < _vanishing(run.times.dtype) * jnp.max(largest))
    # Where the path is off M, as at a cusp, it is no longer the flow on M either.
    off = 1000 * run.rtol * size
    if isinstance(run.term.loss, CrossEntropy):
        # A weight decay of this size holds it off M by (∇²F)⁺λ∇R.
        place, penalty = run.term.chart.state, run.term.penalty
        pull = jax.vmap(lambda p: norm(penalty.gradient(place(p))))(path)
        off = off + lam * pull / jnp.where(smallest > 0, smallest, 1)
    lost = lost | jnp.any(moved > off)
    # Of two reservations the loss of rank comes first: near it, where the iteration is
    # slow, smooth losses too can seem to slide.
    lost = lost & among(result, RESULTS.successful, RESULTS.slid)
    result = RESULTS.where(lost, RESULTS.rank_lost, result)
    result = RESULTS.where(run.start == RESULTS.successful, result, run.start)
    return smallest, result


def _curvature_along(
    term: FlowTerm, params: PyTree, known: Int[Array, ""] | None
) -> tuple[Float[Array, " n"], ...]:
    """Along a stack of points: the `known`-th eigenvalue of AAᵀ (that of the numerical
    rank unless given) and the largest, the distance ‖A⁺r‖ from M by those up to it, and
    ‖w‖. Rounding blurs an eigenvalue below eps of the largest, where rank has long been
    lost."""

    def at(p):
        w, loss = flatten_on(term.loss, term.chart.state(p), term.chart)
        a, r = weighted_jacobian(loss, w)
        values, vectors = jnp.linalg.eigh(a @ a.T)
        values, vectors = jnp.maximum(values[::-1], 0), vectors[:, ::-1]
        rank = numerical_rank(values, w.size).rank if known is None else known
        smallest = jnp.where(rank > 0, values[jnp.maximum(rank - 1, 0)], jnp.inf)
        counts = (jnp.arange(values.size) < rank) & (values > 0)
        along = jnp.where(counts, vectors.T @ r, 0)
        moved = norm(along / jnp.sqrt(jnp.where(counts, values, 1)))
        return smallest, values[0], moved, norm(w)

    return jax.lax.map(at, params)


@eqx.filter_jit
def _drift(run: DriftRun, form: AbstractForm, solver: diffrax.AbstractSolver) -> Drift:
    """The equation of the drift itself, by `solver`."""
    term, times = run.term, run.times
    w0, loss = flatten_on(term.loss, run.params, term.chart)
    spectrum = measure(loss, w0, form)
    out = _integrate(run, spectrum, solver)
    path = jnp.where(jnp.isfinite(out.saved), out.saved, jnp.nan)

    def record(w):
        model = loss.model(w)
        seen = {name: metric(model) for name, metric in run.watched.items()}
        size = term.penalty(loss.unravel(w))
        horizon = _horizon(loss, w, spectrum, run.rtol)
        return seen, loss(w), size, horizon

    # One at a time: a Jacobian for each of the saved points would fill the memory.
    seen, train_loss, penalty, (smallest, lost) = jax.lax.map(record, path)
    # Where all of ∇²F vanishes no curvature is small beside another there.
    vanished = smallest < _vanishing(w0.dtype) * spectrum.curvatures[0]
    lost = lost | vanished
    result = RESULTS.where(jnp.any(lost), RESULTS.rank_lost, RESULTS.successful)
    ran_out = out.t < times[-1]
    result = RESULTS.where(ran_out, RESULTS.out_of_steps, result)
    okay = diffrax.is_successful(out.result)
    result = RESULTS.where(okay, result, RESULTS.stalled)
    result = RESULTS.where(run.start == RESULTS.successful, result, run.start)
    return Drift(
        s=times,
        params=jax.vmap(lambda w: term.chart.place(loss.unravel(w)))(path),
        static=term.static,
        metrics=seen,
        train_loss=train_loss,
        penalty=penalty,
        result=result,
        stats=Stats.of(solver, out.counts, run.rtol, run.atol),
        smallest_curvature=smallest,
        watched=run.watched,
    )


def _integrate(
    run: DriftRun, spectrum: Spectrum, solver: diffrax.AbstractSolver
) -> Reached:
    """w as a vector at the slow times, from w(0) on; `spectrum` is that of w(0)."""
    term, times = run.term, run.times
    w0, loss = flatten_on(term.loss, run.params, term.chart)

    def field(s, w, args):
        normal = spectrum.source.normal(loss, w, spectrum.rank)
        force = ravel_pytree(term.penalty.gradient(loss.unravel(w)))[0]
        return _PULL * normal.step - normal.tangential(force)

    speed = norm(field(0.0, w0, None))
    first = jnp.where(speed > 0, norm(w0) / jnp.where(speed > 0, speed, 1), times[-1])
    first = jnp.where(first > 0, jnp.minimum(first, times[-1]), times[-1])
    integration = Integration(
        diffrax.ODETerm(field),
        solver,
        Relative(run.rtol, run.atol, roots=term.chart.roots),
        times,
        None,
        run.max_steps,
    )
    return integration.run(integration.begin(w0, 1e-3 * first))


def _horizon(
    loss: FlatLoss, w: Float[Array, " d"], spectrum: Spectrum, rtol: float | Scalar
) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    """The smallest normal curvature, and whether it is too small to tell the rank."""
    rank = spectrum.rank
    values, lowest = spectrum.source.told_curvatures(loss, w, rank, rtol)
    last = jnp.where(rank > 0, values[jnp.maximum(rank - 1, 0)], jnp.inf)
    return last, last < lowest
