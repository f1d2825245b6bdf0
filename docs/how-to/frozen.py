# %% [markdown]
# # Freeze a layer, or give it a rate
#
# ## Freeze a layer
#
# `trainable=` takes an Equinox filter: a pytree of booleans, or a function *of a leaf*, as
# `eqx.is_inexact_array` is. A function of the model, such as `where=` takes elsewhere, is
# none. What it leaves out is frozen: it stays as it is, and neither R nor the theory knows
# of it.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

import gradflow as gf

gf.enable_float64()

x = jr.normal(jr.key(0), (10, 3))
loss = gf.SquaredError(x, jnp.sin(x[:, 0]))
model = eqx.nn.MLP(3, "scalar", 20, 1, jnp.tanh, key=jr.key(1))

nothing = jax.tree.map(lambda _: False, model)
only_last = eqx.tree_at(
    lambda m: (m.layers[-1].weight, m.layers[-1].bias), nothing, (True, True)
)
flow = gf.GradientFlow(loss, trainable=only_last)
path = gf.simulate(flow, model, weight_decay=1e-3, slow_time=2.0)
print(path)
print(
    "first layer as it was:",
    bool(jnp.all(path[-1].layers[0].weight == model.layers[0].weight)),
)

# %% [markdown]
# A penalty on some of the parameters only, all of which are trained, is another thing:
# `penalty=gf.L2(where=lambda m: m.layers[0])`.
#
# ## A rate for each layer
#
# `rates=` G are factors of the velocity, as learning rates of their own:
# θ' = −G(∇F + λ∇R). They are a pytree of positive numbers that begins as the parameters
# do: one number serves all leaves below it. Or a function that gives one, from the shapes
# of the parameters.

# %%
ones = lambda params: jax.tree.map(lambda _: 1.0, params)
slow_first = lambda params: eqx.tree_at(
    lambda p: p.layers[0].weight, ones(params), 0.01
)
by_width = lambda params: jax.tree.map(
    lambda p: 1 / p.shape[-1] if p.ndim else 1.0, params
)

for name, rates in {
    "one rate": None,
    "slow first layer": slow_first,
    "by width": by_width,
}.items():
    flow = gf.GradientFlow(loss, rates=rates)
    path = gf.simulate(flow, model, weight_decay=1e-3, slow_time=2.0)
    moved = jnp.linalg.norm(path[-1].layers[0].weight - model.layers[0].weight)
    print(
        f"{name:16}: first layer moved by {float(moved):.3f}, {path.stats.steps} steps"
    )

# %% [markdown]
# Such a flow is the plain one of φ = G^{−½}θ, so all that is known of plain flows holds in
# that metric: the critical manifold is the same, the tangent kernel J G Jᵀ, the drift
# w' = −P G∇R with the projection that is orthogonal in it. Limit map, theory and sweeps
# take a flow with rates as any other. Rates of very different sizes are no trouble to the
# KKT solvers.
#
# ## Two time scales that are not rates
#
# - Weight decay on a schedule: [stop and schedule](stop.md).
# - A part that is always at its optimum, as a last layer that is solved for: write it into
#   the loss, `gf.Loss(lambda model: …)` or a composite loss of your own.
# - The norm held, so that weight decay only turns the direction:
#   `gf.GradientFlow(loss, hold_norm=True)`.
