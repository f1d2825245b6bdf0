"""Trainings that are kept in the store of a sweep, so that what is interrupted goes on
where it was; and what is read off them."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

import gradflow as gf

Lane = dict[str, Any]
"""One training, by its values on the axes: `penalty`, `alpha`, `beta`, `gamma`, `hold`,
`share`, `seed`, as far as they have a meaning."""

SYMBOLS = dict(alpha="α", beta="β", gamma="γ")

AXIS_SYMBOLS = dict(weight_decay="γ", init_scale="α", alpha="α", hold="held")
"""What a bar of progress calls the axes of a sweep, unless told otherwise."""


def words(lane: Lane, *, latex: bool = False) -> str:
    """A lane for a sentence, or for a title."""
    sign = lambda name: rf"$\{name}$" if latex else SYMBOLS[name]
    shown = [name for name in SYMBOLS if name in lane]
    if held := lane.get("hold", False):
        shown.remove("gamma")
    parts = [f"{sign(name)} = {float(lane[name]):g}" for name in shown]
    if "penalty" in lane:
        parts.insert(0, PENALTIES[lane["penalty"]] if latex else lane["penalty"])
    return ", ".join(parts + ["norm held"] * bool(held))


PENALTIES = {
    "l1": r"$\ell_1$",
    "l2": r"$\ell_2$",
    "nuclear": r"$\ell_*$",
    "sobolev": "Sobolev",
}


def trained(
    problem: Callable[..., Any], store: Path, *, learning_rate: Any, **options: Any
) -> xr.Dataset:
    """What a `gf.sweep` of descents records; read where the store has it, and on a CPU,
    where lanes are run one after the other, each run stored when it is done.

    **Returns:** the metrics by their names, `train_loss`, `penalty`, `norm`, that of
    all weights, and `step`; of the dimensions of the sweep, and time.

    **Raises:** `RuntimeError` where a run failed.
    """
    chunk = 1 if jax.default_backend() == "cpu" else None
    options.setdefault("progress", AXIS_SYMBOLS)
    own = {f.name for f in dataclasses.fields(gf.Descent)} & set(options)
    descent = gf.Descent(learning_rate, **{name: options.pop(name) for name in own})
    kept = gf.Store(store, chunk=chunk)
    runs = gf.sweep(problem, run=descent, store=kept, **options).to_xarray()
    if failed := int((runs.result != 0).sum()):
        raise RuntimeError(
            f"{store}: {failed} runs left the finite range, or raised an error: "
            f"{runs.attrs['causes']}"
        )
    runs = runs.load().drop_attrs().reset_coords()
    names = [k for k in runs if k == "train_loss" or k.startswith("metric_")]
    recorded = runs[[*names, "penalty"]].rename(penalty="penalty_value")
    recorded = recorded.rename({k: k.removeprefix("metric_") for k in names})
    rate = runs["learning_rate"] if "learning_rate" in runs else learning_rate
    steps = np.rint(runs.t / rate)
    return recorded.assign(norm=np.sqrt(2 * runs.penalty), step=steps)


AXES = dict(alpha="init_scale", gamma="weight_decay")
"""What `gf.sweep` calls the symbols of a lane."""

OPTIONS = ("init_scale", "learning_rate", "weight_decay")
"""Those that are arguments of it; others are of the problem."""


def train(
    problem: Callable[..., Any],
    lanes: Sequence[Lane],
    store: Path,
    at: Callable[[Lane], np.ndarray],
    axes: dict[str, str] = AXES,
    **options: Any,
) -> xr.Dataset:
    """Trains every lane through the steps `at`, or reads it where it has been trained.
    Those of as many steps are one sweep, whose store has that number in its name.

    **Arguments:** as for `trained`, and

    - `axes`: what `gf.sweep` calls the values of a lane.

    **Returns:** all that is recorded, of dimensions run and time, with the values of
    the lanes; NaN after the end of a run.
    """
    count = lambda k: int(at(lanes[k])[-1])
    found: dict[int, xr.Dataset] = {}
    for steps, same in itertools.groupby(sorted(range(len(lanes)), key=count), count):
        group = list(same)
        columns = {
            axes.get(k, k): [lanes[i][k] for i in group]
            for k in lanes[0]
            if k != "share"
        }
        own = {k: columns.pop(k) for k in list(columns) if k not in OPTIONS}
        zipped = [(*own, *columns)]
        runs = trained(
            problem,
            store.with_name(f"{store.stem}_{steps}.zarr"),
            at=at(lanes[group[0]]),
            zipped=zipped if len(zipped[0]) > 1 else (),
            **({"axes": own} if own else {}),
            progress={axes.get(k, k): s for k, s in (AXIS_SYMBOLS | SYMBOLS).items()},
            **{"weight_decay": 0.0, **columns, **options},
        )
        runs = runs.drop_vars([*own, *columns], errors="ignore")
        runs = runs.rename({next(d for d in runs.step.dims if d != "time"): "run"})
        found |= {i: runs.isel(run=k) for k, i in enumerate(group)}
    most = max(run.sizes["time"] for run in found.values())
    full = lambda run: run.pad(time=(0, most - run.sizes["time"]))
    joined = xr.concat([full(found[i]) for i in range(len(lanes))], "run")
    labels = {name: ("run", [lane[name] for lane in lanes]) for name in lanes[0]}
    return joined.assign_coords(labels)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a training recorded, and when it learnt: steps, `inf` where it did not."""

    lane: Lane
    steps: np.ndarray
    arrays: dict[str, np.ndarray]
    """`train` and `test`, the metrics; `train_loss`; `norm`, …"""
    memorised: float
    grokked: float
    half: float = math.nan
    """When the test metric was half way to its threshold; of accuracies, at 0.5."""

    @property
    def ratio(self) -> float:
        """t_test/t_train."""
        if not math.isfinite(self.memorised):
            return math.nan
        return self.grokked / max(self.memorised, 1.0)

    @property
    def delay(self) -> float:
        """Steps from memorisation to generalisation."""
        late = self.grokked - self.memorised
        return late if math.isfinite(self.memorised) else math.nan

    def at(self, name: str, step: float) -> float:
        """What was recorded last, up to a step; NaN for one that never came, or that
        is after the end."""
        if not math.isfinite(step) or step > self.steps[-1]:
            return math.nan
        i = np.searchsorted(self.steps, step, side="right") - 1
        return float(self.arrays[name][i])


