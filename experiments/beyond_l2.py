"""Grokking beyond the Euclidean norm: one experiment for each claim.

After Notsawo, Dumas, Rabusseau, "Grokking Beyond the Euclidean Norm of Model
Parameters", arXiv 2506.05718. Each sub-command runs one of its settings, checks what is
claimed against outside oracles, and writes summary.json, arrays.nc and figures.
"""

from pathlib import Path
from typing import Any

import beyond_l2_data
import beyond_l2_depth
import beyond_l2_matrix
import beyond_l2_networks
import beyond_l2_samples
import beyond_l2_sparse
import beyond_l2_theorems
import matplotlib
import tyro
from beyond_l2_common import Settings
from common import Clock, write

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


def main(config: Any) -> dict[str, Any]:
    """Runs one experiment; returns what is written to summary.json."""
    matplotlib.use("Agg")
    name = next(k for k, v in EXPERIMENTS.items() if v is type(config))
    out = config.out or Path("results/beyond_l2") / name
    out.mkdir(parents=True, exist_ok=True)
    clock = Clock()
    claim = " ".join((type(config).__doc__ or "").split())
    print(f"{name}: {claim}", flush=True)
    with clock(name):
        numbers, checks, data, figures = config.run()
    for row in checks:
        print(row)
    settings = {k: v for k, v in vars(config).items() if k != "out"}
    numbers = {"experiment": name, "claim": claim, "settings": settings, **numbers}
    data.to_netcdf(out / "arrays.nc", engine="scipy")
    summary = write(out, numbers, checks, figures, clock)
    names = ", ".join(f"{figure}.png" for figure in figures)
    print(f"Written to {out}: summary.json, arrays.nc, {names}")
    return summary


def parse(arguments: list[str] | None = None) -> Settings:
    return tyro.extras.subcommand_cli_from_dict(
        EXPERIMENTS, description=__doc__, args=arguments
    )


if __name__ == "__main__":
    main(parse())
