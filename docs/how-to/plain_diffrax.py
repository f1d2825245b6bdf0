# %% [markdown]
# # Plain Diffrax
#
# The flow is a Diffrax term, and the solvers are Diffrax solvers: everything that
# `diffrax.diffeqsolve` offers is there.

# %%
import diffrax
import jax.numpy as jnp
import jax.random as jr

import gradflow as gf

gf.enable_float64()

task = gf.tasks.diagonal_network(jr.key(0), dim=40, samples=12)
term, params = gf.GradientFlow(task.loss).term(task.model)
solution = diffrax.diffeqsolve(
    term, gf.KKT4(), t0=0.0, t1=1e4, dt0=None, y0=params, args=1e-3,
    stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-8),
    saveat=diffrax.SaveAt(ts=jnp.geomspace(1.0, 1e4, 5)),
)  # fmt: skip
print(solution.stats["num_steps"], solution.result)

# %% [markdown]
# # Files
#
# `gf.save` and `gf.load` keep any result in one file without pickle, with the same bits;
# `to_xarray()` gives labelled arrays.

# %%
import tempfile

path = gf.simulate(
    gf.GradientFlow(task.loss), task.model, weight_decay=1e-3, slow_time=1.0
)
name = tempfile.mkdtemp() + "/run.npz"
gf.save(name, path)
again = gf.load(name)
print(again)
