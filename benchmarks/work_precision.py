"""gradflow against what else solves a gradient flow: time, error, growth with 1/λ.

Every contender solves the problems P1–P4 to slow time s = λt = 5 for λ from 1e-1 to
1e-6, on one core in float64; errors are against tight references that two methods agree
on. Writes a table, figures and all runs, problem by problem.
"""

import one_core  # noqa: F401

# isort: split
import dataclasses
import datetime
import importlib.metadata
import math
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import report
import tyro
from methods import (
    compile_time,
    Contender,
    contenders,
    learn_sharpness,
    measure,
    OK,
    OVER,
    Solver,
)
from problems import Problem, PROBLEMS
from references import Reference, reference
from report import EXTRAPOLATED, GOAL, KEY, near, Row
from tqdm.auto import tqdm

DENSE = 5000  # parameters above which methods with d × d matrices are left out
CURVE = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)  # tolerances of the work–precision curve
UNLIMITED = ("kkt4", "kkt5", "rkc2")  # they run without a limit of time, if at all
FOLDER = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Config:
    problems: tuple[Literal["P1", "P2", "P3", "P4"], ...] = ("P1", "P2", "P3", "P4")
    """Which problems: P1 diagonal network, P2 matrix completion, P3 small tanh network,
    P4 large tanh network."""
    methods: tuple[str, ...] = ()
    """Which contenders, such as gradflow, kkt4, lsoda-hessian, tsit5; all unless given.
    An unknown name lists them."""
    weight_decay: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    """The values of λ."""
    budget: float = 10.0
    """Seconds that one solve may take."""
    out: Path | None = None
    """Folder for the results; benchmarks/results by default, and quick/ in it if
    quick."""
    quick: bool = False
    """One problem, two values of λ, and at most 2 seconds for a solve."""

    def settled(self) -> "Config":
        """With all defaults filled in, and λ from large to small."""
        lams, problems, budget = self.weight_decay, self.problems, self.budget
        if self.quick:
            lams, problems, budget = (1e-2, KEY), problems[:1], min(budget, 2.0)
        known = contenders()
        for name in self.methods:
            if name not in known:
                raise SystemExit(f"methods: no {name!r} here, only {', '.join(known)}.")
        return Config(
            problems=problems,
            methods=self.methods or tuple(known),
            weight_decay=tuple(sorted(lams, reverse=True)),
            budget=budget,
            out=self.out or (FOLDER / "quick" if self.quick else FOLDER),
            quick=self.quick,
        )


def times(lam: float) -> np.ndarray:
    """25 times, evenly in the logarithm, to slow time s = λt = 5."""
    return np.geomspace(1e-2, 5 / lam, 25)


