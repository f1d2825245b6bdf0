"""Molecules as graphs: which atoms are bonded, how, and the features of either."""

from collections.abc import Sequence
from functools import cache
from itertools import combinations
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ..models import Graph

ELEMENTS = ("H", "C", "N", "O", "F")
_NUMBERS = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}
_VALENCES = {"H": 1, "C": 4, "N": 3, "O": 2, "F": 1}
# Covalent radii in ångström (Cordero et al., Dalton Trans. 2008, 2832).
_RADII = {"H": 0.31, "C": 0.76, "N": 0.71, "O": 0.66, "F": 0.57}
# Bonded where not further than this times the sum of the radii: between the longest
# bonds (C-C 1.65 Å, of 1.82) and the shortest distances across a cage (1.87 Å).
_REACH = 1.2


class Bond(NamedTuple):
    """Between atoms `a` and `b`: single (1), double (2) or triple (3)."""

    a: int
    b: int
    order: int


def bonds_from_positions(
    elements: Sequence[str], positions: np.ndarray
) -> tuple[Bond, ...]:
    """The bonds of a molecule of H, C, N, O and F at rest, from where its atoms are.

    Atoms are bonded that are closer than 1.2 times the sum of their covalent radii. The
    valences that this leaves open (of 1, 4, 3, 2, 1) become double and triple bonds: as
    many as can be, and among as many those of the shortest distances. Charged atoms, as
    in an ammonium, have none left open.

    **Arguments:**

    - `elements`: symbols of the atoms.
    - `positions`: in ångström, of shape (atoms, 3).
    """
    radii = np.array([_RADII[e] for e in elements])
    apart = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    stretch = apart / (radii[:, None] + radii[None])
    pairs = [p for p in combinations(range(len(elements)), 2) if stretch[p] < _REACH]
    degree = np.bincount(np.array(pairs, int).ravel(), minlength=len(elements))
    spare = [max(_VALENCES[e] - int(n), 0) for e, n in zip(elements, degree)]  # noqa: B905
    places = [n for n, (a, b) in enumerate(pairs) if spare[a] and spare[b]]

    @cache
    def best(at: int, spare: tuple[int, ...]) -> tuple[int, float, tuple[int, ...]]:
        """Most of further bonds, least stretch, and how many at each of `places`."""
        if at == len(places):
            return 0, 0.0, ()
        a, b = pairs[places[at]]
        found = []
        for more in range(min(spare[a], spare[b], 2) + 1):
            left = list(spare)
            left[a] -= more
            left[b] -= more
            total, cost, rest = best(at + 1, tuple(left))
            found.append(
                (total + more, cost - more * float(stretch[a, b]), (more, *rest))
            )
        return max(found)

    more = dict(zip(places, best(0, tuple(spare))[2], strict=True))
    return tuple(Bond(a, b, 1 + more.get(n, 0)) for n, (a, b) in enumerate(pairs))


def aromatic_rings(elements: Sequence[str], bonds: Sequence[Bond]) -> list[list[int]]:
    """Rings of five or six atoms with six electrons to share: one from each atom with a
    double bond in the ring, two from a nitrogen of three neighbours or an oxygen of two
    that has none.

    This is a part of what chemists call aromatic: a ring whose double bonds lie outside
    it, in a ring that shares an edge with it or in a C=O, is left out.
    """
    orders: dict[int, dict[int, int]] = {}
    for a, b, order in bonds:
        orders.setdefault(a, {})[b] = order
        orders.setdefault(b, {})[a] = order
    found: dict[frozenset[int], list[int]] = {}

    def walk(chain: list[int]):
        start, last = chain[0], chain[-1]
        for n in orders.get(last, {}):
            if n == start and 5 <= len(chain) <= 6:
                found.setdefault(frozenset(chain), chain)
            elif n > start and n not in chain and len(chain) < 6:
                walk([*chain, n])

    for atom in orders:
        walk([atom])

    def shared(ring: list[int]) -> int:
        total = 0
        for place, atom in enumerate(ring):
            around = orders[atom]
            beside = (ring[place - 1], ring[(place + 1) % len(ring)])
            if any(around[n] == 2 for n in beside):
                total += 1
            elif (elements[atom], len(around)) in (("N", 3), ("O", 2)):
                total += 2
            else:
                return 0
        return total

    return [ring for ring in found.values() if shared(ring) == 6]


def molecular_graph(
    molecules: Sequence[tuple[Sequence[str], Sequence[Bond]]],
) -> Graph:
    """Molecules as graphs of one size, each bond an edge in both directions.

    The 11 features of an atom: five that tell the element; the atomic number; whether
    it is in an aromatic ring; whether it is sp, sp² or sp³, as its double and triple
    bonds tell (none for hydrogen); the number of hydrogens at it. The 4 of an edge:
    whether it is single, double, triple or aromatic. They are those of QM9 in PyTorch
    Geometric, which has them from RDKit; there an atom beside a double bond may count
    as sp² too, and more rings as aromatic.

    **Arguments:**

    - `molecules`: elements and bonds of each.
    """
    atoms = max(len(elements) for elements, _ in molecules)
    edges = 2 * max(len(bonds) for _, bonds in molecules)
    n = len(molecules)
    node = np.zeros((n, atoms, 11))
    edge = np.zeros((n, edges, 4))
    ends = np.zeros((2, n, edges), int)
    has_node, has_edge = np.zeros((n, atoms), bool), np.zeros((n, edges), bool)
    for i, (elements, bonds) in enumerate(molecules):
        has_node[i, : len(elements)] = True
        has_edge[i, : 2 * len(bonds)] = True
        rings = aromatic_rings(elements, bonds)
        more = np.zeros(len(elements), int)  # bonds beyond the first, of the atom
        for k, (a, b, order) in enumerate(bonds):
            more[[a, b]] += order - 1
            kind = 3 if any(a in ring and b in ring for ring in rings) else order - 1
            for place, (start, end) in zip((2 * k, 2 * k + 1), ((a, b), (b, a))):  # noqa: B905
                ends[:, i, place] = start, end
                edge[i, place, kind] = 1
                node[i, end, 10] += elements[start] == "H"
        for j, element in enumerate(elements):
            node[i, j, ELEMENTS.index(element)] = 1
            node[i, j, 5] = _NUMBERS[element]
            node[i, j, 6] = any(j in ring for ring in rings)
            if element != "H":
                node[i, j, 9 - min(more[j], 2)] = 1
    return Graph(
        jnp.asarray(node),
        jnp.asarray(edge),
        jnp.asarray(ends[0]),
        jnp.asarray(ends[1]),
        jnp.asarray(has_node),
        jnp.asarray(has_edge),
    )
