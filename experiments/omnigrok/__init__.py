"""Omnigrok: losses against the norm of the weights, and the delays that follow.

After Liu, Michaud, Tegmark, "Omnigrok: Grokking Beyond Algorithmic Data", arXiv
2210.01117. Each sub-command runs one of its settings, checks what is claimed, and
writes summary.json, arrays.nc and figures.
"""

from typing import Any

from . import addition
from . import data
from . import images
from . import teacher
from . import theory
from . import transformer
import tyro
from ..shared.common import run_named, Settings

# One module for each family of experiments, with its sub-commands in EXPERIMENTS.
FAMILIES: tuple[Any, ...] = (
    teacher,
    theory,
    transformer,
    addition,
    images,
    data,
)
EXPERIMENTS = {k: v for family in FAMILIES for k, v in family.EXPERIMENTS.items()}


def main(config: Settings) -> dict[str, Any]:
    """Runs one experiment; returns what is written to summary.json."""
    return run_named(config, EXPERIMENTS, "omnigrok")


def parse(arguments: list[str] | None = None) -> Settings:
    return tyro.extras.subcommand_cli_from_dict(
        EXPERIMENTS, description=__doc__, args=arguments
    )
