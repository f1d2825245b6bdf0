# %% [markdown]
# # Plain Diffrax
#
# The flow is a Diffrax term, and the solvers are Diffrax solvers: everything that
# `diffrax.diffeqsolve` offers is there.

# %%
import diffrax
import jax.numpy as jnp
import jax.random as jr

import gradflow as gf

gf.enable_float64()

task = gf.tasks.diagonal_network(jr.key(0), dim=40, samples=12)
term, params = gf.GradientFlow(task.loss).term(task.model)
solution = diffrax.diffeqsolve(
    term, gf.KKT4(), t0=0.0, t1=1e4, dt0=None, y0=params, args=1e-3,
    stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-8),
    saveat=diffrax.SaveAt(ts=jnp.geomspace(1.0, 1e4, 5)),
)  # fmt: skip
print(solution.stats["num_steps"], solution.result)

# %% [markdown]
# `RESULTS<>` is Diffrax's way to print success: the message of that result is empty.
#
# `term.model(y)` is the model at a state y. With `rates`, or a norm that is held, states
# are other coordinates of the parameters, and that call is what leads back.
#
# What you give up: the tolerance relative to the current ‖θ‖, the verdict of the solver on
# itself, saved times that are landed on (Diffrax interpolates, and leaves the manifold
# between its steps), the train loss through the multiplier, and the choice of a solver.
#
# ## A solver of Diffrax's in gradflow
#
# Any can be given as `solver=`, and then runs in gradflow's own loop.

# %%
path = gf.simulate(
    gf.GradientFlow(task.loss), task.model, weight_decay=1e-1, slow_time=1.0,
    solver=diffrax.Dopri8(),
)  # fmt: skip
print(path)

# %% [markdown]
# ## Derivatives of a path
#
# They lead through Diffrax's own solvers: `jax.grad` by default with checkpoints,
# `adjoint=diffrax.ForwardMode()` for `jax.jvp`.

# %%
import jax


def end_loss(decay):
    path = gf.simulate(
        gf.GradientFlow(task.loss), task.model, weight_decay=decay, t1=5.0,
        solver=diffrax.Tsit5(), rtol=1e-8, saves=3,
    )  # fmt: skip
    return path.train_loss[-1]


slope = jax.grad(end_loss)(1e-1)
difference = (end_loss(1.01e-1) - end_loss(0.99e-1)) / 2e-3
print(f"dF/dλ = {float(slope):.6f}, by a difference {float(difference):.6f}")

# %% [markdown]
# The limit map has a derivative of its own, by the implicit function theorem, whatever
# solver found the limit: `jax.grad` of `gf.manifold.limit_map`.
