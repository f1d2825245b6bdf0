"""The errors that a path and its times tell of themselves, against exact ones.

The sample is larger by hand, or for another seed:

    python tests/test_errors.py --seed 3 --runs 300
"""

import argparse
import collections
import dataclasses

from conftest import drop_programs  # before JAX, which reads what it sets

# isort: split
import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import compiled, Diagonal, Linear
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from numpy.testing import assert_array_equal
from scipy.integrate import solve_ivp
from scipy.optimize import brentq

import gradflow as gf
from gradflow.sweeps.result import lane_error

SOLVERS = (gf.KKT4(), gf.KKT5(), gf.RKC2(), diffrax.Tsit5())


def right(estimate, true, rounding):
    """Whether an estimate is within [1/2, 2] of an error, where that is above
    rounding."""
    estimate, true, rounding = np.broadcast_arrays(estimate, true, rounding)
    known = np.abs(true) > rounding
    ratio = estimate[known] / true[known]
    return (ratio >= 0.5) & (ratio <= 2)


# -- closed forms ---

X = jnp.array([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]])
Y = jnp.array([1.0, 2.0])
START = np.array([0.5, 1.0, 3.0])
LAM = 0.02
TS = np.array([0.0, 0.3, 1.0, 4.0, 15.0, 60.0])


def first(model):
    return model.w[0] ** 2


# It rises to 1.1 until t = 15, and then decays.
WATCH = {
    "low": gf.Metric(first, threshold=0.7),
    "high": gf.Metric(first, threshold=0.5, higher_is_better=True),
    "w": gf.Metric(lambda model: model.w),
}


def regression(t):
    """The exact θ(t), by the eigenvectors of the Hessian."""
    x, y = np.asarray(X), np.asarray(Y)
    hessian = x.T @ x / 2 + LAM * np.eye(3)
    rates, modes = np.linalg.eigh(hessian)
    rest = np.linalg.solve(hessian, x.T @ y / 2)
    return rest + modes @ (np.exp(-rates * t) * (modes.T @ (START - rest)))


def passing(level, a, b):
    return brentq(lambda t: regression(t)[0] ** 2 - level, a, b, xtol=1e-13)


def run(solver, simulate=gf.simulate, **options):
    flow = gf.GradientFlow(gf.SquaredError(X, Y))
    usual = dict(weight_decay=LAM, ts=jnp.asarray(TS), rtol=1e-4, metrics=WATCH)
    model = Linear(jnp.asarray(START))
    return simulate(flow, model, solver=solver, **usual | options)


@pytest.mark.parametrize("solver", [gf.KKT4(), gf.RKC2()])
def test_linear_regression(solver):
    path = run(solver)
    with compiled() as programs:
        estimate = path.error("w")
        others = [path.error(name) for name in ("low", "train_loss", "penalty")]
    assert not programs
    exact = np.stack([regression(t) for t in TS])
    assert right(estimate, path.params.w - exact, 1e-13).all()
    gap = np.asarray(X) @ exact.T - np.asarray(Y)[:, None]
    values = exact[:, 0] ** 2, (gap**2).mean(axis=0) / 2, (exact**2).sum(axis=1) / 2
    recorded = path.metrics["low"], path.train_loss, path.penalty
    for error, value, seen in zip(others, values, recorded, strict=True):
        assert right(error, np.asarray(seen) - value, 1e-13).all()
    with compiled() as programs:
        off = path.crossing_error("low")
    assert not programs  # but for those of `crossing_time`
    assert right(off, abs(path.crossing_time("low") - passing(0.7, 20, 50)), 0).all()
    assert off > 0


def test_until():
    """Of a run that ends at a threshold, its end is the time."""
    path = run(gf.KKT4(), until="high")
    assert bool(path.met)
    off = float(path.t[-1]) - passing(0.5, 1, 4)
    assert right(path.crossing_error("high"), abs(off), 0).all()
    exact = np.stack([regression(t) for t in np.asarray(path.t)])
    assert right(path.error("w"), path.params.w - exact, 1e-13).all()
    # Of others one is good throughout, and one has no threshold.
    assert path.crossing_error("low") == 0 and np.isnan(path.crossing_error("w"))


def test_more_steps_than_the_run_was_given():
    path = run(gf.KKT4(), max_steps=30)
    assert path.again(None, path.t).stats.steps > 30
    exact = np.stack([regression(t) for t in TS])
    assert right(path.error("w"), path.params.w - exact, 1e-13).all()


