# %% [markdown]
# # Layers with a state, dropout, tied weights
#
# A flow is of a function of the parameters that is the same at all times. Any Equinox
# model is such a function once what is random, or changes with the data, is held.
#
# ## CNN, RNN: a call of another kind
#
# `gf.SquaredError(x, y)` and its kin call the model on each sample, `jax.vmap(model)(x)`.
# Where that is not how yours is called, `predict` says how: a function of the model and
# all inputs. Convolutional networks (CNN) need none, if the model takes one image, with its
# channels first as in `eqx.nn.Conv2d`; nor do recurrent ones (RNN, GRU, LSTM), if it takes
# one sequence:

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

import gradflow as gf

gf.enable_float64()


class Recurrent(eqx.Module):
    cell: eqx.nn.GRUCell
    out: jax.Array

    def __call__(self, sequence):
        step = lambda h, x: (self.cell(x, h), None)
        return jax.lax.scan(step, jnp.zeros(6), sequence)[0] @ self.out


model = Recurrent(eqx.nn.GRUCell(2, 6, key=jr.key(0)), jr.normal(jr.key(1), (6,)))
x = jr.normal(jr.key(2), (12, 4, 2))
y = jnp.sin(x[:, 0, 0] + x[:, -1, 1])
run = dict(weight_decay=1e-3, t1=20.0)
print(gf.simulate(gf.GradientFlow(gf.SquaredError(x, y)), model, **run))

# %% [markdown]
# ## Dropout, and batch normalisation
#
# While they train, the first draws masks and the second carries averages on: neither is a
# flow. In inference mode they are functions, and the state is handed to `predict`. (What
# dropout does on average is a penalty, for which there is `gf.drifts.parameter_noise`
# with `relative=True`; see [drifts of optimisers](optimisers.md).)


# %%
class Normed(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    drop: eqx.nn.Dropout
    last: eqx.nn.Linear

    def __init__(self, key):
        one, two = jr.split(key)
        self.first = eqx.nn.Linear(8, 6, key=one)
        self.norm = eqx.nn.BatchNorm(6, axis_name="batch", mode="ema")
        self.drop = eqx.nn.Dropout(0.5)
        self.last = eqx.nn.Linear(6, "scalar", key=two)

    def __call__(self, x, state):
        h, state = self.norm(self.first(x), state)
        return self.last(self.drop(jnp.tanh(h))), state


normed, state = eqx.nn.make_with_state(Normed)(jr.key(3))
outputs = lambda model, x: jax.vmap(lambda one: model(one, state)[0])(x)
still = eqx.nn.inference_mode(normed)
loss = gf.SquaredError(x.reshape(12, 8), y, predict=outputs)
print(gf.simulate(gf.GradientFlow(loss), still, **run))

# %% [markdown]
# Batch normalisation by the statistics of all samples, as where each step sees all data,
# is a function of the parameters too: write it out in `predict`, where all samples are at
# hand. `eqx.nn.LayerNorm`, `GroupNorm` and `RMSNorm` need nothing.
#
# ## Tied weights
#
# One array that is used twice in `__call__` is one parameter. Two places that are to be
# one array are `eqx.nn.Shared`:


# %%
class Tied(eqx.Module):
    both: eqx.nn.Shared

    def __init__(self, key):
        one, two = jr.split(key)
        layers = eqx.nn.Linear(8, 3, key=one), eqx.nn.Linear(3, 8, key=two)
        where, get = lambda m: m[1].weight, lambda m: m[0].weight.T
        self.both = eqx.nn.Shared(layers, where, lambda m: get(m))

    def __call__(self, x):
        code, back = self.both()
        return back(jnp.tanh(code(x)))


tied = Tied(jr.key(4))
loss = gf.SquaredError(x.reshape(12, 8), x.reshape(12, 8))
path = gf.simulate(gf.GradientFlow(loss), tied, **run)
print(path)
code, back = path[-1].both()
print("still tied:", bool(jnp.all(code.weight.T == back.weight)))

# %% [markdown]
# ## What else is in a model
#
# - Whole numbers, functions and flags are no parameters. Arrays of floating point that are
#   not to be trained are [left out](frozen.md).
# - Parameters are of one precision, and real.
# - Data that the model holds as arrays count as parameters unless they are left out.
