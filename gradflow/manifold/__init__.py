"""The critical manifold of a loss: the limits of the flow without weight decay, their
tangent space, and the drift of the penalty along it."""

from .limit_map import Limit as Limit, limit_map as limit_map
from .retract import retract as retract, Retraction as Retraction
from .riemannian import riemannian_flow as riemannian_flow
from .spectrum import Spectrum as Spectrum, spectrum as spectrum
from .tangent import tangent_projection as tangent_projection
