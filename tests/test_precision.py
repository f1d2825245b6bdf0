"""Products of matrices in all digits, whatever JAX's default is on a device."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import gradflow as gf
from gradflow import manifold
from gradflow.flow.operations import operations

task = gf.tasks.diagonal_network(jr.key(0), samples=4, dim=6)
start = task.model
CALLS = {
    "simulate": lambda m: gf.simulate(task.flow, m, weight_decay=1e-2, t1=1.0).params,
    "limit_map": lambda m: manifold.limit_map(task.loss, m),
    "retract": lambda m: manifold.retract(task.loss, m),
    "spectrum": lambda m: manifold.spectrum(task.loss, m),
    "tangent_projection": lambda m: manifold.tangent_projection(task.loss, m, m),
    "riemannian_flow": lambda m: (
        manifold.riemannian_flow(task.flow, m, slow_time=1.0).params
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_products_in_all_digits(name):
    params, static = eqx.partition(start, eqx.is_inexact_array)

    def call(params):
        return eqx.filter(CALLS[name](eqx.combine(params, static)), eqx.is_array)

    with jax.default_matmul_precision("tensorfloat32"):
        program = jax.make_jaxpr(call)(params)
    products = [
        one.params["precision"]
        for one in operations(program)
        if one.primitive.name == "dot_general"
    ]
    highest = jax.lax.Precision.HIGHEST
    assert products
    assert all(found == (highest, highest) for found in products), set(products)
    plain = jax.make_jaxpr(lambda a: a @ a)(jnp.eye(2))
    assert all(one.params["precision"] is None for one in operations(plain))
