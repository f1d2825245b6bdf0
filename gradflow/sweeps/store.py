"""Sweeps on disk: a Zarr store that grows chunk by chunk, and can be gone on with."""

import contextlib
import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path as File
from typing import Any, TypeAlias

import numpy as np

from ..results import flags
from .axes import Axes, blocks, count_blocks, lanes_of_block
from .identity import difference

Group: TypeAlias = Any
"""A `zarr.Group`. (The package is imported when it is first needed.)"""
Lock: TypeAlias = Any
"""A `filelock.FileLock`; likewise."""


def zarr() -> Any:
    """The package, imported when it is first needed.

    **Raises:** `ImportError` that says how to install it.
    """
    try:
        import zarr
    except ImportError as error:
        raise ImportError(
            "store: results on disk need xarray and zarr: pip install xarray zarr."
        ) from error
    return zarr


def _lock(folder: File) -> Lock:
    """A lock of the operating system for a folder, held in a file beside it. It ends
    with its process, however that ends; and is seen by all threads, processes, and, as
    far as a shared file system has locks, hosts."""
    try:
        import filelock
    except ImportError as error:
        raise ImportError(
            "store: results on disk need filelock: pip install filelock."
        ) from error
    return filelock.FileLock(_lock_file(folder))


def _lock_file(folder: File) -> File:
    return folder.with_name(f"{folder.name}{_LOCK}")


_LOCK = ".lock"
_NO_LOCK = (OSError, NotImplementedError)
"""What comes of a lock that another holds, or that the file system does not have."""


