"""Types that many files share."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Array

Schedule: TypeAlias = Callable[[Any], Any]
"""A number as a function of time, or of the steps taken, as Optax has them."""

Given: TypeAlias = Any
"""What a user gave, of whatever type: it is yet to be checked."""

RealScalarLike: TypeAlias = float | int | Array | np.ndarray
"""A real number, as Diffrax has them."""

BoolScalarLike: TypeAlias = bool | Array | np.ndarray | np.generic
"""Yes or no, of Python, NumPy or JAX."""
