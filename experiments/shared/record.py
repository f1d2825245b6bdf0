"""The record of a run: its arrays, from which rows and figures can be made again, and
the summary of both."""

import dataclasses
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xarray as xr
from tqdm.auto import tqdm

import gradflow as gf

from .rows import Row


def keep(data: xr.Dataset, path: Path) -> None:
    """Writes arrays: the file is whole or absent."""
    aside = path.with_suffix(".part")
    data.to_netcdf(aside, engine="scipy")
    os.replace(aside, path)


def kept(path: Path) -> xr.Dataset:
    """What was written.

    **Raises:** `SystemExit` where nothing was.
    """
    if not path.is_file():
        raise SystemExit(f"{path}: no arrays are stored there; run it once without.")
    return xr.load_dataset(path, engine="scipy")


def variables(prefix: str = "", **arrays: Any) -> xr.Dataset:
    """Arrays by their names, with dimensions of their own."""
    values = {f"{prefix}{name}": np.asarray(value) for name, value in arrays.items()}
    dims = lambda name, value: [f"{name}_{k}" for k in range(value.ndim)]
    return xr.Dataset({name: (dims(name, v), v) for name, v in values.items()})


def table(
    axes: Mapping[str, Sequence[Any]], cell: Callable[..., Mapping[str, Any]], name: str
) -> xr.Dataset:
    """What `cell` gives for every combination of values of the axes: numbers, or arrays
    with dimensions of their own."""
    found: dict[str, list[Any]] = {}
    combined = list(itertools.product(*axes.values()))
    for values in tqdm(combined, desc=name, leave=False):
        for key, value in cell(*values).items():
            found.setdefault(key, []).append(np.asarray(value))
    shape = tuple(map(len, axes.values()))
    whole = {k: np.stack(v).reshape(*shape, *v[0].shape) for k, v in found.items()}
    own = lambda k, v: [f"{k}_{i}" for i in range(v.ndim - len(shape))]
    arrays = {k: ((*axes, *own(k, v)), v) for k, v in whole.items()}
    return xr.Dataset(arrays, {k: list(v) for k, v in axes.items()})


def pack(**values: Any) -> xr.Dataset:
    """Paths, reports, tasks: whole objects as variables, in the bytes of `gf.save`.
    Functions without a name are not kept."""
    out = {}
    for name, value in values.items():
        gf.save(buffer := io.BytesIO(), value)
        out[name] = np.frombuffer(buffer.getvalue(), np.int8)
    return variables(**out)


def unpack(data: xr.Dataset, name: str) -> Any:
    return gf.load(io.BytesIO(data[name].values.tobytes()))


def summary(told: dict[str, Any], data: xr.Dataset, rows: list[Row]) -> dict[str, Any]:
    """What JSON can hold of a run: what was `told` of it, small arrays, rows."""
    words = [row.ok for row in rows]
    small = lambda value: value.size <= 100 and value.dtype != np.int8
    attributes = {k: v for k, v in data.attrs.items() if k != "run"}
    return plain(
        {
            **told,
            **attributes,
            "numbers": {k: v.values for k, v in data.variables.items() if small(v)},
            "checks": [dataclasses.asdict(row) for row in rows],
            "passed": words.count(True),
            "failed": words.count(False),
            "not_judged": words.count(None),
        }
    )


def write(path: Path, values: dict[str, Any]) -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n")


def versions() -> dict[str, str]:
    names = (
        "gradflow-jax jax jaxlib diffrax equinox optimistix lineax numpy scipy".split()
    )
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in names},
        "device": jax.devices()[0].device_kind,
        "cores": str(os.cpu_count()),
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def plain(value: Any) -> Any:
    """Numbers, words, lists and dictionaries that JSON can hold; NaN becomes null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
