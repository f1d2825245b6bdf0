# %% [markdown]
# # Error bars of a path
#
# `rtol` promises that the error of θ(t) is of its size, relative to ‖θ(t)‖. What that is
# in a test loss, or in a grokking time, no tolerance says: where the flow leaves a saddle
# errors grow, and where a metric is flat a time is hardly known. `path.error` measures
# it: the run is made once more, to a hundredth of `rtol`, and compared.

# %%
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np

import gradflow as gf

gf.enable_float64()

task = gf.tasks.diagonal_network(jr.key(0))
flow = gf.GradientFlow(task.loss)
path = gf.simulate(
    flow, task.model, weight_decay=1e-3, slow_time=4.0, rtol=1e-4, metrics=task.metrics
)
test, error = path.metrics["test"], path.error("test")
print(f"test loss at the end: {float(test[-1]):.6g} ± {abs(error[-1]):.1g}")

# %% [markdown]
# `path.error(name)` is the signed difference at each saved time, of a metric or of
# `"train_loss"` and `"penalty"`; its size is the error bar. The finer run takes two to
# three times the steps (seven to eleven with RKC2) and, with gradflow's solvers, no new
# program; it is made once, for all names.

# %%
shown = path.t > 0
plt.loglog(path.t[shown], test[shown], label="test loss")
plt.loglog(path.t[shown], np.abs(error)[shown], label="its error")
plt.xlabel("t")
plt.legend()
plt.show()

# %% [markdown]
# ## Of a time
#
# Times of crossings are landed on, to `rtol`; `path.crossing_error` says by how much they
# are off nevertheless.

# %%
time, off = path.crossing_time("test"), path.crossing_error("test")
print(f"generalises at t = {time:.8g} ± {off:.1g}")

# %% [markdown]
# In a sweep it is `sweep.crossing_error("test")`, and in a comparison
# `gf.compare(sweep, theory, error_bars=True)`. Predicted times have an error of their own,
# from the terms of the second order: `theory.grokking_time(1e-4).error`.
#
# ## What it can not tell
#
# - A path that failed, one made under `jit` or read from disk, and a descent have none:
#   there is nothing to run again.
# - What both runs have in common is not seen, as a pulse of λ that no step has met.
# - An error that happens to be a hundredth of its usual size, as where it changes its
#   sign, is known least.
#
# Of results read from disk, where times are interpolated, `gf.crossing_error(t, values,
# metric)` says how far that may be off.
