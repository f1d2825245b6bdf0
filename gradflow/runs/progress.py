"""The progress bar of one run, which names its solver."""

import functools
from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import PyTree
from tqdm.auto import tqdm

from .._typing import RealScalarLike


class Bar(diffrax.TqdmProgressMeter):
    """Diffrax's bar, with the name of the solver and the number of steps."""

    name: str = eqx.field(static=True, kw_only=True)

    def __init__(self, name: str):
        self.name = name

    def step(self, state: PyTree, progress: RealScalarLike) -> PyTree:
        # The end is always shown.
        count = jnp.where(progress >= 1, 0, state.step)
        return super().step(eqx.tree_at(lambda s: s.step, state, count), progress)

    @property
    def _init_bar(self) -> Any:
        return functools.partial(_begin, self.name)

    @property
    def _step_bar(self) -> Any:
        return functools.partial(_step, self.refresh_steps)

    @property
    def _close_bar(self) -> Any:
        # Where it ended; a run that fails does not reach its end.
        return lambda bar: bar.close()


def _begin(name: str) -> tqdm:
    form = (
        "{desc}: {percentage:.2f}%|{bar}| [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    )
    return tqdm(total=100, unit="%", desc=name, bar_format=form)


def _step(every: int, bar: tqdm, progress: RealScalarLike) -> None:
    steps = int(bar.postfix.split()[0]) if bar.postfix else -every
    steps += every if progress < 1 else 0
    bar.set_postfix_str(f"{steps} steps", refresh=False)
    bar.n = round(100 * float(progress), 2)
    bar.refresh()
