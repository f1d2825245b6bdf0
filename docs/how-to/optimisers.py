# %% [markdown]
# # Drifts of optimisers
#
# Noise, large steps and adaptive steps move a network along the manifold of perfect fits
# even without weight decay. On average that is a flow with another penalty:
#
# | optimiser | penalty R | strength λ |
# | --- | --- | --- |
# | descent with noise σ on the labels, n samples, steps h | tr ∇²F | ¼hσ²/n |
# | the same, h not small | −(2/h) tr log(I − ½h∇²F) | ¼hσ²/n |
# | noise of σ on the parameters; in proportion to them | tr ∇²F; Σθᵢ²∂ᵢ²F | ½σ² |
# | sharpness-aware minimisation (SAM), radius ρ | λ₁(∇²F); tr ∇²F one sample at a time | ½ρ² |
# | Adam with label noise | tr Diag(∇²F)^½ | ½hσ/√n |
#
# With minibatches of b samples the noise on the labels has the size σ²/b in place of σ²/n:
# λ = ¼hσ²/b, which `batch_size=b` asks for. What the minibatches do without noise on the
# labels vanishes where all data are fitted.
#
# `gf.drifts` gives the flow and its λ from the settings of the optimiser; `two_phase`,
# `simulate` and all that takes a flow and a weight decay take them.

# %%
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np

import gradflow as gf

gf.enable_float64()

x = jr.normal(jr.key(0), (8, 20))
beta = jnp.zeros(20).at[:2].set(jnp.array([1.0, -1.0]))
loss = gf.SquaredError(x, x @ beta)
model = gf.models.DiagonalNetwork(jnp.full(20, 0.8), jnp.full(20, 0.8))

h, sigma = 0.02, 1.0
flow, decay = gf.drifts.label_noise(loss, model, learning_rate=h, label_noise=sigma)
print(f"λ = {decay:.3g}, so {1 / (decay * h):.0f} steps are one of slow time")

# %% [markdown]
# The drift, from the end of the fast phase, and the mean over eight descents with noise:

# %%
start = gf.manifold.limit_map(loss, model).model
trace = {"trace": lambda m: flow.penalty(flow.partition(m)[0])}
drift = gf.manifold.riemannian_flow(flow, start, slow_time=0.5, metrics=trace)


def noisy(key):
    run = gf.descent(
        gf.GradientFlow(loss), start, learning_rate=h, label_noise=sigma, key=key,
        weight_decay=0.0, t1=0.5 / decay, metrics=trace,
    )  # fmt: skip
    return run.t, run.metrics["trace"]


runs = [noisy(key) for key in jr.split(jr.key(1), 8)]
t = runs[0][0]
plt.plot(
    decay * t, np.mean([value for _, value in runs], axis=0), label="descent, mean of 8"
)
plt.plot(drift.s, drift.metrics["trace"], "k--", label="drift")
plt.xlabel("slow time s = λt, t = h × steps")
plt.ylabel("tr ∇²F")
plt.legend()
plt.show()

# %% [markdown]
# One run is off this mean by O(√h), the mean by O(h). `finite_step=True` takes h for what
# it is.
#
# A weight decay of the optimiser's own is given beside, `weight_decay=`, and becomes a
# part of the penalty. What each of them asks for, which losses it knows, and where it
# comes from is in the [reference](../reference/drifts.md): label noise, for one, is known
# for squared error and for flipped labels, and Adam's drift is right only where its rates
# are those of the point that is given.
#
# The penalties can be used as any other, `gf.GradientFlow(loss,
# penalty=gf.drifts.Trace(loss, model))`; with a budget, `probes=` random vectors estimate
# the trace in place of all.
