"""Penalties against convex programs, and their derivatives against differences."""

import cvxpy as cp
import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from numpy.testing import assert_allclose
from scipy.optimize import brentq

import gradflow as gf
from gradflow.models import LinearModel
from gradflow.penalties import (
    absolute_weights,
    AbstractLeafwise,
    AbstractPenalty,
    least_norm,
    Scaled,
    smooth_gradient,
    Sum,
)


class Net(eqx.Module):
    """Two matrices and a vector."""

    W: jax.Array
    V: jax.Array
    b: jax.Array

    def __call__(self, x):
        return self.V @ jnp.tanh(self.W @ x + self.b)


def net(seed, kinks=False):
    """A model; with kinks, one with zero entries, a zero row, and matrices of low
    rank."""
    w, v, b = jr.split(jr.key(seed), 3)
    W, V, b = jr.normal(w, (3, 4)), jr.normal(v, (2, 3)), jr.normal(b, (3,))
    if kinks:
        W = W.at[1].set(0).at[2].set(-2 * W[0])
        V, b = jnp.zeros_like(V).at[0].set(V[0]), b.at[1].set(0)
    return Net(W, V, b)


CENTRE = net(11)
QUADRATIC = gf.Quadratic(
    weights=Net(jnp.array(0.5), jnp.zeros(()), jnp.array([1.0, 2.0, 0.0])),
    centre=CENTRE,
)

# Each penalty, beside the same in cvxpy.
SUMS = {
    "l2": (gf.L2(), lambda W, V, b: sum(cp.sum_squares(x) / 2 for x in (W, V, b))),
    "quadratic": (
        QUADRATIC,
        lambda W, V, b: (
            0.25 * cp.sum_squares(W - np.asarray(CENTRE.W))
            + 0.5 * cp.square(b[0] - float(CENTRE.b[0]))
            + cp.square(b[1] - float(CENTRE.b[1]))
        ),
    ),
    "l1": (gf.L1(), lambda W, V, b: sum(cp.norm1(cp.vec(x)) for x in (W, V, b))),
    "l1 of V": (gf.L1(where=lambda m: m.V), lambda W, V, b: cp.norm1(cp.vec(V))),
    "elastic": (
        gf.ElasticNet(0.7, 0.4),
        lambda W, V, b: sum(
            0.7 * cp.norm1(cp.vec(x)) + 0.2 * cp.sum_squares(x) for x in (W, V, b)
        ),
    ),
    "rows": (
        gf.GroupLasso(),
        lambda W, V, b: cp.sum(cp.norm(W, axis=1)) + cp.sum(cp.norm(V, axis=1)),
    ),
    "columns": (
        gf.GroupLasso("columns", where=lambda m: m.W),
        lambda W, V, b: cp.sum(cp.norm(W, axis=0)),
    ),
    "layers": (
        gf.GroupLasso("leaf"),
        lambda W, V, b: cp.norm(W, "fro") + cp.norm(V, "fro") + cp.norm(b),
    ),
    "nuclear": (gf.Nuclear(), lambda W, V, b: cp.normNuc(W) + cp.normNuc(V)),
    "sum": (
        0.5 * gf.Nuclear(where=lambda m: m.W)
        + (0.8 * gf.L1(where=lambda m: (m.V, m.b)) + 0.3 * gf.L2()),
        lambda W, V, b: (
            0.5 * cp.normNuc(W)
            + 0.8 * (cp.norm1(cp.vec(V)) + cp.norm1(b))
            + 0.15 * sum(cp.sum_squares(x) for x in (W, V, b))
        ),
    ),
}
OTHERS = {
    "schatten 3": gf.Schatten(3.0),
    "schatten 1.5": gf.Schatten(1.5),
    "moreau": gf.Moreau(gf.L1() + 0.5 * gf.L2(), 0.3),
    "moreau of rank": gf.Moreau(gf.Nuclear(), 0.3),
}
ALL = {**{name: penalty for name, (penalty, _) in SUMS.items()}, **OTHERS}


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