class Bench:
    """All runs of one contender on one problem."""

    def __init__(
        self,
        problem: Problem,
        name: str,
        contender: Contender,
        references: dict[float, Reference],
        budget: float,
    ):
        self.problem = problem
        self.name = name
        self.contender = contender
        self.references = references
        self.budget = budget
        self.rows: list[Row] = []
        self.compile_seconds = 0.0

    def run(self, bar: tqdm) -> list[Row]:
        """Runs every λ, from large to small."""
        size = self.problem.d
        fits = size <= DENSE or not self.contender.dense
        solver = self.contender.make(self.problem) if fits else None
        for lam in self.references:
            bar.set_postfix_str(f"{self.problem.name}, {self.name}, λ = {lam:g}")
            if solver is None:
                note = f"a {size} × {size} matrix takes {8e-9 * size**2:.1f} GB"
                self._add(lam, status="does not fit", note=note)
            else:
                self._one(solver, lam)
            bar.update()
        if self.name == "gradflow" and size <= DENSE:
            for lam in (1e-2, 1e-8):
                self._attempt(solver, lam, 1e-4, "steady")
        return self.rows

    def _one(self, solver: Solver, lam: float) -> None:
        skipped = self._predict(lam)
        if skipped is not None:
            self._add(lam, **skipped)
            return
        if not self.rows:
            self.compile_seconds = compile_time(solver, lam, times(lam))
        self._search(solver, lam)
        if self.problem.d > DENSE:
            return
        if near(lam, KEY) and self.rows[-1].good:
            self._curve(solver, lam)
        if self.name == "gradflow" and lam >= KEY:
            for rtol in (1e-4, 1e-6):
                self._attempt(solver, lam, rtol, "steady")

    def _search(self, solver: Solver, lam: float) -> None:
        """Looser tolerances first, until the error is small enough; from one looser
        than what was needed at the last λ."""
        rtols, good = self.contender.rtols, self._good()
        i = max(0, rtols.index(good[-1].rtol) - 1) if good else 0
        if self.contender.family == "gradflow":
            i = 0  # these are quick, and the default may change its solver
        over = False
        while i < len(rtols):
            row = self._attempt(solver, lam, rtols[i], "time")
            if row.good:
                return
            if row.status == OVER:
                guess = self._extrapolate(lam)
                if guess is not None:
                    self._add(lam, **guess)
                if over or self.contender.linear:
                    return
                # A stiff solver may get lost where its tolerance is loose.
                over = True
            i += 2 if over else 1

    def _curve(self, solver: Solver, lam: float) -> None:
        """The rest of the work–precision curve, as far as the budget goes."""
        spent = 0.0
        done = {r.rtol for r in self.rows if near(r.weight_decay, lam)}
        for rtol in CURVE:
            if rtol in self.contender.rtols and rtol not in done:
                start = time.perf_counter()
                self._attempt(solver, lam, rtol, "curve")
                spent += time.perf_counter() - start
                if spent > self.budget:
                    return

    def _attempt(self, solver: Solver, lam: float, rtol: float, study: str) -> Row:
        """One run, whose failure is recorded. A run of the search that misses the error
        is not repeated."""
        known = self.references.get(lam)
        error = lambda solved: known.error(solved.theta) if known else math.nan
        worth = lambda solved: study != "time" or error(solved) <= GOAL
        try:
            run = measure(solver, lam, times(lam), rtol, self.budget, worth)
        except Exception as failure:  # whatever it is, the others go on
            reason = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
            return self._add(lam, rtol=rtol, status="failed", note=reason)
        solved = run.solved
        note = "" if solved.status == OK else f"stopped at rtol {rtol:g}"
        return self._add(
            lam,
            rtol=rtol,
            study=study,
            status=solved.status,
            error=math.nan if solved.theta is None else error(solved),
            seconds=run.seconds,
            repeats=run.repeats,
            steps=solved.steps,
            rejected=solved.rejected,
            evaluations=solved.evaluations,
            note=note,
        )

    def _good(self) -> list[Row]:
        return [r for r in self.rows if r.good and r.study == "time"]

    def _predict(self, lam: float) -> dict | None:
        """Why λ need not be run: a larger one has gone over budget, or this one will
        where the cost is in proportion to 1/λ."""
        good = self._good()
        reached = {r.weight_decay for r in good}
        over = [
            r.weight_decay
            for r in self.rows
            if r.status == OVER and r.weight_decay not in reached
        ]
        guess = self._extrapolate(lam)
        if guess is not None and (over or guess["seconds"] > self.budget):
            return guess
        note = ""
        if over:
            note = f"not run: over budget at λ = {max(over):g}"
        elif len(good) >= 2 and self.name in UNLIMITED:
            grown = good[-1].seconds * max(1, good[-1].seconds / good[-2].seconds)
            if good[-1].seconds > 1 and grown > self.budget:
                note = f"not run: it would take {grown:.0f} s if it grew as before"
        if not note:
            return None
        return dict(status=OVER, seconds=self.budget, note=note)

    def _extrapolate(self, lam: float) -> dict | None:
        good = self._good()
        if not self.contender.linear or not good:
            return None
        row = good[-1]
        return dict(
            rtol=row.rtol,
            status=EXTRAPOLATED,
            seconds=row.seconds * row.weight_decay / lam,
            note=f"not measured: {row.seconds:.3g} s at λ = {row.weight_decay:g} and "
            "cost in proportion to 1/λ",
        )

    def _add(self, lam: float, **values) -> Row:
        known = self.references.get(lam)
        row = Row(
            problem=self.problem.name,
            method=self.name,
            label=self.contender.label,
            family=self.contender.family,
            weight_decay=lam,
            compile_seconds=self.compile_seconds,
            reference_gap=math.nan if known is None else known.gap,
            **({"rtol": math.nan, "study": "time"} | values),
        )
        self.rows.append(row)
        return row


