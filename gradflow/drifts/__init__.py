"""Where optimisers drift to: the penalties that noise, large steps and adaptive steps
amount to on the critical manifold, and how strong each is."""

from .trace import Trace as Trace
from .optimisers import Effective as Effective, label_noise as label_noise