def hessian(penalty, model):
    theta, unravel = ravel_pytree(model)
    return jax.jacfwd(lambda v: ravel_pytree(penalty.gradient(unravel(v)))[0])(theta)


@pytest.mark.filterwarnings("ignore")  # cvxpy's, about the order of vec
@pytest.mark.parametrize("name", SUMS)
def test_value_and_prox_solve_the_convex_program(name):
    penalty, program = SUMS[name]
    model, step = net(0), 0.6
    variables = [cp.Variable(x.shape) for x in (model.W, model.V, model.b)]
    distance = sum(
        cp.sum_squares(u - np.asarray(x))
        for u, x in zip(variables, (model.W, model.V, model.b), strict=True)
    )
    problem = cp.Problem(cp.Minimize(program(*variables) + distance / (2 * step)))
    best = problem.solve(solver="CLARABEL")
    nearest = jax.jit(lambda m, h: penalty.prox(m, h))(model, step)
    found = penalty(nearest) + np.sum((flat(nearest) - flat(model)) ** 2) / (2 * step)
    assert_allclose(found, best, rtol=1e-7)
    expected = np.concatenate([u.value.reshape(-1) for u in variables])
    assert_allclose(flat(nearest), expected, atol=3e-4)


@pytest.mark.parametrize("p", [1.2, 1.5, 2.0, 3.0, 4.5])
def test_schatten(p):
    """Value and proximal map by each singular value on its own."""
    model, step = net(1), 0.6
    penalty = gf.Schatten(p, where=lambda m: m.W)
    u, sigma, vt = np.linalg.svd(model.W, full_matrices=False)
    assert_allclose(penalty(model), np.sum(sigma**p) / p, rtol=1e-13)
    roots = [
        brentq(lambda x, s=s: x + step * x ** (p - 1) - s, 0, s, xtol=1e-15)
        for s in sigma
    ]
    nearest = penalty.prox(model, step)
    assert_allclose(nearest.W, u @ np.diag(roots) @ vt, atol=1e-13)
    assert (nearest.V == model.V).all()
    assert_allclose(penalty.gradient(model).W, u @ np.diag(sigma ** (p - 1)) @ vt)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kinks", [False, True])
def test_gradient_supports_the_penalty(name, kinks):
    """R(u) ≥ R(θ) + ⟨g, u − θ⟩ for every u; and it is what JAX differentiates R to."""
    penalty, model = ALL[name], net(2, kinks)
    value, slope = jax.jit(lambda m: (penalty(m), penalty.gradient(m)))(model)
    assert_allclose(flat(jax.grad(penalty)(model)), flat(slope), rtol=1e-12, atol=1e-14)
    others = jax.vmap(lambda k: jr.normal(k, (flat(model).size,)))(
        jr.split(jr.key(3), 64)
    )
    sizes = np.geomspace(1e-4, 10, 64)[:, None]
    near = flat(model) + sizes * np.asarray(others)
    unravel = ravel_pytree(model)[1]
    values = jax.jit(jax.vmap(lambda v: penalty(unravel(v))))(jnp.asarray(near))
    bound = value + (near - flat(model)) @ flat(slope)
    assert (values >= bound - 1e-12 * np.abs(values)).all()


@pytest.mark.parametrize("name", ALL)
def test_least_norm_is_where_a_small_proximal_step_goes(name):
    """The flow from a kink with force v moves by −h × the least-norm element of
    v + c∂R in a small step h, and a forward-backward step goes there."""
    penalty, model, strength = ALL[name], net(4, kinks=True), 0.7
    force = jax.tree.map(lambda x: 0.9 * x, net(5))
    step = 1e-6

    @jax.jit
    def both(model, force):
        tilted = jax.tree.map(lambda x, v: x - step * v, model, force)
        ahead = penalty.prox(tilted, step * strength)
        moved = jax.tree.map(lambda x, u: (x - u) / step, model, ahead)
        return moved, least_norm(penalty, model, force, strength)

    moved, found = both(model, force)
    # The power 1/2 of a vanishing singular value is no smooth function of it.
    loose = 3e-2 if name == "schatten 1.5" else 1e-4
    assert_allclose(flat(found), flat(moved), atol=loose)


