"""Omnigrok on toy addition, images, text and molecules: on tiny settings, in this
process; and what its criteria make of made-up runs."""

import dataclasses
import math

import jax
import jax.random as jr
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

pytest.importorskip("tyro")
xr = pytest.importorskip("xarray")
pytest.importorskip("sklearn")
from verbs import finished, verbs  # noqa: E402

import gradflow as gf  # noqa: E402
from experiments.omnigrok import addition, data, images, scans, STUDY  # noqa: E402
from experiments.shared import runs  # noqa: E402
from experiments.shared.record import kept  # noqa: E402


@pytest.fixture(autouse=True)
def relaxed(monkeypatch):
    """Scripts run under JAX's own rules of promotion; no published data are at hand."""
    monkeypatch.delenv("GRADFLOW_DATA", raising=False)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_every_row_has_a_command_with_the_papers_settings():
    names = "ad ad-t mn-g mn-l mn-w mn-ce mn-r im qm"
    assert set(names.split()) <= STUDY.experiments.keys()
    mn = STUDY.parse(["mn-g", "--seed", "3"])
    assert (mn.samples, mn.width, mn.alpha, mn.weight_decay) == (1000, 200, 8, 0.01)
    assert (mn.steps, mn.batch_size, mn.learning_rate) == (10**5, 200, 1e-3)
    assert mn.seed == 3
    im = STUDY.parse(["im"])
    assert (im.alpha, im.weight_decay, im.learning_rate) == (6, 1, 3e-4)
    qm = STUDY.parse(["qm"])
    assert (qm.alpha, qm.weight_decay, qm.molecules) == (3, 0, 100)
    ad = STUDY.parse(["ad"])
    assert (len(ad.alphas), len(ad.messiness), ad.steps) == (20, 21, 15_000)


# Made-up runs


def trained(alpha, memorised, grokked, *, hold=False, test=0.5, end=1.0):
    """One whose norm ends at `end`, relative to the usual start."""
    steps = np.array([0, 10, 100, 1000, 10_000])
    norm = np.geomspace(alpha, end, 5)
    arrays = {"test": np.full(5, test), "train": np.ones(5), "norm": norm}
    lane = scans.lane(alpha, 0.0 if hold else 0.1, hold=hold)
    return runs.Trained(lane, steps, arrays, memorised, grokked)


def recorded(alpha, memorised, grokked, last, *, test=0.5, **attrs):
    """One, as it is stored, of so many steps."""
    run = {
        name: (("run", "time"), [np.full(5, value)])
        for name, value in {"test": test, "train": 1.0, "norm": 1.0}.items()
    }
    run["step"] = (("run", "time"), [[0, 10, 100, 1000, last]])
    run |= {"memorised": ("run", [memorised]), "grokked": ("run", [grokked])}
    labels = {k: ("run", [v]) for k, v in scans.lane(alpha, 0.1).items()}
    return xr.Dataset(run, labels, attrs)


def test_a_delay_is_judged_with_its_controls():
    late, at_once = trained(8, 100, 1000), trained(1, 100, 50)
    never = trained(8, 100, math.inf, hold=True)
    rows = scans.delay_rows(late, [at_once, never])
    assert [row.ok for row in rows] == [True, True, True]
    assert rows[0].value == 10 and "steps 1000 and 100" in rows[0].sentence
    early, control = trained(8, 100, 999), trained(1, 10, 100)
    blind = trained(8, math.inf, math.inf, hold=True)
    rows = scans.delay_rows(early, [control, blind])
    assert [row.ok for row in rows] == [False, False, None]
    assert not scans.delay_rows(never, [])[0].ok
    # Never to generalise is right at a large held norm only, and takes time to show.
    small = trained(1, 100, math.inf, hold=True)
    free = trained(8, 100, math.inf)
    short = trained(8, 1001, math.inf, hold=True)
    rows = scans.delay_rows(late, [small, free, short])
    assert [row.ok for row in rows] == [True, False, False, None]
    assert "too early" in rows[3].sentence


