"""RKC2 on three stiff problems that every solver is measured on, in plain Diffrax and
against SciPy's Radau. None is a gradient flow."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

import gradflow as gf


def robertson(y):
    """Three reactions whose rates span nine decades (Robertson, 1966)."""
    a, b, c = y
    slow, fast, middle = 0.04 * a, 3e7 * b * b, 1e4 * b * c
    return jnp.stack([middle - slow, slow - middle - fast, fast])


def hires(y):
    """Eight reactions of a plant pigment under light (Schäfer, 1975)."""
    a, b, c, d, e, f, g, h = y
    on = 280 * f * h - 1.81 * g
    return jnp.stack(
        [
            -1.71 * a + 0.43 * b + 8.32 * c + 0.0007,
            1.71 * a - 8.75 * b,
            -10.03 * c + 0.43 * d + 0.035 * e,
            8.32 * b + 1.71 * c - 1.12 * d,
            -1.745 * e + 0.43 * f + 0.43 * g,
            -280 * f * h + 0.69 * d + 1.71 * e - 0.43 * f + 0.69 * g,
            on,
            -on,
        ]
    )


def van_der_pol(y):
    """The oscillator with ε = 1e-3: slow branches, and jumps between them."""
    x, v = y
    return jnp.stack([v, ((1 - x * x) * v - x) / 1e-3])


# Problem, start, the last time, and the scale below which a component does not count.
CLASSICS = {
    "Robertson": (robertson, [1.0, 0.0, 0.0], 40.0, 1e-5),
    "HIRES": (hires, [1.0, 0, 0, 0, 0, 0, 0, 0.0057], 321.8122, 1e-3),
    "van der Pol": (van_der_pol, [2.0, 0.0], 2.0, 1.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("rtol", [1e-3, 1e-5])
@pytest.mark.parametrize("name", CLASSICS)
def test_stiff_classic(name, rtol):
    field, start, end, scale = CLASSICS[name]
    ts = np.linspace(0.0, end, 9)[1:]
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: field(y)),
        gf.RKC2(),
        0.0,
        end,
        1e-6,
        jnp.array(start),
        saveat=diffrax.SaveAt(ts=jnp.asarray(ts)),
        stepsize_controller=diffrax.ClipStepSizeController(
            diffrax.PIDController(rtol=rtol, atol=1e-2 * rtol * scale),
            step_ts=jnp.asarray(ts),
        ),
        max_steps=20_000,
    )
    exact = solve_ivp(
        jax.jit(lambda t, y: field(y)),
        (0.0, end),
        start,
        method="Radau",
        t_eval=ts,
        rtol=1e-10,
        atol=1e-12 * scale,
    )
    assert exact.success
    off = np.abs(np.asarray(solution.ys) - exact.y.T)
    error = np.max(off / (scale + np.abs(exact.y.T)))
    assert error < 10 * rtol  # to a digit