@pytest.mark.parametrize("name", ["l1", "rows", "layers", "nuclear"])
def test_kinks_hold_what_they_can(name):
    """At θ = 0 a force below the strength of the kink moves nothing, and the
    subgradient of least norm is zero."""
    penalty = ALL[name]
    zero = jax.tree.map(jnp.zeros_like, net(0))
    weak = jax.tree.map(lambda x: 1e-2 * x, net(6))
    assert (flat(penalty.gradient(zero)) == 0).all()
    held = penalty.least_norm(zero, weak, 1.0)
    assert_allclose(flat(held.W), 0, atol=1e-16)
    assert_allclose(flat(held.V), 0, atol=1e-16)


def test_null_directions_are_no_part_of_the_nuclear_gradient():
    """Of a matrix of rank 2 up to rounding: the full decomposition would add a third
    direction, made of noise."""
    u, v = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 2)))[0], np.eye(4)[:2]
    w = jnp.asarray(u @ np.diag([3.0, 1e-3]) @ v + 1e-17)
    slope = gf.Nuclear().gradient(w)
    assert_allclose(slope, u @ v, atol=1e-11)
    assert_allclose(jnp.linalg.norm(slope), np.sqrt(2))


def test_small_groups_keep_their_direction():
    tiny = jnp.array([[3e-200, 4e-200], [0.0, 0.0]])
    assert_allclose(gf.GroupLasso().gradient(tiny), [[0.6, 0.8], [0, 0]])


MEETING = {
    "apart": [3.0, 2.0, 0.5],
    "equal": [2.0, 2.0, 2.0],
    "nearly": [2.0, 2.0 + 1e-9, 0.4],
    "zero": [2.0, 0.0, 0.0],
}


@pytest.mark.parametrize("name", MEETING)
@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_derivative_where_singular_values_meet(name, shape):
    """That of a smooth function of the singular values, against differences."""
    a, b, direction = (
        jr.normal(k, s)
        for k, s in zip(
            jr.split(jr.key(7), 3),
            [(shape[0],) * 2, (shape[1],) * 2, shape],
            strict=True,
        )
    )
    u, v = jnp.linalg.qr(a)[0][:, :3], jnp.linalg.qr(b)[0][:, :3]
    w = u @ jnp.diag(jnp.array(MEETING[name])) @ v.T
    for penalty in [gf.Schatten(4.0), gf.Schatten(2.0), gf.Moreau(gf.Nuclear(), 1.0)]:
        gradient = penalty.gradient
        derivative = jax.jvp(gradient, (w,), (direction,))[1]
        h = 1e-5
        ahead, behind = gradient(w + h * direction), gradient(w - h * direction)
        assert_allclose(derivative, (ahead - behind) / (2 * h), atol=1e-7)


def test_derivative_of_the_nuclear_gradient():
    """Of UVᵀ at full rank; and in directions that keep the rank below it."""
    w = jr.normal(jr.key(8), (3, 4))
    gradient = gf.Nuclear().gradient
    left, right = jr.normal(jr.key(9), (3, 2)), jr.normal(jr.key(10), (2, 4))
    turn = jr.normal(jr.key(11), (3, 2))
    full = lambda e: gradient(w + e * left @ right)
    low = lambda e: gradient((left + e * turn) @ right)
    for along in (full, low):
        h = 1e-5
        found = jax.jvp(along, (0.0,), (1.0,))[1]
        assert_allclose(found, (along(h) - along(-h)) / (2 * h), atol=1e-7)


