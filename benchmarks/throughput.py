"""How many lanes a second a sweep runs, next to one run after another.

A sweep of many weight decays of the diagonal task, on D forced host devices of one
process, and by P processes that share a store; and the same runs one by one, by
`simulate`, in one process on one core. Lane efficiency is the rate of the sweep over
that of the single runs times the cores. All three take turns, and the best of each
counts, as a machine that does other work too is now faster, now slower.

    python benchmarks/throughput.py --lanes 1024
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = """
import json, os, resource, sys, time
import jax, jax.random as jr, numpy as np
what, lanes, place, count, address, out = sys.argv[1:]
lanes, place, count = int(lanes), int(place), int(count)
if what != "devices" and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[place % len(cores)]})
if count > 1:
    jax.distributed.initialize(address, count, place)
import gradflow as gf

gf.enable_float64()
task = gf.tasks.diagonal_network(jr.key(0))
lams = np.geomspace(1e-2, 1e-5, lanes)
options = dict(slow_time=3.0, saves=33, solver=gf.KKT4(), rtol=1e-5)
metrics = {k: m.fn for k, m in task.metrics.items()}

def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime

def single(n):
    for lam in lams[:: max(1, lanes // n)]:
        path = gf.simulate(task.flow, task.model, weight_decay=lam, metrics=metrics,
                           **options)
        jax.block_until_ready(path)

def sweep(n, store=None):
    return gf.sweep(task.flow, task.model, weight_decay=lams[:n], metrics=metrics,
                    progress=False, batch="loop",
                    store=store and gf.Store(store, chunk=64), **options)

# To compile.
if what == "single":
    single(2)
else:
    sweep(2 * 8 * jax.local_device_count())
    if what == "processes":
        sweep(64 * count, out + ".first")  # a chunk for each process
begin, used = time.perf_counter(), cpu()
if what == "single":
    single(min(lanes, 256))
    n = len(lams[:: max(1, lanes // min(lanes, 256))])
elif what == "devices":
    paths = sweep(lanes)
    n = int(np.sum(np.asarray(paths.succeeded)))
else:
    sweep(lanes, out)
    n = lanes / count
seconds, used = time.perf_counter() - begin, cpu() - used
print(json.dumps({"lanes": n, "seconds": seconds, "cpu_seconds": used}))
"""


def start(
    what: str, lanes: int, devices: int, place: int, count: int, address: str, out: Path
) -> subprocess.Popen:
    flags = os.environ.get("XLA_FLAGS", "")
    flags += f" --xla_force_host_platform_device_count={devices}"
    if what != "devices":
        # One thread each: what is compared is a run on one core.
        flags += " --xla_cpu_multi_thread_eigen=false"
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, what, str(lanes), str(place), str(count), address,
         str(out)],
        env=os.environ | {"XLA_FLAGS": flags, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def told(processes: list[subprocess.Popen]) -> dict[str, float]:
    found = []
    for process in processes:
        out = process.communicate()[0]
        if process.returncode:
            sys.exit("a run failed")
        found.append(json.loads(out.splitlines()[-1]))
    seconds = max(f["seconds"] for f in found)
    lanes = sum(f["lanes"] for f in found)
    cpu = sum(f["cpu_seconds"] for f in found)
    return {
        "lanes": lanes,
        "seconds": round(seconds, 2),
        "per_second": round(lanes / seconds, 1),
        "cpu_ms_per_lane": round(1e3 * cpu / lanes, 3),
        "load": round(os.getloadavg()[0], 1),
    }


def once(lanes: int, cores: int) -> dict[str, dict[str, float]]:
    out = Path(tempfile.mkdtemp())
    run = lambda what, devices=1, place=0, count=1, address="": start(
        what, lanes, devices, place, count, address, out / "sweep.zarr"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    found = {"single": told([run("single")])}
    found["devices"] = told([run("devices", cores)])
    shares = [run("processes", 1, k, cores, address) for k in range(cores)]
    found["processes"] = told(shares)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lanes", type=int, default=1024)
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rounds = [once(args.lanes, args.cores) for _ in range(args.rounds)]
    best = lambda name: max((r[name] for r in rounds), key=lambda v: v["per_second"])
    results = {name: best(name) for name in rounds[0]}
    one = results["single"]["per_second"]
    for name in ("devices", "processes"):
        ideal = one * args.cores
        results[name]["lane_efficiency"] = round(results[name]["per_second"] / ideal, 3)
    for name, values in results.items():
        print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in values.items()))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
