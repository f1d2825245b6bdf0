"""What was run: a description that tells two sweeps apart, and how it was made."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import json
import platform
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path as File
from typing import Any

import equinox as eqx
import jax
import numpy as np

from .._checks import is_key
from .._typing import Given
from .._version import __version__


def about() -> dict[str, Any]:
    """Versions, commits and device, for the attributes of a store."""
    names = "jax jaxlib diffrax equinox optimistix lineax optax numpy".split()
    versions = {name: importlib.metadata.version(name) for name in names}
    versions["gradflow"] = __version__
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


def describe(value: Given, within: tuple[int, ...] = ()) -> Any:
    """Something that JSON can hold, and that tells `value` from others: arrays by their
    shapes and two sums, modules and other objects by their fields, functions by their
    names; those made inside of others also by what they close over, and those without
    a name (lambda) by their code too.

    Numbers count to some digits only: on another processor the same seed may give data
    that differ in the last one. `within` are the ids of the objects that hold it, from
    the outside in."""
    inner = functools.partial(describe, within=within)
    if isinstance(value, float | np.floating):
        return float(f"{value:.10g}")
    if value is None or isinstance(value, bool | int | str):
        return value
    if eqx.is_array(value) or isinstance(value, np.ndarray | np.generic):
        if is_key(value):
            value = jax.random.key_data(value)
        array = np.asarray(value)
        if array.ndim == 0:
            return inner(array.item())
        kind = f"{array.dtype}{list(array.shape)}"
        if array.dtype.kind == "O":
            return [kind, *map(inner, array.ravel())]
        if array.dtype.kind == "f":
            flat = array.astype(float).ravel()
            if missing := int(np.isnan(flat).sum()):
                kind += f" with {missing} NaN"
                flat = np.nan_to_num(flat)
            norm = np.linalg.norm(flat)
            mark = flat @ np.cos(np.arange(flat.size)) / (norm or 1.0)
            digits = 7 if array.dtype.itemsize == 8 else 3
            return f"{kind} norm {norm:.{digits}e} mark {mark:.{digits}f}"
        digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        return f"{kind} sha256 {digest[:16]}"
    if isinstance(value, Mapping):
        return {str(k): inner(v) for k, v in value.items()}
    if isinstance(value, tuple | list | range):
        return [inner(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted(map(inner, value), key=repr)
    if isinstance(value, functools.partial):
        parts = {"args": value.args, **value.keywords}
        return {"function": inner(value.func), **inner(parts)}
    if id(value) in within:  # a function that calls itself
        return type(value).__qualname__
    return _describe_object(value, (*within, id(value)))


def _describe_object(value: Given, within: tuple[int, ...]) -> Any:
    """`within` ends with the object itself."""
    inner = functools.partial(describe, within=within)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value)]
        parts = {k: getattr(value, k) for k in fields if hasattr(value, k)}
        return {"type": type(value).__qualname__, **inner(parts)}
    name = getattr(value, "__qualname__", None)
    if name is None:
        parts = getattr(value, "__dict__", {})
        kind = type(value).__qualname__
        return {"type": kind, **inner(parts)} if parts else kind
    # The same function, wherever a private module of its package holds it.
    module = ".".join(part.removeprefix("_") for part in value.__module__.split("."))
    name = f"{module}.{name}"
    if isinstance(value, types.MethodType):
        return {"function": name, "self": inner(value.__self__)}
    bare = inspect.unwrap(value) if callable(value) else value
    if not isinstance(bare, types.FunctionType):
        return name
    # One that is made by another function, or has no name, is told by more than that.
    more: dict[str, Any] = {}
    if "<" in name:
        given = (*(bare.__defaults__ or ()), *(bare.__kwdefaults__ or {}).values())
        more |= {"defaults": given} if given else {}
        cells = zip(bare.__code__.co_freevars, bare.__closure__ or (), strict=True)
        for key, cell in cells:
            with contextlib.suppress(ValueError):  # not there yet
                more[key] = cell.cell_contents
    out = {"function": name}
    if "<lambda>" in name.rpartition(".")[2]:
        out["code"] = _code(bare.__code__)
    if more:
        out["with"] = inner(more)
    return out if len(out) > 1 else name


def _code(code: types.CodeType) -> str:
    """What a function does: its compiled code, and by which version of Python."""

    def plain(x: object) -> object:
        if isinstance(x, types.CodeType):
            return x.co_code, x.co_names, x.co_varnames, plain(x.co_consts)
        if isinstance(x, frozenset):
            return sorted(map(repr, x))
        return tuple(map(plain, x)) if isinstance(x, tuple) else x

    digest = hashlib.sha256(repr(plain(code)).encode()).hexdigest()[:16]
    return f"{_CODE} {digest}"


_CODE = f"code of {sys.implementation.cache_tag}"


def difference(there: object, here: object, name: str = "") -> list[str]:
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
    # What a later version has added, and is not used, tells nothing.
    if all(x is None or x == "nothing" for x in (there, here)):
        return []
    # As JSON: NaN is no NaN otherwise.
    if json.dumps(there, sort_keys=True) == json.dumps(here, sort_keys=True):
        return []
    if isinstance(there, str) and there.startswith("code of "):
        if not there.startswith(f"{_CODE} "):
            return []  # which another version of Python compiled
    return [f"{name}: {there} there, {json.loads(json.dumps(here))} here"]
