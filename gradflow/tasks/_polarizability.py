"""A property of small molecules, from their atoms and bonds."""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree, Scalar

from .._checks import check_positive
from ..data import enumerated_molecules, molecular_graph, qm9, qm9_path, QM9_SHA256
from ..flow.flow import scaled
from ..losses import SquaredError
from ..metrics import Metric
from ..models import GraphNetwork
from ._checks import check_count
from ._task import Task


def polarizability(
    key: PRNGKeyArray,
    *,
    molecules: int = 100,
    widths: tuple[int, int] = (32, 16),
    init_scale: float = 1.0,
    data: str | Path | None = None,
    published: bool = True,
) -> Task:
    """The isotropic polarizability of small molecules by a `GraphNetwork`; half the
    mean squared error (Liu, Michaud, Tegmark, arXiv 2210.01117, figure 5).

    The molecules are the first of QM9 where it is at hand, with the bonds that the
    positions of their atoms tell. Else they are enumerated by RDKit, with the molar
    refractivity that it computes, a property to which the polarizability is
    proportional; `truth.data` says which. Half of them, chosen at random, are learnt,
    the others are for the test. Targets are measured from the training samples' mean,
    in their standard deviations.

    The metrics are mean squared errors: on the training samples, with threshold 0.02,
    and on the test samples, with threshold 0.2 for QM9, or 0.3 for the enumerated
    molecules: with 50 of them, a network of α = 1 comes to 0.23 and no further.

    **Arguments:**

    - `key`: of the choice of training samples, and of the initial weights.
    - `molecules`: for training and test.
    - `widths`: features of an atom after each convolution.
    - `init_scale`: α, by which the initial weights are multiplied; 3 in the paper.
    - `data`: the folder with QM9's archive or its unpacked files; unless given, the one
        named by the environment variable GRADFLOW_DATA.
    - `published`: whether the archive must have the checksum of the published one;
        others, and unpacked files, are named "molecules from unchecked files".

    **Returns:** a task whose truth is a `PolarizabilityTruth`.

    **Raises:** `ValueError` where an argument is out of range, a file is not right, or
    where neither QM9 nor RDKit are at hand.
    """
    check_count(molecules, "molecules", least=4)
    check_positive(init_scale, "init_scale")
    split_key, init_key = jr.split(key)
    path = qm9_path(data)
    if path is not None:
        found = qm9(path, molecules, sha256=QM9_SHA256 if published else None)
        checked = published and path.is_file()
        name = "QM9" if checked else "molecules from unchecked files"
        values = np.array([m.properties["alpha"] for m in found])
        unit = "bohr³"
    else:
        found = enumerated_molecules(molecules)
        name = "enumerated molecules (RDKit)"
        values = np.array([m.refractivity for m in found])
        unit = "cm³/mol"
    graphs = molecular_graph([(m.elements, m.bonds) for m in found])
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
                MeanSquare(test_loss), threshold=0.3 if path is None else 0.2
            ),
        },
        truth=PolarizabilityTruth(
            name, f"{name}, {len(train)} for training", mean, deviation, unit
        ),
        codimension=None,
        slow_time=3.0,
    )


class MeanSquare(eqx.Module):
    """The mean of (f − y)² over all samples and outputs."""

    loss: SquaredError

    def __call__(self, model: PyTree) -> Scalar:
        return jnp.mean((self.loss.outputs(model) - self.loss.y.reshape(-1)) ** 2)


class PolarizabilityTruth(eqx.Module):
    """Which molecules they are, and what their property is measured in: from `mean`, in
    units of `deviation`, both in `unit`."""

    data: str = eqx.field(static=True)
    title: str = eqx.field(static=True)
    mean: float
    deviation: float
    unit: str = eqx.field(static=True)
