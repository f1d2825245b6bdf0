"""How long a newcomer waits: the first call of everything, which is mostly compilation.

Each is measured in new processes of its own, one after another, and the median told.
Importing is not counted. `--rows` chooses among:

- `simulate`: the first path of the README's model, next to the first call of Diffrax's
  Tsit5 on y' = −y, of its Kvaerno5 on the same flow, and of SciPy's LSODA with a jitted
  gradient.
- `block`: the README's first example, all of it; with nothing compiled before, and with
  the programs that `gradflow.cache_programs` has kept.
- `tasks`: the first path of every task of the package.
- `two_phase`: the price of a prediction in single flows, compiled before.

    python benchmarks/first_result.py
    python benchmarks/first_result.py --rows simulate --repeats 5
"""

import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro

ROOT = Path(__file__).parent.parent
LAM = 1e-4
TASKS = {
    name: f"tasks.{call}"
    for name, call in {
        "deep linear": "deep_linear(jr.key(0))",
        "diagonal network": "diagonal_network(jr.key(0))",
        "linear regression": "linear_regression(jr.key(0))",
        "matrix completion": "matrix_completion(jr.key(0))",
        "matrix recovery": "matrix_recovery(jr.key(0))",
        "modular addition": "modular_addition(jr.key(0), modulus=23)",
        "small transformer": "modular_transformer("
        "jr.key(0), modulus=23, width=32, hidden=128)",
        "ReLU in one dimension": "relu_1d(jr.key(0))",
        "sparse recovery": "sparse_recovery(jr.key(0))",
        "symbol addition": "symbol_addition(jr.key(0))",
        "teacher MLP": "teacher_mlp(jr.key(0))",
        "teacher and student": "teacher_student(jr.key(0))",
    }.items()
}


@dataclasses.dataclass(frozen=True)
class Config:
    rows: tuple[Literal["simulate", "block", "tasks", "two_phase"], ...] = (
        "simulate", "block", "tasks", "two_phase",
    )  # fmt: skip
    """What to measure."""
    repeats: int = 3
    """Processes for each number; tasks get one."""
    out: Path = Path(__file__).parent / "results" / "first_result.json"
    """Where the numbers are written."""


# -- what is measured, each in a process of its own ---


def blocks() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def readme() -> dict[str, Any]:
    """The README's flow, model and metrics."""
    scope: dict[str, Any] = {}
    exec(blocks()[0].partition("path =")[0], scope)
    return scope


def seconds(run: Callable[[], Any]) -> float:
    import jax

    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def bare() -> float:
    import diffrax
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    term = diffrax.ODETerm(lambda t, y, args: -y)
    steps = diffrax.PIDController(rtol=1e-6, atol=1e-6)
    return seconds(
        lambda: diffrax.diffeqsolve(
            term, diffrax.Tsit5(), 0.0, 1.0, 0.01, jnp.array(1.0),
            stepsize_controller=steps,
        ).ys
    )  # fmt: skip


def simulate() -> float:
    import gradflow as gf

    told = readme()
    return seconds(
        lambda: gf.simulate(
            told["flow"], told["model"], weight_decay=LAM, slow_time=2.0,
            metrics=told["watch"],
        ).params
    )  # fmt: skip


def kvaerno() -> float:
    import diffrax
    import numpy as np

    told = readme()
    term, params = told["flow"].term(told["model"])
    ts = np.append(0.0, np.geomspace(1e-2, 2.0 / LAM, 64))
    return seconds(
        lambda: diffrax.diffeqsolve(
            term, diffrax.Kvaerno5(), 0.0, ts[-1], 1e-3, params, args=LAM,
            saveat=diffrax.SaveAt(ts=ts), max_steps=100_000,
            stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-8),
        ).ys
    )  # fmt: skip


def lsoda() -> float:
    import jax
    import numpy as np
    from jax.flatten_util import ravel_pytree
    from scipy.integrate import solve_ivp

    told = readme()
    term, params = told["flow"].term(told["model"])
    theta, unravel = ravel_pytree(params)
    speed = jax.jit(lambda th: ravel_pytree(term.velocity(unravel(th), LAM))[0])
    ts = np.append(0.0, np.geomspace(1e-2, 2.0 / LAM, 64))
    run = lambda: solve_ivp(
        lambda t, th: np.asarray(speed(th)), (0.0, ts[-1]), np.asarray(theta),
        method="LSODA", t_eval=ts, rtol=1e-6, atol=1e-8,
    ).y  # fmt: skip
    return seconds(run)


def block() -> dict[str, float]:
    import contextlib
    import io

    import jax.monitoring
    import matplotlib

    matplotlib.use("Agg")
    programs = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: (
            programs.append(duration)
            if event == "/jax/core/compile/backend_compile_duration"
            else None
        )
    )
    import gradflow as gf

    if folder := os.environ.get("KEPT_PROGRAMS"):
        gf.cache_programs(folder)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as there, contextlib.chdir(there):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            exec(blocks()[0], {})
    return {"seconds": time.perf_counter() - start, "programs": len(programs)}


