"""Small models and losses whose critical manifolds are known in closed form, and
paths that do not depend on gradflow's solvers."""

import contextlib

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import monitoring
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from scipy.integrate import solve_ivp

import gradflow as gf


@contextlib.contextmanager
def compiled():
    """The names of the programs that are compiled inside."""
    names = []

    def note(event, seconds, **told):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(told.get("fun_name"))

    monitoring.register_event_duration_secs_listener(note)
    try:
        yield names
    finally:
        monitoring.unregister_event_duration_listener(note)


def first_of(problems):
    """The parameters of a fixture: the first of some problems, and the others, slow."""
    first, *others = problems
    return [first, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]


class Linear(eqx.Module):
    """f(x) = ⟨w, x⟩."""

    w: Float[Array, " d"]

    def __call__(self, x):
        return x @ self.w


class Diagonal(eqx.Module):
    """f(x) = ⟨u⊙u − v⊙v, x⟩; u⊙v is conserved by every flow without weight decay."""

    u: Float[Array, " d"]
    v: Float[Array, " d"]

    def __call__(self, x):
        return x @ (self.u**2 - self.v**2)


class Product(eqx.Module):
    """f(x) = u v x, two scalars; u² − v² is conserved without weight decay."""

    u: Float[Array, ""]
    v: Float[Array, ""]

    def __call__(self, x):
        return self.u * self.v * x


def linear_problem(key, *, samples, features):
    """A linear model and the squared error of `samples` equations in `features`
    unknowns."""
    kx, ky, kw = jr.split(key, 3)
    loss = gf.SquaredError(
        jr.normal(kx, (samples, features)), jr.normal(ky, (samples,))
    )
    return loss, Linear(jr.normal(kw, (features,)))


def diagonal_problem(key, *, samples, features, nonzero=2):
    """The network ⟨u² − v², x⟩ with a teacher of `nonzero` coefficients."""
    kx, ku, kv = jr.split(key, 3)
    x = jr.normal(kx, (samples, features))
    y = x[:, :nonzero].sum(axis=1)
    model = Diagonal(jr.normal(ku, (features,)), jr.normal(kv, (features,)))
    return gf.SquaredError(x, y), model


def flat_paths(path):
    """The parameters of a path, one vector a time."""
    return np.asarray(jax.vmap(lambda p: ravel_pytree(p)[0])(path.params))


def sup_error(theta, reference):
    """The supremum over times of ‖θ − θ*‖/‖θ*‖."""
    error = np.linalg.norm(theta - reference, axis=1)
    return (error / np.linalg.norm(reference, axis=1)).max()


def radau_path(task, weight_decay, ts):
    """The path by SciPy's Radau, rtol 1e-11 and atol 1e-13, with the jitted gradient
    and the dense jitted Hessian.

    **Returns:** the parameters, one vector a time, and the number of evaluations.
    """
    theta, unravel = ravel_pytree(task.model)
    loss = lambda th: task.loss(unravel(th))
    gradient, hessian = jax.jit(jax.grad(loss)), jax.jit(jax.hessian(loss))
    eye = np.eye(theta.size)
    solution = solve_ivp(
        lambda t, th: -np.asarray(gradient(jnp.asarray(th))) - weight_decay * th,
        (0.0, ts[-1]),
        np.asarray(theta),
        method="Radau",
        jac=lambda t, th: -np.asarray(hessian(jnp.asarray(th))) - weight_decay * eye,
        t_eval=ts,
        rtol=1e-11,
        atol=1e-13,
    )
    assert solution.success
    return solution.y.T, solution.nfev


def flat(tree):
    return ravel_pytree(eqx.filter(tree, eqx.is_inexact_array))[0]


def random_like(key, tree):
    vector, unravel = ravel_pytree(eqx.filter(tree, eqx.is_inexact_array))
    return unravel(jr.normal(key, vector.shape))


def overdetermined(key):
    """20 noisy samples of 6 features that span 4 dimensions."""
    kx, ky, kw = jr.split(key, 3)
    x = jr.normal(kx, (20, 4))
    x = jnp.concatenate([x, x[:, :2]], axis=1)
    loss = gf.SquaredError(x, jr.normal(ky, (20,)))
    return loss, Linear(jr.normal(kw, (6,))), jnp.linalg.pinv(x)
