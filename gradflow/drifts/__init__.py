"""Where optimisers drift to: the penalties that noise, large steps and adaptive steps
amount to on the critical manifold, and how strong each is."""

from .trace import Trace as Trace
from .diagonal import RootDiagonal as RootDiagonal
from .finite_step import LogTrace as LogTrace
from .largest import LargestCurvature as LargestCurvature
from .optimisers import (
    adam as adam,
    Effective as Effective,
    label_noise as label_noise,
    parameter_noise as parameter_noise,
    sharpness_aware as sharpness_aware,
)
