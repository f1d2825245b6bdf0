"""What the experiments share: options, checks, and the summary that they write."""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from jax.experimental import multihost_utils
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from scipy.stats import spearmanr
from tqdm.auto import tqdm

import gradflow as gf
from gradflow.plot import SIZE

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "black")


@dataclasses.dataclass(frozen=True)
class Row:
    """One check: a value, its bound, and whether it holds (None: not checked)."""

    name: str
    value: float
    bound: str
    ok: bool | None
    sentence: str

    def __str__(self) -> str:
        word = {True: "pass", False: "FAIL", None: "  – "}[self.ok]
        number = f"{self.value:10.3g}  ({self.bound})"
        return f"  {word}  {self.name:<10} {number}  {self.sentence}"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of every experiment."""

    seed: int = 0
    """Of the data and the start."""
    out: Path | None = None
    """Folder for the results; results/STUDY/NAME by default."""
    quick: bool = False
    """At most ten minutes: fewer or shorter runs, the same checks where they can be
    made. Options given beside it count, unless they are as by default."""

    def quick_changes(self) -> dict[str, Any]:
        """The settings that `quick` changes; none where it acts in another way."""
        return {}

    def effective(self) -> Self:
        """What is run: with the changes of `quick`, if it is asked for, of all settings
        that are at their defaults."""
        if not self.quick:
            return self
        default = {field.name: field.default for field in dataclasses.fields(self)}
        changes = self.quick_changes().items()
        free = {k: v for k, v in changes if getattr(self, k) == default[k]}
        return dataclasses.replace(self, **free)


WEEK = 7 * 24 * 3600  # in seconds


@dataclasses.dataclass(frozen=True)
class Distributed:
    """Many processes, which share the lanes of a sweep. Under Slurm, Open MPI or
    Kubernetes JAX finds out by itself what is not given."""

    distributed: bool = False
    """Whether this is one of many processes that run the same command."""
    coordinator: str | None = None
    """Address and port of the first process, such as node1:12345."""
    processes: int | None = None
    """How many there are."""
    process: int | None = None
    """Which of them this is, from 0 on."""

    def connect(self) -> bool:
        """Finds the others; whether this is the process that tells the results."""
        if not self.distributed:
            return True
        # A process that is done waits at its end for the first, which has figures to
        # make yet: else all of them are ended after five minutes.
        jax.distributed.initialize(
            self.coordinator,
            self.processes,
            self.process,
            shutdown_timeout_seconds=WEEK,
        )
        # They meet now, while all are here: at their first meeting they wait for each
        # other half a minute only, later for as long as it takes.
        multihost_utils.sync_global_devices("experiments")
        return jax.process_index() == 0


class Outcome(NamedTuple):
    """What an experiment gives."""

    numbers: dict[str, Any]
    checks: list[Row]
    data: xr.Dataset
    figures: dict[str, Figure]


def law(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """The slope of log y against log x, by least squares; NaN below two points."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    good = np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0)
    if np.unique(x[good]).size < 2:
        return np.nan
    return float(np.polyfit(np.log(x[good]), np.log(y[good]), 1)[0])


def decades(x: Iterable[float]) -> float:
    x = np.asarray(list(x))
    return float(np.log10(x.max() / x.min())) if x.size else 0.0


def spread(values: Sequence[float] | np.ndarray) -> float:
    """How far the values are from their geometric mean, at most, as a fraction."""
    logs = np.log(np.asarray(values, float))
    return float(np.exp(np.abs(logs - logs.mean()).max()) - 1)


def rank_correlation(x: Any, y: Any) -> float:
    """Spearman's; NaN where one of them is constant."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.nan
    return float(spearmanr(x, y)[0])  # pyright: ignore[reportArgumentType]


def check(name: str, value: Any, bound: str, ok: Any, sentence: str) -> Row:
    """A row; `ok` None where the criterion can't be judged here."""
    verdict = None if ok is None else bool(ok)
    return Row(name, float(value), bound, verdict, sentence)


