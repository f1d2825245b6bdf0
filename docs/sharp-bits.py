# %% [markdown]
# # Sharp bits, and questions
#
# ## Float64
#
# JAX computes in float32 unless told otherwise. Call `gf.enable_float64()` before the
# model is made: a model made earlier stays in float32. In float32 no more than about four
# digits are resolved along a path; a tighter `rtol` is set to that, and a warning says so.

# %%
import warnings

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr

import gradflow as gf

x = jr.normal(jr.key(0), (8, 2))
y = jnp.sign(x[:, 0])
model = eqx.nn.MLP(2, "scalar", 8, 1, jnp.tanh, key=jr.key(1))
flow = gf.GradientFlow(gf.SquaredError(x, y))
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    gf.simulate(flow, model, weight_decay=1e-2, slow_time=1.0, solver=gf.KKT4())
print(told[0].message)

# %% [markdown]
# A model in float32 with data in float64, or one whose parameters are of two precisions, is
# refused, before anything is computed.
#
# ## The first call compiles
#
# Some seconds for a path; half a minute of a core for a whole comparison with theory of a
# network of one hidden layer, and minutes for deep ones, transformers, and on a machine
# that has other work. Give `progress=True`: it shows what is being compiled, and how far a
# run is. Another λ, start or tolerance needs nothing new. A new model (by its structure and
# shapes), loss, set of metrics, solver or number of saved times does.
#
# - `gf.cache_programs()`, called first, keeps programs in files, by default in your cache
#   folder; the next process finds them, and waits for less than a third of the time. A
#   program that calls back into Python is not kept. The folder may be deleted at any time.
# - A function made anew in each call, such as a lambda in a loop, is a new program in each
#   call: make it once.
# - A plain number inside a penalty or a loss is compiled in. As an array,
#   `jnp.asarray(c) * gf.L1()`, it is not.
#
# ## Weight decay is not AdamW's
#
# λ multiplies ∇R in the flow. For gradient descent with step h, a decay of the weights by a
# factor 1 − hλ per step is the same λ. Frameworks that put ½λ‖θ‖² into the loss agree;
# those that use λ‖θ‖² have half of this λ.
#
# ## F is a mean
#
# `SquaredError` is ½ the mean over samples of the squared error, `CrossEntropy` the mean
# over samples. Where yours is a sum, times and λ differ by the number of samples.
#
# ## All parameters decay
#
# Biases and scales of norms too, unless `penalty=gf.L2(where=...)` says otherwise.
#
# ## Kinks
#
# With ReLUs ∇F jumps, and the flow slides along the jumps. KKT solvers follow that, and
# the result is called `slid`; there each step is right to about 10⁻³, and paths from close
# starts differ by percents. Smooth units (tanh, GELU, softplus) have no such limit. [ReLU
# networks](how-to/relu.md).
#
# ## Cross-entropy has no minimiser
#
# Where the classes can be told apart, the loss falls as long as the parameters grow, about
# as log t. With weight decay there is a minimiser, and the flow goes there. Without, there
# is no limit map, and no two-phase prediction; what converges is the direction θ/‖θ‖:

# %%
gf.enable_float64()
x, y = x.astype(float), y.astype(float)
linear = gf.models.LinearModel(jnp.zeros(2))
separable = gf.Logistic(x, (y + 1) / 2)
limit = gf.manifold.limit_map(separable, linear, throw=False)
print(limit)
print(limit.direction.weights)

# %% [markdown]
# ## Many outputs
#
# A KKT solver factorises a matrix as large as the number of outputs (samples × outputs of
# each) or of parameters, whichever is less: comfortable to some thousand. Above 10 000 of
# both it iterates instead, with products by the Jacobian, or RKC2 is chosen. So classifiers
# of ten classes and thousands of samples are dear; a network of millions of parameters on
# some hundred samples need not be.
#
# ## "No time": theory abstains
#
# A prediction is given where theory holds until then: where λ is at most a tenth of the
# least curvature η across the manifold, its terms fall, and J keeps its rank. The reason
# is printed in place of the number:

# %%
task = gf.tasks.diagonal_network(jr.key(0))
theory = gf.two_phase(
    gf.GradientFlow(task.loss), task.model, slow_time=4.0, metrics=task.metrics
)
for decay in (1.0, 1e-4):
    print(
        f"λ = {decay:g}: {theory.grokking_time(decay)}; valid to s = {theory.valid_until(decay):.3g}"
    )

# %% [markdown]
# A smaller λ, or a shorter slow time, is often all that it takes. So is a larger start: one
# that is so small that the fast phase waits at saddles leaves room for far smaller λ only.
#
# ## "The Jacobian is losing rank"
#
# J maps changes of the parameters to changes of the outputs; σ_min and σ_max are its least
# and largest singular values. Where σ_min²/σ_max² is small, or below rounding, some
# combination of the outputs hardly depends on the parameters any more: the path is as
# right as its tolerance says, but theory, which asks for a constant rank, may not hold from
# there on. `gf.manifold.spectrum(loss, path[-1])` shows all singular values.
#
# ## A store is refused
#
# Where it holds another sweep: other data, model, or settings. The message lists the
# differences. Give another folder, or delete that one. Functions are compared by their
# names and what they close over, data to ten digits.
#
# ## TF32
#
# Recent GPUs multiply float32 with three digits unless told otherwise; gradflow asks for
# all digits in whatever it runs, your model included. What you compute of a path by
# yourself is up to you: `jax.default_matmul_precision("highest")`.
#
# ## A GPU is slower
#
# Of a single small run: thousands of small steps in sequence. What a GPU is for is hundreds
# of lanes at once. [A GPU](how-to/gpu.md).
#
# ## Saved times cost steps
#
# They are landed on, since between them a path can't be interpolated without leaving the
# manifold. With some hundred that is little.
#
# ## Derivatives
#
# `gf.manifold.limit_map` has one, by the implicit function theorem. Through `simulate`,
# give a Diffrax solver, and `adjoint=` one of Diffrax's. [Plain
# Diffrax](how-to/plain_diffrax.md).
#
# ## Dropout, batches, momentum
#
# A flow is deterministic and full-batch: put the model into inference mode, as in [state,
# dropout, tied weights](how-to/layers.md). `gf.descent` takes minibatches, noise and any
# Optax optimiser, on the same clocks.
#
# ## Times that repeat
#
# Under `jit` and `vmap`, and in a sweep, a run that ends early, by `until=`, repeats its
# end in the arrays: their length can't depend on numbers. `sweep[i]` is without that. A run
# that fails has NaN after its end.
#
# ## How do I know that a result is right?
#
# `path.result` and what is printed say what the solver knows against it. `path.error(name)`
# measures the error of what was recorded ([error bars](how-to/errors.md)). Another solver is
# a word away: `solver=gf.RKC2()`. And an explicit solver of Diffrax's at its stability
# limit, which may be off by more than its tolerance, is called `unstable`.
#
# ## Is grokking weight decay alone?
#
# No. What is in the flow is what weight decay, or another penalty, does by itself. Noise,
# large steps and adaptive steps have [drifts](how-to/optimisers.md) of their own.
