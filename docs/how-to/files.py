# %% [markdown]
# # Save and load
#
# `gf.save` keeps a path, a drift, a prediction, a sweep or a report in one file, without
# pickle; `gf.load` gives the same, bit by bit.

# %%
import tempfile
from pathlib import Path

import jax.random as jr

import gradflow as gf

gf.enable_float64()
folder = Path(tempfile.mkdtemp())

task = gf.tasks.diagonal_network(jr.key(0), dim=40, samples=12)
flow = gf.GradientFlow(task.loss)
path = gf.simulate(
    flow, task.model, weight_decay=1e-3, slow_time=1.0, metrics=task.metrics
)
gf.save(folder / "run.npz", path)
again = gf.load(folder / "run.npz")
print(again)
print("the same bits:", bool((again.metrics["test"] == path.metrics["test"]).all()))

# %% [markdown]
# What was read can be drawn, compared and selected from. It can't be run again: times of
# crossings are interpolated then, and `error` says so.
#
# ## Labelled arrays
#
# `to_xarray()` gives an `xarray.Dataset`, with t and slow time as coordinates, for whatever
# reads NetCDF or Zarr (`pip install ".[store]"` brings both).

# %%
data = path.to_xarray()
print(data.sizes, sorted(data.data_vars))

# %% [markdown]
# ## One model
#
# A model on a path is an Equinox module: `path[-1]`, or `path[i]` at `path.t[i]`. It is
# kept as any other.

# %%
import equinox as eqx

eqx.tree_serialise_leaves(folder / "end.eqx", path[-1])
end = eqx.tree_deserialise_leaves(folder / "end.eqx", task.model)
print(float(task.loss(end)), float(path.train_loss[-1]))

# %% [markdown]
# (The loss of a path is computed through the multiplier of the data, which is more exact
# than the loss of its model.)
#
# Many runs are best kept in a [store](sweeps.md), which grows as they come and can be gone
# on with.
