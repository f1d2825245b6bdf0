"""Types that many files share."""

from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Array

Given: TypeAlias = Any
"""What a user gave, of whatever type: it is yet to be checked."""

RealScalarLike: TypeAlias = float | int | Array | np.ndarray
"""A real number, as Diffrax has them."""

BoolScalarLike: TypeAlias = bool | Array | np.ndarray | np.generic
"""Yes or no, of Python, NumPy or JAX."""
