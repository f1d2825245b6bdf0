"""Sweeps along many axes: seeds, scales, tolerances, sizes, penalties, step sizes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jaxtyping import Array

import gradflow as gf

LAMS = [1e-1, 1e-2]
SCALES = jnp.array([0.5, 2.0])
FLOW = dict(saves=5, progress=False, solver=gf.KKT4(), t1=20.0)
STEPS = dict(learning_rate=0.05, steps=60)
DESCENT = dict(saves=7, progress=False, run=gf.Descent(**STEPS))
TRACES = []


def seen(model):
    TRACES.append(None)
    return jnp.sum(model.weights)


def make(seed, samples=3):
    task = gf.tasks.linear_regression(jr.key(seed), samples=samples, dim=6)
    return task.flow, task.model, {**task.metrics, "seen": seen}


@pytest.fixture(scope="module")
def swept():
    return gf.sweep(
        make, axes={"seed": [3, 4, 5]}, init_scale=SCALES, weight_decay=LAMS, **FLOW
    )


def single(seed, lam, scale, run=gf.simulate, options=FLOW, **more):
    flow, model, metrics = make(seed)
    bare = {k: getattr(m, "fn", m) for k, m in metrics.items()}
    return run(
        flow, model, weight_decay=lam, init_scale=scale, metrics=bare,
        **(options | more),
    )  # fmt: skip


def same(a, b):
    np.testing.assert_array_equal(a.models.weights, b.models.weights)
    np.testing.assert_array_equal(a.t, b.t)
    np.testing.assert_array_equal(a.metrics["test"], b.metrics["test"])


def test_every_lane_is_the_single_run(swept):
    assert swept.dims == ("seed", "init_scale", "weight_decay")
    assert swept.shape == (3, 2, 2) and len(swept) == 12
    assert swept.coords["seed"].tolist() == [3, 4, 5]
    same(swept[2, 1, 0], single(5, 0.1, 2.0))
    same(swept[-1], single(5, 0.01, 2.0))
    same(swept[1, 0, 1], single(4, 0.01, 0.5))
    assert float(swept[1, 0, 1].weight_decay) == 0.01
    with pytest.raises(IndexError):
        swept[3, 0, 0]
    with pytest.raises(IndexError):
        swept[12]


@pytest.mark.slow
def test_each_problem_has_its_own_threshold(swept):
    levels = {float(lane.watched["test"].threshold) for lane in swept}
    assert len(levels) == 3
    metric = make(4)[2]["test"]
    assert swept[1, 0, 0].watched["test"].threshold == metric.threshold
    times = swept.crossing_time("test")
    assert times.shape == (3, 2, 2)
    path = single(4, 0.01, 0.5)
    here = gf.crossing_time(path.t, path.metrics["test"], metric)
    np.testing.assert_array_equal(times[1, 0, 1], here)


def test_one_trace_for_a_shape():
    def traces(**axes):
        TRACES.clear()
        gf.sweep(make, axes=axes, weight_decay=LAMS, init_scale=SCALES, **DESCENT)
        return len(TRACES)

    first = traces(seed=[1])
    assert first > 0
    assert traces(seed=[1, 2, 3]) == 0
    assert traces(samples=[4, 5], seed=[1, 2]) == 2 * first


def test_labelled(swept):
    lanes = swept
    data = lanes.to_xarray()
    assert dict(data.sizes) == dict(seed=3, init_scale=2, weight_decay=2, time=5)
    here = data.sel(seed=4, init_scale=0.5, weight_decay=0.01)
    path = lanes[1, 0, 1]
    np.testing.assert_array_equal(here.metric_test, path.metrics["test"])
    np.testing.assert_array_equal(here.slow_time, 0.01 * path.t)
    assert float(here.threshold_test) == path.watched["test"].threshold
    meanings = data.result.attrs["flag_meanings"].split()
    assert meanings[int(here.result)] == "successful"


def test_text_and_figure(swept):
    import matplotlib

    matplotlib.use("Agg")
    lanes = swept
    text = str(lanes)
    assert "3 seed × 2 α × 2 λ = 12 lanes, KKT4" in text
    assert len(text.splitlines()) == 14
    for axis, label in (("init_scale", "init_scale"), (None, "weight decay")):
        ax = lanes.plot(by=axis)
        assert len(ax.lines) == 12
        bar = ax.get_figure().axes[1]
        assert label in bar.get_ylabel()
        matplotlib.pyplot.close(ax.get_figure())


def test_zipped_and_tolerance():
    lanes = gf.sweep(
        make, axes={"seed": [3, 5]}, weight_decay=LAMS, rtol=[1e-4, 1e-6],
        zipped=[("seed", "weight_decay")], **FLOW,
    )  # fmt: skip
    assert lanes.dims == ("seed", "rtol") and lanes.shape == (2, 2)
    same(lanes[1, 0], single(5, 0.01, 1.0, rtol=1e-4))
    same(lanes[0, 1], single(3, 0.1, 1.0, rtol=1e-6))
    data = lanes.to_xarray()
    assert data.weight_decay.dims == ("seed",)
    np.testing.assert_array_equal(data.weight_decay, LAMS)


def test_penalty_weights():
    loss, model = make(0)[0].loss, make(0)[1]

    def flow(weight):
        penalty = gf.L2() + jnp.asarray(weight) * gf.L1()
        return gf.GradientFlow(loss, penalty=penalty), model, {"seen": seen, "l1": l1}

    steps = gf.Descent(0.05, steps=400, method="proximal")
    options = DESCENT | dict(run=steps)
    lanes = gf.sweep(
        flow, axes={"weight": [0.0, 0.1, 1.0]}, weight_decay=0.1, **options
    )
    norms = np.asarray(lanes.metrics["l1"][:, -1])
    assert lanes.shape == (3,) and (np.diff(norms) < 0).all()
    TRACES.clear()
    gf.sweep(flow, axes={"weight": [0.3]}, weight_decay=0.2, **options)
    assert not TRACES


def l1(model):
    return jnp.sum(jnp.abs(model.weights))


def test_descents_by_step_size():
    steps = gf.Descent([0.1, 1e-2, 9.0], steps=60)
    options = DESCENT | dict(run=steps)
    lanes = gf.sweep(make, axes={"seed": [1, 2]}, weight_decay=0.1, **options)
    assert lanes.dims == ("seed", "learning_rate")
    alone = single(2, 0.1, 1.0, gf.descent, dict(saves=7), learning_rate=1e-2, steps=60)
    same(lanes[1, 1], alone)
    assert bool(lanes[1, 2].result == gf.RESULTS.overshot)
    assert "`learning_rate` is likely above" in str(lanes)
    stochastic = gf.sweep(
        make, axes={"seed": [1]}, weight_decay=LAMS, saves=7, progress=False,
        run=gf.Descent(**STEPS, batch_size=2, key=jr.key(4)),
    )  # fmt: skip
    assert stochastic.succeeded.all()


class Brittle(eqx.Module):
    """A metric that raises while the run is under way, if `extra` is large."""

    extra: Array

    def __call__(self, model):
        shape = jax.ShapeDtypeStruct((), jnp.float64)
        size = self.extra + jnp.sum(model.weights)
        return jax.pure_callback(weigh, shape, size, vmap_method="sequential")


def weigh(x):
    if x > 1e6:
        raise ArithmeticError("too large to weigh")
    return x


@pytest.mark.parametrize("batch", ["loop", "vmap"])
def test_a_lane_that_raises_is_marked_and_harms_no_other(batch):
    def brittle(seed):
        if seed == -1:
            raise OSError("no such data")
        flow, model, _ = make(abs(seed))
        return flow, model, {"late": Brittle(jnp.where(seed == -2, 1e7, 0.0))}

    def lanes(seeds):
        axes = {"seed": seeds}
        return gf.sweep(brittle, axes=axes, weight_decay=LAMS, batch=batch, **DESCENT)

    some = lanes([0, -1, -2, 3])
    assert some.succeeded.tolist() == [True] * 2 + [False] * 4 + [True] * 2
    assert [*some.causes] == [2, 3, 4, 5]
    assert some.causes[2] == "OSError: no such data"
    assert "too large to weigh" in some.causes[4]
    assert bool(some[3].result == gf.RESULTS.raised)
    assert np.isnan(some[3].models.weights).all()
    assert float(some[3].weight_decay) == 0.01
    assert "RAISED: OSError: no such data" in str(some)
    # As many that run in lockstep: the same program.
    healthy = lanes([0, 2, 3])
    for i, k in ((0, 0), (1, 1), (6, 4), (7, 5)):
        np.testing.assert_array_equal(
            some[i].models.weights, healthy[k].models.weights, strict=True
        )
    with pytest.raises(OSError, match="no such data"):
        lanes([-1])


@pytest.mark.slow
def test_models_of_many_sizes():
    def network(width):
        task = gf.tasks.teacher_student(jr.key(0), width=width, samples=4)
        return task.flow, task.model

    lanes = gf.sweep(network, axes={"width": [5, 7]}, weight_decay=[0.1], **DESCENT)
    assert lanes[0].models.outer.shape == (7, 5)
    assert lanes[1].models.outer.shape == (7, 7)
    assert lanes.to_xarray().train_loss.shape == (2, 1, 7)


def test_many_lanes_are_summed_up():
    flow, model, _ = make(0)
    rates = np.geomspace(1e-3, 10.0, 40)
    steps = gf.Descent(rates, steps=60)
    lanes = gf.sweep(flow, model, weight_decay=0.1, **(DESCENT | dict(run=steps)))
    text = str(lanes)
    assert len(text.splitlines()) < 12
    failed = int((~np.asarray(lanes.succeeded)).sum())
    assert 0 < failed < 40 and f"{failed} failed" in text
    assert f"{failed} × FAILED: The descent went up instead" in text
    assert "most, at h" in text


@pytest.mark.parametrize(
    "change, name",
    [
        (dict(axes={"weight_decay": LAMS}), "weight_decay"),
        (dict(axes={"seed": []}), "seed"),
        (dict(axes={}, weight_decay=0.1), "weight_decay"),
        (dict(axes={"seed": 3}), "seed"),
        (dict(zipped=[("seed", "rtol")]), "zipped"),
        (dict(zipped=[("seed", "weight_decay")], axes={"seed": [1]}), "zipped"),
        (dict(init_scale=[1.0, -1.0]), "init_scale"),
        (dict(rtol=[1e-3, 2.0]), "rtol"),
        (dict(axes={"learning_rate": LAMS}), "learning_rate to gf.Descent"),
        (dict(run=gf.Descent(0.1), solver=gf.KKT4()), "solver"),
        (dict(run=gf.Descent(0.1, steps=3), slow_time=1.0), "steps"),
        (dict(model=1), "model"),
        (dict(problem=lambda seed: 3), "problem"),
    ],
)
def test_bad_input(change, name):
    options = dict(problem=make, axes={"seed": [1, 2]}, weight_decay=LAMS, t1=1.0)
    options |= dict(progress=False) | change
    with pytest.raises(ValueError, match=name):
        gf.sweep(options.pop("problem"), options.pop("model", None), **options)


@pytest.mark.parametrize(
    "options, name",
    [
        (dict(learning_rate=[0.0], steps=3), "learning_rate"),
        (dict(learning_rate=np.array([[0.1]]), steps=3), "learning_rate"),
        (
            dict(learning_rate=np.array([lambda k: 0.1]), steps=3),
            "one schedule for all",
        ),
        (dict(learning_rate=lambda k: 0.1), "steps, at"),
        (dict(steps=0), "steps"),
        (dict(steps=3, at=[1, 3]), "steps, .* exactly one"),
        (dict(at=[3, 1]), "at"),
        (dict(optimiser=optax.trace), "optimiser"),
        (dict(batch_size=0), "batch_size"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_options_of_a_descent_are_checked(options, name):
    with pytest.raises(ValueError, match=name):
        gf.Descent(**(dict(learning_rate=0.1) | options))


@pytest.mark.parametrize(
    "name, where", [("learning_rate", "run=gf.Descent"), ("chunk", "store=gf.Store")]
)
def test_what_was_an_argument_says_where_it_went(name, where):
    flow, model, _ = make(0)
    with pytest.raises(TypeError, match=f"{name}: give it as an option of {where}"):
        gf.sweep(flow, model, weight_decay=LAMS, **{name: 3})
    with pytest.raises(TypeError, match="unexpected keyword argument 'nothing'"):
        gf.sweep(flow, model, weight_decay=LAMS, nothing=3)


def test_axes_are_no_business_of_a_flow():
    flow, model, _ = make(0)
    with pytest.raises(ValueError, match="axes"):
        gf.sweep(flow, model, axes={"seed": [1]}, weight_decay=LAMS, t1=1.0)
    with pytest.raises(ValueError, match="model"):
        gf.sweep(flow, weight_decay=LAMS, t1=1.0)


@pytest.mark.slow
def test_axes_of_random_keys():
    keys = [jr.key(0), jr.key(1)]
    for values in (keys, jnp.stack(keys)):
        sweep = gf.sweep(
            lambda key: gf.tasks.linear_regression(key, samples=3, dim=5),
            axes={"key": values},
            weight_decay=1e-2,
            t1=1.0,
            progress=False,
        )
        assert sweep.coords["key"].tolist() == [0, 1]
        assert len(set(np.asarray(sweep.train_loss)[:, 0].tolist())) == 2
        assert "Array" not in str(sweep)


def test_a_lane_with_fewer_saves_is_marked():
    """The first takes ten steps in all, the second a thousand."""
    task = gf.tasks.linear_regression(jr.key(0), samples=3, dim=5)
    sweep = gf.sweep(
        task.flow,
        task.model,
        weight_decay=[1.0, 1e-2],
        run=gf.Descent(0.1),
        slow_time=1.0,
        progress=False,
    )
    assert np.asarray(sweep.succeeded).tolist() == [True, False]
    assert "give fewer saves" in sweep.causes[1]
    assert sweep.fixed == {"init_scale": 1.0, "learning_rate": 0.1}


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(rtol=[1e-3, 1e-6], run=gf.Descent(1e-2)), "rtol: has no meaning"),
        (dict(zipped=["weight_decay"]), "zipped: expected groups"),
        (dict(zipped=[()]), "zipped: expected groups"),
        (dict(weight_decay=np.array([[1e-2]])), "weight_decay: expected a number"),
    ],
)
def test_what_makes_no_sense(wrong, words):
    task = gf.tasks.linear_regression(jr.key(0), samples=3, dim=5)
    with pytest.raises(ValueError, match=words):
        gf.sweep(
            task.flow, task.model, **{"weight_decay": [1e-2, 1e-3], "t1": 1.0} | wrong
        )


def test_axes_are_not_named_as_what_is_recorded():
    with pytest.raises(ValueError, match="'steps' is what is recorded"):
        gf.sweep(
            lambda steps: gf.tasks.linear_regression(jr.key(steps)),
            axes={"steps": [1, 2]},
            weight_decay=1e-2,
        )
