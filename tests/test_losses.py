"""Losses and penalties against NumPy, and their derivatives against dense Jacobians."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from numpy.testing import assert_allclose

import gradflow as gf
from gradflow.models import MatrixFactorisation, TwoLayer
from gradflow.tasks._matrix_completion import entries

SAMPLES, INPUTS, WIDTH, OUTPUTS = 7, 3, 5, 4


def network(key, outputs=OUTPUTS):
    keys = jr.split(key, 3)
    return TwoLayer(
        jr.normal(keys[0], (WIDTH, INPUTS)),
        jr.normal(keys[1], (WIDTH,)),
        jr.normal(keys[2], (outputs, WIDTH)),
    )


def forward(theta, x):
    """The outputs of `network`, written anew for a vector of parameters."""
    inner, bias, outer = jnp.split(theta, [WIDTH * INPUTS, WIDTH * (INPUTS + 1)])
    hidden = jnp.tanh(x @ inner.reshape(WIDTH, INPUTS).T + bias[None])
    return (hidden @ outer.reshape(-1, WIDTH).T).reshape(-1)


def softmax(z):
    weights = np.exp(z - z.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.fixture
def setting(getkey):
    x = jr.normal(getkey(), (SAMPLES, INPUTS))
    y = jr.normal(getkey(), (SAMPLES, OUTPUTS))
    labels = jr.randint(getkey(), (SAMPLES,), 0, OUTPUTS)
    return network(getkey()), x, y, labels


def composite(kind, x, y, labels):
    if kind == "entropy":
        return gf.CrossEntropy(x, labels)
    return gf.SquaredError(x, y, reduction=kind)


KINDS = ["mean", "sum", "entropy"]


def outputs_of(model, x):
    return np.asarray(forward(ravel_pytree(model)[0], x)).reshape(SAMPLES, -1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_squared_error(setting, reduction):
    model, x, y, _ = setting
    loss = gf.SquaredError(x, y, reduction=reduction)
    error = outputs_of(model, x) - np.asarray(y)
    count = SAMPLES if reduction == "mean" else 1
    assert_allclose(loss(model), 0.5 * (error**2).sum() / count, rtol=1e-13)
    assert_allclose(loss.residuals(model), error.ravel() / count, rtol=1e-11)
    assert_allclose(loss.outputs(model), outputs_of(model, x).ravel(), rtol=1e-12)
    curvature = np.asarray(jax.hessian(loss.outer)(loss.outputs(model)))
    assert_allclose(curvature, loss.outer_curvature * np.eye(error.size), atol=1e-15)


def test_squared_error_is_the_mean_unless_asked(setting):
    model, x, y, _ = setting
    ratio = gf.SquaredError(x, y, reduction="sum")(model) / gf.SquaredError(x, y)(model)
    assert_allclose(ratio, SAMPLES, rtol=1e-13)


def test_cross_entropy(setting):
    model, x, _, labels = setting
    loss = gf.CrossEntropy(x, labels)
    p, each = softmax(outputs_of(model, x)), np.asarray(labels)
    expected = -np.log(p[np.arange(SAMPLES), each]).mean()
    assert_allclose(loss(model), expected, rtol=1e-13)
    residuals = (p - np.eye(OUTPUTS)[each]) / SAMPLES
    assert_allclose(loss.residuals(model), residuals.ravel(), rtol=1e-11, atol=1e-15)
    assert loss.outer_curvature is None


def test_cross_entropy_of_large_logits_is_finite():
    loss = gf.CrossEntropy(
        jnp.eye(2), jnp.array([0, 0]), predict=lambda model, x: model * x
    )
    assert_allclose(loss(jnp.asarray(1e4)), 5e3, rtol=1e-12)


def test_huber(setting):
    model, x, y, _ = setting
    r = np.asarray(jax.vmap(model)(x) - y)
    each = np.where(np.abs(r) <= 0.3, 0.5 * r**2, 0.3 * (np.abs(r) - 0.15))
    assert (np.abs(r) > 0.3).any() and (np.abs(r) < 0.3).any()
    loss = gf.Huber(x, y, delta=0.3)
    assert_allclose(loss(model), each.sum() / SAMPLES, rtol=1e-13)
    assert_allclose(gf.Huber(x, y, delta=0.3, reduction="sum")(model), each.sum())
    slope = np.clip(r, -0.3, 0.3).reshape(-1) / SAMPLES
    assert_allclose(loss.residuals(model), slope, atol=1e-15)


@pytest.mark.parametrize("whole", [True, False])
def test_logistic(setting, whole):
    model, x, y, _ = setting
    y = jnp.asarray(y > 0) if whole else jax.nn.sigmoid(y)
    z, target = np.asarray(jax.vmap(model)(x)), np.asarray(y, float)
    p = 1 / (1 + np.exp(-z))
    each = -target * np.log(p) - (1 - target) * np.log(1 - p)
    loss = gf.Logistic(x, y)
    assert_allclose(loss(model), each.sum() / SAMPLES, rtol=1e-12)
    slope = (p - target).reshape(-1) / SAMPLES
    assert_allclose(loss.residuals(model), slope, atol=1e-15)
    assert_allclose(gf.Logistic(x, y, reduction="sum")(model), each.sum())


@pytest.mark.slow
@pytest.mark.parametrize("n", range(1, 41))
def test_each_loss_is_a_plain_sum(n):
    """Of every length, with each reduction; and so are its residuals."""
    r = np.random.default_rng(n)
    z, y = r.normal(size=(2, n, 3)) * 2
    labels, soft = r.integers(0, 3, n), 1 / (1 + np.exp(-y))
    inside = np.clip(z - y, -0.7, 0.7)
    p, q = 1 / (1 + np.exp(-z)), softmax(z)
    hits = q[np.arange(n), labels]
    plain = [  # the values, and their derivatives
        (0.5 * (z - y) ** 2, z - y),
        (inside * (z - y - inside / 2), inside),
        (-soft * np.log(p) - (1 - soft) * np.log(1 - p), p - soft),
    ]
    expected = [
        (c * a.sum(), c * b.ravel()) for a, b in plain for c in (1 / n, 1.0)
    ] + [(-np.log(hits).mean(), (q - np.eye(3)[labels]).ravel() / n)]

    @jax.jit
    def all_losses(z, y, soft, labels):
        kinds = ((gf.SquaredError, y), (HUBER, y), (gf.Logistic, soft))
        losses = [
            make(z, target, reduction=reduction, predict=lambda model, x: x)
            for make, target in kinds
            for reduction in ("mean", "sum")
        ] + [gf.CrossEntropy(z, labels, predict=lambda model, x: x)]
        return [(loss(None), loss.residuals(None)) for loss in losses]

    found = all_losses(*map(jnp.asarray, (z, y, soft, labels)))
    for (value, slope), (right, its) in zip(found, expected, strict=True):
        assert_allclose(value, right, rtol=1e-12)
        assert_allclose(slope, its, rtol=1e-9, atol=1e-15)


HUBER = functools.partial(gf.Huber, delta=0.7)


def derivatives(outer, z, u):
    """∇ℓ, ℓ''u forward and in reverse, and the third derivative along u, u."""
    slope = jax.grad(outer)
    along = lambda fn: lambda z: jax.jvp(fn, (z,), (u,))[1]
    back = jax.grad(lambda z: jnp.vdot(slope(z), u))
    return slope(z), along(slope)(z), back(z), along(along(slope))(z)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("y", [0.0, 1.0, 0.5, 0.3])
def test_logistic_does_not_cancel(y, dtype):
    """Its derivatives have all digits, wherever the logit is: also where p − y is far
    below the distance of two numbers near one, or p near a soft y."""
    z = np.array([-70, -31, -18, -3, -0.9, -1e-5, 1e-6, 0.4, 2, 16, 23, 60], dtype)
    u = np.linspace(1, 2, z.size, dtype=dtype)
    loss = gf.Logistic(jnp.asarray(z), jnp.full_like(z, y), reduction="sum")
    big, target = z.astype(np.longdouble), np.longdouble(np.asarray(y, dtype))
    p, q = 1 / (1 + np.exp(-big)), 1 / (1 + np.exp(big))
    slope = (1 - target) * p - target * q
    if y == 0.5:
        slope = np.tanh(big / 2) / 2
    expected = (slope, p * q * u, p * q * u, p * q * (q - p) * u * u)
    eps = np.finfo(dtype).eps
    found = derivatives(loss.outer, jnp.asarray(z), jnp.asarray(u))
    for a, b in zip(found, expected, strict=True):
        # (The third derivative has a zero at z = 0.)
        assert_allclose(a, b.astype(float), rtol=30 * eps, atol=eps * float(u[6]) ** 2)
        far = np.abs(z) > 15
        assert_allclose(a[far], b[far].astype(float), rtol=30 * eps)
    value = target * np.log1p(np.exp(-big)) + (1 - target) * np.log1p(np.exp(big))
    for i in range(z.size):
        one = gf.Logistic(jnp.zeros(1), jnp.full(1, y, dtype)).outer(
            jnp.asarray(z[i : i + 1])
        )
        assert_allclose(one, float(value[i]), rtol=4 * eps)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_cross_entropy_does_not_cancel(dtype):
    """The same for a class of three; right, wrong, and undecided."""
    size = np.array([1e-3, 0.5, 3, 14, 19, 33, 60, 14, 19, 33])
    z = (size[:, None] * np.array([[1.0, -0.2, -0.6]])).astype(dtype)
    labels = np.array([0, 1, 2, 0, 0, 0, 0, 1, 2, 1])
    n, own = len(z), np.eye(3, dtype=bool)[labels]
    u = np.tile(np.array([0.7, -1.1, 0.4], dtype), (n, 1))
    loss = gf.CrossEntropy(jnp.asarray(z), jnp.asarray(labels))

    big = z.astype(np.longdouble)
    weights = np.exp(big - big.max(axis=1, keepdims=True))
    p = weights / weights.sum(axis=1, keepdims=True)
    slope = np.where(own, -np.where(own, 0, p).sum(axis=1, keepdims=True), p)
    # (diag p − ppᵀ)u as Σⱼ pᵢpⱼ(uᵢ − uⱼ), and the same of what p changes by.
    apart = u[:, :, None] - u[:, None, :]
    change = p * (apart * p[:, None, :]).sum(axis=2)
    third = change * (apart * p[:, None, :]).sum(axis=2)
    third = third + p * (apart * change[:, None, :]).sum(axis=2)
    eps = np.finfo(dtype).eps
    found = derivatives(loss.outer, jnp.asarray(z.ravel()), jnp.asarray(u.ravel()))
    for a, b in zip(found, (slope, change, change, third), strict=True):
        b = (b / n).astype(float).ravel()
        assert_allclose(a, b, rtol=100 * eps, atol=1e-37)
    others = np.where(own, 0, np.exp(big - big[own][:, None])).sum(axis=1)
    for i in range(n):
        one = gf.CrossEntropy(jnp.zeros(1), jnp.asarray(labels[i : i + 1])).outer(
            jnp.asarray(z[i])
        )
        assert_allclose(one, float(np.log1p(others[i])), rtol=60 * eps)


def test_miss_of_the_wrong_sign_is_not_believed():
    """A multiplier that is off by more than it is large gives no negative loss."""
    x, z = jnp.zeros(2), jnp.array([12.0, -12.0])
    for sign in (1, -1):
        r = sign * jnp.array([-1e-9, 1e-9])
        logistic = gf.Logistic(x, jnp.array([1.0, 0.0]))
        entropy = gf.CrossEntropy(x[:1], jnp.array([0]))
        found = (logistic.outer_from(r, z), entropy.outer_from(r, z))
        exact = (2e-9, 1e-9) if sign > 0 else (np.log1p(np.exp(-12)), np.exp(-24))
        assert_allclose(found, exact, rtol=1e-6)


@pytest.mark.parametrize("size", [1.0, 1e-9])
def test_loss_from_its_residuals(size):
    """To the digits of the residuals, where z − y has lost them."""
    y, r = np.array([3.0, -2.0, 5.0]), size * np.array([0.3, -0.7, 0.9])
    x = jnp.zeros(3)
    for loss in (gf.SquaredError(x, jnp.asarray(y)), gf.Huber(x, jnp.asarray(y))):
        found = loss.outer_from(jnp.asarray(r / 3), jnp.asarray(y + r))
        assert_allclose(found, 0.5 * (r**2).sum() / 3, rtol=1e-14)
    far = gf.Huber(x, jnp.asarray(y), delta=1e-10)
    z = jnp.asarray(y + r)
    assert_allclose(far.outer_from(jnp.full(3, 1e-10), z), far.outer(z))

    miss = size * np.array([0.1, 0.3, 0.4])
    labels = np.array([0, 1, 1])
    logistic = gf.Logistic(x, jnp.asarray(labels))
    z = np.log(1 - miss) - np.log(miss)
    z = np.where(labels == 1, z, -z)
    sign = np.where(labels == 1, -1, 1)
    found = logistic.outer_from(jnp.asarray(sign * miss / 3), jnp.asarray(z))
    assert_allclose(found, -np.log1p(-miss).mean(), rtol=1e-13)

    entropy = gf.CrossEntropy(x, jnp.asarray(labels))
    p = np.stack([miss, miss], axis=1)
    p[np.arange(3), labels] = -miss
    two = np.zeros((3, 2))
    two[:, 1] = z
    found = entropy.outer_from(jnp.asarray(p / 3).reshape(-1), jnp.asarray(two).ravel())
    assert_allclose(found, -np.log1p(-miss).mean(), rtol=1e-13)


def test_opaque_loss(setting):
    model, *_ = setting
    loss = gf.Loss(lambda m: jnp.sum(m.bias**4) + m.outer[0, 0])
    expected = (np.asarray(model.bias) ** 4).sum() + float(model.outer[0, 0])
    assert_allclose(loss(model), expected, rtol=1e-13)
    assert not isinstance(loss, gf.AbstractCompositeLoss)


@pytest.mark.parametrize("kind", KINDS)
def test_jacobian_products(setting, kind, getkey):
    model, x, y, labels = setting
    loss = composite(kind, x, y, labels)
    theta, unravel = ravel_pytree(model)
    dense = np.asarray(jax.jacfwd(forward)(theta, x))
    v = jr.normal(getkey(), theta.shape)
    u = jr.normal(getkey(), (dense.shape[0],))
    push = np.asarray(loss.jvp(model, unravel(v)))
    pull = np.asarray(ravel_pytree(loss.vjp(model, u))[0])
    assert_allclose(push, dense @ np.asarray(v), rtol=1e-11, atol=1e-13)
    assert_allclose(pull, dense.T @ np.asarray(u), rtol=1e-11, atol=1e-13)
    assert_allclose(push @ np.asarray(u), pull @ np.asarray(v), rtol=1e-12)
    # ∇F = Jᵀ∇ℓ
    force = ravel_pytree(jax.grad(loss)(model))[0]
    residuals = np.asarray(loss.residuals(model))
    assert_allclose(force, dense.T @ residuals, rtol=1e-10, atol=1e-14)


def test_jacobian_along_some_leaves_only(setting, getkey):
    model, x, y, _ = setting
    loss = gf.SquaredError(x, y)
    dense = np.asarray(jax.jacfwd(forward)(ravel_pytree(model)[0], x))
    v = jr.normal(getkey(), (WIDTH,))
    tangent = jax.tree.map(lambda _: None, model)
    tangent = eqx.tree_at(lambda m: m.bias, tangent, v, is_leaf=lambda n: n is None)
    columns = dense[:, WIDTH * INPUTS : WIDTH * (INPUTS + 1)]
    assert_allclose(loss.jvp(model, tangent), columns @ np.asarray(v), rtol=1e-11)


def test_model_with_leaves_that_are_no_arrays(getkey):
    model = eqx.nn.MLP(INPUTS, 2, 4, 1, activation=jnp.tanh, key=getkey())
    loss = gf.SquaredError(jnp.ones((3, INPUTS)), jnp.zeros((3, 2)))
    params = eqx.filter(model, eqx.is_inexact_array)
    push = loss.jvp(model, params)
    pull = loss.vjp(model, push)
    inner = sum(
        float(jnp.sum(a * b))
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(pull), strict=True)
    )
    assert inner > 1e-3
    assert_allclose(inner, jnp.sum(push**2), rtol=1e-12)


def test_predict_serves_all_samples_at_once(getkey):
    model = MatrixFactorisation(
        jr.normal(getkey(), (3, 2)), jr.normal(getkey(), (4, 2))
    )
    places, values = jnp.array([1, 6, 11]), jnp.array([1.0, -2.0, 0.5])
    whole = gf.SquaredError(places, values, predict=entries)
    pairs = jnp.stack([places // 4, places % 4], axis=1)
    each = gf.SquaredError(pairs, values)
    matrix = np.asarray(model.U) @ np.asarray(model.V).T
    expected = 0.5 * ((matrix.ravel()[np.asarray(places)] - values) ** 2).mean()
    assert_allclose(whole(model), expected, rtol=1e-13)
    assert_allclose(each(model), expected, rtol=1e-13)


def test_inputs_may_be_a_pytree_or_nothing(getkey):
    model = jnp.array([2.0, -1.0])
    x = {"a": jnp.arange(3.0), "b": jnp.ones(3)}
    line = lambda m, x: m[0] * x["a"] + m[1] * x["b"]
    assert_allclose(gf.SquaredError(x, jnp.zeros(3), predict=line)(model), 11 / 6)
    plain = gf.SquaredError(None, jnp.zeros(2), predict=lambda m, x: m, reduction="sum")
    assert_allclose(plain(model), 2.5)


def test_l2(setting):
    model, *_ = setting
    theta = np.asarray(ravel_pytree(model)[0])
    penalty = gf.L2()
    assert_allclose(penalty(model), 0.5 * theta @ theta, rtol=1e-13)
    gradient = ravel_pytree(penalty.gradient(model))[0]
    assert_allclose(gradient, theta)
    assert_allclose(ravel_pytree(jax.grad(penalty)(model))[0], gradient, rtol=1e-15)
    hessian = jax.hessian(penalty)(jnp.asarray(theta))
    assert_allclose(hessian, penalty.curvature(model) * np.eye(theta.size), atol=1e-15)


ERRORS = [
    (lambda x, y: gf.SquaredError(x, y[:-1]), "x"),
    (lambda x, y: gf.SquaredError(x[:0], y[:0]), "y"),
    (lambda x, y: gf.SquaredError(x.at[0, 0].set(jnp.nan), y), "x"),
    (lambda x, y: gf.SquaredError(x, y.at[1].set(jnp.inf)), "y"),
    (lambda x, y: gf.SquaredError(x, y, reduction="max"), "reduction"),
    (lambda x, y: gf.Huber(x, y, delta=0.0), "delta"),
    (lambda x, y: gf.Logistic(x, 3 + y), "y"),
    (lambda x, y: gf.CrossEntropy(x, jnp.zeros(SAMPLES)), "labels"),
    (lambda x, y: gf.CrossEntropy(x, jnp.arange(SAMPLES) - 1), "labels"),
    (lambda x, y: gf.CrossEntropy(x, jnp.zeros(SAMPLES - 1, int)), "x"),
]


@pytest.mark.parametrize(("make", "name"), ERRORS)
def test_errors_name_the_argument(setting, make, name):
    # TypeError where annotations are checked at run time: that check comes first.
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
        make(setting[1], setting[2])


def test_shapes_that_do_not_fit_the_model(setting):
    model, x, y, labels = setting
    with pytest.raises(ValueError, match=r"^y: .*\(7, 4\).*\(7, 3\)"):
        gf.SquaredError(x, y[:, :3])(model)
    with pytest.raises(ValueError, match=r"^labels: the largest is 4"):
        gf.CrossEntropy(x, labels.at[0].set(OUTPUTS))(model)
    flat = gf.CrossEntropy(x, labels, predict=lambda m, x: x[:, 0])
    with pytest.raises(ValueError, match=r"^labels: .*shape \(7,\)"):
        flat(model)


@pytest.mark.parametrize("kind", ["int8", "int32", "int64"])
def test_cross_entropy_takes_labels_of_every_integer_type(kind, getkey):
    z = jr.normal(getkey(), (4, 300))
    labels = np.array([0, 44, 2, 1])
    loss = gf.CrossEntropy(
        None, jnp.asarray(labels, kind), predict=lambda model, x: model
    )
    right = np.mean(np.log(np.exp(z).sum(axis=1)) - np.asarray(z)[range(4), labels])
    np.testing.assert_allclose(loss(z), right, rtol=1e-12)
