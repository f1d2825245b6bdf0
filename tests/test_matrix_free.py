"""KKT without a matrix: stages by preconditioned conjugate gradients."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from numpy.testing import assert_allclose

import gradflow as gf
from gradflow.flow.flat import flatten
from gradflow.flow.operations import operations
from gradflow.solvers import matrix_free
from gradflow.solvers.kernel import fits
from gradflow.solvers.matrix_free import _blocks, FreeMatrix, most_rows, Nystrom

FREE = {"KKT4": gf.KKT4(matrix_free=True), "KKT5": gf.KKT5(matrix_free=True)}


def all_flat(path):
    """θ at the saved times, as rows."""
    leaves = [np.asarray(x) for x in jax.tree.leaves(path.params)]
    return np.concatenate([x.reshape(len(path), -1) for x in leaves], axis=1)


def farthest(path, exact):
    """The largest relative error of θ at the saved times."""
    return max(
        np.linalg.norm(a - b) / np.linalg.norm(b)
        for a, b in zip(all_flat(path), all_flat(exact), strict=True)
    )


def problem(loss, *, samples=40, width=20, classes=3):
    """A flow, and a tanh network to start from: 2 or more outputs a sample for
    `CrossEntropy` alone."""
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(samples, 2)))
    y = jnp.tanh(2 * x[:, 0]) * x[:, 1]
    out = "scalar"
    if loss is gf.Logistic:
        y = (y > 0).astype(float)
    if loss is gf.CrossEntropy:
        y, out = jnp.digitize(y, jnp.asarray([-0.3, 0.3])), classes
    model = eqx.nn.MLP(2, out, width, 1, jnp.tanh, key=jr.key(1))
    return gf.GradientFlow(loss(x, y)), model


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["m < d", "m > d", "cross-entropy", "logistic", "uneven"]
)
@pytest.mark.parametrize("solver", ["KKT4", "KKT5"])
def test_follows_the_flow_as_the_matrix_does(kind, solver):
    """As exactly, in about as many steps."""
    loss = {"cross-entropy": gf.CrossEntropy, "logistic": gf.Logistic}.get(
        kind, gf.SquaredError
    )
    size = dict(samples=120, width=10) if kind == "m > d" else {}
    flow, model = problem(loss, **size)
    if kind == "uneven":
        first = gf.penalties.L2(where=lambda model: model.layers[0])
        penalty = 3.0 * first + gf.penalties.L2()
        flow = gf.GradientFlow(flow.loss, penalty=penalty)
    run = dict(weight_decay=1e-3, slow_time=2.0, saves=9)
    exact = gf.simulate(flow, model, solver=gf.KKT5(), rtol=1e-9, **run)
    dense = gf.simulate(flow, model, solver=getattr(gf, solver)(), rtol=1e-6, **run)
    free = gf.simulate(flow, model, solver=FREE[solver], rtol=1e-6, **run)
    assert farthest(free, exact) < 5e-6
    assert int(free.stats.steps) <= 1.2 * int(dense.stats.steps)
    assert int(free.stats.iterations) <= 1.2 * int(dense.stats.iterations)
    assert int(free.stats.products) < 8 * int(free.stats.iterations)
    assert dense.stats.products is None
    # The recorded train loss comes from the multiplier, which is polished.
    off = np.abs(free.train_loss / exact.train_loss - 1).max()
    known = np.abs(dense.train_loss / exact.train_loss - 1).max()
    assert off < 2 * known + 1e-5


def matrices(loss, rank, *, uneven=False):
    """A step's matrix without rows, and with as many as `rank`; and θ."""
    flow, model = problem(loss)
    params, static = flow.partition(model)
    theta, flat = flatten(flow.loss, params, static)
    m, c = flat.residuals(theta).size, jnp.asarray(1e4)
    alpha = jnp.asarray(1.3)
    if uneven:
        alpha = jnp.asarray(np.random.default_rng(2).uniform(1, 3, size=theta.size))
    none = Nystrom.none(flat, theta, m)
    none = eqx.tree_at(lambda k: k.rows, none, none.rows[:rank])
    if none.gram is not None:
        none = eqx.tree_at(lambda k: k.gram, none, none.gram[:rank, :rank])
    kernel = none.renewed(flat, theta, alpha, c)
    both = [FreeMatrix.of(flat, k, theta, alpha, c) for k in (none, kernel)]
    return flat, theta, both