@pytest.mark.parametrize(
    "train, test, verdicts",
    [
        ([0.5, 0.1, 0, 0, 0], [0.6, 0.3, 0.2, 0.3, 0.4], [True, True]),
        ([0.5, 0.1, 0, 0, 0], [0.6, 0.5, 0.4, 0.3, 0.2], [False, True]),
        ([0.5, 0.1, 0, 0, 0], [0.6, 0.3, 0.2, 0.2, 0.25], [False, True]),
        ([0.5, 0.1, 0, 0, 0.1], [0.6, 0.3, 0.2, 0.3, 0.4], [True, False]),
        ([0.05, 0.1, 0, 0, 0], [0.6, 0.3, 0.2, 0.3, 0.4], [True, False]),
    ],
)
def test_an_l_and_a_u(train, test, verdicts):
    scales = np.geomspace(0.1, 10, 5)
    rows = scans.lu_rows(scales, np.array(train), np.array(test))
    assert [row.ok for row in rows] == verdicts


def test_the_law_of_weight_decay_is_judged():
    gamma = np.geomspace(0.01, 1, 5)
    within = gamma >= 0.09
    times = 30 / gamma
    inside, *outside = images.decay_rows(gamma, times, within)
    assert inside.ok and inside.value == pytest.approx(-1)
    assert [row.ok for row in outside] == [False, False]
    times[:2] = 300.0, math.inf
    _, *outside = images.decay_rows(gamma, times, within)
    assert [row.ok for row in outside] == [True, True]
    # All inside are to generalise, and there are to be three.
    assert images.decay_rows(gamma, times, gamma >= 0.3)[0].ok is None
    times[4] = math.inf
    assert images.decay_rows(gamma, times, within)[0].ok is False
    times[2:] = math.inf
    (alone,) = images.decay_rows(gamma, times, within)
    assert alone.ok is False


def test_a_critical_number_of_samples():
    made = lambda times: [trained(9, 10, t) for t in times]

    def judge_runs(each):
        for n, run in enumerate(each, start=1):
            run.lane["N"] = n
        return images.size_rows(each)[0]

    judge = lambda times: judge_runs(made(times))
    assert judge([math.inf, 900, 300]).ok
    assert not judge([math.inf, 300, 900]).ok
    assert not judge([1000, 900, 300]).ok
    assert not judge([math.inf, 300, math.inf]).ok
    # One that ends above the usual norm might have come to it.
    above = [trained(9, 10, math.inf, end=1.2), *made([900, 300])]
    row = judge_runs(above)
    assert row.ok is None and "[1] ended above" in row.sentence
    learnt = [*made([math.inf, 900]), trained(9, 10, 300, end=1.2)]
    assert judge_runs(learnt).ok


def test_a_level_that_is_kept():
    steps, values = np.array([0, 1, 2, 3]), np.array([0.0, 0.8, 0.7, 0.9])
    find = lambda level: runs.for_good(steps, values, level, True)
    assert [find(level) for level in (0.0, 0.75, 0.95)] == [0, 3, math.inf]
    assert runs.first(steps, values, 0.75, True) == 1
    assert runs.for_good(steps, -values, -0.75, False) == 3


def test_the_width_of_a_zone():
    scales = np.exp(np.arange(5.0))
    # At most 1.5: from a third of the way up on the left to half of it on the right.
    width = images.zone(scales, np.array([9.0, 2.0, 1.0, 1.25, 1.75]))
    assert_allclose(width, 0.5 + 1 + 0.5)
    assert_allclose(images.zone(scales, np.ones(5)), 4)


def test_edge_and_tip_of_the_plain():
    alphas = np.array([1.0, 2.0, 4.0, 8.0])
    losses = np.array([[1.0, 0.5, 5e-3, 1.0], [1.0, 0.9, 0.5, 0.05], [1.0] * 4])
    edges = addition.edge(alphas, losses, 0.05)
    assert_allclose(edges[:2], [2 * 2**0.5, 8])
    assert np.isnan(edges[2])
    m = np.array([0.0, 0.1, 0.2])
    down, up = np.array([2.0, 3.0, 4.0]), np.array([4.0, 3.0, 2.0])
    sizes, four = (25, 35, 45, 54), np.array([up, down, down, up])
    tests = np.array([[0.5, 0.5, 2.0], [2.0, 0.5, 0.5], [0.5, 2.0, 2.0], [0.5] * 3])
    rows = addition.tip_rows(sizes, m, four, tests)
    verdicts = [row.ok for row in rows]
    assert verdicts == [True, True, False, True, True, True, False, True]
    steep, flat = np.exp(m / np.tan(0.4)), np.exp(m / np.tan(1.0))
    (row,), angles = addition.angle_rows((25, 45), m, np.array([flat, steep]))
    assert row.ok
    assert_allclose(angles, [1.0, 0.4])
    assert not addition.angle_rows((25, 45), m, np.array([steep, flat]))[0][0].ok
    assert addition.angle_rows((25,), m, np.array([flat]))[0][0].ok is None
    train = np.array([[1.0, 0.01, 0.01], [1.0, 0.02, 0.01], [1.0, 0.03, 0.02]])
    test = np.array([[1.0, 0.1, 0.1], [1.0, 0.3, 0.2], [1.0, 0.4, 0.3]])
    (row,) = addition.spread_rows(45, train, test, 0.05)
    assert row.ok and row.value == pytest.approx(15)
    assert not addition.spread_rows(45, train, train, 0.05)[0].ok
    assert addition.spread_rows(45, train, test, 1e-3)[0].ok is None
    assert_array_equal(addition.inside(train, test, 0.05), [0.1, 0.3, 0.4])
    assert np.isnan(addition.inside(train, test, 1e-3)).all()