def main(config: Config) -> list[report.Check]:
    """Runs everything; returns the checks."""
    matplotlib.use("Agg")
    config = config.settled()
    config.out.mkdir(parents=True, exist_ok=True)
    known = contenders()
    rows: list[Row] = []
    first: dict[str, float] = {}
    gaps: list[str] = []
    start = (time.perf_counter(), time.process_time())
    total = len(config.problems) * len(config.weight_decay) * (1 + len(config.methods))
    with tqdm(total=total, unit="λ") as bar:
        for name in config.problems:
            problem = PROBLEMS[name]()
            if problem.d <= DENSE:  # before the reference compiles the same solver
                gradflow = known["gradflow"].make(problem)
                first[name] = compile_time(gradflow, KEY, times(KEY))
            references = {}
            for lam in config.weight_decay:
                bar.set_postfix_str(f"{name}, reference, λ = {lam:g}")
                exact = reference(problem, lam, times(lam))
                verdict = "" if exact.trusted else ": NOT TRUSTED, λ is left out"
                gaps.append(
                    f"- {name}, λ = {lam:g}: {exact.gap:.1e} from {exact.confirmed_by}"
                    f"{verdict}"
                )
                if exact.trusted:
                    references[lam] = exact
                    learn_sharpness(problem, exact.theta)
                bar.update()
            for method in config.methods:
                bench = Bench(problem, method, known[method], references, config.budget)
                rows += bench.run(bar)
            found = save(config, rows, first, gaps, start)
    print(report.table(rows), *map(str, found), sep="\n")
    print(f"Written to {config.out}")
    return found


def save(
    config: Config,
    rows: Sequence[Row],
    first: dict[str, float],
    gaps: Sequence[str],
    start: tuple[float, float],
) -> list[report.Check]:
    """Writes all that is known so far; `start` is on the clocks of the wall and of the
    processor."""
    found = report.checks(rows, first)
    report.write_csv(rows, config.out / "work_precision.csv")
    report.work_precision(rows, config.out / "work_precision.png")
    report.cost_against_lambda(rows, config.out / "cost_against_lambda.png")
    parts = [
        "# Work and precision",
        f"Time to a largest relative error of {GOAL:g} at λ = {KEY:g}, slow time 5, "
        "one core, float64, without compilation; in brackets the ratio to gradflow. "
        f"≥: over the budget of {config.budget:g} s (†: not run, as it was at a "
        "larger λ). ≈: extrapolated from a larger λ.",
        report.table(rows),
        "## Checks",
        "\n".join(f"- {check}" for check in found),
        "## How far the references are from another method",
        "\n".join(gaps),
        "## What was not measured",
        "\n".join(report.reasons(rows)) or "Nothing.",
        "## Made by",
        "\n".join(f"- {name}: {value}" for name, value in origin(*start).items()),
    ]
    text = "\n\n".join(parts) + "\n"
    (config.out / "work_precision.md").write_text(text, encoding="utf-8")
    return found


def origin(start: float, worked: float) -> dict[str, str]:
    """What the results came from."""
    spent = time.perf_counter() - start
    share = (time.process_time() - worked) / spent
    names = "jax jaxlib diffrax equinox optimistix optax scipy numpy torch torchdiffeq"
    versions = [f"Python {platform.python_version()}"]
    for name in names.split():
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if "model name" in line]
    script = Path(sys.argv[0]).name
    return {
        "command": f"`python benchmarks/{shlex.join([script, *sys.argv[1:]])}`",
        "date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}, {spent / 60:.1f} minutes",
        "machine": f"{models[0] if models else platform.processor()}, 1 core used",
        "share of the core": f"{share:.0%} (below 95 %, others disturbed the times)",
        "versions": ", ".join(versions),
    }


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
