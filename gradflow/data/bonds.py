"""Molecules as graphs: which atoms are bonded, how, and the features of either."""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ..models import Graph

ELEMENTS = ("H", "C", "N", "O", "F")
NUMBERS = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}
_VALENCES = {"H": 1, "C": 4, "N": 3, "O": 2, "F": 1}
# Covalent radii in ångström (Cordero et al., Dalton Trans. 2008, 2832).
_RADII = {"H": 0.31, "C": 0.76, "N": 0.71, "O": 0.66, "F": 0.57}
# Bonded where not further than this times the sum of the radii, by how many of the two
# are carbon, or hydrogen. (A nitrite's N-O comes to 1.29, C-N across a cage to 1.28.)
_REACH = np.array([1.4, 1.25, 1.2])
_MOST = {"H": 1, "C": 4, "N": 4, "O": 3, "F": 1}  # neighbours
_STRAIN = {"H": 4, "C": 3, "N": 2, "O": 1, "F": 1}  # of a negative charge


class Bond(NamedTuple):
    """Between atoms `a` and `b`, of that `order`: single (1), double (2) or triple
    (3)."""

    a: int
    b: int
    order: int


def bonds_from_positions(
    elements: Sequence[str], positions: np.ndarray
) -> tuple[Bond, ...]:
    """The bonds of a molecule of H, C, N, O and F at rest, from where its atoms are.

    Atoms are bonded that are closer than 1.2 times the sum of their covalent radii if
    both are carbon, 1.25 times if one is, or hydrogen, and else 1.4 times; of an atom
    with more neighbours than it can have, as across a cage, the most stretched bond is
    none. The valences that this leaves open (of 1, 4, 3, 2, 1) become double and triple
    bonds. A nitrogen may have one bond more, and be positive; what is left open is
    negative. Of all ways that is taken which leaves the molecule neutral, with the
    fewest charges, of these with the negative ones at O, then at N; and then that whose
    further bonds are the shortest.

    Of the 130 831 molecules of `qm9pack` 130 829 have the neighbours that RDKit reads
    from the SMILES that come with them, and 130 601 (99.82 %) the orders and charges
    too; of the other 228 most are zwitterions with the charges elsewhere.

    **Arguments:**

    - `elements`: symbols of the atoms.
    - `positions`: in ångström, of shape (atoms, 3).
    """
    radii = np.array([_RADII[e] for e in elements])
    apart = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    stretch = apart / (radii[:, None] + radii[None])
    pairs = _neighbours(elements, stretch)
    degree = np.bincount(np.array(pairs, int).ravel(), minlength=len(elements))
    spare = [_VALENCES[e] - int(n) for e, n in zip(elements, degree)]  # noqa: B905
    more = _further_bonds(elements, pairs, [float(stretch[p]) for p in pairs], spare)
    return tuple(Bond(a, b, 1 + more.get(n, 0)) for n, (a, b) in enumerate(pairs))


def _neighbours(elements: Sequence[str], stretch: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of bonded atoms: no atom has more than it can have."""
    carbons = np.array([e in "CH" for e in elements], int)
    close = np.triu(stretch < _REACH[carbons[:, None] + carbons[None]], 1)
    pairs = [(int(a), int(b)) for a, b in np.argwhere(close)]
    most = np.array([_MOST[e] for e in elements])

    def crowded() -> list[tuple[int, int]]:
        many = np.bincount(np.array(pairs, int).ravel(), minlength=most.size) > most
        return [p for p in pairs if many[[*p]].any()] if many.any() else []

    while some := crowded():
        pairs.remove(max(some, key=lambda pair: stretch[pair]))
    return pairs


def _further_bonds(
    elements: Sequence[str],
    pairs: Sequence[tuple[int, int]],
    stretch: Sequence[float],
    spare: Sequence[int],
) -> dict[int, int]:
    """How many bonds some pairs have beyond the first, by their places, where so many
    valences of the atoms are open."""
    room = lambda i, spare: spare[i] + (elements[i] == "N")
    places = [n for n, p in enumerate(pairs) if all(room(i, spare) > 0 for i in p)]

    def charges(left: tuple[int, ...]) -> tuple[int, int, int]:
        strain = sum(_STRAIN[e] * max(n, 0) for e, n in zip(elements, left))  # noqa: B905
        return abs(sum(left)), sum(map(abs, left)), strain

    @cache
    def best(
        at: int, left: tuple[int, ...]
    ) -> tuple[tuple[int, int, int], float, tuple[int, ...]]:
        """The least charges, then stretch, and how many at each of `places`."""
        if at == len(places):
            return charges(left), 0.0, ()
        a, b = pairs[places[at]]
        found = []
        for more in range(max(min(room(a, left), room(b, left), 2), 0) + 1):
            then = list(left)
            then[a] -= more
            then[b] -= more
            charged, cost, rest = best(at + 1, tuple(then))
            cost += more * stretch[places[at]]
            found.append((charged, cost, (more, *rest)))
        return min(found)

    return dict(zip(places, best(0, tuple(spare))[2], strict=True))


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

    **Returns:** one [`gradflow.models.Graph`][] of n graphs, filled up to the most
    atoms and bonds that a molecule has.
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
            node[i, j, 5] = NUMBERS[element]
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