def test_what_has_no_error(tmp_path):
    path = run(gf.KKT4())
    gf.save(tmp_path / "path.npz", path)
    descent = gf.descent(
        gf.GradientFlow(gf.SquaredError(X, Y)), Linear(jnp.asarray(START)),
        weight_decay=LAM, learning_rate=0.1, steps=10, metrics=WATCH,
    )  # fmt: skip
    for other in (gf.load(tmp_path / "path.npz"), descent):
        for ask in (other.error, other.crossing_error):
            with pytest.raises(ValueError, match="^error: .*can't be run again"):
                ask("low")
    failed = run(gf.KKT4(), max_steps=3, throw=False)
    with pytest.raises(ValueError, match="^error: expected a path that did not fail"):
        failed.error("low")
    for ask in (path.error, path.crossing_error):
        with pytest.raises(ValueError, match="^name: expected one of .*'low'.*'lo'"):
            ask("lo")


def test_single_precision():
    single = lambda tree: jax.tree.map(
        lambda x: x.astype(jnp.float32) if eqx.is_inexact_array(x) else x, tree
    )
    flow = gf.GradientFlow(gf.SquaredError(single(X), single(Y)))
    model = single(Linear(jnp.asarray(START)))
    options = dict(weight_decay=LAM, ts=jnp.asarray(TS), solver=gf.KKT4())
    fine = gf.simulate(flow, model, rtol=2e-4, **options)
    with pytest.raises(ValueError, match="^error: .*float32 .*enable_float64"):
        fine.error("penalty")
    rough = gf.simulate(flow, model, rtol=1e-2, **options)
    exact = np.stack([(regression(t) ** 2).sum() / 2 for t in TS])
    off = np.asarray(rough.penalty, float) - exact
    assert right(rough.error("penalty"), off, 1e-4 * exact).all()


# -- many lanes ---


@pytest.mark.slow
def test_each_lane_of_a_sweep(tmp_path):
    lams = jnp.array([0.03, LAM, 5e-3])
    flow, model = gf.GradientFlow(gf.SquaredError(X, Y)), Linear(jnp.asarray(START))
    options = dict(
        weight_decay=lams, ts=jnp.asarray(TS), rtol=1e-4, solver=gf.KKT4(),
        metrics={"test": WATCH["low"]}, progress=False,
    )  # fmt: skip
    sweep = gf.sweep(flow, model, **options)
    errors = sweep.crossing_error("test")
    alone = [path.crossing_error("test") for path in sweep]
    assert_array_equal(errors, alone)
    # The last does not decay that far.
    assert (errors[:2] > 0).all() and np.isnan(errors[2])
    off = sweep.crossing_time("test")[1] - passing(0.7, 20, 50)
    assert right(errors[1], abs(off), 0).all()

    result = jax.vmap(lambda one, r: gf.RESULTS.where(one, gf.RESULTS.stalled, r))(
        jnp.array([False, True, False]), sweep.paths.result
    )
    some = dataclasses.replace(
        sweep, paths=dataclasses.replace(sweep.paths, result=result)
    )
    assert_array_equal(some.crossing_error("test"), [errors[0], np.nan, np.nan])

    gf.save(tmp_path / "sweep.npz", sweep)
    with pytest.raises(ValueError, match="^error: .*can't be run again"):
        gf.load(tmp_path / "sweep.npz").crossing_error("test")

    theory = gf.two_phase(flow, model, slow_time=5.0, metrics=options["metrics"])
    plain, told = (gf.compare(sweep, theory, error_bars=b) for b in (False, True))
    bar = f" {'±':>9} "
    assert plain.grokked.measured_error is None and bar not in str(plain)
    assert_array_equal(told.grokked.measured_error, errors)
    assert np.isnan(told.memorised.measured_error).all()
    row = f"{told.grokked.measured[0]:10.4g} {errors[0]:9.2e}"
    assert row in str(told) and str(told).count(bar) == 2
    data = told.to_xarray()
    assert_array_equal(data["grokked_measured_error"], errors)
    with pytest.raises(ValueError, match="^error: .*can't be run again"):
        gf.compare(gf.load(tmp_path / "sweep.npz"), theory, error_bars=True)


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_a_finer_run_that_fails(kind):
    """One lane does not stop the others, and says why."""
    path = run(gf.KKT4())

    def again(params=None, ts=None, start=0.0):
        if params is None:
            raise kind("error: no step")
        return path.again(params, ts, start)

    failing = dataclasses.replace(path, again=again)
    with pytest.raises(kind, match="no step"):
        failing.error("low")
    with pytest.warns(UserWarning, match="of low at λ = 0.02 it is not known; .*step"):
        assert np.isnan(lane_error(failing, "low", WATCH["low"], 30.0))