# Tiny runs


@pytest.fixture(scope="module")
def digits():
    return gf.tasks.image_mlp(jr.key(0), samples=40, width=6)


def test_numbers_of_the_paper_are_judged_on_its_data_only(digits):
    of = lambda last, **attrs: recorded(8, 2000, 5e4, last, test=0.25).assign_attrs(
        attrs
    )
    rows = images.grok_rows(of(10**5, **scans.named(digits)))
    assert [row.ok for row in rows] == [None] * 3
    assert all("scikit-learn digits" in row.sentence for row in rows)
    rows = images.grok_rows(of(10**5, data="MNIST"))
    assert [row.ok for row in rows] == [True, True, False]
    # And under its settings, as far as a run goes.
    rows = images.grok_rows(of(20_000, data="MNIST"))
    assert [row.ok for row in rows] == [True, True, None]
    assert "not judged, the run ends before" in rows[2].sentence
    data = of(10**5, data="MNIST")
    paper, other = images.MNG(), images.MNG(samples=200, batch_size=None)
    assert [row.ok for row in paper.judge(data)[-3:]] == [True, True, False]
    told = other.judge(data)[-3:]
    assert [row.ok for row in told] == [None] * 3
    assert all("not the paper's samples, batch_size" in row.sentence for row in told)
    # How far a run goes, and the seed, are not what a bound is for.
    assert images.MNG(steps=70_000, seed=3, quick=True).unlike("steps") == ""


def test_settings_of_quick_judge_what_they_are_for():
    """What stands in for the paper's data, and nothing on other data."""
    quick = images.MNG(quick=True).effective()
    delay = lambda **attrs: quick.delays(
        recorded(8, 10, 1e3, 10**5).assign_attrs(attrs)
    )
    assert delay(data="scikit-learn digits")[0].ok is True
    (row,) = delay(data="MNIST")
    assert row.ok is None and "for scikit-learn digits" in row.sentence
    assert images.MNG().delays(recorded(8, 10, 1e3, 10**5, data="MNIST"))[0].ok


def test_a_large_norm_that_is_held_is_judged_on_stand_ins_only():
    late, held = trained(8, 100, 5000), trained(8, 100, 3000, hold=True)
    rows = scans.delay_rows(late, [held], never=True)
    assert [row.ok for row in rows] == [True, False]
    rows = scans.delay_rows(late, [held], never=False)
    assert [row.ok for row in rows] == [True, None]
    assert rows[1].value == 30 and "for information" in rows[1].sentence


def test_sizes_that_the_data_do_not_have(capsys):
    assert scans.there((10, 20, 30), None, "sizes") == [10, 20, 30]
    assert scans.there((10, 20, 30), 20, "sizes") == [10, 20]
    assert (
        "sizes: the data have 20 samples, not 30: left out" in capsys.readouterr().out
    )
    with pytest.raises(SystemExit, match="sizes: the data have 5 samples, not 10, 20"):
        scans.there((10, 20), 5, "sizes")


def test_samples_that_are_there_are_counted(tmp_path):
    assert images.MNG().available() == 1347
    own = dict(images=np.zeros((12, 2)), labels=np.arange(12) % 2)
    np.savez(tmp_path / "own.npz", **own)
    config = images.MNG(data=str(tmp_path / "own.npz"))
    assert config.available() == 9
    for wrong, words in (
        (dict(samples=12), "samples: expected at most 11 here, got 12"),
        (dict(data="x.npz"), "data: x.npz: expected a file .npz"),
    ):
        with pytest.raises(SystemExit, match=words):
            STUDY.main(dataclasses.replace(config, out=tmp_path, **wrong))
    np.savez(tmp_path / "own.npz", **own, test_images=[[0, 1]], test_labels=[1])
    assert config.available() == 12


