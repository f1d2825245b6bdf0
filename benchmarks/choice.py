"""Is the solver that gradflow chooses the fastest of its own?

Every problem by Tsit5, RKC2, KKT4 and KKT5, compiled before, on one core, for λ from
1e-1 to 1e-6 and two tolerances: how many times as long the chosen one takes as the
best.

    python benchmarks/choice.py
    python benchmarks/choice.py --problems P2 logistic
"""

import one_core  # noqa: F401

# isort: split
import dataclasses
import json
import time
from pathlib import Path

import diffrax
import jax
import tyro
from problems import PROBLEMS
from shapes import Shape, SHAPES
from tqdm.auto import tqdm

import gradflow as gf

gf.enable_float64()
SOLVERS = {
    "Tsit5": (diffrax.Tsit5(), 30_000),
    "RKC2": (gf.RKC2(), 4_000),
    "KKT4": (gf.KKT4(), 3_000),
    "KKT5": (gf.KKT5(), 3_000),
}
"""And after how many steps each is given up."""


@dataclasses.dataclass(frozen=True)
class Config:
    problems: tuple[str, ...] = (
        "P1", "P2", "P3", "deep_linear", "matrix_recovery", "logistic", "vectors",
        "opaque", "many_samples", "classes",
    )  # fmt: skip
    """Of `problems.py` and `shapes.py`."""
    weight_decay: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    rtol: tuple[float, ...] = (1e-4, 1e-6)
    out: Path = Path(__file__).parent / "results" / "choice.json"


def problem(name: str) -> Shape:
    """By its name."""
    if name in PROBLEMS:
        task = PROBLEMS[name]().task
        return Shape(gf.GradientFlow(task.loss), task.model)
    return SHAPES[name]()


def compared(shape: Shape, lam: float, rtol: float, given_up: set[str]) -> dict:
    """What was chosen, and the seconds that each solver took."""

    def run(solver, most: int) -> gf.Path:
        path = gf.simulate(
            shape.flow, shape.model, weight_decay=lam, slow_time=2.0, saves=25,
            rtol=rtol, solver=solver, max_steps=most, throw=False,
        )  # fmt: skip
        return jax.block_until_ready(path)

    seconds = {}
    for name, (solver, most) in SOLVERS.items():
        if name in given_up:
            continue
        # (Those that are stopped are more so for a smaller λ.)
        if int(run(solver, most).stats.steps) >= most:
            given_up.add(name)
            continue
        repeats = []
        for _ in range(5):
            begun = time.perf_counter()
            run(solver, most)
            repeats.append(time.perf_counter() - begun)
            if repeats[0] > 1:
                break
        seconds[name] = min(repeats)
    chosen = run(None, 100_000).stats.solver
    best = min(seconds.values())
    ratio = seconds[chosen] / best if chosen in seconds else float("inf")
    return dict(chosen=chosen, ratio=ratio, seconds=seconds)


def main(config: Config) -> None:
    rows = []
    bar = tqdm(total=len(config.problems) * len(config.weight_decay) * 2)
    for name in config.problems:
        shape = problem(name)
        for rtol in config.rtol:
            given_up: set[str] = set()
            for lam in config.weight_decay:
                bar.set_postfix_str(f"{name}, λ = {lam:g}, rtol {rtol:g}")
                found = compared(shape, lam, rtol, given_up)
                rows.append(dict(problem=name, weight_decay=lam, rtol=rtol, **found))
                bar.update()
    bar.close()
    config.out.write_text(json.dumps(rows, indent=1) + "\n")
    rows.sort(key=lambda row: -row["ratio"])
    slow = [row for row in rows if row["ratio"] > 1.5]
    print(f"{len(rows)} runs; over 1.5 times as long as the best: {len(slow)}")
    for row in rows[:10]:
        times = ", ".join(f"{k} {1e3 * v:.0f} ms" for k, v in row["seconds"].items())
        print(
            f"{row['ratio']:.2f} ×  {row['problem']}, λ = {row['weight_decay']:g}, "
            f"rtol {row['rtol']:g}: {row['chosen']} of {times}"
        )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
