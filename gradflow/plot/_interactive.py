"""Sweeps and reports as pages in which a reader moves the axes and time."""

import os
from typing import Any

import equinox as eqx
import jax
import numpy as np

from . import _panels as panel
from ._drawn import Report, Sweep
from ._lanes import (
    Columns,
    Curve,
    curve,
    failures,
    kept_times,
    Of1d,
    slider_times,
    sliders,
    thinned,
    told,
)
from ._page import check_page, File, Panel, write_page

_NAMED = 12  # failed lanes, at the head of the page


def sweep_page(
    sweep: Sweep,
    file: str | os.PathLike,
    *,
    inputs: Any = None,
    function: Of1d | None = None,
    bundle: str = "inline",
) -> File:
    """Writes a sweep as an interactive page: one HTML file that a browser opens without
    a server or a network.

    It has a slider for each dimension of more than one value, and one for time, which
    arrow keys move too. Panels: train loss and metrics against time t and against slow
    time s; the penalty; each metric that is an array (the first 12 of its numbers); the
    function that the model has learnt, where `inputs` are given. The chosen lane has
    the colour of its λ, and a dot at the chosen time; behind it are up to 40 others.
    Lanes that failed are named, with the reason, and drawn up to their end.

    **Arguments:**

    - `sweep`: from `gradflow.sweep`; of a store, with parameters if `inputs` are given.
    - `file`: its name, in a folder that exists.
    - `inputs`: numbers x, of shape (m,) or (m, 1): the model takes one of them.
    - `function`: f(model, x) of one x, up to 8 numbers; `model(x)` unless given. JAX
        traces it.
    - `bundle`: `"inline"` has Plotly's own code, 5 MB, in the page; `"directory"` in a
        file plotly.min.js beside it, which many pages can share.

    **Returns:** the path of the file. Its numbers have 5 digits. Of each lane at most
    200 saved times are in it, evenly among all of them, and fewer where lanes are many:
    without the bundle a page is smaller than 10 MB.

    **Raises:** `ValueError` for a folder that is not there, another `bundle`, `inputs`
    that are no such numbers or that the function does not take, and more lanes than fit
    with 8 times each; `ImportError` where Plotly is not installed.
    """
    place, drawn = check_page(file, bundle), _curve(sweep, inputs, function)
    kept = _kept(sweep, drawn, ())
    columns = _columns(sweep, kept) | _function(sweep, kept, drawn)
    panels = [
        panel.losses(sweep, columns, "t"),
        panel.losses(sweep, columns, "s"),
        panel.penalty(sweep, columns, "t"),
        *(panel.numbers_of(sweep, columns, name, "t") for name in panel.alone(sweep)),
    ]
    if drawn is not None:
        panels.append(panel.learnt(sweep, columns, drawn.x, ()))
    return _written(place, bundle, sweep, columns, panels, str(sweep))


def report_page(
    report: Report,
    file: str | os.PathLike,
    *,
    inputs: Any = None,
    function: Of1d | None = None,
    bundle: str = "inline",
) -> File:
    """Writes a report as an interactive page, as [`gradflow.plot.sweep_page`][] does a
    sweep: simulation in the colour of λ, and theory beside it in red.

    In time t there is the prediction of order 1, dashed, and of order 2, dotted, as far
    as it is claimed to hold; in slow time the drift. More panels: the error of the
    theory in time, and the largest against λ; grokking times, measured and predicted;
    η(s), the smallest normal curvature of F along the drift, with λ, and a triangle
    where its validity ends. The function learnt is that of the simulated model, and of
    the predicted ones.

    **Arguments:**

    - `report`: from `gradflow.compare`.
    - `file`, `inputs`, `function`, `bundle`: as for a sweep.

    **Returns:** the path of the file.

    **Raises:** `ValueError` and `ImportError`, as for a sweep.
    """
    place, sweep = check_page(file, bundle), report.sweep
    drawn, orders = _curve(sweep, inputs, function), tuple(report.orders)
    kept = _kept(sweep, drawn, orders)
    columns = _columns(sweep, kept) | _function(sweep, kept, drawn)
    columns |= _of_report(report, kept) | _predicted(report, kept.size)
    panels = [
        panel.losses(sweep, columns, "t", report),
        panel.losses(sweep, columns, "s", report),
        panel.penalty(sweep, columns, "s", report),
        panel.errors(report, columns),
        panel.largest(report),
        panel.grokking(report),
        panel.curvature(report),
        *(
            panel.numbers_of(sweep, columns, name, "s", report)
            for name in panel.alone(sweep)
        ),
    ]
    if drawn is not None:
        for k in orders:
            columns[f"function, order {k}"] = _told(report, kept, drawn, k)
        panels.append(panel.learnt(sweep, columns, drawn.x, orders))
    return _written(place, bundle, sweep, columns, panels, str(report))


def _curve(sweep: Sweep, inputs: Any, function: Of1d | None) -> Curve | None:
    if inputs is None and function is None:
        return None
    if inputs is None:
        raise ValueError("inputs: expected those to call the function with, got none.")
    return curve(inputs, function, sweep.padded(0)[0])


