"""Sweeps on disk: a Zarr store that grows chunk by chunk, and can be gone on with."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path as File
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ._axes import Axes, blocks, count_blocks, lanes_of_block
from ._labelled import result_attributes, xarray


def zarr() -> Any:
    """The package, imported when it is first needed.

    **Raises:** `ImportError` that says how to install it.
    """
    try:
        import zarr
    except ImportError as error:
        raise ImportError(
            "store: results on disk need xarray and zarr: "
            "pip install 'gradflow[store]'."
        ) from error
    return zarr


def open_results(path: str | os.PathLike, *, check: bool = True) -> Any:
    """The results of `gf.sweep(..., store=path)`, as far as they are there.

    **Arguments:**

    - `path`: of the store.
    - `check`: compare the checksums of all chunks, for which every file is read once.

    **Returns:** an `xarray.Dataset` with a dimension for each of the sweep, and `time`;
    see `Sweep.to_xarray`. Arrays are read when they are used. Where a lane has not been
    run `result` is −1 and all else NaN. Its `attrs` tell the configuration, versions,
    device, how many chunks are finished, and the errors of lanes that raised one.

    **Raises:** `FileNotFoundError` where there is no store; `ValueError` that names
    the chunks whose checksums are wrong.
    """
    store = Store(File(path))
    found = store.attributes()
    finished = store.finished(check=check)
    broken = [number for number, file in finished.items() if file is not None]
    if broken:
        named = ", ".join(f"{n} ({finished[n]})" for n in broken)
        raise ValueError(
            f"store: chunks of {path} are corrupted: {named}. Run the same sweep with "
            "this store again, and they are computed anew; or open it with check=False."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        data = xarray().open_zarr(str(path), chunks=None, consolidated=False)
    data = data[sorted(map(str, data.data_vars))]
    causes: dict[str, str] = {}
    solvers: set[str] = set()
    for number in sorted(finished):
        causes |= store.marker(number)["causes"]
        solvers |= set(store.marker(number)["solver"])
    data.attrs = found | {
        "finished": len(finished),
        "causes": causes,
        "solver": " or ".join(sorted(solvers)),
    }
    times = [name for name in ("t", "slow_time") if name in data]
    return data.set_coords(times)


class Store:
    """The folder of a store, a Zarr group.

    Each variable is an array in the shape of the sweep's dimensions. A chunk is a block
    of lanes: one file of each variable, and a marker, `chunks/NUMBER`, a group whose
    attributes hold their checksums. Files are written aside, flushed, and moved to
    their places, the marker last: a chunk without one counts as not there. Numbers are
    not compressed, which their last digits would hardly allow.
    """

    def __init__(self, path: File, process: int = 0):
        self.path = path
        self.aside = path.with_name(f"{path.name}.partial-{process}")
        self._known: dict[str, Any] = {}

    def attributes(self) -> dict[str, Any]:
        try:
            return json.loads((self.path / "zarr.json").read_text())["attributes"]
        except FileNotFoundError:
            raise FileNotFoundError(f"store: there is none at {self.path}.") from None

    def chunk(self) -> int | None:
        """About how many lanes its chunks have, if it is there."""
        if not (self.path / "zarr.json").exists():
            return None
        return int(np.prod(self.attributes()["config"]["chunk"]))

    def prepare(self, axes: Axes, attributes: dict[str, Any]) -> dict[str, Any]:
        """Makes the store, or checks that it is of the same sweep; returns its
        attributes.

        **Raises:** `ValueError` with the differences where it is of another one, or
        `FileExistsError` where `path` is something else.
        """
        shutil.rmtree(self.aside, ignore_errors=True)
        if not (self.path / "zarr.json").exists():
            if self.path.exists():
                raise FileExistsError(f"store: {self.path} is there, and is no store.")
            self._create(axes, attributes)
        there = self.attributes()
        differences = difference(there.get("config", {}), attributes["config"])
        if differences:
            lines = "\n  ".join(differences)
            raise ValueError(
                f"store: {self.path} holds another sweep:\n  {lines}\n"
                "Give another path; or take it away, to begin anew."
            )
        if there["versions"] != attributes["versions"]:
            other = difference(there["versions"], attributes["versions"])
            warnings.warn(
                f"store: begun with other versions, so bits may differ: "
                f"{'; '.join(other)}.",
                stacklevel=4,
            )
        return there

    def _create(self, axes: Axes, attributes: dict[str, Any]) -> None:
        group = zarr().create_group(self.aside, attributes=attributes)
        for name, (dim, values) in axes.coords.items():
            array = _array(group, name, values.shape, values.shape, values, (dim,))
            array[...] = values
        group.create_group("chunks")
        for name in _files(self.aside):
            _flush(self.aside / name)
        try:
            os.rename(self.aside, self.path)
        except OSError:  # another process was faster
            if not (self.path / "zarr.json").exists():
                raise
            shutil.rmtree(self.aside)
        _flush(self.path.parent)

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

        **Raises:** `OSError` with what to do, where the disk is full.
        """
        with self._disk(number):
            where, _ = lanes_of_block(axes.shape, block, number)
            here = tuple(s.stop - s.start for s in where)
            place = [s.start // b for s, b in zip(where, block, strict=True)]
            group = zarr().create_group(self.aside, overwrite=True)
            data = []
            for name, (more, values) in columns.items():
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
            there = lambda f: not f.endswith("zarr.json") or (self.path / f).exists()
            files = [f for f in _files(self.aside) if not there(f)]
            # A reader knows by `result` whether a lane is there.
            files += sorted(data, key=lambda f: (f.startswith("result/"), f))
            marker = {f: _digest(self.aside / f) for f in data}
            self._move(files)
            name = f"chunks/{number:06d}"
            group.create_group(name, attributes={"files": marker, **notes})
            self._move([f"{name}/zarr.json"])
            shutil.rmtree(self.aside)

    @contextlib.contextmanager
    def _disk(self, number: int) -> Iterator[None]:
        """Says what to do where the disk is full."""
        try:
            yield
        except OSError as error:
            shutil.rmtree(self.aside, ignore_errors=True)
            free = shutil.disk_usage(self.path.parent).free / 1e6
            raise OSError(
                error.errno,
                f"store: chunk {number} of {self.path} could not be written "
                f"({error.strerror or error}; {free:.0f} MB are free). The chunks "
                "before are safe: make room, and run the same sweep again to go on",
            ) from error

    def _same_array(self, name: str) -> None:
        there, here = self.path / name / "zarr.json", self.aside / name / "zarr.json"
        if there.exists() and there.read_bytes() != here.read_bytes():
            differences = difference(
                *(json.loads(f.read_text()) for f in (there, here))
            )
            raise ValueError(
                f"store: {name} differs from chunk to chunk: {'; '.join(differences)}. "
                "The number of saved times, or the size of the model, is not the same "
                "in all lanes."
            )

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
            marker = self.marker(number)["files"]
        except (ValueError, KeyError):
            return f"chunks/{number:06d}"
        for name, digest in marker.items():
            file = self.path / name
            if not file.exists() or _digest(file) != digest:
                return name
        return None

    def forget(self, number: int) -> None:
        """Takes the marker of a chunk away."""
        shutil.rmtree(self.path / "chunks" / f"{number:06d}")


def _array(
    group: Any,
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


def _fill(like: np.ndarray) -> Any:
    return {"f": np.nan, "i": -1, "u": 0, "b": False}.get(like.dtype.kind, "")


def _result() -> dict[str, Any]:
    found = result_attributes()
    return {
        "flag_values": [-1, *found["flag_values"]],
        "flag_meanings": f"not_run {found['flag_meanings']}",
    }


_ATTRIBUTES = {
    "t": lambda: {"long_name": "time t"},
    "slow_time": lambda: {"long_name": "slow time s = lambda t"},
    "result": _result,
}


def _files(folder: File) -> list[str]:
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


def _flush(path: File) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(file: File) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def about() -> dict[str, Any]:
    """Versions, commits and device, for the attributes of a store."""
    names = "jax jaxlib diffrax equinox optimistix lineax optax numpy".split()
    versions = {name: importlib.metadata.version(name) for name in names}
    try:
        versions["gradflow"] = importlib.metadata.version("gradflow")
    except importlib.metadata.PackageNotFoundError:
        versions["gradflow"] = "not installed"
    commits = {
        "gradflow": _commit(File(__file__).parent),
        "working_directory": _commit(File.cwd()),
    }
    return {
        "versions": {"python": platform.python_version(), **versions},
        "commit": commits,
        "device": jax.devices()[0].device_kind,
        "command": File(sys.argv[0]).name,
    }


def _commit(folder: File) -> str:
    """The commit of a folder in git, with a + if files have changed since."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        out = subprocess.run(command, capture_output=True, text=True, timeout=10)
        if out.returncode:
            raise OSError(out.stderr)
        return out.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def describe(value: Any) -> Any:
    """Something that JSON can hold, and that tells `value` from others: arrays by their
    shapes and two sums, functions by their names, modules by their fields.

    Numbers count to some digits only: on another processor the same seed may give data
    that differ in the last one."""
    if isinstance(value, float | np.floating):
        return float(f"{value:.10g}")
    if value is None or isinstance(value, bool | int | str):
        return value
    if eqx.is_array(value) or isinstance(value, np.ndarray | np.generic):
        if isinstance(value, jax.Array) and jnp.issubdtype(
            value.dtype, jax.dtypes.prng_key
        ):
            value = jax.random.key_data(value)
        array = np.asarray(value)
        if array.ndim == 0:
            return describe(array.item())
        kind = f"{array.dtype}{list(array.shape)}"
        if array.dtype.kind == "f":
            flat = array.astype(float).ravel()
            norm = np.linalg.norm(flat)
            mark = flat @ np.cos(np.arange(flat.size)) / (norm or 1.0)
            digits = 7 if array.dtype.itemsize == 8 else 3
            return f"{kind} norm {norm:.{digits}e} mark {mark:.{digits}f}"
        digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        return f"{kind} sha256 {digest[:16]}"
    if isinstance(value, Mapping):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, tuple | list | range):
        return [describe(v) for v in value]
    if isinstance(value, functools.partial):
        parts = {"args": value.args, **value.keywords}
        return {"function": describe(value.func), **describe(parts)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value)]
        parts = {k: getattr(value, k) for k in fields if hasattr(value, k)}
        return {"type": type(value).__qualname__, **describe(parts)}
    name = getattr(value, "__qualname__", None)
    return type(value).__qualname__ if name is None else f"{value.__module__}.{name}"


def difference(there: Any, here: Any, name: str = "") -> list[str]:
    """What differs, a line each."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = dict.fromkeys([*there, *here])
        return [
            line
            for key in keys
            for line in difference(
                there.get(key, "nothing"),
                here.get(key, "nothing"),
                f"{name}.{key}" if name else key,
            )
        ]
    here = json.loads(json.dumps(here))
    return [] if there == here else [f"{name}: {there} there, {here} here"]


def plan(axes: Axes, chunk: int) -> tuple[tuple[int, ...], int]:
    """The shape of the chunks of about `chunk` lanes, and how many there are."""
    block = blocks(axes.shape, chunk)
    return block, count_blocks(axes.shape, block)


def remove_stale(path: File, processes: int) -> None:
    """Takes away what processes that are no more have left aside."""
    for folder in path.parent.glob(f"{path.name}.partial-*"):
        number = folder.name.rpartition("-")[2]
        if number.isdigit() and int(number) >= processes:
            shutil.rmtree(folder, ignore_errors=True)


def pending(store: Store, numbers: list[int]) -> Iterator[int]:
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
            store.forget(number)
        yield number