def slope_row(name: str, slope: float, target: float, within: float, what: str) -> Row:
    ok = abs(slope - target) <= within
    return check(name, slope, f"{target:g} ± {within:g}", ok, what)


def relative(a: Any, b: Any) -> float:
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(b))


def steps_until(last: int, saves: int, dense: int = 0) -> np.ndarray:
    """Steps to save: the first `dense` ones, and some evenly in the logarithm."""
    return np.union1d(np.arange(min(dense, last) + 1), gf.log_spaced_steps(last, saves))


def bar(items: Iterable[Any], name: str) -> Iterable[Any]:
    return tqdm(list(items), desc=name, leave=False)


def below(name: str, value: float, bound: float, sentence: str) -> Row:
    return Row(name, float(value), f"≤ {bound:.0e}", bool(value <= bound), sentence)


def near(name: str, value: float, target: float, within: float, sentence: str) -> Row:
    ok = bool(abs(value - target) <= within)
    return Row(name, float(value), f"{target:g} ± {within:g}", ok, sentence)


def attempt(check: Callable[..., list[Row]], *args: Any) -> list[Row]:
    """Makes a check and prints it. One that cannot be made counts as failed, with its
    reason."""
    start = time.perf_counter()
    try:
        found = check(*args)
    except Exception as error:  # whatever it is, the other checks go on
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        found = [Row(check.__name__, math.nan, "", False, reason)]
    for row in found:
        print(row, flush=True)
    print(f"        {check.__name__}: {time.perf_counter() - start:.1f} s", flush=True)
    return found


def parse_weight_decay(words: tuple[str, ...]) -> np.ndarray:
    """Numbers and ranges `first:last:count`, from large to small.

    **Raises:** `ValueError` where one is neither.
    """
    out = []
    for word in words:
        try:
            parts = word.split(":")
            if len(parts) == 3:
                first, last, number = float(parts[0]), float(parts[1]), int(parts[2])
                out.extend(np.geomspace(first, last, number))
            else:
                (number,) = parts
                out.append(float(number))
        except ValueError as error:
            raise ValueError(
                f"weight_decay: expected a number or first:last:count, got {word!r}."
            ) from error
    lams = np.unique(np.array(out))[::-1]
    if not (lams > 0).all():
        raise ValueError("weight_decay: expected positive numbers.")
    return lams


