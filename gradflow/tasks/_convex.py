"""Convex programs whose solutions are the drift's end points, with certificates."""

import warnings
from typing import NamedTuple

import numpy as np


class Certified(NamedTuple):
    """The minimiser of a norm over all interpolants, and the proof that it is one.

    - `solution`: feasible to rounding.
    - `dual`: a feasible point of the dual program; its value bounds the minimum below.
    - `gap`: (norm of the solution − value of the dual) / norm: how far from the minimum
        the solution can be, at most. Rigorous whatever the solver did.
    """

    solution: np.ndarray
    dual: np.ndarray
    gap: float


def least_l1(features: np.ndarray, targets: np.ndarray) -> Certified:
    """min ‖β‖₁ subject to Xβ = y, by linear programming (HiGHS, dual simplex).

    The dual is max ⟨y, ν⟩ subject to ‖Xᵀν‖_∞ ≤ 1.

    **Arguments:**

    - `features`: X, of shape (n, d).
    - `targets`: y, of shape (n,).

    **Raises:** `RuntimeError` where there is no solution, or none certified to 1e-6.
    """
    from scipy.optimize import linprog

    x, y = np.asarray(features, np.float64), np.asarray(targets, np.float64)
    dim = x.shape[1]
    answer = linprog(
        np.ones(2 * dim),
        A_eq=np.hstack([x, -x]),
        b_eq=y,
        bounds=(0, None),
        method="highs-ds",
        options={
            "primal_feasibility_tolerance": 1e-10,
            "dual_feasibility_tolerance": 1e-10,
        },
    )
    if not answer.success:
        raise RuntimeError(f"least l1 norm: {answer.message}")
    beta = answer.x[:dim] - answer.x[dim:]
    # A simplex vertex has at most n nonzero entries, and they are known to HiGHS's
    # tolerance only: solving for them again makes the data fit to rounding.
    support = np.flatnonzero(np.abs(beta) > 1e-9 * np.abs(beta).max(initial=0))
    beta = np.zeros(dim)
    beta[support] = np.linalg.lstsq(x[:, support], y, rcond=None)[0]
    dual = answer.eqlin.marginals
    dual = dual / max(1.0, np.abs(x.T @ dual).max())
    return _certified(beta, dual, np.abs(beta).sum(), y @ dual)


def least_nuclear(
    indices: np.ndarray, values: np.ndarray, shape: tuple[int, int]
) -> Certified:
    """min ‖M‖_* subject to Mᵢⱼ = values on the indices, by semidefinite programming.

    The dual is max ⟨values, Λ⟩ over matrices Λ that vanish off the indices, with
    ‖Λ‖₂ ≤ 1.

    **Arguments:**

    - `indices`: of shape (N, 2), all different.
    - `values`: of shape (N,).
    - `shape`: of the matrix.

    **Raises:** `ImportError` without CVXPY; `RuntimeError` where its solver finds no
    solution, or none certified to 1e-6.
    """
    try:
        import cvxpy as cp
    except ImportError as error:
        raise ImportError(
            "The least nuclear norm needs CVXPY: pip install gradflow[experiments]"
        ) from error

    rows, columns = np.asarray(indices).T
    values = np.asarray(values, np.float64)
    matrix = cp.Variable(shape)
    data = [matrix[rows, columns] == values]
    program = cp.Problem(cp.Minimize(cp.normNuc(matrix)), data)
    tight = {f"tol_{what}": 1e-11 for what in ("gap_abs", "gap_rel", "feas")}
    with warnings.catch_warnings():
        # The solver warns where it falls short of these tolerances; the gap found below
        # says by how much, and does not rest on its word.
        warnings.simplefilter("ignore", UserWarning)
        program.solve(solver=cp.CLARABEL, **tight)
    if matrix.value is None:
        raise RuntimeError(f"least nuclear norm: {program.status}")
    solution = np.array(matrix.value)
    solution[rows, columns] = values
    dual = np.zeros(shape)
    # CVXPY's multiplier of an equality has the opposite sign of the dual used here.
    dual[rows, columns] = -np.asarray(data[0].dual_value)
    dual /= max(1.0, np.linalg.norm(dual, 2))
    return _certified(
        solution,
        dual,
        np.linalg.norm(solution, "nuc"),
        values @ dual[rows, columns],
    )


def _certified(solution, dual, norm, bound) -> Certified:
    gap = float((norm - bound) / max(norm, np.finfo(np.float64).tiny))
    if not gap <= 1e-6:
        raise RuntimeError(
            f"The solver's answer is not certified: its norm may exceed the minimum by "
            f"a fraction {gap:.1e}."
        )
    return Certified(solution, dual, gap)
