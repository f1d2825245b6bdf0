"""Arrays of one's own, as a task is given them: by its arguments, or in a file .npz."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from .._typing import Given
from ..data import own_arrays


class Own(NamedTuple):
    """Arrays by their names."""

    arrays: Mapping[str, Given]
    name: str
    """For titles."""
    where: str
    """What an error about them begins with."""


def own(data: str | Path | None, kind: str, **arrays: Given) -> Own | None:
    """What is given of some `arrays`, or else in `data` where that is a file .npz; of a
    `kind`, in words. `None` where there are none.

    **Raises:** `ValueError` where both are given, or the file is not right.
    """
    given = {name: value for name, value in arrays.items() if value is not None}
    if given and data is not None:
        raise ValueError(
            f"data: expected none beside {', '.join(f'{name}=' for name in given)}, "
            f"got {str(data)!r}."
        )
    if given:
        return Own(given, f"{kind} of one's own", "")
    if data is None or Path(data).suffix != ".npz":
        return None
    found = own_arrays(data)
    unknown = found.keys() - arrays.keys()
    if unknown:
        raise ValueError(
            f"data: {data}: expected arrays named {', '.join(arrays)}, got "
            f"{', '.join(sorted(unknown))}."
        )
    return Own(found, f"{kind} of {Path(data).name}", f"data: {data}, ")
