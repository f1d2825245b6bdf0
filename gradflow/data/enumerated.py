"""Molecules enumerated by RDKit, with a property that it computes."""

from functools import cache
from typing import NamedTuple

from .bonds import Bond
from .molecules import HOW

_VALENCES = {"C": 4, "N": 3, "O": 2, "F": 1}


class Enumerated(NamedTuple):
    """A molecule, with its hydrogens."""

    smiles: str
    """Without its hydrogens."""
    elements: tuple[str, ...]
    """Symbols of its atoms."""
    bonds: tuple[Bond, ...]
    """Between them."""
    refractivity: float
    """Molar refractivity in cm³/mol, by the contributions of atoms of Wildman and
    Crippen (J. Chem. Inf. Comput. Sci. 39, 1999); to it the isotropic polarizability is
    proportional, by the Lorentz-Lorenz equation."""


def enumerated_molecules(count: int) -> list[Enumerated]:
    """The first `count` molecules of C, N, O and F: by the number of their atoms other
    than hydrogen, then by their SMILES.

    All that can be built from one atom by adding, one after the other, an atom with a
    single, double or triple bond, and by closing rings with single bonds, where no two
    of N, O and F are bonded, valences are 4, 3, 2 and 1, and charges are zero, without
    triple bonds and neighbouring double bonds in rings. Their number grows sevenfold
    with each atom: there are 2102 of up to five.

    **Raises:** `ValueError` where RDKit is not installed.
    """
    try:
        from rdkit import rdBase  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            "data: no QM9 files are at hand, and RDKit, by which other molecules are "
            f"enumerated, is not installed: pip install rdkit. {HOW}"
        ) from error
    found, size = [], 1
    with rdBase.BlockLogs():
        while len(found) < count:
            found += sorted(_of_size(size))
            size += 1
        return [_with_hydrogens(smiles) for smiles in found[:count]]


@cache
def _of_size(size: int) -> frozenset[str]:
    """Canonical SMILES of all of `size` atoms."""
    from rdkit import Chem  # pyright: ignore[reportMissingImports]

    if size == 1:
        return frozenset(_VALENCES)
    kinds = {1: Chem.BondType.SINGLE, 2: Chem.BondType.DOUBLE, 3: Chem.BondType.TRIPLE}
    grown = set()
    for smiles in _of_size(size - 1):
        core = Chem.MolFromSmiles(smiles)
        Chem.Kekulize(core, clearAromaticFlags=True)
        for atom in core.GetAtoms():
            for element, valence in _VALENCES.items():
                if element != "C" and atom.GetSymbol() != "C":
                    continue
                for order in range(1, min(atom.GetTotalNumHs(), valence, 3) + 1):
                    new = Chem.RWMol(core)
                    place = new.AddAtom(Chem.Atom(element))
                    new.AddBond(atom.GetIdx(), place, kinds[order])
                    grown |= _canonical(new)
    # Rings: each of the new ones has a parent with one bond less.
    fresh = set(grown)
    while fresh:
        closed = set()
        for smiles in fresh:
            core = Chem.MolFromSmiles(smiles)
            Chem.Kekulize(core, clearAromaticFlags=True)
            apart = Chem.GetDistanceMatrix(core)
            for a in core.GetAtoms():
                for b in core.GetAtoms():
                    i, j = a.GetIdx(), b.GetIdx()
                    hetero = a.GetSymbol() != "C" and b.GetSymbol() != "C"
                    if i >= j or hetero or not 2 <= apart[i, j] <= 5:
                        continue
                    if a.GetTotalNumHs() and b.GetTotalNumHs():
                        new = Chem.RWMol(core)
                        new.AddBond(i, j, kinds[1])
                        closed |= _canonical(new)
        fresh = closed - grown
        grown |= fresh
    return frozenset(grown)


def _canonical(molecule) -> set[str]:
    """The SMILES of a molecule, or none where it makes no chemical sense."""
    from rdkit import Chem  # pyright: ignore[reportMissingImports]

    kinds = Chem.BondType

    for atom in molecule.GetAtoms():
        atom.SetNoImplicit(False)
        atom.SetNumExplicitHs(0)
    if Chem.SanitizeMol(molecule, catchErrors=True):
        return set()
    bent = 0  # atoms that would have to be straight
    for atom in molecule.GetAtoms():
        inner = [b.GetBondType() for b in atom.GetBonds() if b.IsInRing()]
        bent += kinds.TRIPLE in inner or inner.count(kinds.DOUBLE) > 1
    return set() if bent else {Chem.MolToSmiles(molecule)}


def _with_hydrogens(smiles: str) -> Enumerated:
    from rdkit import Chem  # pyright: ignore[reportMissingImports]
    from rdkit.Chem import Crippen  # pyright: ignore[reportMissingImports]

    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    refractivity = Crippen.MolMR(molecule)  # pyright: ignore
    Chem.Kekulize(molecule, clearAromaticFlags=True)
    bonds = tuple(
        Bond(b.GetBeginAtomIdx(), b.GetEndAtomIdx(), round(b.GetBondTypeAsDouble()))
        for b in molecule.GetBonds()
    )
    elements = tuple(atom.GetSymbol() for atom in molecule.GetAtoms())
    return Enumerated(smiles, elements, bonds, refractivity)
