"""What the runs say: a table, two figures, and checks against the targets."""

import csv
import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
from methods import OK, OVER

EXTRAPOLATED = "extrapolated"
GOAL = 1e-4  # the error to be reached
KEY = 1e-5  # the weight decay at which methods are compared


@dataclasses.dataclass(frozen=True)
class Row:
    """One run, or the reason why there is none.

    - `study`: what it was run for: `"time"` (the search for the fastest run with an
        error of at most 1e-4), `"curve"` (work–precision), `"steady"` (gradflow's own
        accuracy and growth).
    - `error`: max over the saved times of ‖θ − θ*‖/‖θ*‖.
    - `seconds`: the median of the repeats, without compilation. Over budget: a lower
        bound, what was spent. Extrapolated: predicted from larger λ, as `note` says.
    - `reference_gap`: how far two methods are apart on θ*.
    """

    problem: str
    method: str
    label: str
    family: str
    weight_decay: float
    rtol: float
    study: str
    status: str
    error: float = math.nan
    seconds: float = math.nan
    repeats: int = 0
    steps: int | None = None
    rejected: int | None = None
    evaluations: int | None = None
    compile_seconds: float = math.nan
    reference_gap: float = math.nan
    note: str = ""

    @property
    def assumed(self) -> bool:
        """Over budget without a run: a larger λ had been, and the cost is assumed not
        to fall as λ does."""
        return self.status == OVER and self.repeats == 0

    @property
    def measured(self) -> bool:
        """Whether `seconds` is a time, or a lower bound, that a run has shown."""
        return self.status in (OK, OVER) and not self.assumed

    @property
    def good(self) -> bool:
        """Whether it ended within the error asked for, against a trusted reference."""
        return self.status == OK and self.error <= GOAL


def write_csv(rows: Iterable[Row], file: Path) -> None:
    with file.open("w", newline="", encoding="utf-8") as out:
        names = [field.name for field in dataclasses.fields(Row)]
        writer = csv.DictWriter(out, names)
        writer.writeheader()
        for row in rows:
            shown = dataclasses.asdict(row)
            for name, value in shown.items():
                if isinstance(value, float):
                    shown[name] = "" if math.isnan(value) else f"{value:.6g}"
            writer.writerow(shown)


def read_csv(file: Path) -> list[Row]:
    """What `write_csv` wrote."""
    kinds = {field.name: field.type for field in dataclasses.fields(Row)}
    read = {
        str: str,
        int: int,
        float: lambda text: float(text or "nan"),
        int | None: lambda text: int(text) if text else None,
    }
    with file.open(newline="", encoding="utf-8") as lines:
        return [
            Row(**{name: read[kinds[name]](text) for name, text in line.items()})
            for line in csv.DictReader(lines)
        ]


def near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6)


def _runs(rows: Iterable[Row], problem: str, method: str, lam: float) -> list[Row]:
    return [
        r
        for r in rows
        if r.problem == problem
        and r.method == method
        and r.study != "steady"  # these repeat others: gradflow would draw twice
        and near(r.weight_decay, lam)
    ]


def best(rows: Iterable[Row], problem: str, method: str, lam: float) -> Row | None:
    """The fastest run with an error of at most 1e-4; else the row that says why there
    is none; else the most accurate run."""
    mine = _runs(rows, problem, method, lam)
    good = [r for r in mine if r.good]
    if good:
        return min(good, key=lambda r: r.seconds)
    # Once the budget is spent, tighter runs would spend it too.
    reasons = [r for r in mine if r.status != OK]
    if reasons:
        order = {EXTRAPOLATED: 0, OVER: 1}
        return min(reasons, key=lambda r: order.get(r.status, 2))
    return min(mine, key=lambda r: r.error, default=None)


# ------------------------------------------------------------------------- the table


MARKS = (
    "≥: stopped there, over the budget. ≥ … †: not run, for it had been stopped at a "
    "larger λ; a bound if the cost does not fall with λ. ≈: not measured, extrapolated "
    "from larger λ. Does not fit: not run, as one d × d matrix takes gigabytes."
)


def duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    return f"{seconds:.3g} s"