def test_inputs_that_tell_the_label(digits):
    plain, told = images.messy(digits, 1.0), images.messy(digits, 0.0)
    assert_allclose(plain.loss.x, digits.loss.x)
    labels = np.asarray(digits.loss.y).argmax(1)
    assert_allclose(told.loss.x, np.tile(labels[:, None] / 9 - 0.5, 64))
    seen = digits.metrics["test"].fn
    test = told.metrics["test"].fn
    assert_allclose(test.x[:, 0], np.asarray(seen.labels) / 9 - 0.5)
    assert_array_equal(np.asarray(test.y).argmax(1), seen.labels)
    assert told.truth.title.endswith("m = 0")


@pytest.mark.slow
def test_images_from_start_to_end(tmp_path):
    """What is recorded, its title, and that what was trained is not trained again."""
    config = images.MNG(
        samples=40, width=6, alpha=2.0, weight_decay=0.5, steps=60, out=tmp_path
    )
    found, rows, figures = verbs(config)
    stores = lambda: [finished(tmp_path / f"runs_{k}.zarr") for k in (12, 60)]
    files = stores()
    assert [len(each) for each in files] == [2, 2]
    assert verbs(config)[0].identical(found) and stores() == files
    norm = found.norm.values
    assert_allclose(norm[1], norm[1, 0], rtol=1e-5)  # held
    assert norm[0, -1] < 0.99 * norm[0, 0]
    assert_allclose(norm[0, 0], 2 * norm[2, 0], rtol=1e-6)
    # A fifth of the steps for the controls.
    assert np.isnan(norm[2, -1]) and found.step.values[0, -1] == 60
    assert found.step.max("time").values.tolist() == [60, 60, 12, 12]
    title = figures["mn_g"].axes[0].get_title("left")
    assert "scikit-learn digits, 40 for training" in title
    assert found.attrs["data"] == "scikit-learn digits"
    assert sum(row.ok is None for row in rows) >= 3
    # With another rule it is not taken for what was trained.
    with pytest.raises(ValueError, match="holds another sweep"):
        dataclasses.replace(config, learning_rate=1e-2).compute()


@pytest.mark.slow
def test_a_row_of_a_landscape_is_a_sweep_over_scales(tmp_path, digits):
    rule = scans.Rule(1e-2, 30)
    alphas = (0.5, 2.0)
    ends = scans.held(digits, alphas, rule, tmp_path / "row.zarr")
    assert ends.shape == (2, 2)
    again = scans.held(digits, alphas, rule, tmp_path / "row.zarr")
    assert_array_equal(again, ends)
    data = scans.scan(
        digits, [scans.lane(2.0, hold=True)], rule, tmp_path / "runs.zarr"
    )
    (run,) = runs.runs_of(data)
    assert run.arrays["test"][-1] == ends[1, 1]


def test_lanes_are_stored_one_by_one(tmp_path, digits):
    """So that an interrupted scan has lost one of them at most; and names with a point
    in them are stores of their own."""
    lanes = [scans.lane(2.0, decay) for decay in (0.1, 0.2)]
    for m in (0.05, 0.5):
        store = tmp_path / f"runs_m={m:g}.zarr"
        scans.scan(images.messy(digits, m), lanes, scans.Rule(1e-2, 3), store)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["runs_m=0.05_3.zarr", "runs_m=0.5_3.zarr"]
    assert [len(finished(tmp_path / name)) for name in names] == [2, 2]


SMALL: dict = dict(width=6, batch_size=None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, checks, sizes",
    [
        (
            images.MNL(
                **SMALL, samples=(20,), times=(20, 40), alphas=(0.3, 1.0, 3.0),
                steps=3, time_steps=20,
            ),
            6, dict(samples=1, scale=3, run=2),
        ),
        (images.MNW(**SMALL, samples=20, decays=(0.1, 1.0, 10.0), steps=20), 1,
         dict(run=3)),
        (
            images.MNCE(
                **SMALL, samples=20, alphas=(0.3, 1.0, 3.0), start=3.0, steps=3,
                time_steps=20,
            ),
            6, dict(run=3, scale=3),
        ),
        (images.MNR(**SMALL, samples=40, alphas=(0.5, 1.0), messiness=(0.0, 0.5, 1.0),
                    steps=3), 2, dict(messiness=3, alpha=2)),
        (
            data.IM(
                samples=16, words=6, length=3, embedding=2, state=2, steps=20,
                sizes=(12,), alphas=(0.5, 1.0, 2.0), epochs=1,
            ),
            8, dict(run=3, size=1, scale=3),
        ),
    ],
    ids=["mn-l", "mn-w", "mn-ce", "mn-r", "im"],
)  # fmt: skip
def test_commands_from_start_to_end(tmp_path, config, checks, sizes):
    summary = STUDY.main(dataclasses.replace(config, out=tmp_path))
    # So short a run neither learns nor counts as what the experiment is after.
    assert len(summary["checks"]) == checks and "MNIST" not in summary["data"]
    delays = [row for row in summary["checks"] if row["bound"].startswith("≥ 10")]
    assert not any(row["ok"] for row in delays)
    arrays = kept(tmp_path / "arrays.nc")
    assert {name: arrays.sizes[name] for name in sizes} == sizes
    (figure,) = tmp_path.glob("*.png")
    assert figure.stat().st_size > 10_000
    assert any(tmp_path.glob("runs*.zarr"))


