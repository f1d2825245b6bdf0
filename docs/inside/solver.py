# %% [markdown]
# # Add a solver
#
# Any solver of Diffrax's may be given as `solver=`, yours too: what a run asks beside its
# steps is then answered for it. A solver that knows it is a gradient flow that it solves
# answers for itself, as a `gradflow.solvers.AbstractFlowSolver`: where it begins, what of
# the tolerance it is to be given, what its steps took, and whether a run that came to its
# end is to be trusted. No other file needs to know it.
#
# As an example, Verwer's ROS2 (Verwer, Spee, Blom, Hundsdorfer, SIAM J. Sci. Comput. 20,
# 1999): a linearly implicit method of order 2 with two stages, which solve with one matrix,
# I − γhA, A = −(∇²F + λ∇²R), γ = 1 − 1/√2. It is L-stable, so steps may be as long as the
# drift allows; but it forms the Hessian, in every step.

# %%
from typing import ClassVar

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from diffrax import AbstractTerm, LocalLinearInterpolation
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import lu_factor, lu_solve

import gradflow as gf
from gradflow.solvers.base import AbstractOnParams, Followed

gf.enable_float64()


class ROS2(AbstractOnParams, diffrax.AbstractAdaptiveSolver):
    """Linearly implicit, of order 2, with the error of its first stage."""

    term_structure: ClassVar = AbstractTerm
    interpolation_cls: ClassVar = LocalLinearInterpolation

    # What Diffrax asks.

    def order(self, terms):
        return 2

    def init(self, terms, t0, t1, y0, args):
        return None  # nothing is carried from step to step

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        theta, unravel = ravel_pytree(y0)
        h, gamma = terms.contr(t0, t1), 1 - 0.5**0.5
        slope = lambda th: ravel_pytree(terms.vf(t0, unravel(th), args))[0]
        factor = lu_factor(jnp.eye(theta.size) - gamma * h * jax.jacfwd(slope)(theta))
        k1 = lu_solve(factor, slope(theta))
        k2 = lu_solve(factor, slope(theta + h * k1) - 2 * k1)
        y1 = unravel(theta + 1.5 * h * k1 + 0.5 * h * k2)
        error = unravel(0.5 * h * (k1 + k2))
        return y1, error, dict(y0=y0, y1=y1), None, diffrax.RESULTS.successful

    # What a run of a flow asks.

    differentiable: ClassVar[bool] = False
    sees_growth: ClassVar[bool] = False
    sees_jumps: ClassVar[bool] = False

    @property
    def name(self):
        return "ROS2"

    def follow(self, term, params, weight_decay):
        return Followed(self, term, params)

    def tolerance_share(self, rtol):
        return 0.1

    def work(self, term, state, end):
        return {}

    def reservation(self, saved):
        return gf.RESULTS.successful


task = gf.tasks.diagonal_network(jr.key(0), dim=10, samples=4)
flow = gf.GradientFlow(task.loss)
run = dict(weight_decay=1e-4, slow_time=3.0, saves=20)
exact = gf.simulate(flow, task.model, rtol=1e-10, solver=gf.KKT5(), **run)
print(gf.simulate(flow, task.model, rtol=1e-3, solver=ROS2(), **run))

# %% [markdown]
# It runs. Before it is used, its order is measured, against a solver of another kind at a
# tight tolerance:


# %%
def error(path):
    a, b = (
        np.stack([ravel_pytree(p[i])[0] for i in range(len(p))]) for p in (path, exact)
    )
    return np.max(np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1))


for rtol in (1e-2, 1e-3, 1e-4, 1e-5):
    path = gf.simulate(flow, task.model, rtol=rtol, solver=ROS2(), **run)
    print(f"rtol = {rtol:.0e}: {path.stats.steps} steps, error {error(path):.1e}")

# %% [markdown]
# The error of the path falls with `rtol`, and stays near to it: for that a step is given a
# tenth of it, by `tolerance_share`. With all of it errors were up to eleven times `rtol`.
#
# ## What the answers are for
#
# | | asked for |
# | --- | --- |
# | `follow` | a `Followed`: the Diffrax solver that makes the steps, the term, and the state at the start. KKT solvers carry the multiplier of the data beside the parameters. |
# | `coordinates`, `params_of`, `points` | what in such a state the tolerance is for, where the parameters are, and over which of them metrics are averaged. With `AbstractOnParams` the state is the parameters. |
# | `loss_of`, `gradient_of` | F and ∇F in a state: KKT solvers know them better than a call of the loss does |
# | `controlled` | the controller of the steps, or one around it that ends steps early |
# | `tolerance_share` | the part of `rtol` that a step is given, so that the path is within it |
# | `work` | what steps took beside their number, for `path.stats`: `iterations`, `evaluations`, … |
# | `reservation` | `successful`, or why a run that reached its end is not to be trusted, as `unstable` |
# | `sees_growth`, `sees_jumps` | whether its estimate counts errors for more that later steps do not damp, and sees jumps of the curvature; where not, the controller takes care of it |
# | `differentiable` | whether Diffrax's adjoints lead through its steps |
#
# ## For a solver of gradflow's own
#
# One solver is one file of `gradflow/solvers`; `rkc.py` is the shortest that has all answers
# of its own, and `gradflow/solvers/choose.py` holds the estimates of cost by which one is
# taken where none is named. Tests compare with closed forms (linear regression by
# eigenvectors, the invariants of the diagonal network), with another library at a tight
# tolerance, and measure the order: `tests/test_solvers.py` has the pattern. And
# `benchmarks/stiff_cases.py` counts steps beside SciPy's.
