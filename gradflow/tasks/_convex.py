"""Convex programs whose solutions are the drift's end points, with certificates."""

import warnings
from typing import NamedTuple

import numpy as np
from scipy import sparse


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


def places(flat: np.ndarray, shape: tuple[int, int]) -> sparse.csr_array:
    """The operator that takes the entries at the places `flat` = n i + j of a matrix of
    that shape (m, n), of shape (N, mn)."""
    count = len(flat)
    ones = np.ones(count)
    return sparse.csr_array((ones, (np.arange(count), flat)), (count, np.prod(shape)))


def least_nuclear(
    operator: np.ndarray | sparse.csr_array, values: np.ndarray, shape: tuple[int, int]
) -> Certified:
    """min ‖M‖⁎ subject to 𝒳 vec(M) = values, by semidefinite programming.

    The dual is max ⟨values, ν⟩ subject to ‖mat(𝒳ᵀν)‖₂ ≤ 1.

    **Arguments:**

    - `operator`: 𝒳, of shape (N, mn), of full row rank, dense or sparse. Matrices are
        read row by row.
    - `values`: of shape (N,).
    - `shape`: (m, n).

    **Raises:** `ImportError` without CVXPY; `RuntimeError` where its solver finds no
    solution, or none certified to 1e-6.
    """
    try:
        import cvxpy as cp
    except ImportError as error:
        raise ImportError(
            "The least nuclear norm needs CVXPY: pip install cvxpy."
        ) from error

    values = np.asarray(values, np.float64)
    matrix = cp.Variable(shape)
    data = cp.Zero(operator @ cp.vec(matrix, order="C") - values)
    program = cp.Problem(cp.Minimize(cp.normNuc(matrix)), [data])
    tight = {f"tol_{what}": 1e-11 for what in ("gap_abs", "gap_rel", "feas")}
    with warnings.catch_warnings():
        # The solver warns where it falls short of these tolerances; the gap found below
        # says by how much, and does not rest on its word.
        warnings.simplefilter("ignore", UserWarning)
        program.solve(solver=cp.CLARABEL, **tight)
    if matrix.value is None:
        raise RuntimeError(f"least nuclear norm: {program.status}")
    solution = np.array(matrix.value).reshape(-1)
    gram = operator @ operator.T
    gram = gram if isinstance(gram, np.ndarray) else gram.toarray()
    away = np.linalg.solve(gram, operator @ solution - values)
    solution = (solution - operator.T @ away).reshape(shape)
    # CVXPY's multiplier of an equality has the opposite sign of the dual used here.
    multiplier = -np.asarray(data.dual_value)
    size = np.linalg.norm((operator.T @ multiplier).reshape(shape), 2)
    multiplier = multiplier / max(1.0, size)
    dual = (operator.T @ multiplier).reshape(shape)
    norm = np.linalg.norm(solution, "nuc")
    return _certified(solution, dual, norm, values @ multiplier)


def lasso(features: np.ndarray, targets: np.ndarray, weight: float) -> np.ndarray:
    """argmin ½‖Xβ − y‖² + w‖β‖₁, exactly: the path of solutions in w, which is
    piecewise linear (Osborne, Presnell, Turlach, IMA J. Numer. Anal. 20, 2000), is
    followed from the w at which β = 0 is one.

    **Arguments:**

    - `features`, `targets`: X and y, of shapes (n, d) and (n,).
    - `weight`: w > 0.

    **Raises:** `RuntimeError` where the optimality conditions are not met to 1e-6 w, as
    it may be where solutions are not unique.
    """
    x, y = np.asarray(features, np.float64), np.asarray(targets, np.float64)
    beta, pull = np.zeros(x.shape[1]), x.T @ y
    level = np.abs(pull).max(initial=0)
    # Rounding in w, which starts at `level`: what has just left is not to come back.
    tiny = 1e-13 * level
    active = [int(np.abs(pull).argmax())] if level > weight else []
    for _ in range(20 * x.shape[1] + 20):
        if not active:
            break
        xa = x[:, active]
        sign = np.sign(np.where(beta[active] != 0, beta[active], pull[active]))
        # As w falls by one, β moves by `step` and all correlations by −`loss`.
        step = np.linalg.solve(xa.T @ xa, sign)
        loss = x.T @ (xa @ step)
        off = np.setdiff1d(np.arange(x.shape[1]), active)
        with np.errstate(divide="ignore", invalid="ignore"):
            joins = np.stack(
                [
                    (level - pull[off]) / (1 - loss[off]),
                    (level + pull[off]) / (1 + loss[off]),
                ]
            )
            leaves = -beta[active] / step
        joins = np.where(joins > tiny, joins, np.inf).min(axis=0, initial=np.inf)
        leaves = np.where(leaves > tiny, leaves, np.inf)
        until = [level - weight, joins.min(initial=np.inf), leaves.min()]
        event, by = int(np.argmin(until)), float(np.min(until))
        beta[active] += by * step
        pull, level = pull - by * loss, level - by
        if event == 0:
            break
        if event == 1:
            active.append(int(off[joins.argmin()]))
        else:
            beta[active.pop(int(leaves.argmin()))] = 0.0
    pull = x.T @ (y - x @ beta)
    zero = beta == 0
    wrong = np.abs(pull - weight * np.sign(beta))[~zero].max(initial=0)
    wrong = max(wrong, np.abs(pull[zero]).max(initial=0) - weight)
    if wrong > 1e-6 * weight:
        raise RuntimeError(f"lasso: the optimality conditions fail by {wrong:.1e}.")
    return beta


def _certified(solution, dual, norm, bound) -> Certified:
    gap = float((norm - bound) / max(norm, np.finfo(np.float64).tiny))
    if not gap <= 1e-6:
        raise RuntimeError(
            f"The solver's answer is not certified: its norm may exceed the minimum by "
            f"a fraction {gap:.1e}."
        )
    return Certified(solution, dual, gap)
