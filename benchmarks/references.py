"""Tight solutions to measure errors against, each confirmed by another method."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import methods
import numpy as np
from problems import Problem

from gradflow.solvers import KKT4, KKT5

FOLDER = Path(__file__).parent / ".references"
TRUSTED = 1e-5  # disagreement above which a reference is not used
SMALL = 2000  # parameters up to which a dense method confirms it


class Reference(NamedTuple):
    """θ at the saved times, and how far another method is from it: the largest relative
    difference over these times."""

    theta: np.ndarray
    gap: float
    confirmed_by: str

    @property
    def trusted(self) -> bool:
        return self.gap <= TRUSTED

    def error(self, theta: np.ndarray) -> float:
        """max over the times of ‖θ − θ*‖/‖θ*‖."""
        return relative(theta, self.theta)


def relative(theta: np.ndarray, exact: np.ndarray) -> float:
    difference = np.linalg.norm(theta - exact, axis=1)
    return float(np.max(difference / np.linalg.norm(exact, axis=1)))


def reference(problem: Problem, lam: float, ts: np.ndarray) -> Reference:
    """From disk, or by gradflow's KKT5 and a confirmation. Both take minutes for the
    large network, and are kept for the next run with the same settings.

    **Raises:** `RuntimeError` where the tight solve does not end.
    """
    rtol = 1e-10 if problem.d <= SMALL else 1e-8
    confirm = _confirmation(problem, lam)
    settings = {
        "problem": problem.name,
        "weight_decay": lam,
        "times": [len(ts), ts[0], ts[-1]],
        "rtol": rtol,
        "confirmed_by": confirm[0],
        "data": _fingerprint(problem),
    }
    words = json.dumps(settings, sort_keys=True)
    key = hashlib.sha256(words.encode()).hexdigest()[:12]
    file = FOLDER / f"{problem.name}_{lam:.0e}_{key}.npz"
    if file.exists():
        with np.load(file) as data:
            return Reference(data["theta"], float(data["gap"]), confirm[0])
    tight = methods.Gradflow(problem, KKT5()).solve(lam, ts, rtol, np.inf)
    if tight.theta is None:
        raise RuntimeError(f"reference, {problem.name}, λ = {lam:g}: {tight.status}")
    label, solver, other_rtol = confirm
    other = solver.solve(lam, ts, other_rtol, 600.0)
    gap = np.inf if other.theta is None else relative(other.theta, tight.theta)
    FOLDER.mkdir(exist_ok=True)
    np.savez(file, theta=tight.theta, gap=gap, settings=words)
    return Reference(tight.theta, gap, label)


def _confirmation(problem: Problem, lam: float) -> tuple[str, methods.Solver, float]:
    """A method that has nothing in common with KKT5 where that is affordable."""
    if problem.d <= SMALL:
        solver = methods.SciPy(problem, "LSODA", methods.gauss_newton)
        return "SciPy LSODA, JᵀJ, rtol 1e-9", solver, 1e-9
    if lam >= 1e-2:
        solver = methods.Diffrax(problem, methods.diffrax.Tsit5())
        return "Diffrax Tsit5, rtol 1e-7", solver, 1e-7
    # Not independent of how KKT5 solves its stages, but of its steps and its tableau.
    return "gradflow KKT4, rtol 1e-6", methods.Gradflow(problem, KKT4()), 1e-6


def _fingerprint(problem: Problem) -> list[str]:
    """Changes whenever the loss or the initial parameters do."""
    value, gradient = jax.value_and_grad(problem.loss)(problem.theta)
    norms = map(jnp.linalg.norm, (problem.theta, gradient))
    return [f"{float(x):.9e}" for x in (value, *norms)]