@pytest.mark.parametrize("name", ["l1", "elastic", "rows", "layers", "nuclear"])
def test_moreau(name):
    """R − R_ε lies between 0 and εL²/2, a bound that is met; ∇R_ε agrees with
    differences and has the Lipschitz constant 1/ε."""
    penalty, epsilon = ALL[name], 0.2
    smooth = gf.Moreau(penalty, epsilon)
    unravel = ravel_pytree(net(0))[1]
    at = jax.vmap(lambda k: jr.normal(k, (flat(net(0)).size,)))(
        jr.split(jr.key(12), 20)
    )
    at = at * jnp.geomspace(1e-2, 10, 20)[:, None]
    value = jax.jit(jax.vmap(lambda v: penalty(unravel(v))))
    rounded = jax.jit(jax.vmap(lambda v: smooth(unravel(v))))
    gradient = jax.jit(jax.vmap(lambda v: ravel_pytree(smooth.gradient(unravel(v)))[0]))
    gap = value(at) - rounded(at)
    assert (gap >= 0).all()
    if name != "elastic":
        assert (gap <= smooth.error(net(0)) + 1e-12).all()
        assert_allclose(gap.max(), smooth.error(net(0)), rtol=1e-9)
    direction = jnp.roll(at, 1, axis=0) / jnp.linalg.norm(at, axis=1)[:, None]
    h = 1e-5
    slope = (rounded(at + h * direction) - rounded(at - h * direction)) / (2 * h)
    assert_allclose(jnp.sum(gradient(at) * direction, axis=1), slope, atol=2e-6)
    moved = jnp.linalg.norm(gradient(at + 0.1 * direction) - gradient(at), axis=1)
    far = jnp.linalg.norm(0.1 * direction, axis=1)
    assert (moved <= far / epsilon * (1 + 1e-9)).all()


def test_moreau_curvature():
    """The diagonal of the Hessian for what is separable."""
    model = net(13)
    for penalty in [gf.L1(), gf.L2(), gf.ElasticNet(0.5, 2.0), gf.L1() + 0.5 * gf.L2()]:
        smooth = gf.Moreau(penalty, 0.4)
        assert_allclose(
            np.diag(flat(smooth.curvature(model))), hessian(smooth, model), atol=1e-14
        )
    assert gf.Moreau(gf.Nuclear(), 0.4).curvature(model) == 1.25
    inside = jnp.abs(model.W) < 0.4
    curvature = gf.Moreau(gf.L1(), 0.4).curvature(model)
    assert_allclose(curvature.W, jnp.where(inside, 2.5, 0))


def test_curvature_of_sums():
    model = net(14)
    assert (gf.L2() + 3 * gf.L2()).curvature(model) == 4
    mixed = gf.L2() + 2 * gf.L2(where=lambda m: m.b)
    assert_allclose(
        np.diag(flat(mixed.curvature(model))), hessian(mixed, model), atol=1e-14
    )
    assert gf.ElasticNet(1.0, 0.3).curvature(model) == 0.3


def test_the_smooth_part_keeps_its_force_at_zero():
    """At a zero coordinate the least-norm gradient of ‖θ‖₁ + S is what the kink leaves
    of ∇S, but the smooth part is ∇S whole."""
    model = net(15, kinks=True)
    coupled = gf.Schatten(3.0) + 0.5 * gf.L2()
    penalty = 2.0 * (0.7 * gf.L1() + coupled)
    expected = 2 * flat(coupled.gradient(model))
    assert_allclose(flat(penalty.smooth_gradient(model)), expected, rtol=1e-13)
    assert_allclose(flat(gf.L1().smooth_gradient(model)), 0)
    assert_allclose(flat(smooth_gradient(gf.L2(), model)), flat(model))


