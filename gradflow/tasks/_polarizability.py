"""A property of small molecules, from their atoms and bonds."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree, Scalar

from .._checks import check_positive
from .._typing import Given
from ..data import (
    Bond,
    bonds_from_positions,
    enumerated_molecules,
    is_qm9pack,
    molecular_graph,
    own_molecules,
    qm9,
    qm9_path,
    QM9_SHA256,
    QM9_SIZE,
    qm9pack,
    QM9PACK_SHA256,
    QM9PACK_SIZE,
)
from ..flow.flow import scaled
from ..losses import SquaredError
from ..metrics import Metric
from ..models import GraphNetwork
from ._checks import check_count
from ._own import own
from ._task import Task


def polarizability(
    key: PRNGKeyArray,
    *,
    molecules: int = 100,
    widths: tuple[int, int] = (32, 16),
    init_scale: float = 1.0,
    data: str | Path | None = None,
    published: bool = True,
    numbers: Given = None,
    positions: Given = None,
    values: Given = None,
) -> Task:
    """The isotropic polarizability of small molecules by a `GraphNetwork`; half the
    mean squared error (Liu, Michaud, Tegmark, arXiv 2210.01117, figure 5).

    The molecules are the first of those that are given, with another property if you
    like, or else of QM9 where it is at hand, with the bonds that the positions of their
    atoms tell: as published, or as the package qm9pack has it, 130 831 molecules of the
    133 885, "QM9 (qm9pack)" (the paper's code leaves out these 3054 too). Else they are
    enumerated by RDKit, with the molar refractivity that it computes, a property to
    which the polarizability is proportional; `truth.data` says which. Half of them,
    chosen at random, are learnt, the others are for the test. Targets are measured from
    the training samples' mean, in their standard deviations.

    The metrics are mean squared errors: on the training samples, with threshold 0.02,
    and on the test samples, with threshold 0.3 for the enumerated molecules (with 50 of
    them, a network of α = 1 comes to 0.23 and no further), and else 0.2.

    **Arguments:**

    - `key`: of the choice of training samples, and of the initial weights.
    - `molecules`: for training and test.
    - `widths`: features of an atom after each convolution.
    - `init_scale`: α, by which the initial weights are multiplied; 3 in the paper.
    - `data`: the folder with QM9's archive, its unpacked files or the package qm9pack,
        or a file .npz of the three arrays below; unless given, the folder named by the
        environment variable GRADFLOW_DATA.
    - `published`: whether they must have the checksums of the published ones; others,
        and unpacked files of the archive, are named "molecules from unchecked files".
    - `numbers`, `positions`, `values`: molecules of your own: the atomic numbers, of H,
        C, N, O and F, of shape (n, atoms), 0 where there is none; positions in
        ångström, of shape (n, atoms, 3); and the property, of shape (n,).

    **Returns:** a task whose truth is a `PolarizabilityTruth`.

    **Raises:** `ValueError` where an argument is out of range, a file or an array is
    not right, or where neither QM9 nor RDKit are at hand.
    """
    check_count(molecules, "molecules", least=4)
    check_positive(init_scale, "init_scale")
    split_key, init_key = jr.split(key)
    arrays = dict(numbers=numbers, positions=positions, values=values)
    found = _molecules(data, published, molecules, arrays)
    graphs, values = molecular_graph(found.graphs), found.values
    order = np.asarray(jr.permutation(split_key, molecules))
    train, test = order[: molecules // 2], order[molecules // 2 :]
    mean, deviation = float(values[train].mean()), float(values[train].std())
    if not deviation > 0:
        raise ValueError("molecules: expected some that differ in the property.")
    target = jnp.asarray((values - mean) / deviation)
    loss, test_loss = (
        SquaredError(jax.tree.map(lambda leaf: leaf[at], graphs), target[at])  # noqa: B023
        for at in (train, test)
    )
    model = GraphNetwork(widths=widths, key=init_key)
    return Task(
        name="polarizability",
        model=scaled(model, init_scale),
        loss=loss,
        metrics={
            "train": Metric(MeanSquare(loss), threshold=0.02),
            "test": Metric(
                MeanSquare(test_loss), threshold=0.3 if "RDKit" in found.data else 0.2
            ),
        },
        truth=PolarizabilityTruth(
            found.data,
            f"{found.data}, {len(train)} for training",
            mean,
            deviation,
            found.unit,
            found.available,
        ),
        codimension=None,
        slow_time=3.0,
    )


class _Molecules(NamedTuple):
    graphs: list[tuple[tuple[str, ...], tuple[Bond, ...]]]
    values: np.ndarray
    data: str
    unit: str
    available: int | None


def _molecules(
    data: str | Path | None, published: bool, count: int, arrays: Mapping[str, Given]
) -> _Molecules:
    """The first of those that are given, or at hand, or enumerated."""
    given = own(data, "molecules", **arrays)
    if given is not None:
        atoms, values = own_molecules(given.arrays, given.where)
        check_count(count, "molecules", most=len(values))
        graphs = [(e, bonds_from_positions(e, x)) for e, x in atoms[:count]]
        return _Molecules(graphs, values[:count], given.name, "", len(values))
    path = qm9_path(data)
    if path is None:
        made = enumerated_molecules(count)
        graphs = [(m.elements, m.bonds) for m in made]
        values = np.array([m.refractivity for m in made])
        name = "enumerated molecules (RDKit)"
        return _Molecules(graphs, values, name, "cm³/mol", None)
    if is_qm9pack(path):
        found = qm9pack(path, count, sha256=QM9PACK_SHA256 if published else None)
        checked, name, most = published, "QM9 (qm9pack)", QM9PACK_SIZE
    else:
        found = qm9(path, count, sha256=QM9_SHA256 if published else None)
        checked, name, most = published and path.is_file(), "QM9", QM9_SIZE
    graphs = [(m.elements, m.bonds) for m in found]
    values = np.array([m.properties["alpha"] for m in found])
    name = name if checked else "molecules from unchecked files"
    return _Molecules(graphs, values, name, "bohr³", most if checked else None)


class MeanSquare(eqx.Module):
    """The mean of (f − y)² over all samples and outputs."""

    loss: SquaredError

    def __call__(self, model: PyTree) -> Scalar:
        return jnp.mean((self.loss.outputs(model) - self.loss.y.reshape(-1)) ** 2)


class PolarizabilityTruth(eqx.Module):
    """Which molecules they are, and what their property is measured in: from `mean`, in
    units of `deviation`, both in `unit`."""

    data: str = eqx.field(static=True)
    """Which they are."""
    title: str = eqx.field(static=True)
    """The title of figures, which says so."""
    mean: float
    deviation: float
    unit: str = eqx.field(static=True)
    available: int | None = eqx.field(static=True, default=None)
    """How many there are; `None` where that is not known or they are as many as are
    asked for."""
