"""Compiled programs, kept from one process to the next."""

from pathlib import Path

import jax
import platformdirs
from jax.experimental.compilation_cache import compilation_cache


def cache_programs(folder: str | Path | None = None) -> str:
    """Makes JAX keep the programs that it compiles from now on in files, and take those
    that are there: it is what the first call of anything spends its time on.

    Programs are found again by what they compute, the versions of JAX and the machine,
    so that a file is never wrong, only unused. It is JAX's own cache, with no program
    too small for it; a program that calls back into Python, as a loss of yours might,
    is not kept. Files are not deleted: the folder may be, at any time.

    **Arguments:**

    - `folder`: where they are. By default that which JAX was given, by the environment
        variable `JAX_COMPILATION_CACHE_DIR` or `jax.config`; or `gradflow` in the
        user's cache folder.

    **Returns:** the folder. `JAX_ENABLE_COMPILATION_CACHE=0` in the environment turns
    it off, whoever calls this.
    """
    if folder is None:
        folder = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    folder = str(folder or platformdirs.user_cache_path("gradflow", appauthor=False))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # Whether there is one is settled at the first program that is compiled.
    compilation_cache.reset_cache()
    return folder
