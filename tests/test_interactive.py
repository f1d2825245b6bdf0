"""Interactive pages: their numbers are those of the results, they need no network, and
in a browser the sliders move what they show."""

import dataclasses
import json
import os
import re
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shared_problems
from shared_problems import LAMS

import gradflow as gf
from gradflow.sweeps.axes import make_axes

pytest.importorskip("plotly", reason="Plotly is not installed")


def data_of(page):
    """What a page holds in JSON."""
    text = page.read_text("utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


def close(values, expected):
    """To five digits; what is not finite is missing."""
    expected = np.asarray(expected, float)
    expected = np.where(np.isfinite(expected), expected, np.nan)
    np.testing.assert_allclose(np.array(values, float), expected, rtol=1e-4)


@pytest.fixture(scope="module")
def report():
    """One of which theory claims to hold for a while only."""
    until = np.array([0.0, 0.5, 1.5])
    return dataclasses.replace(shared_problems.study()[2], valid_until=until)


@pytest.fixture(scope="module")
def shown(report, tmp_path_factory):
    """The page of the report, and what is in it."""
    file = tmp_path_factory.mktemp("page") / "report.html"
    weight = dict(inputs=np.arange(8), function=lambda model, i: model.weights[i])
    assert report.to_html(str(file), bundle="directory", **weight) == file
    return file, data_of(file)


def test_the_numbers_are_those_of_the_report(report, shown):
    lanes, sweep = shown[1]["lanes"], report.sweep
    assert len(lanes) == len(LAMS)
    for i, lane in enumerate(lanes):
        close(lane["t"], sweep.t[i])
        close(lane["s"], sweep.slow_time[i])
        close(lane["train_loss"], sweep.train_loss[i])
        close(lane["penalty"], sweep.penalty[i])
        close(lane["metric test"], sweep.metrics["test"][i])
        close(lane["drift error"], report.drift.error[i])
        for k, order in report.orders.items():
            close(lane[f"error {k}"], order.error[i])
            close(lane[f"sup {k}"], order.sup[i])
        close(lane["λ"], LAMS[i])
        close(lane["valid until"], [np.nan, 0.5, 1.5][i])
        close(lane["grokked"], report.grokked.measured[i])
        close(lane["predicted"], report.grokked.predicted[i])
        assert lane["note"] == ""
    assert len({lane["colour"] for lane in lanes}) == len(LAMS)


def test_predictions_are_those_of_the_theory(report, shown):
    for lane, lam in zip(shown[1]["lanes"], LAMS, strict=True):
        found = report.theory.predicted(float(lam))
        t = np.array(lane["predicted t"], float)
        at = np.abs(found.t[:, None] - t).argmin(axis=0)
        close(lane["predicted t"], found.t[at])
        assert t[0] == 0 and at[-1] == found.t.size - 1
        for k, curves in enumerate(found.curves[:2], 1):
            close(lane[f"metric test, order {k}"], curves["test"][at])


def test_functions_are_of_the_models_simulated_and_predicted(report, shown):
    for i, lane in enumerate(shown[1]["lanes"]):
        rows = np.array(lane["function"], float)
        weights = np.asarray(report.sweep[i].params.weights)
        close(rows[:, :-1], weights)
        assert np.isnan(rows[:, -1]).all()  # the gap after a curve
        path, until = report.sweep[i], report.valid_until[i]
        held = np.asarray(path.slow_time) <= until
        told = report.theory.predict(path.t, float(LAMS[i]), order=2).weights
        rows = np.array(lane["function, order 2"], float)[:, :-1]
        close(rows, np.where(held[:, None], told, np.nan))


def test_panels_draw_what_the_figure_does(report, shown):
    file, data = shown
    titles = re.findall(r"<h2>(.*?)</h2>", file.read_text("utf-8"))
    assert len(titles) == len(data["panels"]) == 8
    drift = report.theory.drift
    traces = {trace["name"]: trace for p in data["panels"] for trace in p["data"]}
    for number, values in ((1, drift.metrics["test"]), (2, drift.penalty)):
        here = {trace["name"]: trace for trace in data["panels"][number]["data"]}
        close(here["drift w°(s)"]["x"], drift.s)
        close(here["drift w°(s)"]["y"], values)
    close(traces["η(s)"]["y"], report.theory.smallest_curvature)
    for k, order in report.orders.items():
        rate = f"order {k}: rate {order.rate.exponent:.3f}"
        close(traces[rate]["y"], order.sup[np.argsort(report.weight_decay)])
    for p in data["panels"]:
        columns = [t.get("meta") or {} for t in p["data"]]
        asked = {v for meta in columns for k, v in meta.items() if k in ("x", "y")}
        assert asked <= set(data["lanes"][0])
        assert p["layout"]["xaxis"]["title"]["text"]


def make(seed):
    if seed == 2:
        raise ArithmeticError("seed 2 is <odd>")
    task = gf.tasks.linear_regression(jax.random.key(seed), samples=3, dim=6)
    return task.flow, task.model, task.metrics | {"weights": lambda m: m.weights}


@pytest.fixture(scope="module")
def descents():
    """Four of six lanes: those of a large step diverge, and one seed raises."""
    axes = {"seed": [1, 2], "scale": [1.0, 3.0]}
    return gf.sweep(
        lambda seed, scale: make(seed), axes=axes, zipped=[("seed", "scale")],
        weight_decay=0.1, run=gf.Descent(learning_rate=[1e3, 0.05, 0.02], steps=20),
        saves=5, progress=False,
    )  # fmt: skip


def test_lanes_that_failed_are_named(descents, tmp_path):
    file = descents.to_html(tmp_path / "sweep.html", bundle="directory")
    text, lanes = file.read_text("utf-8"), data_of(file)["lanes"]
    failed = np.flatnonzero(~np.asarray(descents.succeeded)).tolist()
    assert failed == [0, 3, 4, 5]
    assert "4 of 6 lanes failed." in text
    assert "RAISED: ArithmeticError: seed 2 is &lt;odd&gt;" in text
    assert "seed 1, scale 1, h 1e+03: FAILED: " in text
    for i, lane in enumerate(lanes):
        assert lane["note"] == descents.failure(i) and bool(lane["note"]) == (
            i in failed
        )
        close(lane["train_loss"], descents.train_loss[i])
    assert lanes[3]["train_loss"] == [None] * 5


def test_a_lane_that_failed_does_not_set_the_scale(descents, tmp_path):
    learnt = dict(inputs=np.arange(6), function=lambda model, i: model.weights[i])
    file = descents.to_html(tmp_path / "page.html", bundle="directory", **learnt)
    data = data_of(file)
    low, high = data["panels"][-1]["layout"]["yaxis"]["range"]
    shown = np.array([data["lanes"][i]["function"] for i in (1, 2)], float)
    assert low < np.nanmin(shown) and np.nanmax(shown) < high < 10
    every = [data["lanes"][i]["function"] for i in (0, 1, 2)]
    assert np.nanmax(np.abs(np.array(every, float))) > 1e6


def test_metrics_that_a_logarithm_does_not_show(tmp_path):
    """One of both signs has a panel of its own; one that is better where higher is no
    loss; a threshold at infinity, and an axis with infinity, are no numbers to draw."""
    right = gf.Metric(lambda m: 1 / (1 + m.weights[0] ** 2), 0.5, True)
    metrics = {
        "test": right,
        "sign": lambda m: m.weights[0] - 1.4,
        "endless": gf.Metric(lambda m: m.weights[1] ** 2, threshold=np.inf),
    }
    task = gf.tasks.linear_regression(jax.random.key(0), samples=3, dim=6)
    sweep = gf.sweep(
        lambda cap: (task.flow, task.model, metrics), axes={"cap": [1.0, np.inf]},
        weight_decay=0.1, run=gf.Descent(learning_rate=0.02, steps=20), saves=5,
        progress=False,
    )  # fmt: skip
    data = data_of(sweep.to_html(tmp_path / "page.html", bundle="directory"))
    names = [{t["name"] for t in p["data"]} for p in data["panels"]]
    assert "test" in names[0] and "test loss" not in names[0] and "sign" not in names[0]
    (own,) = [
        p for p, found in zip(data["panels"], names, strict=True) if "sign" in found
    ]
    values = np.asarray(sweep.metrics["sign"])[:, 1:]  # t = 0 is not on the page
    assert own["layout"]["yaxis"]["type"] == "linear" and values.min() < 0
    low, high = own["layout"]["yaxis"]["range"]
    assert low < values.min() and values.max() < high


def test_a_report_that_was_read_has_a_page(tmp_path):
    """Its metrics have lost their functions: what comparing kept is drawn."""
    task = gf.tasks.linear_regression(jax.random.key(0), samples=3, dim=6)
    watch = {"test": gf.Metric(lambda m: jnp.sum(m.weights**2), threshold=1.0)}
    options = dict(slow_time=1.0, metrics=watch)
    theory = gf.two_phase(task.flow, task.model, **options)
    sweep = gf.sweep(
        task.flow, task.model, weight_decay=LAMS, progress=False, **options
    )
    report = gf.compare(sweep, theory)
    gf.save(tmp_path / "report.npz", report)
    read = gf.load(tmp_path / "report.npz")
    with pytest.raises(ValueError, match="without a name of its own"):
        read.theory.predicted(float(LAMS[0]))
    lanes = data_of(read.to_html(tmp_path / "page.html", bundle="directory"))["lanes"]
    assert len(lanes) == len(LAMS)
    for i, lane in enumerate(lanes):
        t, told = report.curves.t[i], report.curves.metrics["test"][i]
        at = np.abs(t[:, None] - np.array(lane["predicted t"], float)).argmin(axis=0)
        assert at[0] == 0 and at[-1] == t.size - 1 and (np.diff(at) > 0).all()
        close(lane["predicted t"], t[at])
        close(lane["metric test, order 1"], told[at])


def test_each_dimension_has_a_slider_and_each_position_its_lane(descents, tmp_path):
    file = descents.to_html(tmp_path / "sweep.html", bundle="directory")
    data = data_of(file)
    sliders = re.findall(r'<span>(.*?)</span>.*?max="(\d+)"', file.read_text("utf-8"))
    assert sliders == [("seed, scale", "1"), ("learning rate", "2"), ("time", "239")]
    seeds, rates = data["axes"]
    assert seeds["words"] == [
        [["seed", 1], ["scale", 1.0]],
        [["seed", 2], ["scale", 3.0]],
    ]
    assert [word for ((_, word),) in rates["words"]] == [0.02, 0.05, 1e3]
    for a, ((_, seed), _) in zip(seeds["lanes"], seeds["words"], strict=True):
        for b, ((_, rate),) in zip(rates["lanes"], rates["words"], strict=True):
            at = descents.axes.at(a + b)
            assert (at["seed"], at["learning_rate"]) == (seed, rate)
    for j in range(6):  # a metric that is an array: a column for each of its numbers
        close(
            data["lanes"][1][f"metric weights {j}"],
            descents.metrics["weights"][1, :, j],
        )


def test_a_stored_sweep_has_the_same_page(whole, tmp_path):
    from stores import make, RATES, SEEDS

    stored = gf.sweep(
        make, axes={"seed": SEEDS}, weight_decay=0.1, saves=5, progress=False,
        run=gf.Descent(learning_rate=RATES, steps=20),
        store=gf.Store(whole[0], chunk=3, parameters=True),
    )  # fmt: skip
    weights = dict(
        inputs=[0, 1], function=lambda m, i: m.weights[i], bundle="directory"
    )
    one = stored.to_html(tmp_path / "stored.html", **weights)
    two = stored.load().to_html(tmp_path / "loaded.html", **weights)
    assert data_of(one) == data_of(two)
    assert np.shape(data_of(one)["lanes"][0]["function"]) == (5, 3)


def many(sweep, seeds):
    """The same lanes again for each of the seeds."""
    axes = make_axes({"seed": range(seeds), "weight_decay": LAMS})
    bare = dataclasses.replace(sweep.paths, static=None)
    again = lambda x: jnp.concatenate([x] * seeds)
    paths = jax.tree.map(lambda x: again(x) if eqx.is_array(x) else x, bare)
    paths = dataclasses.replace(paths, static=sweep.paths.static)
    return dataclasses.replace(sweep, paths=paths, axes=axes, lanes=None)


def test_thousands_of_lanes_have_fewer_times(report, tmp_path):
    lanes = many(report.sweep, 1000)
    file = lanes.to_html(tmp_path / "many.html", bundle="directory")
    assert file.stat().st_size < 10e6
    data = data_of(file)
    assert len(data["lanes"]) == 3000
    t, saved = np.array(data["lanes"][-1]["t"]), np.asarray(report.sweep.t[-1])
    assert 40 < t.size < saved.size and t[-1] == pytest.approx(saved[-1], rel=1e-4)
    assert max(len(p["data"]) for p in data["panels"]) < 60
    with pytest.raises(
        ValueError, match="^inputs: 3000 lanes with 106 numbers at each"
    ):
        lanes.to_html(
            file, inputs=np.arange(100.0), function=lambda m, x: m.weights[0] * x
        )


def test_those_behind_the_chosen_lane_are_of_all_weight_decays(report, tmp_path):
    """Of 39 × 3 lanes every third would be of one λ, and then of another."""
    lanes = many(report.sweep, 39)
    data = data_of(lanes.to_html(tmp_path / "page.html", bundle="directory"))
    traces = data["panels"][0]["data"]
    behind = [t["meta"]["lane"] for t in traces if "lane" in t["meta"]]
    assert len(behind) == 40
    assert np.bincount(np.array(behind) % len(LAMS), minlength=len(LAMS)).min() >= 5


def test_nothing_is_loaded_from_elsewhere(report, shown, tmp_path):
    file, _ = shown
    assert (file.parent / "plotly.min.js").stat().st_size > 1e6
    whole = report.to_html(tmp_path / "whole.html")
    assert os.listdir(tmp_path) == ["whole.html"]
    for page in (file, whole):
        text = page.read_text("utf-8")
        tags = re.findall(r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=[^>]*>", text)
        expected = ['<script src="plotly.min.js">'] if page == file else []
        assert tags == expected
    assert data_of(whole)["lanes"][0]["t"] == data_of(file)["lanes"][0]["t"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(bundle="cdn"), "bundle: expected 'inline' or 'directory', got 'cdn'."),
        (dict(inputs=[0.0]), "inputs: expected two or more finite numbers, of shape"),
        (dict(inputs=[0.0, np.nan]), "inputs: expected two or more finite numbers"),
        (dict(inputs=np.ones((4, 2))), "inputs: expected two or more finite numbers"),
        (dict(inputs="words"), "inputs: expected two or more finite numbers"),
        (dict(inputs=[0.0, 1.0]), "inputs: the function does not take one of shape"),
        (dict(function=abs), "inputs: expected those to call the function with"),
        (
            dict(inputs=[0, 1], function=lambda m, x: jnp.ones(9)),
            "function: expected 1 to 8 real numbers for each input, got float64 of",
        ),
    ],
)
def test_what_makes_no_page_is_refused(report, tmp_path, options, message):
    for result in (report, report.sweep):
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            result.to_html(tmp_path / "page.html", **options)
    assert not os.listdir(tmp_path)


