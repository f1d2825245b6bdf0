"""The checks of `two_phase.py`: what the theory says, as numbers with bounds.

Each function takes a `Run` and returns rows. Their names are those of the settings and
claims of Boursier, Pesme, Dragomir, arXiv 2505.20172.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from scipy.interpolate import PchipInterpolator

import gradflow as gf
from gradflow.compare import fit_rate

from ..shared.common import below, near, relative, Row


@dataclasses.dataclass(frozen=True)
class Run:
    """A task, its prediction, its sweep, and one long run at small λ."""

    task: gf.tasks.Task
    theory: gf.TwoPhase
    sweep: gf.Sweep
    report: gf.Report
    rest: gf.Path
    saves: int
    rtol: float
    quick: bool = False

    def paths(self, weight_decay: Sequence[float], t1: float, model: Any = None):
        """Paths to time t1 for some λ; compiled once for all of them."""
        model = self.task.model if model is None else model
        return run_paths(
            self.task, model, weight_decay, times(t1, self.saves), self.rtol
        )


def run_paths(task, model, weight_decay, ts, rtol) -> gf.Sweep:
    return gf.sweep(
        task.flow,
        model,
        weight_decay=jnp.asarray(weight_decay, float),
        ts=jnp.asarray(ts),
        metrics=task.metrics,
        solver=gf.KKT5(),
        rtol=rtol,
        progress=False,
    )


def times(t1: float, saves: int) -> np.ndarray:
    """0, and then evenly in log t up to t1."""
    first = min(1e-3, 1e-4 * t1)
    return np.concatenate([[0.0], np.geomspace(first, t1, saves - 1)])


def flat(params: Any) -> np.ndarray:
    """Stacked parameters as one matrix, a row for each time."""
    leaves = [np.asarray(p) for p in jax.tree.leaves(params)]
    return np.concatenate([p.reshape(p.shape[0], -1) for p in leaves], axis=1)


def vector(model: Any) -> np.ndarray:
    leaves = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    return np.concatenate([np.asarray(p).ravel() for p in leaves])


def value_at(t: np.ndarray, values: np.ndarray, at: float) -> float:
    """A positive quantity between saved times, smooth in log t."""
    where = np.asarray(t) > 0
    curve = PchipInterpolator(np.log(t[where]), np.log(values[where]))
    return float(np.exp(curve(np.log(at))))


def first_below(t: np.ndarray, values: np.ndarray, level: float) -> float:
    """The first time at which `values` is at most `level`, smooth in log t."""
    low = np.flatnonzero(values <= level)
    if low.size == 0 or low[0] < 2:
        return np.nan
    x = np.log(t[1:])
    fine = np.linspace(x[low[0] - 2], x[low[0] - 1], 2001)
    dense = PchipInterpolator(x, values[1:])(fine)
    return float(np.exp(fine[np.argmax(dense <= level)]))


def fast_phase(run: Run) -> list[Row]:
    """Proposition 1: θ_λ → θ_GF on a fixed interval of time."""
    times = run.report.predicted_memorisation_time
    end = 10 * float(times[np.isfinite(times)].max(initial=0.0))
    end = end if end > 0 else float(run.theory.fast.t[-1])
    lams = run.report.weight_decay
    paths = run.paths([0.0, *lams], end)
    plain = flat(paths[0].params)
    gaps = [np.linalg.norm(flat(p.params) - plain, axis=1).max() for p in paths]
    errors = np.array(gaps[1:]) / np.linalg.norm(plain[-1])
    rate = fit_rate(lams, errors, 0.1 / end, 10 * run.rtol)
    ok = bool(rate.exponent >= 0.95)
    sentence = f"fast phase: sup over [0, {end:.3g}] of ‖θ_λ − θ_GF‖ ~ λ^p"
    return [Row("P1-P1", rate.exponent, "≥ 0.95", ok, sentence)]


def slow_phase(run: Run) -> list[Row]:
    """Proposition 2: θ_λ(s/λ) → w°(s), uniformly on s ∈ [ε, regular]."""
    report = run.report
    slow = np.asarray(run.sweep.slow_time)
    inside = (slow >= report.after) & (slow <= report.regular_until)
    sup = np.where(inside, report.drift_error, 0.0).max(axis=1)
    # Both ends included, as saved times differ from lane to lane.
    for end in (report.after, report.regular_until):
        lanes = zip(slow, report.drift_error, strict=True)
        at = [value_at(s, e, end) for s, e in lanes]
        sup = np.maximum(sup, at)
    lams = report.weight_decay
    largest = lams[report.rate.used].max(initial=0.0)
    rate = fit_rate(lams, sup, largest, 10 * run.rtol)
    sentence = (
        f"drift: sup over s ∈ [{report.after:g}, {report.regular_until:.2g}] of "
        "‖θ_λ(s/λ) − w°(s)‖ ~ λ^p"
    )
    composite = "composite prediction from t = 0 on: error ~ λ^p"
    return [
        near("P1-P2", rate.exponent, 1.0, 0.1, sentence),
        near("P1-P2", report.rate.exponent, 1.0, 0.1, composite),
    ]


def derivative(run: Run) -> list[Row]:
    """DΦ = P on M: the flow itself, run from points around Φ(θ₀)."""
    task, at = run.task, run.theory.limit
    worst = 0.0
    for key in jr.split(jr.key(1), 1 if run.quick else 4):
        v = _direction(key, at)
        exact = vector(gf.manifold.tangent_projection(task.loss, at, v))
        off = np.linalg.norm(_derivative(task, at, v) - exact)
        worst = max(worst, off if np.isfinite(off) else np.inf)
    sentence = "‖DΦ v − P v‖ at Φ(θ₀), random directions v, ‖v‖ = 1"
    rows = [below("P1-DΦ", worst, 1e-6, sentence)]
    if task.codimension is not None:
        rank = int(run.theory.spectrum.rank)
        ok = rank == task.codimension and not bool(run.theory.spectrum.ambiguous)
        sentence = "rank of ∇²F at Φ(θ₀), the codimension of the manifold"
        rows.append(Row("P1-DΦ", rank, f"= {task.codimension}", ok, sentence))
    return rows


def _direction(key: Any, model: Any) -> Any:
    """A random unit vector, as a pytree like the parameters."""
    leaves, structure = jax.tree.flatten(eqx.filter(model, eqx.is_inexact_array))
    keys = jr.split(key, len(leaves))
    v = [jr.normal(k, p.shape) for k, p in zip(keys, leaves, strict=True)]
    size = float(np.sqrt(sum(np.sum(np.square(x)) for x in v)))
    return jax.tree.unflatten(structure, [x / size for x in v])


def _derivative(task: gf.tasks.Task, at: Any, v: Any) -> np.ndarray:
    """DΦ v by central differences, extrapolated: the error is O(h⁴)."""
    params, static = eqx.partition(at, eqx.is_inexact_array)
    size = float(np.linalg.norm(vector(at)))

    def limit(step):
        moved = jax.tree.map(lambda p, d: p + step * size * d, params, v)
        out = gf.manifold.limit_map(
            task.loss, eqx.combine(moved, static), rtol=1e-11, throw=False
        )
        okay = bool(out.result == gf.RESULTS.successful)
        return vector(out.model) if okay else np.nan

    central = lambda h: (limit(h) - limit(-h)) / (2 * h * size)
    return (4 * central(2e-3) - central(4e-3)) / 3


def matching(run: Run) -> list[Row]:
    """Lemma 2: at t(λ) = −ln λ/2c, between the phases, θ_λ is at Φ(θ₀)."""
    c = float(run.theory.spectrum.smallest_curvature)
    limit = vector(run.theory.limit)
    lams = np.sort(run.report.weight_decay)[::-1]
    lams = lams[lams < 0.1]
    if len(lams) < 3:
        return [Row("P1-M", np.nan, "", None, "a trend needs three λ below 0.1")]
    off = [
        relative(flat(run.paths([lam], -np.log(lam) / (2 * c))[0].params)[-1], limit)
        for lam in lams
    ]
    ok = bool(np.all(np.diff(off) < 0))
    sentence = (
        f"‖θ_λ(t(λ)) − Φ‖/‖Φ‖ falls monotonically as λ → 0, t(λ) = −ln λ/2c, "
        f"c = η = {c:.2g}: " + ", ".join(f"{x:.1e}" for x in off)
    )
    return [Row("P1-M", off[-1], "monotone", ok, sentence)]


def limits(run: Run) -> list[Row]:
    """Propositions 3, 4: the limits λ → 0 and t → ∞ do not commute."""
    lam, kkt, path = float(run.rest.weight_decay), np.inf, run.rest
    # On to ever longer times, until the drift has come to rest.
    for s in (float(run.rest.slow_time[-1]), 200.0, 2000.0):
        if s > float(path.slow_time[-1]):
            path = run.paths([lam], s / lam)[0]
        end = path[-1]
        force = gf.manifold.tangent_projection(run.task.loss, end, end)
        kkt = np.linalg.norm(vector(force)) / np.linalg.norm(vector(end))
        if kkt <= 1e-4:
            break
    differ = relative(vector(end), vector(run.theory.limit))
    where = f"at λ = {lam:.0e}, s = {s:g}"
    return [
        Row(
            "P1-L",
            differ,
            "≥ 1e-02",
            differ >= 1e-2,
            f"the limits do not commute: ‖θ_λ(∞) − Φ‖/‖Φ‖, {where}",
        ),
        below("P1-L", kkt, 1e-4, f"θ_λ(∞) is a KKT point: ‖P w‖/‖w‖, {where}"),
    ]


def widths(run: Run) -> list[Row]:
    """The drop is as wide in log t for all λ; the plateau before it grows as 1/λ."""
    report, drift = run.report, run.theory.drift
    name, curve = "test loss", np.asarray(drift.metrics["test"])
    values = np.asarray(run.sweep.metrics["test"])
    if np.any(np.diff(curve) > 1e-9 * curve[0]):
        name, curve = "penalty", np.asarray(drift.penalty)
        values = np.asarray(run.sweep.penalty)
    used = np.flatnonzero(report.rate.used)
    levels = curve[0] - np.array([0.1, 0.9]) * (curve[0] - curve[-1])
    drops, plateaus = [], []
    for i in used:
        t = np.asarray(run.sweep.t[i])
        # From a tenth of the drift's beginning on: the fast phase crosses levels too.
        late = np.asarray(run.sweep.slow_time[i]) >= 1e-3
        begin, end = (first_below(t[late], values[i][late], x) for x in levels)
        drops.append(np.log(end / begin))
        plateaus.append(np.log(begin / report.memorisation_time[i]))
    drops, plateaus = np.array(drops), np.array(plateaus)
    x = np.log(1 / report.weight_decay[used])
    if len(used) < 2 or not np.isfinite([*drops, *plateaus]).all():
        return [Row("P1-T", np.nan, "", None, "widths: too few λ show a whole drop")]
    spread = np.abs(drops / drops.mean() - 1).max()
    slope = np.polyfit(x, plateaus, 1)[0]
    return [
        below(
            "P1-T",
            spread,
            0.05,
            f"width of the {name}'s drop (10 % to 90 %) in ln t is {drops.mean():.3f} "
            "for every λ; largest deviation",
        ),
        near("P1-T", slope, 1.0, 0.05, "width of the plateau in ln t, against ln 1/λ"),
    ]


def onset(run: Run) -> list[Row]:
    """Appendix E: grokking needs λ‖w‖ ≪ ‖∇F(θ₀)‖."""
    flow, fast = run.task.flow, run.theory.fast
    force = np.asarray(_forces(flow, fast.params, fast.static))
    fitted = first_below(np.asarray(fast.t), force, 0.01 * force[0])
    size = np.linalg.norm(vector(run.theory.limit))
    ratios, criteria = [], []
    for path in run.sweep:
        lam = float(path.weight_decay)
        pull = lam * np.sqrt(2 * np.asarray(path.penalty))
        force_here = np.asarray(_forces(flow, path.params, path.static))
        begins = first_below(np.asarray(path.t), force_here / pull, 1.0)
        ratios.append(begins / fitted)
        criteria.append(lam * size / force[0])
    order = np.argsort(criteria)
    ratios = np.array(ratios)[order]
    if len(ratios) < 3:
        return [Row("P1-H", np.nan, "", None, "a trend needs three λ")]
    if not np.isfinite(ratios).all():
        return [Row("P1-H", np.nan, "", None, "heuristic: weight decay rules at once")]
    ok = bool(np.all(np.diff(ratios) < 0))
    sentence = "t_WD/t_GF at the least λ; it falls as λ‖Φ‖/‖∇F(θ₀)‖ grows, for all λ"
    return [Row("P1-H", ratios[0], "monotone", ok, sentence)]


@eqx.filter_jit
def _forces(flow: gf.GradientFlow, params: Any, static: Any):
    def at(p):
        v = flow.velocity(eqx.combine(p, static), 0.0)
        return jnp.sqrt(sum(jnp.sum(x * x) for x in jax.tree.leaves(v)))

    return jax.lax.map(at, params)


def invariant(run: Run, path: gf.Path, name: str, bound: float) -> list[Row]:
    """The balance law: what decays as e^{−2λt}, whatever the data."""
    lam, rtol = float(path.weight_decay), min(run.rtol, 0.1 * bound)
    tight = run_paths(run.task, run.task.model, [lam], path.t, rtol)[0]
    worst, usual = balance(run.task, tight), balance(run.task, path)
    sentence = (
        f"balance law Δ(t) = Δ(0) e^(−2λt), λ = {lam:.0e}: error/‖Δ(0)‖ at "
        f"rtol {rtol:.0e} ({usual:.1e} at {run.rtol:.0e})"
    )
    return [below(name, worst, bound, sentence)]


def balance(task: gf.tasks.Task, path: gf.Path) -> float:
    deltas = _invariants(task, path.params, path.static)
    deltas = flat(deltas)
    decay = np.exp(-2 * np.asarray(path.slow_time))[:, None]
    off = np.linalg.norm(deltas - decay * deltas[0], axis=1)
    return float(off.max() / np.linalg.norm(deltas[0]))


@eqx.filter_jit
def _invariants(task: gf.tasks.Task, params: Any, static: Any) -> Any:
    return jax.lax.map(lambda p: task.truth.invariant(eqx.combine(p, static)), params)


def end_point(run: Run, bound: float) -> list[Row]:
    """Where the drift ends, against an independent convex program."""
    truth = run.task.truth
    what = {
        "DiagonalTruth": "least ℓ1 norm (linear program)",
        "CompletionTruth": "least nuclear norm (CVXPY)",
    }.get(type(truth).__name__, "least norm (closed form)")
    lam, s = float(run.rest.weight_decay), float(run.rest.slow_time[-1])
    sentence = f"end of the run at λ = {lam:.0e}, s = {s:g}, against the {what}"
    try:
        oracle = truth.end_point()
    except ImportError:
        return [Row("end point", np.nan, f"≤ {bound:.0e}", None, sentence)]
    off = relative(truth.coefficients(run.rest[-1]), oracle)
    return [below("end point", off, bound, sentence)]


def linear(run: Run) -> list[Row]:
    """P1-E1: linear regression against its closed form."""
    truth = run.task.truth
    worst = 0.0
    for path in run.sweep:
        exact = np.asarray(truth.path(path.t, path.weight_decay))
        off = np.linalg.norm(flat(path.params) - exact, axis=1)
        worst = max(worst, float((off / np.linalg.norm(exact, axis=1)).max()))
    unit = np.asarray(truth.kernel_part / jnp.linalg.norm(truth.kernel_part))
    slopes = []
    for lam in (1e-2, 1e-3, 1e-4):
        path = run.paths([lam], 5 / lam)[0]
        slope = np.polyfit(np.asarray(path.t), np.log(flat(path.params) @ unit), 1)[0]
        slopes.append(abs(slope + lam))
    sentence = "closed form: largest relative error over all λ and t"
    return [
        below("P1-E1", worst, 1e-8, sentence),
        below("P1-E1", max(slopes), 1e-6, "part in ker X decays at the rate λ: error"),
    ]


def fourier(run: Run, path: gf.Path) -> list[Row]:
    """P1-E4: the paper's figure 4, at λ = 1e-4 and to t = 1e5."""
    train = value_at(np.asarray(path.t), np.asarray(path.train_loss), 1e2)
    off = relative(path[-1].beta, run.task.truth.end_point())
    return [
        below("P1-E4", train, 1e-7, "train loss at t = 100, λ = 1e-4"),
        below("P1-E4", off, 1e-3, "β(t = 1e5), λ = 1e-4, against the least ℓ1 norm"),
        *invariant(run, path, "P1-E4", 1e-10),
    ]


