"""Kinks that a path crosses: where a ReLU's preactivation changes sign."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._checks import check_arguments, check_callable
from ..precision import exact_products
from ..runs.path import check_path, Path
from .drift import Drift


class KinkCrossings(eqx.Module):
    """The kinks that a path crossed, in order of time, and those it slid along.

    The critical manifold of a ReLU network is smooth between kinks, with a corner at
    each: its tangent space jumps there. Two crossings of one kink between two saved
    times cannot be seen.
    """

    t: Float[np.ndarray, " k"]
    """When, by linear interpolation: a time t, or a slow time s along a drift; where it
    stayed on the kink, the first saved one there."""
    before: Float[np.ndarray, " k"]
    """The last saved time that is before the crossing for certain."""
    after: Float[np.ndarray, " k"]
    """The first saved time that is after it."""
    gate: Int[np.ndarray, "k axes"]
    """Which: the index into the array of preactivations."""
    sliding: Bool[np.ndarray, "..."]
    """For each preactivation, whether it stayed at zero for two saved times or more:
    the path slid along that kink."""

    @property
    def count(self) -> int:
        """How many crossings."""
        return self.t.size

    def __str__(self) -> str:
        lines = [
            f"{self.count} crossings of kinks, of {self.sliding.size} preactivations; "
            f"slid along {int(self.sliding.sum())}"
        ]
        if self.count:
            gates = len({tuple(g) for g in self.gate.tolist()})
            lines.append(
                f"  by {gates} of them, the first at t = {self.t[0]:.3g}, the last at "
                f"t = {self.t[-1]:.3g}"
            )
        return "\n".join(lines)


@exact_products
def kink_crossings(
    path: Path | Drift,
    preactivations: Callable[[Any], Array],
    *,
    tolerance: float = 1e-6,
) -> KinkCrossings:
    """Locates and counts the sign changes of preactivations along a path.

    **Arguments:**

    - `path`: from [`gradflow.simulate`][] or [`gradflow.manifold.riemannian_flow`][].
    - `preactivations`: of a model, an array of any shape, such as
        `lambda model: jax.vmap(model.preactivations)(x)` for a
        [`gradflow.models.TwoLayer`][].
    - `tolerance`: a preactivation within this much of zero, relative to its largest
        size along the path, is on its kink.

    **Returns:** a [`gradflow.manifold.KinkCrossings`][].

    **Raises:** `ValueError` where the path did not reach its end.
    """
    if not isinstance(path, Drift):
        check_path(path)
    check_callable(preactivations, "preactivations")
    check_arguments(tolerance=tolerance)
    values = np.asarray(
        eqx.filter_jit(
            lambda params: jax.lax.map(
                lambda p: preactivations(eqx.combine(p, path.static)), params
            )
        )(path.params)
    )
    if not np.isfinite(values).all():
        raise ValueError("path: ended early; its preactivations are not finite.")
    times = path.s if isinstance(path, Drift) else path.t
    t, shape = np.asarray(times), values.shape[1:]
    values = values.reshape(t.size, -1)
    on = np.abs(values) <= tolerance * np.abs(values).max(axis=0)
    sliding = (on[1:] & on[:-1]).any(axis=0)
    found = []
    for gate in np.flatnonzero((values.min(axis=0) <= 0) & (values.max(axis=0) >= 0)):
        off = np.flatnonzero(~on[:, gate])
        v = values[off, gate]
        for k in np.flatnonzero(v[1:] * v[:-1] < 0):
            i, j = off[k], off[k + 1]
            part = v[k] / (v[k] - v[k + 1])
            when = t[i] + part * (t[j] - t[i]) if j == i + 1 else t[i + 1]
            found.append((when, t[i], t[j], gate))
    table = np.array(sorted(found)).reshape(-1, 4)
    index = np.stack(np.unravel_index(table[:, 3].astype(int), shape), axis=-1)
    when, before, after, _ = table.T
    return KinkCrossings(when, before, after, index, sliding.reshape(shape))
