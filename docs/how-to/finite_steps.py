# %% [markdown]
# # Finite steps, and the edge of stability
#
# The flow is the limit of descent in small steps. `learning_rate=` asks `gf.simulate` for
# the descent in steps of h instead, still in continuous time, also where h is beyond
# 2/L, L the largest curvature: at the *edge of stability*, where descent goes to and fro
# across the valley and the sharpness stays at 2/h.

# %%
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt

import gradflow as gf

gf.enable_float64()

x = jr.normal(jr.key(0), (12, 2))
loss = gf.SquaredError(x, jnp.sin(2 * x[:, 0]) + x[:, 1])
model = eqx.nn.MLP(2, "scalar", 16, 1, jnp.tanh, key=jr.key(1))
flow = gf.GradientFlow(loss)
watch = {"sharpness": gf.metrics.Sharpness(loss)}

h = 0.6
run = dict(weight_decay=0.0, t1=300.0, metrics=watch)
edge = gf.simulate(flow, model, learning_rate=h, **run)
plain = gf.simulate(flow, model, **run)
print(edge)

# %% [markdown]
# Beside it, the steps themselves, and the flow of infinitely small ones:

# %%
steps = gf.descent(flow, model, learning_rate=h, **run)
for path, style, label in (
    (plain, "C2:", "flow"),
    (steps, "C1-", "descent in steps of h"),
    (edge, "C0--", f"simulate(learning_rate={h})"),
):
    plt.semilogx(path.t[1:], path.metrics["sharpness"][1:], style, label=label)
plt.axhline(2 / h, color="grey", lw=0.8)
plt.text(2, 2 / h + 0.05, "2/h")
plt.xlabel("t = h × steps")
plt.ylabel("sharpness λ₁(∇²F)")
plt.legend()
plt.show()

# %% [markdown]
# ## How it works, and how far to trust it
#
# Descent goes to and fro between w + ρu and w − ρu, u near the first eigenvector of ∇²F.
# Where both w and ρ change little from one step to the next they follow a flow, which is
# what is solved; the formula is in the reference of `gradflow.simulate`. The parameters of
# the path are w, and metrics are the mean over both points, as over two steps. Below the
# edge, ρ = 0, that is the modified equation θ' = −∇(E + ¼h‖∇E‖²), E = F + λR.
#
# - `path.stats.deviation` estimates by how much the path is off, relative to θ. From 0.05
#   on the run has failed, as `coarse`: steps far beyond 2/L lead to chaos, which no flow
#   follows.
# - It takes float64, a smooth loss and penalty, a constant λ and an end after more than
#   16 steps; the first 16 are taken as they are.
# - θ' takes some six gradients. For less than some 10⁵ steps `gf.descent` is quicker:
#   what this is for is descent to large slow times.
# - Where ρ rises from rounding the descent itself is not the same on every machine.

# %%
print(f"deviation {float(edge.stats.deviation):.1g}, by {edge.stats.solver}")

# %% [markdown]
# What small but finite steps add on average, together with noise, is another question:
# [drifts of optimisers](optimisers.md).