# -- flows of every kind, against SciPy ---


class Falling(eqx.Module):
    """λ(t) = 0.1/(1 + t/20)."""

    def __call__(self, t):
        return 0.1 / (1 + t / 20)


def exact_path(slope, start, ts):
    out = solve_ivp(
        slope, (0, ts[-1]), start, "Radau", np.asarray(ts), rtol=1e-11, atol=1e-13
    )
    return out.y.T


def pull(w):
    """−∇F."""
    x = np.asarray(X)
    return -x.T @ (x @ w - np.asarray(Y)) / 2


RATES = np.array([2.0, 0.5, 0.1])


def on_sphere(w):
    along = w / np.linalg.norm(w)
    return pull(w) - along * (along @ pull(w))


KINDS = {
    "schedule": (
        dict(),
        dict(weight_decay=Falling()),
        lambda t, w: pull(w) - 0.1 / (1 + t / 20) * w,
    ),
    "rates": (
        dict(rates=Linear(jnp.asarray(RATES))),
        dict(),
        lambda t, w: RATES * (pull(w) - LAM * w),
    ),
    "held": (dict(hold_norm=True), dict(), lambda t, w: on_sphere(w)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", [gf.KKT5(), diffrax.Tsit5()])
def test_flows_of_every_kind(kind, solver):
    how, options, slope = KINDS[kind]
    flow = gf.GradientFlow(gf.SquaredError(X, Y), **how)
    path = gf.simulate(
        flow, Linear(jnp.asarray(START)), solver=solver,
        **dict(weight_decay=LAM, ts=jnp.asarray(TS), rtol=1e-4) | options,
    )  # fmt: skip
    exact = exact_path(slope, START, TS)
    true = np.asarray(path.penalty) - (exact**2).sum(axis=1) / 2
    assert right(path.error("penalty"), true, 1e-9).all()


@pytest.mark.slow
def test_kinks():
    """Each coordinate by itself; one reaches zero, and stays."""
    y, start, lam = np.array([2.0, 0.05]), np.array([0.5, 1.0]), 0.1
    flow = gf.GradientFlow(
        gf.SquaredError(jnp.eye(2), jnp.asarray(y), reduction="sum"), penalty=gf.L1()
    )
    path = gf.simulate(
        flow, Linear(jnp.asarray(start)), weight_decay=lam, ts=jnp.asarray(TS),
        rtol=1e-4, solver=gf.KKT4(), metrics={"w": WATCH["w"]},
    )  # fmt: skip
    rest = y - lam
    exact = np.maximum(rest + (start - rest) * np.exp(-TS[:, None]), 0)
    assert path.params.w[-1, 1] == 0
    # (At some times both runs are right to far less than their tolerance.)
    assert right(path.error("w"), path.params.w - exact, 3e-7).all()


# -- a sample of runs, against SciPy ---


class Tanh(eqx.Module):
    w: Float[Array, "k d"]
    out: Float[Array, " k"]

    def __call__(self, x):
        return self.out @ jnp.tanh(self.w @ x)


class Classes(eqx.Module):
    w: Float[Array, "k d"]

    def __call__(self, x):
        return self.w @ x


class Factors(eqx.Module):
    u: Float[Array, "n r"]
    v: Float[Array, "n r"]

    def __call__(self, place):
        return jnp.vdot(self.u[place[0]], self.v[place[1]])


def problem(kind, rng):
    """A model, the loss, and that of other data."""
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))
    scale = lambda low, high: 10 ** rng.uniform(low, high)
    many = 60
    if kind == "diagonal":
        x, s = normal(many, 12), scale(-1.5, 0.2)
        y, loss = x[:, 0] - 0.7 * x[:, 1], gf.SquaredError
        train, model = slice(5), Diagonal(s * normal(12), s * normal(12))
    elif kind == "tanh":
        x, s = normal(many, 3), scale(-0.5, 0.4)
        y, loss = jnp.tanh(x[:, 0] + 0.5 * x[:, 1]), gf.SquaredError
        train, model = slice(6), Tanh(s * normal(6, 3), s * normal(6))
    elif kind == "logistic":
        x, s = normal(many, 3), scale(-0.5, 0.3)
        y, loss = jnp.where(x[:, 0] + 0.3 * x[:, 1] > 0, 1.0, 0.0), gf.Logistic
        train, model = slice(8), Tanh(s * normal(5, 3), s * normal(5))
    elif kind == "entropy":
        x, s = normal(many, 4), scale(-1, 0.3)
        y, loss = jnp.argmax(x @ normal(4, 3), axis=1), gf.CrossEntropy
        train, model = slice(12), Classes(s * normal(3, 4))
    else:
        assert kind == "completion"
        x = jnp.asarray(rng.permutation([(i, j) for i in range(5) for j in range(5)]))
        y, loss = normal(5)[x[:, 0]] * normal(5)[x[:, 1]], gf.SquaredError
        s = scale(-2, 0)
        train, model = slice(13), Factors(s * normal(5, 5), s * normal(5, 5))
    test = slice(train.stop, None)
    return model, loss(x[train], y[train]), loss(x[test], y[test])


