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
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

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
from predict import as_before, in_proportion
from problems import Problem, PROBLEMS
from references import Reference, reference
from report import GOAL, KEY, near, Row
from tqdm.auto import tqdm

DENSE = 5000  # parameters above which methods with d × d matrices are left out
CURVE = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)  # tolerances of the work–precision curve
UNLIMITED = ("kkt4", "kkt5", "rkc2")  # they run without a limit of time, if at all:
PATIENCE = 3  # where they are expected to take so many budgets at most
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
    """Seconds that one solve may take. KKT4, KKT5 and RKC2 can't be stopped: they run
    where three times as much is expected at most."""
    out: Path | None = None
    """Folder for the results; benchmarks/results by default, and quick/ in it if
    quick."""
    quick: bool = False
    """One problem, two values of λ, and at most 2 seconds for a solve."""
    report_only: bool = False
    """Run nothing: write the report and the figures again, from the results in the
    folder."""

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
            report_only=self.report_only,
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
                if self.contender.linear and self._good():
                    self._add(lam, **in_proportion(self._good()[-1], lam))
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
        notes = {OK: "", OVER: f"stopped at rtol {rtol:g}"}
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
            note=notes.get(solved.status, f"{solved.status}, at rtol {rtol:g}"),
        )

    def _good(self) -> list[Row]:
        return [r for r in self.rows if r.good and r.study == "time"]

    def _predict(self, lam: float) -> dict | None:
        """Why λ is not run: a larger one has gone over budget, or this one is expected
        to."""
        good = self._good()
        reached = {r.weight_decay for r in good}
        over = [
            r.weight_decay
            for r in self.rows
            if r.status == OVER and r.weight_decay not in reached
        ]
        if self.contender.linear and good:
            guess = in_proportion(good[-1], lam)
            if over or guess["seconds"] > self.budget:
                return guess
        if over:
            note = f"not run: over budget at λ = {max(over):g}"
            return dict(status=OVER, seconds=self.budget, note=note)
        if self.name in UNLIMITED and len(good) >= 2 and good[-1].seconds > 1:
            guess = as_before(*good[-2:], lam)
            if guess["seconds"] > PATIENCE * self.budget:
                return guess
        return None

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


class Made(NamedTuple):
    """What the report says besides the rows.

    - `first`: for each problem, the seconds that the first solve compiles.
    - `gaps`: how far each reference is from another method.
    - `origin`: what the results came from.
    """

    first: dict[str, float]
    gaps: list[str]
    origin: dict[str, str]


def main(config: Config) -> list[report.Check]:
    """Runs everything, or reads what was run; returns the checks."""
    matplotlib.use("Agg")
    config = config.settled()
    if config.report_only:
        rows = report.read_csv(config.out / "work_precision.csv")
        text = (config.out / "work_precision.json").read_text(encoding="utf-8")
        found = write_report(rows, Made(**json.loads(text)), config.out)
    else:
        rows, found = run(config)
    print(report.table(rows), *map(str, found), sep="\n")
    print(f"Written to {config.out}")
    return found


def run(config: Config) -> tuple[list[Row], list[report.Check]]:
    """Runs everything, and writes what is known after each problem."""
    config.out.mkdir(parents=True, exist_ok=True)
    known = contenders()
    rows: list[Row] = []
    first: dict[str, float] = {}
    gaps: list[str] = []
    found: list[report.Check] = []
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
                    f"{name}, λ = {lam:g}: {exact.gap:.1e} from {exact.confirmed_by}"
                    f"{verdict}"
                )
                if exact.trusted:
                    references[lam] = exact
                    learn_sharpness(problem, exact.theta)
                bar.update()
            for method in config.methods:
                bench = Bench(problem, method, known[method], references, config.budget)
                rows += bench.run(bar)
            made = Made(first, gaps, origin(*start))
            written = config.out / "work_precision.csv"
            report.write_csv(rows, written)
            text = json.dumps(made._asdict(), indent=1, ensure_ascii=False) + "\n"
            (config.out / "work_precision.json").write_text(text, encoding="utf-8")
            # (As it reads what is written: digits are lost there.)
            found = write_report(report.read_csv(written), made, config.out)
    return rows, found


def write_report(rows: Sequence[Row], made: Made, folder: Path) -> list[report.Check]:
    """The report and the figures of what has been run."""
    found = report.checks(rows, made.first)
    report.work_precision(rows, folder / "work_precision.png")
    report.cost_against_lambda(rows, folder / "cost_against_lambda.png")
    items = lambda lines: "\n".join(f"- {line}" for line in lines)
    parts = [
        "# Work and precision",
        f"Time to a largest relative error of {GOAL:g} at λ = {KEY:g}, slow time 5, "
        "one core, float64, without compilation; in brackets the ratio to gradflow. "
        + report.MARKS,
        report.table(rows),
        "## Checks",
        items(found),
        "## How far the references are from another method",
        items(made.gaps),
        "## What was not measured",
        items(report.reasons(rows)) or "Nothing.",
        "## Made by",
        items(f"{name}: {value}" for name, value in made.origin.items()),
    ]
    text = "\n\n".join(parts) + "\n"
    (folder / "work_precision.md").write_text(text, encoding="utf-8")
    return found


def origin(start: float, worked: float) -> dict[str, str]:
    """What the results came from; `start` and `worked` were on the clocks of the wall
    and of the processor."""
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
    return {
        "command": f"`python benchmarks/{shlex.join(command())}`",
        "date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}, {spent / 60:.1f} minutes",
        "machine": f"{models[0] if models else platform.processor()}, 1 core used",
        "share of the core": f"{share:.0%} (below 95 %, others disturbed the times)",
        "versions": ", ".join(versions),
    }


def command() -> list[str]:
    """The script and its options, without the folder of the results."""
    script, *options = sys.argv
    if "--out" in options:
        i = options.index("--out")
        del options[i : i + 2]
    options = [option for option in options if not option.startswith("--out=")]
    return [Path(script).name, *options]


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
