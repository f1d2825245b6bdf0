"""Noise on the labels alone drifts to the sparse interpolant.

Descent with label noise moves along the manifold of interpolants towards less tr ∇²F
(Blanc, Gupta, Valiant, Valiant, arXiv 1904.09080; Damian, Ma, Lee, arXiv 2106.06530).
Of β = u ⊙ u − v ⊙ v with inputs ±1 that is 4(‖u‖² + ‖v‖²), least where ‖β‖₁ is.
"""

from pathlib import Path

import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import linprog

import gradflow as gf

gf.enable_float64()

SAMPLES, DIM = 12, 24


def main(out=Path("results/gallery")):
    x = jr.rademacher(jr.key(0), (SAMPLES, DIM), float)
    y = x @ jnp.zeros(DIM).at[:2].set(jnp.array([1.0, -1.0]))
    least = linprog(np.ones(2 * DIM), A_eq=np.concatenate([x, -x], 1), b_eq=y).fun
    flow = gf.GradientFlow(gf.SquaredError(x, y))
    model = gf.models.DifferenceNetwork(*[jnp.full(DIM, 0.5)] * 2)
    size = lambda model: jnp.sum(jnp.abs(model.beta)) / least

    fig, ax = plt.subplots(layout="constrained")
    ends = {}
    for noise in (None, 0.5):
        path = gf.descent(
            flow, model, weight_decay=0.0, learning_rate=0.02, steps=1_000_000,
            label_noise=noise, key=None if noise is None else jr.key(1),
            metrics={"ℓ1": size},
        )  # fmt: skip
        ends[noise] = float(path.metrics["ℓ1"][-1])
        steps = np.maximum(path.t / 0.02, 1)
        words = "no noise" if noise is None else f"label noise {noise}"
        ax.semilogx(steps, path.metrics["ℓ1"], label=words)
    assert ends[None] > 1.3 and ends[0.5] < 1.1, ends

    ax.set(xlabel="steps", ylabel="‖β‖₁ / the least of interpolants")
    ax.legend()
    out.mkdir(parents=True, exist_ok=True)
    fig.savefig(out / "label_noise.png")
    print(path, ends, sep="\n")


if __name__ == "__main__":
    main()
