"""Rows: a value, what is asked of it, and whether it holds; and such values."""

import dataclasses
import math
import operator
import re
import time
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from scipy.stats import spearmanr


@dataclasses.dataclass(frozen=True)
class Row:
    """One check: a value, its bound, and whether it holds (None: not judged)."""

    name: str
    value: float
    bound: str
    ok: bool | None
    sentence: str

    def __str__(self) -> str:
        word = {True: "pass", False: "FAIL", None: "  – "}[self.ok]
        number = f"{self.value:10.3g}  ({self.bound or 'for information'})"
        return f"  {word}  {self.name:<12} {number}  {self.sentence}"


_NUMBER = r"([-−]?[\d.]+(?:e[-+]?\d+)?(?:/\d+)?)"
_FORMS: dict[str, Callable[..., bool]] = {
    rf"{_NUMBER} ± {_NUMBER}": lambda value, at, within: abs(value - at) <= within,
    rf"{_NUMBER} … {_NUMBER}": lambda value, low, high: low <= value <= high,
    rf"≤ {_NUMBER}": operator.le,
    rf"≥ {_NUMBER}": operator.ge,
    rf"< {_NUMBER}": operator.lt,
    rf"> {_NUMBER}": operator.gt,
    rf"= {_NUMBER}": operator.eq,
}


def holds(value: float, bound: str) -> bool:
    """Whether a value is as a bound has it: "≤ 0.1", "≥ 5", "< 1", "> 0", "= 3",
    "1 ± 0.1" or "1/3 … 3", and what follows is for the reader. NaN is as none.

    **Raises:** `ValueError` for another bound.
    """
    number = lambda word: float(Fraction(word.replace("−", "-")))
    for form, test in _FORMS.items():
        if found := re.match(form, bound):
            return bool(test(value, *map(number, found.groups())))
    raise ValueError(f"bound: expected one as “≤ 1” or “1 ± 0.1”, got {bound!r}.")


def check(
    name: str,
    value: Any,
    bound: str,
    sentence: str,
    *,
    given: Any = True,
    also: Any = True,
) -> Row:
    """A row, judged by its bound; one without is for information.

    - `given`: whether it can be judged here.
    - `also`: what else is asked for, where the bound does not say all.
    """
    value = float(value)
    ok = holds(value, bound) and bool(also) if given and bound else None
    return Row(name, value, bound, ok, sentence)


def attempt(judge: Callable[..., list[Row]], *args: Any) -> list[Row]:
    """Makes rows. What cannot be made counts as failed, with its reason."""
    start = time.perf_counter()
    try:
        return judge(*args)
    except Exception as error:  # whatever it is, the other rows are made
        print(f"{judge.__name__}: after {time.perf_counter() - start:.1f} s: {error!r}")
        return [Row(judge.__name__, math.nan, "", False, reason(error))]


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def law(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """The slope of log y against log x, by least squares; NaN below three points, as
    two are on a line whatever they are."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    good = np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0)
    if np.unique(x[good]).size < 3:
        return np.nan
    return float(np.polyfit(np.log(x[good]), np.log(y[good]), 1)[0])


def law_check(
    name: str, x: Any, y: Any, bound: str, sentence: str, *, given: Any = True,
    also: Any = True,
) -> Row:  # fmt: skip
    """A row of `law`, which is not judged where there are fewer than three points: no
    slope passes, or fails, that comes of two."""
    few = np.size(x) < 3
    sentence += ": not judged, by fewer than three points" * few
    return check(name, law(x, y), bound, sentence, given=given and not few, also=also)


def decades(x: Iterable[float]) -> float:
    x = np.asarray(list(x))
    return float(np.log10(x.max() / x.min())) if x.size else 0.0


def spread(values: Sequence[float] | np.ndarray) -> float:
    """How far the values are from their geometric mean, at most, as a fraction."""
    logs = np.log(np.asarray(values, float))
    return float(np.exp(np.abs(logs - logs.mean()).max()) - 1)


def rank_correlation(x: Any, y: Any) -> float:
    """Spearman's; NaN where one of them is constant."""
    x, y = np.asarray(x), np.asarray(y)  # xarray's own have no `ptp`
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.nan
    return float(spearmanr(x, y)[0])  # pyright: ignore[reportArgumentType]


def relative(a: Any, b: Any) -> float:
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(b))
