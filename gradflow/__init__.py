"""gradflow: neural networks trained in continuous time."""

from ._version import __version__ as __version__
from .cache import cache_programs as cache_programs
from .precision import enable_float64 as enable_float64


from .flow.term import FlowTerm as FlowTerm
from .flow.decay import InSlowTime as InSlowTime
from .flow.flow import GradientFlow as GradientFlow, scaled as scaled
from .losses import (
    AbstractCompositeLoss as AbstractCompositeLoss,
    AbstractLoss as AbstractLoss,
    CrossEntropy as CrossEntropy,
    Huber as Huber,
    Logistic as Logistic,
    Loss as Loss,
    SquaredError as SquaredError,
)
from .margin_losses import (
    Exponential as Exponential,
    Hinge as Hinge,
    SoftMargin as SoftMargin,
)
from .population import PopulationError as PopulationError
from .penalties import (
    AbstractPenalty as AbstractPenalty,
    ElasticNet as ElasticNet,
    GroupLasso as GroupLasso,
    L1 as L1,
    L2 as L2,
    Moreau as Moreau,
    Nuclear as Nuclear,
    Quadratic as Quadratic,
    Schatten as Schatten,
    Sobolev as Sobolev,
)
from .metrics import Accuracy as Accuracy, Metric as Metric, sharpness as sharpness
from .results import RESULTS as RESULTS
from .runs.path import Path as Path
from .runs.stats import Stats as Stats
from .runs.simulate import simulate as simulate
from .runs.descent import descent as descent
from .runs.times import log_spaced_steps as log_spaced_steps
from .runs.until import SmallGradient as SmallGradient, SteadyState as SteadyState
from .solvers import KKT4 as KKT4, KKT5 as KKT5, RKC2 as RKC2

from . import data as data
from . import metrics as metrics
from . import models as models
from . import tasks as tasks
from . import drifts as drifts
from . import manifold as manifold
from .sweeps.result import Sweep as Sweep
from .sweeps.options import Descent as Descent, Store as Store
from .sweeps.sweep import sweep as sweep
from .sweeps.open import as_sweep as as_sweep, open_results as open_results
from .theory.predicted_time import PredictedTime as PredictedTime
from .theory.second_order import SecondOrder as SecondOrder
from .theory.prediction import TwoPhase as TwoPhase
from .theory.two_phase import two_phase as two_phase
from .sweeps.landscape import Landscape as Landscape, landscape as landscape
from .theory.compare import compare as compare
from .theory.report import Rate as Rate, Report as Report
from .runs.crossing import (
    crossing_error as crossing_error,
    crossing_time as crossing_time,
)
from .theory.heuristics import (
    onset as onset,
    Onset as Onset,
    radial_law as radial_law,
    RadialLaw as RadialLaw,
    transition_time as transition_time,
    widths as widths,
    Widths as Widths,
)
from .theory.reduced_dynamics import (
    Cliff as Cliff,
    ReducedDynamics as ReducedDynamics,
    ReducedPath as ReducedPath,
)
from . import plot as plot
from .saving import load as load, save as save
