"""The paths of a sweep that are in a store: they are read when they are asked for."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from ..results import from_codes, is_success, RESULTS
from ..runs.path import Path
from ..runs.stats import NUMBERS, Stats
from .axes import Axes
from .columns import Dataset, parameter_name
from .problems import Last, Problems
from .stack import OfProblem


@dataclasses.dataclass(frozen=True)
class NotStored:
    """In the place of parameters that a store does not have."""

    def __getitem__(self, index: object) -> Any:
        raise ValueError(
            "parameters: the store has none; sweep with "
            "store=gf.Store(path, parameters=True)."
        )


def settings(axes: Axes, fixed: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """λ of each lane; and the tolerance, or the learning rate, if it is a number."""
    out = {}
    for name in ("weight_decay", "rtol", "learning_rate"):
        if name in axes.values:
            out[name] = axes.column(name)
        elif isinstance(fixed.get(name), int | float):
            out[name] = np.full(len(axes), fixed[name])
    return out


def parameter_names(params: PyTree) -> list[str]:
    """Those of the arrays of a store that hold parameters like these."""
    places = jax.tree_util.tree_leaves_with_path(params)
    return [parameter_name(at) for at, _ in places]


def read_paths(
    results: Dataset,
    given: Mapping[str, np.ndarray],
    metrics: Iterable[str],
    like: PyTree,
    of_problem: OfProblem,
) -> Path:
    """All lanes of labelled arrays as one path, in memory.

    **Arguments:**

    - `results`: an `xarray.Dataset` as `gradflow.open_results` gives.
    - `given`: the `settings` of its lanes.
    - `metrics`: the names of those to read.
    - `like`: parameters of the shape of those to read, or `NotStored`.
    - `of_problem`: what the path has from its problem.
    """
    numbers: dict[str, Any] = {
        name: flat(results, name) for name in NUMBERS if name in results
    }
    t = flat(results, "t")
    params = like
    if not isinstance(like, NotStored):
        leaves = [flat(results, name) for name in parameter_names(like)]
        params = jax.tree.structure(like).unflatten(leaves)
    numbers |= {k: jnp.asarray(v) for k, v in given.items() if k != "weight_decay"}
    return Path(
        t=t,
        weight_decay=jnp.asarray(given["weight_decay"], t.dtype),
        params=params,
        static=of_problem.static,
        metrics={name: flat(results, f"metric_{name}") for name in sorted(metrics)},
        train_loss=flat(results, "train_loss"),
        penalty=flat(results, "penalty"),
        result=_result(results),
        stats=Stats(
            results.attrs["solver"], until=results.attrs.get("until", ""), **numbers
        ),
        watched=of_problem.watched,
    )


def flat(results: Dataset, name: str) -> Array:
    """An array of the results, with the lanes as its first axis."""
    return jnp.asarray(_flat(results, name))


def _flat(results: Dataset, name: str) -> np.ndarray:
    array, dims = results[name], results["result"].dims
    rest = [results.sizes[d] for d in array.dims if d not in dims]
    return array.values.reshape(results["result"].size, *rest)


def _result(results: Dataset) -> RESULTS:
    return from_codes(_flat(results, "result"), results["result"].attrs)


@dataclasses.dataclass(frozen=True)
class StoredProblems(Sequence):
    """Of each lane, what its path has from its problem: made when it is asked for."""

    problems: Problems | None = dataclasses.field(metadata={"saved": False})
    """`None` where it was read from a file."""
    lanes: int
    _first: Last = dataclasses.field(default_factory=Last, metadata={"saved": False})

    def __len__(self) -> int:
        return self.lanes

    def __getitem__(self, index: int) -> OfProblem:
        if not -self.lanes <= index < self.lanes:
            raise IndexError(f"no lane {index} of {self.lanes}.")
        return self.like(index % self.lanes)[1]

    def like(self, lane: int) -> tuple[PyTree, OfProblem]:
        """Parameters of the shape of those of a lane, and the rest of its path; of the
        first lane that has a problem, where its own could not be made."""
        if self.problems is None:
            return NotStored(), OfProblem(None, {})
        try:
            return self.problems.start(lane)[1], self.problems.parts(lane)
        except Exception:  # for which the lane is marked
            return self.first()

    def first(self) -> tuple[PyTree, OfProblem]:
        """The same of the first lane that has a problem."""
        problems = self.problems
        if problems is None:
            return self.like(0)

        def make() -> tuple[PyTree, OfProblem]:
            for lane in range(self.lanes):
                try:
                    return problems.start(lane)[1], problems.parts(lane)
                except Exception:
                    continue
            return NotStored(), OfProblem(None, {})

        return self._first.get((), make)


class StoredPaths(eqx.Module):
    """All paths of a sweep in a store. It has what a `Path` has, with the lanes as the
    first axis; each array is read when it is asked for."""

    store: str
    """Where it is."""
    given: dict[str, np.ndarray]
    """λ and other `settings` of each lane."""
    problems: StoredProblems
    results: Dataset = eqx.field(default=None, metadata={"saved": False})
    """An `xarray.Dataset`; `None` where this was read from a file."""

    def dataset(self) -> Dataset:
        """The labelled arrays, which are read when they are used.

        **Raises:** `ValueError` where this was read from a file, which has none.
        """
        if self.results is None:
            raise ValueError(
                f"results: they are in a store, gf.open_results({self.store!r}); a "
                "file that gf.save writes has those of sweep.load()."
            )
        return self.results

    def numbers(self) -> Path:
        """All paths in memory, without parameters and what they have from problems."""
        data, names = self.dataset(), self._metric_names
        return read_paths(data, self.given, names, NotStored(), OfProblem(None, {}))

    def load(self, *, parameters: bool = True) -> Path:
        """All paths in memory."""
        like, of_problem = self.problems.first()
        like = self._stored(like) if parameters else NotStored()
        data, names = self.dataset(), self._metric_names
        return read_paths(data, self.given, names, like, of_problem)

    def lane(self, number: int) -> Path:
        """One path, of which alone the arrays are read."""
        data = self.dataset()
        place = np.unravel_index(number, data["result"].shape)
        one = data.isel(
            {d: [int(i)] for d, i in zip(data["result"].dims, place, strict=True)}
        )
        given = {k: v[number : number + 1] for k, v in self.given.items()}
        like, of_problem = self.problems.like(number)
        bare = OfProblem(None, {})
        path = read_paths(one, given, self._metric_names, self._stored(like), bare)
        path = jax.tree.map(lambda x: x[0] if eqx.is_array(x) else x, path)
        static, watched = of_problem
        return dataclasses.replace(path, static=static, watched=watched)

    def _stored(self, like: PyTree) -> PyTree:
        """`like`, if the store has such parameters."""
        data = self.dataset()
        there = all(name in data for name in parameter_names(like))
        return like if there and not isinstance(like, NotStored) else NotStored()

    @property
    def _metric_names(self) -> list[str]:
        names = map(str, self.dataset().data_vars)
        return [n.removeprefix("metric_") for n in names if n.startswith("metric_")]

    @property
    def t(self) -> Float[Array, "L n"]:
        return flat(self.dataset(), "t")

    @property
    def weight_decay(self) -> Float[Array, " L"]:
        return jnp.asarray(self.given["weight_decay"], self.dataset()["t"].dtype)

    @property
    def slow_time(self) -> Float[Array, "L n"]:
        return self.weight_decay[:, None] * self.t

    @property
    def metrics(self) -> dict[str, Float[Array, "L n ..."]]:
        data = self.dataset()
        return {name: flat(data, f"metric_{name}") for name in self._metric_names}

    @property
    def train_loss(self) -> Float[Array, "L n"]:
        return flat(self.dataset(), "train_loss")

    @property
    def penalty(self) -> Float[Array, "L n"]:
        return flat(self.dataset(), "penalty")

    @property
    def result(self) -> RESULTS:
        return _result(self.dataset())

    @property
    def succeeded(self) -> Bool[Array, " L"]:
        return is_success(self.result)

    @property
    def stats(self) -> Stats:
        return self.numbers().stats

    @property
    def params(self) -> PyTree:
        """All parameters at all times, or `NotStored`."""
        return self.load().params

    @property
    def static(self) -> PyTree:
        """That of the first lane."""
        return self.problems.first()[1].static

    @property
    def watched(self) -> dict[str, Any]:
        """The metrics of the first lane."""
        return self.problems.first()[1].watched
