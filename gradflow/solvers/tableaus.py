"""What the KKT methods need of their Butcher tableaus."""

import dataclasses

import diffrax
import numpy as np


def tableau_matrix(tableau: diffrax.ButcherTableau) -> tuple[np.ndarray, float]:
    """The strictly lower part of A, and γ."""
    n = len(tableau.b_sol)
    a = np.zeros((n, n))
    for i, row in enumerate(tableau.a_lower):
        a[i + 1, : i + 1] = row
    return a, float(np.asarray(tableau.a_diagonal)[-1])


def predictor(tableau: diffrax.ButcherTableau) -> np.ndarray:
    """Weights that extrapolate a stage, its slope and its multiplier, from those before
    it, by the parabola of least squares."""
    n = len(tableau.b_sol)
    times = np.concatenate([[0.0], np.asarray(tableau.c)])
    p = np.zeros((n, n))
    for i in range(1, n):
        degree = min(i - 1, 2)
        powers = np.arange(degree + 1)
        p[i, :i] = times[i] ** powers @ np.linalg.pinv(times[:i, None] ** powers)
    return p


def end_slope(tableau: diffrax.ButcherTableau) -> np.ndarray:
    """Weights that give the slope at the end of a step, of length one, of the cubic of
    least squares through the stages."""
    times = np.concatenate([[0.0], np.asarray(tableau.c)])
    powers = np.arange(4)
    return powers @ np.linalg.pinv(times[:, None] ** powers)


def jump_rules(tableau: diffrax.ButcherTableau) -> np.ndarray:
    """Three combinations of the slopes of a step that vanish for polynomials of degrees
    1, 2 and 3: at a jump of the slope they are of one size, and fall by h from one to
    the next where it is smooth."""
    times = np.concatenate([[0.0], np.asarray(tableau.c)])
    return np.linalg.qr(np.vander(times, len(times), increasing=True))[0].T[2:5]


def kencarp5() -> diffrax.ButcherTableau:
    """The implicit part of KenCarp5, with an error estimate that sees plain decay.

    On y' = −y the embedded formula is of order 5 as well (its z⁵ coefficient is 2e-8):
    the estimate is O(z⁶) and 9 times smaller than the error, so that what decays as
    e^{−s} in the drift was wrong by 30 tolerances. Added is the combination e of least
    norm that keeps order 4, e·1 = e·c = e·c² = e·c³ = e·Ac² = 0 (the stage order is 2),
    with e·A⁴1 = 3e-5: then the estimate bounds the error for z up to about 0.6.
    """
    tableau = diffrax.KenCarp5.tableau.tableaus[1]  # the pair is (explicit, implicit)
    a, gamma = tableau_matrix(tableau)
    a[1:, 1:] += gamma * np.eye(len(a) - 1)
    one = np.ones(len(a))
    c = a @ one
    conditions = [one, c, c**2, c**3, a @ c**2, np.linalg.matrix_power(a, 4) @ one]
    added = np.linalg.pinv(np.stack(conditions)) @ [0, 0, 0, 0, 0, 3e-5]
    return dataclasses.replace(tableau, b_error=tableau.b_error + added)
