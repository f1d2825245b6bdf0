"""Files of lanes that are under way."""

import contextlib
import functools
import os
import secrets
import time
import warnings
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path as File

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._checks import is_key
from ..runs.parts import FIRST
from ..runs.path import Path


def _without_keys(tree: PyTree) -> PyTree:
    """Random keys as numbers."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def _read(file: File, like: PyTree) -> PyTree:
    """What `_without_keys` gave of a tree like this, as that tree."""
    kinds: list[Hashable | None] = []

    def note_kinds(tree: PyTree) -> None:
        for x in jax.tree.leaves(tree):
            kinds.append(jax.random.key_impl(x) if is_key(x) else None)

    def as_key(x: PyTree, kind: Hashable | None) -> PyTree:
        return x if kind is None else jax.random.wrap_key_data(x, impl=kind)

    jax.eval_shape(note_kinds, like)
    read = eqx.tree_deserialise_leaves(file, jax.eval_shape(_without_keys, like))
    leaves, tree = jax.tree.flatten(read)
    return jax.tree.unflatten(tree, map(as_key, leaves, kinds))


@functools.lru_cache(maxsize=32)
def _number(steps: int) -> Array:
    return jnp.asarray(steps)


class Checkpoints:
    """Files in a folder of a store, one for each lane that is under way. Each is whole
    or absent."""

    def __init__(
        self,
        folder: File,
        every: float,
        part_done: Callable[[str, Path], None] = lambda *_: None,
    ):
        self.folder = folder
        self.part_done = part_done
        """Is given the name of a lane and its path so far, after each part."""
        self.every = every
        """The least time between two files of a lane, in seconds."""
        self._last: dict[str, float] = {}
        self._steps = FIRST
        # Of a file that is not whole yet: another run of the same lane has its own.
        self._own = secrets.token_hex(4)

    def count(self, steps: int | None = None) -> Array:
        """Steps for the next part: so many that a file can be written about when one is
        due."""
        return _number(steps or self._steps)

    def part_took(self, seconds: float) -> None:
        """Chooses how many steps the next part has, by how long one was."""
        if seconds < self.every / 8:
            self._steps = min(2 * self._steps, 2**20)
        elif seconds > max(self.every / 2, 1.0):
            self._steps = max(self._steps // 2, 1)

    def load(self, name: str, like: Callable[[], PyTree]) -> PyTree | None:
        """Where a run was, if there is a file of it. `like` gives the shapes."""
        self._last[name] = time.monotonic()
        file = self.folder / f"{name}.eqx"
        if not file.exists():
            return None
        try:
            return _read(file, like())
        except Exception as error:  # of another version, or not whole
            warnings.warn(
                f"store: the checkpoint {file} cannot be read ({error}); this lane "
                "starts anew.",
                stacklevel=2,
            )
            return None

    def due(self, name: str) -> bool:
        return time.monotonic() - self._last[name] >= self.every

    def save(self, name: str, state: PyTree) -> None:
        """Writes where a run is. Where that fails the run goes on without."""
        aside = self.folder / f"{name}.{self._own}.partial"
        try:
            self.folder.mkdir(exist_ok=True)
            with open(aside, "wb") as file:
                eqx.tree_serialise_leaves(file, _without_keys(state))
            os.replace(aside, self.folder / f"{name}.eqx")
        except Exception as error:  # a full disk is no failure of the lane
            warnings.warn(
                f"store: the checkpoint {aside} cannot be written ({error}).",
                stacklevel=2,
            )
        self._last[name] = time.monotonic()

    def remove(self, names: Iterable[str]) -> None:
        """Takes the files of finished lanes away."""
        there = os.listdir(self.folder) if self.folder.exists() else []
        names = set(names)
        for file in there:
            if file.partition(".")[0].removesuffix("-again") in names:
                (self.folder / file).unlink(missing_ok=True)

    def end(self) -> None:
        """Takes the folder away, where nothing is left in it."""
        with contextlib.suppress(OSError):
            self.folder.rmdir()
