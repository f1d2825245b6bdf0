"""A student of infinitely many samples: a plateau, and then its units specialise.

Two units of erf learn from two others, whose inputs are Gaussian. The loss is known in
closed form, and so are equations for the overlaps Q = WWᵀ of the student's units and
R = WBᵀ with the teacher's (Saad and Solla, Phys. Rev. E 52, 4225, 1995), of which SciPy
solves a few numbers in place of a thousand.
"""

from pathlib import Path

import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
from scipy.integrate import solve_ivp

import gradflow as gf

gf.enable_float64()

INPUTS, UNITS = 500, 2


def force(c, i, n, j):
    """E φ'(uᵢ) uₙ φ(uⱼ) of Gaussians u with the covariances c, φ(u) = erf(u/√2)."""
    size = 1 + c[i, i]
    root = np.sqrt(size * (1 + c[j, j]) - c[i, j] ** 2)
    return 2 / np.pi * (c[n, j] * size - c[i, n] * c[i, j]) / size / root


def rate(t, state, b):
    """Q' and R', where b = BBᵀ: student units resist, those of the teacher pull."""
    q, r = state.reshape(2, UNITS, UNITS)
    c = np.block([[q, r], [r.T, b]])
    mine, all_ = range(UNITS), range(2 * UNITS)
    signs = [-1] * UNITS + [1] * UNITS
    total = lambda i, n: sum(signs[j] * force(c, i, n, j) for j in all_)
    along = np.array([[total(i, n) for n in all_] for i in mine])
    dq, dr = np.split(along, 2, axis=1)
    return np.concatenate([(dq + dq.T).ravel(), dr.ravel()])


def main(out=Path("results/gallery")):
    one, two = jr.split(jr.key(0))
    units = lambda key, size: size * jr.normal(key, (UNITS, INPUTS)) / INPUTS**0.5
    network = lambda w: gf.models.TwoLayer(w, None, jnp.ones(UNITS), "erf")
    teacher, student = network(units(one, 1.0)), network(units(two, 0.5))
    flow = gf.GradientFlow(
        gf.PopulationError(teacher),
        trainable=lambda leaf: leaf.ndim == 2,
    )
    path = gf.simulate(
        flow, student, weight_decay=0.0, ts=jnp.linspace(0, 300, 301), rtol=1e-8
    )

    w, b = np.asarray(path.models.inner), np.asarray(teacher.inner)
    overlaps = np.stack([w @ np.swapaxes(w, 1, 2), w @ b.T], 1).reshape(len(w), -1)
    exact = solve_ivp(
        rate, (0, path.t[-1]), overlaps[0], "LSODA", path.t, args=(b @ b.T,),
        rtol=1e-10, atol=1e-12,
    ).y.T  # fmt: skip
    np.testing.assert_allclose(overlaps, exact, atol=1e-6)
    assert path.train_loss[-1] < 1e-10

    fig, (one, two) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    one.semilogy(path.t, path.train_loss)
    one.set(xlabel="time t", ylabel="loss F")
    names = [f"student {i}, teacher {j}" for i in (1, 2) for j in (1, 2)]
    two.plot(path.t, overlaps[:, UNITS**2 :], label=names)
    two.plot(path.t, exact[:, UNITS**2 :], "k:")
    two.set(xlabel="time t", ylabel="overlap R", title="dotted: SciPy")
    two.legend()
    out.mkdir(parents=True, exist_ok=True)
    fig.savefig(out / "infinite_data.png")
    print(path, f"largest difference {np.abs(overlaps - exact).max():.1e}", sep="\n")


if __name__ == "__main__":
    main()
