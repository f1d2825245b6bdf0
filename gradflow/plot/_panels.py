"""The panels of interactive pages, and which columns of a lane their traces show."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from ._drawn import Report, Sweep
from ._lanes import Columns, hex_colours, thinned
from ._page import numbers, Panel, Range
from ._report import ORDERS
from ._style import each, NAMES, TEST, THEORY

_BEHIND = 40  # lanes that are drawn behind the one that is chosen
_COMPONENTS = 12  # of a metric that is an array
_STATIC = 200  # points of what no slider moves
_CLOCKS = {"t": "time t", "s": "slow time s = λt"}
_DASHES = {1: "dash", 2: "dot"}  # of the orders
_LINES = ("solid", "dashdot", "longdash", "longdashdot")  # of metrics

Trace = dict[str, Any]


def scalars(sweep: Sweep) -> list[str]:
    """The metrics of one number each, but for the train loss by another name."""
    loss = np.asarray(sweep.train_loss)
    again = lambda k, v: k == "train" and np.array_equal(v, loss, equal_nan=True)
    found = sweep.metrics.items()
    return [k for k, v in found if np.ndim(v) == 2 and not again(k, v)]


def signed(sweep: Sweep) -> list[str]:
    """Those of them with negative values, which a logarithmic axis does not show."""
    good = _judged(sweep)
    return [k for k in scalars(sweep) if (np.asarray(sweep.metrics[k])[good] < 0).any()]


def alone(sweep: Sweep) -> list[str]:
    """The metrics that have a panel of their own."""
    return [*signed(sweep), *arrays(sweep)]


def arrays(sweep: Sweep) -> dict[str, int]:
    """The metrics that are arrays, and how many of their numbers are drawn."""
    sizes = {k: np.shape(v)[2:] for k, v in sweep.metrics.items() if np.ndim(v) > 2}
    return {k: min(int(np.prod(n)), _COMPONENTS) for k, n in sizes.items()}


def losses(
    sweep: Sweep, columns: Columns, clock: str, report: Report | None = None
) -> Panel:
    """Train loss and metrics; in slow time the metrics alone, which show the drift."""
    own = signed(sweep)
    names = [name for name in scalars(sweep) if name not in own]
    keys = [f"metric {name}" for name in names]
    shown = keys + ["train_loss"] * (clock == "t" or not names)
    main = "metric test" if "test" in names else shown[0]
    traces, static = _behind(sweep, clock, main), []
    if "train_loss" in shown:
        traces += _chosen(clock, "train_loss", "train loss", width=1.2)
    for name, key, dash in zip(names, keys, _LINES * len(names), strict=False):
        word = _word(sweep, name)
        traces += _chosen(clock, key, word, dash=dash)
        said = f"{word}, " if len(names) > 1 else ""
        if report is not None and clock == "t":
            for k in report.orders:
                if (told := f"{key}, order {k}") in columns:
                    line = _theory("predicted t", told, f"{said}order {k}", k)
                    traces.append(line)
        elif report is not None and name in report.theory.drift.metrics:
            static.append(report.theory.drift.metrics[name])
            traces.append(_drift(report, static[-1], f"{said}drift w°(s)"))
    ranges = _ranges(sweep, columns, clock, shown, report, static, log=True)
    if report is not None and clock == "t":
        marks = ("train", "memorised", "square"), ("test", "grokked", "circle")
        for name, column, symbol in marks:
            at = _levels(sweep, [name])
            traces += [_mark(column, symbol, x=column, y=level) for level in at]
    elif report is not None:
        traces.append(_valid(ranges[1]))
    title = "Losses and metrics" if "train_loss" in shown else "Metrics"
    if len(shown) == 1:
        only = shown[0].removeprefix("metric ")
        title = _word(sweep, only)
        title = title[:1].upper() + title[1:]
    title += {"t": " in time", "s": " on the slow clock"}[clock]
    told = [_word(sweep, name) for name in names]
    plain = all(word.endswith(" loss") for word in told)
    labels = _CLOCKS[clock], "loss" if plain else "loss, metrics"
    return Panel(title, labels, ranges, traces, clock, _levels(sweep, names))


def penalty(
    sweep: Sweep, columns: Columns, clock: str, report: Report | None = None
) -> Panel:
    traces = _behind(sweep, clock, "penalty") + _chosen(clock, "penalty", "penalty R")
    static = [] if report is None else [report.theory.drift.penalty]
    ranges = _ranges(sweep, columns, clock, ["penalty"], report, static)
    if report is not None:
        traces += [_drift(report, static[0], "drift w°(s)"), _valid(ranges[1])]
    title = {"t": "Penalty in time", "s": "Penalty on the slow clock"}[clock]
    return Panel(title, (_CLOCKS[clock], "penalty R"), ranges, traces, clock)


def numbers_of(
    sweep: Sweep, columns: Columns, name: str, clock: str, report: Report | None = None
) -> Panel:
    """A metric in a panel of its own; of an array a line for each of its numbers."""
    count, traces, static = arrays(sweep).get(name, 0), [], []
    keys = [f"metric {name} {j}" for j in range(count)]
    if not count:
        count, keys = 1, [f"metric {name}"]
        traces = _behind(sweep, clock, keys[0])
    for key in keys:
        line, dot = _chosen(clock, key, name, width=1.4)
        traces += [line | {"showlegend": key == keys[0]}, dot]
    if report is not None and name in report.theory.drift.metrics:
        static = list(each(report.theory.drift.metrics[name])[:count])
        for j, along in enumerate(static):
            line = _drift(report, along, f"{name}, drift")
            traces.append(line | {"showlegend": j == 0})
    ranges = _ranges(sweep, columns, clock, keys, report, static)
    whole = int(np.prod(np.shape(sweep.metrics[name])[2:]))
    title = name if whole == count else f"{name}: the first {count} of {whole} numbers"
    return Panel(title, (_CLOCKS[clock], name), ranges, traces, clock)


def errors(report: Report, columns: Columns) -> Panel:
    """Of the prediction, at each time."""
    traces = _behind(report.sweep, "t", "error 1")
    for k, colour in zip(report.orders, ORDERS, strict=False):
        traces += _chosen("t", f"error {k}", f"order {k}", colour=colour)
    traces += _chosen("t", "drift error", "drift alone", colour="grey", width=1.4)
    keys = [f"error {k}" for k in report.orders] + ["drift error"]
    labels = _CLOCKS["t"], "error relative to ‖Φ‖"
    ranges = _ranges(report.sweep, columns, "t", keys)
    return Panel("Error of the theory in time", labels, ranges, traces, "t")


def largest(report: Report) -> Panel:
    """The largest errors against λ, with the rates."""
    rising = np.argsort(report.weight_decay)
    lams, traces = report.weight_decay[rising], []
    for (k, order), colour in zip(report.orders.items(), ORDERS, strict=False):
        used, known = order.rate.used[rising], bool(order.rate.used.any())
        rate = f"rate {order.rate.exponent:.3f}" if known else "no rate"
        style = {"color": colour, "size": 8, "line": {"color": colour, "width": 1.5}}
        style["symbol"] = ["circle" if one else "circle-open" for one in used]
        traces.append(
            _line(lams, order.sup[rising], f"order {k}: {rate}")
            | {"mode": "markers", "marker": style}
        )
        if np.isfinite(order.next_term).any():
            traces.append(
                _line(lams, order.next_term[rising], f"order {k}, estimated",
                      color=colour, width=1.2, dash="dash")
            )  # fmt: skip
        traces.append(
            _mark("chosen", "circle-open", x="λ", y=f"sup {k}", size=16)
            | {"showlegend": False}
        )
    every = [
        v for order in report.orders.values() for v in (order.sup, order.next_term)
    ]
    ranges = Range.of(lams), Range.of(*every)
    labels = "weight decay λ", "error relative to ‖Φ‖"
    return Panel("Largest error against λ (filled: fitted)", labels, ranges, traces)


def grokking(report: Report) -> Panel:
    """Measured against predicted times; the diagonal is agreement."""
    x, y = report.grokked.predicted, report.grokked.measured
    shown = (x > 0) & (y > 0)
    ends = Range.of(np.where(shown, x, np.nan), np.where(shown, y, np.nan))
    colours = hex_colours(report.sweep)
    dots = {"size": 9, "color": [colours[i] for i in np.flatnonzero(shown)]}
    dots["line"] = {"color": "black", "width": 1}
    both = [ends.low, ends.high]
    traces = [
        _line(both, both, "measured = predicted", color="black", width=1, dash="dash"),
        _line(x[shown], y[shown], "each λ") | {"mode": "markers", "marker": dots},
        _mark("chosen", "circle-open", x="predicted", y="grokked", size=18)
        | {"showlegend": False},
    ]  # fmt: skip
    title = "Grokking time"
    if not shown.any():
        title += ": " + (
            "theory predicts none" if np.isfinite(y).any() else "none was measured"
        )
    else:
        off = np.median(np.abs(y[shown] / x[shown] - 1))
        title += f": median difference {100 * off:.1g} %"
    return Panel(title, ("predicted time t", "measured time t"), (ends, ends), traces)


def curvature(report: Report) -> Panel:
    """η(s) along the drift, and λ, which theory asks to be far below."""
    theory = report.theory
    s, eta = np.asarray(theory.drift.s), np.asarray(theory.smallest_curvature)
    every = thinned(s.size, _STATIC)
    ranges = Range.of(s, log=False), Range.of(eta, report.weight_decay)
    left, right = float(s[0]), float(s[-1])
    traces = [
        _line(s[every], eta[every], "η(s)", color="black", width=2.2),
        {"mode": "lines", "name": "λ", "line": {"width": 2}, "x": [left, right],
         "meta": {"y": "level"}},
        _mark("valid up to here", "triangle-down", x="valid until", y="λ"),
    ]  # fmt: skip
    if report.regular_until < right:
        foot = [report.regular_until] * 2, [ranges[1].low, ranges[1].high]
        traces.append(_line(*foot, "η at a tenth", color=TEST, width=1.8, dash="dot"))
    labels = _CLOCKS["s"], "η, λ"
    return Panel("Where theory holds: λ ≪ η", labels, ranges, traces, "s")


def learnt(
    sweep: Sweep, columns: Columns, x: np.ndarray, orders: Iterable[int]
) -> Panel:
    """The function of the model, at the chosen time."""
    line = {"mode": "lines", "x": numbers(x)}
    traces = [
        line
        | {"name": "simulated", "line": {"width": 2.4},
           "meta": {"y": "function", "now": True}}
    ]  # fmt: skip
    traces += [
        line | _theory("", f"function, order {k}", f"order {k}", k, now=True)
        for k in orders
    ]
    up = Range.of(columns["function"][_judged(sweep)], log=False)
    ranges = Range.of(x, log=False), up
    return Panel("The function, at the chosen time", ("input x", ""), ranges, traces)


def _ranges(
    sweep: Sweep,
    columns: Columns,
    clock: str,
    keys: Iterable[str],
    report: Report | None = None,
    static: Iterable[Any] = (),
    *,
    log: bool = False,
) -> tuple[Range, Range]:
    """Of the axes, by the lanes that did not fail, if there are any. In a report the
    slow clock begins where the drift does: the fast phase is at smaller and smaller s.
    The other axis is linear where values are negative, or close together in slow time,
    unless it is to be `log`."""
    good = _judged(sweep)
    x, y = columns[clock][good], [columns[key][good] for key in keys]
    across = Range.of(x)
    if report is not None and clock == "s":
        end = float(np.asarray(report.theory.drift.s)[-1])
        across = Range(1e-4 * end, 1.3 * end)
    y = [np.where(x >= across.low, values, np.nan) for values in y]
    y += [np.asarray(values) for values in static]
    up = Range.of(*y)
    if not log and any((values < 0).any() for values in y):
        return across, Range.of(*y, log=False)
    if clock == "s" and up.high < 30 * up.low:
        up = Range(0.0, up.high, log=False)
    return across, up


def _judged(sweep: Sweep) -> np.ndarray:
    """The lanes that did not fail, if there are any; else all."""
    good = np.asarray(sweep.succeeded)
    return good if good.any() else ~good


def _word(sweep: Sweep, name: str) -> str:
    """What a metric is called: a loss, if it may be one."""
    watched = [sweep.paths.watched, *(own.watched for own in sweep.owned)]
    high = any(name in w and w[name].higher_is_better for w in watched)
    return name if high or name not in ("test", "train") else NAMES[name]


def _levels(sweep: Sweep, names: Iterable[str]) -> tuple[float, ...]:
    """The thresholds of metrics, of those that are the same for all lanes."""
    every = [sweep.paths.watched, *(own.watched for own in sweep.owned)]
    found = ({w[name].threshold for w in every if name in w} for name in names)
    same = (levels.pop() for levels in found if len(levels) == 1)
    some = (float(level) for level in same if level is not None)
    return tuple(level for level in some if 0 < level < np.inf)


def _behind(sweep: Sweep, x: str, y: str) -> list[Trace]:
    """Others than the chosen lane."""
    colours = hex_colours(sweep)
    # In no order: evenly spaced ones could be those of a few λ.
    order = np.random.default_rng(0).permutation(len(sweep))
    lanes = np.sort(order[:_BEHIND]).tolist() if len(sweep) > 1 else []
    return [
        {"mode": "lines", "name": sweep.axes.words(i), "showlegend": False,
         "opacity": 0.55, "line": {"width": 1, "color": colours[i]},
         "meta": {"lane": i, "x": x, "y": y}}
        for i in lanes
    ]  # fmt: skip


def _chosen(
    x: str, y: str, name: str, *, colour: str = "", width: float = 2.4, **line: Any
) -> list[Trace]:
    """The chosen lane, with a dot at the chosen time; in its colour unless given."""
    style, own = ({"color": colour}, {"own": True}) if colour else ({}, {})
    dot = {"size": 9, **style, "line": {"color": "black", "width": 1}}
    meta = {"x": x, "y": y, **own}
    return [
        {"mode": "lines", "name": name, "meta": meta,
         "line": {"width": width, **style, **line}},
        {"mode": "markers", "name": name, "showlegend": False, "marker": dot,
         "meta": meta | {"now": True}},
    ]  # fmt: skip


def _theory(x: str, y: str, name: str, order: int, **more: Any) -> Trace:
    """The prediction for the chosen lane."""
    columns = {"x": x, "y": y} if x else {"y": y}
    return {
        "mode": "lines",
        "name": name,
        "line": {"color": THEORY, "width": 1.6, "dash": _DASHES[order]},
        "meta": {**columns, "own": True, **more},
    }


def _drift(report: Report, values: Any, name: str) -> Trace:
    s, y = np.asarray(report.theory.drift.s), np.asarray(values)
    every = thinned(s.size, _STATIC)
    return _line(s[every], y[every], name, color=THEORY, width=1.6, dash="dash")


def _valid(up: Range) -> Trace:
    """Where the validity of the chosen λ ends: a triangle at the foot."""
    foot = up.low * 1.1 if up.log else up.low + 0.02 * (up.high - up.low)
    name = "valid up to here"
    return _mark(name, "triangle-down", x="valid until", y=foot)


def _line(x: Any, y: Any, name: str, **line: Any) -> Trace:
    """One that no slider moves."""
    points = {"x": numbers(x), "y": numbers(y)}
    return {"mode": "lines", "name": name, "line": line, **points}


def _mark(name: str, symbol: str, *, x: str, y: str | float, **marker: Any) -> Trace:
    """One point of the chosen lane, of columns with one number."""
    meta, fixed = (
        ({"x": x, "y": y}, {}) if isinstance(y, str) else ({"x": x}, {"y": [y]})
    )
    style = {"symbol": symbol, "size": 10, "line": {"color": "black", "width": 1}}
    return {"mode": "markers", "name": name, "marker": style | marker,
            "meta": meta, **fixed}  # fmt: skip