@pytest.mark.slow
def test_maps_of_toy_addition(tmp_path):
    small = dict(sizes=(25,), alphas=(0.5, 1.0), messiness=(0.0, 0.2), steps=30)
    config = addition.AD(width=8, learning_rate=1e-2, out=tmp_path, **small)
    first, *_ = verbs(config)
    assert first.train.shape == (1, 2, 2)
    assert first.messiness.values.tolist() == [0.0, 0.2]
    there = finished(tmp_path / "runs.zarr")
    assert there and config.compute().identical(first)
    assert finished(tmp_path / "runs.zarr") == there
    # A map of other points is not taken for it.
    with pytest.raises(ValueError, match="holds another sweep"):
        dataclasses.replace(config, alphas=(0.5, 1.0, 1.5)).compute()


def test_times_of_the_reduced_dynamics(tmp_path):
    config = addition.ADT(
        angles=(0.9,), ratios=(1.0, 10.0), weight_decays=(0.01,), out=tmp_path
    )
    near, general, far = verbs(config)[1]
    assert near.ok and general.ok and far.ok is None
    assert near.value < 0.05 and far.value > 0.2  # ten times off: the paper's is not it


def test_reviews():
    config = data.IM(
        samples=16, words=6, length=3, embedding=2, state=2, alpha=2.0, steps=12
    )
    task = config.task(16)
    assert "synthetic" in task.truth.title
    rows = data.review_rows(recorded(6, 100, 900, 10**4, **scans.named(task)))
    assert all(row.ok is None and "not judged" in row.sentence for row in rows)


def test_molecules(tmp_path, monkeypatch):
    """The whole command but for the training, whose networks take long to compile."""
    pytest.importorskip("rdkit")
    asked = []

    def scan(task, lanes, rule, store):
        asked.extend(lanes)
        run = {"test": (("run", "time"), np.full((3, 5), 0.5)),
               "train": (("run", "time"), np.ones((3, 5))),
               "norm": (("run", "time"), np.ones((3, 5))),
               "step": (("run", "time"), [[0, 10, 100, 1000, 10_000]] * 3),
               "memorised": ("run", [100.0] * 3),
               "grokked": ("run", [1000.0, math.inf, 48.0])}  # fmt: skip
        labels = {k: ("run", [lane[k] for lane in lanes]) for k in lanes[0]}
        return xr.Dataset(run, labels, scans.named(task))

    ends = np.array([[0.9, 0.01, 0.0], [0.9, 0.3, 0.8]])
    monkeypatch.setattr(scans, "scan", scan)
    monkeypatch.setattr(scans, "held", lambda task, alphas, *rest: ends)
    config = data.QM(
        molecules=16, widths=(3, 2), sizes=(12,), alphas=(0.5, 1.0, 2.0), quick=True,
        out=tmp_path,
    )  # fmt: skip
    summary = STUDY.main(config)
    lanes = [(lane["alpha"], lane["gamma"], lane["hold"]) for lane in asked]
    assert lanes == [(2.0, 0.01, 0), (2.0, 0.0, 1), (1.0, 0.01, 0)]
    verdicts = [row["ok"] for row in summary["checks"]]
    assert verdicts == [True, True, True, None, None, True, True]
    assert all("RDKit" in row["sentence"] for row in summary["checks"][3:5])
    assert summary["data"] == "enumerated molecules (RDKit)"
    assert kept(tmp_path / "arrays.nc").held.shape == (1, 2, 3)
    assert (tmp_path / "qm.png").stat().st_size > 10_000
