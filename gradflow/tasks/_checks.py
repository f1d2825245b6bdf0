"""Checks of the settings of a task, beside those of all arguments."""

from .._checks import check_integer


def check_count(value: int, name: str, *, least: int = 1, most: int | None = None):
    check_integer(value, name, least)
    if most is not None and value > most:
        raise ValueError(f"{name}: expected at most {most} here, got {value}.")


def check_part(value: float, name: str):
    """A fraction that may be none, or all."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value!r}.")
