"""A recurrent network of one's own, with three weight decays, and SciPy beside it.

A gated recurrent unit (Cho et al., arXiv 1406.1078) reads six bits: do the first and
the last differ? Nothing is seen for long, then all is learned; under much decay never.
"""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
from jax.flatten_util import ravel_pytree
from scipy.integrate import solve_ivp

import gradflow as gf

gf.enable_float64()

LENGTH, TRAINED, STATE = 6, 48, 6
LAMBDAS = [3e-3, 1e-3, 1e-4]


class Reader(eqx.Module):
    cell: eqx.nn.GRUCell
    readout: eqx.nn.Linear

    def __init__(self, key):
        one, two = jr.split(key)
        self.cell = eqx.nn.GRUCell(1, STATE, key=one)
        self.readout = eqx.nn.Linear(STATE, "scalar", key=two)

    def __call__(self, sequence):
        read = lambda state, x: (self.cell(x[None], state), None)
        state, _ = jax.lax.scan(read, jnp.zeros(STATE), sequence)
        return self.readout(state)


def by_scipy(loss, model, lam, ts):
    """F at these times."""
    theta, unravel = ravel_pytree(eqx.filter(model, eqx.is_array))
    value = lambda theta: loss(eqx.combine(unravel(theta), model))
    total = lambda theta: value(theta) + lam / 2 * theta @ theta
    grad, hessian = jax.jit(jax.grad(total)), jax.jit(jax.hessian(total))
    run = solve_ivp(
        lambda t, theta: -grad(theta), (0, ts[-1]), theta, "LSODA", ts, rtol=1e-9,
        atol=1e-11, jac=lambda t, theta: -hessian(theta),
    )  # fmt: skip
    return jax.vmap(value)(run.y.T)


def main(out=Path("results/gallery")):
    every = 2.0 * np.array(list(np.ndindex(*[2] * LENGTH))) - 1
    x = jr.permutation(jr.key(0), every)
    differ = jnp.where(x[:, 0] != x[:, -1], 1, -1)
    loss = gf.SoftMargin(x[:TRAINED], differ[:TRAINED])
    right = lambda m: jnp.mean(differ[TRAINED:] * jax.vmap(m)(x[TRAINED:]) > 0)
    model = Reader(jr.key(0))
    run = dict(weight_decay=LAMBDAS, slow_time=5.0, metrics={"test": right})
    sweep = gf.sweep(gf.GradientFlow(loss), model, **run)
    fig, (one, two) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for path in sweep:
        lam = float(path.weight_decay)
        other = by_scipy(loss, model, lam, np.asarray(path.t))
        np.testing.assert_allclose(path.train_loss, other, rtol=1e-4)
        (line,) = one.loglog(path.t[1:], path.train_loss[1:], label=f"λ = {lam:g}")
        one.loglog(path.t[1:], other[1:], "k:")
        two.semilogx(path.t[1:], path.metrics["test"][1:], color=line.get_color())
    one.set(xlabel="time t", ylabel="training loss", title="dotted: SciPy")
    two.set(xlabel="time t", ylabel="test accuracy")
    one.legend()
    out.mkdir(parents=True, exist_ok=True)
    fig.savefig(out / "gru.png")
    print(sweep)


if __name__ == "__main__":
    main()
