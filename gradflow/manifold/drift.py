"""What a Riemannian flow gives: the models along the critical manifold in slow time."""

from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree, Scalar

from .._checks import check_choice, is_concrete
from .._host import as_array, known, taken
from ..metrics import Metric
from ..results import among, in_words, is_known, RESULTS
from ..runs.columns import one_dataset
from ..runs.crossing import crossing_time
from ..runs.path import ended, relative_speed, trend
from ..runs.stacked import stacked
from ..runs.stats import Stats


class Drift(eqx.Module):
    """The drift w°(s) of the penalty on the critical manifold, saved at n slow times.

    Every array has the n slow times as its first axis. Where it ended early, what comes
    after its end is NaN. `drift[i]` is the model at `drift.s[i]`. Print it for a
    summary; `drift.plot()` draws it.
    """

    s: Float[Array, " n"]
    """The slow times, s = λt for whatever λ."""
    params: PyTree
    """The trainable parameters, stacked along the slow times."""
    static: PyTree
    """All the rest of the model."""
    metrics: dict[str, Float[Array, "n ..."]]
    """The metrics asked for, by name."""
    train_loss: Float[Array, " n"]
    """F at these slow times: that of the manifold, but for rounding."""
    penalty: Float[Array, " n"]
    """R at these slow times; it falls."""
    result: RESULTS
    """How it ended."""
    stats: Stats
    """The solver, its tolerance, and the steps it took."""
    smallest_curvature: Float[Array, " n"]
    """η(s), the smallest normal curvature of F: theory asks for λ ≪ η."""
    watched: dict[str, Metric]
    """The metrics themselves, with their thresholds."""

    @property
    def slow_time(self) -> Float[Array, " n"]:
        """The same as `s`, by the name that it has in a [`gradflow.Path`][]."""
        return self.s

    @property
    def models(self) -> PyTree:
        """The models as one, every array stacked along the slow times, for `jax.vmap`;
        see `Path.models`."""
        return stacked(self.params, self.static, self.s.shape)

    def __getitem__(self, index: int | np.integer) -> PyTree:
        """The model at `s[index]`."""
        params = jax.tree.map(lambda p: taken(p, index), self.params)
        return eqx.combine(params, self.static)

    def __len__(self) -> int:
        return self.s.shape[0]

    @property
    def succeeded(self) -> Bool[Array, ""]:
        """Whether it reached its last slow time. (It may have `slid`: see `result`.)"""
        return among(self.result, RESULTS.successful, RESULTS.slid)

    @property
    def verdict(self) -> str:
        """How it ended, and what to do about it, in words."""
        return in_words(self.result, str(self.stats.solver), self.s.dtype)

    def crossing_time(self, name: str) -> float:
        """The slow time from which metric `name` is past its threshold for good, by
        interpolation: see [`gradflow.crossing_time`][].

        **Raises:** `ValueError` where no metric has that name, or it is no single
        number.
        """
        check_choice(name, "name", tuple(self.watched))
        return crossing_time(self.s, self.metrics[name], self.watched[name])

    @property
    def speed(self) -> Scalar:
        """‖dw/ds‖/‖w‖ over the last two slow times: how fast it still is."""
        return relative_speed(self.params, self.s)

    @property
    def stationary(self) -> Bool[Array, ""]:
        """Whether it has come to rest: `speed` below 1e-3."""
        return as_array(known(self.speed) < 1e-3)

    def __str__(self) -> str:
        d = sum(p.size for p in jax.tree.leaves(self.params)) // len(self)
        s = np.asarray(self.s)
        watched = {"train loss": self.train_loss, "penalty": self.penalty}
        trends = (trend(*each) for each in (watched | self.metrics).items())
        lines = [
            f"Drift of {d} parameters on the critical manifold, s = "
            f"{s[0]:.3g} … {s[-1]:.3g}, {len(self)} slow times",
            f"  {self.stats}",
            f"  {', '.join(trends)}",
            f"  {trend('smallest normal curvature η', self.smallest_curvature)}",
        ]
        if not bool(self.succeeded):
            lines.append(f"  FAILED: {self.verdict}")
        elif among(self.result, RESULTS.slid):
            lines.append(f"  WARNING: {RESULTS[self.result]}")
        elif len(self) > 1:
            state = "at rest" if bool(self.stationary) else "still drifting"
            lines.append(f"  {state}: ‖dw/ds‖/‖w‖ = {float(self.speed):.2g}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        if not is_concrete(self.s) or self.s.ndim != 1 or not is_known(self.result):
            return f"<Drift of slow times {self.s.shape}>"
        return (
            f"<Drift by {self.stats.solver}, {len(self)} slow times to "
            f"s = {float(np.asarray(self.s)[-1]):.3g}: {ended(self)}>"
        )

    def _repr_html_(self) -> str:
        from .. import plot

        return plot.as_html(str(self), lambda ax: plot.drift(self, ax))

    def to_xarray(self) -> Any:
        """An `xarray.Dataset` along `time`: `slow_time`, `train_loss`, `penalty`,
        `smallest_curvature`, `metric_NAME` and `threshold_NAME`, what the solver
        counted (`steps`, …), and `result`, as of a [`gradflow.Path`][]."""
        return one_dataset(self, "slow_time", "smallest_curvature")

    def plot(self, **kwargs: Any) -> Any:
        """The figure of loss, metrics and penalty against slow time, as
        [`gradflow.plot.drift`][] draws it; `kwargs` are its options."""
        from .. import plot

        return plot.drift(self, **kwargs)