def completion(run: Run, path: gf.Path) -> list[Row]:
    """P1-E2: the paper's figure 2, at λ = 1e-3 and to t = 2e4."""
    t, truth = np.asarray(path.t), run.task.truth
    lam = float(path.weight_decay)
    train = value_at(t, np.asarray(path.train_loss), 3.0)
    test = value_at(t, np.asarray(path.metrics["test"]), 0.1 / lam)
    plateau = float(run.theory.drift.metrics["test"][0])
    rank = int(np.linalg.matrix_rank(np.asarray(truth.target)))
    rows = [
        below("P1-E2", train, 1e-4, "train loss at t = 3, λ = 1e-3"),
        below(
            "P1-E2",
            abs(test / plateau - 1),
            0.2,
            "test loss at t = 0.1/λ, relative difference from its plateau",
        ),
    ]
    try:
        oracle = np.asarray(truth.end_point())
        exact = truth.recovers_target()
    except ImportError:
        return [*rows, Row("P1-E2", np.nan, "", None, "CVXPY missing: no oracle")]
    if exact:
        for at, bound in ((10 / lam, 0.02), (20 / lam, 0.01)):
            model = path[int(np.argmin(np.abs(np.log(t[1:] / at)))) + 1]
            values = np.linalg.svd(np.asarray(model.matrix), compute_uv=False)
            sentence = f"singular value {rank + 1} over the first at t = {at:.0e}"
            rows.append(below("P1-E2", values[rank] / values[0], bound, sentence))
    else:
        sentence = "the least nuclear norm is not the target here: rank not checked"
        rows.append(Row("P1-E2", np.nan, "", None, sentence))
    off = relative(path[-1].matrix, oracle)
    sentence = f"UVᵀ at t = {t[-1]:.0e}, λ = 1e-3, against the least nuclear norm"
    return [*rows, below("P1-E2", off, 1e-2, sentence)] + invariant(
        run, path, "P1-E2", 1e-6
    )