def runs_of(data: xr.Dataset) -> list[Trained]:
    """The runs of what `train` gives, after `with_times`."""
    out = []
    names = [k for k in data if data[k].dims == ("run", "time") and k != "step"]
    for i in range(data.sizes["run"]):
        run = data.isel(run=i)
        there = np.isfinite(run.step.values)
        lane = {k: run[k].item() for k in data.coords if data[k].dims == ("run",)}
        times = {k: float(run[k]) for k in TIMES if k in run}
        arrays = {k: run[k].values[there] for k in names}
        out.append(Trained(lane, run.step.values[there].astype(int), arrays, **times))
    return out


TIMES = ("memorised", "grokked", "half")


def with_times(
    data: xr.Dataset,
    metrics: dict[str, gf.Metric],
    *,
    lasting: bool = False,
    calm: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> xr.Dataset:
    """The runs with the steps at which each had `memorised`: `train` was at its
    threshold; `grokked`: `test` was; and was `half` way there. The first ones, or, if
    `lasting`, those from which on it is kept; after a filter, `calm`."""
    find = for_good if lasting else first
    test = metrics["test"]
    level = test.threshold
    half = 0.5 if test.higher_is_better or level is None else 2 * level
    asked = {
        "memorised": ("train", metrics["train"].threshold),
        "grokked": ("test", level),
        "half": ("test", half),
    }
    for name, (key, level) in asked.items():
        times = []
        for steps, values in zip(data.step.values, data[key].values, strict=True):
            there = np.isfinite(steps)
            higher = metrics[key].higher_is_better
            times.append(find(steps[there], calm(values[there]), level, higher))
        data = data.assign({name: ("run", times)})
    return data


def reached(runs: xr.Dataset, name: str, level: float = 0.95) -> np.ndarray:
    """The first saved step at which an accuracy is at the level, for every run; `inf`
    where there is none."""
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


def steps_until(last: int, saves: int, dense: int = 0) -> np.ndarray:
    """Steps to save: the first `dense` ones, and some evenly in the logarithm."""
    return np.union1d(np.arange(min(dense, last) + 1), gf.log_spaced_steps(last, saves))


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
