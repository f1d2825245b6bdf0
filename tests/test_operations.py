"""The counted operations of programs."""

import jax
import jax.numpy as jnp

from gradflow.flow.operations import price


def test_price():
    matrix, vector = jnp.ones((3, 5)), jnp.ones(5)
    product = price(lambda a, b: a @ b, matrix, vector)
    assert product == 2 * 3 * 5
    assert price(lambda a: jnp.tanh(a) + 1, matrix) == 2 * 15

    def loop(b):
        return jax.lax.scan(lambda c, _: (jnp.ones((5, 5)) @ c, None), b, length=7)[0]

    assert 7 * 50 <= price(loop, vector) <= 7 * 75

    def branch(a, b):
        return jax.lax.cond(b[0] > 0, lambda: a @ b, lambda: jnp.zeros(3))

    assert product <= price(branch, matrix, vector) <= product + 4
    image, kernel = jnp.ones((1, 2, 8)), jnp.ones((4, 2, 3))

    def convolve(x, k):
        return jax.lax.conv_general_dilated(x, k, (1,), "VALID")

    assert price(convolve, image, kernel) == 2 * (4 * 6) * (2 * 3)
    assert price(jax.jit(convolve), image, kernel) == 2 * (4 * 6) * (2 * 3)
