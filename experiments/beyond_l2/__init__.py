"""Grokking beyond the Euclidean norm: one experiment for each claim.

After Notsawo, Dumas, Rabusseau, "Grokking Beyond the Euclidean Norm of Model
Parameters", arXiv 2506.05718. Each sub-command runs one of its settings, checks what is
claimed against outside oracles, and writes summary.json, arrays.nc and figures.
"""

from typing import Any

from . import data
from . import depth
from . import matrix
from . import networks
from . import samples
from . import sparse
from . import theorems
import tyro
from ..shared.common import run_named, Settings

# One module for each family of experiments, with its sub-commands in EXPERIMENTS.
FAMILIES = (
    sparse,
    samples,
    data,
    depth,
    matrix,
    theorems,
    networks,
)
EXPERIMENTS = {k: v for family in FAMILIES for k, v in family.EXPERIMENTS.items()}


def main(config: Settings) -> dict[str, Any]:
    """Runs one experiment; returns what is written to summary.json."""
    return run_named(config, EXPERIMENTS, "beyond_l2")


def parse(arguments: list[str] | None = None) -> Settings:
    return tyro.extras.subcommand_cli_from_dict(
        EXPERIMENTS, description=__doc__, args=arguments
    )
