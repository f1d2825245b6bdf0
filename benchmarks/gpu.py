"""gradflow on an accelerator, in one command.

- `sweeps`: P1 and P3 with 1 to 4096 values of λ in one vmapped sweep, in float64,
  against a loop on the CPU of the same machine; and how many steps wait for others;
- `large`: P4, one path on each;
- `block`: the README's own model on each: the same numbers;
- `rank`: that of P1 in float32, with TF32 as JAX's default;
- `memory`: a sweep with a hundredth of the memory, in a process of its own;
- `transformer`: addition mod 113 by the paper's transformer, as far as it goes.

Writes a table and the numbers, after each part. `--device cpu` tries it without a GPU.
"""

import contextlib
import dataclasses
import datetime
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import tyro
from problems import Problem, PROBLEMS
from tqdm.auto import tqdm

import gradflow as gf

gf.enable_float64()

Part = Literal["sweeps", "large", "block", "rank", "memory", "transformer"]
LAM = 1e-4  # of single paths


@dataclasses.dataclass(frozen=True)
class Config:
    parts: tuple[Part, ...] = (
        "sweeps", "large", "block", "rank", "memory", "transformer",
    )  # fmt: skip
    """What to run."""
    problems: tuple[Literal["P1", "P2", "P3"], ...] = ("P1", "P3")
    """Of the sweeps."""
    lanes: tuple[int, ...] = (1, 64, 256, 1024, 4096)
    """Values of λ in a sweep, evenly in the logarithm from 1e-2 to 1e-6."""
    most_on_cpu: int = 64
    """Lanes that the CPU is given, at most: they cost it the same, one by one."""
    rtol: float = 1e-4
    """Relative tolerance."""
    modulus: int = 113
    """Of the transformer."""
    max_steps: int = 2000
    """That the transformer is followed for."""
    device: Literal["gpu", "cpu"] = "gpu"
    """cpu: a try without a GPU, with the vmapped sweep on the CPU too."""
    out: Path = Path(__file__).parent / "results"
    """Folder for the results."""


def on(device: jax.Device, run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """The median time of a run on a device, after one to compile, and what it gave."""
    seconds = []
    with jax.default_device(device):
        out = jax.block_until_ready(run())
        for _ in range(repeats):
            start = time.perf_counter()
            out = jax.block_until_ready(run())
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), out


def move(task: gf.tasks.Task, device: jax.Device) -> gf.tasks.Task:
    arrays, rest = eqx.partition(task, eqx.is_array)
    return eqx.combine(jax.device_put(arrays, device), rest)


def both(config: Config) -> tuple[jax.Device, jax.Device]:
    """The device, and the CPU."""
    return jax.devices(config.device)[0], jax.devices("cpu")[0]


def sweeps(config: Config) -> list[dict]:
    """Lanes per second of each number of lanes, and of the CPU."""
    here, cpu = both(config)
    found = []
    for name in config.problems:
        problem = PROBLEMS[name]()
        for lanes in config.lanes:
            found.append(sweep(problem, config, here, "vmap", lanes))
        few = min(config.most_on_cpu, max(config.lanes))
        found.append(sweep(problem, config, cpu, "loop", few))
    return found


def sweep(
    problem: Problem, config: Config, device: jax.Device, batch: str, lanes: int
) -> dict:
    """All lanes on one device."""
    task = move(problem.task, device)

    def run() -> gf.Path:
        return gf.sweep(
            task.flow, task.model, weight_decay=np.geomspace(1e-2, 1e-6, lanes),
            slow_time=5.0, saves=25, rtol=config.rtol, solver=gf.KKT4(), batch=batch,
            progress=False,
        ).paths  # fmt: skip

    seconds, paths = on(device, run, 3 if batch == "vmap" else 1)
    steps = np.asarray(paths.stats.steps)
    return {
        "problem": problem.name,
        "lanes": lanes,
        "batch": batch,
        "device": device.device_kind,
        "seconds": seconds,
        "lanes_per_second": lanes / seconds,
        "succeeded": int(np.sum(np.asarray(paths.succeeded))),
        "most_steps": int(steps.max()),
        # Of the steps of all lanes, if each took as many as the longest.
        "waiting": float(1 - steps.mean() / steps.max()) if batch == "vmap" else 0.0,
    }


def large(config: Config) -> list[dict]:
    """One path of P4 on each device."""
    problem, found = PROBLEMS["P4"](), []
    for device in both(config):
        task = move(problem.task, device)
        run = functools.partial(
            gf.simulate, task.flow, task.model, weight_decay=LAM, slow_time=5.0,
            saves=25, rtol=config.rtol, throw=False,
        )  # fmt: skip
        seconds, path = on(device, run, 1)
        found.append(
            {
                "device": device.device_kind,
                "seconds": seconds,
                "steps": int(path.stats.steps),
                "result": path.verdict,
                "train_loss": float(path.train_loss[-1]),
            }
        )
    return found


