"""What a run says while it is under way: where it is slow, and which solver runs."""

import re

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import gradflow as gf
from gradflow import runs
from gradflow.results import in_words
from gradflow.solvers import Choice
from gradflow.sweeps import lanes
from gradflow.sweeps.axes import make_axes
from gradflow.sweeps.progress import ProgressBars


def net(activation, width=12):
    x = jr.normal(jr.key(5), (16, 3))
    loss = gf.SquaredError(x, jnp.sin(2 * x[:, 0]) + 0.3 * x[:, 1])
    model = eqx.nn.MLP(3, "scalar", width, 1, activation, key=jr.key(2))
    return gf.GradientFlow(loss), model


@pytest.mark.slow
def test_steps_that_are_short_for_kinks_are_noticed(monkeypatch):
    flow, model = net(jax.nn.leaky_relu)
    monkeypatch.setattr(runs.windows, "FIRST", 60)
    run = lambda **more: gf.simulate(
        flow, model, weight_decay=1e-3, slow_time=1.0, rtol=1e-5, saves=17,
        solver=gf.KKT4(), max_steps=90, **more,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="after 60 steps .* along kinks"):
        path = run(throw=False)
    assert path.result == gf.RESULTS.out_of_steps and int(path.stats.steps) == 90
    assert "max-pooling" in path.verdict and "explicit" not in path.verdict
    assert f"FAILED: {path.verdict}" in str(path)
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="Steps of KKT4"):
        run()


@pytest.mark.parametrize(
    "activation, kinks",
    [
        (jax.nn.relu, True),
        (jax.nn.leaky_relu, True),
        (jax.nn.relu6, True),
        (jax.nn.hard_tanh, True),
        (lambda x: jnp.maximum(x, -2 * x), True),
        (jnp.abs, True),
        (jnp.tanh, False),
        (jax.nn.silu, False),
        (jax.nn.gelu, False),
        (lambda x: jax.nn.softmax(jnp.stack([x, -x]))[0], False),
        (lambda x: jnp.where(jnp.arange(3) > 1, x, 0.0).sum(), False),  # a mask
    ],
)
def test_which_models_may_have_kinks(activation, kinks):
    """Of those without, a run is one program, as long as it may be."""
    flow, model = net(activation)
    assert runs.simulate._kinked(*flow.term(model)) is kinks


def test_pooling_has_kinks():
    pool = eqx.nn.MaxPool1d(2)
    loss = gf.SquaredError(jnp.ones((2, 4)), jnp.ones((2, 1, 3)))
    net = eqx.nn.Sequential([eqx.nn.Linear(4, 4, key=jr.key(0))])
    model = eqx.nn.Sequential([*net.layers, eqx.nn.Lambda(lambda z: pool(z[None]))])
    assert runs.simulate._kinked(*gf.GradientFlow(loss).term(model))


@pytest.mark.slow
def test_the_bar_and_the_solver_that_is_given_up_are_named(monkeypatch, capsys):
    flow, model = net(jnp.tanh, width=3)
    monkeypatch.setattr(runs.simulate, "TRIAL_STEPS", 30)
    tried = lambda *_: Choice(diffrax.Tsit5(), "to be tried", True)
    monkeypatch.setattr(runs.simulate, "as_choice", tried)
    then = Choice(diffrax.Bosh3(), "next")
    monkeypatch.setattr(runs.simulate, "second_choice", lambda *_: then)
    path = gf.simulate(
        flow, model, weight_decay=1e-2, slow_time=1.0, saves=5, progress=True
    )
    told = capsys.readouterr().err
    first, given_up, second = (
        told.index(words)
        for words in ("Tsit5: ", "Tsit5 is given up after 30 steps; Bosh3", "Bosh3: ")
    )
    assert first < given_up < second and ", 30 steps]" in told
    assert "Tsit5: 100" not in told and path.stats.trial_steps == 30


