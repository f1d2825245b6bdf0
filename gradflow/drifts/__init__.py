"""Where optimisers drift to: the penalties that noise, large steps and adaptive steps
amount to on the critical manifold, and how strong each is."""

from .trace import Trace as Trace
from .diagonal import RootDiagonal as RootDiagonal
from .finite_step import LogTrace as LogTrace
from .largest import LargestCurvature as LargestCurvature
