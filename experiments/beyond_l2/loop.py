"""The paper's loop, as one writes it in NumPy, to time against."""

import time
from typing import NamedTuple

import numpy as np


class Loop(NamedTuple):
    a: np.ndarray
    errors: np.ndarray
    """Recovery errors: of every step up to 1000, then of every thousandth."""
    seconds: float


def subgradient_loop(
    x: np.ndarray,
    y: np.ndarray,
    target: np.ndarray,
    start: np.ndarray,
    *,
    alpha: float,
    beta: float,
    steps: int,
) -> Loop:
    """a ← a − α(Xᵀ(Xa − y) + β sign(a)), recorded as in the paper's code."""
    began = time.perf_counter()
    a, errors, size = start.copy(), [], np.linalg.norm(target)
    for step in range(steps):
        if step < 1000 or step % 1000 == 0:
            errors.append(np.linalg.norm(a - target) / size)
        a = a - alpha * (x.T @ (x @ a - y) + beta * np.sign(a))
    return Loop(a, np.array(errors), time.perf_counter() - began)