@pytest.mark.slow
def test_sliding_against_a_smooth_part():
    """A flow with ‖θ‖₁ and a coupling that pushes coordinates off zero, against small
    proximal steps."""

    class Coupled(AbstractPenalty):
        """½(θ₁ + θ₂ + θ₃ − 1)²."""

        def __call__(self, params):
            return 0.5 * (jnp.sum(params.weights) - 1) ** 2

        def gradient(self, params):
            return jax.grad(lambda p: self(p))(params)

    loss = gf.SquaredError(jnp.array([[0.0, 0.3, 1.0]]), jnp.array([-1.0]))
    model = LinearModel(jnp.array([0.0, 0.1, 0.9]))
    lam, t1, step = 0.5, 3.0, 1e-4
    penalty = 0.6 * gf.L1() + Coupled()
    flow = gf.GradientFlow(loss, penalty=penalty)
    ts = jnp.array([0.0, 1.0, t1])
    path = gf.simulate(flow, model, weight_decay=lam, ts=ts, rtol=1e-8)

    w = np.asarray(model.weights)
    slides, found = 0, [w]
    for i in range(round(t1 / step)):
        force = np.array([0, 0.3, 1.0]) * (0.3 * w[1] + w[2] + 1)
        w = w - step * (force + lam * (w.sum() - 1))
        w = np.sign(w) * np.maximum(np.abs(w) - step * lam * 0.6, 0)
        slides += (w == 0).any()
        if i + 1 in (round(1 / step), round(t1 / step)):
            found.append(w)
    assert slides > 100
    assert_allclose(path.params.weights, np.array(found), atol=2e-4)


def test_absolute_weights():
    model = net(15)
    assert absolute_weights(gf.L2(), model) is None
    assert (gf.L1() + gf.Nuclear()).absolute_weights(model) is None
    found = 2 * gf.L1(where=lambda m: m.W) + gf.ElasticNet(0.5, 1.0) + gf.L2()
    weights = found.absolute_weights(model)
    assert_allclose(weights.W, np.full((3, 4), 2.5))
    assert_allclose(weights.b, np.full(3, 0.5))


@pytest.mark.slow
@pytest.mark.parametrize("root", [False, True])
def test_sobolev(root):
    """Against the Jacobian of a tanh network written out, and differences."""
    model, teacher = net(16), net(17)
    x = jr.normal(jr.key(18), (6, 4))
    target = jax.vmap(jax.jacfwd(teacher))(x)
    values = jax.vmap(teacher)(x)
    written = [
        model.V @ np.diag(1 - np.tanh(model.W @ a + model.b) ** 2) @ model.W for a in x
    ]
    total = np.sum((np.array(written) - target) ** 2)
    first = gf.Sobolev(model, x, target=target, root=root)
    assert_allclose(first(model), np.sqrt(total) if root else total / 6, rtol=1e-12)
    outputs = [model.V @ np.tanh(model.W @ a + model.b) for a in x]
    total = total + np.sum((np.array(outputs) - values) ** 2)
    both = gf.Sobolev(model, x, target=target, values=values, root=root)
    assert_allclose(both(model), np.sqrt(total) if root else total / 6, rtol=1e-12)
    flatter = eqx.tree_at(lambda m: m.V, model, jnp.zeros_like(model.V))
    rest = gf.Sobolev(model, x, root=root)
    assert rest(flatter) == 0
    assert (flat(rest.gradient(flatter)) == 0).all()
    direction, h = net(19), 1e-5
    move = lambda e: jax.tree.map(lambda p, d: p + e * d, model, direction)
    slope = (both(move(h)) - both(move(-h))) / (2 * h)
    assert_allclose(flat(both.gradient(model)) @ flat(direction), slope, rtol=1e-8)
    plain = gf.Sobolev(model, x)(model)
    assert_allclose(plain, np.sum(np.array(written) ** 2) / 6, rtol=1e-12)


def test_penalties_under_vmap():
    """A batch of models at once equals one by one."""
    models = eqx.filter_vmap(
        lambda k: jax.tree.map(lambda x: x + jr.normal(k), net(0))
    )(jr.split(jr.key(20), 3))
    one = lambda i: jax.tree.map(lambda x: x[i], models)
    for name in ("rows", "nuclear", "moreau of rank"):
        penalty = ALL[name]
        run = lambda m, p=penalty: (p(m), p.gradient(m), p.prox(m, 0.2))
        batch = jax.jit(jax.vmap(run))(models)
        last = jax.tree.map(lambda x: x[2], batch)
        assert_allclose(flat(last), flat(jax.jit(run)(one(2))), atol=1e-13)


