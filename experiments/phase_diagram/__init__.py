"""The phase diagram of grokking: weight decay against initial scale.

Runs a task for every combination of λ, initial scale and seed, in one sweep; measures
the delay between memorisation and grokking; predicts it from two runs for each scale
and seed, by the two-phase theory; and shows where the two agree. The runs are kept in a
store: the same command goes on where it stopped. Writes arrays.nc, summary.json and a
figure; `--rejudge` and `--redraw` read the arrays.
"""

from ..shared.command import Study
from .study import PhaseDiagram

STUDY = Study("phase_diagram", __doc__, {"": PhaseDiagram})