def initial_scale(run: Run, make: Callable[[float], gf.tasks.Task]) -> list[Row]:
    """Small initial weights leave nothing for the second phase to do."""
    lam, scales = 1e-4, (0.01, 0.03, 0.1, 0.3, 1.0)
    sizes, drops = [], []
    for scale in scales:
        model = make(scale).model
        limit = gf.manifold.limit_map(run.task.loss, model, throw=False)
        size = np.linalg.norm(vector(limit.model)) ** 2
        path = run.paths([lam], 10 / lam, model)[0]
        sizes.append(size)
        drops.append(1 - 2 * float(path.penalty[-1]) / size)
    pairs = lambda values: ", ".join(
        f"{v:.3g} at {s:g}" for s, v in zip(scales, values, strict=True)
    )
    monotone = bool(np.all(np.diff(sizes) > 0))
    return [
        Row("P1-S", sizes[0], "monotone", monotone, f"‖Φ‖² by scale: {pairs(sizes)}"),
        below(
            "P1-S",
            drops[0],
            0.05,
            f"fall of ‖θ‖² after the fast phase, by scale: {pairs(drops)}",
        ),
    ]


def relu(task: gf.tasks.Task, path: gf.Path) -> list[Row]:
    """P1-E3: the paper's figure 3, outside the theory."""
    lam, last = float(path.weight_decay), len(path) - 1
    t, train, size = (np.asarray(x) for x in (path.t, path.train_loss, path.penalty))
    fitted = first_below(t, train / train[0], 0.1)
    plateau = value_at(t, size, 1.0)
    late = np.concatenate([t[:1], t[t >= 1.0]])
    begins = first_below(late, np.append(plateau, size[t >= 1.0]), 0.9 * plateau)
    before, after = (count_kinks(task, path[i]) for i in (0, last))
    end = f"s = {lam * t[last]:.2g}"
    law = balance(task, path)
    return [
        below("P1-E3", fitted, 1.0, "time at which the train loss is a tenth"),
        Row(
            "P1-E3",
            begins * lam,
            "0.05 to 2",
            bool(0.05 <= begins * lam <= 2),
            "λ · (time at which ‖θ‖² has fallen by 10 %)",
        ),
        Row(
            "P1-E3",
            after,
            f"< {before}",
            after < before,
            f"kinks of the function, {before} at first, at {end}",
        ),
        below("P1-E3", law, 1e-3, f"balance law to {end}: error/‖Δ(0)‖"),
    ]


def count_kinks(task: gf.tasks.Task, model: Any, apart: float = 0.04) -> int:
    """How many bends the function has on [−2, 2]: kinks nearer than `apart` are one,
    and those below a thousandth of the largest are none."""
    kinks = task.truth.kinks(model)
    x, jump = np.asarray(kinks.positions), np.asarray(kinks.jumps)
    inside = np.isfinite(x) & (np.abs(x) <= 2)
    order = np.argsort(x[inside])
    x, jump = x[inside][order], jump[inside][order]
    if x.size == 0:
        return 0
    groups = np.concatenate([[0], np.cumsum(np.diff(x) > apart)])
    total = np.abs(np.bincount(groups, jump))
    return int(np.sum(total > 1e-3 * total.max()))


THEORY_ROWS = (fast_phase, slow_phase, derivative, matching, limits, widths, onset)
