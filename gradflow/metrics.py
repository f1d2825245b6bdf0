"""What is watched along a path: a function of the model, with the level that counts."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import Scalar


class Metric(eqx.Module):
    """A number that tells how good a model is, and the threshold that it is to pass.

    The time at which a metric named `"train"` passes its threshold for good is the
    memorisation time; for one named `"test"` it is the grokking time.
    """

    fn: Callable[[Any], Scalar]
    threshold: float | None = eqx.field(static=True, default=None)
    higher_is_better: bool = eqx.field(static=True, default=False)

    def __call__(self, model: Any) -> Scalar:
        return self.fn(model)
