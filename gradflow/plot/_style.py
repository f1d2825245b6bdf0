"""What all figures share: colours, scales, labels."""

import base64
import html
import io
from collections.abc import Callable
from typing import Any, Literal, TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:  # Matplotlib is imported by the first figure, not by the library.
    Axes: TypeAlias = Any
    Figure: TypeAlias = Any

Clock = Literal["t", "s"]
"""Time t, or slow time s = λt."""

LABELS = {"t": "time $t$", "s": "slow time $s = \\lambda t$"}
"""Of the axis of each clock."""
TRAIN = "#0072B2"
"""The colour of what is fitted."""
TEST = "#D55E00"
"""That of what is not seen in training."""
PENALTY = "#009E73"
"""That of R."""
THEORY = "#FF4D2E"
"""That of predictions, dashed, over all colours of λ."""
SIZE = 11
"""Of all text, in points."""


NAMES = {
    "test": "test loss",
    "train": "train loss",
    "train_loss": "train loss",
    "penalty": "penalty $R$",
}


def as_html(text: str, draw: Callable[[Axes], Any]) -> str:
    """What a notebook shows of a result: its summary `text`, and beside it a small
    figure, which `draw` makes in the axes it is given."""
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(5.2, 3.4), layout="constrained")
    draw(figure.add_subplot())
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    data = base64.b64encode(picture.getvalue()).decode()
    return (
        '<div style="display: flex; flex-wrap: wrap; gap: 1em; align-items: center">'
        f"<pre>{html.escape(text)}</pre>"
        f'<img alt="" width="420" src="data:image/png;base64,{data}"></div>'
    )


def colorbar(weight_decay: Any, fig: Figure, axes: Any) -> Any:
    """The scale of the λ in `weight_decay`, drawn into `fig` beside `axes`, one or a
    list of panels that share it."""
    return Colours(np.asarray(weight_decay)).bar(fig, axes)


class Colours:
    """A colour for each λ, on a logarithmic scale that all readers can tell apart:
    `colours(i)` is that of the i-th.

    Where the values are those of another axis, by the name `label`, the scale is linear
    if they are within a factor of five, or not all positive; what are no numbers are
    counted.

    **Arguments:**

    - `values`: λ, or those of another axis, a vector.
    - `label`: of the scale.
    """

    def __init__(self, values: np.ndarray, label: str = "weight decay $\\lambda$"):
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import ListedColormap, LogNorm, Normalize

        self.label = label
        values = np.asarray(values)
        if values.dtype.kind not in "biuf":
            values = np.unique(values, return_inverse=True)[1]
        lams = values.astype(float)
        self.lams = lams
        lams = lams[np.isfinite(lams)]
        positive = lams[lams > 0]
        low, high = (positive.min(), positive.max()) if positive.size else (1.0, 1.0)
        if low == high:
            low, high = low / 3, high * 3
        # Without the yellow end, which is hard to see on white.
        cmap = ListedColormap(colormaps["viridis"](np.linspace(0.0, 0.9, 256)))
        least = lams.min(initial=np.inf)
        self.linear = "lambda" not in label and (least <= 0 or high < 5 * low)
        norm = Normalize(least, lams.max()) if self.linear else LogNorm(low, high)
        self.map = ScalarMappable(norm, cmap)

    def __call__(self, i: int) -> Any:
        lam = self.lams[i]
        shown = np.isfinite(lam) and (lam > 0 or self.linear)
        return self.map.to_rgba(lam) if shown else "black"

    def bar(self, fig: Figure, axes: Any) -> None:
        """Draws the scale into `fig`, beside `axes`."""
        bar = fig.colorbar(self.map, ax=axes, aspect=30, pad=0.01)
        bar.set_label(self.label, fontsize=SIZE)
        bar.ax.tick_params(labelsize=SIZE - 1)


def unknown(name: str, given: object, known: list[str]) -> ValueError:
    """The error of an argument that is the name of nothing."""
    expected = ", ".join(map(repr, known))
    return ValueError(f"{name}: expected one of {expected}, got {given!r}.")


def new_axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(6.4, 4.4), layout="constrained")[1]


def positive(x: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    """What can be drawn on logarithmic axes."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    where = (x > 0) & (y > 0)
    return x[where], y[where]


def each(values: Any) -> np.ndarray:
    """The curves in values along times: of an array at each time one for each of its
    numbers, along the first axis."""
    values = np.asarray(values, float)
    return values.reshape(len(values), -1).T


def lowest(values: np.ndarray) -> float:
    values = values[np.isfinite(values) & (values > 0)]
    return float(values.min()) if values.size else 1.0


def marker_of(marker: str, label: str) -> Any:
    from matplotlib.lines import Line2D

    style = {"marker": marker, "ls": "", "color": "lightgrey", "mec": "black", "ms": 7}
    return Line2D([], [], label=label, **style)


def log_axes(ax: Axes, floor: float | None = None) -> None:
    # Where nothing is drawn, as of a run that ended at t = 0, there are no limits.
    if not np.isfinite(ax.dataLim.minposx):
        ax.set_xlim(0.1, 1.0)
    if not np.isfinite(ax.dataLim.minposy):
        ax.set_ylim(0.1, 1.0)
    ax.set_xscale("log")
    ax.set_yscale("log")
    if floor is not None:
        ax.set_ylim(bottom=floor)


def finish(ax: Axes, x: str, y: str, title: str = "") -> None:
    ax.set_xlabel(x, fontsize=SIZE)
    ax.set_ylabel(y, fontsize=SIZE)
    ax.set_title(title, fontsize=SIZE)
    ax.tick_params(labelsize=SIZE - 1)
    ax.spines[["top", "right"]].set_visible(False)


def legend(ax: Axes, **kwargs: Any) -> None:
    ax.legend(fontsize=SIZE - 1, frameon=False, **kwargs)


def power(x: float) -> str:
    """`x` for a label, in Matplotlib's mathematics: as a power of ten, times a number
    of three digits where it is none."""
    if x == 0:
        return "0"
    exponent = int(np.floor(np.log10(x)))
    mantissa = round(x / 10.0**exponent, 2)
    if mantissa == 10:
        exponent, mantissa = exponent + 1, 1.0
    power = f"10^{{{exponent}}}"
    return f"${power}$" if mantissa == 1 else f"${mantissa:g} \\times {power}$"
