"""Arguments that make no sense: one line that names them, before any compute; where
they are being traced, the result."""

import json
import os
import re
import subprocess
import sys
import textwrap

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import Linear

import gradflow as gf
from gradflow.results import CODES, codes

# In a process of its own: there the annotations are not checked at run time, as they
# are not for users. A case is named after the argument that is wrong in it.

_CASES = """
import functools, json, sys
import diffrax, equinox as eqx, jax, jax.numpy as jnp, jax.random as jr, numpy as np
sys.path.insert(0, {tests!r})
from helpers import Linear
import gradflow as gf

gf.enable_float64()

ran = []
def predict(model, x):
    jax.debug.callback(lambda: ran.append(None))
    return x @ model.w

x, y = jnp.ones((4, 3)), jnp.ones(4)
loss = gf.SquaredError(x, y, predict=predict)
flow, model = gf.GradientFlow(loss), Linear(jnp.ones(3))
held = gf.GradientFlow(loss, hold_norm=True)
manifold, f32 = gf.manifold, jnp.float32

class Logits(eqx.Module):
    w: jax.Array
    name: str = eqx.field(default="none", static=False)
    count: jax.Array = eqx.field(default_factory=lambda: jnp.arange(2))
    def __call__(self, x):
        jax.debug.callback(lambda: ran.append(None))
        return self.w @ x

logits = Logits(jnp.ones((2, 3)))
far = gf.CrossEntropy(x, jnp.array([0, 1, 2, 0]))  # there are two logits only
entropy = gf.GradientFlow(gf.CrossEntropy(x, jnp.array([0, 1, 1, 0])))

def run(flow=flow, model=model, **options):
    return gf.simulate(flow, model, **dict(dict(weight_decay=0.1, t1=1.0), **options))

def step(flow=flow, model=model, **options):
    usual = dict(weight_decay=0.1, learning_rate=0.1, steps=3)
    return gf.descent(flow, model, **dict(usual, **options))

def many(flow=flow, model=model, **options):
    usual = dict(weight_decay=[0.1, 0.2], t1=1.0, progress=False)
    return gf.sweep(flow, model, **dict(usual, **options))

def stored(**options):
    return many(store=gf.Store("nowhere.zarr", **options))

def steps(flow=flow, model=model, **options):
    usual = dict(learning_rate=0.1, steps=3)
    run = gf.Descent(**dict(usual, **options))
    return gf.sweep(flow, model, weight_decay=[0.1, 0.2], run=run, progress=False)

def theory(flow=flow, model=model, **options):
    return gf.two_phase(flow, model, **dict(dict(slow_time=1.0), **options))

def drift(flow=flow, model=model, **options):
    return manifold.riemannian_flow(flow, model, **dict(dict(slow_time=1.0), **options))

def limit(loss=loss, model=model, **options):
    return manifold.limit_map(loss, model, **options)

def norms(flow=flow, **options):
    usual = dict(scales=[1.0, 2.0, 3.0], t1=1.0, progress=False)
    return gf.landscape(flow, model, **dict(usual, **options))

points = dict(
    spectrum=manifold.spectrum, retract=manifold.retract, diagnose=manifold.diagnose,
    tangent_projection=lambda f, m, **o: manifold.tangent_projection(f, m, m, **o),
)
single = Linear(jnp.ones(3, f32))
low = gf.GradientFlow(gf.SquaredError(x.astype(f32), y.astype(f32)))
wide = Linear(jnp.ones(5))
plain = gf.GradientFlow(gf.SquaredError(x, y))
chosen = lambda pick: run(gf.GradientFlow(entropy.loss, trainable=pick), logits)
bad = dict(
    label_noise=(-0.1, "0.1", 1j),
    gradient_noise=(-0.1, "0.1", 1j),
    weight_decay=(-0.1, None, "0.1", 1j, np.nan, True),
    init_scale=(0.0, "1", [1.0]),
    rtol=(0.0, 1.0, [1e-6, 1e-8], "1e-6", 1j),
    atol=(-1.0, np.inf, "0", [1e-9]),
    max_steps=(0, -3, 10.0, None, "9", True),
    saves=(4.5, 2, "7", None, jnp.asarray(5.0)),
    solver=(gf.KKT4, "KKT4", diffrax.Euler(), diffrax.KenCarp4(), diffrax.Tsit5, 3),
    metrics=([loss], loss, dict(test=3.0), {{1: loss}}, dict(test="loss")),
)
t1 = (0.0, -1.0, np.inf, [1.0, 2.0], "1", 1j, True)
ts = ([1.0], [0.0, 1j], "01", [[0.0, 1.0]], [0.0, np.nan], [1.0, 0.5], 3.0, [-1.0, 1.0])

cases = []
def case(name, call, *values, as_is=False, **fixed):
    for value in values:
        options = fixed if as_is else dict(fixed, **{{name: value}})
        cases.append((name, str(value), functools.partial(call, **options)))

for name, values in bad.items():
    noisy = name.endswith("_noise")
    case(name, *((step, *values) if noisy else (run, *values)))
for call, names in (
    (many, ("init_scale", "atol", "max_steps", "saves", "solver", "metrics")),
    (step, ("weight_decay", "init_scale", "saves", "metrics")),
    (drift, ("rtol", "atol", "max_steps", "solver", "metrics")),
    (limit, ("rtol", "atol", "max_steps", "solver")),
    (theory, ("rtol", "max_steps", "metrics")),
    (norms, ("saves", "max_steps", "solver", "metrics")),
):
    for name in names:
        values = [v for v in bad[name] if call is not many or not isinstance(v, list)]
        case(name, call, *(values if name == "metrics" else values[:3]))
case("weight_decay", many, -0.1, [0.1, -0.1], "0.1", [[0.1]], None, ["a", "b"])
case("weight_decay", many, lambda t: 0.1)
case("t1", run, *t1)
case("t1", many, *t1[:3])
case("t1", step, *t1[:3], steps=None)
case("slow_time", run, *t1, t1=None)
case("slow_time", theory, *t1)
case("slow_time", drift, *t1)
case("ts", run, *ts, t1=None)
case("ts", many, *ts, t1=None)
case("ts", drift, [0.0, 1j], "01", [0.0, np.nan], [1.0, 0.5], [0.0, 9.0])
case("rtol", many, [0.0, 1e-6], "1e-6", -1.0)
case("learning_rate", step, 0.0, -1.0, "0.1", None, [0.1, 0.2], lambda t: -0.1)
case("learning_rate", run, 0.0, -1.0, "0.1", [0.1, 0.2], lambda t: 0.1, t1=9.0)
case("learning_rate", steps, 0.0, "0.1", None, [0.1, -1.0], lambda t: -0.1)
case("steps", steps, 0, 2.5, "3", True, [3])
case("at", steps, [0.5, 1.0], [3], [2, 1], "01", steps=None)
case("method", steps, "newton", ["projected"])
case("optimiser", steps, "adam", 3)
case("key", steps, 3, "0", batch_size=2)
case("batch_size", steps, 0, 2.0, 9, key=jr.key(0))
case("run", many, 3, "descent", dict(learning_rate=0.1))
case("steps", step, 0, 2.5, "3", True, [3])
case("at", step, [0.5, 1.0], [3], [2, 1], "01", steps=None)
case("method", step, "newton", None, ["projected"])
case("optimiser", step, "adam", 3)
case("key", step, 3, "0", batch_size=2)
case("batch_size", step, 0, 2.0, 9, key=jr.key(0))
case("batch", many, "pmap", 3)
case("chunk", stored, 0, 1.5, "4")
case("checkpoint", stored, -1.0, "60", None)
case("path", gf.Store, 3, ["a"], None)
case("store", many, 3, ["a"])
case("t_max", limit, 0.0, "1e10", -1.0)
case("residual_tol", limit, -1.0, "0")
case("form", limit, "gram", None)
case("solver", drift, gf.KKT5())
case("order", theory, 3, "1", None)
case("scales", norms, [1.0, 2.0], [0.0, 1.0, 2.0], "123", [1.0, 3.0, 2.0], 1j)
for name, call in points.items():
    of = functools.partial(call, flow, model)
    case("rtol", of, 0.0, "1e-6", [1e-3])
    case("max_steps", of, 0, 2.5, "9")
    case("form", of, "gram")
    case("flow", functools.partial(call, held, model), "sphere", as_is=True)

# A flow where its penalty counts, and nothing else anywhere.
for call in (run, step, many, theory, drift):
    case("flow", call, loss)
case("flow", lambda: gf.onset(loss, None), None, as_is=True)
case("flow", lambda: gf.radial_law(loss, None), None, as_is=True)
case("flow", lambda: manifold.diagnose(loss, model), None, as_is=True)
case("flow", run, 3.0, None, "flow", model)
case("flow", norms, 3.0, None)
case("loss", limit, 3.0, None, predict)
case("flow", theory, held)
case("flow", drift, held)
case("flow", limit, as_is=True, loss=held)
case("flow", lambda: limit(held), None, as_is=True)
pick = lambda a: eqx.is_inexact_array(a)
case("trainable", lambda **o: limit(flow, **o), pick)
case("path", lambda: gf.widths(3), None, as_is=True)
case("path", lambda: gf.onset(flow, model), None, as_is=True)
case("theory", lambda: gf.radial_law(flow, model), None, as_is=True)
case("sweep", lambda: gf.compare(model, None), None, as_is=True)
case("scale", lambda: gf.transition_time("2", 0.1), None, as_is=True)
case("weight_decay", lambda: gf.transition_time(2.0, [0.1]), None, as_is=True)

# What the model cannot take, and what does not fit it.
for call in (run, step, many, theory, drift):
    case("x", call, "features", as_is=True, flow=plain, model=wide)
    case("labels", call, "classes", as_is=True, flow=gf.GradientFlow(far), model=logits)
    if call is not step:  # a descent may mix precisions
        case("model", call, "float32", as_is=True, flow=plain, model=single)
for call in (limit, *points.values()):
    case("x", functools.partial(call, plain, wide), "features", as_is=True)
    case("labels", functools.partial(call, gf.GradientFlow(far), logits), "classes",
         as_is=True)
    case("model", functools.partial(call, plain, single), "float32", as_is=True)
case("model", run, "float32 KKT", as_is=True, flow=plain, model=single,
     solver=gf.KKT4(), rtol=1e-4)
case("metrics['test']", run, "labels", as_is=True, flow=entropy, model=logits,
     metrics=dict(test=far))
case("metrics['test']", run, "accuracy", as_is=True, flow=entropy, model=logits,
     metrics=dict(test=gf.Metric(gf.Accuracy(x, far.labels), threshold=0.9)))
case("metrics['test']", run, "features", as_is=True,
     metrics=dict(test=gf.SquaredError(jnp.ones((4, 5)), y)))
case("metrics['test']", run, "real", as_is=True,
     metrics=dict(test=lambda m: jnp.sum(m.w) * 1j))
case("trainable", chosen, "all", as_is=True, pick=lambda leaf: True)
case("trainable", chosen, "ints", as_is=True, pick=eqx.is_array)
case("trainable", chosen, "structure", as_is=True, pick=(True, False))
case("trainable", chosen, "of the model", as_is=True, pick=lambda m: m.layers[0])
case("trainable", lambda: gf.scaled(logits, 2.0, trainable=eqx.is_array), "scaled",
     as_is=True)

# Out of the range of the numbers.
case("slow_time", run, 1e3, t1=None, flow=low, model=single, weight_decay=1e-36,
     rtol=1e-4)
case("slow_time", run, 1e10, t1=None, weight_decay=1e-300)
case("t1", run, 1e39, flow=low, model=single, rtol=1e-4)
case("ts", run, [0.0, 1e39], t1=None, flow=low, model=single, rtol=1e-4)
case("weight_decay", run, 1e-42, flow=low, model=single, rtol=1e-4)
case("slow_time", many, 1e10, t1=None, weight_decay=[0.1, 1e-300])
case("slow_time", step, 1e10, steps=None, weight_decay=1e-300)

# Losses and metrics.
for make in (gf.SquaredError, gf.Huber, gf.Logistic):
    case("y", lambda y, make=make: make(x, y), ["a"] * 4, 1j * y, y[:0])
    case("x", lambda x, make=make: make(x, y), "abcd", [None, "a", 1, 2])
    case("reduction", functools.partial(make, x, y), "max", 3, ["sum"])
    case("predict", functools.partial(make, x, y), 3, "model")
sides = jnp.array([1.0, -1, 1, 1])
for make in (gf.Exponential, gf.SoftMargin, gf.Hinge):
    case("y", lambda y, make=make: make(x, y), ["a"] * 4, 1j * sides, sides[:0],
         0.5 * (1 + sides), sides > 0, 2 * sides)
    case("x", lambda x, make=make: make(x, sides), "abcd", [None, "a", 1, 2])
    case("reduction", functools.partial(make, x, sides), "max", 3, ["sum"])
    case("predict", functools.partial(make, x, sides), 3, "model")
case("delta", functools.partial(gf.Huber, x, y), 0.0, "1", [1.0], np.nan, None)
case("delta", functools.partial(gf.Hinge, x, sides), 0, 0.0, "1", [1.0], np.nan, None)
for make in (gf.SquaredError, gf.Hinge, gf.CrossEntropy):
    given = jnp.arange(4) if make is gf.CrossEntropy else sides
    case("weights", functools.partial(make, x, given), "abcd", 1.0, jnp.ones(3),
         jnp.ones((4, 1)), jnp.zeros(4), -sides, sides * jnp.inf, 1j * sides)
case("labels", functools.partial(gf.CrossEntropy, x), jnp.ones((4, 2)),
     -jnp.eye(4), jnp.eye(4) * jnp.nan)
case("alpha", functools.partial(gf.models.Centred, gf.models.LinearModel(jnp.ones(2))),
     0.0, -1.0, "1", jnp.ones(2), np.nan, None, 1j)
case("weights", gf.Quadratic, -1.0, "1", [1.0, np.nan], 1j)
for make in (gf.CrossEntropy, gf.Accuracy):
    case("labels", lambda labels, make=make: make(x, labels), jnp.ones((4, 1), int),
         jnp.eye(4, dtype=int), y, ["a"] * 4, jnp.arange(4) - 1, 3)
case("threshold", functools.partial(gf.Metric, loss), "0.5", [0.5], 1j, np.nan,
     jnp.ones(2))
case("fn", gf.Metric, 3.0, None)
for make in (gf.metrics.SingularValues, gf.metrics.EffectiveRank, gf.metrics.Norm):
    case("where", make, "w", None, Linear)
case("degree", functools.partial(gf.metrics.Margin, x, jnp.zeros(4, int)), "2", -1,
     np.inf, None, [1.0])
for name, values in dict(count=(0, 4, 2.5, "2"), rtol=(0.0, "1"), max_steps=(0, 2.5),
                         weight_decay=(-1.0, "0.1"), trainable=(3.0,)).items():
    case(name, functools.partial(gf.sharpness, loss, model), *values)
case("loss", lambda loss: gf.sharpness(loss, model), predict, None)
for make in (gf.drifts.Trace, gf.drifts.LargestCurvature, gf.drifts.RootDiagonal):
    case("loss", lambda loss, make=make: make(loss, model), predict, None)
    case("form", functools.partial(make, loss, model), "gram", None)
for preset in (
    functools.partial(gf.drifts.label_noise, learning_rate=0.1, label_noise=0.5),
    functools.partial(gf.drifts.parameter_noise, noise=0.1),
    functools.partial(gf.drifts.sharpness_aware, radius=0.1),
    functools.partial(gf.drifts.adam, learning_rate=0.1, label_noise=0.5),
):
    case("flow", lambda flow, preset=preset: preset(flow, model), held)
    case("weight_decay", functools.partial(preset, loss, model), -0.1, "0.1", [0.1])
case("fn", gf.Loss, 3.0, gf.Loss)
case("loss", gf.GradientFlow, predict, gf.SquaredError, None)
case("penalty", functools.partial(gf.GradientFlow, loss), gf.L1, 1.0)

answers = []
for name, value, call in cases:
    try:
        call()
        answers.append([name, value, "no error", ""])
    except Exception as error:
        answers.append([name, value, type(error).__name__, str(error)])
jax.effects_barrier()
print(json.dumps([answers, len(ran)]))
"""


