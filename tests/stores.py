"""A small sweep on disk, for tests of stores."""

import concurrent.futures
import hashlib
import threading

import jax.random as jr

import gradflow as gf

RATES = [0.02, 0.05, 0.1]
SEEDS = [0, 1, 2, 3]
BUILT = []


def make(seed):
    BUILT.append(seed)
    task = gf.tasks.linear_regression(jr.key(seed), samples=3, dim=6)
    return task.flow, task.model, task.metrics


def run(path, function=make, *, chunk=3, parameters=False, retry=False, **steps):
    steps = dict(learning_rate=RATES, steps=20) | steps
    store = gf.Store(path, chunk=chunk, parameters=parameters, retry=retry)
    sweep = gf.sweep(
        function, axes={"seed": SEEDS}, weight_decay=0.1, run=gf.Descent(**steps),
        saves=5, progress=False, store=store,
    )  # fmt: skip
    return sweep.to_xarray()


def contents(path):
    """The checksums of all files."""
    return {
        str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in path.rglob("*")
        if f.is_file()
    }


def leftovers(path):
    return [f.name for f in path.parent.iterdir() if "partial" in f.name]


def in_threads(*calls):
    """What each call gives, all at the same time."""
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        barrier = threading.Barrier(len(calls))
        begin = lambda call: (barrier.wait(), call())[1]
        return [future.result() for future in [pool.submit(begin, c) for c in calls]]
