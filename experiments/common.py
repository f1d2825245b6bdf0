"""What the experiments share: options, checks, and the summary that they write."""

import dataclasses
import importlib.metadata
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure


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
        "versions": versions(),
        "command": shlex.join(["python", *sys.argv]),
    }
    summary = plain(summary)
    (out / "summary.json").write_text(
        json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )
    for name, figure in figures.items():
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