KINDS_OF_PROBLEMS = ("diagonal", "tanh", "logistic", "entropy", "completion")


@dataclasses.dataclass
class Judged:
    """What a run says of its errors, and what they are. In units of `rtol` times what
    is recorded they are `size`."""

    kind: str
    solver: str
    rtol: float
    ratios: np.ndarray
    """Of the metric at the saved times, where errors are above those of SciPy."""
    end: float
    """At the last."""
    crossing: float
    """That of the time; NaN where there is none."""
    size: float
    off: float
    """The error of the time, in units of `rtol` times it."""
    steps: float
    """Steps of the finer run to those of the run."""


@eqx.filter_jit
def slope(loss, model, lam, theta):
    back = ravel_pytree(model)[1]
    return -jax.grad(lambda v: loss(back(v)))(theta) - lam * theta


@eqx.filter_jit
def bend(loss, model, lam, theta):
    back = ravel_pytree(model)[1]
    return -jax.hessian(lambda v: loss(back(v)))(theta) - lam * jnp.eye(theta.size)


@eqx.filter_jit
def values(metric, model, thetas):
    back = ravel_pytree(model)[1]
    return jax.vmap(lambda v: metric(back(v)))(thetas)


def exact(loss, model, lam, start, ts):
    """θ at times from the first, at which it is `start`, by LSODA."""
    out = solve_ivp(
        lambda t, v: np.asarray(slope(loss, model, lam, v)), (ts[0], ts[-1]), start,
        "LSODA", ts, rtol=1e-12, atol=1e-14,
        jac=lambda t, v: np.asarray(bend(loss, model, lam, v)),
    )  # fmt: skip
    assert out.success
    return out.y.T


def exact_crossing(loss, model, lam, thetas, ts, metric, level, guess):
    """When the metric passes a level next to a `guess`, by the secant method."""
    i = int(np.searchsorted(ts, guess)) - 1

    def gap(t):
        (there,) = exact(loss, model, lam, thetas[i], np.array([ts[i], t]))[1:]
        return float(values(metric, model, jnp.asarray(there)[None])[0]) - level

    one, two = guess, guess * (1 + 1e-5)
    for _ in range(4):
        a, b = gap(one), gap(two)
        if a == b:
            break
        one, two = two, two - b * (two - one) / (b - a)
    return two