def task(call: str) -> dict[str, Any]:
    import jax
    import jax.random as jr

    import gradflow as gf

    gf.enable_float64()
    compiling = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: (
            compiling.append(duration)
            if event.startswith("/jax/core/compile/")
            else None
        )
    )
    made = eval(f"gf.{call}", {"gf": gf, "jr": jr})
    run = lambda: gf.simulate(
        made.flow, made.model, weight_decay=1e-3, slow_time=1e-3, max_steps=20,
        metrics=made.metrics, throw=False,
    )  # fmt: skip
    compiling.clear()
    whole = seconds(lambda: run().params)
    size = sum(x.size for x in jax.tree.leaves(made.flow.partition(made.model)[0]))
    return {
        "parameters": int(size),
        "solver": run().stats.solver,
        "seconds": whole,
        "compiling": sum(compiling),
    }


def two_phase() -> list[dict[str, Any]]:
    import jax.random as jr

    import gradflow as gf

    told = readme()
    problems = {"tanh network": (told["flow"], told["model"])}
    for make in (gf.tasks.diagonal_network, gf.tasks.matrix_completion):
        made = make(jr.key(0))
        problems[made.name.replace("_", " ")] = (made.flow, made.model)
    return [prices_of(name, *problem) for name, problem in problems.items()]


def prices_of(name: str, flow: Any, model: Any) -> dict[str, Any]:
    import numpy as np

    import gradflow as gf

    def path(lam: float) -> Any:
        return gf.simulate(flow, model, weight_decay=lam, slow_time=2.0, throw=False)

    def theory(order: int) -> Any:
        return gf.two_phase(flow, model, slow_time=2.0, order=order, throw=False)

    times = [
        best(lambda lam=lam: path(lam).params) for lam in np.geomspace(1e-2, 1e-6, 5)
    ]
    row: dict[str, Any] = {"problem": name, "flow": statistics.median(times)}
    for order in (1, 2):
        taken = best(lambda order=order: theory(order).drift.params)
        row[f"order {order}"] = taken / row["flow"]
    return row


def best(run: Callable[[], Any]) -> float:
    """The median of three, compiled before."""
    run()
    return statistics.median(seconds(run) for _ in range(3))


# -- the processes, and what they say ---


def child(code: str, **environment: str) -> Any:
    """What an expression gives in a new process, in which it finds this file."""
    told = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import json, first_result as f; print(json.dumps({code}))",
        ],
        cwd=Path(__file__).parent,
        env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"} | environment,
        capture_output=True,
        text=True,
    )
    if told.returncode:
        raise RuntimeError(f"{code}: {told.stderr.strip().splitlines()[-1]}")
    return json.loads(told.stdout.splitlines()[-1])


def first_paths(repeats: int) -> dict[str, float]:
    names = {
        "bare": "Diffrax Tsit5 on y' = −y",
        "simulate": "gradflow.simulate, README's model",
        "kvaerno": "Diffrax Kvaerno5, the same flow",
        "lsoda": "SciPy LSODA, the same flow",
    }
    rounds = [{name: child(f"f.{name}()") for name in names} for _ in range(repeats)]
    found = {name: statistics.median(r[name] for r in rounds) for name in names}
    print("\nThe first path, in seconds")
    for name, words in names.items():
        ratio = found[name] / found["bare"]
        print(f"  {words:<36} {found[name]:6.2f}   {ratio:5.1f} × Tsit5 on y' = −y")
    return found


def first_blocks(repeats: int) -> dict[str, Any]:
    fresh = [child("f.block()") for _ in range(repeats)]
    with tempfile.TemporaryDirectory() as folder:
        kept = dict(KEPT_PROGRAMS=folder, JAX_ENABLE_COMPILATION_CACHE="true")
        child("f.block()", **kept)
        warm = [child("f.block()", **kept) for _ in range(repeats)]
    found = {
        "fresh": statistics.median(r["seconds"] for r in fresh),
        "programs": fresh[0]["programs"],
        "cached": statistics.median(r["seconds"] for r in warm),
    }
    print(
        f"\nThe README's example: {found['fresh']:.1f} s, {found['programs']} "
        f"programs; {found['cached']:.1f} s where these are cached"
    )
    return found


def first_tasks() -> dict[str, Any]:
    print("\nThe first path of each task: seconds, of which compiling")
    found = {}
    for name, call in TASKS.items():
        found[name] = row = child(f"f.task({call!r})")
        print(
            f"  {name:<24} {row['parameters']:>7} parameters  {row['solver']:<6} "
            f"{row['seconds']:6.1f} {row['compiling']:6.1f}",
            flush=True,
        )
    return found


def prices() -> list[dict[str, Any]]:
    rows = child("f.two_phase()")
    print("\ntwo_phase, in single flows (the median of λ = 1e-2 … 1e-6)")
    for row in rows:
        print(
            f"  {row['problem']:<20} order 1: {row['order 1']:5.1f}   order 2: "
            f"{row['order 2']:5.1f}   one flow: {1e3 * row['flow']:.1f} ms"
        )
    return rows


def main(config: Config) -> None:
    measure: dict[str, Callable[[], Any]] = {
        "simulate": lambda: first_paths(config.repeats),
        "block": lambda: first_blocks(config.repeats),
        "tasks": first_tasks,
        "two_phase": prices,
    }
    found = {name: measure[name]() for name in config.rows}
    if config.out.exists():
        found = json.loads(config.out.read_text(encoding="utf-8")) | found
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
