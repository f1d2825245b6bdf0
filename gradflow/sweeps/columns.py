"""Paths as labelled columns of an xarray dataset."""

from typing import Any, TypeAlias

import jax
import numpy as np

from ..runs.columns import Columns, own_dims
from ..runs.path import Path
from .stack import Ragged

Dataset: TypeAlias = Any
"""An `xarray.Dataset`. (The package is imported when it is first needed.)"""


def parameter_columns(paths: Path) -> Columns:
    """The parameters of some lanes at all times, by their places in the model."""
    if isinstance(paths.params, Ragged):
        raise ValueError("parameters: their shapes differ from lane to lane.")
    out = {}
    for at, leaf in jax.tree_util.tree_leaves_with_path(paths.params):
        name = parameter_name(at)
        out[name] = (("time", *own_dims(name, leaf)), np.asarray(leaf))
    return out


def parameter_name(at: jax.tree_util.KeyPath) -> str:
    # No folders of their own in a store.
    name = jax.tree_util.keystr(at, simple=True, separator=".").replace("/", ".")
    return f"params_{name}"