def panels(
    count: int, columns: int = 2, size: tuple[float, float] = (5.4, 3.8)
) -> tuple[Figure, list[Axes]]:
    rows = -(-count // columns)
    fig, axes = plt.subplots(
        rows, columns, figsize=(size[0] * columns, size[1] * rows),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for ax in axes.flat[count:]:
        ax.remove()
    return fig, list(axes.flat[:count])


def finish(
    ax: Axes,
    title: str,
    x: str = "step",
    y: str = "",
    *,
    log: str = "xy",
    legend: bool = True,
) -> None:
    if "x" in log:
        ax.set_xscale("log")
    if "y" in log:
        ax.set_yscale("log")
    if ax.has_data():  # lines of which no point is finite leave no limits
        if "x" in log and not np.isfinite(ax.dataLim.minposx):
            ax.set_xlim(1, 10)
        if "y" in log and not np.isfinite(ax.dataLim.minposy):
            ax.set_ylim(1, 10)
    ax.set_title(title, fontsize=SIZE, loc="left")
    ax.set_xlabel(x, fontsize=SIZE)
    ax.set_ylabel(y, fontsize=SIZE)
    ax.grid(alpha=0.25, lw=0.5)
    if legend and ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=SIZE - 2, frameon=False)


def label_few(figure: Figure) -> None:
    """1, 2 and 5 on the logarithmic axes of a decade or two, where by default most
    digits have a label in powers of ten, one over the other. For a figure that is
    ready: it goes by the limits."""
    for ax in figure.axes:
        for axis, limits in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
            low, high = sorted(limits)
            few = 1e-4 <= low and high <= 1e5 and high < 100 * low
            if axis.get_scale() == "log" and few:
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter(StrMethodFormatter("{x:g}"))
                axis.set_minor_formatter(NullFormatter())


def marks(ax: Axes, times: dict[str, float]) -> None:
    """Dotted verticals with names at their foot: on the left, the last on the right if
    there is room before the end of the axis, which is to be drawn before. A name close
    to the one before stands above it."""
    shown = {k: v for k, v in times.items() if np.isfinite(v) and v > 0}
    last = max(shown.values(), default=0.0)
    ax.get_xlim()  # the limits of what is drawn, which are found when asked for
    before, height = -1.0, 0.02
    for label, at in sorted(shown.items(), key=lambda item: item[1]):
        ax.axvline(at, color="grey", ls=":", lw=1)
        place, _ = ax.transAxes.inverted().transform(ax.transData.transform((at, 1.0)))
        right = at == last and place <= 0.8
        height = height + 0.06 if place - before < 0.2 and not right else 0.02
        before = place
        ax.text(
            at, height, f" {label} ", transform=ax.get_xaxis_transform(),
            ha="left" if right else "right", fontsize=SIZE - 3, color="grey",
        )  # fmt: skip


def run_named(config: Any, experiments: dict[str, type], study: str) -> dict[str, Any]:
    """Runs one experiment of a study, found by its settings; returns what is written
    to summary.json, beside arrays.nc and the figures."""
    matplotlib.use("Agg")
    name = next(k for k, v in experiments.items() if v is type(config))
    out = config.out or Path("results") / study / name
    out.mkdir(parents=True, exist_ok=True)
    clock = Clock()
    claim = " ".join((type(config).__doc__ or "").split())
    print(f"{name}: {claim}", flush=True)
    with clock(name):
        numbers, checks, data, figures = config.run()
    for row in checks:
        print(row)
    told = lambda each: {k: v for k, v in vars(each).items() if k != "out"}
    settings = {"settings": told(config)}
    if config.quick and config.quick_changes():
        settings["settings_run"] = told(config.effective())
    numbers = {"experiment": name, "claim": claim, **settings, **numbers}
    data.to_netcdf(out / "arrays.nc", engine="scipy")
    summary = write(out, numbers, checks, figures, clock)
    names = ", ".join(f"{figure}.png" for figure in figures)
    print(f"Written to {out}: summary.json, arrays.nc, {names}")
    return summary


def write(
    out: Path,
    numbers: dict[str, Any],
    checks: list[Row],
    figures: dict[str, Figure],
    clock: "Clock",
) -> dict[str, Any]:
    """Writes summary.json and the figures into a folder; returns the summary."""
    words = [c.ok for c in checks]
    print(
        f"{words.count(True)} passed, {words.count(False)} failed, "
        f"{words.count(None)} not checked; {clock}"
    )
    summary = {
        **numbers,
        "checks": [dataclasses.asdict(c) for c in checks],
        "passed": words.count(True),
        "failed": words.count(False),
        "not_checked": words.count(None),
        "seconds": clock.spent,
        "cpu_seconds": round(time.process_time(), 1),
        "versions": versions(),
        "command": shlex.join(["python", *sys.argv]),
    }
    summary = plain(summary)
    (out / "summary.json").write_text(
        json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )
    for name, figure in figures.items():
        label_few(figure)
        figure.savefig(out / f"{name}.png", dpi=120)
        plt.close(figure)
    return summary


def versions() -> dict[str, str]:
    names = "jax jaxlib diffrax equinox optimistix lineax numpy scipy".split()
    return {
        "python": platform.python_version(),
        "gradflow": _version("gradflow"),
        **{name: _version(name) for name in names},
        "device": jax.devices()[0].device_kind,
        "cores": str(os.cpu_count()),
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def plain(value: Any) -> Any:
    """Numbers, lists and dictionaries that JSON can hold; NaN becomes null."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class Clock:
    """Wall-clock seconds by stage."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def __call__(self, stage: str) -> "Clock":
        self._stage = stage
        return self

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        self.spent[self._stage] = round(time.perf_counter() - self._start, 2)

    def __str__(self) -> str:
        stages = ", ".join(f"{k} {v:.1f} s" for k, v in self.spent.items())
        return f"{sum(self.spent.values()):.0f} s ({stages})"