@pytest.mark.slow
def test_bars_say_what_is_done_and_compiled(capsys):
    flow, model = net(jnp.tanh, width=4)
    options = dict(slow_time=0.5, metrics={"train": flow.loss})
    eqx.clear_caches()
    jax.clear_caches()
    theory = gf.two_phase(flow, model, order=2, progress=True, **options)
    told = capsys.readouterr().err
    phases = [
        told.index(f"two phases: {share}.00%|{rest}")
        for share, rest in ((0, ""), (25, "██▌"), (50, "█████"), (75, "███████▌"))
    ]
    assert phases == sorted(phases) and "two phases: 100.00%" in told
    for words in ("compiling _follow", "compiling _solve_on", "compiling inner"):
        assert words in told
    assert "limit map: " in told and "drift: 100.00%" in told and " steps]" in told
    alone = gf.two_phase(flow, model, order=2, **options)
    assert not capsys.readouterr().err
    for a, b in zip(
        *(jax.tree.leaves(t.drift.params) for t in (theory, alone)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-9)
    sweep = gf.sweep(flow, model, weight_decay=[1e-2, 1e-3], progress=False, **options)
    gf.compare(sweep, theory, progress=True)
    told = capsys.readouterr().err
    assert "compare: 50.00%" in told and "compare: 100.00%" in told
    assert "λ = 0.001" in told


@pytest.mark.slow
def test_bars_of_many_parts(capsys):
    """A descent of some thousand steps, and a flow of some hundred."""
    flow, model = net(jnp.tanh, width=4)
    descent = lambda **more: gf.descent(
        flow, model, weight_decay=1e-2, learning_rate=0.05, steps=5000, saves=9, **more
    )
    run = lambda **more: gf.simulate(
        flow, model, weight_decay=1e-2, slow_time=0.5, solver=gf.RKC2(), **more
    )
    for name, one in (("descent", descent), ("RKC2", run)):
        path = one(progress=True)
        told = capsys.readouterr().err
        assert told.count(" steps]") > 2 and f"{name}: 100.00%" in told
        assert f"{int(path.stats.steps)} steps]" in told
        for a, b in zip(
            *(jax.tree.leaves(p.params) for p in (path, one())), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    # One that fails does not seem to have reached its end.
    part = run(progress=True, max_steps=300, throw=False)
    told = capsys.readouterr().err
    # It tells by the saved times, of which most are early, how far it is.
    reached = np.isfinite(np.asarray(part.train_loss))
    shares = [float(share) for share in re.findall(r"RKC2: ([\d.]+)%", told)]
    n = reached.size
    assert 100 * (reached.sum() - 1) <= max(shares) * (n - 1) < 100 * reached.sum()
    assert max(shares) > 5 * 100 * float(part.t[reached][-1] / part.t[-1])


@pytest.mark.slow
def test_steps_short_for_kinks_are_noticed_after_quick_windows(monkeypatch):
    flow, model = net(jax.nn.leaky_relu)
    monkeypatch.setattr(runs.windows, "FIRST", 100)
    monkeypatch.setattr(runs.windows, "WINDOW", 3)
    with pytest.warns(UserWarning, match="along kinks"):
        gf.simulate(
            flow, model, weight_decay=1e-3, slow_time=1.0, rtol=1e-5, saves=17,
            solver=gf.KKT4(), max_steps=130, throw=False,
        )  # fmt: skip


def test_no_bar_is_no_thread_and_a_run_of_no_length_has_one(capsys):
    flow, model = net(jnp.tanh, width=3)
    path = gf.simulate(flow, model, weight_decay=0.1, t1=0.1, saves=3)
    assert path.succeeded and not capsys.readouterr().err
    at_start = dict(slow_time=1.0, ts=jnp.zeros(1), form="jacobian", throw=False)
    gf.manifold.riemannian_flow(flow, model, progress=True, **at_start)
    assert "drift: 100.00%" in capsys.readouterr().err


def test_what_runs_out_of_steps_is_advised_by_its_solver():
    said = lambda solver: in_words(gf.RESULTS.out_of_steps, solver, np.dtype("float64"))
    assert "Steps of RKC2 are short" in said("RKC2")
    assert "Dopri5 is explicit" in said("Dopri5")
    for solver in ("KKT4", "KKT5", "RKC2", "Kvaerno5"):
        assert "explicit" not in said(solver) and "`max_steps`" in said(solver)
    stalled = lambda dtype: in_words(gf.RESULTS.stalled, "KKT4", np.dtype(dtype))
    assert "enable_float64()" in stalled("float32")
    assert "float64" not in stalled("float64")


@pytest.mark.slow
def test_a_lane_whose_solver_is_given_up_is_named(monkeypatch, capsys):
    flow, model = net(jnp.tanh, width=3)
    monkeypatch.setattr(lanes, "TRIAL_STEPS", 30)
    tried = Choice(diffrax.Tsit5(), "to be tried", True)
    monkeypatch.setattr(lanes, "as_choice", lambda *_: tried)
    then = Choice(diffrax.Bosh3(), "next")
    monkeypatch.setattr(lanes, "second_choice", lambda *_: then)
    sweep = gf.sweep(flow, model, weight_decay=[0.02, 0.5], slow_time=0.5, saves=4)
    assert sweep.stats.trial_steps.tolist() == [30, 0]
    told = capsys.readouterr().err
    assert "λ 0.02: Tsit5 is given up after 30 steps; Bosh3 begins anew." in told
    assert "λ 0.5: Tsit5" not in told


def test_axes_by_other_symbols():
    axes = make_axes({"weight_decay": [0.01], "seed": [3]})
    assert axes.words(0) == "λ 0.01, seed 3"
    with ProgressBars(axes, 1, {"weight_decay": "γ"}) as bars:
        assert bars.words(0) == "γ 0.01, seed 3" and not bars.bars[0].disable
    with ProgressBars(axes, 1, False) as bars:
        assert bars.words(0) == "λ 0.01, seed 3" and bars.bars[0].disable
