# %% [markdown]
# # Stop early; let the weight decay change
#
# ## Until something holds
#
# `until=` ends a run where a criterion holds, landed on: a metric by its name, past its
# threshold; `gf.SmallGradient(tol)`; `gf.SteadyState(tol)`; or a function of the model.

# %%
import jax.numpy as jnp
import jax.random as jr
import optax

import gradflow as gf

gf.enable_float64()

task = gf.tasks.diagonal_network(jr.key(0))
flow = gf.GradientFlow(task.loss)
run = dict(weight_decay=1e-3, slow_time=5.0, metrics=task.metrics)
path = gf.simulate(flow, task.model, until="test", **run)
print(path)

# %%
small = gf.simulate(
    flow, task.model, until=lambda model: jnp.sum(jnp.abs(model.beta)) > 10.0, **run
)
print(f"{small.verdict} t = {float(small.t[-1]):.4g}")

# %% [markdown]
# In a sweep each lane ends by itself; in `gf.descent` the criterion is looked at after
# each step.
#
# ## Schedules
#
# `weight_decay=` of `simulate` and `descent` may be a function of time t, such as one of
# Optax's, with `t1=` or `ts=`; or `gf.InSlowTime` of a function of s = ∫λ dt, with
# `slow_time=`.

# %%
schedule = optax.linear_schedule(1e-2, 1e-3, transition_steps=1000)
path = gf.simulate(flow, task.model, weight_decay=schedule, t1=2000.0)
print(f"s = ∫λ dt = {float(path.slow_time[-1]):.4f}")

# %% [markdown]
# ## Frozen parts, and a rate for each layer
#
# `gf.GradientFlow(loss, trainable=...)` takes an Equinox filter: what it does not choose
# stays as it is. `rates=` are factors of the velocity, a pytree like the parameters, or
# one that is a prefix of it: θ' = −G(∇F + λ∇R).

# %%
rates = gf.models.DifferenceNetwork(jnp.array(1.0), jnp.array(0.1))
slow = gf.GradientFlow(task.loss, rates=rates)
path = gf.simulate(slow, task.model, weight_decay=1e-3, slow_time=5.0)
print(path.stats.solver, path.stats.steps)
