"""Functions of logits, with derivatives that have all digits.

An error p − 1 of a class that is all but certain cannot be told from zero; the sum of
the other probabilities can. So these have derivatives of their own, right to all
digits, whatever the logits: of the first, the second and the third order.
"""

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float


@jax.custom_jvp
def sigmoid(z: Array) -> Array:
    """1/(1 + e⁻ᶻ)."""
    return jax.nn.sigmoid(z)


@sigmoid.defjvp
def _sigmoid_jvp(primals, tangents):
    (z,), (dz,) = primals, tangents
    p = sigmoid(z)
    return p, p * sigmoid(-z) * dz


@jax.custom_jvp
def logistic(z: Array, y: Array) -> Array:
    """log(1 + eᶻ) − yz, for 0 ≤ y ≤ 1, each."""
    return y * jax.nn.softplus(-z) + (1 - y) * jax.nn.softplus(z)


@logistic.defjvp
def _logistic_jvp(primals, tangents):
    (z, y), (dz, dy) = primals, tangents
    # p − y. Near z = 0 it may be far smaller than p and y are, too.
    far = (1 - y) * sigmoid(z) - y * sigmoid(-z)
    near = 0.5 * jnp.tanh(0.5 * z) + (0.5 - y)
    slope = jnp.where(jnp.abs(z) < 1, near, far)
    return logistic(z, y), slope * dz - z * dy


def logistic_from(slopes: Array, z: Array, y: Array) -> Array:
    """`logistic`, where its `slopes` p − y are known better than z: where y is 0 or 1
    it is −log(1 − |p − y|)."""
    miss = jnp.where(y == 1, -slopes, slopes)
    hard = (y == 0) | (y == 1)
    return from_miss(jnp.where(hard, miss, 0), logistic(z, y))


@jax.custom_jvp
def softmax(z: Float[Array, "n k"]) -> Float[Array, "n k"]:
    """That of each row."""
    return jax.nn.softmax(z)


@softmax.defjvp
def _softmax_jvp(primals, tangents):
    (z,), (dz,) = primals, tangents
    p = softmax(z)
    return p, _softmax_change(p, dz)


def _softmax_change(p: Float[Array, "n k"], v: Float[Array, "n k"]) -> Array:
    """(diag p − ppᵀ)v, of each sample. Only differences of v count: those to its value
    at the largest p leave nothing there that cancels."""
    v = v - jnp.sum(jnp.where(_largest(p), v, 0), axis=1, keepdims=True)
    return p * (v - jnp.sum(p * v, axis=1, keepdims=True))


def _largest(x: Float[Array, "n k"]) -> Bool[Array, "n k"]:
    """Where the largest number of each row is, the first of them."""
    return jnp.argmax(x, axis=1, keepdims=True) == jnp.arange(x.shape[1])[None]


@jax.custom_jvp
def _misses(z: Float[Array, "n k"], q: Float[Array, "n k"]) -> Float[Array, "n k"]:
    """softmax(z) − q, for rows q of probabilities: where q = 1, minus the sum of the
    other softmax(z)."""
    p = softmax(z)
    first = _largest(p)
    others = jnp.sum(jnp.where(first, 0, p), axis=1, keepdims=True)
    rest = jnp.where(first, others, 1 - p)
    return (1 - q) * p - q * rest


@_misses.defjvp
def _misses_jvp(primals, tangents):
    (z, q), (dz, dq) = primals, tangents
    return _misses(z, q), _softmax_change(softmax(z), dz) - dq


@jax.custom_jvp
def entropy(z: Float[Array, "n k"], q: Float[Array, "n k"]) -> Float[Array, " n"]:
    """−Σⱼ qⱼ log softmax(z)ⱼ, for rows q of probabilities."""
    first = _largest(q)
    label = jnp.sum(jnp.where(first, z, 0), axis=1)
    others = jax.nn.logsumexp(jnp.where(first, -jnp.inf, z), axis=1)
    away = jnp.where((q > 0) & ~first, q * (label[:, None] - z), 0)
    return jax.nn.softplus(others - label) + jnp.sum(away, axis=1)


def _entropy_jvp(primals, tangents):
    (z, q), (dz, dq) = primals, tangents
    change = jnp.zeros_like(z[:, 0])
    if not isinstance(dz, SymbolicZero):
        change = change + jnp.sum(_misses(z, q) * dz, axis=1)
    if not isinstance(dq, SymbolicZero):  # labels that are numbers
        change = change - jnp.sum(jax.nn.log_softmax(z) * dq, axis=1)
    return entropy(z, q), change


entropy.defjvp(_entropy_jvp, symbolic_zeros=True)


def from_miss(miss: Float[Array, " n"], plain: Float[Array, " n"]) -> Array:
    """−log(1 − miss) where the miss of a right class is known, else `plain`."""
    known = (miss > 0) & (miss < 0.5)
    return jnp.where(known, -jnp.log1p(-jnp.where(known, miss, 0)), plain)
