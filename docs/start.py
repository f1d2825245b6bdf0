# %% [markdown]
# # Your own model
#
# Install gradflow into an environment of your own, from a clone:
#
# ```sh
# python3 -m venv .venv && .venv/bin/pip install .
# ```
#
# Any Equinox model will do, with data as arrays. Here a network with tanh units fits
# eight points of a function of three variables, of which it needs to find that only the
# first matters.

# %%
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr

import gradflow as gf

gf.enable_float64()  # JAX computes in float32 unless told otherwise

x = 2 * jr.normal(jr.key(0), (8, 3))
y = jnp.sin(x[:, 0])
x_test = 2 * jr.normal(jr.key(1), (300, 3))
y_test = jnp.sin(x_test[:, 0])
model = eqx.nn.MLP(3, "scalar", 40, 1, jnp.tanh, key=jr.key(2))
model = gf.scaled(model, 3.0)  # a large start, which has to grok

# %% [markdown]
# A flow is a loss and a penalty (½‖θ‖² unless given). What is to be watched along it is
# a function of the model; with a threshold, gradflow tells when it is passed. Losses
# pass it from above. `gf.Accuracy` knows that it passes from below; a function of your own
# that does has to be told so: `gf.Metric(f, threshold=0.9, higher_is_better=True)`.

# %%
loss = gf.SquaredError(x, y)
flow = gf.GradientFlow(loss)
watch = {
    "train": gf.Metric(loss, threshold=1e-3),
    "test": gf.Metric(gf.SquaredError(x_test, y_test), threshold=0.3),
}

# %% [markdown]
# One run, to slow time s = λt = 2:

# %%
path = gf.simulate(flow, model, weight_decay=1e-4, slow_time=2.0, metrics=watch)
print(path)

# %% [markdown]
# The path has the saved times `path.t`, the metrics, and the models, stacked along the
# first axis of each of their arrays: `path[i]` is one, and `jax.vmap(f)(path.models)`
# computes anything of all of them.

# %%
ax = path.plot()

# %% [markdown]
# ## Save a figure
#
# `path.plot()` gives Matplotlib's axes: `ax.figure.savefig("path.png")` writes the figure
# to a file. Of a report it is the whole figure: `report.plot().savefig("report.png")`.

# %% [markdown]
# ## What theory says
#
# `two_phase` computes the limit of the fast phase and the drift along the manifold, once
# for all λ, and to the second order in λ what lies between. It predicts a path, and when
# the test metric will pass its threshold.

# %%
theory = gf.two_phase(flow, model, slow_time=2.0, metrics=watch, order=2)
print(theory)

# %%
print(theory.grokking_time(1e-4))
print(f"measured: {path.crossing_time('test'):.5g}")

# %% [markdown]
# ## Many weight decays
#
# A sweep runs them all, on all devices there are, and `compare` puts them beside theory.

# %%
sweep = gf.sweep(
    flow, model, weight_decay=jnp.geomspace(1e-2, 1e-5, 7), slow_time=2.0, metrics=watch
)
report = gf.compare(sweep, theory)
print(report)

# %%
figure = report.plot()

# %% [markdown]
# Next: [the concepts](concepts.md) behind these words, or
# [how a solver is chosen](how-to/solvers.md).
