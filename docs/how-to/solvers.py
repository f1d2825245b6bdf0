# %% [markdown]
# # Choose a solver
#
# You need not: `gradflow.simulate` takes the one that it expects to be cheapest, and
# `path.stats.why` tells why. This page is about what it chooses from.
#
# | | use it for | cost of a run |
# | --- | --- | --- |
# | `KKT4` | the default for a composite loss, small λ, rtol down to 1e-6 | some 50–200 steps whatever λ is; each some iterations and, now and then, a factorisation of an m × m matrix (d × d where that is smaller) |
# | `KKT5` | more than six digits | the same |
# | `RKC2` | gradients that are cheap against the m × m matrix; many outputs; scalar losses | gradients grow as λ^(−1/2) |
# | Diffrax's `Tsit5` | short times, large λ | gradients grow as 1/λ |
#
# A loss is *composite* where its outputs are known: `SquaredError`, `CrossEntropy` and
# the others, or your own subclass of `AbstractCompositeLoss`. `gf.Loss(fn)` of a scalar
# function is not.

# %%
import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt

import gradflow as gf

gf.enable_float64()

x = jr.normal(jr.key(0), (12, 3))
loss = gf.SquaredError(x, jnp.tanh(x @ jnp.array([1.0, -2.0, 0.5])))
model = eqx.nn.MLP(3, "scalar", 30, 1, jnp.tanh, key=jr.key(1))
flow = gf.GradientFlow(loss)

decays = jnp.array([1e-1, 1e-2, 1e-3, 1e-4])
work = {}
for solver in (gf.KKT4(), gf.RKC2(), diffrax.Tsit5()):
    name = type(solver).__name__
    for decay in decays[:3] if name == "Tsit5" else decays:
        path = gf.simulate(
            flow, model, weight_decay=decay, slow_time=1.0, rtol=1e-4, saves=10,
            solver=solver, throw=False,
        )  # fmt: skip
        count = {"KKT4": "iterations", "RKC2": "evaluations", "Tsit5": "steps"}[name]
        each = 6 if name == "Tsit5" else 1  # gradients a step
        work.setdefault(name, []).append(each * int(path.stats[count]))

for name, counts in work.items():
    plt.loglog(1 / decays[: len(counts)], counts, "o-", label=name)
plt.xlabel("1/λ")
plt.ylabel("gradients, or iterations at the cost of three")
plt.legend()
plt.show()

# %% [markdown]
# The picture is the reason why KKT solvers exist. They solve an implicit step with the
# Lagrange multiplier of the data as an unknown of its own, so that nothing in it grows
# as λ falls; see [inside](../inside/kkt.md).
#
# What was chosen, and why:

# %%
path = gf.simulate(flow, model, weight_decay=1e-4, slow_time=1.0)
print(path.stats.why)

# %% [markdown]
# ## The decision
#
# Operations are estimated for each solver from what a run depends on: the number of
# parameters d and outputs m, the operations of one gradient (counted), the stiffness L·t₁
# and the tolerance. The least wins, an explicit solver only where it is expected to be 1.5
# times cheaper. Here it is for squared errors of networks with as many parameters as the
# outputs ten times over, whose gradient takes some 6·d·m operations:

# %%
import numpy as np

from gradflow.solvers import choose_solver, Size

stiffness, outputs = np.geomspace(1, 1e9, 60), np.geomspace(10, 1e5, 60).astype(int)
names = ["Tsit5", "RKC2", "KKT4"]


def chosen(x, m):
    size = Size(
        jnp.asarray(x),
        parameters=int(10 * m),
        outputs=int(m),
        gradient=60.0 * float(m) ** 2,
    )
    return names.index(type(choose_solver(size, rtol=1e-4).solver).__name__)


grid = [[chosen(x, m) for x in stiffness] for m in outputs]
plt.pcolormesh(stiffness, outputs, grid, cmap="Pastel1", vmin=0, vmax=8)
for name, at in {"Tsit5": (6, 300), "RKC2": (2e3, 1e4), "KKT4": (1e6, 100)}.items():
    plt.text(*at, name)
plt.xscale("log")
plt.yscale("log")
plt.xlabel("stiffness L·t₁, L the largest curvature")
plt.ylabel("outputs m")
plt.show()

# %% [markdown]
# In words:
#
# 1. A penalty with kinks (ℓ1): KKT, which alone follows them.
# 2. Short times or large λ, L·t₁ small: Tsit5. It is on trial: if it runs at its stability
#    limit, or has not ended after 10 000 steps, another takes over.
# 3. A composite loss with up to some thousand outputs, or parameters: KKT4, below rtol
#    1e-6 KKT5.
# 4. More of both: KKT without a matrix for very small λ, RKC2 for moderate ones.
# 5. An opaque loss, `gf.Loss(fn)`: KKT with its Hessian up to 5000 parameters, then RKC2.
#
# ## Tolerance
#
# `rtol` is the error of θ(t) relative to ‖θ(t)‖ at all saved times. Two digits more cost
# KKT5 two to three times the steps:

# %%
for rtol in (1e-4, 1e-6, 1e-8):
    path = gf.simulate(
        flow, model, weight_decay=1e-4, slow_time=1.0, rtol=rtol, saves=10,
        solver=gf.KKT5(),
    )  # fmt: skip
    print(f"rtol = {rtol:.0e}: {path.stats.steps} steps")

# %% [markdown]
# In float32 about four digits are resolved, and a tighter `rtol` is set to what is, with a
# warning. How far off a metric is, or a time: [error bars](errors.md).
#
# ## Diffrax's own solvers
#
# Any can be given as `solver=`. An explicit one at its stability limit makes up a drift
# of its own: the result is then `unstable`, by name.
