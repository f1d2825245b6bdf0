"""`jax.vmap(f)(path.models)` for any Equinox model, and what else is done with them."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import Linear

import gradflow as gf
from gradflow.runs.stacked import constant, stacked

X = jr.normal(jr.key(0), (4, 3))


class Odd(eqx.Module):
    """With leaves of every kind, each of which counts."""

    weight: jax.Array
    order: jax.Array  # of integers
    key: jax.Array
    name: str
    flag: bool
    power: int
    factor: float
    shift: complex
    nothing: None
    numbers: np.ndarray
    activation: object
    half: object
    kind: object

    def __call__(self, x):
        assert self.nothing is None and self.name == "odd" and f"{self.name}" == "odd"
        assert isinstance(self.power, int) and isinstance(self.factor, float)
        out = self.activation(self.weight @ x[self.order]) * self.factor**self.power
        if self.flag:
            out = self.half(out) + jr.uniform(self.key)
        return (out + self.numbers.sum() + self.shift.real).astype(self.kind)


def halved(x, by):
    return x / by


def odd(key):
    return Odd(
        jr.normal(key, (3,)), jnp.array([2, 0, 1]), jr.key(7), "odd", True, 2, 0.5,
        2.0 + 1j, None, np.arange(3.0), jnp.tanh, functools.partial(halved, by=2.0),
        jnp.float64,
    )  # fmt: skip


def tied(key):
    """A layer and its transpose, one set of weights."""
    into, back = eqx.nn.Linear(3, 3, key=key), eqx.nn.Linear(3, 3, key=key)
    shared = eqx.nn.Shared((into, back), lambda p: p[1].weight, lambda p: p[0].weight.T)

    class Tied(eqx.Module):
        shared: eqx.nn.Shared

        def __call__(self, x):
            into, back = self.shared()
            return back(jnp.tanh(into(x)))[0]

    return Tied(shared)


class Dropped(eqx.Module):
    """A net that has Python numbers for leaves; and a layer with a state."""

    layers: eqx.nn.Sequential
    norm: eqx.nn.BatchNorm
    state: eqx.nn.State

    def __init__(self, key):
        norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
            3, axis_name="x", mode="ema"
        )
        # Statistics of what was seen before, which stay as they are.
        _, state = jax.vmap(norm, axis_name="x", in_axes=(0, None), out_axes=(0, None))(
            X, state
        )
        self.norm, self.state = eqx.nn.inference_mode(norm), state
        self.layers = eqx.nn.Sequential(
            [
                eqx.nn.Linear(3, 4, key=key),
                eqx.nn.Lambda(jax.nn.softplus),
                eqx.nn.Dropout(0.3, inference=True),
                eqx.nn.WeightNorm(eqx.nn.Linear(4, "scalar", key=key)),
            ]
        )

    def __call__(self, x):
        return self.layers(self.norm(x, self.state)[0])


def mlp(key):
    return eqx.nn.MLP(3, "scalar", 4, 1, jnp.tanh, key=key)


def frozen(model):
    """All but the first matrix."""
    first = jax.tree.map(lambda _: False, model)
    return eqx.tree_at(lambda m: m.layers[0].weight, first, True)


MODELS = {
    "mlp": (mlp, eqx.is_inexact_array),
    "frozen": (mlp, frozen(mlp(jr.key(1)))),
    "odd": (odd, lambda leaf: eqx.is_array(leaf) and leaf.shape == (3,)
            and leaf.dtype == float),
    "tied": (tied, eqx.is_inexact_array),
    "dropped": (Dropped, eqx.is_inexact_array),
    "house": (lambda key: gf.models.DeepLinear((jr.normal(key, (1, 3)),)), None),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_vmap_is_each_model(name):
    make, trainable = MODELS[name]
    model = make(jr.key(1))
    y = jnp.zeros_like(jax.vmap(model)(X))
    flow = gf.GradientFlow(
        gf.SquaredError(X, y),
        **({} if trainable is None else {"trainable": trainable}),
    )
    path = gf.descent(flow, model, weight_decay=0.1, learning_rate=0.1, steps=3)
    each = np.stack([jax.vmap(path[i])(X) for i in range(4)])
    assert np.ptp(each, axis=0).max() > 1e-3
    outputs = lambda m: jax.vmap(m)(X)
    models = path.models
    assert type(models) is type(model)
    leaves = jax.tree.leaves(models)
    assert all(eqx.is_array(leaf) and len(leaf) == 4 for leaf in leaves)
    mapped = jax.vmap(outputs)
    for each_of in (mapped, jax.jit(mapped), eqx.filter_jit(mapped),
                    eqx.filter_vmap(outputs)):  # fmt: skip
        np.testing.assert_allclose(each_of(models), each, rtol=1e-12, atol=1e-14)
    third = jax.tree.map(lambda leaf: leaf[2], models)
    np.testing.assert_allclose(outputs(third), each[2], rtol=1e-12, atol=1e-14)
    # A path's own models are as they were given.
    assert eqx.tree_equal(path[0], model)
    assert jax.tree.structure(path[3]) == jax.tree.structure(model)
    slopes = jax.vmap(lambda m: jnp.sum(jax.vmap(jax.grad(lambda x: m(x).sum()))(X)))
    assert slopes(models).shape == (4,)


def test_lanes_and_times():
    """Of a sweep they have both axes; and one program serves another path."""
    flow = gf.GradientFlow(gf.SquaredError(X, X[:, 0]), trainable=MODELS["frozen"][1])
    lanes = gf.sweep(
        flow, mlp(jr.key(1)), weight_decay=[0.1, 0.2], run=gf.Descent(0.1, steps=3),
        progress=False,
    )  # fmt: skip
    traced = []

    @jax.jit
    def losses(models):
        traced.append(None)
        return jax.vmap(flow.loss)(models)

    both = jax.vmap(jax.vmap(flow.loss))(lanes.paths.models)
    np.testing.assert_allclose(both, lanes.train_loss, rtol=1e-12)
    for path in lanes:
        np.testing.assert_allclose(losses(path.models), path.train_loss, rtol=1e-12)
    assert len(traced) == 1
    inside = jax.jit(lambda: jax.vmap(flow.loss)(lanes[0].models))()
    np.testing.assert_allclose(inside, lanes.train_loss[0], rtol=1e-12)


@pytest.mark.slow
def test_of_a_drift_and_a_prediction():
    loss = gf.SquaredError(X[:2], X[:2, 0])
    model = mlp(jr.key(1))
    theory = gf.two_phase(gf.GradientFlow(loss), model, slow_time=0.3, throw=False)
    losses = jax.vmap(loss)(theory.drift.models)
    np.testing.assert_allclose(losses, theory.drift.train_loss, atol=1e-12)
    t = jnp.array([0.1, 1.0, 2.0])
    told = jax.vmap(loss)(theory.predict(t, 1e-3))
    each = [loss(theory.predict(float(one), 1e-3)) for one in t]
    np.testing.assert_allclose(told, each, rtol=1e-9)


def test_constants():
    """They are their values, also where these are not equal to themselves."""
    leaves = [True, False, 3, -0.0, np.nan, "word", 1 + 2j, jnp.tanh, (), None, object]
    for leaf in leaves[:7]:
        one, two = constant(leaf), constant(leaf)
        assert jax.tree.leaves(one) == []
        assert jax.tree.structure(one) == jax.tree.structure(two)
        assert repr(jax.tree.map(abs, one)) == repr(leaf)
    assert jax.tree.structure(constant(0.0)) != jax.tree.structure(constant(-0.0))
    assert jax.tree.structure(constant(1)) != jax.tree.structure(constant(True))
    kind = constant(object)
    assert type(kind()) is object and hash(kind) == hash(object)
    assert kind == constant(object) and kind != constant(int)
    assert kind.__module__ == "gradflow.runs.stacked" and repr(kind) == repr(object)
    one = jnp.ones(2, jnp.float32)
    for number in map(constant, (0.5, 2)):
        assert (one * number).dtype == jnp.maximum(number, one).dtype == one.dtype


def test_they_are_saved(tmp_path):
    model = odd(jr.key(1))
    params, static = eqx.partition(model, MODELS["odd"][1])
    many = stacked(jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params), static, (2,))
    gf.save(tmp_path / "models.npz", many)
    read = gf.load(tmp_path / "models.npz")
    assert jax.tree.structure(read.activation) == jax.tree.structure(many.activation)
    outputs = lambda m: jax.vmap(m)(X)
    np.testing.assert_array_equal(jax.vmap(outputs)(read), jax.vmap(outputs)(many))
    single = Linear(jnp.ones((2, 3)))
    assert eqx.tree_equal(stacked(single, Linear(None), (2,)), single)
