"""Handwritten digits, or other images, learnt from few samples."""

from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import PRNGKeyArray

from .._checks import check_positive
from .._typing import Given
from ..losses import CrossEntropy
from ..models import TwoLayer
from ..penalties import AbstractPenalty, L1
from ._checks import check_count
from ._digits import digits
from ._task import accuracies, Task


def image_classification(
    key: PRNGKeyArray,
    *,
    samples: int = 1000,
    width: int = 200,
    init_scale: float = 1.0,
    data: str | Path | None = None,
    published: bool = True,
    test_samples: int = 2000,
    penalty: AbstractPenalty | None = None,
    images: Given = None,
    labels: Given = None,
    test_images: Given = None,
    test_labels: Given = None,
) -> Task:
    """Ten classes of digits by B ReLU(A x), without biases; the mean cross-entropy,
    under R = ‖θ‖₁ (Notsawo, Dumas, Rabusseau, arXiv 2506.05718, figure 35, which does
    not tell the width or the penalties' strengths).

    The images are those that are given, or else MNIST's where its four IDX files are at
    hand (or Fashion-MNIST's, which have the same names), and else those that come with
    scikit-learn, 8 × 8 pixels, which are another data set and easier; `truth.data` says
    which. Pixels go from 0 to 1. Initial weights are Gaussian with standard deviation
    `init_scale`/√rows.

    The metrics are accuracies: on the training samples, with threshold 0.99, and on
    the test samples, with threshold 0.95 for scikit-learn's digits, and else 0.9.

    **Arguments:**

    - `key`: of the choice of samples, and of the initial weights.
    - `samples`: how many to learn from.
    - `width`: of the hidden layer.
    - `init_scale`: of the initial weights.
    - `data`: the folder with MNIST's files, as they are or with .gz, or a file .npz of
        the four arrays below; unless given, the folder named by the environment
        variable GRADFLOW_DATA.
    - `published`: whether the files must have the checksums of the published ones;
        others are named "images from unchecked files".
    - `test_samples`: at most so many; from the test set where there is one, else from
        what is not learnt.
    - `penalty`: R, unless it is to be the ℓ1 norm.
    - `images`, `labels`: arrays of your own, of shapes (n, …) and (n,): bytes are
        divided by 255, other numbers are as they are; labels are integers from 0 on.
    - `test_images`, `test_labels`: and a test set, if there is one.

    **Returns:** a task whose truth is an `ImageTruth`.

    **Raises:** `ValueError` where an argument is out of range, a file or an array is
    not right, or where neither MNIST nor scikit-learn are at hand.
    """
    check_count(samples, "samples")
    check_count(width, "width")
    check_positive(init_scale, "init_scale")
    check_count(test_samples, "test_samples")
    split_key, test_key, inner_key, outer_key = jr.split(key, 4)
    arrays = dict(images=images, labels=labels, test_images=test_images,
                  test_labels=test_labels)  # fmt: skip
    found = digits(data, published=published, arrays=arrays)
    images, labels = found.images, found.labels
    check_count(samples, "samples", most=len(images) - (found.test is None))
    order = np.asarray(jr.permutation(split_key, len(images)))
    train, test = order[:samples], order[samples:][:test_samples]
    test_images, test_labels = found.test or (images, labels)
    if found.test is not None:
        test = np.asarray(jr.permutation(test_key, len(test_images)))[:test_samples]
    x, y = jnp.asarray(images[train]), jnp.asarray(labels[train])
    x_test, y_test = jnp.asarray(test_images[test]), jnp.asarray(test_labels[test])
    pixels = x.shape[1]
    model = TwoLayer(
        init_scale * jr.normal(inner_key, (width, pixels)) / width**0.5,
        None,
        init_scale * jr.normal(outer_key, (found.classes, width)) / found.classes**0.5,
        "relu",
    )
    return Task(
        name="image_classification",
        model=model,
        loss=CrossEntropy(x, y),
        metrics=accuracies(
            x, y, x_test, y_test, grokked=0.95 if "scikit" in found.data else 0.9
        ),
        truth=ImageTruth(found.data),
        codimension=None,
        slow_time=1.0,
        penalty=L1() if penalty is None else penalty,
    )


class ImageTruth(eqx.Module):
    """Which images they are."""

    data: str = eqx.field(static=True)
    """Their name, for titles."""
