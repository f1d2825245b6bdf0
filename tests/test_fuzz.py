"""gradflow against SciPy on random problems, to three more digits than asked for.

A long test, run by `pytest -m long tests/test_fuzz.py`. By hand, for another seed, or
for some of its problems:

    python tests/test_fuzz.py --seed 3 --runs 60
    python tests/test_fuzz.py --seed 3 --only 17 42
"""

import argparse
import collections
import dataclasses
import os
import time
import warnings

from conftest import drop_programs  # before JAX, which reads what it sets

# isort: split
import equinox as eqx
import jax
import numpy as np
import pytest
from fuzz_problems import double, DRAWS, Problem, random_problem
from jax.flatten_util import ravel_pytree
from scipy.integrate import solve_ivp

import gradflow as gf

RUNS = 300
SAVES = 17
MOST_EVALUATIONS = 100_000  # of the velocity, by SciPy
IMPLICIT = ("KKT4", "KKT5")


@dataclasses.dataclass
class Outcome:
    """What came of one problem. Errors are sup_t ‖θ(t) − θ*(t)‖/‖θ*(t)‖ over the saved
    times, in units of rtol."""

    result: str
    error: float = np.inf
    radau_error: float = np.nan  # of SciPy's Radau, asked for the same rtol
    sensitivity: float = np.nan
    from_start: float = np.nan  # the same of perturbations of the start alone
    solver: str = "-"
    steps: int = 0
    rejected: int = 0
    sliding: int = 0
    radau_steps: int = 0
    seconds: float = np.nan
    reference: str = ""  # why there is none

    @property
    def ended(self) -> bool:
        """Whether the run says of itself that it is right."""
        return self.result in ("successful", "slid")

    @property
    def miss(self) -> float:
        """The error, as a multiple of what may be asked for."""
        return self.error / max(1.0, self.sensitivity)

    @property
    def allowed(self) -> int:
        """Steps that an implicit solver may take."""
        return 2 * self.radau_steps + SAVES

    @property
    def slow(self) -> float:
        """Steps as a multiple of those; of an explicit solver they are cheaper."""
        return self.steps / self.allowed if self.solver in IMPLICIT else 0.0


