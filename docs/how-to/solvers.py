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
# ## Tolerance
#
# `rtol` is the error of θ(t) relative to ‖θ(t)‖ at all saved times. Two digits more cost
# KKT5 two to three times the steps: 35, 79 and 219 above, for rtol 1e-4, 1e-6 and 1e-8
# with λ = 1e-4. In float32 no more than about four
# digits are resolved, and `gf.simulate` refuses to promise more.
#
# ## Diffrax's own solvers
#
# Any can be given as `solver=`. An explicit one at its stability limit makes up a drift
# of its own: the result is then `unstable`, by name.
