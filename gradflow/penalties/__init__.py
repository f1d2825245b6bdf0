"""Penalties R(θ) on the trainable parameters."""

from .base import AbstractPenalty as AbstractPenalty, Scaled as Scaled, Sum as Sum
from .jacobian import Sobolev as Sobolev
from .leafwise import (
    AbstractLeafwise as AbstractLeafwise,
    ElasticNet as ElasticNet,
    GroupLasso as GroupLasso,
    L1 as L1,
    L2 as L2,
    soft_threshold as soft_threshold,
)
from .matrix import Nuclear as Nuclear, Schatten as Schatten
from .moreau import Moreau as Moreau
