"""Grokking in two phases: the theory of small weight decay against simulation.

Runs a task for many weight decays, predicts all of them from one fast and one slow run
(Boursier, Pesme, Dragomir, arXiv 2505.20172), compares, and judges the paper's claims
one by one. Writes arrays.nc, summary.json and figures; `--rejudge` and `--redraw` read
the arrays.
"""

from ..shared.command import Study
from .study import TwoPhase

STUDY = Study("two_phase", __doc__, {"": TwoPhase})