def block(config: Config) -> list[dict]:
    """The README's own model on each device, and how far their numbers are apart."""
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    found, paths = [], []
    for device in both(config):
        begun, names = time.perf_counter(), {}
        with (  # (it saves a figure)
            tempfile.TemporaryDirectory() as folder,
            contextlib.chdir(folder),
            jax.default_device(device),
        ):
            exec(code, names)
        paths.append(np.asarray(jax.device_get(names["path"].train_loss)))
        found.append(
            {
                "device": device.device_kind,
                "seconds": time.perf_counter() - begun,
                "grokked": np.asarray(names["report"].grokked.measured).tolist(),
            }
        )
    apart = float(np.max(np.abs(paths[0] / paths[1] - 1)))
    return [*found, {"train_loss_apart": apart}]


def rank(config: Config) -> list[dict]:
    """That of P1 where its flow ends, in float32, though TF32 is JAX's default."""
    here, _ = both(config)
    task = PROBLEMS["P1"]().task
    single = jax.tree.map(
        lambda x: x.astype(np.float32) if eqx.is_inexact_array(x) else x, task
    )
    task = move(single, here)
    with jax.default_device(here), jax.default_matmul_precision("tensorfloat32"):
        limit = gf.manifold.limit_map(task.flow, task.model, rtol=1e-4)
        found = gf.manifold.diagnose(task.flow, limit.model)
    return [
        {
            "device": here.device_kind,
            "limit": str(limit),
            "rank": int(found.spectrum.rank),
            "samples": int(task.loss.y.size),
            "diagnosis": str(found),
        }
    ]


def memory(config: Config) -> list[dict]:
    """The sweep of P1 with most lanes, where a hundredth of the memory is given."""
    words = [
        sys.executable, __file__, "--parts", "sweeps", "--problems", "P1", "--lanes",
        str(max(config.lanes)), "--most-on-cpu", "1", "--device", config.device,
        "--out", str(config.out / "little_memory"),
    ]  # fmt: skip
    env = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.01"}
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    told = [line for line in done.stderr.splitlines() if "memory" in line]
    return [{"ended": done.returncode == 0, "told": told[-1:], "said": done.stdout}]


def transformer(config: Config) -> list[dict]:
    """How far addition is followed, in so many steps."""
    here, _ = both(config)
    task = move(
        gf.tasks.modular_transformer(
            jr.key(0), modulus=config.modulus, activation="gelu"
        ),
        here,
    )
    with jax.default_device(here):
        begun = time.perf_counter()
        path = gf.simulate(
            task.flow, task.model, weight_decay=LAM, slow_time=5.0, saves=65,
            metrics=task.metrics, solver=gf.RKC2(), rtol=1e-3,
            max_steps=config.max_steps, throw=False,
        )  # fmt: skip
        jax.block_until_ready(path)
    there = np.isfinite(np.asarray(path.train_loss))
    return [
        {
            "device": here.device_kind,
            "seconds": time.perf_counter() - begun,
            "steps": int(path.stats.steps),
            "evaluations": int(path.stats.evaluations),
            "slow_time": float(path.slow_time[there][-1]),
            "train": float(path.metrics["train"][there][-1]),
            "test": float(path.metrics["test"][there][-1]),
            "result": path.verdict,
        }
    ]


PARTS: dict[Part, Callable[[Config], list[dict]]] = {
    "sweeps": sweeps, "large": large, "block": block, "rank": rank,
    "memory": memory, "transformer": transformer,
}  # fmt: skip


def table(rows: list[dict]) -> str:
    """One, in Markdown, with a column for each name."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names)]
    lines += [[told(row.get(name, "")) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def told(value: Any) -> str:
    words = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(words.split())


def main(config: Config) -> None:
    try:
        device, _ = both(config)
    except RuntimeError:
        sys.exit("JAX sees no GPU here; --device cpu --lanes 4 tries this on the CPU.")
    found: dict[str, list[dict]] = {}
    for name in tqdm(config.parts):
        begun = time.perf_counter()
        try:
            found[name] = PARTS[name](config)
        except Exception as error:  # the others are run
            found[name] = [{"failed": f"{type(error).__name__}: {error}"}]
        tqdm.write(f"{name}: {time.perf_counter() - begun:.0f} s\n{table(found[name])}")
        save(config, device, found)


def save(config: Config, device: jax.Device, found: dict[str, list[dict]]) -> None:
    """Writes all that is known so far."""
    kind = "".join(c if c.isalnum() else "_" for c in device.device_kind)
    about = {
        "device": device.device_kind,
        "date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        "versions": {"jax": jax.__version__, "python": sys.version.split()[0]},
        "settings": dataclasses.asdict(config) | {"out": str(config.out)},
        "parts": found,
    }
    config.out.mkdir(parents=True, exist_ok=True)
    parts = [f"## {name}\n\n{table(rows)}" for name, rows in found.items()]
    text = "\n\n".join(
        [
            f"# gradflow on {device.device_kind}",
            f"rtol {config.rtol:g}. Sweeps and P4 in float64, to slow time 5, without "
            "compilation; the rest with. The CPU runs lane after lane.",
            *parts,
            f"{about['date']}, JAX {jax.__version__}",
        ]
    )
    (config.out / f"gpu_{kind}.md").write_text(text + "\n", encoding="utf-8")
    (config.out / f"gpu_{kind}.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
