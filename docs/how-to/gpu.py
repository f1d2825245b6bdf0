# %% [markdown]
# # A GPU
#
# A single small run is thousands of small steps in sequence, for which a GPU is slower
# than the CPU beside it. What a GPU is for is hundreds of runs at once.
#
# `gf.sweep` uses all devices that JAX sees, each with a loop of its own. On a GPU as many
# lanes run in lockstep as fit into memory: half as many, and half again, where it runs
# out. On a CPU each lane runs by itself, unless `batch="vmap"` asks for it.

# %%
import jax
import jax.numpy as jnp
import jax.random as jr

import gradflow as gf

gf.enable_float64()

task = gf.tasks.diagonal_network(jr.key(0), dim=40, samples=12)
flow = gf.GradientFlow(task.loss)
sweep = gf.sweep(
    flow, task.model, weight_decay=jnp.geomspace(1e-1, 1e-4, 16), slow_time=2.0
)
print(f"{len(sweep)} lanes on {jax.devices()}")

# %% [markdown]
# In lockstep each lane has steps of its own; what a lane needs (a tangent kernel, a
# factorisation) is made for the lanes that need it. `jax.vmap` over `gf.simulate` does the
# same inside a program of yours:

# %%
run = lambda decay: gf.simulate(
    flow, task.model, weight_decay=decay, slow_time=2.0, solver=gf.KKT4()
)
paths = jax.vmap(run)(jnp.geomspace(1e-1, 1e-4, 4))
print(paths.train_loss.shape, paths.result == gf.RESULTS.successful)

# %% [markdown]
# A lane that fails harms no other: its result says why. (Where λ is traced, as here, no
# stiffness can be measured: name a solver, or KKT and RKC2 are weighed for a stiff flow.)
#
# - `path.stats.why` says where a small problem would be faster on the CPU; `with
#   jax.default_device(jax.devices("cpu")[0]):` runs it there.
# - In float64 a consumer GPU is slow; in float32 about four digits are resolved.
# - Recent GPUs multiply float32 in TF32, with three digits, unless told otherwise.
#   gradflow asks for all digits in its products, also in those of your model.
# - `python benchmarks/gpu.py` measures sweeps on your machine, against its own CPU.