class ZarrStore:
    """The folder of a store, a Zarr group.

    Each variable is an array in the shape of the sweep's dimensions. A chunk is a block
    of lanes: one file of each variable, and a marker, `chunks/NUMBER`, a group whose
    attributes hold their checksums. Files are written aside, flushed, and moved to
    their places, the marker last: a chunk without one counts as not there. Numbers are
    not compressed, which their last digits would hardly allow.
    """

    def __init__(self, path: File, process: int = 0):
        self.path, self.process = path, process
        # Another run of the same sweep, in this process or another, has its own.
        own = f"{process}-{secrets.token_hex(8)}"
        self.aside = path.with_name(f"{path.name}.partial-{own}")
        self._known: dict[str, Any] = {}

    def attributes(self) -> dict[str, Any]:
        try:
            found = json.loads((self.path / "zarr.json").read_text())["attributes"]
            found["config"]["chunk"]
        except FileNotFoundError:
            raise FileNotFoundError(f"store: there is none at {self.path}.") from None
        except UNREADABLE:
            raise ValueError(
                f"store: {self.path} is none that gradflow.sweep made, or its "
                "zarr.json is corrupted."
            ) from None
        return found

    def chunk(self) -> int | None:
        """About how many lanes its chunks have, if it is there."""
        if not (self.path / "zarr.json").exists():
            return None
        return int(np.prod(self.attributes()["config"]["chunk"]))

    def prepare(self, axes: Axes, attributes: dict[str, Any]) -> dict[str, Any]:
        """Makes the store, or checks that it is of the same sweep; returns its
        attributes.

        **Raises:** `ValueError` with the differences where it is of another one, or for
        names that can't be those of arrays; `FileExistsError` where `path` is something
        else.
        """
        _remove_left(self.path, lambda process: process == self.process)
        config = attributes["config"]
        # The order counts, in which the numbers lie.
        config["order"] = list(axes.dims)
        _check_names(axes, config)
        if not (self.path / "zarr.json").exists():
            self._create(axes, attributes)
        there = self.attributes()
        differences = difference(there["config"], config)
        if differences:
            lines = "\n  ".join(differences)
            raise ValueError(
                f"store: {self.path} holds another sweep:\n  {lines}\n"
                "Give another path; or take it away, to begin anew."
            )
        if self.process == 0:
            self._mend(axes, attributes)
        if there["versions"] != attributes["versions"]:
            other = difference(there["versions"], attributes["versions"])
            warnings.warn(
                f"store: begun with other versions, so bits may differ: "
                f"{'; '.join(other)}.",
                stacklevel=5,
            )
        if there["device"] != attributes["device"]:
            warnings.warn(
                f"store: begun on {there['device']}, and this is "
                f"{attributes['device']}, so bits may differ.",
                stacklevel=5,
            )
        return there

    def _create(self, axes: Axes, attributes: dict[str, Any]) -> None:
        with self._disk("the beginning"):
            self._begin(axes, attributes)
            for name in _files(self.aside):
                _flush(self.aside / name)
            try:
                os.rename(self.aside, self.path)
            except OSError:
                # Unless another process was faster.
                if not (self.path / "zarr.json").exists():
                    if self.path.exists():
                        raise FileExistsError(
                            f"store: {self.path} is there, and is no store."
                        ) from None
                    raise
            _flush(self.path.parent)

    def _begin(self, axes: Axes, attributes: dict[str, Any]) -> None:
        """Writes aside what there is before any chunk."""
        group = zarr().create_group(self.aside, attributes=attributes, overwrite=True)
        for name, (dim, values) in axes.coords.items():
            array = _array(group, name, values.shape, values.shape, values, (dim,))
            array[...] = values
        numbers = [f for f in _files(self.aside) if not f.endswith("zarr.json")]
        digests = {f: _digest(self.aside / f) for f in numbers}
        # What tells a reader that nothing has been run yet.
        block = tuple(attributes["config"]["chunk"])
        _array(group, "result", axes.shape, block, _RESULT, axes.dims)
        group.create_group("chunks")
        group.update_attributes({"coordinates": digests})

    def damaged(self) -> list[str]:
        """The files that belong to no chunk, and are missing or wrong: coordinates, and
        descriptions of arrays."""
        digests = self.attributes().get("coordinates", {})
        wrong = [name for name in digests if self._differs(name, digests[name])]
        for file in sorted(self.path.glob("*/zarr.json")):
            if not _is_json(file):
                wrong.append(str(file.relative_to(self.path)))
        return wrong

    def _differs(self, name: str, digest: str) -> bool:
        file = self.path / name
        return not file.exists() or _digest(file) != digest

    def _mend(self, axes: Axes, attributes: dict[str, Any]) -> None:
        """Writes anew what is `damaged`. The description of an array comes with a chunk
        that has it, which is taken away."""
        if not (wrong := self.damaged()):
            return
        warnings.warn(
            f"store: {', '.join(wrong)} of {self.path} {are(wrong)} corrupted, and "
            f"{are(wrong)} written anew.",
            stacklevel=6,
        )
        with self._disk("the beginning"):
            self._begin(axes, attributes)
            there = [name for name in wrong if (self.aside / name).exists()]
            self._move(there)
        for name in set(wrong) - set(there):
            (self.path / name).unlink()
            array = name.partition("/")[0]
            for number in self.finished(check=False):
                with contextlib.suppress(*UNREADABLE):
                    files = self.marker(number)["files"]
                    if any(f.startswith(f"{array}/") for f in files):
                        self.remove_chunk(number)
                        break

    def write(
        self,
        number: int,
        axes: Axes,
        block: tuple[int, ...],
        columns: Mapping[str, tuple[tuple[str, ...], np.ndarray]],
        notes: dict[str, Any],
    ) -> None:
        """Writes a chunk, whole or not at all.

        `columns`: the dimensions after those of the sweep, and the values, with the
        lanes of the block as the first axis.

        **Raises:** `OSError` with what to do, where the disk is full; `ValueError`
        where the shapes are not those of the other chunks.
        """
        if self.is_finished(number) and self.broken(number) is None:
            return  # by another run of this sweep
        with self._disk(f"chunk {number}"):
            where, _ = lanes_of_block(axes.shape, block, number)
            here = tuple(s.stop - s.start for s in where)
            place = [s.start // b for s, b in zip(where, block, strict=True)]
            group = zarr().create_group(self.aside, overwrite=True)
            data = []
            for name, (more, values) in columns.items():
                if values.ndim == 1 and name != "result" and values.dtype.kind == "f":
                    # Where some lanes lack one, its precision depends on the chunk.
                    values = values.astype(float)
                rest = values.shape[1:]
                shape, dims = axes.shape + rest, axes.dims + more
                if self._known.get(name) != (shape, values.dtype):
                    _array(group, name, shape, block + rest, values, dims)
                    self._same_array(name)
                    self._known[name] = (shape, values.dtype)
                # What is beyond the last lane in a dimension is filled.
                whole = np.full(block + rest, _fill(values), values.dtype)
                whole[tuple(slice(n) for n in here)] = values.reshape(here + rest)
                parts = [name, "c", *map(str, place), *("0" for _ in rest)]
                file = self.aside.joinpath(*parts)
                file.parent.mkdir(parents=True, exist_ok=True)
                little = whole.astype(whole.dtype.newbyteorder("<"))
                file.write_bytes(little.tobytes())
                data.append("/".join(parts))
            new = [f for f in _files(self.aside) if f.endswith("zarr.json")]
            files = [f for f in new if not (self.path / f).exists()]
            # A reader knows by `result` whether a lane is there.
            files += sorted(data, key=lambda f: (f.startswith("result/"), f))
            marker = {f: _digest(self.aside / f) for f in data}
            self._move(files)
            name = f"chunks/{number:06d}"
            group.create_group(name, attributes={"files": marker, **notes})
            self._move([f"{name}/zarr.json"])

    @contextlib.contextmanager
    def _disk(self, what: str) -> Iterator[None]:
        """Holds the lock of what is written aside, leaves nothing there, and says what
        to do where the disk is full."""
        lock = _lock(self.aside)
        try:
            with contextlib.suppress(*_NO_LOCK):
                lock.acquire()
            yield
        except FileExistsError:
            raise
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            free = shutil.disk_usage(_existing(self.path.parent)).free / 1e6
            raise OSError(
                error.errno,
                f"store: {what} of {self.path} could not be written "
                f"({error.strerror or error}; {free:.0f} MB are free). The chunks "
                f"before are safe: {'make room' if full else 'mend this'}, and run the "
                "same sweep again to go on",
            ) from error
        finally:
            _remove(self.aside, lock)

    def _same_array(self, name: str) -> None:
        there, here = self.path / name / "zarr.json", self.aside / name / "zarr.json"
        if not there.exists():
            return
        if not _is_json(there):  # cut off: ours takes its place
            there.unlink()
            return
        # Not byte by byte: another version of Zarr may write the same otherwise.
        old, new = (json.loads(f.read_text()) for f in (there, here))
        # An earlier version knew fewer results; of those that it knew the numbers are
        # what they were.
        earlier = name == "result" and _flags_of(old) < _flags_of(new)
        if earlier:
            old["attributes"] = new["attributes"]
        differences = difference(old, new)
        if differences:
            why = ""
            if old.get("shape") != new["shape"]:
                why = (
                    " The number of saved times, or the size of the model or of a "
                    "metric, is not the same in all lanes."
                )
            raise ValueError(
                f"store: {name} differs from chunk to chunk: {'; '.join(differences)}."
                f"{why}"
            )
        if earlier:
            _flush(here)
            os.replace(here, there)

    def _move(self, files: list[str]) -> None:
        """From aside into place, for good."""
        folders = set()
        for name in files:
            _flush(self.aside / name)
            goal = self.path / name
            goal.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.aside / name, goal)
            folders |= {goal.parent, goal.parent.parent}
        for folder in folders:
            _flush(folder)

    def marker(self, number: int) -> dict[str, Any]:
        file = self.path / "chunks" / f"{number:06d}" / "zarr.json"
        return json.loads(file.read_text())["attributes"]

    def is_finished(self, number: int) -> bool:
        return (self.path / "chunks" / f"{number:06d}" / "zarr.json").exists()

    def finished(self, *, check: bool = True) -> dict[int, str | None]:
        """The chunks that have a marker, each with the first file of it that is missing
        or wrong, or `None`."""
        folder = self.path / "chunks"
        if not folder.exists():
            return {}
        numbers = sorted(
            int(child.name) for child in folder.iterdir() if child.name.isdigit()
        )
        there = [number for number in numbers if self.is_finished(number)]
        return {number: self.broken(number) if check else None for number in there}

    def broken(self, number: int) -> str | None:
        """The first file of a finished chunk that is missing or wrong."""
        try:
            marker = self.marker(number)["files"].items()
        except UNREADABLE:
            return f"chunks/{number:06d}"
        for name, digest in marker:
            if self._differs(name, digest):
                return name
        return None

    def remove_chunk(self, number: int) -> None:
        """Takes a chunk away: first its `result`, by which a reader knows whether its
        lanes are there, and its marker last."""
        grid = json.loads((self.path / "result" / "zarr.json").read_text())
        block = grid["chunk_grid"]["configuration"]["chunk_shape"]
        counts = [-(-n // b) for n, b in zip(grid["shape"], block, strict=True)]
        at = "/".join(str(int(i)) for i in np.unravel_index(number, counts))
        places = self.path.glob(f"*/c/{at}")
        # `False`, for `result`, is sorted before `True`.
        for place in sorted(places, key=lambda f: f.parents[1].name != "result"):
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        shutil.rmtree(self.path / "chunks" / f"{number:06d}")


def _array(
    group: Group,
    name: str,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    like: np.ndarray,
    dims: tuple[str, ...],
) -> Any:
    kind = like.dtype.kind
    return group.create_array(
        name,
        shape=shape,
        chunks=chunks,
        dtype=like.dtype if kind != "U" else str,
        fill_value=_fill(like),
        dimension_names=dims,
        attributes=_ATTRIBUTES.get(name, lambda: {})(),
        compressors=None,
        config={"write_empty_chunks": True},
    )


_RESULT = np.zeros(0, np.int32)
"""Of which type `result` is."""

UNREADABLE = (ValueError, KeyError, TypeError, AttributeError)
"""What comes of reading JSON that is cut off, or is something else."""


def _check_names(axes: Axes, config: dict[str, Any]) -> None:
    """Raises `ValueError` for names that arrays in a folder can't have."""
    first = config.get("first")
    own = first.get("watched") if isinstance(first, dict) else None
    metrics = {*(own or {}), *(config.get("metrics") or {})}
    for kind, names in (("axes", axes.along), ("metrics", metrics)):
        for name in names:
            if "/" in name or name.startswith((".", "__")) or name in _TAKEN:
                raise ValueError(
                    f"{kind}: {name!r} can't be the name of an array in a store; name "
                    "it otherwise."
                )


_TAKEN = ("", "chunks", "zarr.json")


def _fill(like: np.ndarray) -> Any:
    return {"f": np.nan, "i": -1, "u": 0, "b": False}.get(like.dtype.kind, "")


def _result() -> dict[str, Any]:
    found = flags()
    return {
        "flag_values": [-1, *found["flag_values"]],
        "flag_meanings": f"not_run {found['flag_meanings']}",
    }


_ATTRIBUTES = {
    "t": lambda: {"long_name": "time t"},
    "slow_time": lambda: {"long_name": "slow time s = lambda t"},
    "result": _result,
}


def _flags_of(array: dict[str, Any]) -> set[tuple[int, str]]:
    """The results that the description of an array knows, with their numbers."""
    told = array["attributes"]
    return set(zip(told["flag_values"], told["flag_meanings"].split(), strict=True))


def _files(folder: File) -> list[str]:
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


def _existing(folder: File) -> File:
    """The folder, or the nearest above it that is there."""
    folder = folder.absolute()
    return next(f for f in (folder, *folder.parents) if f.exists())


def _is_json(file: File) -> bool:
    try:
        return isinstance(json.loads(file.read_text()), dict)
    except ValueError:
        return False


def are(names: list[str]) -> str:
    return "are" if len(names) > 1 else "is"


def _flush(path: File) -> None:
    folder = path.is_dir()
    if folder and os.name == "nt":  # Windows has no way to
        return
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(file: File) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def blocks_of(axes: Axes, chunk: int) -> tuple[tuple[int, ...], int]:
    """The shape of the chunks of about `chunk` lanes, and how many there are."""
    block = blocks(axes.shape, chunk)
    return block, count_blocks(axes.shape, block)


def remove_stale(path: File, processes: int) -> None:
    """Takes away what processes that are no more have left aside."""
    _remove_left(path, lambda process: process >= processes)


def _remove_left(path: File, of: Callable[[int], bool]) -> None:
    """Takes away what was left aside by processes of such numbers, but for that of
    another run that is at work."""
    start = f"{path.name}.partial-"
    there = path.parent.glob(f"{glob.escape(start)}*")
    for name in {file.name.removesuffix(_LOCK) for file in there}:
        process, *_ = name[len(start) :].split("-")
        if not (process.isdigit() and of(int(process))):
            continue
        lock = _lock(folder := path.with_name(name))
        try:
            lock.acquire(timeout=0)
        except _NO_LOCK:
            continue
        _remove(folder, lock)


def _remove(folder: File, lock: Lock) -> None:
    """Takes a folder away, and then its lock, which another may be waiting for."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # on Windows `release` takes it away
        _lock_file(folder).unlink()
    lock.release()


def pending(store: ZarrStore, numbers: list[int]) -> Iterator[int]:
    """The chunks of `numbers` that are yet to be computed; corrupted ones are named,
    and are among them."""
    for number in numbers:
        if store.is_finished(number):
            wrong = store.broken(number)
            if wrong is None:
                continue
            warnings.warn(
                f"store: chunk {number} of {store.path} is corrupted ({wrong}), and is "
                "computed anew.",
                stacklevel=2,
            )
            store.remove_chunk(number)
        yield number
