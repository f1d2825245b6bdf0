"""Saxe's sigmoids: how deep linear networks learn the modes of their task.

A balanced network of L layers learns each singular value s of the input-output map by
itself: a' = L a^{2 − 2/L}(s − a) − Lλa (Saxe, McClelland, Ganguli, arXiv 1312.6120).
For L = 2 that is a sigmoid that ends at s − λ.
"""

from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy.integrate import solve_ivp
from scipy.stats import ortho_group

import gradflow as gf

gf.enable_float64()

MODES = np.array([3.0, 2.0, 1.0])
TS = np.linspace(0.0, 8.0, 81)


def mode(s, a, layers, lam):
    """a(t) of one mode, by SciPy."""

    def rate(t, a):
        return layers * (a ** (2 - 2 / layers) * (s - a) - lam * a)

    return solve_ivp(rate, (0, TS[-1]), [a], "LSODA", TS, rtol=1e-10, atol=1e-14).y[0]


def main(out=Path("results/gallery")):
    left, *_, right = turns = ortho_group.rvs(3, size=5, random_state=0)
    task = jnp.asarray(left @ np.diag(MODES) @ right)
    flow = gf.GradientFlow(gf.SquaredError(jnp.eye(3), task.T, reduction="sum"))
    fig, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
    for ax, layers in zip(axes, (2, 4), strict=True):
        # Each layer turns into the frame of the next one.
        frames = [right, *(q.T for q in turns[1:layers]), left.T]
        size = (1e-3 if layers == 2 else 0.05) ** (1 / layers)
        weights = [size * b.T @ a for a, b in zip(frames, frames[1:], strict=False)]
        model = gf.models.DeepLinear(tuple(map(jnp.asarray, weights)))
        for lam, style in ((0.0, "-"), (0.1, "--")):
            path = gf.simulate(flow, model, weight_decay=lam, ts=jnp.asarray(TS))
            found = np.einsum("ki,tkl,jl->tij", left, path.models.matrix, right)
            a = np.diagonal(found, axis1=1, axis2=2)
            exact = np.stack([mode(s, size**layers, layers, lam) for s in MODES], 1)
            np.testing.assert_allclose(a, exact, atol=1e-4)
            if layers == 2:
                s, t = MODES - lam, TS[:, None]
                sigmoid = s / (1 + (s / size**2 - 1) * np.exp(-2 * s * t))
                np.testing.assert_allclose(a, sigmoid, atol=1e-4)
            ax.plot(TS, a, "k" + style, label=[f"λ = {lam}", None, None])
        ax.set(xlabel="time t", title=f"{layers} layers", ylabel="strength of the mode")
        ax.legend()
    out.mkdir(parents=True, exist_ok=True)
    fig.savefig(out / "deep_linear.png")
    print(path)


if __name__ == "__main__":
    main()
