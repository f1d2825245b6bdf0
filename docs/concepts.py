# %% [markdown]
# # Concepts
#
# The words of this page, with their units, are in the [glossary](glossary.md).
#
# ## The flow, and its two clocks
#
# Gradient descent with a small step h follows, in time t = h × steps, the *gradient flow*
#
# $$\theta' = -\nabla F(\theta) - \lambda \nabla R(\theta).$$
#
# F is the training loss, R a penalty, ½‖θ‖² by default, λ ≥ 0 the weight decay. With λ
# comes a second clock, *slow time* s = λt: in it weight decay acts at a rate of one. To
# train to t = 10⁶ with λ = 10⁻⁵ is to train to s = 10.
#
# The smallest network that shows all of what follows has two parameters: f(x) = uvx, to
# be fitted to the one sample f(1) = 1.

# %%
import equinox as eqx
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import gradflow as gf

gf.enable_float64()


class Two(eqx.Module):
    weights: jnp.ndarray

    def __call__(self, x):
        return self.weights[0] * self.weights[1] * x


loss = gf.SquaredError(jnp.ones(1), jnp.ones(1))  # ½(uv − 1)²
flow = gf.GradientFlow(loss)
start = Two(jnp.array([2.4, -0.4]))

# %% [markdown]
# ## The critical manifold, and the limit map
#
# Without weight decay the flow comes to rest where ∇F = 0. A network with more parameters
# than data can fit them in many ways, so these points form a manifold M, the *critical
# manifold*: here the hyperbola uv = 1. Where the data are fitted, and J is the Jacobian of
# the outputs in θ, the tangent space of M is ker J; for any loss it is ker ∇²F. P is the
# orthogonal projection onto it, P = I − J⁺J.
#
# The *limit map* Φ takes a start θ₀ to the point of M where its flow ends. On M it is the
# identity, and its derivative there is P.

# %%
limit = gf.manifold.limit_map(loss, start)
print(limit)
print("Φ(θ₀) =", limit.model.weights)
print(gf.manifold.spectrum(loss, limit.model))

# %% [markdown]
# The spectrum says how F is curved there: as many directions as its *rank* are curved,
# the rest is the tangent space, and η is the least curvature across M. The data pull the
# network back to M at the rate η or faster.
#
# ## Two phases
#
# For small λ training has two phases
# ([Boursier, Pesme, Dragomir](https://arxiv.org/abs/2505.20172)):
#
# 1. a **fast phase**, at times of order one: the path follows the flow without weight
#    decay, to Φ(θ₀);
# 2. a **drift**, at times of order 1/λ: along M, the path follows the *Riemannian gradient
#    flow* of R,
#
# $$\frac{dw}{ds} = -P(w)\,\nabla R(w), \qquad w(0) = \Phi(\theta_0).$$

# %%
drift = gf.manifold.riemannian_flow(flow, limit.model, slow_time=3.0)
run = lambda decay: gf.simulate(
    flow, start, weight_decay=decay, slow_time=3.0, saves=200
)
paths = {decay: run(decay) for decay in (0.3, 0.1, 0.01)}

u = np.linspace(0.35, 2.8, 200)
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
left.plot(u, 1 / u, "k--", label="M: uv = 1")
for decay, path in paths.items():
    left.plot(*np.asarray(path.models.weights).T, label=f"λ = {decay:g}")
    right.plot(path.slow_time, path.penalty, label=f"λ = {decay:g}")
left.plot(*start.weights, "ko", ms=4)
left.annotate("θ₀", start.weights, (5, -3), textcoords="offset points")
left.plot(*limit.model.weights, "ks", ms=5)
left.annotate("Φ(θ₀)", limit.model.weights, (6, 4), textcoords="offset points")
left.set(xlabel="u", ylabel="v", aspect="equal", ylim=(-0.6, 2.2))
left.legend()
right.plot(drift.s, drift.penalty, "k:", label="drift")
right.set(xlabel="slow time s = λt", ylabel="½‖θ‖²")
right.legend()
plt.show()

# %% [markdown]
# The smaller λ, the closer a path is to going to Φ(θ₀) first and then along M, to the
# point of M with the least norm, (1, 1). Against slow time the paths of all λ fall on one
# curve, the drift.
#
# The *composite prediction* joins both phases: θ(t) ≈ θ_GF(t) + w(λt) − Φ(θ₀), off by O(λ)
# at all times. Two runs, of the flow without weight decay and of the drift, predict those
# of every small λ.
#
# ## Grokking
#
# What the network has learnt on the data does not change in the drift; everything else
# may. Where the test loss falls late, it falls there. So the *delay* between memorising
# (the train metric passes its threshold) and generalising (the test metric does, for
# good) is a slow time: in time t it grows as 1/λ.
#
# ## The second order
#
# In the drift the path is not on M but beside it, where the pull of weight decay and that
# of the loss balance: at −λ(∇²F)⁺∇R from it. That, and what it makes of the drift, are
# terms of order λ; with them the prediction is off by O(λ²). `gradflow.two_phase` with
# `order=2` computes them once for all λ, and takes their size for an estimate of its own
# error. [How they are derived](inside/second-order.md).

# %%
theory = gf.two_phase(flow, start, slow_time=3.0, order=2)
sweep = gf.sweep(
    flow, start, weight_decay=jnp.geomspace(1e-1, 1e-4, 4), slow_time=3.0, rtol=1e-9
)
print(gf.compare(sweep, theory))

# %% [markdown]
# A tenth of λ is a tenth of the error of order 1, and a hundredth of that of order 2.
#
# ## When theory stops
#
# The flow itself is integrated for any λ, and to the tolerance asked. The theory of it
# has limits:
#
# - λ has to be small against η, the least curvature of F across M. Theory is claimed
#   where λ ≤ η/10 and its terms fall by four or more: `theory.valid_until(λ)` is the slow
#   time up to which that is so, the column *valid* of a report.
# - The rank of J may fall along the drift, as coordinates die out: M is singular there.
#   Drifts to sparse or low-rank solutions end so; η then falls to zero, exponentially
#   in s.
# - A loss may have no minimiser, as cross-entropy where the classes can be told apart:
#   the parameters grow as log t, and there is no limit map, only a limit of θ/‖θ‖.
# - Where ∇²F has negative eigenvalues the flow is at a saddle; where its spectrum has no
#   gap the tangent space is a guess.
# - Kinks of ReLUs: the flow slides along them, and theory does not apply.
#
# Each is found, and named: see [what can go wrong](what-can-go-wrong.md).
