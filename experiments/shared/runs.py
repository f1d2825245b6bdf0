"""Runs that are stored, so that an interrupted grid goes on where it was; and what is
read off them."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

import gradflow as gf

from .common import plain, Settings

Arrays = dict[str, np.ndarray]


def stored(
    path: Path, settings: dict[str, Any], compute: Callable[[], Arrays]
) -> Arrays:
    """What `compute` gives, from the file `path` (.npz) where it has been computed
    before with the same settings."""
    arrays = read(path, settings)
    if arrays is None:
        arrays = compute()
        write(path, settings, arrays)
    return arrays


def read(path: Path, settings: dict[str, Any]) -> Arrays | None:
    """What was written with the same settings, if anything was."""
    if not path.is_file():
        return None
    with np.load(path) as there:
        if str(there["settings"]) != json.dumps(plain(settings)):
            return None
        return {name: there[name] for name in there.files if name != "settings"}


def write(path: Path, settings: dict[str, Any], arrays: Arrays) -> None:
    """Writes a file that is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part.npz")
    np.savez(aside, settings=json.dumps(plain(settings)), **arrays)
    os.replace(aside, path)


def store_of(config: Settings, name: str, part: str = "") -> Path:
    """The store of an experiment's sweep; those of quick runs are apart."""
    folder = config.out or Path("results/omnigrok") / name
    return folder / f"{'quick' if config.quick else 'runs'}{part}.zarr"


def trained(
    problem: Callable[..., Any], store: Path, *, learning_rate: float, **options: Any
) -> xr.Dataset:
    """What a `gf.sweep` of descents records; read where the store has it, and each run
    stored when it is done.

    **Returns:** the metrics by their names, `train_loss`, `norm`, that of all weights,
    and `step`; of the dimensions of the sweep, and time.

    **Raises:** `RuntimeError` where a run failed.
    """
    runs: Any = gf.sweep(
        problem, learning_rate=learning_rate, store=store, chunk=1, **options
    )
    if failed := int((runs.result != 0).sum()):
        raise RuntimeError(
            f"{store}: {failed} runs left the finite range, or raised an error: "
            f"{runs.attrs['causes']}"
        )
    runs = runs.load().drop_attrs().reset_coords()
    names = [k for k in runs if k == "train_loss" or k.startswith("metric_")]
    recorded = runs[names].rename({k: k.removeprefix("metric_") for k in names})
    steps = np.rint(runs.t / learning_rate).astype(int)
    return recorded.assign(norm=np.sqrt(2 * runs.penalty), step=steps)


def reached(runs: xr.Dataset, name: str, level: float = 0.95) -> np.ndarray:
    """The first saved step at which an accuracy is at the level, for every run of
    `trained`; `inf` where there is none."""
    find = lambda steps, values: first(steps, values, level, higher=True)
    return np.vectorize(find, signature="(n),(n)->()")(runs.step, runs[name])


def single(tree: Any) -> Any:
    """The same in single precision, as the papers' code trains."""
    narrow = lambda x: x.astype(jnp.float32)
    floats = lambda x: isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact)
    return jax.tree.map(lambda x: narrow(x) if floats(x) else x, tree)


def save_steps(steps: int, even: int) -> np.ndarray:
    """Evenly in the logarithm, and every `even` steps: learning may be late, and quick
    then."""
    return np.union1d(gf.log_spaced_steps(steps, 120), np.arange(0, steps + 1, even))


def first(steps: np.ndarray, values: np.ndarray, level: float, higher: bool) -> float:
    """The first saved step that reaches the level, as in the papers; `inf` if none."""
    good = values >= level if higher else values <= level
    return float(steps[np.argmax(good)]) if good.any() else math.inf


def for_good(
    steps: np.ndarray, values: np.ndarray, level: float, higher: bool
) -> float:
    """The first saved step from which on the level is reached; `inf` if none."""
    bad = ~(values >= level if higher else values <= level)
    after = np.flatnonzero(bad)[-1] + 1 if bad.any() else 0
    return float(steps[after]) if after < len(steps) else math.inf
