"""The experiments on networks, on small settings and in this process."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from idx_files import write_mnist
from numpy.testing import assert_array_equal

pytest.importorskip("tyro")
pytest.importorskip("xarray")
from verbs import finished, verbs  # noqa: E402

import gradflow as gf  # noqa: E402
from experiments.beyond_l2 import grid, networks  # noqa: E402
from experiments.shared import runs  # noqa: E402


@pytest.fixture(autouse=True)
def relaxed():
    """Scripts run under JAX's own rules of promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def addition(tmp_path_factory):
    """Addition mod 5, a few seconds: a folder, and what is made of it."""
    out = tmp_path_factory.mktemp("ma1")
    small = functools.partial(gf.tasks.modular_addition, modulus=5, side=2, width=8)
    config = networks.MA1(betas=(0.0, 1e-4, 1e-3), steps=200, batch_size=4, out=out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks.gf.tasks, "modular_addition", small)
        first = verbs(config)
        files = finished(out / "runs_200.zarr")
        again = verbs(config)
        longer = verbs(dataclasses.replace(config, steps=300))
        with (
            jax.numpy_dtype_promotion("standard"),
            pytest.raises(ValueError, match="holds another sweep"),
        ):
            dataclasses.replace(config, batch_size=3).compute()
    return out, files, first, again, longer


def test_a_grid_goes_on_where_it_was(addition):
    """What has been trained is read, not trained again; what was trained with other
    settings is not taken for it (and refused, see the fixture)."""
    out, files, first, again, longer = addition
    assert len(files) == 3 and finished(out / "runs_200.zarr") == files
    assert first[0].identical(again[0])
    assert longer[0].step[0, -1] == 300 and first[0].step[0, -1] == 200


def test_what_is_recorded_is_what_was_trained(addition):
    _, _, (data, rows, figures), _, (longer, *_) = addition
    assert data.train.dtype == np.float32
    assert {"test", "train", "train_loss", "norm_l1", "norm_l2", "norm_nuclear"} <= set(
        data.data_vars
    )
    assert_array_equal(data.value, data.norm_l1)
    # The same start, and a longer run does the same at first.
    assert (data.norm_l2[:, 0] == data.norm_l2[0, 0]).all()
    shared = (
        np.isin(data.step[0], longer.step[0]),
        np.isin(longer.step[0], data.step[0]),
    )
    assert_array_equal(data.train_loss[2, shared[0]], longer.train_loss[2, shared[1]])
    each = runs.runs_of(data)
    assert [run.lane["beta"] for run in each] == [0.0, 1e-4, 1e-3]
    for run in each:
        good = run.arrays["train"] >= 0.99
        assert run.memorised == (run.steps[good][0] if good.any() else math.inf)
    assert set(figures) >= {"grid"}
    assert {row.name for row in rows} >= {"first", "order", "control"}


def runs_with(delays, betas, norm=None):
    """Runs that memorised at step 10, and generalised so much later."""
    steps = np.arange(0, 1001, 10)
    norm = np.ones(101) if norm is None else norm
    return [
        runs.Trained(
            dict(penalty="l1", alpha=0.1, beta=beta),
            steps,
            {"norm_l2": norm, "test": norm},
            memorised=10.0,
            half=delay / 2 + 10.0,
            grokked=delay + 10.0,
        )
        for delay, beta in zip(delays, betas, strict=True)
    ]


def test_the_order_of_delays_is_judged():
    betas = [1e-6, 1e-5, 1e-4, 1e-3]
    (falling,) = grid.order_rows(runs_with([80, 40, 20, 10], betas))
    assert falling.ok and falling.value == -1
    (rising,) = grid.order_rows(runs_with([10, 20, 40, 80], betas))
    assert rising.ok is False and rising.value == 1
    late = runs_with([math.inf, 40, 20, 10], betas)
    assert grid.order_rows(late)[0].value == -1
    few = runs_with([math.inf, math.inf, 20, 10], betas)
    assert grid.order_rows(few)[0].ok is None
    without = [*runs_with([5], [0.0]), *runs_with([80, 40, 20, 10], betas)]
    assert grid.order_rows(without)[0].value == -1


def test_the_growth_of_the_norm_is_judged():
    rising = np.linspace(1, 2, 101)
    for norm, ok in ((rising, True), (rising[::-1], False)):
        rows = grid.norm_rows(runs_with([80], [1e-3], norm)[0])
        assert [row.ok for row in rows] == [ok, ok, ok]
    assert not grid.norm_rows(runs_with([80], [0.0], rising)[0])
    (half,) = grid.norm_rows(
        dataclasses.replace(runs_with([80], [1.0], rising)[0], grokked=math.inf)
    )
    assert "0.5" in half.sentence


def test_memorising_first_is_judged():
    some = runs_with([80, 40], [1e-4, 1e-3])
    assert grid.first_fit_rows(some)[0].ok
    some[1] = dataclasses.replace(some[1], half=5.0)
    assert grid.first_fit_rows(some)[0].ok is False
    never = [dataclasses.replace(run, grokked=math.inf) for run in some]
    assert grid.first_fit_rows(never)[0].ok is None


def test_first_step_at_a_level():
    steps, values = np.array([0, 1, 5, 9]), np.array([3.0, 2.0, 1.0, 2.0])
    assert runs.first(steps, values, 1.5, higher=False) == 5
    assert runs.first(steps, values, 0.5, higher=False) == math.inf
    assert runs.first(steps, values, 3.0, higher=True) == 0


@pytest.mark.slow
@pytest.mark.parametrize("squared", [False, True])
def test_sobolev_lowers_the_distance_of_derivatives(tmp_path, monkeypatch, squared):
    small = functools.partial(
        gf.tasks.wide_teacher, inputs=4, samples=5, test_samples=20
    )
    monkeypatch.setattr(networks.gf.tasks, "wide_teacher", small)
    data, rows, _ = verbs(
        networks.NL2(betas=(1e-1,), steps=400, width=12, squared=squared, out=tmp_path)
    )
    assert "h(θ)" in rows[-1].sentence and rows[-1].value < 1
    assert data.penalty.item() == "sobolev"


def test_images_are_named(tmp_path):
    """The title and the summary say which images they are."""
    data = write_mnist(tmp_path, samples=30, test_samples=10)
    config = networks.MN1(
        data=str(data),
        published=False,
        samples=20,
        steps=20,
        betas=(0.0, 1e-4),
        width=8,
        out=tmp_path,
    )
    found, rows, figures = verbs(config)
    assert found.attrs["data"] == "images from unchecked files"
    assert "unchecked files, 20 samples" in figures["grid"].get_suptitle()
    sentences = [row.sentence for row in rows]
    assert any("without penalty" in sentence for sentence in sentences)


def test_single_precision_leaves_integers():
    tree = {"a": jnp.ones(2), "n": jnp.arange(2), "s": "word"}
    narrow = runs.single(tree)
    assert narrow["a"].dtype == jnp.float32 and narrow["n"].dtype == tree["n"].dtype