def _kept(sweep: Sweep, drawn: Curve | None, orders: tuple[int, ...]) -> np.ndarray:
    """Which of the saved times, by how many numbers there are to be at each."""
    metrics = len(panel.scalars(sweep)) * (1 + len(orders))
    size = 4 + metrics + sum(panel.arrays(sweep).values())
    if orders:  # errors, that of the drift, and times of the predictions
        size += len(orders) + 2
    if drawn is None:
        return kept_times(sweep, size, "sweep")
    return kept_times(sweep, size + (1 + len(orders)) * drawn.x.size, "inputs")


def _columns(sweep: Sweep, kept: np.ndarray) -> Columns:
    """What was saved, at the times that are kept. (Metrics have names of any kind.)"""
    own = {"t": sweep.t, "s": sweep.slow_time, "train_loss": sweep.train_loss}
    own |= {"penalty": sweep.paths.penalty}
    own |= {f"metric {name}": sweep.metrics[name] for name in panel.scalars(sweep)}
    out = {name: np.asarray(values)[:, kept] for name, values in own.items()}
    for name, count in panel.arrays(sweep).items():
        values = np.asarray(sweep.metrics[name])[:, kept]
        values = values.reshape(*values.shape[:2], -1)
        out |= {f"metric {name} {j}": values[..., j] for j in range(count)}
    return out


def _function(sweep: Sweep, kept: np.ndarray, drawn: Curve | None) -> Columns:
    if drawn is None:
        return {}
    found = []
    for i in range(len(sweep)):
        models = jax.tree.map(lambda x: x[kept], sweep.padded(i).models)
        found.append(np.asarray(drawn.rows(models)))
    return {"function": np.stack(found)}


def _told(report: Report, kept: np.ndarray, drawn: Curve, order: int) -> np.ndarray:
    """The function of the predicted models, as far as theory is claimed to hold."""

    @eqx.filter_jit
    def rows(theory: Any, t: jax.Array, lam: jax.Array) -> jax.Array:
        return drawn.rows(theory.predict(t, lam, order=order))

    out = []
    for i, until in enumerate(report.valid_until):
        path = report.sweep.padded(i)
        t, s = (np.asarray(x)[kept] for x in (path.t, path.slow_time))
        there = np.nan_to_num(t)  # of a lane that failed there are none at its end
        values = np.asarray(rows(report.theory, there, path.weight_decay))
        out.append(np.where((s <= until)[:, None], values, np.nan))
    return np.stack(out)


def _predicted(report: Report, most: int) -> Columns:
    """The metrics of the predictions, at times of their own."""
    try:
        known = [report.theory.predicted(lam) for lam in report.weight_decay]
    except ValueError:
        # Of a report that was read, whose metrics had no names: what comparing kept.
        kept, order = report.curves, max(report.orders)
        every = thinned(kept.t.shape[1], most)
        names = [k for k in panel.scalars(report.sweep) if k in kept.metrics]
        return {"predicted t": kept.t[:, every]} | {
            f"metric {k}, order {order}": kept.metrics[k][:, every] for k in names
        }
    every = thinned(known[0].t.size, most)
    out = {"predicted t": np.stack([one.t[every] for one in known])}
    for name in panel.scalars(report.sweep):
        for k in report.orders if name in known[0].best else ():
            curves = [np.asarray(one.curves[k - 1][name])[every] for one in known]
            out[f"metric {name}, order {k}"] = np.stack(curves)
    return out


def _of_report(report: Report, kept: np.ndarray) -> Columns:
    """What comparing gave of each lane."""
    lams, until = report.weight_decay, report.valid_until
    inside = (until > 0) & (until < np.asarray(report.theory.drift.s)[-1])
    out = {
        "λ": lams,
        "level": np.stack([lams, lams], axis=1),
        "valid until": np.where(inside, until, np.nan),
        "memorised": report.memorised.measured,
        "grokked": report.grokked.measured,
        "predicted": report.grokked.predicted,
        "drift error": report.drift.error[:, kept],
    }
    for k, order in report.orders.items():
        out |= {f"error {k}": order.error[:, kept], f"sup {k}": order.sup}
    return out


def _written(
    place: File,
    bundle: str,
    sweep: Sweep,
    columns: Columns,
    panels: list[Panel],
    summary: str,
) -> File:
    failed = failures(sweep)
    head = [f"{len(failed)} of {len(sweep)} lanes failed."] if failed else []
    some = list(failed.items())[:_NAMED]
    head += [f"{sweep.axes.words(i)}: {why}" for i, why in some]
    if len(failed) > len(some):
        head.append(f"… and {len(failed) - len(some)} more, which the page tells of.")
    kept, saved = columns["t"].shape[1], np.shape(sweep.t)[1]
    about = (
        f"{kept} of the {saved} saved times of each lane are in this page. Thick: the "
        "lane that the sliders choose, with a dot at the chosen time; thin: others. "
        "Arrow keys move the slider that Tab has chosen. Figures have buttons of their "
        "own, to look closer; a click in a legend hides a curve."
    )
    return write_page(
        place,
        bundle,
        sliders=sliders(sweep),
        times=slider_times(columns["t"]),
        lanes=told(sweep, columns, failed),
        panels=panels,
        summary=summary,
        failed=head,
        about=about,
    )