def judge(kind, solver, seed, saves=33):
    """One run of the sample; `None` where the solver fails."""
    rng = np.random.default_rng(seed)
    model, loss, test = problem(kind, rng)
    lam, rtol = (10 ** rng.uniform(*ends) for ends in ((-5, -1), (-7, -3)))
    span = rng.uniform(0.3, 3) / lam
    if isinstance(solver, diffrax.Tsit5 | gf.RKC2):
        span = min(span, 2e3)
    ts = np.append(0.0, np.geomspace(1e-2, span, saves - 1))
    theta = exact(loss, model, lam, np.asarray(ravel_pytree(model)[0]), ts)
    true = np.asarray(values(test, model, jnp.asarray(theta)))
    level = (true.max() * true[-1]) ** 0.5
    path = gf.simulate(
        gf.GradientFlow(loss), model, weight_decay=lam, ts=jnp.asarray(ts),
        rtol=rtol, solver=solver, throw=False, max_steps=1_000_000,
        metrics={"test": gf.Metric(test, threshold=level)},
    )  # fmt: skip
    if not bool(path.succeeded):
        return None
    off, told = np.asarray(path.metrics["test"]) - true, path.error("test")
    known = np.abs(off) > 3e-10 * np.abs(true)
    ratios = told[known] / off[known]
    crossing, late = np.nan, np.nan
    if level > 1.02 * true[-1]:
        time, said = path.crossing_time("test"), path.crossing_error("test")
        at = exact_crossing(loss, model, lam, theta, ts, test, level, time)
        late = abs(time - at) / time
        crossing = said / abs(time - at) if late > 3e-10 else np.nan
    assert path.again is not None
    finer = path.again(None, path.t)
    return Judged(
        kind, str(path.stats.solver), rtol, ratios,
        told[-1] / off[-1] if known[-1] else np.nan, crossing,
        np.max(np.abs(off) / true) / rtol, late / rtol,
        int(finer.stats.steps) / int(path.stats.steps),
    )  # fmt: skip


def share(ratios):
    """Which part of them is within [1/2, 2], of those that are known."""
    ratios = np.asarray(ratios)
    ratios = ratios[np.isfinite(ratios)]
    return np.mean((ratios >= 0.5) & (ratios <= 2)) if ratios.size else np.nan


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS_OF_PROBLEMS)
def test_a_sample_of_runs(kind):
    found = [judge(kind, solver, [17, i]) for solver in SOLVERS for i in range(2)]
    found = [one for one in found if one is not None]
    assert len(found) >= 7
    assert share(np.concatenate([one.ratios for one in found])) >= 0.95
    assert sum(not 0.5 <= one.end <= 2 for one in found) <= 1
    wrong = [one for one in found if not 0.5 <= one.crossing <= 2]
    assert sum(np.isfinite(one.crossing) for one in wrong) <= 1


def report(found):
    """The distribution of estimate/error, by solver, problem and tolerance."""
    rows = {"all": lambda one: True}
    for name in ("KKT4", "KKT5", "RKC2", "Tsit5"):
        rows[name] = lambda one, name=name: one.solver == name
    for name in KINDS_OF_PROBLEMS:
        rows[name] = lambda one, name=name: one.kind == name
    for k in range(-7, -3):
        rows[f"rtol 1e{k}…1e{k + 1}"] = lambda one, k=k: (
            10.0**k <= one.rtol < 10.0 ** (k + 1)
        )
    print(f"{'':>16} runs   at the end    all times      crossing    steps (90 %)")
    for name, of in rows.items():
        some = [one for one in found if of(one)]
        if not some:
            continue
        each = (
            [one.end for one in some],
            np.concatenate([one.ratios for one in some]),
            [one.crossing for one in some],
        )
        counts = [np.isfinite(x).sum() for x in each]
        pairs = zip(each, counts, strict=True)
        cells = [f"{100 * share(x):5.1f} % /{n:5}" for x, n in pairs]
        steps = np.quantile([one.steps for one in some], [0.5, 0.9])
        print(
            f"{name:>16} {len(some):4} {'  '.join(cells)}   "
            f"{steps[0]:.1f} ({steps[1]:.1f})"
        )
    for name in ("end", "crossing"):
        x = np.array([getattr(one, name) for one in found])
        low, middle, high = np.nanquantile(x, [0.025, 0.5, 0.975])
        print(f"  {name}: 95 % within {low:.2f} … {middle:.3f} … {high:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--runs", type=int, default=300)
    options = parser.parse_args()
    found, failed = [], collections.Counter()
    for i in range(options.runs):
        kind = KINDS_OF_PROBLEMS[i % 5]
        solver = SOLVERS[i // 5 % 4]
        one = judge(kind, solver, [options.seed, i])
        if one is None:
            failed[type(solver).__name__] += 1
            continue
        found.append(one)
        print(
            f"{i:3} {one.kind:>10} {one.solver:>5} rtol {one.rtol:.1e}: end "
            f"{one.end:6.3f}, all times {share(one.ratios):.3f}, crossing "
            f"{one.crossing:6.3f}; errors {one.size:.2g}, {one.off:.2g} rtol",
            flush=True,
        )
        drop_programs()
    print(f"{len(found)} runs; {dict(failed)} failed")
    report(found)
