"""The critical manifold, against cases whose geometry is known in closed form."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import Diagonal, diagonal_problem, Linear, linear_problem, Product
from jax.flatten_util import ravel_pytree
from scipy.integrate import solve_ivp

import gradflow as gf
from gradflow import manifold
from gradflow.flow.flat import flatten
from gradflow.manifold.jacobian_form import JacobianForm
from gradflow.manifold.limit import _finish


def flat(tree):
    return ravel_pytree(eqx.filter(tree, eqx.is_inexact_array))[0]


def random_like(key, tree):
    vector, unravel = ravel_pytree(eqx.filter(tree, eqx.is_inexact_array))
    return unravel(jr.normal(key, vector.shape))


@pytest.fixture(scope="module")
def diagonal():
    """A diagonal network with 6 samples and 15 features, at an interpolating point."""
    loss, model = diagonal_problem(jr.key(7), samples=6, features=15)
    return loss, model, manifold.limit_map(loss, model).model


@pytest.fixture(scope="module")
def tanh_net():
    """A generic network, interpolating 8 samples: no symmetry helps."""
    kx, ky, km = jr.split(jr.key(11), 3)
    loss = gf.SquaredError(jr.normal(kx, (8, 3)), jr.normal(ky, (8, 1)))
    model = eqx.nn.MLP(3, 1, 12, 1, activation=jnp.tanh, key=km)
    return loss, model, manifold.limit_map(loss, model).model


# --- Tangent space -----------------------------------------------------------------


@pytest.mark.parametrize("form", ["jacobian", "hessian"])
def test_projection_is_orthogonal_and_tangent(form, tanh_net, getkey):
    loss, _, model = tanh_net
    v, w = random_like(getkey(), model), random_like(getkey(), model)
    project = lambda x: manifold.tangent_projection(loss, model, x, form=form)
    pv = project(v)
    np.testing.assert_allclose(flat(project(pv)), flat(pv), atol=1e-12)
    np.testing.assert_allclose(
        flat(pv) @ flat(w), flat(v) @ flat(project(w)), rtol=1e-11, atol=1e-11
    )
    # It is neither 0 nor the identity.
    assert 0.1 < jnp.linalg.norm(flat(pv)) / jnp.linalg.norm(flat(v)) < 0.99
    params, _ = eqx.partition(pv, eqx.is_inexact_array)
    assert jnp.abs(loss.jvp(model, params)).max() < 1e-8


def test_forms_agree_where_interpolating(tanh_net, getkey):
    loss, _, model = tanh_net
    v = random_like(getkey(), model)
    by_form = [
        flat(manifold.tangent_projection(loss, model, v, form=form))
        for form in ("auto", "jacobian", "hessian")
    ]
    np.testing.assert_array_equal(by_form[0], by_form[1])
    np.testing.assert_allclose(by_form[1], by_form[2], atol=1e-9)


def test_projection_of_a_linear_model_is_that_on_the_kernel(getkey):
    loss, model = linear_problem(getkey(), samples=4, features=9)
    v = random_like(getkey(), model)
    kernel = jnp.eye(9) - jnp.linalg.pinv(loss.x) @ loss.x
    out = manifold.tangent_projection(loss, model, v, form="jacobian")
    np.testing.assert_allclose(out.w, kernel @ v.w, atol=1e-13)


def test_projection_holds_what_is_not_trained(diagonal, getkey):
    loss, _, model = diagonal
    trainable = Diagonal(True, False)
    v = random_like(getkey(), model)
    out = manifold.tangent_projection(loss, model, v, trainable=trainable)
    assert out.v is None
    # J of u alone is 2 X diag(u).
    jac = 2 * loss.x * jnp.broadcast_to(model.u, loss.x.shape)
    np.testing.assert_allclose(jac @ out.u, jnp.zeros(6), atol=1e-12)


def test_projection_where_data_are_redundant(getkey):
    """Twice the same sample: J has 4 rows of rank 3, and the tangent space is the same
    as without the copy."""
    loss, model = linear_problem(getkey(), samples=3, features=7)
    twice = gf.SquaredError(
        jnp.concatenate([loss.x, loss.x[:1]]), jnp.concatenate([loss.y, loss.y[:1]])
    )
    v = random_like(getkey(), model)
    model = manifold.retract(loss, model).model
    one, two = (manifold.tangent_projection(f, model, v).w for f in (loss, twice))
    np.testing.assert_allclose(one, two, atol=1e-12)
    found = manifold.spectrum(twice, model)
    assert found.rank == 3 and not found.ambiguous and found.deficient
    assert "rank-deficient (3 of 4)" in str(found)


def test_projection_names_a_wrong_vector(diagonal):
    loss, _, model = diagonal
    with pytest.raises(ValueError, match="v: "):
        manifold.tangent_projection(loss, model, Diagonal(model.u[:3], model.v))
    with pytest.raises(ValueError, match="form: the Jacobian form needs"):
        manifold.tangent_projection(
            gf.Loss(lambda m: m.u @ m.u), model, model, form="jacobian"
        )


# --- Spectrum ----------------------------------------------------------------------


@pytest.mark.parametrize("form", ["auto", "jacobian", "hessian"])
def test_dimensions(form, diagonal, getkey):
    loss, model = linear_problem(getkey(), samples=4, features=9)
    model = manifold.retract(loss, model).model
    assert manifold.spectrum(loss, model, form=form).dimension == 9 - 4
    loss, _, model = diagonal
    found = manifold.spectrum(loss, model, form=form)
    assert found.dimension == 2 * 15 - 6
    assert not found.ambiguous and not found.negative
    assert "dimension 24" in str(found)


def test_singular_values_squared_are_the_curvatures(tanh_net):
    loss, _, model = tanh_net
    jacobian = manifold.spectrum(loss, model, form="jacobian")
    hessian = manifold.spectrum(loss, model, form="hessian")
    assert jacobian.rank == hessian.rank == 8
    np.testing.assert_allclose(jacobian.curvatures, hessian.curvatures[:8], rtol=1e-7)
    np.testing.assert_allclose(
        jacobian.smallest_curvature, hessian.smallest_curvature, rtol=1e-7
    )


class Logistic(gf.AbstractCompositeLoss):
    """Cross-entropy to soft labels: interpolated where softmax(z) = p, with ℓ''
    singular, since a shift of all logits of a sample changes nothing."""

    x: jax.Array
    p: jax.Array

    def outputs(self, model):
        return jax.vmap(model)(self.x).reshape(-1)

    def outer(self, z):
        return -jnp.sum(self.p * jax.nn.log_softmax(z.reshape(self.p.shape)))

    @property
    def outer_curvature(self):
        return None


@pytest.mark.slow
def test_curvatures_of_a_loss_that_is_not_quadratic(getkey):
    x = jr.normal(getkey(), (3, 5))
    loss = Logistic(x, jax.nn.softmax(jr.normal(getkey(), (3, 4))))
    model = eqx.nn.Linear(5, 4, key=getkey())
    limit = manifold.limit_map(loss, model)
    assert limit.result == gf.RESULTS.successful
    jacobian = manifold.spectrum(loss, limit.model, form="jacobian")
    hessian = manifold.spectrum(loss, limit.model, form="hessian")
    # 3 samples with 4 − 1 constraints each, in 24 parameters.
    assert jacobian.rank == hessian.rank == 9
    np.testing.assert_allclose(
        jacobian.curvatures[:9], hessian.curvatures[:9], rtol=1e-8
    )


def test_ambiguous_rank_is_named():
    """Singular values 10⁰, 10⁻¹, …, 10⁻¹⁴: no gap to cut at."""
    scales = jnp.logspace(0, -14, 15)
    model = Linear(jnp.ones(15))
    x = jnp.diag(scales)
    found = manifold.spectrum(gf.SquaredError(x, x @ model.w), model)
    assert found.ambiguous
    assert "rank ambiguous" in str(found)
    # A tolerance settles it.
    assert (
        manifold.spectrum(gf.SquaredError(x, x @ model.w), model, rtol=1e-4).rank == 4
    )


def test_singular_minimum_is_named():
    """uv = 0 crosses itself at the origin, where J = 0."""
    loss = gf.SquaredError(jnp.ones(1), jnp.zeros(1))
    found = manifold.spectrum(loss, Product(jnp.zeros(()), jnp.zeros(())))
    assert found.rank == 0 and found.deficient
    assert "singular point" in str(found)
    regular = manifold.spectrum(loss, Product(jnp.ones(()), jnp.zeros(())))
    assert regular.rank == 1 and not regular.deficient


def test_saddle_has_negative_curvature():
    loss = gf.SquaredError(jnp.ones(1), jnp.ones(1))
    origin = Product(jnp.zeros(()), jnp.zeros(()))
    found = manifold.spectrum(loss, origin, form="hessian")
    assert found.negative and found.rank == 2
    assert "negative curvature" in str(found)


# --- Retraction --------------------------------------------------------------------


@pytest.mark.parametrize("form", ["auto", "jacobian", "hessian"])
def test_retraction_is_the_nearest_point(form, tanh_net, getkey):
    loss, _, on = tanh_net
    params = lambda m: eqx.filter(m, eqx.is_inexact_array)
    noise = random_like(getkey(), params(on))
    off = eqx.combine(jax.tree.map(lambda p, q: p + 0.01 * q, params(on), noise), on)
    out = manifold.retract(loss, off, form=form)
    assert out.result == gf.RESULTS.successful
    assert loss(off) > 1e-6 and loss(out.model) < 1e-20
    moved = jax.tree.map(lambda p, q: p - q, params(out.model), params(off))
    slide = manifold.tangent_projection(loss, out.model, moved)
    assert jnp.linalg.norm(flat(slide)) < 1e-8 * jnp.linalg.norm(flat(moved))


def test_retraction_of_a_linear_model(getkey):
    loss, model = linear_problem(getkey(), samples=4, features=9)
    w = model.w + jnp.linalg.pinv(loss.x) @ (loss.y - loss.x @ model.w)
    np.testing.assert_allclose(manifold.retract(loss, model).model.w, w, atol=1e-13)


def test_retraction_says_when_there_is_nothing_to_reach():
    """f = u² + 1 cannot be 0; u = 0 is critical, but not in the Jacobian form."""
    loss = gf.SquaredError(
        jnp.ones(1), jnp.zeros(1), predict=lambda m, x: (m.w[0] ** 2 + 1) * x
    )
    out = manifold.retract(loss, Linear(jnp.ones(1)), form="jacobian", throw=False)
    assert out.result == gf.RESULTS.not_critical
    with pytest.raises(Exception, match="not on the critical manifold"):
        manifold.retract(loss, Linear(jnp.ones(1)), form="jacobian")


# --- Limit map ---------------------------------------------------------------------


@pytest.mark.slow
def test_limit_of_linear_regression(getkey):
    loss, model = linear_problem(getkey(), samples=4, features=9)
    w = model.w + jnp.linalg.pinv(loss.x) @ (loss.y - loss.x @ model.w)
    out = manifold.limit_map(loss, model)
    assert out.result == gf.RESULTS.successful
    np.testing.assert_allclose(out.model.w, w, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [None, diffrax.Tsit5()])
def test_limit_on_the_hyperbola(solver):
    """uv = y with u² − v² conserved: u² = (c + √(c² + 4y²))/2."""
    u, v, y = 1.3, -0.4, 2.0
    loss = gf.SquaredError(jnp.ones(1), jnp.full(1, y))
    out = manifold.limit_map(loss, Product(jnp.array(u), jnp.array(v)), solver=solver)
    c = u**2 - v**2
    limit = np.sqrt((c + np.sqrt(c**2 + 4 * y**2)) / 2)
    np.testing.assert_allclose(out.model.u, limit, rtol=1e-8)
    np.testing.assert_allclose(out.model.v, y / limit, rtol=1e-8)
    assert out.residual < 1e-12


def test_limit_keeps_the_invariants(diagonal):
    loss, start, limit = diagonal
    np.testing.assert_allclose(limit.u * limit.v, start.u * start.v, atol=1e-8)
    assert loss(limit) < 1e-24


def test_limit_is_the_identity_on_the_manifold(diagonal):
    loss, _, limit = diagonal
    again = manifold.limit_map(loss, limit)
    np.testing.assert_allclose(flat(again.model), flat(limit), atol=1e-13)


def test_derivative_of_the_limit_is_the_projection(diagonal, getkey):
    """DΦ = P on M, by central differences of Φ, whose error is O(h²)."""
    loss, _, limit = diagonal
    v = random_like(getkey(), limit)
    h = 1e-4
    move = lambda h: jax.tree.map(lambda p, q: p + h * q, limit, v)
    ends = [flat(manifold.limit_map(loss, move(x)).model) for x in (h, -h)]
    pv = flat(manifold.tangent_projection(loss, limit, v))
    np.testing.assert_allclose((ends[0] - ends[1]) / (2 * h), pv, atol=1e-6)


@pytest.mark.slow
def test_limit_where_the_data_cannot_be_fitted():
    """uv = 1 and uv = 2 at once: the Jacobian form meets residuals, the Hessian form
    takes over, and the limit is on uv = 3/2."""
    loss = gf.SquaredError(jnp.ones(2), jnp.array([1.0, 2.0]))
    out = manifold.limit_map(loss, Product(jnp.array(2.0), jnp.array(0.1)))
    assert out.result == gf.RESULTS.successful
    np.testing.assert_allclose(out.model.u * out.model.v, 1.5, rtol=1e-12)
    np.testing.assert_allclose(out.model.u**2 - out.model.v**2, 3.99, rtol=1e-8)
    found = manifold.spectrum(loss, out.model)
    assert found.form == "hessian" and found.dimension == 1


class Squares(eqx.Module):
    """f(x) = ⟨u⊙u, x⟩."""

    u: jax.Array

    def __call__(self, x):
        return x @ self.u**2


def lsoda_limit(loss, model, end):
    """Where SciPy is at time `end`, tolerances far below any size on the way."""
    theta, unravel = ravel_pytree(model)
    force = jax.grad(lambda th: loss(unravel(th)))
    field, slope = jax.jit(force), jax.jit(jax.jacfwd(force))
    out = solve_ivp(
        lambda t, th: -np.asarray(field(th)),
        (0.0, end),
        np.asarray(theta),
        method="LSODA",
        jac=lambda t, th: -np.asarray(slope(th)),
        rtol=1e-12,
        atol=1e-30,
    )
    assert out.success
    return out.y[:, -1]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["jacobian", "hessian"])
def test_limit_past_a_saddle(form):
    """From tiny starts one coordinate has arrived, to ten digits and more, before the
    others begin to grow; J explains nothing of their residuals, and their force is far
    below any tolerance."""
    x = jnp.array([[2.0, 0, 0, 0], [0, 0.3, 0.5, 0.2], [0, 0.4, 0, 0.6]])
    loss = gf.SquaredError(x, jnp.array([3.0, 0.25, 0.15]))
    for start in (1e-5, 1e-11, 1e-18):
        model = Squares(start * jnp.array([1.0, 0.7, 1.2, 0.5]))
        out = manifold.limit_map(loss, model, form=form)
        right = lsoda_limit(loss, model, 1e5)
        np.testing.assert_allclose(out.model.u, right, atol=1e-7)
        assert right[1:].max() > 0.5


@pytest.mark.slow
def test_limit_of_a_network_from_a_tiny_start():
    x = jnp.linspace(-1.0, 1.2, 3)
    loss = gf.SquaredError(x, jnp.array([0.4, -0.2, 0.5]))
    keys = jr.split(jr.key(3), 3)
    shapes = (4, 1), (4,), (4,)
    start = [1e-6 * jr.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
    model = gf.models.TwoLayer(*start)
    out = manifold.limit_map(loss, model)
    right = lsoda_limit(loss, model, 1e5)
    error = np.linalg.norm(flat(out.model) - right) / np.linalg.norm(right)
    assert error < 1e-7 and loss(out.model) < 1e-20


def test_the_last_move_is_as_short_as_it_seemed():
    """Beside the saddle u = (1, 1e-10), whence Gauss–Newton goes to (1, 1/2)."""
    loss = gf.SquaredError(jnp.eye(2), jnp.array([1.0, 0.25]))
    params, static = eqx.partition(Squares(jnp.array([1.0, 1e-10])), eqx.is_array)
    theta, flat_loss = flatten(loss, params, static)
    end, residual, found = _finish(flat_loss, theta, JacobianForm(), None)
    assert residual < 1e-10 and jnp.abs(end[1]) > 0.1 and not found
    _, _, found = _finish(flat_loss, jnp.array([1 + 1e-8, 0.5]), JacobianForm(), None)
    assert found


@pytest.mark.slow
def test_limit_from_zero(getkey):
    """The solution of least norm, in any unit of the targets."""
    loss, _ = linear_problem(getkey(), samples=3, features=5)
    least = jnp.linalg.pinv(loss.x) @ loss.y
    for unit in (1.0, 1e-9, 1e9):
        scaled = gf.SquaredError(loss.x, unit * loss.y)
        out = manifold.limit_map(scaled, Linear(jnp.zeros(5)))
        np.testing.assert_allclose(out.model.w / unit, least, atol=1e-10)


@pytest.mark.slow
def test_limit_in_other_units():
    """θ in units of c, outputs in units of b: t is in units of c²/b²."""
    x, y = jr.normal(jr.key(0), (3, 5)), jnp.array([1.0, -2.0, 0.5])
    u = jr.normal(jr.key(1), (5,))

    def limit(c, b):
        loss = gf.SquaredError(b / c**2 * x, b * y)
        return manifold.limit_map(loss, Squares(c * u))

    one = limit(1.0, 1.0)
    for c, b in ((1e-9, 1e9), (1e9, 1.0)):
        out = limit(c, b)
        np.testing.assert_allclose(out.model.u / c, one.model.u, atol=1e-11)
        np.testing.assert_allclose(out.time * (b / c) ** 2, one.time, rtol=1e-3)
        assert out.stats.steps < 1.2 * one.stats.steps


@pytest.mark.slow
def test_undefined_start():
    """The gradient of a norm at zero."""
    loss = gf.Loss(lambda m: (jnp.linalg.norm(m.w) - 1) ** 2)
    out = manifold.limit_map(loss, Linear(jnp.zeros(3)), throw=False)
    assert out.result == gf.RESULTS.undefined_start and out.stats.steps < 10


@pytest.mark.slow
def test_healthy_problems_make_no_nans(getkey):
    loss, model = diagonal_problem(getkey(), samples=2, features=4)
    with jax.debug_nans(True):
        for form in ("jacobian", "hessian"):
            limit = manifold.limit_map(loss, model, form=form).model
            assert manifold.spectrum(loss, limit, form=form).rank == 2
            drift = manifold.riemannian_flow(
                gf.GradientFlow(loss),
                limit,
                slow_time=0.5,
                ts=jnp.array([0.0, 0.5]),
                form=form,
            )
            assert drift.succeeded


def overdetermined(key):
    """20 noisy samples of 6 features that span 4 dimensions."""
    kx, ky, kw = jr.split(key, 3)
    x = jr.normal(kx, (20, 4))
    x = jnp.concatenate([x, x[:, :2]], axis=1)
    loss = gf.SquaredError(x, jr.normal(ky, (20,)))
    return loss, Linear(jr.normal(kw, (6,))), jnp.linalg.pinv(x)


@pytest.mark.slow
def test_limit_of_least_squares_without_interpolation(getkey):
    loss, model, pinv = overdetermined(getkey())
    out = manifold.limit_map(loss, model)
    w = model.w + pinv @ (loss.y - loss.x @ model.w)
    np.testing.assert_allclose(out.model.w, w, atol=1e-9)
    assert loss(out.model) > 0.1
    found = manifold.spectrum(loss, out.model)
    assert found.form == "hessian" and found.dimension == 2


@pytest.mark.slow
def test_separable_data_have_no_limit(getkey):
    x = jr.normal(jr.key(3), (12, 3))
    loss = gf.CrossEntropy(x, (x[:, 0] > 0).astype(int))
    model = eqx.nn.MLP(3, 2, 8, 1, activation=jnp.tanh, key=getkey())
    out = manifold.limit_map(loss, model, t_max=1e7, throw=False)
    assert out.result == gf.RESULTS.no_minimiser
    with pytest.raises(Exception, match="no minimiser"):
        manifold.limit_map(loss, model, t_max=1e7)


@pytest.mark.slow
def test_inseparable_data_have_a_limit(getkey):
    """The same inputs with both labels: a minimiser exists, and is found."""
    x = jr.normal(getkey(), (6, 2))
    loss = gf.CrossEntropy(jnp.concatenate([x, x]), jnp.repeat(jnp.arange(2), 6))
    out = manifold.limit_map(loss, eqx.nn.Linear(2, 2, key=getkey()))
    assert out.result == gf.RESULTS.successful
    np.testing.assert_allclose(loss(out.model), jnp.log(2.0), rtol=1e-12)


class Bowl(gf.AbstractLoss):
    """F = Σ (a/2)(w − 9)² + (b/4) w⁴."""

    a: jax.Array
    b: jax.Array

    def __call__(self, model):
        w = model.w
        return jnp.sum(0.5 * self.a * (w - 9) ** 2 + 0.25 * self.b * w**4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "a, b, expected",
    [
        (-2.0, 0.0, gf.RESULTS.diverged),
        # w ~ t^(−1/2): too slow to arrive.
        (0.0, 4.0, gf.RESULTS.not_converged),
        # Relaxes at the rate 1e-8: the norm grows all along, but there is a minimiser.
        (1e-8, 0.0, gf.RESULTS.not_converged),
        (1.0, 0.0, gf.RESULTS.successful),
    ],
)
def test_how_a_flow_ends(a, b, expected):
    loss = Bowl(jnp.array(a), jnp.array(b))
    out = manifold.limit_map(loss, Linear(jnp.ones(2)), t_max=1e6, throw=False)
    assert out.result == expected


@pytest.mark.slow
def test_limit_out_of_steps(diagonal):
    loss, start, _ = diagonal
    out = manifold.limit_map(loss, start, max_steps=3, throw=False)
    assert out.result == gf.RESULTS.out_of_steps


# --- Riemannian flow ---------------------------------------------------------------


@pytest.mark.slow
def test_drift_of_linear_regression(getkey):
    loss, model = linear_problem(getkey(), samples=4, features=9)
    start = manifold.limit_map(loss, model).model
    drift = manifold.riemannian_flow(gf.GradientFlow(loss), start, slow_time=5.0)
    assert len(drift) == 257 and drift.slow_time[-1] == 5.0
    least = jnp.linalg.pinv(loss.x) @ loss.y
    exact = least[None] + jnp.outer(jnp.exp(-drift.slow_time), start.w - least)
    np.testing.assert_allclose(drift.params.w, exact, atol=1e-9)


@pytest.mark.slow
def test_drift_of_least_squares_without_interpolation(getkey):
    loss, model, pinv = overdetermined(getkey())
    start = manifold.limit_map(loss, model).model
    drift = manifold.riemannian_flow(
        gf.GradientFlow(loss), start, slow_time=2.0, ts=jnp.array([0.0, 1.0, 2.0])
    )
    least = pinv @ loss.y
    exact = least[None] + jnp.outer(jnp.exp(-drift.slow_time), start.w - least)
    np.testing.assert_allclose(drift.params.w, exact, atol=1e-9)


@pytest.mark.slow
def test_drift_of_the_diagonal_network(diagonal):
    """u⊙v decays as e^(−2s), the norm falls, and the path stays on M."""
    loss, _, start = diagonal
    drift = manifold.riemannian_flow(
        gf.GradientFlow(loss),
        start,
        slow_time=5.0,
        metrics={"norm": lambda m: m.u @ m.u + m.v @ m.v},
    )
    u, v = drift.params.u, drift.params.v
    product = jnp.outer(jnp.exp(-2 * drift.slow_time), start.u * start.v)
    np.testing.assert_allclose(u * v, product, atol=1e-8)
    assert jnp.all(jnp.diff(drift.penalty) < 0)
    np.testing.assert_allclose(drift.metrics["norm"], 2 * drift.penalty, rtol=1e-13)
    assert jnp.max(drift.train_loss) < 1e-16
    found = manifold.spectrum(loss, drift[-1], form="jacobian")
    np.testing.assert_allclose(
        drift.smallest_curvature[-1], found.smallest_curvature, rtol=1e-8
    )


@pytest.mark.slow
def test_forms_of_the_drift_agree(tanh_net):
    loss, _, start = tanh_net
    ts = jnp.array([0.0, 0.3, 1.0])
    one, two = (
        manifold.riemannian_flow(
            gf.GradientFlow(loss), start, slow_time=1.0, ts=ts, form=form
        )
        for form in ("jacobian", "hessian")
    )
    np.testing.assert_allclose(flat(one[-1]), flat(two[-1]), atol=1e-7)
    np.testing.assert_allclose(
        one.smallest_curvature, two.smallest_curvature, rtol=1e-6
    )


@pytest.mark.slow
def test_drift_passes_through_a_loss_of_rank():
    """With one nonzero coefficient wanted and 6 samples, all coordinates but one die:
    σ_min falls to 1e-6 of its start by s = 20, and the end has the least ℓ1 norm."""
    loss, model = diagonal_problem(jr.key(2), samples=12, features=20, nonzero=1)
    start = manifold.limit_map(loss, model).model
    ts = jnp.array([0.0, 5.0, 10.0, 20.0])
    drift = manifold.riemannian_flow(
        gf.GradientFlow(loss), start, slow_time=20.0, ts=ts, throw=False
    )
    assert drift.smallest_curvature[-1] < 1e-9 * drift.smallest_curvature[0]
    product = jnp.outer(jnp.exp(-2 * ts), start.u * start.v)
    u, v = drift.params.u, drift.params.v
    np.testing.assert_allclose(u * v, product, atol=1e-8)
    beta = u[-1] ** 2 - v[-1] ** 2
    np.testing.assert_allclose(beta, jnp.zeros(20).at[0].set(1.0), atol=1e-6)


@pytest.mark.slow
def test_lost_rank_is_named():
    """uv = 0 crosses itself at the origin, where the drift from (1, 0) is heading."""
    loss = gf.SquaredError(jnp.ones(1), jnp.zeros(1))
    flow = gf.GradientFlow(loss)
    start = Product(jnp.ones(()), jnp.full((), 1e-3))
    kept = manifold.riemannian_flow(flow, start, slow_time=2.0)
    np.testing.assert_allclose(kept[-1].u, jnp.exp(-2.0), rtol=1e-5)
    hidden = gf.SquaredError(
        jnp.array([1.0, 1.0]),
        jnp.array([1.0, 0.0]),
        # One output with a fixed scale, one that dies: rank 2 falls to 1.
        predict=lambda m, x: jnp.stack([m.w[0], m.w[1] * m.w[2]]),
    )
    out = manifold.riemannian_flow(
        gf.GradientFlow(hidden),
        Linear(jnp.array([1.0, 1.0, 0.0])),
        slow_time=25.0,
        throw=False,
    )
    assert out.result == gf.RESULTS.rank_lost


def test_drift_checks_its_times_and_its_start(diagonal):
    loss, _, start = diagonal
    flow = gf.GradientFlow(loss)
    with pytest.raises(ValueError, match="slow_time: "):
        manifold.riemannian_flow(flow, start, slow_time=-1.0)
    with pytest.raises(ValueError, match="ts: "):
        manifold.riemannian_flow(
            flow, start, slow_time=1.0, ts=jnp.array([0.0, 0.5, 0.2])
        )


# --- Transformations ---------------------------------------------------------------


@pytest.mark.slow
def test_under_jit_and_vmap(getkey):
    loss, _ = linear_problem(getkey(), samples=4, features=9)
    models = Linear(jr.normal(getkey(), (3, 9)))
    flow = gf.GradientFlow(loss)

    def all_of_it(model):
        limit = manifold.limit_map(loss, model, throw=False)
        point = manifold.retract(loss, model, throw=False)
        drift = manifold.riemannian_flow(
            flow, limit.model, slow_time=1.0, ts=jnp.array([0.0, 1.0]), throw=False
        )
        v = manifold.tangent_projection(loss, limit.model, model)
        found = manifold.spectrum(loss, limit.model)
        return limit.model.w, point.model.w, v.w, drift.params.w[-1], found.rank

    batch = eqx.filter_jit(eqx.filter_vmap(all_of_it))(models)
    pinv = jnp.linalg.pinv(loss.x)
    for i in range(3):
        w = models.w[i] + pinv @ (loss.y - loss.x @ models.w[i])
        kernel = models.w[i] - pinv @ (loss.x @ models.w[i])
        np.testing.assert_allclose(batch[0][i], w, atol=1e-10)
        np.testing.assert_allclose(batch[1][i], w, atol=1e-12)
        np.testing.assert_allclose(batch[2][i], kernel, atol=1e-12)
        end = pinv @ loss.y + jnp.exp(-1.0) * kernel
        np.testing.assert_allclose(batch[3][i], end, atol=1e-9)
        assert batch[4][i] == 4


@pytest.mark.slow
def test_single_precision(getkey):
    loss, model = linear_problem(getkey(), samples=4, features=9)
    single = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    out = manifold.limit_map(single(loss), single(model), rtol=1e-5)
    assert out.model.w.dtype == jnp.float32
    exact = model.w + jnp.linalg.pinv(loss.x) @ (loss.y - loss.x @ model.w)
    np.testing.assert_allclose(out.model.w, exact, atol=1e-5)
