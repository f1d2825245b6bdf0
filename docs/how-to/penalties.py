# %% [markdown]
# # Another penalty
#
# Anything may take the place of ½‖θ‖². The penalty decides what the network drifts to.

# %%
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt

import gradflow as gf

gf.enable_float64()

x = jr.normal(jr.key(0), (15, 30))
beta = jnp.zeros(30).at[:3].set(jnp.array([1.0, -1.0, 0.5]))
loss = gf.SquaredError(x, x @ beta)
model = gf.models.LinearModel(jnp.zeros(30))

ends = {}
for name, penalty in {"½‖θ‖²": gf.L2(), "‖θ‖₁": gf.L1()}.items():
    flow = gf.GradientFlow(loss, penalty=penalty)
    path = gf.simulate(flow, model, weight_decay=1e-4, slow_time=10.0)
    ends[name] = path[-1].weights

for (name, end), mark in zip(ends.items(), "sx", strict=True):
    plt.plot(end, mark, label=name)
plt.plot(beta, "k_", ms=9, label="truth")
plt.xlabel("coordinate")
plt.ylabel("where the drift ends")
plt.legend()
plt.show()

# %% [markdown]
# From the same start, with the same data, ℓ1 finds the sparse truth. Its kinks are
# followed exactly: a coordinate that reaches zero and may stay there does, to the last
# bit.
#
# - Penalties add up and scale: `gf.L1() + 0.1 * gf.L2()`.
# - `where=` chooses leaves: `gf.L1(where=lambda m: m.layers[0])`.
# - `gf.Quadratic(weights, centre)` is ½Σwᵢ(θᵢ − cᵢ)².
# - Kinks elsewhere, as of a nuclear norm, are rounded off: `gf.Moreau(gf.Nuclear(), epsilon=1e-3)`.
#
# ## One of your own
#
# A smooth penalty has a value and a gradient.

# %%
import jax

from gradflow import AbstractPenalty


class Entropy(AbstractPenalty):
    """Σ θ² log(1 + θ²)."""

    def __call__(self, params):
        return sum(jnp.sum(p**2 * jnp.log1p(p**2)) for p in jax.tree.leaves(params))

    def gradient(self, params):
        return jax.grad(self.__call__)(params)


flow = gf.GradientFlow(loss, penalty=Entropy())
print(gf.simulate(flow, model, weight_decay=1e-3, slow_time=1.0))
