"""Figures have labelled axes, legends and one curve for each lane."""

import equinox as eqx
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import shared_problems
from matplotlib.figure import Figure
from shared_problems import LAMS

import gradflow as gf

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def no_figures():
    """Other tests may leave figures open in this process."""
    plt.close("all")
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def results():
    sweep, _, report = shared_problems.study()
    return sweep, report


def axes():
    # Not by pyplot: given axes, the functions must leave its state alone.
    return Figure(layout="constrained").subplots()


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_path_has_a_labelled_curve_for_each_quantity(results):
    ax = axes()
    assert gf.plot.path(results[0][1], ax) is ax
    assert ax.get_xlabel() == "time $t$" and ax.get_ylabel()
    assert labels(ax) == ["train loss", "test", "penalty $R$"]
    assert "10^{-3}" in ax.get_title()
    assert not plt.get_fignums()


def test_path_on_the_slow_clock(results):
    path = results[0][1]
    ax = gf.plot.path(path, axes(), clock="s")
    assert ax.get_xlabel() == "slow time $s = \\lambda t$"
    x = ax.get_lines()[0].get_xdata()
    np.testing.assert_allclose(x, np.asarray(path.slow_time)[1:])


@pytest.mark.parametrize("metric", ["test", "train_loss", "penalty"])
def test_sweep_has_a_curve_for_each_lane_and_a_scale(results, metric):
    sweep = results[0]
    ax = gf.plot.sweep(sweep, axes(), metric=metric)
    curves = [line for line in ax.get_lines() if len(line.get_xdata()) > 2]
    assert len(curves) == len(LAMS)
    assert len({line.get_color() for line in curves}) == len(LAMS)
    (bar,) = [a for a in ax.figure.axes if a is not ax]
    assert bar.get_ylabel() == "weight decay $\\lambda$"
    np.testing.assert_allclose(bar.get_ylim(), (1e-4, 1e-2))


def test_curves_collapse_on_the_slow_clock(results):
    sweep, report = results
    with pytest.raises(ValueError, match=r"^metric: expected one of 'penalty', "):
        gf.plot.collapse(report, metric="tset")
    ax = gf.plot.collapse(report, axes(), metric="penalty")
    *lanes, drift = [line for line in ax.get_lines() if len(line.get_xdata()) > 2]
    assert len(lanes) == len(LAMS) and "drift" in drift.get_label()
    s = np.linspace(0.1, 2.9, 20)
    drift_at = np.interp(s, *drift.get_data())
    for lane, lam in zip(lanes, LAMS, strict=True):
        off = np.abs(np.interp(s, *lane.get_data()) / drift_at - 1)
        assert off.max() < 2 * lam + 5e-2  # linear between the saved times


def test_a_drift_is_drawn_and_told_in_slow_time(results):
    drift = results[1].theory.drift
    ax = gf.plot.drift(drift, axes())
    assert ax.get_xlabel() == "slow time $s = \\lambda t$" and not ax.get_title()
    assert labels(ax) == ["train loss", "test", "penalty $R$"]
    np.testing.assert_array_equal(ax.get_lines()[-1].get_xdata(), drift.s[1:])
    text = str(drift)
    assert text.startswith("Drift of 8 parameters") and "s = 0 … 3" in text
    assert "still drifting" in text and not drift.stationary
    expected = gf.crossing_time(drift.s, drift.metrics["test"], drift.watched["test"])
    np.testing.assert_equal(drift.crossing_time("test"), expected)
    assert drift.succeeded and drift.verdict == gf.RESULTS[gf.RESULTS.successful]
    np.testing.assert_array_equal(drift[-1].weights, drift.models.weights[-1])


def test_report_has_six_labelled_panels(results):
    report = results[1]
    figure = Figure(figsize=(15, 8.6), layout="constrained")
    assert gf.plot.report(report, figure) is figure
    panels = [ax for ax in figure.axes if ax.get_title(loc="left")]
    letters = [ax.get_title(loc="left")[1] for ax in panels]
    assert letters == list("abcdef")
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in panels)
    assert all(ax.get_legend() is not None for ax in panels)
    for order in report.orders.values():
        rate = f"rate {order.rate.exponent:.3f}"
        assert any(rate in text for text in labels(panels[3]))
    figure.canvas.draw()
    sizes = [
        text.get_fontsize()
        for ax in panels
        for text in (*ax.get_xticklabels(), *ax.get_legend().get_texts(), *ax.texts)
    ]
    assert min(sizes) >= 10


def test_without_axes_they_make_a_figure_of_their_own(results):
    sweep, report = results
    assert sweep[0].plot().get_figure() is not sweep.plot().get_figure()
    assert isinstance(report.plot(), Figure)
    assert len(plt.get_fignums()) == 3
    matplotlib.pyplot.close("all")


def test_a_report_without_grokking_says_so(results):
    report = results[1]
    ax = axes()
    never = np.full(len(LAMS), np.nan)
    where = lambda r: (r.grokked.measured, r.grokked.predicted)
    gf.plot.grokking(eqx.tree_at(where, report, (never, never)), ax)
    assert "does not" in ax.texts[0].get_text()
    where = lambda r: r.grokked.predicted
    ax = axes()
    gf.plot.grokking(eqx.tree_at(where, report, never), ax)
    assert "theory predicts no time" in ax.texts[0].get_text()


def test_an_unknown_metric_is_refused(results):
    sweep = results[0]
    with pytest.raises(ValueError, match="metric: expected one of"):
        gf.plot.sweep(sweep, axes(), metric="accuracy")