@pytest.mark.slow
def test_wrong_arguments_are_named_before_any_compute():
    here = os.path.dirname(__file__)
    code = textwrap.dedent(_CASES).format(tests=here)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(here)])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    answers, ran = json.loads(done.stdout)
    wrong = [
        answer
        for answer in answers
        if answer[2] != "ValueError"
        or "\n" in answer[3]
        or not re.match(re.escape(answer[0]) + r"(\['\w+'\])?: ", answer[3])
    ]
    assert not wrong
    assert len(answers) > 250
    assert ran == 0


@pytest.mark.slow
def test_a_threshold_may_be_an_array():
    loss = gf.SquaredError(jnp.eye(2), jnp.array([1.0, 2.0]))
    watch = gf.Metric(loss, threshold=jnp.asarray(0.25))
    assert isinstance(watch.threshold, float) and watch.threshold == 0.25
    hash(watch.threshold)
    path = gf.simulate(
        gf.GradientFlow(loss),
        Linear(jnp.zeros(2)),
        weight_decay=np.float64(0.1),
        ts=jnp.arange(3.0),
        rtol=1e-5,
        solver=gf.KKT4(),
        metrics={"test": watch},
    )
    rate = 0.6  # F = ¼‖w − y‖², λ = 0.1
    exact = np.array([1.0, 2.0]) * (1 - np.exp(-2 * rate)) * 0.5 / rate
    np.testing.assert_allclose(path[-1].w, exact, rtol=5e-5)
    assert 0 < path.crossing_time("test") < 2


