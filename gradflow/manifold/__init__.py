"""The critical manifold of a loss: the limits of the flow without weight decay, their
tangent space, and the drift of the penalty along it."""

from .diagnosis import diagnose as diagnose, Diagnosis as Diagnosis
from .drift import Drift as Drift
from .kinks import kink_crossings as kink_crossings, KinkCrossings as KinkCrossings
from .limit import Limit as Limit, limit_map as limit_map
from .regular_points import Regularity as Regularity, regularity as regularity
from .retraction import retract as retract, Retraction as Retraction
from .riemannian import riemannian_flow as riemannian_flow
from .spectra import Spectrum as Spectrum, spectrum as spectrum
from .tangent import tangent_projection as tangent_projection
