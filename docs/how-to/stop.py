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
watch = {"test": gf.Metric(task.metrics["test"].fn, threshold=0.1)}
run = dict(weight_decay=1e-3, slow_time=5.0, metrics=watch)
path = gf.simulate(flow, task.model, until="test", **run)
print(path)

# %% [markdown]
# `gf.Accuracy` passes its threshold from below. A function of your own that does has to be
# told so, or it holds at t = 0 and the run ends there, which `print(path)` remarks:
# `gf.Metric(f, threshold=0.9, higher_is_better=True)`.
#
# `until` ends at the *first* crossing. `path.crossing_time("test")` is when the metric is
# past its threshold *for good*: where it comes back later, in a run that goes on, the
# second is the later of the two.

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
# The function is compiled for: make it once. An Equinox module that holds its numbers as
# arrays serves many schedules with one program.
#
# A schedule that is told in slow time, here λ halved at every unit of s:

# %%
halved = gf.InSlowTime(lambda s: 1e-2 * 0.5**s)
path = gf.simulate(flow, task.model, weight_decay=halved, slow_time=3.0)
print(f"t = {float(path.t[-1]):.5g} at s = {float(path.slow_time[-1]):.4g}")

# %% [markdown]
# Theory takes it too: `theory.predict(path.t, slow_time=path.slow_time)`, at order 1.
