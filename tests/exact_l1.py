"""Exact paths of ℓ1 flows on ½‖Xa − y‖², event after event, in NumPy and SciPy."""

import numpy as np
from scipy.optimize import brentq, lsq_linear


def l1_flow(x, y, a, weight_decay, t_end, *, ts):
    """a(ts) of a' ∈ −Xᵀ(Xa − y) − λ∂‖a‖₁: between events a linear equation for the
    coordinates that are not zero, solved by its eigenvectors. λ may be one for each."""
    a, t, out, k = np.array(a, float), 0.0, [], 0
    sign, lam = np.sign(a), np.broadcast_to(weight_decay, np.shape(a))
    while k < len(ts):
        force = x.T @ (x @ a - y)
        leaves = (sign == 0) & (np.abs(force) > lam * (1 + 5e-10))
        sign = np.where(leaves, -np.sign(force), sign)
        on = np.flatnonzero(sign)
        values, vectors = np.linalg.eigh(x[:, on].T @ x[:, on])
        right = vectors.T @ (x[:, on].T @ y - lam[on] * sign[on])
        start = vectors.T @ a[on]

        def at(dt, values=values, vectors=vectors, right=right, start=start, on=on):
            kept = np.exp(-values * dt)
            moved = -np.expm1(-values * dt) / np.where(values > 1e-12, values, 1.0)
            coefficients = np.where(values > 1e-12, moved, dt) * right + kept * start
            whole = np.zeros(x.shape[1])
            whole[on] = vectors @ coefficients
            return whole

        def alarm(dt, at=at, sign=sign, on=on):
            """Below zero once a coordinate has crossed, or a held one is let go."""
            whole = at(dt)
            low = np.min(sign[on] * whole[on], initial=np.inf)
            force = (np.abs(x.T @ (x @ whole - y)) / lam)[sign == 0]
            high = np.max(force - 1 - 1e-9, initial=-np.inf)
            return min(low + 1e-12, -high)

        steps = np.concatenate([[0], np.geomspace(1e-9, t_end, 4000)])
        fired = next((i for i, s in enumerate(steps) if i > 1 and alarm(s) < 0), None)
        dt = t_end if fired is None else brentq(alarm, steps[fired - 1], steps[fired])
        while k < len(ts) and ts[k] <= t + dt:
            out.append(at(ts[k] - t))
            k += 1
        a, t = at(dt), t + dt
        arrived = (sign != 0) & (np.abs(a) < 1e-11) & (at(dt * (1 + 1e-6)) * sign < 0)
        a[arrived], sign[arrived] = 0.0, 0.0
    return np.array(out)


def l1_drift(x, a, s_end):
    """Times and corners of a' = −(least-norm element of P∂‖a‖₁) on {Xa = y}: linear
    between the events, with the subgradient of those at zero by bounded least
    squares."""
    projection = np.eye(x.shape[1]) - np.linalg.pinv(x) @ x
    a, s = np.array(a, float), 0.0
    held = np.abs(a) < 1e-13
    times, corners = [s], [a.copy()]
    while s < s_end:
        g = np.where(held, 0.0, np.sign(a))
        if held.any():
            box = lsq_linear(
                projection[:, held], -projection @ g, (-1, 1), "bvls", tol=1e-14
            )
            g[held] = box.x
        velocity = -projection @ g
        velocity[held & (np.abs(g) < 1 - 1e-9)] = 0.0
        velocity[np.abs(velocity) < 1e-11] = 0.0
        if not velocity.any():
            break
        falling = (velocity * a < 0) & ~held
        wait = np.where(falling, -a / np.where(velocity == 0, 1.0, velocity), np.inf)
        step = min(wait.min(), s_end - s)
        a, s = a + step * velocity, s + step
        held = (held & (velocity == 0)) | (falling & (wait <= step * (1 + 1e-9)))
        a[held] = 0.0
        times.append(s)
        corners.append(a.copy())
    if s < s_end:
        times.append(s_end)
        corners.append(a)
    return np.array(times), np.array(corners)
