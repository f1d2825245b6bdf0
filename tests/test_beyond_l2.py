"""The experiments beyond ℓ2, on tiny settings and in this process."""

import json

import numpy as np
import pytest
from numpy.testing import assert_allclose

pytest.importorskip("tyro")
xr = pytest.importorskip("xarray")
import oracles  # noqa: E402

from experiments.beyond_l2 import STUDY  # noqa: E402
from experiments.beyond_l2.loop import subgradient_loop  # noqa: E402
from experiments.shared import record, rows  # noqa: E402


def run(name, tmp_path, **settings):
    """The summary of an experiment, by the name of its sub-command."""
    return STUDY.main(STUDY.experiments[name](out=tmp_path, **settings))


def row_of(summary, name):
    return [row for row in summary["checks"] if row["name"] == name]


def test_every_row_has_a_command():
    names = "cs1 cs2 cs3 cs4 cs5 cs6 cs7 d1 mf1 mf2 mf3 mf4 t".split()
    assert set(names) <= STUDY.experiments.keys()
    config = STUDY.parse(["cs5", "--seed", "3", "--quick", "--beta", "1e-4"])
    assert type(config) is STUDY.experiments["cs5"]
    assert (config.seed, config.quick, config.beta) == (3, True, 1e-4)
    # The defaults are the paper's.
    config = STUDY.parse(["cs1"])
    assert (config.features, config.sparsity, config.samples) == (100, 5, 30)
    assert (config.alpha, config.beta, config.zeta) == (0.1, 1e-5, 1e-6)
    assert config.steps == 10**6


@pytest.mark.slow
def test_linear_programs_are_counted(tmp_path):
    small = dict(features=20, sparsities=(1, 6), samples=(5, 20), trials=1)
    summary = run("cs7", tmp_path, **small)
    (law,) = row_of(summary, "s")
    assert "[[5, 20], [5, 20]]" in law["sentence"] or law["sentence"].count("[") == 3
    (full,) = row_of(summary, "N = n")
    assert full["ok"] and full["value"] < 1e-6
    assert record.kept(tmp_path / "arrays.nc").error.shape == (3, 2, 2, 1)
    assert (tmp_path / "n_min.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


@pytest.mark.slow
def test_theorems_hold_as_inequalities(tmp_path):
    small = dict(features=16, sparsity=1, samples=8, seeds=1)
    small |= dict(alphas=(0.05,), betas=(1e-3,), etas=(0.3,))
    summary = run("t", tmp_path, **small)
    judged = [row for row in summary["checks"] if row["ok"] is not None]
    assert len(judged) == 8 and all(row["ok"] for row in judged)
    # They are not empty: some are met within a factor of a hundred.
    assert sum(row["value"] > 1e-2 for row in judged) >= 5


@pytest.mark.slow
def test_two_norms_and_a_closed_form(tmp_path):
    small = dict(features=20, sparsity=2, samples=6, beta=1e-3, steps=10**6)
    summary = run("cs5", tmp_path, quick=True, **small)
    assert all(row["ok"] for row in summary["checks"])


def test_the_papers_loop_is_the_oracle():
    rng = np.random.default_rng(0)
    x, target, start = rng.normal(size=(3, 5)) / 2, rng.normal(size=5), np.ones(5)
    y = x @ target
    rule = dict(alpha=0.1, beta=1e-2, steps=1500)
    loop = subgradient_loop(x, y, target, start, **rule)
    assert_allclose(loop.a, oracles.subgradient_loop(x, y, start, 0.1, 1e-2, 1500))
    assert loop.errors.size == 1001 and loop.seconds > 0


def test_laws_and_spreads():
    x = np.geomspace(1e-3, 1, 7)
    assert rows.law(x, 3 * x**-1.5) == pytest.approx(-1.5)
    assert np.isnan(rows.law([1.0, np.nan], [2.0, 3.0]))
    assert rows.decades(x) == pytest.approx(3)
    assert rows.spread([1.0, 1.21]) == pytest.approx(0.1)
    assert rows.rank_correlation([1, 2, 3], [2, 4, 9]) == pytest.approx(1)
    assert np.isnan(rows.rank_correlation([1, 2, 3], [5, 5, 5]))
    labelled = xr.DataArray([1, 2, 3])
    assert rows.rank_correlation(labelled, [3, 2, 1]) == pytest.approx(-1)
