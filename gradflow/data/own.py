"""Arrays of one's own in place of published data: checked before any of them is used.

Every error is one line that names the array, and the file if they come from one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .._typing import Given
from .bonds import ELEMENTS, NUMBERS
from .text import Reviews


class Images(NamedTuple):
    """Images as rows of numbers, and their labels."""

    images: np.ndarray
    """Of shape (n, numbers)."""
    labels: np.ndarray
    """Integers from 0 on, of shape (n,)."""
    test: tuple[np.ndarray, np.ndarray] | None
    """Images and labels of a test set of its own, where there is one."""
    classes: int
    """How many: labels are below that."""
    data: str
    """Which they are: for titles."""


class _Arrays(NamedTuple):
    """Arrays by their names."""

    given: Mapping[str, Given]
    where: str
    """What an error begins with."""

    def wrong(self, name: str, expected: str, got: object) -> ValueError:
        return ValueError(f"{self.where}{name}: expected {expected}, got {got}.")

    def get(self, name: str, expected: str) -> np.ndarray:
        """As an array, if it is one.

        **Raises:** `ValueError` where there is none.
        """
        value = self.given.get(name)
        if value is None:
            raise self.wrong(name, expected, "none")
        try:
            return np.asarray(value)
        except (TypeError, ValueError) as error:
            raise self.wrong(name, expected, str(error)) from error

    def numbers(self, name: str, expected: str, ndim: int | None = None) -> np.ndarray:
        """As finite numbers, on so many axes."""
        array = self.get(name, expected)
        if array.dtype.kind not in "buif" or array.size == 0:
            raise self.wrong(name, expected, _kind(array))
        if array.ndim < 1 or (ndim is not None and array.ndim != ndim):
            raise self.wrong(name, expected, f"shape {array.shape}")
        if not np.isfinite(array).all():
            raise self.wrong(name, expected, "some that are not finite")
        return array

    def labels(self, name: str, count: int, of: str) -> np.ndarray:
        """As integers from 0 on, one for each of `count`."""
        expected = f"{count} integers from 0 on, one for each of {of}"
        array = self.numbers(name, expected, 1)
        if array.shape != (count,):
            raise self.wrong(name, expected, f"shape {array.shape}")
        if array.dtype.kind == "f":
            raise self.wrong(name, expected, f"an array of {array.dtype}")
        if array.min() < 0:
            raise self.wrong(name, expected, f"{array.min()} among them")
        return array.astype(int)


def _kind(array: np.ndarray) -> str:
    return f"an array of {array.dtype}, of shape {array.shape}"


def own_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of the file .npz at `path`, by their names.

    **Raises:** `ValueError` where it is not one, not whole, or holds objects.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # of zip files, of their content, of the disk
        raise ValueError(
            f"data: {path}: expected a file .npz of arrays of numbers or words, got "
            f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error


def own_images(given: Mapping[str, Given], name: str, where: str = "") -> Images:
    """Images and labels that are given.

    **Arguments:**

    - `given`: `images`, of shape (n, …), each of which becomes a row of numbers: bytes
        are divided by 255, others are taken as they are; `labels`, integers from 0 on;
        and, if there is a test set of its own, `test_images` and `test_labels`.
    - `name`: for titles.
    - `where`: what an error begins with.

    **Returns:** them, with as many classes as the largest label asks for.

    **Raises:** `ValueError` where they are not that, or do not fit.
    """
    arrays = _Arrays(given, where)

    def pair(prefix: str) -> tuple[np.ndarray, np.ndarray]:
        expected = "images, an array of finite numbers of shape (n, …)"
        images = arrays.numbers(f"{prefix}images", expected)
        of = f"{prefix}images"
        labels = arrays.labels(f"{prefix}labels", len(images), of)
        scale = 255 if images.dtype == np.uint8 else 1
        return images.reshape(len(images), -1) / scale, labels

    images, labels = pair("")
    tests = [given.get(f"test_{key}") for key in ("images", "labels")]
    test = None if all(x is None for x in tests) else pair("test_")
    if test is not None and test[0].shape[1] != images.shape[1]:
        expected = f"images of {images.shape[1]} numbers, as those to learn from"
        raise arrays.wrong("test_images", expected, test[0].shape[1])
    most = max(labels.max(), -1 if test is None else test[1].max())
    return Images(images, labels, test, max(int(most) + 1, 2), name)


def own_reviews(given: Mapping[str, Given], name: str, where: str = "") -> Reviews:
    """Texts and labels that are given.

    **Arguments:** as for `own_images`; `given` has `texts`, words, and `labels`, which
    are 1 where a text praises, and 0 where it blames.

    **Returns:** them.

    **Raises:** `ValueError` where they are not that, or do not fit.
    """
    arrays = _Arrays(given, where)
    expected = "a list of texts"
    texts = arrays.get("texts", expected)
    if texts.dtype.kind != "U" or texts.ndim != 1 or texts.size == 0:
        raise arrays.wrong("texts", expected, _kind(texts))
    labels = arrays.labels("labels", len(texts), "texts")
    if labels.max() > 1:
        raise arrays.wrong("labels", "0 (blame) or 1 (praise)", labels.max())
    return Reviews(texts.tolist(), labels, name)


def own_molecules(
    given: Mapping[str, Given], where: str = ""
) -> tuple[list[tuple[tuple[str, ...], np.ndarray]], np.ndarray]:
    """Molecules and a property of each that are given.

    **Arguments:** as for `own_images`; `given` has `numbers`, the atomic numbers, 1, 6,
    7, 8 or 9, of shape (n, atoms), 0 where there is no atom; `positions` in ångström,
    of shape (n, atoms, 3); and `values`, of shape (n,).

    **Returns:** elements and positions of each, and the values.

    **Raises:** `ValueError` where they are not that, or do not fit.
    """
    arrays = _Arrays(given, where)
    symbols = {NUMBERS[element]: element for element in ELEMENTS}
    expected = "atomic numbers of shape (n, atoms), 0 for none"
    numbers = arrays.numbers("numbers", expected, 2)
    for i, row in enumerate(numbers):
        if unknown := set(row.tolist()) - {0, *symbols}:
            expected = f"{sorted(symbols)}, or 0 for none"
            raise arrays.wrong("numbers", expected, f"{unknown.pop()} in row {i}")
        if not row.any():
            raise arrays.wrong("numbers", "an atom in every molecule", f"none in {i}")
    expected = f"numbers of shape {(*numbers.shape, 3)}, in ångström, as numbers="
    positions = arrays.numbers("positions", expected, 3)
    if positions.shape != (*numbers.shape, 3):
        raise arrays.wrong("positions", expected, f"shape {positions.shape}")
    expected = f"{len(numbers)} numbers, one for each molecule"
    values = arrays.numbers("values", expected, 1)
    if len(values) != len(numbers):
        raise arrays.wrong("values", expected, len(values))
    found = []
    for row, place in zip(numbers, positions, strict=True):
        there = row > 0
        found.append((tuple(symbols[int(n)] for n in row[there]), place[there]))
    return found, values.astype(float)
