# %% [markdown]
# # Sweep, and resume
#
# `gradflow.sweep` runs the product of weight decays, initial scales, and whatever a
# function of your own takes. A lane that fails is marked, and harms no other.

# %%
import tempfile

import jax.numpy as jnp
import jax.random as jr

import gradflow as gf

gf.enable_float64()


def problem(seed):
    """Data, model, loss and metrics, from a seed."""
    return gf.tasks.diagonal_network(jr.key(seed), dim=40, samples=12)


sweep = gf.sweep(
    problem, axes={"seed": range(2)}, init_scale=[0.5, 1.0],
    weight_decay=jnp.geomspace(1e-1, 1e-3, 3), slow_time=3.0,
)  # fmt: skip
print(sweep)

# %% [markdown]
# Results are labelled arrays. `to_xarray()` gives a dataset, in which one selects by
# name:

# %%
runs = sweep.to_xarray()
print(runs.metric_test.sel(seed=0, init_scale=1.0).isel(time=-1))

# %% [markdown]
# ## Look at it
#
# `sweep.plot()` is a figure. `sweep.to_html("sweep.html")` writes a page in which one
# moves a slider for each axis, and one for time; so does `report.to_html`, with theory
# beside. It is one file that any browser opens, without a network (it needs
# `pip install plotly`). With `inputs=x` it also shows the function that the model has
# learnt at these x, where models take one number; any other function of them is given
# by name, as here the coefficients of a diagonal network by their number.

# %%
page = sweep.to_html(
    tempfile.mkdtemp() + "/sweep.html",
    inputs=range(40), function=lambda model, i: model.beta[i],
)  # fmt: skip
print(page.name, f"{page.stat().st_size / 1e6:.1f} MB, of which Plotly is 4.8")

# %% [markdown]
# ## A store
#
# With `store=` results are written as they come, chunk by chunk: a chunk is a block of
# lanes that are written together, whole or not at all. Whatever ends a sweep, the same
# call goes on where it stopped; a store of another configuration is refused, with the
# differences.
#
# So a kill without `store=` loses everything; with it, only the chunks that are not
# finished, and of a lane that takes longer than a minute only what came after its last
# checkpoint.

# %%
store = tempfile.mkdtemp() + "/sweep.zarr"
options = dict(weight_decay=jnp.geomspace(1e-1, 1e-3, 3), slow_time=3.0, store=store)
gf.sweep(problem, axes={"seed": range(2)}, **options)
print(gf.open_results(store).sizes)

# %% [markdown]
# `store=gf.Store(path, parameters=True)` keeps parameters too, and
# `run=gf.Descent([0.01, 0.1], steps=1000)` sweeps over step sizes of a descent.
#
# What is in such a folder, and why a kill does no harm: [the store's
# protocol](../inside/store.md). Many machines may share one: [a cluster](cluster.md).
