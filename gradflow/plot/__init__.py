"""Figures of paths, drifts, sweeps and reports, with Matplotlib.

Every function draws into the axes it is given and returns them; without any it makes a
figure of its own with `pyplot`.
"""

from ._interactive import report_page as report_page, sweep_page as sweep_page
from ._landscape import landscape as landscape
from ._paths import drift as drift, path as path, sweep as sweep
from ._report import (
    collapse as collapse,
    curvature as curvature,
    error as error,
    grokking as grokking,
    losses as losses,
    report as report,
)
from ._style import (
    as_html as as_html,
    Clock as Clock,
    Colours as Colours,
    colorbar as colorbar,
    LABELS as LABELS,
    PENALTY as PENALTY,
    power as power,
    SIZE as SIZE,
    TEST as TEST,
    THEORY as THEORY,
    TRAIN as TRAIN,
)
