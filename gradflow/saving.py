"""Results in a file: arrays as NumPy has them, and what holds them in JSON."""

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import types
from pathlib import Path as File
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._checks import is_concrete, is_key
from .results import codes, flags, from_codes, RESULTS
from .runs.stacked import constant, plain

_FORMAT = 1
"""Of the file. What an older version wrote can always be read."""
_PLAIN = (bool, int, float, str)


def save(file: str | File | io.IOBase, result: Any) -> None:
    """Writes a result into a file, to be read by [`gradflow.load`][].

    The file is an archive as NumPy writes (`.npz`): arrays, and a text in JSON of what
    holds them. There is no pickle in it. Classes and functions are written by their
    names, and looked up by them when it is read; a function that has none, such as a
    lambda or one made by another, is written as lost: whatever calls it later says so.

    **Arguments:**

    - `file`: its name, which is taken as it is, or a file open for writing bytes.
    - `result`: a [`gradflow.Path`][], [`gradflow.Sweep`][], [`gradflow.TwoPhase`][],
        [`gradflow.Report`][], or any other module of arrays.

    **Raises:** `ValueError` for what is still being traced.
    """
    writer = _Writer()
    root = writer.node(result)
    text = json.dumps({"format": _FORMAT, "root": root, "nodes": writer.nodes})
    arrays = {str(i): array for i, array in enumerate(writer.arrays)}
    with _opened(file, "wb") as out:
        np.savez_compressed(out, structure=np.array(text), **arrays)


def load(file: str | File | io.IOBase) -> Any:
    """Reads what [`gradflow.save`][] wrote, with the same bits in all arrays.

    Classes are looked up by name in the modules that define them, which are imported,
    and filled with their fields; nothing in them is called. So read only files whose
    names you trust.

    **Arguments:**

    - `file`: its name, or a file open for reading bytes.

    **Returns:** what was saved, an object of the same class.

    **Raises:** `ValueError` where it is no such file, or a class that it names is not
    there; `FileNotFoundError` where there is none.
    """
    with _opened(file, "rb") as stored:
        try:
            archive = np.load(stored, allow_pickle=False)
            text = json.loads(str(archive["structure"]))
            arrays = {name: archive[name] for name in archive.files}
        except (ValueError, KeyError, OSError, TypeError) as error:
            raise ValueError(f"file: {file} is none that gradflow saved.") from error
    if text["format"] > _FORMAT:
        raise ValueError(f"file: {file} was saved by a later version of gradflow.")
    return _Reader(text["nodes"], arrays).value(text["root"])


def _opened(
    file: str | File | io.IOBase, mode: str
) -> contextlib.AbstractContextManager[Any]:
    if isinstance(file, str | File):
        return open(file, mode)
    return contextlib.nullcontext(file)


class Lost:
    """In the place of a function that had no name by which to find it again."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            f"{self.name}: a function without a name of its own is not kept in a file; "
            "give the model or the metric again."
        )

    def __repr__(self) -> str:
        return f"<lost: {self.name}>"


class _Writer:
    """What is met more than once is one node, so that it is one object again."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.arrays: list[np.ndarray] = []
        self._known: dict[int, int] = {}
        self._alive: list[Any] = []  # an id serves as a name as long as this is so

    def node(self, value: Any) -> Any:
        """What stands for a value: itself where it is plain, or a node's number."""
        if value is None or type(value) in _PLAIN:
            return {"plain": value}
        if id(value) not in self._known:
            number = self._known[id(value)] = len(self.nodes)
            self._alive.append(value)
            self.nodes.append(None)
            self.nodes[number] = self._describe(value)
        return self._known[id(value)]

    def _describe(self, value: Any) -> dict[str, Any]:
        if isinstance(value, RESULTS):
            return {"kind": "result", "array": self._array(codes(value))}
        if (leaf := plain(value)) is not value:
            return {"kind": "constant", "leaf": self.node(leaf)}
        if not is_concrete(value):
            raise ValueError("result: expected numbers, got one that is being traced.")
        if is_key(value):
            data, impl = jax.random.key_data(value), str(jax.random.key_impl(value))
            return {"kind": "key", "impl": impl, "array": self._array(data)}
        if isinstance(value, jax.Array | np.ndarray | np.generic):
            kind = "jax" if isinstance(value, jax.Array) else "numpy"
            return {
                "kind": kind,
                "array": self._array(value),
                "dtype": str(value.dtype),
            }
        if isinstance(value, np.dtype):
            return {"kind": "dtype", "name": str(value)}
        if isinstance(value, complex):
            return {"kind": "complex", "parts": [value.real, value.imag]}
        if isinstance(value, dict):
            pairs = [[self.node(k), self.node(v)] for k, v in value.items()]
            return {"kind": "dict", "pairs": pairs}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            items = [self.node(v) for v in value]
            return {"kind": "fields", "type": _name(type(value)), "items": items}
        for kind in (tuple, list, set, frozenset):
            if type(value) is kind:
                items = [self.node(v) for v in value]
                return {"kind": kind.__name__, "items": items}
        if isinstance(value, functools.partial):
            nodes = map(self.node, (value.func, value.args, value.keywords))
            of_jax = isinstance(value, jax.tree_util.Partial)
            return {"kind": "partial", "parts": list(nodes), "of_jax": of_jax}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {
                f.name: self.node(getattr(value, f.name) if _kept(f) else None)
                for f in dataclasses.fields(value)
                if hasattr(value, f.name)
            }
            return {"kind": "object", "type": _name(type(value)), "fields": fields}
        if isinstance(value, types.MethodType):
            return {
                "kind": "method",
                "of": self.node(value.__self__),
                "name": value.__func__.__name__,
            }
        name = _name(value)
        found = _find(name) is value
        return {"kind": "named" if found else "lost", "name": name}

    def _array(self, value: Any) -> int:
        array = np.asarray(value)
        if array.dtype.kind == "V":  # of a kind that NumPy's files do not know
            array = array.view(np.uint8 if array.dtype.itemsize == 1 else np.uint16)
        self.arrays.append(array)
        return len(self.arrays) - 1


