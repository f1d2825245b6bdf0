"""Files as MNIST's, with images made up."""

import gzip
import struct

import numpy as np


def write_mnist(root, *, samples, test_samples):
    """Writes the four files into MNIST/raw: images of 3 × 2 random pixels, whose label
    is their first pixel; images compressed, labels not.

    **Returns:** `root`.
    """
    rng = np.random.default_rng(0)
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for kind, number in (("train", samples), ("t10k", test_samples)):
        images = rng.integers(0, 256, (number, 3, 2), np.uint8)
        images[:, 0, 0] = rng.integers(0, 10, number)
        write_idx(folder / f"{kind}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{kind}-labels-idx1-ubyte", images[:, 0, 0])
    return root


def write_idx(path, array):
    header = b"\x00\x00\x08" + bytes([array.ndim])
    content = header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
