"""From a start of 1e-60 a diagonal network learns one coefficient after another.

With β = u ⊙ v, u = v, and whitened inputs each coefficient goes its own way,
β' = 2β(β* − β), from saddle to saddle; it jumps at t = ln(β*/β₀ − 1)/(2β*).
"""

from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import gradflow as gf

gf.enable_float64()

TRUE = jnp.array([3.0, 2.0, 1.0, 0.5])
SMALL = 1e-60


def main(out=Path("results/gallery")):
    model = gf.models.DiagonalNetwork(*[jnp.full(4, SMALL**0.5)] * 2)
    flow = gf.GradientFlow(gf.SquaredError(jnp.eye(4), TRUE, reduction="sum"))
    jumps = np.log(TRUE / SMALL - 1) / (2 * TRUE)
    path = gf.simulate(
        flow, model, weight_decay=0.0, ts=jnp.linspace(0, 1.2 * jumps[-1], 500),
        atol=1e-70,  # what is yet to grow counts too
    )  # fmt: skip

    beta, t = path.models.u * path.models.v, np.asarray(path.t)[:, None]
    exact = TRUE / (1 + (TRUE / SMALL - 1) * np.exp(-2 * TRUE * t))
    np.testing.assert_allclose(beta, exact, rtol=1e-3)

    fig, ax = plt.subplots(layout="constrained")
    ax.plot(path.t, beta, label=[f"β* = {b}" for b in TRUE])
    ax.vlines(jumps, 0, TRUE / 2, "grey", "dotted", label="predicted jumps")
    ax.set(xlabel="time t", ylabel="coefficients β", title=f"from β₀ = {SMALL:.0e}")
    ax.legend()
    out.mkdir(parents=True, exist_ok=True)
    fig.savefig(out / "saddle_to_saddle.png")
    print(path, f"worst error {np.abs(beta / exact - 1).max():.1e}", sep="\n")


if __name__ == "__main__":
    main()
