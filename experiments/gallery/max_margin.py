"""A wide network of two layers finds the largest margin that there is, by t = 1e300.

f(x) = Σⱼ ±max(0, ⟨wⱼ, x⟩)² is homogeneous of degree two, and the exponential loss has
no minimiser. Of a wide network θ/‖θ‖ tends to the largest margin of all ways to share
a mass of one among neurons (Chizat and Bach, arXiv 2002.04486): a linear program.
What is missing falls as 1/ln t: one per cent at t = 1e16.
"""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import linprog

import gradflow as gf

gf.enable_float64()

SAMPLES, WIDTH = 16, 100
GRID = np.linspace(-np.pi, np.pi, 4001)[:-1]
CIRCLE = np.stack([np.cos(GRID), np.sin(GRID)], axis=1)


class Network(eqx.Module):
    weights: jax.Array  # half of the neurons add, half subtract

    def __call__(self, x):
        add, subtract = jnp.split(jax.nn.relu(self.weights @ x) ** 2, 2)
        return jnp.sum(add) - jnp.sum(subtract)


def largest(x, y):
    """The largest margin, and on the grid the f that has it, by SciPy."""
    add = lambda x: np.maximum(0, x @ CIRCLE.T) ** 2
    both = lambda x: np.concatenate([add(x), -add(x)], axis=1)
    # The shares, and the margin last, which is to be large: y f(x) is above it.
    above = np.c_[-y[:, None] * both(x), np.ones(SAMPLES)]
    ones, last = np.r_[np.ones(2 * len(GRID)), 0], np.r_[np.zeros(2 * len(GRID)), 1]
    found = linprog(-last, above, np.zeros(SAMPLES), ones[None], [1.0])
    return found.x[-1], both(CIRCLE) @ found.x[:-1]


def main(out=Path("results/gallery")):
    angle = jnp.linspace(-jnp.pi, jnp.pi, SAMPLES, endpoint=False)
    angle += 0.05 * jr.normal(jr.key(0), (SAMPLES,))
    x, y = jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1), jnp.sign(jnp.cos(2 * angle))
    mass = lambda model: jnp.sum(model.weights**2)
    path = gf.simulate(
        gf.GradientFlow(gf.Exponential(x, y)),
        Network(jr.normal(jr.key(1), (WIDTH, 2)) / WIDTH**0.5),
        weight_decay=0.0, t1=1e300, saves=200,
        metrics={"margin": lambda m: jnp.min(y * jax.vmap(m)(x)) / mass(m)},
    )  # fmt: skip
    best, f = largest(np.asarray(x), np.asarray(y))
    share = np.asarray(path.metrics["margin"]) / best
    np.testing.assert_allclose(np.interp(1e16, path.t, share), 1, atol=0.02)
    np.testing.assert_allclose(share[-1], 1, atol=1e-3)
    found = jax.vmap(path[-1])(CIRCLE) / mass(path[-1])
    np.testing.assert_allclose(found, f, atol=2e-3)

    fig, (one, two) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    one.plot(np.log10(path.t[1:]), share[1:])
    one.axhline(1, color="k", linestyle="dotted")
    one.set(xlabel="log₁₀ t", ylabel="margin / the largest", ylim=(0.9, 1.01))
    two.plot(GRID, found, label="the network")
    two.plot(GRID, f, "k:", label="linear program")
    two.plot(angle, y * best, "o", label="data: ± the largest margin")
    two.set(xlabel="angle of x", ylabel="f(x) / ‖θ‖²", ylim=(-0.35, 0.6))
    two.legend()
    out.mkdir(parents=True, exist_ok=True)
    fig.savefig(out / "max_margin.png")
    print(path, f"{share[-1]:.5f} of the largest margin", sep="\n")


if __name__ == "__main__":
    main()
