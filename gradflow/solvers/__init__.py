"""Stiff Diffrax solvers for training flows, and the choice between solvers."""

from .base import (
    AbstractFlowSolver as AbstractFlowSolver,
    as_flow_solver as as_flow_solver,
    Explicit as Explicit,
    Plain as Plain,
)
from .active_set import ActiveSet as ActiveSet, Signed as Signed
from .controllers import Landing as Landing
from .choose import (
    as_choice as as_choice,
    Choice as Choice,
    choose_solver as choose_solver,
    cpu_advice as cpu_advice,
    measure_size as measure_size,
    second_choice as second_choice,
    Size as Size,
    TRIAL_STEPS as TRIAL_STEPS,
)
from .kkt import AbstractKKT as AbstractKKT, KKT4 as KKT4, KKT5 as KKT5
from .curvature import hessian_norm as hessian_norm
from .jumps import curvature_jumps as curvature_jumps
from .finite_steps import FiniteSteps as FiniteSteps
from .rkc import RKC2 as RKC2
