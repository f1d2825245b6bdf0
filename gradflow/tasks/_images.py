"""Images of handwritten digits, from files at hand."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np

_NAMES = {
    "images": "train-images-idx3-ubyte",
    "labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


def mnist_files(folder: str | Path | None) -> dict[str, Path] | None:
    """Where the four files of MNIST are: in `folder`, else in the folder that the
    environment variable GRADFLOW_DATA names, or in its MNIST, mnist or MNIST/raw.

    **Returns:** their paths, or `None` where no folder is named, or the one that
    GRADFLOW_DATA names has none.

    **Raises:** `ValueError` where `folder` is given and has not all of them.
    """
    root = folder or os.environ.get("GRADFLOW_DATA")
    if not root:
        return None
    for place in ("", "MNIST", "mnist", "MNIST/raw"):
        found = {key: _find(Path(root) / place, name) for key, name in _NAMES.items()}
        whole = {key: path for key, path in found.items() if path is not None}
        if len(whole) == len(_NAMES):
            return whole
    if folder:
        raise ValueError(
            f"data: expected a folder with {', '.join(_NAMES.values())}, as they are "
            f"or with .gz, got {folder}."
        )
    return None


def _find(folder: Path, name: str) -> Path | None:
    # Also as some copies have it, with a dot in place of the last hyphen but one.
    head, tail = name.rsplit("-idx", 1)
    for spelling in (name, f"{head}.idx{tail}"):
        for path in (folder / spelling, folder / f"{spelling}.gz"):
            if path.is_file():
                return path
    return None


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes in the IDX format: two zeros, the type (8), the number of axes,
    the big-endian 32-bit length of each, then the entries.

    **Raises:** `ValueError` where the file is not that.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"data: {path} is not a file of bytes in the IDX format.")
    axes = content[3]
    shape = struct.unpack(f">{axes}I", content[4 : 4 + 4 * axes])
    entries = np.frombuffer(content, np.uint8, offset=4 + 4 * axes)
    if entries.size != np.prod(shape, dtype=int):
        raise ValueError(
            f"data: {path} holds {entries.size} entries, its header says {shape}."
        )
    return entries.reshape(shape)


def mnist(files: dict[str, Path]) -> tuple[np.ndarray, ...]:
    """Images as rows of numbers from 0 to 1, and labels: training set, test set."""
    read = {key: read_idx(path) for key, path in files.items()}
    flat = lambda images: images.reshape(len(images), -1) / 255
    whole = lambda labels: labels.astype(int)
    return (
        flat(read["images"]),
        whole(read["labels"]),
        flat(read["test_images"]),
        whole(read["test_labels"]),
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
            "data: no MNIST files are at hand (give their folder, or name it in "
            "GRADFLOW_DATA), and scikit-learn, which has digits of its own, is not "
            "installed: pip install scikit-learn."
        ) from error
    images, labels = load_digits(return_X_y=True)
    return np.asarray(images) / 16, np.asarray(labels).astype(int)
