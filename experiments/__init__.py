"""The experiments: `python -m experiments.two_phase --help`, and so on."""
