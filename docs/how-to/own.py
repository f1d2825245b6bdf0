# %% [markdown]
# # Your own loss, metric or task
#
# ## Models with more than arrays
#
# `gf.SquaredError(x, y)` calls the model on each sample, `jax.vmap(model)(x)`. Where
# that is not how yours is called, `predict` says how: a function of the model and all
# inputs.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

import gradflow as gf

gf.enable_float64()

cell = eqx.nn.GRUCell(2, 8, key=jr.key(0))


class Recurrent(eqx.Module):
    cell: eqx.nn.GRUCell
    out: jax.Array

    def __call__(self, sequence):
        step = lambda h, x: (self.cell(x, h), None)
        return jax.lax.scan(step, jnp.zeros(8), sequence)[0] @ self.out


model = Recurrent(cell, jr.normal(jr.key(1), (8,)))
x = jr.normal(jr.key(2), (20, 5, 2))
loss = gf.SquaredError(x, jnp.sin(x[:, 0, 0] + x[:, -1, 1]))
flow = gf.GradientFlow(loss)
print(gf.simulate(flow, model, weight_decay=1e-3, t1=100.0))

# %% [markdown]
# Dropout, and layers with a state such as batch normalisation, make no flow while they
# train: put the model into inference mode, and hand the state on.


# %%
class Normed(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    drop: eqx.nn.Dropout
    last: eqx.nn.Linear

    def __init__(self, key):
        one, two = jr.split(key)
        self.first = eqx.nn.Linear(10, 6, key=one)
        self.norm = eqx.nn.BatchNorm(6, axis_name="batch", mode="ema")
        self.drop = eqx.nn.Dropout(0.5)
        self.last = eqx.nn.Linear(6, "scalar", key=two)

    def __call__(self, x, state):
        h, state = self.norm(self.first(x), state)
        return self.last(self.drop(jnp.tanh(h))), state


normed, state = eqx.nn.make_with_state(Normed)(jr.key(3))
outputs = lambda model, x: jax.vmap(lambda one: model(one, state)[0])(x)
still = eqx.nn.inference_mode(normed)
frozen = gf.SquaredError(x.reshape(20, 10), loss.y, predict=outputs)
print(gf.simulate(gf.GradientFlow(frozen), still, weight_decay=1e-3, t1=10.0))

# %% [markdown]
# Tied weights: `eqx.nn.Shared`, or one array used twice in `__call__`.
#
# ## A composite loss
#
# F(θ) = Σ ℓ(zᵢ(θ)), ℓ convex: tell the outputs z and ℓ, and the stiff solvers and the
# theory know the rest.


# %%
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


other = gf.GradientFlow(LogCosh(x, loss.y))
print(gf.simulate(other, model, weight_decay=1e-3, t1=100.0))

# %% [markdown]
# Any other scalar function of the model is `gf.Loss(fn)`: up to 5000 parameters its
# Hessian is formed, beyond that an explicit solver is taken.
#
# ## Metrics
#
# A function of the model that gives a number or an array; `gf.Metric` adds a threshold.
# `gf.metrics` has accuracy, margin, norms, singular values, effective rank, sharpness.

# %%
watch = {
    "test": gf.Metric(loss, threshold=1e-3),
    "spectrum": gf.metrics.SingularValues(where=lambda m: m.cell.weight_hh),
}
path = gf.simulate(flow, model, weight_decay=1e-3, t1=100.0, metrics=watch)
print(path.metrics["spectrum"].shape)

# %% [markdown]
# ## A task
#
# A `gf.tasks.Task` is data, an initial model, a loss, metrics and what is known of the
# truth, in one; `gf.sweep` takes a function that gives one. Yours is
# `gf.tasks.Task(loss=..., model=..., metrics=..., truth=...)`.
#
# ## A solver
#
# Any solver of Diffrax's may be given as `solver=`. See [plain Diffrax](plain_diffrax.md).
