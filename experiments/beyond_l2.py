"""Grokking beyond the Euclidean norm: one experiment for each claim.

After Notsawo, Dumas, Rabusseau, "Grokking Beyond the Euclidean Norm of Model
Parameters", arXiv 2506.05718. Each sub-command runs one of its settings, checks what is
claimed against outside oracles, and writes summary.json, arrays.nc and figures.
"""

from typing import Any

import beyond_l2_data
import beyond_l2_depth
import beyond_l2_matrix
import beyond_l2_networks
import beyond_l2_samples
import beyond_l2_sparse
import beyond_l2_theorems
import tyro
from common import run_named, Settings

# One module for each family of experiments, with its sub-commands in EXPERIMENTS.
FAMILIES = (
    beyond_l2_sparse,
    beyond_l2_samples,
    beyond_l2_data,
    beyond_l2_depth,
    beyond_l2_matrix,
    beyond_l2_theorems,
    beyond_l2_networks,
)
EXPERIMENTS = {k: v for family in FAMILIES for k, v in family.EXPERIMENTS.items()}


def main(config: Settings) -> dict[str, Any]:
    """Runs one experiment; returns what is written to summary.json."""
    return run_named(config, EXPERIMENTS, "beyond_l2")


def parse(arguments: list[str] | None = None) -> Settings:
    return tyro.extras.subcommand_cli_from_dict(
        EXPERIMENTS, description=__doc__, args=arguments
    )


if __name__ == "__main__":
    main(parse())
