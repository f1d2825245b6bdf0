"""Interpolation of a path between its saved times."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._host import numpy_of

DEGREE = 7  # of the polynomials: error 1e-9 on exp(−eˣ) at a spacing of 0.08


def interpolate(
    values: PyTree, position: Float[Array, ""], degree: int = DEGREE
) -> PyTree:
    """`values` at the fractional index `position`, by the polynomial through the
    `degree` + 1 nearest of them: for values that are smooth in their index. Where they
    are not, take degree 1.

    **Arguments:**

    - `values`: a pytree of arrays whose first axis is evenly spaced in some variable.
    - `position`: a number between 0 and n − 1; the ends are not passed.
    """
    n = jax.tree.leaves(values)[0].shape[0]
    first, weights = _weights(position, n, degree + 1)

    def one(v: Array) -> Array:
        near = jax.lax.dynamic_slice_in_dim(v, first, degree + 1)
        return jnp.tensordot(weights, near, axes=1)

    return jax.tree.map(one, values)


def halfway(
    values: Float[np.ndarray, "n d"], degree: int
) -> Iterator[Float[np.ndarray, " d"]]:
    """What `interpolate` makes of them between each and the next, on the host."""
    for place in range(len(values) - 1):
        position = values.dtype.type(place + 0.5)
        first, weights = _weights(position, len(values), degree + 1)
        yield weights @ values[first : first + degree + 1]


def _weights(position: Any, n: int, points: int) -> tuple[Any, Any]:
    """Which of n values comes first, of those next to a position, and the weights of
    these: the Lagrange polynomials on 0, 1, 2, … there."""
    xp = numpy_of(position)
    first = xp.clip(xp.floor(position).astype(int) - points // 2 + 1, 0, n - points)
    x = xp.clip(position, 0, n - 1) - first.astype(position.dtype)
    nodes = np.arange(points, dtype=x.dtype)
    others = np.stack([np.delete(nodes, j) for j in range(points)])
    scale = np.prod(nodes[:, None] - others, axis=1)
    return first, xp.prod(x - others, axis=1) / scale


def place(
    t: Float[Array, ""], end: Float[Array, ""], scale: Array | float, count: int
) -> Float[Array, ""]:
    """The fractional index of time t among `count` even times; see `even_times`."""
    return jnp.log1p(t / scale) / jnp.log1p(end / scale) * (count - 1)


def holds_until(s: np.ndarray, share: np.ndarray) -> float:
    """The last place up to which `share`, given at increasing places `s`, is at least
    one: between two of them by interpolation of its logarithm; the first where it is
    less from the start. What is not a number is not known to be enough."""
    share = np.asarray(share, float)
    height = np.log(np.maximum(share, np.finfo(float).tiny))
    low = np.flatnonzero(~(height >= 0))
    if low.size == 0:
        return float(s[-1])
    i = int(low[0])
    if i == 0:
        return float(s[0])
    part = np.nan_to_num(height[i - 1] / (height[i - 1] - height[i]))
    return float(s[i - 1] + part * (s[i] - s[i - 1]))
