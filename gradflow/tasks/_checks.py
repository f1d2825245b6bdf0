"""Checks of the settings of a task."""

from collections.abc import Sequence


def check_count(value: int, name: str, *, least: int = 1, most: int | None = None):
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}.")
    if most is not None and value > most:
        raise ValueError(f"{name}: expected at most {most} here, got {value}.")


def check_positive(value: float, name: str):
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a positive number, got {value!r}.")


def check_fraction(value: float, name: str):
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value!r}.")


def check_choice(value: str, name: str, choices: Sequence[str]):
    if value not in choices:
        expected = " or ".join(map(repr, choices))
        raise ValueError(f"{name}: expected {expected}, got {value!r}.")