@pytest.fixture(scope="module")
def twins():
    """A flow of some leaves only, its loss, and a model on the manifold."""
    x = jr.normal(jr.key(0), (2, 4))
    model = {"w": jr.normal(jr.key(1), (4,)), "kept": jnp.ones(2)}
    predict = lambda m, x: x @ m["w"] + m["kept"]
    loss = gf.SquaredError(x, predict(model, x), predict=predict)
    flow = gf.GradientFlow(loss, trainable=lambda leaf: jnp.size(leaf) == 4)
    return flow, loss, model


@pytest.mark.parametrize("name", ["spectrum", "retract", "tangent_projection"])
def test_a_flow_where_a_loss_is_enough(twins, name):
    flow, loss, model = twins
    fn = getattr(gf.manifold, name)
    more = (model,) if name == "tangent_projection" else ()
    by_flow = fn(flow, model, *more)
    by_loss = fn(loss, model, *more, trainable=flow.trainable)
    assert eqx.tree_equal(by_flow, by_loss)
    if name == "spectrum":
        assert by_flow.parameters == 4


@pytest.mark.slow
def test_limit_map_of_a_flow(twins):
    flow, loss, model = twins
    away = model | {"w": model["w"] + 0.1}
    limit = gf.manifold.limit_map(flow, away).model
    normal = np.linalg.pinv(np.asarray(loss.x)) @ np.asarray(loss.x)
    np.testing.assert_allclose(limit["w"], away["w"] - normal @ np.full(4, 0.1))
    assert limit["kept"].tolist() == [1.0, 1.0]