@pytest.mark.slow
def test_smoothed_l1_in_a_flow():
    """Without data, |θᵢ| falls at the rate λ until it is ε, then as e^{−λt/ε}."""
    loss = gf.SquaredError(jnp.zeros((1, 3)), jnp.zeros(1))
    model = LinearModel(jnp.array([1.0, -0.5, 2.0]))
    epsilon, lam = 1e-3, 0.1
    flow = gf.GradientFlow(loss, penalty=gf.Moreau(gf.L1(), epsilon))
    ts = jnp.array([0.0, 2.0, 4.992, 15.0])
    path = gf.simulate(
        flow, model, weight_decay=lam, ts=ts, rtol=1e-6, solver=gf.KKT4()
    )
    size = np.abs(np.asarray(model.weights)) - lam * np.asarray(ts)[:, None]
    decay = np.exp(np.minimum((size - epsilon) / epsilon, 0))
    expected = np.where(size > epsilon, size, epsilon * decay)
    found = np.abs(np.asarray(path.params.weights))
    assert_allclose(found, expected, atol=1e-5)


def test_bad_settings_are_named():
    model, x = net(0), jnp.zeros((3, 4))
    for match, call in {
        "where: expected trainable": lambda: gf.L1(where=lambda m: None)(model),
        "where: Nuclear": lambda: gf.Nuclear(where=lambda m: m.b)(model),
        "params: Nuclear": lambda: gf.Nuclear()(model.b),
        "p: expected": lambda: gf.Schatten(1.0),
        "l2: expected": lambda: gf.ElasticNet(1.0, -1.0),
        "scale: expected": lambda: -1.0 * gf.L1(),
        "parts: expected one": lambda: Sum(),
        "epsilon": lambda: gf.Moreau(gf.L1(), 0.0),
        "penalty: expected one with a prox": lambda: gf.Moreau(
            gf.Sobolev(model, x), 0.1
        ),
        "target: expected shape": lambda: gf.Sobolev(model, x, target=x),
        "values: expected shape": lambda: gf.Sobolev(model, x, values=x),
        "x: expected": lambda: gf.Sobolev(model, x[:0]),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(NotImplementedError, match="Sobolev"):
        (2.0 * gf.Sobolev(model, x)).prox(model, 0.1)
    with pytest.raises(NotImplementedError, match="two parts"):
        (gf.L1() + gf.Nuclear()).prox(model, 0.1)
    with pytest.raises(TypeError):
        gf.L1() + 3


def test_a_penalty_of_your_own_adds_up():
    class Quartic(AbstractLeafwise):
        where: None = None

        def takes(self, x):
            return True

        def leaf_value(self, x):
            return jnp.sum(x**4) / 4

        def leaf_least_norm(self, x, force, strength):
            return force + strength * x**3

        def leaf_prox(self, x, step):
            raise NotImplementedError("penalty: none")

    model = net(0)
    penalty = 2.0 * (Quartic() + gf.L2())
    assert isinstance(penalty, Scaled)
    assert_allclose(
        penalty(model), sum(np.sum(x**4 / 2 + x**2) for x in jax.tree.leaves(model))
    )
    assert_allclose(
        flat(penalty.gradient(model)), 2 * flat(model) ** 3 + 2 * flat(model)
    )


def test_what_is_not_declared_would_never_be_asked():
    class Undeclared(AbstractPenalty):
        def __call__(self, params):
            return gf.L2()(params)

        def gradient(self, params):
            return params

        def curvature(self, params):
            return 1.0

    loss = gf.SquaredError(jnp.ones((2, 3)), jnp.ones(2))
    for penalty in (Undeclared(), 2 * Undeclared() + gf.L1()):
        with pytest.raises(ValueError, match="Undeclared has `curvature`.*AbstractCur"):
            gf.GradientFlow(loss, penalty=penalty)


@pytest.mark.slow
def test_the_curvature_of_a_strong_sobolev_penalty():
    """Without its Hessian in the matrix of the stages this takes 2900 steps."""
    net = gf.scaled(eqx.nn.MLP(2, "scalar", 8, 1, jnp.tanh, key=jr.key(1)), 2.0)
    x = jr.normal(jr.key(2), (10, 2))
    flow = gf.GradientFlow(
        gf.SquaredError(x, jnp.sin(x[:, 0])), penalty=gf.Sobolev(net, x)
    )
    path = gf.simulate(
        flow, net, weight_decay=10.0, t1=100.0, rtol=1e-3, solver=gf.KKT4(), saves=9
    )
    assert path.stats.steps < 200


def test_quadratic_is_l2_unless_told():
    model, penalty = net(8), gf.Quadratic()
    assert_allclose(penalty(model), gf.L2()(model), rtol=1e-13)
    assert jnp.ndim(penalty.curvature(model)) == 0
    whole = penalty + 2.0 * QUADRATIC
    assert_allclose(
        np.diag(flat(whole.curvature(model))), hessian(whole, model), atol=1e-12
    )
    for wrong, words in (
        (lambda: gf.Quadratic(weights=-1.0), "^weights: expected finite"),
        (lambda: gf.Quadratic(weights=jnp.array([1.0, jnp.inf])), "^weights"),
        (lambda: gf.Quadratic(weights=jnp.ones(3))(model), "^weights"),
        (lambda: gf.Quadratic(weights=(1.0, 2.0))(model), "^weights"),
        (lambda: gf.Quadratic(centre=jnp.ones(3))(model), "^centre"),
        (lambda: gf.Quadratic(centre=LinearModel(jnp.ones(3)))(model), "^centre"),
        (lambda: gf.Quadratic(centre=LinearModel(jnp.ones(3) / 0)), "^centre"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()


@pytest.mark.slow
def test_quadratic_on_linear_regression():
    """A path, by exponentials of XᵀX/n + λW; and the drift on M, where w = w₀ + Ta and
    a' = −TᵀW(w − c), T an orthonormal basis of ker X. By either solver of it."""
    rng = np.random.default_rng(0)
    x, y, lam = rng.normal(size=(3, 6)), rng.normal(size=3), 1e-2
    weights, c, start = rng.uniform(0, 3, 6), rng.normal(size=6), np.ones(6)
    penalty = gf.Quadratic(
        weights=LinearModel(jnp.asarray(weights)), centre=LinearModel(jnp.asarray(c))
    )
    flow = gf.GradientFlow(
        gf.SquaredError(jnp.asarray(x), jnp.asarray(y)), penalty=penalty
    )

    def solution(a, b, from_, ts):
        values, basis = np.linalg.eigh(a)
        end = np.linalg.solve(a, b)
        return (
            end + (np.exp(-np.outer(ts, values)) * (basis.T @ (from_ - end))) @ basis.T
        )

    path = gf.simulate(
        flow,
        LinearModel(jnp.asarray(start)),
        weight_decay=lam,
        slow_time=3.0,
        rtol=1e-9,
    )
    right = solution(
        x.T @ x / 3 + lam * np.diag(weights), x.T @ y / 3 + lam * weights * c, start,
        np.asarray(path.t),
    )  # fmt: skip
    assert_allclose(path.params.weights, right, atol=1e-7)
    size = 0.5 * (weights * (right[-1] - c) ** 2).sum()
    assert_allclose(path.penalty[-1], size, rtol=1e-7)

    w0 = start - np.linalg.pinv(x) @ (x @ start - y)
    t = np.linalg.svd(x)[2][3:].T
    for solver in (None, diffrax.Dopri8()):
        drift = gf.manifold.riemannian_flow(
            flow, LinearModel(jnp.asarray(w0)), slow_time=3.0, solver=solver
        )
        a = solution(
            t.T @ (weights[:, None] * t), -t.T @ (weights * (w0 - c)), np.zeros(3),
            np.asarray(drift.s),
        )  # fmt: skip
        assert_allclose(drift.params.weights, w0 + a @ t.T, atol=1e-7)
