"""Which handwritten digits there are to learn from."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data import mnist, mnist_files, MNIST_SHA256, scikit_learn_digits


class Digits(NamedTuple):
    """Images as rows of numbers from 0 to 1, and their labels."""

    images: np.ndarray
    labels: np.ndarray
    test: tuple[np.ndarray, np.ndarray] | None
    """Images and labels of a test set of its own, where there is one."""
    data: str
    """Which they are: for titles."""


def digits(data: str | Path | None, *, published: bool) -> Digits:
    """MNIST's, where its four IDX files are at hand, and else scikit-learn's.

    **Arguments:**

    - `data`: the folder with the files; unless given, the one named by GRADFLOW_DATA.
    - `published`: whether they must have the checksums of the published ones.

    **Raises:** `ValueError` where a file is not right, or where neither are at hand.
    """
    files = mnist_files(data)
    if files is None:
        return Digits(*scikit_learn_digits(), None, "scikit-learn digits")
    sums = MNIST_SHA256 if published else None
    images, labels, *test = mnist(files, sha256=sums)
    name = "MNIST" if published else "images from unchecked files"
    return Digits(images, labels, (test[0], test[1]), name)
