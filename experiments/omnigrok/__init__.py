"""Omnigrok: losses against the norm of the weights, and the delays that follow.

After Liu, Michaud, Tegmark, "Omnigrok: Grokking Beyond Algorithmic Data", arXiv
2210.01117. Each sub-command runs one of its settings, judges what is claimed, and
writes arrays.nc, summary.json and figures; `--rejudge` and `--redraw` read the arrays.
"""

from ..shared.command import Study
from . import addition, data, images, teacher, theory, transformer

# One module for each family of experiments, with its sub-commands in EXPERIMENTS.
FAMILIES = (teacher, theory, transformer, addition, images, data)
STUDY = Study(
    "omnigrok",
    __doc__,
    {k: v for family in FAMILIES for k, v in family.EXPERIMENTS.items()},
)
