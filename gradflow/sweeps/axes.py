"""The axes of a sweep: which values each of its lanes has."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Array

from .._checks import is_key
from .._typing import Given

Numbers: TypeAlias = float | int | Array | np.ndarray | Sequence[float]
"""One, or a vector: an axis."""


@dataclasses.dataclass(frozen=True)
class Axes:
    """Named axes, and the dimensions along which they run.

    An axis has a dimension of its own, but for those that are zipped, which share that
    of the first of them. Lanes are numbered in C order: the last dimension is fastest.
    """

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    along: dict[str, str]
    """The dimension of each axis."""
    values: dict[str, tuple]
    """The values of each axis."""

    def __len__(self) -> int:
        return int(np.prod(self.shape, dtype=int))

    @property
    def coords(self) -> dict[str, tuple[str, np.ndarray]]:
        """The dimension of each axis, and its values; of those that are neither numbers
        nor words, as random keys, the positions."""
        return {k: (self.along[k], _labels(v)) for k, v in self.values.items()}

    def column(self, name: str) -> np.ndarray:
        """The value of an axis in each lane."""
        lanes = np.arange(len(self))
        place = np.unravel_index(lanes, self.shape)[self.dims.index(self.along[name])]
        return _labels(self.values[name])[place]

    def place(self, lane: int) -> dict[str, int]:
        """The position of a lane along each axis."""
        at = dict(zip(self.dims, np.unravel_index(lane, self.shape), strict=True))
        return {name: int(at[dim]) for name, dim in self.along.items()}

    def at(self, lane: int) -> dict[str, Any]:
        """The values of the axes in a lane."""
        return {k: self.values[k][i] for k, i in self.place(lane).items()}

    def labels(self, lane: int) -> dict[str, Any]:
        """The coordinates of a lane, to be shown."""
        at = self.place(lane).items()
        return {k: self.values[k][i] if k in self._shown else i for k, i in at}

    @functools.cached_property
    def _shown(self) -> set[str]:
        """The axes whose values are numbers or words."""
        return {k for k, v in self.values.items() if _are_labels(v)}

    @property
    def symbols(self) -> dict[str, str]:
        """What stands for each axis in a formula."""
        return {name: short(name) for name in self.values}

    def lane(self, index: Given) -> int:
        """The number of a lane, from its position in each dimension, or itself."""
        if isinstance(index, tuple):
            if len(index) != len(self.shape):
                raise IndexError(f"expected {len(self.shape)} positions, got {index}.")
            ends = zip(index, self.shape, strict=True)
            inside = all(-n <= i < n for i, n in ends)
            index = tuple(i % n for i, n in zip(index, self.shape, strict=True))
            lane = int(np.ravel_multi_index(index, self.shape)) if inside else -1
        else:
            lane = index + len(self) if index < 0 else index
        if not 0 <= lane < len(self):
            raise IndexError(f"no lane {index} in a sweep of {self.shape}.")
        return int(lane)

    def words(self, lane: int, symbols: Mapping[str, str] | None = None) -> str:
        """A lane in words, such as "seed 3, λ 0.01"; with other `symbols` of axes."""
        of = symbols or {}
        at = self.labels(lane).items()
        return ", ".join(f"{of.get(k, short(k))} {_word(v)}" for k, v in at)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self.at(lane) for lane in range(len(self)))


def make_axes(axes: Mapping[str, Any], zipped: Sequence[Sequence[str]] = ()) -> Axes:
    """The product of axes, of which those in a group of `zipped` run together.

    **Raises:** `ValueError` where they are empty, or zipped ones differ in length.
    """
    values = {name: _items(name, v) for name, v in axes.items()}
    if not values:
        raise ValueError(
            "weight_decay: nothing to sweep over; give a vector of one or more values, "
            "of it, init_scale, rtol or learning_rate, or axes."
        )
    along = {name: name for name in values}
    named: list[str] = []
    for group in zipped:
        if isinstance(group, str) or len(group) == 0:
            raise ValueError(f"zipped: expected groups of names, got {zipped!r}.")
        unknown = [name for name in group if name not in values]
        if unknown:
            raise ValueError(f"zipped: {unknown} are no axes; got {list(values)}.")
        named += group
        lengths = {name: len(values[name]) for name in group}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"zipped: expected as many values in each, got {lengths}.")
        along |= dict.fromkeys(group, group[0])
    if len(set(named)) < len(named):
        raise ValueError(f"zipped: an axis is named twice in {zipped}.")
    dims = tuple(name for name in values if along[name] == name)
    return Axes(dims, tuple(len(values[d]) for d in dims), along, values)


def blocks(shape: Sequence[int], size: int) -> tuple[int, ...]:
    """The shape of blocks of about `size` lanes, at least one: neighbours in the last
    dimensions first, so that a block is contiguous in C order."""
    out = []
    for n in reversed(shape):
        here = max(1, min(n, size))
        out.append(here)
        size = size // n if here == n else 1
    return tuple(reversed(out))


def lanes_of_block(
    shape: Sequence[int], block: Sequence[int], number: int
) -> tuple[tuple[slice, ...], list[int]]:
    """Where a block is in each dimension, and the numbers of its lanes, in C order."""
    grid = [-(-n // b) for n, b in zip(shape, block, strict=True)]
    place = np.unravel_index(number, grid)
    where = tuple(
        slice(int(i) * b, min((int(i) + 1) * b, n))
        for i, b, n in zip(place, block, shape, strict=True)
    )
    # Not by way of all lanes, of which there may be a million.
    inside = np.ix_(*(np.arange(s.start, s.stop) for s in where))
    return where, np.ravel_multi_index(inside, shape).ravel().tolist()


def count_blocks(shape: Sequence[int], block: Sequence[int]) -> int:
    return int(np.prod([-(-n // b) for n, b in zip(shape, block, strict=True)]))


def short(name: str) -> str:
    return {"weight_decay": "λ", "init_scale": "α", "learning_rate": "h"}.get(
        name, name
    )


def _items(name: str, values: Given) -> tuple:
    """The values of an axis; numbers as plain Python ones."""
    if not isinstance(values, list | tuple | range) and np.ndim(values) != 1:
        raise ValueError(f"{name}: expected a vector of one or more values.")
    if len(values) == 0:
        raise ValueError(f"{name}: expected a vector of one or more values, got none.")
    if isinstance(values, jax.Array) and not is_key(values):
        values = np.asarray(values)
    return tuple(_plain(v) for v in values)


def _plain(value: Given) -> Given:
    dtype = getattr(value, "dtype", None)
    if isinstance(dtype, np.dtype) and dtype.kind in "biuf" and np.ndim(value) == 0:
        return np.asarray(value).item()
    return value


def _labels(values: tuple) -> np.ndarray:
    return np.asarray(values) if _are_labels(values) else np.arange(len(values))


def _are_labels(values: tuple) -> bool:
    return all(isinstance(v, bool | int | float | str) for v in values)


def _word(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
