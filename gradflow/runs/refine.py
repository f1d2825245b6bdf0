"""Paths saved at as many times as interpolating between them needs."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable, TypeVar

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from .._host import as_array
from ..results import among, RESULTS
from .interpolate import DEGREE, halfway
from .path import Path


@runtime_checkable
class Refinable(Protocol):
    """A `Path`, or what is saved like one."""

    @property
    def params(self) -> PyTree: ...
    @property
    def train_loss(self) -> Float[Array, " n"]: ...
    @property
    def result(self) -> RESULTS: ...
    def __len__(self) -> int: ...


P = TypeVar("P", bound=Refinable)

FEWEST = 65
MOST = 1025


def refined(
    run: Callable[[Float[np.ndarray, " n"]], P],
    target: float,
    *,
    most: int = MOST,
    degree: int = DEGREE,
    clock: str = "t",
    curvature: str | None = None,
) -> tuple[P, float]:
    """A path at 65, 129, 257, … even places, until interpolation adds at most `target`.

    Every run goes from the start: for more places it is run once more, through all that
    lie between, of which there are as many as the error, falling as it fell, asks for;
    at most four times as many at once.

    **Arguments:**

    - `run`: the path at increasing places between 0 and 1, the last of them 1.
    - `target`: the error of the parameters, a length.
    - `most`: the most places, 64·2ᵏ + 1.
    - `degree`: of the interpolation; 1 for a path with kinks.
    - `clock`: the field of the path that holds its times.
    - `curvature`: the one that holds η along it, if it is a drift.

    **Returns:** the path, and its estimated error. With `most` places, and where the
    path did not reach its end, the error may be larger than `target`. Along kinks there
    is no convergence to wait for: 257 places are the most. Where the manifold of a
    drift has become singular, theory has ended: what interpolation adds beyond does not
    count. A run for more places that fails is left out, with those after it.
    """
    path = run(np.linspace(0, 1, FEWEST))
    error, fall = _error(path, degree, curvature)
    while error > target:
        # Along kinks there is no convergence to wait for.
        kinked = degree == 1 or bool(among(path.result, RESULTS.slid))
        n, top = len(path), min(most, 257) if kinked else most
        if n >= top:
            break
        enough = error * fall <= target  # twice as many
        times = 2 if enough or 4 * (n - 1) >= top else 4
        fine = np.arange(times * (n - 1) + 1)
        between = fine[fine % times > 0] / (times * (n - 1))
        more = run(np.append(between, 1.0))
        if not _reached(more):
            return path, error
        path = _merge([path, more], clock, curvature)
        error, fall = _error(path, degree, curvature)
    return path, error


def _reached(path: Refinable) -> bool:
    """Whether the run came to its end, however."""
    return bool(np.isfinite(np.asarray(path.train_loss)[-1]))


_SINGULAR = 1e-7  # the part of η(0) below which the manifold of a drift is singular


def _error(path: Any, degree: int, curvature: str | None) -> tuple[float, float]:
    """See `interpolation_error`."""
    regular = np.ones(len(path), bool)
    if curvature is not None:
        eta = np.asarray(getattr(path, curvature))
        regular = np.cumsum(~(eta >= _SINGULAR * eta[0])) == 0
    return interpolation_error(path.params, regular, degree)


def _merge(paths: list[Any], clock: str, curvature: str | None) -> Any:
    """One path with the times of all, of which each ran alone; they share the last."""
    first, *others = paths
    ends = (np.asarray(getattr(p, clock))[:-1] for p in others)
    times = np.concatenate([getattr(first, clock), *ends])
    order = np.argsort(times)

    def join(one: Array, *rest: Array) -> Array:
        parts = [np.asarray(one), *(np.asarray(r)[:-1] for r in rest)]
        return as_array(np.concatenate(parts)[order])

    result = first.result
    for other in others:
        result = other.result if among(result, RESULTS.successful) else result
    names = [clock, "params", "metrics", "train_loss", "penalty"]
    names += [] if curvature is None else [curvature]
    along = ({name: getattr(p, name) for name in names} for p in paths)
    # The time of a crossing is not landed on in a path of many runs.
    alone = {"again": None} if isinstance(first, Path) else {}
    return dataclasses.replace(
        first,
        **jax.tree.map(join, *along),
        **alone,
        result=result,
        stats=first.stats.with_work_of(*(p.stats for p in others)),
    )


def interpolation_error(
    params: PyTree, counts: Bool[np.ndarray, " n"], degree: int = DEGREE
) -> tuple[float, float]:
    """What interpolating a path between its n places adds to its error, a length: by
    extrapolation from what n/2 and n/4 of them add at places left out, where that
    counts.

    On seven tasks it was between 1 and 5 times the error, where that is above rounding.

    **Returns:** that; and by which factor it fell from n/4 to n/2.
    """
    rows = [
        np.reshape(p, (len(p), -1)) for p in map(np.asarray, jax.tree.leaves(params))
    ]
    theta = np.concatenate(rows, axis=1)
    with np.errstate(all="ignore"):  # what was not reached is not a number
        half, quarter = (_thinned(theta, counts, stride, degree) for stride in (2, 4))
    return extrapolated(half, quarter, degree + 1)


def extrapolated(half: float, quarter: float, order: int) -> tuple[float, float]:
    """An estimate of an error of the given order in 1/n from those with n/2 and n/4: it
    falls once more as it fell, which the rate of convergence only rises above; and a
    factor of 2. And how it fell."""
    fall = half / quarter if quarter > 0 else half
    fall = float(np.clip(fall, 0.5**order, 1.0))
    return 2 * half * fall, fall


def _thinned(
    theta: Float[np.ndarray, "n d"],
    counts: Bool[np.ndarray, " n"],
    stride: int,
    degree: int,
) -> float:
    """The error of every `stride`-th place alone, halfway between them, where that
    counts."""
    left_out, seen = (x[stride // 2 :: stride] for x in (theta, counts))
    between = zip(halfway(theta[::stride], degree), left_out, seen, strict=True)
    errors = (np.linalg.norm(near - exact) for near, exact, there in between if there)
    return float(np.max(np.fromiter(errors, theta.dtype), initial=0.0))
