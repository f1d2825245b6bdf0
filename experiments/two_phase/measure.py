"""What is measured for the rows, each function with those of the same name there.

Each takes a `Run` and returns numbers and arrays, by names.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray as xr
from scipy.interpolate import PchipInterpolator

import gradflow as gf

from ..shared.record import variables
from ..shared.rows import reason, relative
from .rows import balance_bound

Numbers = dict[str, Any]

SHOWN = {
    "fourier_diagonal": (1e-4, 1e5),
    "diagonal_network": (1e-4, 1e5),
    "matrix_completion": (1e-3, 2e4),
    "completion_rank3": (1e-3, 2e4),
}
"""The λ, and the time to which, tasks are run to be drawn; others: one of the sweep."""

SCALES = (0.01, 0.03, 0.1, 0.3, 1.0)


@dataclasses.dataclass(frozen=True)
class Run:
    """A task and its report; one long run at small λ, `rest`, and one to be drawn."""

    task: gf.tasks.Task
    name: str
    report: gf.Report
    saves: int
    rtol: float
    quick: bool = False
    rest: Any = None
    shown: Any = None

    @property
    def theory(self) -> gf.TwoPhase:
        return self.report.theory

    @property
    def sweep(self) -> gf.Sweep:
        return self.report.sweep

    def paths(
        self, lams: Sequence[float], ts: Any, model: Any = None, rtol: Any = None
    ) -> gf.Sweep:
        """Paths for some λ; compiled once for all of them."""
        return gf.sweep(
            self.task.flow, self.task.model if model is None else model,
            weight_decay=jnp.asarray(lams, float), ts=jnp.asarray(ts),
            metrics=self.task.metrics, solver=gf.KKT5(), rtol=rtol or self.rtol,
            progress=False,
        )  # fmt: skip

    def path(self, lam: float, t1: float, model: Any = None) -> gf.Path:
        """One to time t1."""
        return self.paths([lam], times(t1, self.saves), model)[0]


def all_of(parts: Mapping[str, Callable[..., Numbers]], *args: Any) -> xr.Dataset:
    """Every part, or the reason why it could not be measured: the others go on."""
    out = xr.Dataset()
    for name, part in parts.items():
        try:
            numbers = part(*args)
        except Exception as error:
            numbers = {"failed": reason(error)}
        out = out.merge(variables(f"{name}.", **numbers))
    return out


def parts(data: xr.Dataset) -> Iterator[tuple[str, SimpleNamespace | str]]:
    """What was measured, part by part, with the name of the task; or why it was not."""
    each: dict[str, dict[str, Any]] = {}
    for name in map(str, data):
        part, _, key = name.partition(".")
        if key:
            each.setdefault(part, {})[key] = data[name].values[()]
    for part, numbers in each.items():
        whole = SimpleNamespace(**numbers, task=data.attrs["task"])
        yield part, str(numbers["failed"]) if "failed" in numbers else whole


def of_task(name: str, make: Callable[..., gf.tasks.Task]) -> dict[str, Any]:
    """The parts of a task."""
    measured = [*THEORY, *OWN.get(name, ())]
    named = {part.__name__: part for part in measured}
    if name == "fourier_diagonal":
        named["initial_scale"] = lambda run: initial_scale(run, make)
    return named


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


def fast_phase(run: Run) -> Numbers:
    """sup ‖θ_λ − θ_GF‖ on a fixed interval of time."""
    known = run.report.memorised.predicted
    end = 10 * float(known[np.isfinite(known)].max(initial=0.0))
    end = end if end > 0 else float(run.theory.fast.t[-1])
    lams = run.report.weight_decay
    paths = run.paths([0.0, *lams], times(end, run.saves))
    plain = flat(paths[0].params)
    gaps = [np.linalg.norm(flat(p.params) - plain, axis=1).max() for p in paths]
    errors = np.array(gaps[1:]) / np.linalg.norm(plain[-1])
    return {"lams": lams, "errors": errors, "end": end, "rtol": run.rtol}


def slow_phase(run: Run) -> Numbers:
    """sup ‖θ_λ(s/λ) − w°(s)‖ on s ∈ [ε, regular]."""
    report = run.report
    slow = np.asarray(run.sweep.slow_time)
    ends = (report.drift.after, report.regular_until)
    inside = (slow >= ends[0]) & (slow <= ends[1])
    sup = np.where(inside, report.drift.error, 0.0).max(axis=1)
    # Both ends included, as saved times differ from lane to lane.
    for end in ends:
        lanes = zip(slow, report.drift.error, strict=True)
        sup = np.maximum(sup, [value_at(s, e, end) for s, e in lanes])
    lams = report.weight_decay
    return {
        "lams": lams,
        "errors": sup,
        "ends": ends,
        "rtol": run.rtol,
        "largest": lams[report.orders[1].rate.used].max(initial=0.0),
        "composite": report.orders[1].rate.exponent,
        "used": report.orders[1].rate.used.sum(),
    }


def derivative(run: Run) -> Numbers:
    """‖DΦ v − P v‖ at Φ(θ₀): the flow itself, run from points around it."""
    task, at, off = run.task, run.theory.limit, []
    for key in jr.split(jr.key(1), 1 if run.quick else 4):
        v = _direction(key, at)
        exact = vector(gf.manifold.tangent_projection(task.loss, at, v))
        off.append(np.linalg.norm(_derivative(task, at, v) - exact))
    spectrum, known = run.theory.spectrum, task.codimension
    return {
        "off": np.where(np.isfinite(off), off, np.inf),
        "rank": spectrum.rank,
        "ambiguous": spectrum.ambiguous,
        "codimension": -1 if known is None else known,
    }


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


def matching(run: Run) -> Numbers:
    """‖θ_λ(t(λ)) − Φ‖/‖Φ‖ at t(λ) = −ln λ/2c, between the phases, for falling λ."""
    c = float(run.theory.spectrum.smallest_curvature)
    limit = vector(run.theory.limit)
    lams = np.sort(run.report.weight_decay)[::-1]
    lams = lams[lams < 0.1]
    if len(lams) < 3:
        return {"off": np.zeros(len(lams)), "c": c}
    end = lambda lam: flat(run.path(lam, -np.log(lam) / (2 * c)).params)[-1]
    return {"off": [relative(end(lam), limit) for lam in lams], "c": c}


def limits(run: Run) -> Numbers:
    """Where a run at small λ ends: apart from Φ(θ₀), and how much of it is tangent."""
    lam, kkt, path = float(run.rest.weight_decay), np.inf, run.rest
    # On to ever longer times, until the drift has come to rest.
    for s in (float(run.rest.slow_time[-1]), 200.0, 2000.0):
        if s > float(path.slow_time[-1]):
            path = run.path(lam, s / lam)
        end = path[-1]
        force = gf.manifold.tangent_projection(run.task.loss, end, end)
        kkt = np.linalg.norm(vector(force)) / np.linalg.norm(vector(end))
        if kkt <= 1e-4:
            break
    apart = relative(vector(end), vector(run.theory.limit))
    return {"apart": apart, "kkt": kkt, "lam": lam, "s": s}


def widths(run: Run) -> Numbers:
    """Widths in ln t of the drop and of the plateau before it, for each λ."""
    report, drift = run.report, run.theory.drift
    name, curve = "test loss", np.asarray(drift.metrics["test"])
    values = np.asarray(run.sweep.metrics["test"])
    if np.any(np.diff(curve) > 1e-9 * curve[0]):
        name, curve = "penalty", np.asarray(drift.penalty)
        values = np.asarray(run.sweep.penalty)
    used = np.flatnonzero(report.orders[1].rate.used)
    levels = curve[0] - np.array([0.1, 0.9]) * (curve[0] - curve[-1])
    drops, plateaus = [], []
    for i in used:
        t = np.asarray(run.sweep.t[i])
        # From a tenth of the drift's beginning on: the fast phase crosses levels too.
        late = np.asarray(run.sweep.slow_time[i]) >= 1e-3
        begin, end = (first_below(t[late], values[i][late], x) for x in levels)
        drops.append(np.log(end / begin))
        plateaus.append(np.log(begin / report.memorised.measured[i]))
    lams = report.weight_decay[used]
    return {"what": name, "lams": lams, "drops": drops, "plateaus": plateaus}


def onset(run: Run) -> Numbers:
    """t_WD/t_GF, from when on weight decay rules, for each λ; and λ‖Φ‖/‖∇F(θ₀)‖."""
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
    return {"ratios": ratios, "criteria": criteria}


@eqx.filter_jit
def _forces(flow: gf.GradientFlow, params: Any, static: Any):
    def at(p):
        v = flow.velocity(eqx.combine(p, static), 0.0)
        return jnp.sqrt(sum(jnp.sum(x * x) for x in jax.tree.leaves(v)))

    return jax.lax.map(at, params)


def invariant(run: Run) -> Numbers:
    """The balance law: what decays as e^{−2λt}, whatever the data."""
    lam, bound = float(run.shown.weight_decay), balance_bound(run.name)
    rtol = min(run.rtol, 0.1 * bound)
    tight = run.paths([lam], run.shown.t, rtol=rtol)[0]
    off, usual = balance(run.task, tight), balance(run.task, run.shown)
    return {"off": off, "usual": usual, "lam": lam, "rtol": rtol, "own": run.rtol}


def balance(task: gf.tasks.Task, path: gf.Path) -> float:
    deltas = flat(_invariants(task, path.params, path.static))
    decay = np.exp(-2 * np.asarray(path.slow_time))[:, None]
    off = np.linalg.norm(deltas - decay * deltas[0], axis=1)
    return float(off.max() / np.linalg.norm(deltas[0]))


@eqx.filter_jit
def _invariants(task: gf.tasks.Task, params: Any, static: Any) -> Any:
    return jax.lax.map(lambda p: task.truth.invariant(eqx.combine(p, static)), params)


def end_point(run: Run) -> Numbers:
    """Where the drift ends, against a convex program; NaN without CVXPY."""
    truth, end = run.task.truth, run.rest
    try:
        off = relative(truth.coefficients(end[-1]), truth.end_point())
    except ImportError:
        off = np.nan
    return {"off": off, "lam": end.weight_decay, "s": end.slow_time[-1]}


def linear(run: Run) -> Numbers:
    """Linear regression against its closed form."""
    truth, worst = run.task.truth, 0.0
    for path in run.sweep:
        exact = np.asarray(truth.path(path.t, path.weight_decay))
        off = np.linalg.norm(flat(path.params) - exact, axis=1)
        worst = max(worst, float((off / np.linalg.norm(exact, axis=1)).max()))
    unit = np.asarray(truth.kernel_part / jnp.linalg.norm(truth.kernel_part))
    slopes = []
    for lam in (1e-2, 1e-3, 1e-4):
        path = run.path(lam, 5 / lam)
        slope = np.polyfit(np.asarray(path.t), np.log(flat(path.params) @ unit), 1)[0]
        slopes.append(abs(slope + lam))
    return {"off": worst, "slopes": slopes}


def fourier(run: Run) -> Numbers:
    """The paper's figure 4, at λ = 1e-4 and to t = 1e5."""
    path = run.shown
    train = value_at(np.asarray(path.t), np.asarray(path.train_loss), 1e2)
    off = relative(path[-1].beta, run.task.truth.end_point())
    return {"train": train, "off": off}


