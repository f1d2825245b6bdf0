"""A page of figures by Plotly that sliders move, in one file: what is in it, and its
numbers in JSON. `_page.html` is its frame, and says how they are put together."""

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path as File
from string import Template
from typing import Any, NamedTuple

import numpy as np

DIGITS = 5  # of each number


def plotly() -> Any:
    """Plotly's objects, imported when they are first needed.

    **Raises:** `ImportError` that says how to install it.
    """
    try:
        import plotly.graph_objects
    except ImportError as error:
        raise ImportError(
            "interactive pages need plotly: pip install plotly."
        ) from error
    return plotly.graph_objects


def check_page(file: Any, bundle: Any) -> File:
    """Raises unless a page can be written there, before anything is computed."""
    plotly()
    if not File(file).parent.is_dir() or File(file).is_dir():
        raise ValueError(f"file: expected a name in a folder that exists, got {file}.")
    if bundle not in ("inline", "directory"):
        raise ValueError(f"bundle: expected 'inline' or 'directory', got {bundle!r}.")
    return File(file)


class Panel(NamedTuple):
    """One figure, with logarithmic axes unless their `ranges` are linear."""

    title: str
    labels: tuple[str, str]
    """Of the axes."""
    ranges: tuple["Range", "Range"]
    traces: list[dict[str, Any]]
    clock: str = ""
    """The column of its times, `"t"` or `"s"`, where a line moves along it."""
    levels: tuple[float, ...] = ()
    """Dotted horizontal lines."""

    def figure(self) -> dict[str, Any]:
        """As Plotly has it in JSON; it raises for what it does not know."""
        go = plotly()
        x, y = (
            {**r.axis(), "title": {"text": label, "font": {"size": 13}, "standoff": 6}}
            for r, label in zip(self.ranges, self.labels, strict=True)
        )
        line = {"x0": 1, "x1": 1, "y0": 0, "y1": 1, "yref": "paper", "layer": "below"}
        shapes = [line | {"line": {"color": "#888", "width": 1.5}}] * bool(self.clock)
        shapes += [
            {"x0": 0, "x1": 1, "xref": "paper", "y0": level, "y1": level,
             "line": {"color": "#888", "width": 1.2, "dash": "dot"}}
            for level in self.levels
        ]  # fmt: skip
        layout = go.Layout(
            template="none",
            font={"size": 13, "color": "#222", "family": "system-ui, sans-serif"},
            margin={"l": 64, "r": 12, "t": 12, "b": 44},
            xaxis=x,
            yaxis=y,
            shapes=shapes,
            # Above, as wide as there is room on a phone, and away from the labels.
            legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
            # A finger that draws over a figure is to move the page.
            dragmode=False,
            hovermode="closest",
            meta=self.clock or None,
        )
        return go.Figure([go.Scatter(t) for t in self.traces], layout).to_plotly_json()


class Range(NamedTuple):
    """From where to where an axis goes, which is the same for all lanes."""

    low: float
    high: float
    log: bool = True

    @classmethod
    def of(cls, *values: Any, log: bool = True) -> "Range":
        """Of all finite numbers in `values`; where the axis is logarithmic of the
        positive ones, down to what is rounding beside the largest."""
        flat = np.concatenate([np.ravel(np.asarray(v, float)) for v in values])
        flat = flat[np.isfinite(flat) & ((flat > 0) | (not log))]
        if not flat.size:
            return cls(0.1, 1.0, log)
        low, high = float(flat.min()), float(flat.max())
        if log:
            return cls(max(low, 1e-24 * high) / 1.3, high * 1.3)
        room = 0.05 * (high - low) or 1.0
        return cls(low - room, high + room, log=False)

    def axis(self) -> dict[str, Any]:
        ends = [self.low, self.high]
        ticks: dict[str, Any] = {"nticks": 8}
        if self.log:  # whole powers of ten, if there are two of them
            decades = int(np.log10(self.high / self.low))
            ticks = {"dtick": -(-decades // 7)} if decades > 1 else {"nticks": 5}
        return ticks | {
            "type": "log" if self.log else "linear",
            "range": np.log10(ends).tolist() if self.log else ends,
            "exponentformat": "power",
            "hoverformat": ".3g",
            "showline": True,
            "ticks": "outside",
            "zeroline": False,
            "gridcolor": "#e8e8e8",
            "automargin": True,
        }


def numbers(values: Any) -> Any:
    """Nested lists of an array, to `DIGITS` digits; `None` for what is not finite."""
    values = np.asarray(values, float)
    if values.ndim > 1:
        return [numbers(row) for row in values]
    words = [
        float(f"{v:.{DIGITS}g}") if math.isfinite(v) else None
        for v in values.reshape(-1).tolist()
    ]
    return words if values.ndim else words[0]


class Slider(NamedTuple):
    """Of one dimension."""

    name: str
    words: list[list[tuple[str, Any]]]
    """At each position, the axes along it and their values."""
    lanes: list[int]
    """What each position adds to the number of the lane."""
    start: int


def write_page(
    file: File,
    bundle: str,
    *,
    sliders: Sequence[Slider],
    times: np.ndarray,
    lanes: Iterable[Mapping[str, Any]],
    panels: Sequence[Panel],
    summary: str,
    failed: Sequence[str],
    about: str,
) -> File:
    """Writes the page of some lanes, whose columns are `numbers` or words."""
    from plotly.offline import get_plotlyjs

    data = {
        "axes": [{"words": s.words, "lanes": s.lanes} for s in sliders],
        "times": numbers(times),
        "lanes": list(lanes),
        "panels": [panel.figure() for panel in panels],
    }
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    code = '<script src="plotly.min.js"></script>'
    if bundle == "inline":
        code = f"<script>{get_plotlyjs()}</script>"
    else:
        (file.parent / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
    knobs = [(s.name, len(s.words) - 1, s.start) for s in sliders]
    knobs.append(("time", len(times) - 1, 2 * len(times) // 3))
    frame = resources.files(__package__).joinpath("_page.html").read_text("utf-8")
    page = Template(frame).substitute(
        title=html.escape(summary.partition("\n")[0]),
        failed="".join(f"<p>{html.escape(line)}</p>" for line in failed),
        sliders="\n".join(_SLIDER.format(html.escape(k), *at) for k, *at in knobs),
        panels="\n".join(_PANEL.format(html.escape(p.title)) for p in panels),
        about=html.escape(about),
        summary=html.escape(summary),
        bundle=code,
        data=text.replace("<", "\\u003c"),  # no text in it may end the script
    )
    file.write_text(page, encoding="utf-8")
    return file


_SLIDER = (
    "<label><span>{}</span><output></output>"
    '<input type="range" min="0" max="{}" value="{}"></label>'
)
_PANEL = '<section><h2>{}</h2><div class="plot"></div></section>'
