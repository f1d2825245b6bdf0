"""What is watched along a path: a function of the model, with the level that counts."""

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float, PyTree

from .._checks import as_level, check_callable
from .._typing import Given


class Metric(eqx.Module):
    """A number that tells how good a model is, and the threshold that it is to pass.

    The time at which a metric named `"train"` passes its threshold for good is the
    memorisation time; for one named `"test"` it is the grokking time.

    It may be many numbers too, such as singular values: an array whose shape is the
    same for all models. These have no threshold.
    """

    fn: Callable[[Any], Float[Array, "..."]]
    threshold: float | None = eqx.field(static=True)
    higher_is_better: bool = eqx.field(static=True)

    def __init__(
        self,
        fn: Callable[[Any], Float[Array, "..."]],
        threshold: Given = None,
        higher_is_better: bool | None = None,
    ):
        """**Arguments:**

        - `fn`: a function of the model.
        - `threshold`: the level that it is to pass, a number; `None` where no level
            counts.
        - `higher_is_better`: whether it passes from below, as an accuracy does. Unless
            given it is what `fn` says by an attribute of this name, as
            [`gradflow.Accuracy`][] does, and `False` where it says nothing, as of
            losses and errors.

        **Raises:** `ValueError` where `fn` is no function, or the threshold no number.
        """
        check_callable(fn, "fn")
        if higher_is_better is None:
            own = inspect.unwrap(fn)  # of what `jit` wraps
            higher_is_better = bool(getattr(own, "higher_is_better", False))
        self.fn, self.threshold = fn, as_level(threshold)
        self.higher_is_better = higher_is_better

    def __call__(self, model: PyTree) -> Float[Array, "..."]:
        return self.fn(model)


def without_thresholds(metrics: dict[str, Metric]) -> dict[str, Metric]:
    """The functions of `metrics` alone, by their names: what is compiled for one
    threshold serves all."""
    return {name: Metric(metric.fn) for name, metric in metrics.items()}
