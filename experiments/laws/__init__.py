"""Laws of grokking, as papers state them, tested on small networks.

Each sub-command takes one law, says beforehand what would refute it, and runs it from
several seeds. Its verdict (holds, holds where, refuted) is the last row; arrays.nc,
summary.json and a figure are written; `--rejudge` and `--redraw` read the arrays.
"""

from ..shared.command import Study
from . import held, invariance, norms, paths

# One module for each family of laws, with its sub-commands in EXPERIMENTS.
FAMILIES = (norms, held, invariance, paths)
STUDY = Study(
    "laws",
    __doc__,
    {k: v for family in FAMILIES for k, v in family.EXPERIMENTS.items()},
)
