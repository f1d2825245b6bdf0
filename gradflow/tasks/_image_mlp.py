"""Handwritten digits, or other images, by a deep ReLU network, from a large start."""

from pathlib import Path
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from .._checks import check_choice, check_positive
from .._typing import Given
from ..flow.flow import scaled
from ..losses import CrossEntropy, SquaredError
from ._checks import check_count
from ._digits import digits
from ._task import accuracies, Task


def image_mlp(
    key: PRNGKeyArray,
    *,
    samples: int = 1000,
    width: int = 200,
    hidden_layers: int = 2,
    init_scale: float = 1.0,
    loss: Literal["squared", "cross_entropy"] = "squared",
    data: str | Path | None = None,
    published: bool = True,
    test_samples: int = 10_000,
    images: Given = None,
    labels: Given = None,
    test_images: Given = None,
    test_labels: Given = None,
) -> Task:
    """Ten classes of digits by a ReLU network with biases, by half the mean squared
    distance of its outputs from one-hot vectors, or the cross-entropy (Liu, Michaud,
    Tegmark, arXiv 2210.01117, figures 3, 10 to 12; their loss, a mean over outputs too,
    is a fifth of this one).

    The images are those that are given, or else MNIST's where its four IDX files are at
    hand (or Fashion-MNIST's, which have the same names), and else those that come with
    scikit-learn, 8 × 8 pixels, another data set and easier; `truth.data` says which.
    The first `samples` are learnt, as in the authors' code. Pixels go from 0 to 1.
    Initial weights and biases are uniform within ±1/√(inputs of the layer), times
    `init_scale`: 8 or 9 in the experiments on grokking.

    The metrics are accuracies: on the training samples, with threshold 0.99, and on the
    test samples, with threshold 0.9 for scikit-learn's digits, and else 0.8 (the paper
    does not tell its own).

    **Arguments:**

    - `key`: of the initial weights.
    - `samples`: how many to learn from.
    - `width`, `hidden_layers`: neurons of a hidden layer, and how many layers.
    - `init_scale`: α.
    - `loss`: `"squared"` or `"cross_entropy"`.
    - `data`: the folder with MNIST's files, as they are or with .gz, or a file .npz of
        the four arrays below; unless given, the folder named by the environment
        variable GRADFLOW_DATA.
    - `published`: whether the files must have the checksums of the published ones;
        others are named "images from unchecked files".
    - `test_samples`: at most so many; from the test set where there is one, else from
        what is not learnt.
    - `images`, `labels`: arrays of your own, of shapes (n, …) and (n,): bytes are
        divided by 255, other numbers are as they are; labels are integers from 0 on.
    - `test_images`, `test_labels`: and a test set, if there is one.

    **Returns:** a task whose truth is a `DataTruth`.

    **Raises:** `ValueError` where an argument is out of range, a file or an array is
    not right, or where neither MNIST nor scikit-learn are at hand.
    """
    check_count(samples, "samples")
    check_count(width, "width")
    check_count(hidden_layers, "hidden_layers")
    check_positive(init_scale, "init_scale")
    check_choice(loss, "loss", ("squared", "cross_entropy"))
    check_count(test_samples, "test_samples")
    arrays = dict(images=images, labels=labels, test_images=test_images,
                  test_labels=test_labels)  # fmt: skip
    found = digits(data, published=published, arrays=arrays)
    images, labels = found.images, found.labels
    check_count(samples, "samples", most=len(images) - (found.test is None))
    test_images, test_labels = found.test or (images[samples:], labels[samples:])
    x, y = jnp.asarray(images[:samples]), jnp.asarray(labels[:samples])
    x_test = jnp.asarray(test_images[:test_samples])
    y_test = jnp.asarray(test_labels[:test_samples])
    one_hot = jnp.asarray(np.eye(found.classes)[np.asarray(y)])
    level = 0.9 if "scikit" in found.data else 0.8
    make = lambda: eqx.nn.MLP(
        x.shape[1], found.classes, width, hidden_layers, jax.nn.relu, key=key
    )
    return Task(
        name="image_mlp",
        model=scaled(make(), init_scale),
        loss=SquaredError(x, one_hot) if loss == "squared" else CrossEntropy(x, y),
        metrics=accuracies(x, y, x_test, y_test, grokked=level),
        truth=DataTruth(
            found.data,
            f"{found.data}, {samples} for training",
            len(images),
            found.test is not None,
        ),
        codimension=None,
        slow_time=3.0,
    )


class DataTruth(eqx.Module):
    """Which data they are, and how many."""

    data: str = eqx.field(static=True)
    """Which they are."""
    title: str = eqx.field(static=True)
    """The title of figures, which says so."""
    available: int | None = eqx.field(static=True, default=None)
    """How many samples there are; `None` where as many as are asked for."""
    tested: bool = eqx.field(static=True, default=False)
    """Whether there is a test set too."""
