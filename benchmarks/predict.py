"""What a run would take that is not made. A prediction is no measurement: its status
says so, and it decides no check."""

import math

from report import EXTRAPOLATED, Row


def in_proportion(last: Row, lam: float) -> dict:
    """From one larger λ, where the cost is known to be in proportion to 1/λ."""
    return dict(
        rtol=last.rtol,
        status=EXTRAPOLATED,
        seconds=last.seconds * last.weight_decay / lam,
        note=f"not measured: {_said(last)} and cost in proportion to 1/λ",
    )


def as_before(before: Row, last: Row, lam: float) -> dict:
    """From two larger λ, if the cost grows with 1/λ as it did between them. It is not
    taken to fall."""
    growth = math.log(last.seconds / before.seconds)
    power = max(0.0, growth / math.log(before.weight_decay / last.weight_decay))
    seconds = last.seconds * (last.weight_decay / lam) ** power
    return dict(
        rtol=last.rtol,
        status=EXTRAPOLATED,
        seconds=seconds,
        note=f"not run: {seconds:.3g} s if the cost grows as before, {_said(before)} "
        f"and {_said(last)}",
    )


def _said(row: Row) -> str:
    return f"{row.seconds:.3g} s at λ = {row.weight_decay:g}"
