"""QM9 as the package qm9pack has it: three tables of 130 831 molecules."""

import csv
import hashlib
import io
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from ._files import check_sum, problem, read
from .bonds import ELEMENTS
from .molecules import HOW, Molecule, PARTS, PROPERTIES

QM9PACK_SHA256: Mapping[str, str] = MappingProxyType(
    {
        PARTS[0]: "19f0a5d595462d52cd82eef3370f3e9eb55a1f52cb14985657200349568deff3",
        PARTS[1]: "2bca113fdc0b28a13563c80ed9b240e934f3da6c64c64fe74ddb4f0f36036e61",
        PARTS[2]: "9c5efb5733d2af149db8d95d36ff198b4ffed12d9f7b344220a1e5877d5c6a43",
    }
)
"""Checksums of its tables."""

QM9PACK_SIZE = 130_831
"""Molecules in all."""

# What `PROPERTIES` are called there, in this order.
_COLUMNS = (
    "RotA_GHz", "RotB_GHz", "RotC_GHz", "Dipole_debye", "Polarizability_bohr3",
    "HOMO_au", "LUMO_au", "HOMO_LUMO_gap_au", "R2_bohr2", "ZPVE_au",
    "InternalEnergy_0K_au", "InternalEnergy_298K_au", "Enthalphy_298K_au",
    "GibbsFreeEnergy_298K_au", "Heatcapacity_Cv_cal_mol_K",
)  # fmt: skip


def is_qm9pack(path: Path) -> bool:
    """Whether the `path` that `qm9_path` found is that of the package qm9pack."""
    return path.suffix == ".whl" or (path / PARTS[0]).is_file()


def qm9pack(
    path: Path,
    count: int | None = None,
    *,
    sha256: Mapping[str, str] | None = QM9PACK_SHA256,
) -> list[Molecule]:
    """Molecules of QM9 as the package qm9pack has them, in the order of their indices.

    These are 130 831 of the published 133 885: its authors left out the 3054 whose
    atoms, put to rest, were no longer bonded as they were meant to be. The first of
    them are not the molecules 1, 2, 3 and so on to the last: 58 is missing.

    **Arguments:**

    - `path`: of the file .whl, or of the folder with the three tables.
    - `count`: the first so many; all of them unless given. Only the tables that have
        them are read.
    - `sha256`: checksums of the tables; `None` takes any.

    **Returns:** a [`gradflow.data.Molecule`][] of each.

    **Raises:** `ValueError` where a table is damaged, not in the format, or missing,
    has another checksum, or there are fewer molecules.
    """
    found: list[Molecule] = []
    for part in PARTS:
        if count is not None and len(found) >= count:
            break
        name = f"{path}, {part}" if path.is_file() else path / part
        content = _content(path, part)
        if sha256 is not None:
            got = hashlib.sha256(content).hexdigest()
            check_sum(name, got, sha256[part], HOW)
        left = None if count is None else count - len(found)
        found += _molecules(content, name, left)
    if count is not None and len(found) < count:
        raise problem(path, f"{count} molecules", f"{len(found)} of them", HOW)
    return found


def _content(path: Path, part: str) -> bytes:
    if path.is_dir():
        return read(path / part, HOW)
    try:
        with zipfile.ZipFile(path) as wheel:
            return wheel.read(f"qm9pack/data/{part}")
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        expected = f"a whole file .whl with qm9pack/data/{part}"
        raise problem(path, expected, str(error), HOW) from error


def _molecules(
    content: bytes, name: Path | str, count: int | None
) -> Iterator[Molecule]:
    """The first `count` of a table."""
    rows = csv.DictReader(io.TextIOWrapper(io.BytesIO(content), "ascii", newline=""))
    try:
        for n, row in enumerate(rows):
            if n == count:
                return
            yield _molecule(row)
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        expected = f"a table of molecules with {', '.join(_COLUMNS[:3])} and so on"
        got = f"{type(error).__name__} in line {rows.line_num}: {error}"
        raise problem(name, expected, got, HOW) from error


def _molecule(row: Mapping[str, str]) -> Molecule:
    """From a row. (Of one that is cut off the columns at the end are None.)"""
    elements = tuple(_words(row["Elements"].replace("'", "")))
    unknown = set(elements) - set(ELEMENTS)
    if unknown:
        raise ValueError(f"elements {sorted(unknown)}")
    positions = np.array([float(x) for x in _words(row["XYZ_Ang"])])
    charges = np.array([float(x) for x in _words(row["Mulliken_pop"])])
    return Molecule(
        int(row["Index"]),
        elements,
        positions.reshape(len(elements), 3),
        charges.reshape(len(elements)),
        {k: float(row[c]) for k, c in zip(PROPERTIES, _COLUMNS, strict=True)},
        row["SMILES"],
    )


def _words(text: str) -> list[str]:
    """The entries of a list, and of lists in it."""
    return text.replace("[", "").replace("]", "").split(",")