def judge(problem: Problem) -> Outcome:
    """Runs a problem by gradflow and by SciPy, and compares."""
    begun = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            path = gf.simulate(
                problem.flow,
                problem.model,
                weight_decay=problem.weight_decay,
                **problem.horizon,
                saves=SAVES,
                rtol=problem.rtol,
                solver=problem.solver,
                max_steps=20_000,
                throw=False,
            )
            theta = np.asarray(jax.vmap(lambda p: ravel_pytree(p)[0])(path.params))
    except Exception as error:
        text = str(error).strip() or "-"
        return Outcome(f"{type(error).__name__}: {text.splitlines()[0][:100]}")
    count = lambda name: int(getattr(path.stats, name) or 0)
    message = gf.RESULTS[path.result] or "successful"
    out = Outcome(
        "slid" if bool(path.result == gf.RESULTS.slid) else message.split(":")[0][:60],
        solver=str(path.stats.solver),
        steps=count("steps"),
        rejected=count("rejected"),
        sliding=count("sliding"),
        seconds=time.perf_counter() - begun,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _compare(problem, np.asarray(path.t, float), theta.astype(float), out)
        except ReferenceFailed as failure:
            out.reference = str(failure)
    return out


class ReferenceFailed(Exception):
    pass


def _compare(problem: Problem, ts, theta, out: Outcome) -> None:
    """Fills in errors, sensitivity and Radau's steps."""
    field, hessian, start = _scipy_functions(problem)
    rtol = problem.rtol
    # Radau's absolute tolerance follows what is the smallest norm along the path.
    least = rms(start)
    for _ in range(3):
        radau = _solve(field, hessian, start, ts, "Radau", rtol, 1e-4 * rtol * least)
        found = rms(radau.sol(radau.t).T).min()
        if found > 0.1 * least:
            break
        least = max(found, 1e-12 * least)
    exact = _reference(field, hessian, start, ts, rtol, least)
    out.radau_steps = len(radau.t) - 1
    out.radau_error = relative_error(radau.sol(ts).T, exact) / rtol
    out.error = relative_error(theta, exact) / rtol
    grown = amplification(hessian, radau, ts)
    out.sensitivity, out.from_start = grown.max(), grown[0].max()
    if out.miss > 5:
        # Before gradflow is blamed, a second opinion on what is exact.
        tight = max(1e-3 * rtol, 1e-11)
        other = _solve(field, hessian, start, ts, "Radau", tight, 1e-4 * tight * least)
        doubt = relative_error(other.sol(ts).T, exact) / rtol
        # Where they differ by more than the bound nothing can be judged by them.
        if not doubt < min(0.2 * out.error, 5.0 * max(1.0, out.sensitivity)):
            raise ReferenceFailed(f"references differ by {doubt:.2g} rtol")


def rms(theta):
    return np.sqrt(np.mean(theta**2, axis=-1))


def relative_error(theta, exact) -> float:
    gap = np.linalg.norm(theta - exact, axis=1)
    size = np.linalg.norm(exact, axis=1)
    worst = np.max(np.where(gap > 0, gap / np.maximum(size, 1e-300), 0.0))
    return float(worst) if np.isfinite(theta).all() else np.inf


def amplification(hessian, radau, ts):
    """How much the flow itself amplifies errors, from saved time s (rows) to t: the
    root mean square, over random directions of a perturbation at s, of its size at t
    relative to ‖θ(t)‖, over its size at s relative to ‖θ(s)‖. The sensitivity of a path
    is the largest of them.

    Φ(t, s) is the solution of the variational equation Φ' = −(∇²F + λ∇²R)Φ along the
    path, symmetric matrices constant over each of Radau's steps: the mean square of
    ‖Φδ‖ over δ of norm one is ‖Φ‖_F²/d.
    """
    size = np.linalg.norm(radau.sol(ts), axis=0)
    mesh = np.unique(np.concatenate([radau.t, ts]))
    passed = []  # the propagators between saved times
    for a, b in zip(ts, ts[1:], strict=False):
        inside = mesh[(mesh >= a) & (mesh <= b)]
        inside = inside[np.unique(np.linspace(0, len(inside) - 1, 33).astype(int))]
        matrix = np.eye(len(radau.y))
        for s, t in zip(inside, inside[1:], strict=False):
            rates, basis = np.linalg.eigh(hessian(radau.sol((s + t) / 2)))
            decay = np.exp(np.clip(-rates * (t - s), -700, 300))
            matrix = basis @ (decay[:, None] * (basis.T @ matrix))
        passed.append(matrix)
    grown = np.zeros((len(passed), len(passed)))
    for i in range(len(passed)):
        whole = np.eye(len(radau.y))
        for j in range(i, len(passed)):
            whole = passed[j] @ whole
            rise = np.linalg.norm(whole) / np.sqrt(len(whole))
            grown[i, j] = rise * size[i] / max(size[j + 1], 1e-300)
    return grown


def _reference(field, hessian, start, ts, rtol, least):
    """The path to 1e-3 rtol."""
    tight = max(1e-3 * rtol, 1e-12)
    run = _solve(field, hessian, start, ts, "LSODA", tight, 1e-3 * tight * least)
    return run.sol(ts).T


def _solve(field, hessian, start, ts, method, rtol, atol):
    left = iter(range(MOST_EVALUATIONS))

    def counted(t, y):
        if next(left, None) is None:
            raise ReferenceFailed(f"{method}: more than {MOST_EVALUATIONS} evaluations")
        return field(y)

    out = solve_ivp(
        counted,
        (ts[0], ts[-1]),
        start,
        method=method,
        jac=lambda t, y: -hessian(y),
        rtol=rtol,
        atol=atol,
        dense_output=True,
    )
    if not out.success:
        raise ReferenceFailed(f"{method}: {out.message[:60]}")
    return out


_compiled = {}  # for the kind of problem at hand


def _scipy_functions(problem: Problem):
    """−∇F − λ∇R and ∇²F + λ∇²R in float64, as functions of θ, and θ₀."""
    term, params = double(problem.flow).term(double(problem.model))
    start, unravel = ravel_pytree(params)
    arrays, static = eqx.partition(term, eqx.is_array)
    if problem.kind not in _compiled:
        _compiled.clear()

        def total(theta, arrays, weight_decay):
            here, term = unravel(theta), eqx.combine(arrays, static)
            return term.loss(term.model(here)) + weight_decay * term.penalty(here)

        _compiled[problem.kind] = jax.jit(jax.grad(total)), jax.jit(jax.hessian(total))
    # As the run has it, in its own precision.
    weight_decay = float(np.asarray(problem.weight_decay, problem.dtype))
    slope, curvature = _compiled[problem.kind]
    field = lambda y: -np.asarray(slope(y, arrays, weight_decay))
    hessian = lambda y: np.asarray(curvature(y, arrays, weight_decay))
    return field, hessian, np.asarray(start)


def run(seed: int, indices, *, told=print) -> dict[int, tuple[Problem, Outcome]]:
    """Judges problems of a seed, and says how each of them ended."""
    found = {}
    for count, index in enumerate(indices):
        if count and index // DRAWS % 5 == 0 and index % DRAWS == 0:
            # Programs are not shared between kinds; see `forget` in conftest.
            drop_programs(0)
        problem = random_problem(seed, index)
        out = judge(problem)
        found[index] = problem, out
        told(line(index, problem, out))
    return found


def line(index: int, problem: Problem, out: Outcome) -> str:
    marks = "".join(mark for mark, bad in faults(out).items() if bad) or "."
    ending = out.reference or out.result
    return (
        f"{index:4d} {marks:4s} error {out.error:8.2g} (Radau {out.radau_error:7.2g}) "
        f"sens {out.sensitivity:7.2g} ({out.from_start:7.2g}) steps {out.steps:5d} "
        f"-{out.rejected:4d} (Radau {out.radau_steps:5d}) slid {out.sliding:3d} "
        f"{out.seconds:5.1f} s {out.solver} {ending} | {problem.name}"
    )


def faults(out: Outcome) -> dict[str, bool]:
    """By letter: large error, wrong without a word, slid, slow, did not end."""
    judged = not out.reference
    return {
        "E": judged and not out.miss <= 5,
        "W": judged and out.ended and not out.miss <= 20,
        "S": out.sliding > 0,
        "T": judged and out.slow > 1,
        "X": not out.ended,
    }


def summary(found: dict[int, tuple[Problem, Outcome]]) -> str:
    """The worst runs, and what share of which kinds fell short."""
    outs = [out for _, out in found.values()]
    known = [out for out in outs if not out.reference]
    rows = [f"{len(outs)} runs, {len(outs) - len(known)} without a reference"]
    for title, key in (("error", lambda o: o.miss), ("steps", lambda o: o.slow)):
        rows.append(f"worst by {title}:")
        order = sorted(found, key=lambda i: -key(found[i][1]))
        rows += [line(i, *found[i]) for i in order[:8]]
    for letter in "EWSTX":
        bad = [p for p, out in found.values() if faults(out)[letter]]
        rows.append(f"{letter}: {len(bad)} of {len(known)}")
        for field in ("model", "loss", "penalty", "dtype", "solver"):
            value = lambda p, field=field: str(getattr(p.kind, field))
            all_of = collections.Counter(value(p) for p, _ in found.values())
            some = collections.Counter(map(value, bad)).most_common(4)
            parts = (f"{k} {n}/{all_of[k]}" for k, n in some)
            rows += [f"   {field}: " + ", ".join(parts)] if bad else []
    good = [out for out in known if np.isfinite(out.error)]
    above = lambda bound: sum(out.error > bound(out) for out in good)
    rows.append(
        f"error above 5 rtol: {above(lambda o: 5)}; and ten times Radau's: "
        f"{above(lambda o: max(5, 10 * o.radau_error))}; or five times the "
        f"sensitivity to the start: {above(lambda o: 5 * max(1, o.from_start))}"
    )
    rows.append(
        "explicit, in more than twice Radau's steps: "
        f"{sum(o.solver not in IMPLICIT and o.steps > o.allowed for o in known)} of "
        f"{sum(o.solver not in IMPLICIT for o in known)}"
    )
    rows.append(
        f"median error {np.median([out.error for out in good]):.2g} rtol, Radau's "
        f"{np.median([out.radau_error for out in good]):.2g}; sensitivity above 1 in "
        f"{np.mean([out.sensitivity > 1 for out in good]):.0%}, above 10 in "
        f"{np.mean([out.sensitivity > 10 for out in good]):.0%}"
    )
    return "\n".join(rows)


def test_amplification_of_a_linear_flow():
    """θ' = (θ₁, −2θ₂): Φ(t, s) = diag(e^{t−s}, e^{−2(t−s)}), from where the second is
    all of θ until the first has grown."""
    rates, start, ts = np.array([-1.0, 2.0]), np.array([1e-2, 1.0]), np.arange(6.0)
    hessian = lambda y: np.diag(rates)
    path = _solve(lambda y: -rates * y, hessian, start, ts, "Radau", 1e-6, 1e-12)
    size = np.linalg.norm(start * np.exp(-rates * ts[:, None]), axis=1)
    rise = lambda a: np.sqrt((np.exp(2 * a) + np.exp(-4 * a)) / 2)
    grown = amplification(hessian, path, ts)
    assert grown.max() > 10
    for s in range(5):
        for t in range(s + 1, 6):
            right = rise(t - s) * size[s] / size[t]
            np.testing.assert_allclose(grown[s, t - 1], right, rtol=1e-4)


@pytest.mark.long
def test_random_runs_against_scipy():
    seed = int(os.environ.get("GRADFLOW_FUZZ_SEED", 16))
    print(f"seed {seed}")
    found = run(seed, range(RUNS))
    print(summary(found))
    known = [out for _, out in found.values() if not out.reference]
    share = lambda letter: np.mean([faults(out)[letter] for out in known])
    assert len(known) >= 0.97 * RUNS
    assert share("E") <= 0.01
    assert share("W") == 0
    assert share("S") == 0
    assert share("T") <= 0.05


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=16)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*")
    options = parser.parse_args()
    last = options.first + options.runs
    found = run(
        options.seed,
        options.only or range(options.first, last),
        told=lambda text: print(text, flush=True),
    )
    print(summary(found))
