"""What a page holds of each lane of a sweep: its numbers at some of the saved times."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ._drawn import Sweep
from ._page import numbers, Slider
from ._paths import lane_colours

_NUMBERS = 800_000  # on a page, at most: of ten bytes
_TIMES = 200  # of a lane, at most
_FEWEST = 8  # and at least
_STEPS = 240  # of the slider of time
_OUTPUTS = 8  # of a function

Columns = dict[str, np.ndarray]
"""By name: a number for each lane, or one at each of its times, or a row of them."""
Of1d = Callable[[Any, Any], Any]
"""f(model, x), of one x."""


class Curve(NamedTuple):
    """A function of models at m inputs: q numbers for each, which are q curves, one
    after the other with a gap (NaN) between."""

    x: np.ndarray
    """The inputs, with the gaps."""
    rows: Callable[[Any], jax.Array]
    """From models stacked along n times to the n rows of numbers."""


def curve(inputs: Any, function: Of1d | None, model: Any) -> Curve:
    """For models like `model`.

    **Raises:** `ValueError` where `inputs` are none, or it gives no numbers for them.
    """
    try:
        x = np.asarray(inputs)
        good = x.dtype.kind in "biuf" and bool(np.isfinite(x).all())
    except ValueError:  # of lists that are no array
        x, good = np.zeros(()), False
    if not good or x.ndim not in (1, 2) or x.shape[1:] not in ((), (1,)) or len(x) < 2:
        raise ValueError(
            "inputs: expected two or more finite numbers, of shape (m,) or (m, 1)."
        )
    x = x[np.argsort(x.reshape(-1), kind="stable")]
    if x.dtype.kind == "f" or function is None:
        leaves = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
        x = x.astype(leaves[0].dtype)
    called = function or (lambda model, x: model(x))
    at_each = jax.vmap(lambda model, x: jnp.asarray(called(model, x)), (None, 0))
    try:
        like = eqx.filter_eval_shape(at_each, model, jnp.asarray(x))
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"inputs: the function does not take one of shape {x.shape[1:]}: {first}"
        ) from error
    outputs = like.size // len(x)
    if like.dtype.kind not in "biuf" or not 1 <= outputs <= _OUTPUTS:
        raise ValueError(
            f"function: expected 1 to {_OUTPUTS} real numbers for each input, got "
            f"{like.dtype} of shape {like.shape[1:]}."
        )

    @eqx.filter_jit
    def rows(models: Any) -> jax.Array:
        values = jax.vmap(at_each, (0, None))(models, jnp.asarray(x)).astype(float)
        values = values.reshape(len(values), len(x), outputs).swapaxes(1, 2)
        gap = jnp.full_like(values[..., :1], jnp.nan)
        return jnp.concatenate([values, gap], axis=2).reshape(len(values), -1)

    return Curve(np.tile(np.append(x.reshape(-1), np.nan), outputs), rows)


def kept_times(sweep: Sweep, each: int, asked: str) -> np.ndarray:
    """Which of the saved times a page keeps, where there are `each` numbers at a time.

    **Raises:** `ValueError`, which names the argument `asked`, where that is too much.
    """
    lanes, times = np.asarray(sweep.t).shape
    most = min(times, _TIMES, _NUMBERS // (lanes * each))
    if most < min(times, _FEWEST):
        raise ValueError(
            f"{asked}: {lanes} lanes with {each} numbers at each time are too much for "
            f"a page, which takes {_NUMBERS} numbers."
        )
    return thinned(times, most)


def thinned(count: int, most: int) -> np.ndarray:
    """Some of the numbers below `count`, evenly and with both ends."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def slider_times(t: np.ndarray) -> np.ndarray:
    """Evenly in log t, over the times of all lanes."""
    t = t[np.isfinite(t) & (t > 0)]
    return np.geomspace(t.min(), t.max(), _STEPS) if t.size else np.ones(1)


def sliders(sweep: Sweep) -> list[Slider]:
    """One for each dimension of more than one value; numbers grow to the right. They
    begin at a lane that did not fail, from the middle of these."""
    good = np.flatnonzero(np.asarray(sweep.succeeded))
    begin = int(good[good.size // 2]) if good.size else 0
    place = np.unravel_index(begin, sweep.shape)
    out, stride = [], len(sweep)
    for dim, size, at in zip(sweep.dims, sweep.shape, place, strict=True):
        stride //= size
        if size == 1:
            continue
        along = {k: v for k, v in sweep.coords.items() if sweep.axes.along[k] == dim}
        order = np.arange(size)
        if along[dim].dtype.kind in "biuf":
            order = np.argsort(along[dim], kind="stable")
        symbols = sweep.axes.symbols
        words = [[(symbols[k], _word(v[i])) for k, v in along.items()] for i in order]
        name = ", ".join(k.replace("_", " ") for k in along)
        start = order.tolist().index(at)
        out.append(Slider(name, words, (stride * order).tolist(), start))
    return out


def _word(value: np.generic) -> Any:
    """Numbers are put in words by the page; it has none for infinity."""
    word = value.item()
    return str(word) if isinstance(word, float) and not np.isfinite(word) else word


def failures(sweep: Sweep) -> dict[int, str]:
    """Of each lane that failed, why."""
    failed = np.flatnonzero(~np.asarray(sweep.succeeded))
    return {i: sweep.failure(i) for i in failed.tolist()}


def hex_colours(sweep: Sweep) -> list[str]:
    """The colour of each lane, that of its λ as in all figures."""
    from matplotlib.colors import to_hex

    colours = lane_colours(sweep)
    lams = colours.lams.tolist()
    one = {lam: i for i, lam in enumerate(lams)}  # lane of each value
    known = {lam: to_hex(colours(i)) for lam, i in one.items()}
    return [known[lam] for lam in lams]


def told(sweep: Sweep, columns: Columns, failed: dict[int, str]) -> list[dict]:
    """Each lane, as a page has it."""
    return [
        {"colour": colour, "note": failed.get(i, "")}
        | {name: numbers(values[i]) for name, values in columns.items()}
        for i, colour in enumerate(hex_colours(sweep))
    ]