@pytest.mark.parametrize(
    "loss",
    [
        gf.SquaredError,
        pytest.param(gf.Logistic, marks=pytest.mark.slow),
        pytest.param(gf.CrossEntropy, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("uneven", [False, True])
def test_solves_the_stage_equations(loss, uneven):
    """A δθ + c Jᵀδμ = lack and δμ − ℓ''J δθ = off, as one system of d + m, to what is
    asked; and the rows spare products."""
    flat, theta, (plain, better) = matrices(loss, 32, uneven=uneven)
    z, push, pull = flat.linearize(theta)
    draw = np.random.default_rng(1)
    lack, off = (jnp.asarray(draw.normal(size=v.shape)) for v in (theta, z))
    off = flat.outer_hvp(z, off)  # ∇ℓ(z) − μ, both of which are in its range
    d, m = theta.size, z.size
    jac, curved = flat.jacobian(theta), jax.hessian(flat.outer)(z)
    alpha = jnp.broadcast_to(better.alpha, (d,))
    system = jnp.block(
        [[jnp.diag(alpha), better.c * jac.T], [-curved @ jac, jnp.eye(m)]]
    )
    exact = jnp.linalg.solve(system, jnp.concatenate([lack, off]))
    dy, dmu, with_rows = better.change(lack, off, z, push, pull)
    *_, without = plain.change(lack, off, z, push, pull)
    assert jnp.linalg.norm(dy - exact[:d]) < 0.2 * jnp.linalg.norm(exact[:d])
    # The first of the equations holds whatever s is.
    found = alpha * dy + better.c * pull(dmu)
    assert_allclose(found, lack, rtol=1e-6, atol=1e-6 * float(jnp.abs(lack).max()))
    assert int(without) > 4 * int(with_rows) > 0
    # The multiplier alone, as its polish asks: with the present ℓ'' of what is given.
    p, q = draw.normal(size=m), curved @ draw.normal(size=m)
    found, _ = better.solve(jnp.asarray(p), q, z + 1, push, pull)
    inner = jnp.eye(m) + better.c * curved @ (jac / alpha[None]) @ jac.T
    q = flat.outer_hvp(z + 1, jnp.asarray(p)) + q
    expected = jnp.linalg.solve(inner, q)
    assert jnp.linalg.norm(found - expected) < 0.02 * jnp.linalg.norm(expected)


def test_rows_are_as_many_as_are_needed():
    """Blocks are made until one finds little."""
    flat, theta, _ = matrices(gf.SquaredError, 32)
    whole = flat.outer_curvature * np.asarray(flat.tangent_kernel(theta))
    largest = np.linalg.eigvalsh(whole)[-1]
    none = Nystrom.none(flat, theta, 40)
    assert none.rows.shape == (40, 40)
    for c, count in ((1 / largest, 20), (1e3, 40), (1e12, 40)):
        made = none.renewed(flat, theta, jnp.asarray(1.0), jnp.asarray(c))
        rows = np.asarray(made.rows)
        used = np.abs(rows).max(axis=1) > 0
        assert used.sum() == made.price == count
        rest = np.linalg.eigvalsh(whole - flat.outer_curvature * rows.T @ rows)
        assert rest.min() > -1e-12 * largest and c * rest.max() < 30
    assert most_rows(10**6, 10**6) == 32 and most_rows(11_000, 12_000) == 512


@pytest.mark.parametrize("outputs", [1, 31, 32, 33, 63, 65, 129, 10**5, 2**24])
def test_rows_are_whole_blocks(outputs):
    count, block = _blocks(10**6, outputs)
    assert most_rows(10**6, outputs) == count * block <= min(512, outputs)
    assert block <= 32 and count * (block + 1) > min(512, outputs, 2**25 // outputs)


def test_an_uneven_penalty_renews_no_more_often():
    """What preconditions has A inside, and need not be exact in it."""
    flow, model = problem(gf.SquaredError)
    last = gf.L2(where=lambda m: m.layers[-1])
    uneven = eqx.tree_at(lambda f: f.penalty, flow, gf.L2() + 0.5 * last)
    kernels = [
        gf.simulate(
            f, model, weight_decay=1e-4, slow_time=1.0, rtol=1e-4, saves=5,
            solver=FREE["KKT4"],
        ).stats.kernels
        for f in (flow, uneven)
    ]  # fmt: skip
    assert kernels[1] < 2 * kernels[0] + 3


def test_an_old_preconditioner_is_renewed_when_that_pays():
    flat, theta, (plain, _) = matrices(gf.SquaredError, 32)
    kernel = plain.kernel
    assert int(kernel.price) == 20
    counts = lambda n: (jnp.array(10), jnp.array(n))
    kernel, stale = kernel.served(*counts(10))
    assert not stale  # one product an iteration is none too many
    kernel, stale = kernel.served(*counts(25))
    assert not stale and float(kernel.excess) == 15
    _, stale = kernel.served(*counts(25))
    assert stale
    new = kernel.renewed(flat, theta, jnp.asarray(1.0), jnp.asarray(1e12))
    new, stale = new.served(*counts(50))
    assert not stale and float(new.usual) == 5 and float(new.excess) == 0


def test_negative_curvature_ends_it():
    """Where ℓ is concave conjugate gradients stop with what there is."""
    flat, theta, (plain, _) = matrices(gf.SquaredError, 32)

    class Concave:
        outer_curvature = None

        def outer_hvp(self, z, u):
            return -u

    concave = eqx.tree_at(lambda m: m.loss, plain, Concave())
    z, push, pull = flat.linearize(theta)
    lack, none = jnp.ones_like(theta), jnp.zeros_like(z)
    dy, dmu, count = concave.change(lack, none, z, push, pull)
    assert int(count) == 0
    assert_allclose(dy, lack / concave.alpha)
    assert_allclose(dmu, 0)
    found, count = concave.solve(none + 1, none, z, push, pull)
    assert int(count) == 1
    assert np.isnan(found).all()  # the multiplier then stays as it is


def test_products_that_do_not_suffice(monkeypatch):
    """A multiplier that could not be made more exact stays as it is."""
    monkeypatch.setattr(matrix_free, "_MOST", 4)
    flow, model = problem(gf.SquaredError, samples=37)
    path = gf.simulate(
        flow, model, weight_decay=1e-5, slow_time=0.5, rtol=1e-4, saves=5,
        solver=FREE["KKT4"], max_steps=500,
    )  # fmt: skip
    exact = gf.simulate(
        flow, model, weight_decay=1e-5, slow_time=0.5, rtol=1e-7, saves=5,
        solver=gf.KKT5(),
    )  # fmt: skip
    assert farthest(path, exact) < 5e-4
    assert_allclose(path.train_loss, exact.train_loss, rtol=0.05)


@pytest.mark.slow
def test_under_vmap_and_jit():
    flow, model = problem(gf.SquaredError)
    run = dict(slow_time=1.0, saves=3, rtol=1e-6, solver=FREE["KKT4"])
    decays = jnp.asarray([1e-2, 1e-3])
    many = eqx.filter_jit(
        eqx.filter_vmap(lambda lam: gf.simulate(flow, model, weight_decay=lam, **run))
    )(decays)
    for i, lam in enumerate(decays):
        one = gf.simulate(flow, model, weight_decay=lam, **run)
        lane = jax.tree.map(lambda x, i=i: x[i], many.params)
        for found, expected in zip(
            jax.tree.leaves(lane), jax.tree.leaves(one.params), strict=True
        ):
            assert_allclose(found, expected, atol=2e-6)


def test_float32():
    flow, model = problem(gf.SquaredError)
    run = dict(weight_decay=1e-3, slow_time=2.0, saves=5)
    exact = gf.simulate(flow, model, solver=gf.KKT5(), rtol=1e-8, **run)
    single = lambda tree: jax.tree.map(
        lambda x: x.astype(jnp.float32) if eqx.is_inexact_array(x) else x, tree
    )
    path = gf.simulate(
        gf.GradientFlow(single(flow.loss)),
        single(model),
        solver=FREE["KKT4"],
        rtol=1e-4,
        **run,
    )
    assert all_flat(path).dtype == np.float32
    assert farthest(path, exact) < 5e-4


class Squares(eqx.Module):
    """z = θ ⊙ θ, of which some are asked twice."""

    theta: jax.Array

    def __call__(self, at):
        return self.theta[at] ** 2


@pytest.mark.slow
def test_beyond_the_limits():
    """12 000 outputs and 11 000 parameters: neither of the matrices fits, and no array
    of their size is made. Each θ² follows a logistic equation of its own."""
    m, d, lam = 12_000, 11_000, 1e-3
    assert not fits(d, m)
    at = np.arange(m) % d
    y = 1 + 0.5 * np.random.default_rng(0).random(m)
    predict = lambda model, at: model(at)
    loss = gf.SquaredError(
        jnp.asarray(at), jnp.asarray(y), reduction="sum", predict=predict
    )
    flow, model = gf.GradientFlow(loss), Squares(jnp.full(d, 0.5))

    def run(model):
        return gf.simulate(
            flow, model, weight_decay=lam, slow_time=1.0, saves=5, rtol=1e-4,
            solver=gf.KKT4(),
        )  # fmt: skip

    path = run(model)
    a, b = 4 * np.bincount(at, y) - 2 * lam, 4 * np.bincount(at)
    t = np.asarray(path.t)[:, None]
    exact = np.sqrt(a / (b + (a / 0.25 - b) * np.exp(-a * t)))
    assert np.abs(path.params.theta / exact - 1).max() < 5e-4
    assert int(path.stats.products) < 10 * int(path.stats.iterations)
    program = jax.make_jaxpr(lambda model: run(model).params)(model)
    sizes = [out.aval.size for one in operations(program) for out in one.outvars]
    assert m < max(sizes) <= 512 * m


def test_refused_with_the_cause():
    flow, model = problem(gf.SquaredError)
    opaque = gf.GradientFlow(gf.Loss(lambda m: flow.loss(m)))
    lasso = gf.GradientFlow(flow.loss, penalty=gf.penalties.L1())
    run = dict(weight_decay=1e-2, slow_time=1.0, solver=FREE["KKT4"])
    with pytest.raises(ValueError, match="^matrix_free: expected a composite loss"):
        gf.simulate(opaque, model, **run)
    with pytest.raises(ValueError, match="^penalty: along its kinks"):
        gf.simulate(lasso, model, **run)
