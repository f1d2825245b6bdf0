# %% [markdown]
# # ReLU networks
#
# Where a unit of a ReLU network meets a sample ∇F jumps. The flow may cross such a kink,
# or slide along it, where both sides push towards it: there it is a differential inclusion.
# `KKT4` sees where ∇F jumps and slides; the result is then `slid`, a success with a
# reservation: each such step is exact to about 10⁻³.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

import gradflow as gf

gf.enable_float64()

x = jnp.linspace(-1, 1, 9)[:, None]
loss = gf.SquaredError(x, jnp.abs(x[:, 0] - 0.2))


def network(activation):
    return eqx.nn.MLP(1, "scalar", 20, 1, activation, key=jr.key(0))


run = dict(weight_decay=1e-3, slow_time=2.0, rtol=1e-3, solver=gf.KKT4())
sharp = gf.simulate(gf.GradientFlow(loss), network(jax.nn.relu), **run)
print(sharp)

# %% [markdown]
# A smooth unit that is near to a ReLU gives the digits back, for fewer steps:

# %%
smooth = lambda u: jax.nn.softplus(10 * u) / 10
soft = gf.simulate(gf.GradientFlow(loss), network(smooth), **run)
print(soft)

# %% [markdown]
# What to expect of kinks:
#
# - `rtol=1e-2` or `1e-3` is what can be had: paths from starts that are close differ by
#   percents, in gradient descent too. Asking for more takes steps and gives no digits.
# - Explicit solvers do not see kinks; they take small steps there, and say nothing. RKC2
#   tells a jump from an error of its own, and takes far fewer.
# - `gf.manifold.kink_crossings` counts along a path which samples cross the kink of which
#   unit.
# - Theory does not hold across kinks. A drift that meets one is `slid` as well.
# - GELU, SiLU, tanh, softplus and erf have none. Max-pooling and `jnp.abs` have.
