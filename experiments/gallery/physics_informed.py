"""A physics-informed network (PINN), trained in continuous time.

u'' = −π² sin πx on (0, 1), u(0) = u(1) = 0: the loss is what is left of the equation at
some points, and of the ends. (Raissi, Perdikaris, Karniadakis, J. Comput. Phys. 378,
2019.) The solution is sin πx.
"""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np

import gradflow as gf

gf.enable_float64()

INSIDE, ENDS = jnp.linspace(0.0, 1.0, 21)[1:-1], jnp.array([0.0, 1.0])
GRID = jnp.linspace(0.0, 1.0, 201)


def left(model, _):
    """What is left of the equation, and of the ends."""
    value = lambda x: model(x[None])[0]
    curvature = jax.vmap(jax.grad(jax.grad(value)))(INSIDE)
    inside = curvature / jnp.pi**2 + jnp.sin(jnp.pi * INSIDE)
    return jnp.concatenate([inside, 3 * jax.vmap(value)(ENDS)])


def main(out=Path("results/gallery")):
    model = eqx.nn.MLP(1, 1, 20, 2, activation=jnp.tanh, key=jr.key(0))
    loss = gf.SquaredError(None, jnp.zeros(len(INSIDE) + 2), predict=left)
    error = lambda m: jnp.max(
        jnp.abs(jax.vmap(m)(GRID[:, None])[:, 0] - jnp.sin(jnp.pi * GRID))
    )
    path = gf.simulate(
        gf.GradientFlow(loss), model, weight_decay=0.0, t1=1e7, metrics={"error": error}
    )
    assert path.metrics["error"][-1] < 1e-3, path.metrics["error"][-1]

    fig, (one, two) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    one.loglog(path.t, path.train_loss, label="loss")
    one.loglog(path.t, path.metrics["error"], label="largest error of u")
    one.set(xlabel="time t")
    one.legend()
    for i in np.searchsorted(path.t, [0.0, 1.0, 100.0, 1e7]):
        two.plot(GRID, jax.vmap(path[i])(GRID[:, None]), label=f"t = {path.t[i]:.2g}")
    two.plot(GRID, jnp.sin(jnp.pi * GRID), "k:", label="sin πx")
    two.set(xlabel="x", ylabel="u")
    two.legend()
    out.mkdir(parents=True, exist_ok=True)
    fig.savefig(out / "physics_informed.png")
    print(path)


if __name__ == "__main__":
    main()
