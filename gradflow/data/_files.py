"""Finding published files, and telling whether they are what they should be."""

import gzip
import hashlib
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
VARIABLE = "GRADFLOW_DATA"


def how(where: str, own: str) -> str:
    """The end of an error: `where` to get the files, and what to do with others.

    - `own`: the arguments that take arrays of one's own.
    """
    return (
        f"{where} Name the folder that they are in in {VARIABLE}, or pass it as data. "
        "Files that are not the published ones: published=False, or --no-published. "
        f"Arrays of your own: {own}, or a file .npz of these as data."
    )


def problem(path: Path | str, expected: str, got: str, how: str) -> ValueError:
    """The error of a file: its name, what was expected, and how to get it."""
    return ValueError(f"data: {path}: expected {expected}, got {got}. {how}")


def find(
    folder: str | Path | None,
    at: Callable[[Path], T | None],
    places: Sequence[str],
    expected: str,
    how: str,
) -> T | None:
    """What is in `folder`, or else in the one that GRADFLOW_DATA names.

    **Arguments:**

    - `folder`: where to look.
    - `at`: what is in a folder, or `None`.
    - `places`: folders inside it to look in, `""` for itself.
    - `expected`: what is looked for, in words.
    - `how`: how to get it.

    **Returns:** the first that is found; `None` where no folder is named, or the one
    that GRADFLOW_DATA names does not have it.

    **Raises:** `ValueError` where `folder` is given and does not have it.
    """
    root = folder or os.environ.get(VARIABLE)
    if not root:
        return None
    for place in places:
        found = at(Path(root) / place)
        if found is not None:
            return found
    if folder:
        raise problem(folder, expected, "none there", how)
    return None


def read(path: Path, how: str, sha256: str | None = None) -> bytes:
    """The bytes of a file, unpacked if its name ends in .gz.

    **Raises:** `ValueError` where there is no such file, it is not whole, or its
    unpacked bytes do not have the SHA-256 checksum `sha256`.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise problem(path, "a file to read", str(error.strerror), how) from error
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise problem(path, "a whole gzip file", str(error), how) from error
    if sha256 is not None:
        check_sum(path, hashlib.sha256(content).hexdigest(), sha256, how)
    return content


def check_sum(path: Path | str, got: str, expected: str, how: str) -> None:
    if got != expected:
        raise problem(path, f"SHA-256 {expected}", got, how)
