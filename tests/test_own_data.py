"""Arrays of one's own: in tasks, in files .npz, and the line that refuses each."""

import jax.random as jr
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from gradflow import tasks

KEY = jr.key(0)
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (12, 3, 2), np.uint8)
LABELS = np.arange(12) % 3
TEXTS = ["good film", "bad film", "a good good plot", "bad"] * 3
# Water, with the place of one atom more; as many times, the property in turn.
NUMBERS = np.array([[8, 1, 1, 0]] * 8)
POSITIONS = np.array([[[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0], [0, 0, 0]]] * 8)
VALUES = np.arange(8.0)


def image_mlp(**options):
    return tasks.image_mlp(KEY, **{"samples": 8, "width": 3, **options})


def test_images_are_rows_and_classes_are_those_of_the_labels():
    task = image_mlp(images=IMAGES, labels=LABELS)
    rows = IMAGES.reshape(12, 6) / 255
    assert_allclose(task.loss.x, rows[:8])
    assert_array_equal(task.loss.y, np.eye(3)[LABELS[:8]])
    assert_allclose(task.metrics["test"].fn.x, rows[8:])
    assert (task.truth.data, task.truth.available) == ("images of one's own", 12)
    # Numbers are as they are, and a test set of its own is the test set.
    test = dict(test_images=IMAGES[:2] - 0.5, test_labels=[0, 4])
    task = image_mlp(images=IMAGES - 0.5, labels=LABELS, samples=12, **test)
    assert_allclose(task.loss.x, rows * 255 - 0.5)
    assert task.loss.y.shape == (12, 5) and task.truth.tested
    task = tasks.image_classification(
        KEY, images=IMAGES, labels=LABELS, samples=9, width=4
    )
    assert task.model.outer.shape == (3, 4)
    seen = {tuple(row) for row in np.asarray(task.loss.x).tolist()}
    assert seen < {tuple(row) for row in rows.tolist()} and len(seen) == 9


def test_a_file_is_what_its_arrays_are(tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(path, images=IMAGES, labels=LABELS)
    task = image_mlp(data=path)
    assert_array_equal(task.loss.x, image_mlp(images=IMAGES, labels=LABELS).loss.x)
    assert task.truth.title == "images of mine.npz, 8 for training"
    np.savez(path, texts=TEXTS, labels=[1, 0, 1, 0] * 3)
    sizes = dict(samples=12, words=5, embedding=2, state=2)
    task = tasks.sentiment(KEY, data=str(path), **sizes)
    assert task.loss.x.shape == (9, 3)  # the longest has three words that count
    given = tasks.sentiment(KEY, texts=TEXTS, labels=[1, 0, 1, 0] * 3, **sizes)
    assert_array_equal(given.loss.x, task.loss.x)
    np.savez(path, numbers=NUMBERS, positions=POSITIONS, values=VALUES)
    task = tasks.polarizability(KEY, data=path, molecules=6, widths=(2, 2))
    assert task.truth.data == "molecules of mine.npz" and task.truth.available == 8
    assert task.loss.x.nodes.shape == (3, 3, 11)  # three atoms
    assert task.loss.x.has_edge.sum(1).tolist() == [4, 4, 4]  # of two bonds
    both = np.concatenate([task.loss.y, task.metrics["test"].fn.loss.y])
    units = np.sort(both) * task.truth.deviation + task.truth.mean
    assert_allclose(units, VALUES[:6], atol=1e-12)


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(images=IMAGES), "labels: expected 12 integers .* got none"),
        (dict(labels=LABELS), "images: expected .* got none"),
        (
            dict(images=IMAGES, labels=LABELS[:3]),
            r"labels: .* 12 .* shape \(3,\)",
        ),
        (dict(images=IMAGES, labels=LABELS - 1), "labels: .* got -1 among them"),
        (dict(images=IMAGES, labels=LABELS / 2), "labels: .* array of float64"),
        (dict(images=[[np.nan]] * 12, labels=LABELS), "images: .* not finite"),
        (dict(images=[["a"]] * 12, labels=LABELS), "images: .* got an array of <U1"),
        (
            dict(images=IMAGES, labels=LABELS, test_images=IMAGES),
            "test_labels: .*none",
        ),
        (
            dict(images=IMAGES, labels=LABELS, test_images=[[1.0]], test_labels=[0]),
            "test_images: expected images of 6 numbers, .* got 1",
        ),
        (dict(images=IMAGES, labels=LABELS, data="x"), "data: expected none beside im"),
        (
            dict(images=IMAGES, labels=LABELS, samples=12),
            "samples: .* at most 11",
        ),
    ],
)
def test_images_that_do_not_fit(given, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        image_mlp(**given)


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(numbers=NUMBERS * 2), "numbers: expected .* got 16 in row 0"),
        (dict(numbers=0 * NUMBERS), "numbers: expected an atom in every .* none in 0"),
        (dict(positions=POSITIONS[:, :2]), r"positions: .*\(8, 4, 3\).* got shape"),
        (dict(values=VALUES[:3]), "values: expected 8 numbers, .* got 3"),
        (dict(values=None), "values: expected 8 numbers, .* got none"),
        (dict(molecules=9), "molecules: expected at most 8 here, got 9"),
    ],
)
def test_molecules_that_do_not_fit(given, words):
    whole = dict(numbers=NUMBERS, positions=POSITIONS, values=VALUES, molecules=8)
    with pytest.raises(ValueError, match=f"^{words}"):
        tasks.polarizability(KEY, **{**whole, **given})


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(texts=TEXTS, labels=[2] * 12), r"labels: expected 0 \(blame\) .* got 2"),
        (dict(texts=[1.0, 2.0], labels=[0, 1]), "texts: expected a list of texts"),
        (
            dict(texts=TEXTS, labels=[1] * 12, samples=13),
            "samples: .* at most 12",
        ),
    ],
)
def test_texts_that_do_not_fit(given, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        tasks.sentiment(KEY, **{"samples": 12, **given})


def test_files_that_are_not_right(tmp_path):
    path = tmp_path / "mine.npz"
    with pytest.raises(ValueError, match=f"^data: {path}: .* FileNotFoundError"):
        image_mlp(data=path)
    path.write_bytes(b"PK\3\4 and no more")
    with pytest.raises(ValueError, match=f"^data: {path}: expected a file .npz"):
        image_mlp(data=path)
    np.savez(path, images=np.array([{}, {}]), labels=[0, 1])
    with pytest.raises(ValueError, match=f"^data: {path}: .* allow_pickle"):
        image_mlp(data=path)
    np.savez(path, images=IMAGES, labels=LABELS, x=1)
    with pytest.raises(ValueError, match="arrays named images, labels, .* got x"):
        image_mlp(data=path)
    np.savez(path, images=IMAGES, labels=LABELS[:2])
    with pytest.raises(ValueError, match=f"^data: {path}, labels: expected 12"):
        image_mlp(data=path)
