# %% [markdown]
# # Your own loss, penalty, metric, solver, task
#
# Models need nothing: any Equinox module will do, and [layers with a
# state](layers.md) have a page of their own.
#
# ## A loss
#
# If it is ℓ(z(θ)), outputs z on all data and a convex ℓ of them, say so: the stiff solvers
# and the theory use that structure. `outputs` gives one vector of m numbers.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

import gradflow as gf

gf.enable_float64()


class LogCosh(gf.AbstractCompositeLoss):
    """mean log cosh(f(x) − y)."""

    x: jax.Array
    y: jax.Array

    def outputs(self, model):
        return jax.vmap(model)(self.x)

    def outer(self, z):
        return jnp.mean(jnp.logaddexp(z - self.y, self.y - z) - jnp.log(2.0))

    @property
    def outer_curvature(self):
        return None  # ℓ'' is no multiple of the identity


x = jr.normal(jr.key(0), (12, 3))
y = jnp.tanh(x @ jnp.array([1.0, -2.0, 0.5]))
model = eqx.nn.MLP(3, "scalar", 16, 1, jnp.tanh, key=jr.key(1))
flow = gf.GradientFlow(LogCosh(x, y))
print(gf.simulate(flow, model, weight_decay=1e-3, slow_time=1.0))

# %% [markdown]
# Any other scalar function of the model is `gf.Loss(fn)`, at a price: up to 5000
# parameters its Hessian is formed, beyond that an explicit solver is taken. So a
# physics-informed loss is better written by its residuals; the
# [gallery](../gallery/physics_informed.md) has one.

# %%
opaque = gf.Loss(lambda model: jnp.mean(jnp.abs(jax.vmap(model)(x) - y) ** 3))
path = gf.simulate(gf.GradientFlow(opaque), model, weight_decay=1e-2, slow_time=1.0)
print(path)

# %% [markdown]
# ## A penalty
#
# One that is smooth has a value and a gradient, of the parameters: a pytree like the
# model, with `None` for what is not trained. A stiff one tells its curvature, as an
# `AbstractCurved`. More in [another penalty](penalties.md).


# %%
class Quartic(gf.AbstractPenalty):
    """¼ Σ θ⁴."""

    def __call__(self, params):
        return sum(jnp.sum(p**4) for p in jax.tree.leaves(params)) / 4

    def gradient(self, params):
        return jax.tree.map(lambda p: p**3, params)


flow = gf.GradientFlow(gf.SquaredError(x, y), penalty=Quartic())
print(gf.simulate(flow, model, weight_decay=1e-3, slow_time=1.0))

# %% [markdown]
# ## A metric
#
# A function of the model that gives a number or an array; `gf.Metric` adds a threshold,
# from which come memorisation and grokking times. `gf.Accuracy` knows that it
# passes from below; a function of your own that does has to be told so, or it is past its
# threshold at t = 0: `gf.Metric(f, threshold=0.9, higher_is_better=True)`. `gf.metrics`
# has margin, norms, singular values, effective rank and sharpness too.

# %%
x_test = jr.normal(jr.key(2), (200, 3))
y_test = jnp.tanh(x_test @ jnp.array([1.0, -2.0, 0.5]))
watch = {
    "test": gf.Metric(gf.SquaredError(x_test, y_test), threshold=0.2),
    "first layer": lambda m: jnp.linalg.norm(m.layers[0].weight, axis=1),
}
flow = gf.GradientFlow(gf.SquaredError(x, y))
path = gf.simulate(flow, model, weight_decay=1e-3, slow_time=1.0, metrics=watch)
print(path.metrics["first layer"].shape, f"{path.crossing_time('test'):.4g}")

# %% [markdown]
# Make the function once: one that is made anew in each call, such as a lambda in a loop, is
# a new program in each call.
#
# ## A task
#
# A task is all of it together, and what is known of the truth. `gf.sweep` takes a function
# that gives one; or one that gives a flow and a model, or these and metrics.


# %%
def task(seed, width=16):
    model = eqx.nn.MLP(3, "scalar", width, 1, jnp.tanh, key=jr.key(seed))
    loss = gf.SquaredError(x, y)
    metrics = {"train": gf.Metric(loss, threshold=1e-3), "test": watch["test"]}
    return gf.tasks.Task(
        name="mine", model=model, loss=loss, metrics=metrics, truth=None,
        codimension=12, slow_time=1.0,
    )  # fmt: skip


sweep = gf.sweep(task, axes={"seed": range(2)}, weight_decay=jnp.array([1e-2, 1e-3]))
print(sweep.crossing_time("test"))

# %% [markdown]
# ## A solver
#
# Any solver of Diffrax's may be given as `solver=`; see [plain Diffrax](plain_diffrax.md).
# One that answers for itself, with its own verdict and counts: [how to add a
# solver](../inside/solver.md).
