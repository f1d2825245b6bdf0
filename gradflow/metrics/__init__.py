"""What is watched along a path: functions of the model, each with what it costs."""

from .labelled import (
    AbstractOfLogits as AbstractOfLogits,
    Accuracy as Accuracy,
    Margin as Margin,
)
from .matrices import (
    EffectiveRank as EffectiveRank,
    Norm as Norm,
    SingularValues as SingularValues,
)
from .metric import Metric as Metric, without_thresholds as without_thresholds
from .curvature import Sharpness as Sharpness, sharpness as sharpness