class _Reader:
    def __init__(self, nodes: list[Any], arrays: dict[str, np.ndarray]):
        self.nodes, self.arrays = nodes, arrays
        self._made: dict[int, Any] = {}

    def value(self, node: Any) -> Any:
        if isinstance(node, dict):
            return node["plain"]
        if node not in self._made:
            self._made[node] = self._make(self.nodes[node])
        return self._made[node]

    def _make(self, node: dict[str, Any]) -> Any:
        kind = node["kind"]
        if kind == "result":
            return from_codes(self.arrays[str(node["array"])], flags())
        if kind == "key":
            data = jnp.asarray(self.arrays[str(node["array"])])
            return jax.random.wrap_key_data(data, impl=node["impl"])
        if kind in ("jax", "numpy"):
            array = self.arrays[str(node["array"])]
            array = array.view(jnp.dtype(node["dtype"]))
            return jnp.asarray(array) if kind == "jax" else array
        if kind == "dtype":
            return jnp.dtype(node["name"])
        if kind == "complex":
            return complex(*node["parts"])
        if kind == "dict":
            return {self.value(k): self.value(v) for k, v in node["pairs"]}
        if kind in ("tuple", "list", "set", "frozenset"):
            made = map(self.value, node["items"])
            return {"tuple": tuple, "list": list, "set": set, "frozenset": frozenset}[
                kind
            ](made)
        if kind == "fields":
            return self._class(node["type"])._make(map(self.value, node["items"]))
        if kind == "partial":
            function, args, keywords = map(self.value, node["parts"])
            of_jax = node.get("of_jax", False)
            partial = jax.tree_util.Partial if of_jax else functools.partial
            return partial(function, *args, **keywords)
        if kind == "constant":
            return constant(self.value(node["leaf"]))
        if kind == "method":
            return getattr(self.value(node["of"]), node["name"])
        if kind == "named" and (found := _find(node["name"])) is not None:
            return found
        if kind == "object":
            return self._object(node)
        return Lost(node["name"])

    def _object(self, node: dict[str, Any]) -> Any:
        made = object.__new__(self._class(node["type"]))
        for name, field in node["fields"].items():
            object.__setattr__(made, name, self.value(field))
        return made

    def _class(self, name: str) -> Any:
        found = _find(name)
        if not isinstance(found, type):
            module, _, rest = name.partition(":")
            raise ValueError(
                f"file: it holds a {rest} of {module}, which is not there; define or "
                "import it first."
            )
        return found


def _kept(field: dataclasses.Field) -> bool:
    """Whether a field is written. `metadata={"saved": False}` says no: then `None` is
    read in its place."""
    return field.metadata.get("saved", True)


def _name(value: Any) -> str:
    """`module:name`, as far as it has one; of a function of JAX the public one."""
    name = getattr(value, "__qualname__", getattr(value, "__name__", repr(value)))
    for module in (jnp, jax.nn):
        if getattr(module, name, None) is value:
            return f"{module.__name__}:{name}"
    return f"{getattr(value, '__module__', None)}:{name}"


def _find(name: str) -> Any:
    """What `_name` is the name of; `None` where nothing is there."""
    module, _, rest = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in rest.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError):
        return None
    return found
