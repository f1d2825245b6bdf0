"""gradflow on an accelerator: many weight decays at once, and one large network.

Runs 256 values of λ of P1 and P3 in one vmapped sweep, in float64, and the same values
one after the other on the CPU of the same machine; then P4 on both. Writes a table and
the numbers.
"""

import dataclasses
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import numpy as np
import tyro
from problems import Problem, PROBLEMS
from tqdm.auto import tqdm

import gradflow as gf

gf.enable_float64()

LARGE = "P4"  # the problem of which one path is run


@dataclasses.dataclass(frozen=True)
class Config:
    problems: tuple[Literal["P1", "P2", "P3", "P4"], ...] = ("P1", "P3", "P4")
    """Which problems; P4 is run for one λ alone, 1e-4."""
    lanes: int = 256
    """Values of λ in a sweep, evenly in the logarithm from 1e-2 to 1e-6."""
    rtol: float = 1e-4
    """Relative tolerance."""
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


def sweep(problem: Problem, config: Config, device: jax.Device, batch: str) -> dict:
    """All lanes on one device."""
    task = move(problem.task, device)
    lams = np.geomspace(1e-2, 1e-6, config.lanes)
    run = lambda: (
        gf.sweep(
            task.flow,
            task.model,
            weight_decay=lams,
            slow_time=5.0,
            saves=25,
            rtol=config.rtol,
            batch=batch,
            progress=False,
        ).paths
    )
    seconds, paths = on(device, run, 3 if batch == "vmap" else 1)
    return result(problem, config.lanes, batch, device, seconds, paths)


def one(problem: Problem, config: Config, device: jax.Device) -> dict:
    """One path on one device."""
    task = move(problem.task, device)
    run = lambda: gf.simulate(
        task.flow,
        task.model,
        weight_decay=1e-4,
        slow_time=5.0,
        saves=25,
        rtol=config.rtol,
        throw=False,
    )
    seconds, path = on(device, run, 3)
    return result(problem, 1, "one path", device, seconds, path)


def result(
    problem: Problem,
    lanes: int,
    batch: str,
    device: jax.Device,
    seconds: float,
    paths: gf.Path,
) -> dict:
    return {
        "problem": problem.name,
        "lanes": lanes,
        "batch": batch,
        "device": device.device_kind,
        "seconds": seconds,
        "seconds_per_lane": seconds / lanes,
        "succeeded": int(np.sum(np.asarray(paths.succeeded))),
        "most_steps": int(np.max(np.asarray(paths.stats.steps))),
        "last_train_loss": np.asarray(paths.train_loss)[..., -1].tolist(),
    }


def difference(a: dict, b: dict) -> float:
    """How far two devices are apart in the last training loss of any lane."""
    first, second = np.array(a["last_train_loss"]), np.array(b["last_train_loss"])
    return float(np.max(np.abs(first - second) / np.abs(second)))


def table(pairs: list[tuple[dict, dict]]) -> str:
    lines = [
        "| problem | lanes | here, per lane | CPU loop, per lane | ratio | "
        "lanes that ended | difference in the last training loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for here, cpu in pairs:
        ratio = cpu["seconds"] / here["seconds"]
        lines.append(
            f"| {here['problem']} | {here['lanes']} | "
            f"{1e3 * here['seconds_per_lane']:.3g} ms | "
            f"{1e3 * cpu['seconds_per_lane']:.3g} ms | {ratio:.3g} × | "
            f"{here['succeeded']}, CPU {cpu['succeeded']} | "
            f"{difference(here, cpu):.1e} |"
        )
    return "\n".join(lines)


def main(config: Config) -> None:
    try:
        device = jax.devices(config.device)[0]
    except RuntimeError:
        sys.exit("JAX sees no GPU here; --device cpu --lanes 4 tries this on the CPU.")
    cpu = jax.devices("cpu")[0]
    pairs: list[tuple[dict, dict]] = []
    with tqdm(total=2 * len(config.problems)) as bar:
        for name in config.problems:
            problem = PROBLEMS[name]()
            pair = []
            for place, batch in ((device, "vmap"), (cpu, "loop")):
                bar.set_postfix_str(f"{name} on {place.device_kind}")
                if name == LARGE:
                    pair.append(one(problem, config, place))
                else:
                    pair.append(sweep(problem, config, place, batch))
                bar.update()
            pairs.append(tuple(pair))
            save(config, device, pairs)
    print(table(pairs))


def save(config: Config, device: jax.Device, pairs: list[tuple[dict, dict]]) -> None:
    """Writes all that is known so far."""
    kind = "".join(c if c.isalnum() else "_" for c in device.device_kind)
    about = {
        "device": device.device_kind,
        "date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        "versions": {"jax": jax.__version__, "python": sys.version.split()[0]},
        "settings": dataclasses.asdict(config) | {"out": str(config.out)},
        "runs": [run for pair in pairs for run in pair],
    }
    config.out.mkdir(parents=True, exist_ok=True)
    text = (
        f"# gradflow on {device.device_kind}\n\nFloat64, rtol {config.rtol:g}, slow "
        "time 5, without compilation. The CPU runs lane after lane, on all the cores "
        f"it likes.\n\n{table(pairs)}\n\n{about['date']}, JAX {jax.__version__}\n"
    )
    (config.out / f"gpu_{kind}.md").write_text(text, encoding="utf-8")
    (config.out / f"gpu_{kind}.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
