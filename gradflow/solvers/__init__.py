"""Stiff Diffrax solvers for training flows, and the choice between solvers."""

from .active_set import ActiveSet as ActiveSet, Landing as Landing, Signed as Signed
from .choose import (
    as_choice as as_choice,
    Choice as Choice,
    choose_solver as choose_solver,
    measure_size as measure_size,
    second_choice as second_choice,
    sharpness as sharpness,
    Size as Size,
    TRIAL_STEPS as TRIAL_STEPS,
)
from .kkt import (
    AbstractKKT as AbstractKKT,
    curvature_jumps as curvature_jumps,
    KKT4 as KKT4,
    KKT5 as KKT5,
)
from .rkc import RKC2 as RKC2
