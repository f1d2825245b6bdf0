"""The command line: settings, and what is done with them."""

import abc
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import tyro
import xarray as xr
from jax.experimental import multihost_utils
from matplotlib.figure import Figure
from tqdm.auto import tqdm

import gradflow as gf

from . import record
from .figures import label_few
from .rows import attempt, Row


@dataclasses.dataclass(frozen=True)
class Settings(abc.ABC):
    """Of every experiment, which has three verbs: it computes arrays, judges them, and
    draws them."""

    QUICK: ClassVar[dict[str, Any]] = {}
    """The settings that `quick` changes; none where it acts in another way."""

    seed: int = 0
    """Of the data and the start."""
    out: Path | None = None
    """Folder for the results; results/STUDY/NAME by default."""
    quick: bool = False
    """At most ten minutes of a core: fewer or shorter runs, the same checks where they
    can be made. What is given beside it counts."""
    rejudge: bool = False
    """Judge the arrays that are stored, under the settings they were computed with."""
    redraw: bool = False
    """Draw these arrays."""
    cache: bool = True
    """Keep what is compiled in the user's cache folder, for the next run."""
    given: tyro.conf.Suppress[tuple[str, ...]] = ()
    """The settings that the command line names."""

    @abc.abstractmethod
    def compute(self) -> xr.Dataset | None:
        """All arrays; None by a process that is not the first."""

    @abc.abstractmethod
    def judge(self, data: xr.Dataset) -> list[Row]:
        """What is asked of them."""

    @abc.abstractmethod
    def draw(self, data: xr.Dataset) -> dict[str, Figure]:
        """Figures of them, by name."""

    def effective(self) -> Self:
        """What is run: with the changes of `quick`, if it is asked for, of all settings
        that the command line does not name, and that are at their defaults."""
        if not self.quick:
            return self
        free = {k: v for k, v in self.QUICK.items() if self.is_free(k)}
        return dataclasses.replace(self, **free)

    def is_free(self, name: str) -> bool:
        """Whether nobody has asked for this value of a setting."""
        default = {field.name: field.default for field in dataclasses.fields(self)}
        return name not in self.given and getattr(self, name) == default[name]

    def folder(self, name: str) -> str:
        """Of its results, in that of the study."""
        return name

    def store(self, part: str = "") -> Path:
        """Of a sweep; those of quick runs are apart."""
        return Path(self.out or ".") / f"{'quick' if self.quick else 'runs'}{part}.zarr"

    def told(self) -> dict[str, Any]:
        """What makes a difference to the arrays."""
        beside = ("out", "rejudge", "redraw", "cache", "given", "processes")
        return record.plain({k: v for k, v in vars(self).items() if k not in beside})

    def as_told(self, told: dict[str, Any]) -> Self:
        """With the settings that were `told`."""
        hard = lambda v: tuple(map(hard, v)) if isinstance(v, list) else v
        return dataclasses.replace(self, **{k: hard(v) for k, v in told.items()})


@dataclasses.dataclass(frozen=True)
class Study:
    """The experiments of a paper, by the names of their commands."""

    name: str
    about: str
    experiments: dict[str, type[Settings]]

    def parse(self, arguments: list[str] | None = None) -> Settings:
        options: dict[str, Any] = dict(description=self.about, args=arguments)
        if len(self.experiments) == 1:
            config = tyro.cli(*self.experiments.values(), **options)
        else:
            config = tyro.extras.subcommand_cli_from_dict(self.experiments, **options)
        return dataclasses.replace(config, given=named(config, arguments))

    def main(self, config: Settings) -> dict[str, Any]:
        """Runs one experiment; returns what is written to summary.json, beside
        arrays.nc and the figures. (Nothing, by a process that is not the first; the
        summary of the stored arrays, where these are drawn or judged again.)"""
        matplotlib.use("Agg")
        gf.enable_float64()
        if config.cache:
            gf.cache_programs()
        name = next(k for k, v in self.experiments.items() if v is type(config))
        out = config.out or Path("results", self.name, config.folder(name))
        out.mkdir(parents=True, exist_ok=True)
        config = dataclasses.replace(config, out=out)
        again = config.rejudge or config.redraw
        claim = " ".join((type(config).__doc__ or "").split())
        print(f"{name or self.name}: {claim}", flush=True)
        if not again and not self._compute(config, out / "arrays.nc"):
            return {}
        data = record.kept(out / "arrays.nc")
        told = json.loads(data.attrs["run"])
        config = config.as_told(told["settings_run"])
        rows, figures = attempt(config.judge, data), {}
        told = {"experiment": name or self.name, "claim": claim, **told}
        summary = record.summary(told, data, rows)
        if not again or config.rejudge:
            print(*rows, sep="\n")
            record.write(out / "summary.json", summary)
        if not again or config.redraw:
            figures = config.draw(data)
            save(figures, out)
        print(
            f"{summary['passed']} passed, {summary['failed']} failed, "
            f"{summary['not_judged']} not judged; computed in {told['seconds']:.0f} s"
        )
        print(
            f"In {out}: summary.json, arrays.nc{''.join(f', {k}.png' for k in figures)}"
        )
        return summary

    def _compute(self, config: Settings, path: Path) -> bool:
        """Computes and stores the arrays; whether this is the process that does."""
        wall, work = time.perf_counter(), time.process_time()
        mine = config.effective()
        try:
            data = mine.compute()
        except ValueError as error:  # of a setting, or of the data: in one line
            if str(error).partition(":")[0] in vars(mine):
                raise SystemExit(str(error)) from error
            raise
        if data is None:
            return False
        command = ["python", "-m", f"experiments.{self.name}", *sys.argv[1:]]
        told = {
            "settings": config.told(),
            "settings_run": mine.told(),
            "seconds": round(time.perf_counter() - wall, 1),
            "cpu_seconds": round(time.process_time() - work, 1),
            "versions": record.versions(),
            "command": shlex.join(command),
        }
        record.keep(data.assign_attrs(run=json.dumps(told)), path)
        return True


def named(config: Settings, arguments: list[str] | None) -> tuple[str, ...]:
    """The settings that a command line names, as --steps 3, --steps=3 or --no-cache."""
    words = sys.argv[1:] if arguments is None else arguments
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    found = {option[2:].replace("-", "_") for option in options}
    found |= {name.removeprefix("no_") for name in found}
    return tuple(f.name for f in dataclasses.fields(config) if f.name in found)


def save(figures: dict[str, Figure], out: Path) -> None:
    for name, figure in figures.items():
        label_few(figure)
        figure.savefig(out / f"{name}.png", dpi=120)
        plt.close(figure)


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


def bar(items: Iterable[Any], name: str) -> Iterable[Any]:
    return tqdm(list(items), desc=name, leave=False)
