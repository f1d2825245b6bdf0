"""Where the two-phase theory holds, and how well: its error at order 1 and 2 against
weight decay, the slow time up to which it is valid, and the grokking times it predicts.

Runs five smooth tasks for many weight decays, and three of them from three initial
scales. Writes arrays.nc, summary.json and three figures; `--rejudge` and `--redraw`
read the arrays.
"""

from ..shared.command import Study
from .study import TheoryLimits

STUDY = Study("theory_limits", __doc__, {"": TheoryLimits})
