"""A sweep that is killed again and again, and goes on.

Kills a run (SIGKILL) at random moments, starts it again, and compares the store that it
leaves with one of a run that nothing happened to: bit by bit, and chunk by chunk what
was computed twice. Lanes write a checkpoint after each few hundred steps. Also measures
the memory that a run takes, with few and with many chunks stored.

    python benchmarks/kill.py --kills 20
"""

import argparse
import hashlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHUNKS = 24
CHILD = """
import resource, sys, jax, jax.random as jr, gradflow as gf

gf.enable_float64()

def make(seed):
    task = gf.tasks.linear_regression(jr.key(seed), samples=3, dim=6)
    return task.flow, task.model, task.metrics

import gradflow.sweeps.store as store
write = store.ZarrStore.write
def told(self, number, *rest):
    write(self, number, *rest)
    print("done", number, flush=True)
store.ZarrStore.write = told
import gradflow.sweeps.identity as configuration
configuration._commit = lambda folder: "whatever"  # which may change while this runs
path, chunks, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
print("start", flush=True)
gf.sweep(make, axes={"seed": range(chunks)}, weight_decay=0.1, progress=False,
         run=gf.Descent([0.02, 0.05], steps=600), saves=5,
         store=gf.Store(path, chunk=2, checkpoint=0.0))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print("peak", peak, flush=True)
"""


def contents(path: Path) -> dict[str, str]:
    """The checksums of all files."""
    return {
        str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in path.rglob("*")
        if f.is_file()
    }


def different(a: Path, b: Path) -> list[str]:
    """The files that differ."""
    one, two = contents(a), contents(b)
    return sorted(name for name in one | two if one.get(name) != two.get(name))


def start(path: Path, chunks: int) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, str(path), str(chunks), "0"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finish(path: Path, chunks: int) -> tuple[str, float]:
    """What a whole run says, and the seconds from its start to its end."""
    process = start(path, chunks)
    assert process.stdout is not None
    process.stdout.readline()
    begun = time.perf_counter()
    said = process.communicate()[0]
    if process.returncode:
        sys.exit(f"the run failed: {said}")
    return said, time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--memory", action="store_true", help="measure memory too")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp())
    moments = random.Random(args.seed)
    whole, killed = out / "whole.zarr", out / "killed.zarr"
    _, seconds = finish(whole, CHUNKS)
    done: list[int] = []
    kills = 0
    while kills < args.kills:
        process = start(killed, CHUNKS)
        assert process.stdout is not None
        process.stdout.readline()
        try:
            # Later kills find less left to do.
            process.wait(moments.uniform(0.0, seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += 1
        said = process.communicate()[0]
        done += [int(n) for n in re.findall(r"done (\d+)", said)]
        print(f"kill {kills}: chunks {sorted(set(done))} are there", file=sys.stderr)
        if process.returncode == 0:  # it was faster: all is there, begin anew
            done = []
            if different(killed, whole):
                sys.exit(f"the stores differ in {different(killed, whole)}")
            shutil.rmtree(killed)
    said, _ = finish(killed, CHUNKS)
    done += [int(n) for n in re.findall(r"done (\d+)", said)]
    result = {
        "kills": kills,
        "equal": not different(killed, whole),
        "files": len(contents(whole)),
        # What is written after its marker is there, and before it is said to be.
        "computed_again": sorted({n for n in done if done.count(n) > 1}),
        "leftovers": [f.name for f in out.iterdir() if "partial" in f.name],
    }
    if args.memory:
        for chunks in (8, 256):
            said, _ = finish(out / f"{chunks}.zarr", chunks)
            peak = float(said.split("peak")[-1])
            result[f"peak_MB_{chunks}_chunks"] = round(peak, 1)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