@pytest.mark.slow
def test_wrong_arguments_that_are_traced_are_results():
    """None of them takes a step; their neighbours are as they are alone."""
    loss = gf.SquaredError(jnp.eye(2), jnp.array([1.0, 2.0]))
    flow, model = gf.GradientFlow(loss), Linear(jnp.zeros(2))
    lams = jnp.array([0.1, -0.1, jnp.nan, 0.0, 0.3])
    usual = dict(saves=4, solver=gf.KKT4(), throw=False)

    @eqx.filter_jit
    @eqx.filter_vmap
    def run(lam):
        return gf.simulate(flow, model, weight_decay=lam, slow_time=2.0, **usual)

    paths = run(lams)
    wrong = np.array([False, True, True, True, False])
    expected = np.where(wrong, CODES["wrong_argument"], CODES["successful"])
    assert codes(paths.result).tolist() == expected.tolist()
    assert ((np.asarray(paths.stats.steps) == 0) == wrong).all()
    assert (np.isnan(paths.params.w).all(axis=(1, 2)) == wrong).all()
    assert (np.isnan(paths.train_loss).all(axis=1) == wrong).all()
    for i in (0, 4):
        alone = gf.simulate(flow, model, weight_decay=lams[i], slow_time=2.0, **usual)
        np.testing.assert_allclose(paths.params.w[i], alone.params.w, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rtol", "atol", "init_scale", "ts", "t1"])
def test_any_traced_argument_of_a_run(name):
    loss = gf.SquaredError(jnp.eye(2), jnp.array([1.0, 2.0]))
    flow, model = gf.GradientFlow(loss), Linear(jnp.ones(2))
    wrong = {"ts": jnp.array([0.0, 2.0, 1.0])}.get(name, jnp.asarray(-1e-3))
    right = {"ts": jnp.array([0.0, 1.0, 2.0])}.get(name, jnp.asarray(1e-3))
    usual = dict(weight_decay=0.1, saves=3, solver=gf.KKT4(), throw=False)
    usual |= {} if name in ("ts", "t1") else {"t1": 1.0}
    run = eqx.filter_jit(lambda v: gf.simulate(flow, model, **{name: v}, **usual))
    assert run(wrong).result == gf.RESULTS.wrong_argument
    assert run(right).result == gf.RESULTS.successful


@pytest.mark.slow
@pytest.mark.parametrize("name", ["retract", "limit_map", "riemannian_flow"])
def test_any_traced_argument_on_the_manifold(name):
    """Of several at once, the others are as they are."""
    loss = gf.SquaredError(jnp.ones((1, 2)), jnp.ones(1))
    model, on = Linear(jnp.array([1.0, 0.5])), Linear(jnp.array([1.0, 0.0]))
    drift = dict(slow_time=1.0, ts=jnp.array([0.0, 1.0]), throw=False)

    def run(rtol):
        if name == "retract":
            return gf.manifold.retract(loss, model, rtol=rtol, throw=False)
        if name == "limit_map":
            return gf.manifold.limit_map(loss, model, rtol=rtol, throw=False)
        flow = gf.GradientFlow(loss)
        return gf.manifold.riemannian_flow(flow, on, rtol=rtol, **drift)

    out = eqx.filter_jit(eqx.filter_vmap(run))(jnp.array([1e-6, -1e-6, jnp.nan]))
    names = "successful", "wrong_argument", "wrong_argument"
    assert codes(out.result).tolist() == [CODES[name] for name in names]
    found = out.params.w[:, -1] if name == "riemannian_flow" else out.model.w
    end = [0.5 + 0.5 / np.e, 0.5 - 0.5 / np.e] if name == "riemannian_flow" else None
    np.testing.assert_allclose(found[0], end or [0.75, 0.25], rtol=1e-6)
    assert np.isnan(found[1:]).all()


def test_a_traced_descent():
    loss = gf.SquaredError(jnp.eye(2), jnp.array([1.0, 2.0]))
    flow, model = gf.GradientFlow(loss), Linear(jnp.ones(2))

    @eqx.filter_jit
    def run(lam, rate):
        options = dict(weight_decay=lam, learning_rate=rate, steps=4, throw=False)
        return gf.descent(flow, model, **options)

    for lam, rate in ((-0.1, 0.1), (0.1, 0.0), (0.1, np.inf)):
        path = run(jnp.asarray(lam), jnp.asarray(rate))
        assert path.result == gf.RESULTS.wrong_argument
        assert np.isnan(path.params.w).all()
    path = run(jnp.asarray(0.1), jnp.asarray(0.2))
    assert path.result == gf.RESULTS.successful
    np.testing.assert_allclose(path.params.w[1], [0.98, 1.08])


@pytest.mark.slow
def test_labels_that_a_made_problem_has_no_logits_for():
    """They are not known to the program, which is for all lanes: each is looked at."""
    x = jr.normal(jr.key(0), (4, 3))
    model = eqx.nn.Linear(3, 2, key=jr.key(1))

    def make(most):
        loss = gf.CrossEntropy(x, jnp.array([0, 1, 0, most]))
        return gf.GradientFlow(loss), model

    axes = {"most": [1, 5]}
    run = dict(weight_decay=0.1, t1=1.0, saves=3, progress=False, solver=gf.KKT4())
    sweep = gf.sweep(make, axes=axes, **run)
    assert sweep.succeeded.tolist() == [True, False]
    assert sweep.causes[1].startswith("ValueError: labels: the largest is 5")


def test_the_cause_of_what_the_model_cannot_take_is_kept():
    loss = gf.SquaredError(jnp.ones((4, 3)), jnp.ones(4))
    with pytest.raises(ValueError, match=r"^x: Linear cannot take float64") as caught:
        gf.simulate(
            gf.GradientFlow(loss), Linear(jnp.ones(5)), weight_decay=0.1, t1=1.0
        )
    assert "dot_general" in str(caught.value.__cause__)
