"""The version of the package, which is written in `pyproject.toml` alone."""

import importlib.metadata

DISTRIBUTION = "gradflow-jax"
"""The name under which it is installed; `gradflow` is another project's."""

try:
    __version__ = importlib.metadata.version(DISTRIBUTION)
except importlib.metadata.PackageNotFoundError:  # run from its folder
    __version__ = "not installed"
