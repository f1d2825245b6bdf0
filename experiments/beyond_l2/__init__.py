"""Grokking beyond the Euclidean norm: one experiment for each claim.

After Notsawo, Dumas, Rabusseau, "Grokking Beyond the Euclidean Norm of Model
Parameters", arXiv 2506.05718. Each sub-command runs one of its settings, judges what is
claimed against outside oracles, and writes arrays.nc, summary.json and figures;
`--rejudge` and `--redraw` read the arrays.
"""

from ..shared.command import Study
from . import data, depth, matrix, networks, samples, sparse, theorems

# One module for each family of experiments, with its sub-commands in EXPERIMENTS.
FAMILIES = (sparse, samples, data, depth, matrix, theorems, networks)
STUDY = Study(
    "beyond_l2",
    __doc__,
    {k: v for family in FAMILIES for k, v in family.EXPERIMENTS.items()},
)
