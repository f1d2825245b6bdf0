"""The critical manifold, against cases whose geometry is known in closed form."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import Diagonal, flat, Linear, linear_problem, Product, random_like

import gradflow as gf
from gradflow import manifold

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
    out = manifold.retract(loss, model)
    np.testing.assert_allclose(out.model.w, w, atol=1e-13)
    assert str(out).startswith("Point of the critical manifold reached (")


def test_retraction_says_when_there_is_nothing_to_reach():
    """f = u² + 1 cannot be 0; u = 0 is critical, but not in the Jacobian form."""
    loss = gf.SquaredError(
        jnp.ones(1), jnp.zeros(1), predict=lambda m, x: (m.w[0] ** 2 + 1) * x
    )
    out = manifold.retract(loss, Linear(jnp.ones(1)), form="jacobian", throw=False)
    assert out.result == gf.RESULTS.not_critical
    assert "FAILED: The point reached is not on the critical manifold" in str(out)
    with pytest.raises(Exception, match="not on the critical manifold"):
        manifold.retract(loss, Linear(jnp.ones(1)), form="jacobian")


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
    out = manifold.limit_map(single(loss), single(model))
    assert out.model.w.dtype == jnp.float32
    # By default the finest tolerance that is resolved.
    assert 0.9e-4 < out.stats.rtol < 1.1e-4 and out.stats.steps < 60
    exact = model.w + jnp.linalg.pinv(loss.x) @ (loss.y - loss.x @ model.w)
    np.testing.assert_allclose(out.model.w, exact, atol=1e-5)
