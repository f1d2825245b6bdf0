"""Losses of infinitely many samples: against quadrature, and a student's flow."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from numpy.testing import assert_allclose
from scipy.special import erf

import gradflow as gf
from gradflow.flow.flat import flatten
from gradflow.flow.nonsmooth import may_have_kinks
from gradflow.models import TwoLayer

INPUTS = 2


def network(seed, width, *outputs, inputs=INPUTS, size=1.0):
    one, two = jr.split(jr.key(seed))
    inner = size * jr.normal(one, (width, inputs))
    return TwoLayer(inner, None, jr.normal(two, (*outputs, width)), "erf")


def by_scipy(model, x):
    """The outputs of each sample, (n, k), by an erf that is not JAX's."""
    hidden = erf(x @ np.asarray(model.inner).T / np.sqrt(2))
    return (hidden @ np.asarray(model.outer).T).reshape(len(x), -1)


def by_quadrature(student, teacher):
    """½ E‖f − f*‖², by the product rule of Gauss and Hermite."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    x = np.stack(np.meshgrid(nodes, nodes), axis=-1).reshape(-1, INPUTS)
    w = np.outer(weights, weights).reshape(-1) / weights.sum() ** 2
    miss = by_scipy(student, x) - by_scipy(teacher, x)
    return 0.5 * w @ np.sum(miss**2, axis=1)


@pytest.mark.parametrize("outputs", [(), (3,)])
def test_by_quadrature(outputs):
    teacher, student = network(0, 3, *outputs), network(1, 5, *outputs)
    found = gf.PopulationError(teacher)(student)
    assert_allclose(found, by_quadrature(student, teacher), rtol=1e-6)
    x = jr.normal(jr.key(2), (5, INPUTS))
    outputs_of = jax.vmap(student)(x).reshape(5, -1)
    assert_allclose(outputs_of, by_scipy(student, np.asarray(x)), rtol=1e-12)


value_and_grad = jax.jit(
    lambda model, teacher: jax.value_and_grad(gf.PopulationError(teacher))(model)
)


def differences(model, teacher, step=1e-5):
    """∇F by central differences."""
    theta, unravel = ravel_pytree(model)
    F = lambda theta: float(value_and_grad(unravel(theta), teacher)[0])
    pairs = [(F(theta + e), F(theta - e)) for e in step * np.eye(theta.size)]
    return np.array([(one - two) / (2 * step) for one, two in pairs])


@pytest.mark.parametrize("kind", ["apart", "aligned", "twins", "zero"])
def test_the_gradient_is_finite_and_right(kind):
    teacher = network(0, 4)
    student = {
        "apart": network(1, 4),
        # As the teacher's, and a multiple: arcsin near its ends.
        "aligned": TwoLayer(50 * teacher.inner, None, teacher.outer, "erf"),
        "twins": TwoLayer(
            jnp.tile(teacher.inner[:1], (4, 1)), None, teacher.outer, "erf"
        ),
        "zero": TwoLayer(jnp.zeros((4, INPUTS)), None, teacher.outer, "erf"),
    }[kind]
    _, grad = value_and_grad(student, teacher)
    found, _ = ravel_pytree(grad)
    assert_allclose(found, differences(student, teacher), atol=1e-8)
    assert np.abs(found).max() > 1e-3


def test_at_the_teacher_itself():
    """There F and ∇F are zero, and no curvature is negative."""
    teacher = network(0, 4)
    value, grad = value_and_grad(teacher, teacher)
    assert_allclose(value, 0, atol=1e-14)
    assert_allclose(ravel_pytree(grad)[0], 0, atol=1e-14)
    theta, unravel = ravel_pytree(teacher)
    loss = gf.PopulationError(teacher)
    hessian = jax.hessian(lambda theta: loss(unravel(theta)))(theta)
    assert np.linalg.eigvalsh(hessian).min() > -1e-10


def test_aligned_and_huge():
    """Units that are signs, all but; rounding makes cosines of more than one."""
    teacher = network(0, 20, inputs=30, size=1e9)
    student = TwoLayer(1.7 * teacher.inner, None, teacher.outer, "erf")
    value, grad = value_and_grad(student, teacher)
    assert_allclose(value, 0, atol=1e-6)  # √eps
    assert_allclose(ravel_pytree(grad)[0], 0, atol=1e-6)


def test_a_student_of_samples():
    """F, a metric, is the mean over samples in the limit of many; and has no kinks."""
    teacher, student = network(0, 2), network(1, 2)
    loss = gf.PopulationError(teacher)
    x = jr.normal(jr.key(2), (100_000, INPUTS))
    sampled = gf.SquaredError(x, jax.vmap(teacher)(x))
    value, grad = jax.value_and_grad(sampled)(student)
    exact, exact_grad = value_and_grad(student, teacher)
    assert_allclose(value, exact, rtol=0.02)
    assert_allclose(
        ravel_pytree(grad)[0], ravel_pytree(exact_grad)[0], rtol=0.05, atol=0.01
    )
    theta, flat = flatten(loss, *eqx.partition(student, eqx.is_array))
    assert not may_have_kinks(flat, theta)


def test_float32():
    """Aligned and large, in few digits."""
    cast = functools.partial(jax.tree.map, lambda x: x.astype(jnp.float32))
    teacher, student = network(0, 4, size=300.0), network(0, 4, size=200.0)
    exact, _ = value_and_grad(student, teacher)
    found, grad = value_and_grad(cast(student), cast(teacher))
    assert found.dtype == jnp.float32
    assert_allclose(found, exact, atol=1e-4)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grad))


WRONG = [
    (
        lambda t: gf.PopulationError(TwoLayer(t.inner, None, t.outer)),
        "^teacher: .*tanh",
    ),
    (
        lambda t: gf.PopulationError(
            TwoLayer(t.inner, jnp.zeros(3), t.outer, activation="erf")
        ),
        "^teacher: expected .* with biases",
    ),
    (
        lambda t: gf.PopulationError(TwoLayer(jnp.nan * t.inner, None, t.outer, "erf")),
        "^teacher: holds a NaN",
    ),
    (lambda t: gf.PopulationError(t)(t.inner), "^model: expected a gradflow.*array"),
    (
        lambda t: gf.PopulationError(t)(network(1, 4, inputs=3)),
        "^model: expected 2 inputs.* got 3",
    ),
    (lambda t: gf.PopulationError(t)(network(1, 4, 2)), r"^model: .* \(2,\)"),
]


@pytest.mark.parametrize(("make", "told"), WRONG)
def test_wrong_networks(make, told):
    with pytest.raises(ValueError, match=told):
        make(network(0, 3))
