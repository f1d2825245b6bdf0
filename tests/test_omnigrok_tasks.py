"""The tasks of Omnigrok: their data, their sizes, and what their titles say."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

import gradflow as gf
from gradflow import tasks

value = eqx.filter_jit(lambda fn, model: fn(model))
norm = lambda model: np.sqrt(
    sum(
        np.sum(np.square(leaf))
        for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    )
)


@pytest.fixture(autouse=True)
def nothing_at_hand(monkeypatch):
    monkeypatch.delenv("GRADFLOW_DATA", raising=False)


@pytest.mark.parametrize("operation", ["addition", "division"])
def test_modular_transformer(operation):
    task = tasks.modular_transformer(
        jr.key(0), modulus=7, operation=operation, width=8, heads=2, hidden=4
    )
    x, y = np.asarray(task.loss.x), np.asarray(task.loss.labels)
    test = task.metrics["test"].fn
    total = 49 if operation == "addition" else 42
    assert len(x) == int(0.3 * total)
    every = np.concatenate([x, test.x])
    assert len(np.unique(every, axis=0)) == len(every) == total
    assert (every[:, 2] == 7).all() and every[:, :2].max() == 6
    if operation == "addition":
        assert (y == (x[:, 0] + x[:, 1]) % 7).all()
        assert task.truth.title == "a + b mod 7"
    else:
        assert (y * x[:, 1] % 7 == x[:, 0]).all() and (every[:, 1] > 0).all()
        assert task.truth.title == "a / b mod 7"
    assert task.model.unembedding.shape == (8, 8)
    loss = value(task.loss, task.model)
    assert_allclose(loss, np.log(8), rtol=0.5)


def test_activation_of_the_transformer():
    make = lambda **options: (
        tasks.modular_transformer(
            jr.key(0), modulus=7, width=8, heads=2, hidden=4, **options
        ).model
    )
    relu, gelu = make(), make(activation="gelu")
    assert all(map(np.array_equal, jax.tree.leaves(relu), jax.tree.leaves(gelu)))
    block, x = gelu.blocks[0], jr.normal(jr.key(1), (1, 8))
    nothing = jax.tree.map(jnp.zeros_like, block.attention.project(x, 1))
    hidden = np.asarray(x @ block.inner.T)
    smooth = (
        0.5 * hidden * (1 + np.tanh(0.7978845608 * (hidden + 0.044715 * hidden**3)))
    )
    expected = np.asarray(x) + smooth @ np.asarray(block.outer).T
    assert_allclose(block(x, nothing), expected, rtol=1e-6)


def test_teacher_mlp():
    make = lambda **options: tasks.teacher_mlp(
        jr.key(7), width=6, samples=8, test_samples=4, **options
    )
    task, large = make(init_scale=1.0), make(init_scale=3.0)
    sizes = [layer.weight.shape for layer in task.model.layers]
    assert sizes == [(6, 5), (6, 6), (5, 6)]
    for layer in task.truth.teacher.layers:
        bound = layer.weight.shape[1] ** -0.5
        values = np.concatenate([layer.weight.ravel(), layer.bias])
        assert 0.8 * bound < abs(values).max() <= bound
    assert_allclose(norm(large.model), 3 * norm(task.model), rtol=1e-12)
    assert_allclose(large.loss.y, task.loss.y)
    for metric in ("train", "test"):
        assert value(task.metrics[metric], task.truth.teacher) == 1
    # Each sample by itself: the middle one of their errors parts them.
    test = task.metrics["test_loss"].fn
    z = np.asarray(jax.vmap(task.model)(test.x))
    errors = np.sort(np.mean((z - test.y) ** 2, axis=1))
    assert_allclose(value(test, task.model), 5 * np.mean(errors) / 2, rtol=1e-12)
    half = make(init_scale=1.0, tolerance=float(errors[1:3].mean())).metrics["test"]
    assert value(half, task.model) == 0.5 and half.threshold == 0.95
    # What is seen is not what is tested.
    assert np.isin(np.asarray(task.loss.x), np.asarray(test.x)).sum() == 0


def test_images(monkeypatch):
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    task = tasks.image_mlp(jr.key(1), samples=200, width=5, init_scale=8.0)
    assert task.truth.title == "scikit-learn digits, 200 for training"
    assert_allclose(task.loss.x, images[:200] / 16)
    assert (np.asarray(task.loss.y).argmax(1) == labels[:200]).all()
    test = task.metrics["test"].fn
    assert_allclose(test.x, images[200:] / 16)
    sizes = [layer.weight.shape for layer in task.model.layers]
    assert sizes == [(5, 64), (5, 5), (10, 5)]
    # 8 times uniform numbers within ±1/√64.
    assert 0.95 < abs(task.model.layers[0].weight).max() <= 1
    x, w = np.asarray(task.loss.x), jax.tree.map(np.asarray, task.model.layers)
    hidden = x
    for layer in w[:-1]:
        hidden = np.maximum(hidden @ layer.weight.T + layer.bias, 0)
    z = hidden @ w[-1].weight.T + w[-1].bias
    expected = np.mean(np.sum((z - np.eye(10)[labels[:200]]) ** 2, axis=1)) / 2
    assert_allclose(value(task.loss, task.model), expected, rtol=1e-10)


def test_made_up_reviews():
    task = tasks.sentiment(jr.key(2), samples=40, words=50, embedding=3, state=4)
    assert task.truth.title == "synthetic reviews (a grammar), 30 for training"
    assert task.loss.x.shape == (30, 64)
    test = task.metrics["test"].fn
    assert test.x.shape == (10, 64) and test.x.max() <= 50
    known = np.unique(np.asarray(task.loss.x))
    assert (known == np.arange(51)).all()  # as many as there are, and the filling
    logits = np.asarray(value(jax.vmap(task.model), test.x))
    expected = np.mean((logits > 0) == (np.asarray(test.labels) == 1))
    assert_allclose(value(test, task.model), expected)


def test_reviews_from_a_file_are_named(tmp_path):
    rows = [(f"good film {n}", "positive") for n in range(5)]
    rows += [("bad film", "negative")] * 3
    lines = ["review,sentiment", *(f"{text},{label}" for text, label in rows)]
    (tmp_path / "IMDB Dataset.csv").write_text("\n".join(lines))
    make = lambda **options: tasks.sentiment(
        jr.key(2), samples=8, words=3, embedding=2, state=2, data=tmp_path, **options
    )
    with pytest.raises(ValueError, match="SHA-256"):
        make()
    task = make(published=False)
    assert task.truth.title == "reviews from unchecked files, 6 for training"
    assert task.loss.x.shape == (6, 500)
    # Two words in each, and only "good" is in none of the negative ones.
    assert ((np.asarray(task.loss.x) > 0).sum(1) == 2).all()


def test_molecules_from_files_are_named(tmp_path):
    line = "gdb {}\t" + "0\t" * 4 + "{}\t" + "0\t" * 10
    for n in range(1, 7):
        atoms = [f"{'F' if n % 2 else 'H'}\t0\t0\t{0.92 if n % 2 else 0.74}\t0.1"]
        first = "H\t0\t0\t0\t-0.1"
        text = ["2", line.format(n, n**2), first, *atoms, "1", "F F", "i i", ""]
        (tmp_path / f"dsgdb9nsd_{n:06d}.xyz").write_text("\n".join(text))
    task = tasks.polarizability(jr.key(3), molecules=6, data=tmp_path)
    assert task.truth.title == "molecules from unchecked files, 3 for training"
    test = task.metrics["test"].fn.loss
    targets = np.concatenate([task.loss.y, test.y])
    assert_allclose(np.mean(task.loss.y), 0, atol=1e-12)
    assert_allclose(np.std(task.loss.y), 1)
    told = np.sort(targets * task.truth.deviation + task.truth.mean)
    assert_allclose(told, np.arange(1, 7) ** 2.0)
    graph = task.loss.x
    fluorine = np.asarray(graph.nodes)[:, :, 4].any(1)
    odd = np.sqrt(np.asarray(task.loss.y) * task.truth.deviation + task.truth.mean) % 2
    assert_allclose(fluorine, odd, atol=1e-6)


def test_enumerated_molecules_stand_in():
    pytest.importorskip("rdkit")
    task = tasks.polarizability(jr.key(4), molecules=30, widths=(3, 2))
    assert task.truth.title == "enumerated molecules (RDKit), 15 for training"
    metric = value(task.metrics["train"], task.model)
    assert_allclose(metric, 2 * value(task.loss, task.model), rtol=1e-12)


def test_symbol_addition():
    make = lambda **options: tasks.symbol_addition(jr.key(5), width=6, **options)
    task, large = make(), make(init_scale=3.0)
    pairs = np.concatenate([task.loss.x, task.metrics["test"].fn.loss.x])
    assert task.loss.x.shape == (45, 2)
    assert len(np.unique(pairs, axis=0)) == 55 and (pairs[:, 0] <= pairs[:, 1]).all()
    targets = np.asarray(task.truth.vectors)[np.asarray(task.loss.x).sum(1) % 10]
    assert_allclose(task.loss.y, targets)
    assert_allclose(large.model.embedding, task.model.embedding)
    assert_allclose(norm(large.model.decoder), 3 * norm(task.model.decoder), rtol=1e-12)
    metric = value(task.metrics["train"], task.model)
    assert_allclose(metric, 2 * value(task.loss, task.model) / 30, rtol=1e-12)
    # A messier embedding is another one, of the same pairs and targets.
    messy = make(messiness=0.5)
    assert_allclose(messy.loss.y, task.loss.y)
    assert abs(messy.model.embedding - task.model.embedding).max() > 0.1


@pytest.mark.slow
def test_descent_learns_a_table_of_sums():
    """The whole way: a small transformer memorises what it sees."""
    task = tasks.modular_transformer(
        jr.key(6), modulus=5, fraction=0.6, width=8, heads=2, hidden=8
    )
    path = gf.descent(
        task.flow,
        task.model,
        weight_decay=0.0,
        learning_rate=0.02,
        steps=150,
        saves=3,
        optimiser=optax.adam,
        metrics=task.metrics,
    )
    assert path.metrics["train"][0] < 0.7 and path.metrics["train"][-1] == 1


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: tasks.modular_transformer(jr.key(0), fraction=1.0), "fraction"),
        (
            lambda: tasks.modular_transformer(
                jr.key(0), modulus=6, operation="division"
            ),
            "modulus: expected a prime number, got 6",
        ),
        (lambda: tasks.symbol_addition(jr.key(0), train=55), "train: expected at most"),
        (lambda: tasks.image_mlp(jr.key(0), init_scale=0.0), "init_scale"),
        (lambda: tasks.teacher_mlp(jr.key(0), tolerance=0.0), "tolerance"),
        (lambda: tasks.sentiment(jr.key(0), samples=2), "samples"),
        (lambda: tasks.polarizability(jr.key(0), molecules=3), "molecules"),
    ],
)
def test_settings_that_make_no_sense(make, match):
    with pytest.raises(ValueError, match=match):
        make()
