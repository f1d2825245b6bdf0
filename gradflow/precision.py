"""The precision of all numbers, which is JAX's to set and the user's to choose."""

import jax


def enable_float64() -> None:
    """Makes JAX use float64 for all arrays made from now on, in this process.

    JAX's own default is float32, in which a path is resolved to 1e-4 at best, and the
    slow phase of a small weight decay drowns in rounding. Call it once, before any
    array is made. It is the same as `jax.config.update("jax_enable_x64", True)`, or as
    the environment variable `JAX_ENABLE_X64=1`. Importing gradflow changes no setting.
    """
    jax.config.update("jax_enable_x64", True)
