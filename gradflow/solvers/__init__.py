"""Stiff Diffrax solvers for training flows, and the choice between solvers."""

from .choose import choose_solver as choose_solver, sharpness as sharpness
from .kkt import AbstractKKT as AbstractKKT, KKT3 as KKT3, KKT5 as KKT5