def cell(row: Row | None, ours: Row | None) -> str:
    if row is None:
        return "–"
    bound = "≥ " if row.status == OVER else "≈ " if row.status == EXTRAPOLATED else ""
    if row.status not in (OK, OVER, EXTRAPOLATED):
        return row.status.split(":")[0]
    text = f"{bound}{duration(row.seconds)}"
    if row.status == OK and not row.good:
        return f"{text}, error {row.error:.0e}"
    if ours is not None and ours.good and row is not ours:
        text += f" ({bound}{row.seconds / ours.seconds:.3g} ×)"
    return text + " †" * row.assumed


def table(rows: Sequence[Row], lam: float = KEY) -> str:
    """Time at an error of at most 1e-4, methods by problems, in Markdown."""
    problems = list(dict.fromkeys(r.problem for r in rows))
    labels = dict((r.method, r.label) for r in rows)
    lines = [
        "| method | " + " | ".join(problems) + " |",
        "|---" * (len(problems) + 1) + "|",
    ]
    for method, label in labels.items():
        cells = [
            cell(best(rows, p, method, lam), best(rows, p, "gradflow", lam))
            for p in problems
        ]
        weight = "**" if method == "gradflow" else ""
        lines.append(f"| {weight}{label}{weight} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def reasons(rows: Sequence[Row]) -> list[str]:
    """One sentence for each method and problem that has no time everywhere."""
    said = {}
    for row in rows:
        if row.study == "time" and row.status != OK:
            said.setdefault((row.problem, row.label, row.note), []).append(row)
    return [
        f"{problem}, {label}, λ = "
        + ", ".join(f"{r.weight_decay:g}" for r in which)
        + f": {note}"
        for (problem, label, note), which in said.items()
    ]


# ------------------------------------------------------------------------- the checks


class Check(NamedTuple):
    """A target, what was found, and whether it holds; `None` where no measurement
    decides that."""

    name: str
    found: str
    target: str
    passed: bool | None

    def __str__(self) -> str:
        verdict = {True: "pass", False: "FAIL", None: "undecided"}[self.passed]
        return f"{verdict:9s} {self.name}: {self.found} (target {self.target})"


def ratio_check(rows: Sequence[Row], problem: str, others: str, least: float) -> Check:
    """That the fastest of some methods takes `least` times as long as gradflow.

    Measurements alone decide. One that is too fast fails the check; it passes if the
    fastest was measured. What was extrapolated or assumed to be the fastest, or is a
    lower bound below the target, decides nothing.

    `others` is the beginning of their labels, and after a comma the end.
    """
    start, _, end = others.partition(", ")
    target = f"≥ {least:g} ×"
    name = f"{problem}, λ = {KEY:g}, {others} against gradflow"
    ours = best(rows, problem, "gradflow", KEY)
    methods = dict.fromkeys(
        r.method
        for r in rows
        if r.problem == problem and r.label.startswith(start) and r.label.endswith(end)
    )
    if ours is None or not ours.good:
        return Check(name, "no time of gradflow", target, None)
    enough = least * ours.seconds
    found = [_deciding(rows, problem, method, enough) for method in methods]
    timed = [r for r in found if r and (r.good or r.status in (OVER, EXTRAPOLATED))]
    if not timed:
        return Check(name, "no time", target, None)
    quick = [r for r in timed if r.good and r.seconds < enough]
    row = min(quick or timed, key=lambda r: r.seconds)
    if quick:
        passed = False
    else:
        passed = True if row.measured and row.seconds >= enough else None
    bound = {OVER: "≥ ", EXTRAPOLATED: "≈ "}.get(row.status, "")
    shown = (
        f"{bound}{row.seconds / ours.seconds:.3g} × ({row.label} "
        f"{duration(row.seconds)}{_standing(row)}; gradflow {duration(ours.seconds)})"
    )
    return Check(name, shown, target, passed)


def _deciding(
    rows: Sequence[Row], problem: str, method: str, enough: float
) -> Row | None:
    """The best row of a method; where that was not measured, a run that was stopped
    after enough time, if there is one."""
    row = best(rows, problem, method, KEY)
    if row is None or row.measured:
        return row
    stopped = [
        r
        for r in _runs(rows, problem, method, KEY)
        if r.status == OVER and r.measured and r.seconds >= enough
    ]
    return max(stopped, key=lambda r: r.seconds, default=row)


def _standing(row: Row) -> str:
    """What the seconds of a row are, if they are not the time of a run."""
    if row.assumed:
        return ", assumed: not run, as it was over budget at a larger λ"
    if row.status == EXTRAPOLATED:
        return ", extrapolated: not measured"
    return ", stopped there: a lower bound" if row.status == OVER else ""


def steady_checks(rows: Sequence[Row], problem: str) -> list[Check]:
    """gradflow alone: growth with 1/λ, accuracy, rejected steps, compilation."""
    mine = [r for r in rows if r.problem == problem and r.method == "gradflow"]
    ran = [r for r in mine if r.study == "steady" and r.status == OK]
    checks = []
    at = lambda lam: [r for r in ran if near(r.weight_decay, lam) and r.rtol == 1e-4]
    for large, small in zip(at(1e-2), at(1e-8), strict=False):
        for name, ratio in (
            ("steps", small.steps / large.steps),
            ("time", small.seconds / large.seconds),
        ):
            checks.append(
                Check(
                    f"{problem}, {name} from λ = 1e-2 to 1e-8",
                    f"{ratio:.3g} ×",
                    "< 2 ×",
                    ratio < 2,
                )
            )
    accurate = [r for r in ran if not math.isnan(r.error)]
    if accurate:
        worst = max(accurate, key=lambda r: r.error / r.rtol)
        excess = worst.error / worst.rtol
        where = f"{excess:.3g} at λ = {worst.weight_decay:g}, rtol {worst.rtol:g}"
        checks.append(Check(f"{problem}, error/rtol", where, "≤ 5", excess <= 5))
    if ran:
        share = lambda r: (r.rejected or 0) / r.steps
        worst = max(ran, key=share)
        where = f"{share(worst):.1%} at λ = {worst.weight_decay:g}, rtol {worst.rtol:g}"
        name = f"{problem}, rejected steps"
        checks.append(Check(name, where, "≤ 15 %", share(worst) <= 0.15))
    return checks


def checks(rows: Sequence[Row], first: dict[str, float]) -> list[Check]:
    """All targets that the rows can decide.

    **Arguments:**

    - `first`: for each problem, the first call of gradflow less a later one, seconds.
    """
    problems = list(dict.fromkeys(r.problem for r in rows))
    wanted = (
        ("P1", "SciPy", 15),
        ("P2", "SciPy", 20),
        ("P3", "SciPy, JAX Hessian", 100),
        ("P3", "SciPy, JᵀJ", 25),
        ("P1", "Diffrax", 100),
        ("P2", "Diffrax", 100),
        ("P3", "Diffrax", 100),
        ("P4", "Diffrax", 100),
    )
    out = [ratio_check(rows, *want) for want in wanted if want[0] in problems]
    large = best(rows, "P4", "gradflow", KEY)
    if large is not None:
        out.append(
            Check(
                f"P4, λ = {KEY:g}, gradflow",
                cell(large, None),
                "< 6 s",
                large.seconds < 6 if large.good else None,
            )
        )
    for problem in problems:
        out += steady_checks(rows, problem)
    for problem, seconds in first.items():
        name = f"{problem}, compilation of the first solve"
        out.append(Check(name, f"{seconds:.2f} s", "≤ 3 s", seconds <= 3))
    return out


# ------------------------------------------------------------------------ the figures

# Okabe and Ito's colours, a marker for each method of a family.
COLOURS = {
    "gradflow": "#D55E00",
    "SciPy": "#0072B2",
    "Diffrax": "#009E73",
    "torchdiffeq": "#CC79A7",
    "Optax": "#555555",
}
MARKERS = "osD^vPX"


def style(rows: Sequence[Row]) -> dict[str, dict]:
    """How each method is drawn: colour by family, marker within it."""
    seen: dict[str, list[str]] = {}
    for row in rows:
        methods = seen.setdefault(row.family, [])
        if row.method not in methods:
            methods.append(row.method)
    out = {}
    for family, methods in seen.items():
        for i, method in enumerate(methods):
            ours = method == "gradflow"
            out[method] = {
                "color": COLOURS.get(family, "black"),
                "marker": "*" if ours else MARKERS[i % len(MARKERS)],
                "ms": 13 if ours else 6,
                "lw": 3 if ours else 1.2,
                "zorder": 5 if ours else 3,
            }
    return out


def panels(rows: Sequence[Row], title: str):
    problems = list(dict.fromkeys(r.problem for r in rows))
    matplotlib.rcParams.update({"font.size": 11})
    columns = min(2, len(problems))
    lines = -(-len(problems) // columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(5 * columns + 3, 4 * lines + 0.5),
        layout="constrained",
        squeeze=False,
    )
    figure.suptitle(title)
    for ax in axes.flat[len(problems) :]:
        ax.set_axis_off()
    for problem, ax in zip(problems, axes.flat, strict=False):
        ax.set_title(problem)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.grid(True, which="major", alpha=0.3)
    return figure, dict(zip(problems, axes.flat, strict=False))


def legend(figure, rows: Sequence[Row], styles: dict[str, dict], extra=()) -> None:
    labels = dict((r.method, r.label) for r in rows)
    drawn = [m for m in labels if any(r.method == m and r.status == OK for r in rows)]
    lines = [plt.Line2D([], [], label=labels[m], **styles[m]) for m in drawn]
    figure.legend(handles=[*lines, *extra], loc="outside right center", fontsize=9)


def widen(ax, least: float = 15.0) -> None:
    """Makes the time axis span at least such a factor: ticks in less would overlap."""
    left, right = ax.get_xlim()
    more = max(1.0, least * left / right) ** 0.5
    ax.set_xlim(left / more, right * more)


def work_precision(rows: Sequence[Row], file: Path) -> None:
    """Error against seconds at λ = 1e-5."""
    here = [r for r in rows if near(r.weight_decay, KEY) and r.status == OK]
    here = [r for r in here if r.error > 0 and r.study != "steady"]
    if not here:
        return
    styles = style(rows)
    figure, axes = panels(here, f"Work and precision at $\\lambda$ = {KEY:g}, $s$ = 5")
    for problem, ax in axes.items():
        for method, how in styles.items():
            mine = [r for r in here if r.problem == problem and r.method == method]
            mine.sort(key=lambda r: -r.rtol)
            ax.plot([r.seconds for r in mine], [r.error for r in mine], **how)
        ax.axhline(GOAL, color="black", lw=0.8, ls=":")
        widen(ax)
        ax.set_xlabel("time (seconds, one core)")
        ax.set_ylabel("largest relative error of $\\theta$")
    legend(figure, here, styles)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def cost_against_lambda(rows: Sequence[Row], file: Path) -> None:
    """Seconds at an error of at most 1e-4, against 1/λ."""
    styles = style(rows)
    lams = sorted({r.weight_decay for r in rows if r.study != "steady"}, reverse=True)
    title = (
        "Time to an error of $10^{-4}$ (hollow: extrapolated from larger $\\lambda$)"
    )
    figure, axes = panels(rows, title)
    for problem, ax in axes.items():
        for method, how in styles.items():
            found = [best(rows, problem, method, lam) for lam in lams]
            timed = [r for r in found if r is not None and r.good]
            point = lambda rs: (
                [1 / r.weight_decay for r in rs],
                [r.seconds for r in rs],
            )
            ax.plot(*point(timed), **how)
            guessed = [r for r in found if r is not None and r.status == EXTRAPOLATED]
            if guessed and timed:
                ax.plot(*point([timed[-1], *guessed]), **how | {"ls": "--", "ms": 0})
                ax.plot(*point(guessed), **how | {"ls": "", "mfc": "white"})
        ax.set_xlabel("1/$\\lambda$")
        ax.set_ylabel("time (seconds, one core)")
    legend(figure, rows, styles)
    figure.savefig(file, dpi=130)
    plt.close(figure)
