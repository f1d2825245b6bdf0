"""Answers from outside: convex programs by CVXPY, optimality conditions by hand, and
the plain loops of the papers in NumPy. None of it uses gradflow."""

import numpy as np


def basis_pursuit(features, targets):
    """argmin ‖a‖₁ over Xa = y, by CVXPY's interior point method."""
    import cvxpy as cp

    a = cp.Variable(features.shape[1])
    program = cp.Problem(cp.Minimize(cp.norm1(a)), [features @ a == targets])
    program.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12)
    return np.asarray(a.value)


def lasso_violation(features, targets, weight, a):
    """How far a is from argmin ½‖Xa − y‖² + w‖a‖₁, as a fraction of w: there
    Xᵀ(y − Xa) is w sign(a) where a ≠ 0, and within ±w elsewhere."""
    pull = features.T @ (targets - features @ a)
    on = np.abs(pull - weight * np.sign(a))[a != 0].max(initial=0)
    off = np.maximum(np.abs(pull) - weight, 0)[a == 0].max(initial=0)
    return max(on, off) / weight


def lasso(features, targets, weight):
    """argmin ½‖Xa − y‖² + w‖a‖₁: the support and signs by CVXPY, then exactly."""
    import cvxpy as cp

    a = cp.Variable(features.shape[1])
    fit = 0.5 * cp.sum_squares(features @ a - targets)
    tight = dict(tol_gap_abs=1e-14, tol_gap_rel=1e-14, tol_feas=1e-14)
    cp.Problem(cp.Minimize(fit + weight * cp.norm1(a))).solve(cp.CLARABEL, **tight)
    rough = np.asarray(a.value)
    on = np.abs(rough) > 1e-5 * np.abs(rough).max()
    x = features[:, on]
    out = np.zeros_like(rough)
    out[on] = np.linalg.solve(x.T @ x, x.T @ targets - weight * np.sign(rough[on]))
    assert lasso_violation(features, targets, weight, out) < 1e-6
    return out


def subgradient_loop(x, y, start, rate, weight, steps):
    """a ← a − α(Xᵀ(Xa − y) + β sign(a)), as Notsawo et al. (arXiv 2506.05718) write
    it."""
    a = start.copy()
    for _ in range(steps):
        a = a - rate * (x.T @ (x @ a - y) + weight * np.sign(a))
    return a


def ista_loop(x, y, start, rate, weight, steps):
    """a ← S_{αβ}(a − αXᵀ(Xa − y)), S the soft threshold."""
    a = start.copy()
    for _ in range(steps):
        a = a - rate * (x.T @ (x @ a - y))
        a = np.sign(a) * np.maximum(np.abs(a) - rate * weight, 0)
    return a


def projected_loop(x, y, start, rate, weight, steps):
    """a ← a − αβ sign(a), then the nearest solution of Xa = y."""
    inverse = np.linalg.pinv(x)
    a = start.copy()
    for _ in range(steps):
        a = a - rate * weight * np.sign(a)
        a = a - inverse @ (x @ a - y)
    return a