def test_without_a_folder_or_plotly_it_says_so(report, tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match="file: expected a name in a folder that exists"
    ):
        report.to_html(tmp_path / "none" / "page.html")
    with pytest.raises(ValueError, match="file: expected a name in a folder"):
        report.to_html(tmp_path)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ImportError, match="interactive pages need plotly: pip install"):
        report.to_html(tmp_path / "page.html")


def opened(browser, file, width):
    """The page, without a network, and what went wrong in it."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, offline=True
    )
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda told: wrong.append(told.text))
    page.on("requestfailed", lambda request: wrong.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_function("document.querySelector('output').textContent !== ''")
    return page, wrong


def drawn(page, number, name):
    """The traces of that name in a panel, as Plotly has them."""
    return page.evaluate(
        "([i, name]) => plots[i].data.filter(trace => trace.name === name)",
        [number, name],
    )


def read(page, text):
    """Waits until a slider says so; curves have moved in the same frame."""
    page.wait_for_function(
        "text => [...document.querySelectorAll('output')]"
        ".some(output => output.textContent.includes(text))",
        arg=text,
    )


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser_sliders_move_the_curves(browser, shown, width):
    file, data = shown
    page, wrong = opened(browser, file, width)
    high, low = data["lanes"][0], data["lanes"][1]
    decay, time = page.locator("input").all()
    read(page, "λ = 0.001")
    assert drawn(page, 0, "test loss")[0]["y"] == low["metric test"]

    decay.press("ArrowRight")
    read(page, "λ = 0.01")
    curve, dot = drawn(page, 0, "test loss")
    assert curve["y"] == high["metric test"] and curve["x"] == high["t"]
    assert curve["line"]["color"] == high["colour"]
    (theory,) = drawn(page, 0, "order 2")
    assert theory["y"] == high["metric test, order 2"]
    assert dot["y"][0] in high["metric test"]

    time.press("End")
    read(page, "t = 300, s = 3")
    assert drawn(page, 0, "test loss")[1]["x"] == [high["t"][-1]] != dot["x"]
    assert page.evaluate("plots[0].layout.shapes[0].x0") == high["t"][-1]
    time.click(position={"x": 2, "y": 5})  # by mouse, to the left end
    page.wait_for_function("k => plots[0].layout.shapes[0].x0 === k", arg=high["t"][1])

    function = page.locator(".plot").last
    function.scroll_into_view_if_needed()
    page.wait_for_function(
        "row => plots.at(-1).data[0].y.every((y, i) => y === row[i])",
        arg=high["function"][1],
    )
    over = (
        "[document.documentElement, ...plots].map(e => e.scrollWidth - e.clientWidth)"
    )
    assert max(page.evaluate(over)) <= 0
    assert page.locator(".plot .main-svg").count() >= len(data["panels"])
    page.context.close()
    assert not wrong


@pytest.mark.slow
def test_in_a_browser_a_page_without_its_bundle_says_so(browser, shown, tmp_path):
    alone = tmp_path / "alone.html"
    alone.write_bytes(shown[0].read_bytes())
    page = browser.new_page()
    page.goto(alone.as_uri())
    note = page.locator("#note")
    assert note.text_content() == "plotly.min.js is not beside this page."
    assert note.is_visible()


@pytest.mark.slow
def test_in_a_browser_a_failed_lane_says_why(browser, descents, tmp_path):
    page, wrong = opened(browser, descents.to_html(tmp_path / "sweep.html"), 400)
    seeds, rates, _ = page.locator("input").all()
    seeds.press("Home")
    rates.press("Home")
    read(page, "h = 0.02")
    assert page.locator("#note").inner_text() == ""
    rates.press("End")
    read(page, "h = 1000")
    assert page.locator("#note").inner_text() == descents.failure(0)
    seeds.press("ArrowRight")
    read(page, "seed = 2, scale = 3")
    assert (
        page.locator("#note").inner_text() == "RAISED: ArithmeticError: seed 2 is <odd>"
    )
    assert set(drawn(page, 0, "train loss")[0]["y"]) == {None}
    page.context.close()
    assert not wrong
