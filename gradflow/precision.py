"""The precision of all numbers, which is JAX's to set and the user's to choose."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax

Fn = TypeVar("Fn", bound=Callable[..., Any])


def exact_products(fn: Fn) -> Fn:
    """`fn`, with products of matrices in all digits of their numbers, which on a GPU is
    not JAX's default for float32: TF32 has three digits, in which no rank can be told
    and no step controlled to more."""

    @functools.wraps(fn)
    def exact(*args, **options):
        with jax.default_matmul_precision("highest"):
            return fn(*args, **options)

    return exact  # pyright: ignore[reportReturnType]


def enable_float64() -> None:
    """Makes JAX use float64 for all arrays made from now on, in this process.

    JAX's own default is float32, in which a path is resolved to 1e-4 at best, and the
    slow phase of a small weight decay drowns in rounding. Call it once, before any
    array is made. It is the same as `jax.config.update("jax_enable_x64", True)`, or as
    the environment variable `JAX_ENABLE_X64=1`. Importing gradflow changes no setting.
    """
    jax.config.update("jax_enable_x64", True)
