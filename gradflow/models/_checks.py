"""Checks of the shapes that a model is made of."""

from jaxtyping import Array


def check_same_shape(u: Array, v: Array) -> None:
    if u.shape != v.shape:
        raise ValueError(f"v: expected the shape of u, {u.shape}, got {v.shape}.")


def check_ndim(array: Array, name: str, ndim: int | tuple[int, ...]) -> None:
    allowed = (ndim,) if isinstance(ndim, int) else ndim
    if array.ndim not in allowed:
        axes = " or ".join(map(str, allowed))
        raise ValueError(f"{name}: expected {axes} axes, got shape {array.shape}.")


def check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {size!r}.")
