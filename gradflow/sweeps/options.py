"""Options of a sweep that belong together: of a descent, and of a store."""

import dataclasses
import os
from collections.abc import Sequence
from typing import get_args

import equinox as eqx
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from .._checks import (
    check_arguments,
    check_choice,
    check_given,
    check_integer,
    word,
)
from .._typing import Schedule
from ..runs.methods import check_optimiser, Method, Optimiser
from ..runs.times import saved_steps
from .axes import Numbers


class Descent(eqx.Module):
    """Steps of a descent in place of the flow: `gf.sweep(..., run=gf.Descent(0.1))`.

    How each of these options acts is told by [`gradflow.descent`][]. How far a descent
    goes is told here, by `steps` or `at`; or by `slow_time` or `t1` of the sweep.

    **Arguments:** those below.

    **Raises:** `ValueError` for options that make no sense, of which it names one.
    """

    learning_rate: Numbers | Schedule
    """h > 0, in units of time t; a vector is an axis of that name. One schedule of
    learning rates, a function of the number of steps taken, serves all lanes."""
    steps: int | None = None
    """How many are taken."""
    at: Sequence[int] | Int[Array | np.ndarray, " n"] | None = None
    """Save after each of these numbers of steps; the last is the end."""
    method: Method | None = None
    """What is done with the penalty; `"subgradient"` unless given."""
    optimiser: Optimiser | None = None
    """One of Optax's, `optax.sgd` unless given."""
    batch_size: int | None = None
    """Of minibatches; all samples unless given."""
    label_noise: float | None = None
    """σ, or the probability that a label is another; none unless given."""
    gradient_noise: float | None = None
    """σ of each number in the gradient; none unless given."""
    key: PRNGKeyArray | None = None
    """Of the minibatches and the noise, which are the same in all lanes."""

    def __check_init__(self) -> None:
        rate = self.learning_rate
        rates = np.asarray(rate)
        if rates.ndim > 1:
            raise ValueError(
                f"learning_rate: expected a number or a vector, got {rate!r}."
            )
        for one in rates.ravel().tolist():
            if rates.ndim and callable(one):
                raise ValueError(
                    "learning_rate: expected numbers, or one schedule for all."
                )
            check_arguments(learning_rate=one)
        if self.steps is not None or self.at is not None:
            saved_steps(self.steps, None, None, self.at, 3, 0.0, rate)
        elif callable(rate):
            raise ValueError("steps, at: give one with a schedule of learning rates.")
        check_choice(self.method, "method", (*get_args(Method), None))
        if self.optimiser is not None:
            check_optimiser(self.optimiser)
        if self.batch_size is not None:
            check_integer(self.batch_size, "batch_size")
        check_given(label_noise=self.label_noise, gradient_noise=self.gradient_noise)


@dataclasses.dataclass(frozen=True)
class Store:
    """Where, and how, a sweep keeps its results on disk: `gf.sweep(..., store=…)`.

    **Arguments:** those below.

    **Raises:** `ValueError` for options that make no sense, of which it names one.
    """

    path: str | os.PathLike
    """A folder to keep them in, such as `"sweep.zarr"`."""
    chunk: int | None = None
    """About how many lanes are computed, and stored, together. By default 16, or as
    many as are one program, if that is more."""
    checkpoint: float = 60.0
    """A lane that takes longer than so many seconds writes its state into the store as
    often as that, to go on from there. (It holds the parameters at all saved times.)"""
    parameters: bool = False
    """Whether the parameters at all saved times are kept too."""
    retry: bool = False
    """Compute the chunks again in which a lane raised an error (as memory ran out, or a
    file was missing); by default they are finished like any other."""

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | os.PathLike):
            raise ValueError(f"path: expected that of a folder, got {word(self.path)}.")
        check_given(chunk=self.chunk)
        check_arguments(checkpoint=self.checkpoint)


def as_store(store: str | os.PathLike | Store | None) -> Store | None:
    """What was given as `store`, with its options.

    **Raises:** `ValueError` for what is no path of a folder.
    """
    if store is None or isinstance(store, Store):
        return store
    if not isinstance(store, str | os.PathLike):
        raise ValueError(
            f"store: expected the path of a folder, or a gradflow.Store, got "
            f"{word(store)}."
        )
    return Store(store)