def completion(run: Run) -> Numbers:
    """The paper's figure 2, at λ = 1e-3 and to t = 2e4."""
    path, truth = run.shown, run.task.truth
    t, lam = np.asarray(path.t), float(path.weight_decay)
    test = value_at(t, np.asarray(path.metrics["test"]), 0.1 / lam)
    rank = int(np.linalg.matrix_rank(np.asarray(truth.target)))
    shares = []
    for at in (10 / lam, 20 / lam):
        model = path[int(np.argmin(np.abs(np.log(t[1:] / at)))) + 1]
        values = np.linalg.svd(np.asarray(model.matrix), compute_uv=False)
        shares.append(values[rank] / values[0])
    try:
        off = relative(path[-1].matrix, np.asarray(truth.end_point()))
        exact = float(truth.recovers_target())
    except ImportError:
        off = exact = np.nan
    return {
        "train": value_at(t, np.asarray(path.train_loss), 3.0),
        "test": test / float(run.theory.drift.metrics["test"][0]) - 1,
        "rank": rank,
        "shares": shares,
        "off": off,
        "exact": exact,
        "ends": (10 / lam, 20 / lam, t[-1]),
    }


def initial_scale(run: Run, make: Callable[..., gf.tasks.Task]) -> Numbers:
    """‖Φ‖² from several initial scales, and how much of it the drift takes away."""
    lam, sizes, drops = 1e-4, [], []
    for scale in SCALES:
        model = make(init_scale=scale).model
        limit = gf.manifold.limit_map(run.task.loss, model, throw=False)
        sizes.append(np.linalg.norm(vector(limit.model)) ** 2)
        path = run.path(lam, 10 / lam, model)
        drops.append(1 - 2 * float(path.penalty[-1]) / sizes[-1])
    return {"scales": SCALES, "sizes": sizes, "drops": drops}


def relu(task: gf.tasks.Task, path: gf.Path, wanted: float) -> Numbers:
    """The paper's figure 3, outside the theory."""
    t, train, size = (np.asarray(x) for x in (path.t, path.train_loss, path.penalty))
    plateau = value_at(t, size, 1.0)
    late = np.concatenate([t[:1], t[t >= 1.0]])
    begins = first_below(late, np.append(plateau, size[t >= 1.0]), 0.9 * plateau)
    return {
        "end": t[-1],
        "wanted": wanted,
        "steps": path.stats.steps,
        "lam": path.weight_decay,
        "fitted": first_below(t, train / train[0], 0.1),
        "begins": begins,
        "kinks": [count_kinks(task, path[i]) for i in (0, len(path) - 1)],
        "balance": balance(task, path),
    }


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


THEORY = (fast_phase, slow_phase, derivative, matching, limits, widths, onset)
OWN = {
    "linear_regression": (linear, end_point),
    "diagonal_network": (end_point, invariant),
    "fourier_diagonal": (end_point, fourier, invariant),
    "matrix_completion": (end_point, completion, invariant),
    "completion_rank3": (end_point, completion, invariant),
    "deep_linear": (end_point, invariant),
}
