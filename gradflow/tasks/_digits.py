"""Which images there are to learn from."""

from collections.abc import Mapping
from pathlib import Path

from .._typing import Given
from ..data import (
    FASHION_MNIST_SHA256,
    Images,
    images_name,
    mnist,
    mnist_files,
    MNIST_SHA256,
    own_images,
    scikit_learn_digits,
)
from ._own import own


def digits(
    data: str | Path | None, *, published: bool, arrays: Mapping[str, Given]
) -> Images:
    """Those that are given as arrays; MNIST's or Fashion-MNIST's, where the four IDX
    files of one are at hand, and else scikit-learn's.

    **Arguments:**

    - `data`: the folder with the files, or a file .npz with arrays; unless given, the
        folder named by GRADFLOW_DATA.
    - `published`: whether files must have the checksums of the published ones.
    - `arrays`: `images`, `labels`, `test_images` and `test_labels`, or `None` of each.

    **Raises:** `ValueError` where something is not right, or where nothing is at hand.
    """
    given = own(data, "images", **arrays)
    if given is not None:
        return own_images(given.arrays, given.name, given.where)
    files = mnist_files(data)
    if files is None:
        return Images(*scikit_learn_digits(), None, 10, "scikit-learn digits")
    name = images_name(files) if published else "images from unchecked files"
    sums = {"MNIST": MNIST_SHA256, "Fashion-MNIST": FASHION_MNIST_SHA256}.get(name)
    images, labels, *test = mnist(files, sha256=sums)
    classes = max(10, *(int(each.max(initial=0)) + 1 for each in (labels, test[1])))
    return Images(images, labels, (test[0], test[1]), classes, name)
