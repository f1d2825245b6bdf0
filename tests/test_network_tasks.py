"""Networks of the second paper: models written out, data as specified, files read."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from idx_files import write_mnist
from numpy.testing import assert_allclose, assert_array_equal

import gradflow as gf
from gradflow import tasks
from gradflow.data import MNIST_SHA256, read_idx
from gradflow.models import PairProduct, TwoLayer


@pytest.fixture(scope="module")
def addition():
    return tasks.modular_addition(jr.key(0), modulus=7, side=3, width=5)


@pytest.fixture(scope="module")
def wide():
    return tasks.wide_teacher(
        jr.key(1), inputs=6, width=9, samples=4, test_samples=50, init_scale=2.0
    )


def test_pair_product_written_out(addition):
    model = addition.model
    left, right, inner, outer = map(
        np.asarray, (model.left, model.right, model.inner, model.outer)
    )
    assert [w.shape for w in (left, right, inner, outer)] == [
        (7, 9),
        (7, 9),
        (5, 9),
        (7, 5),
    ]
    product = (left[2].reshape(3, 3) @ right[5].reshape(3, 3)).reshape(9)
    expected = outer @ np.maximum(inner @ product, 0)
    assert_allclose(model(jnp.array([2, 5])), expected, rtol=1e-13)


def test_modular_addition_splits_the_table(addition):
    seen, unseen = addition.loss.x, addition.metrics["test"].fn.x
    assert seen.shape == (19, 2)  # ⌊0.4 · 49⌋
    both = np.concatenate([seen, unseen])
    table = {(a, b) for a in range(7) for b in range(7)}
    assert {tuple(pair) for pair in both.tolist()} == table and len(both) == 49
    assert_array_equal(addition.loss.labels, (seen[:, 0] + seen[:, 1]) % 7)
    other = tasks.modular_addition(jr.key(2), modulus=7, side=3, width=5)
    assert not eqx.tree_equal(other.loss, addition.loss)


def test_size_and_start_are_the_papers():
    """Four matrices of 97 × 64, 97 × 64, 64 × 64, 97 × 64; standard deviations 1/√64,
    1/√64, 1/√64, 1/√97."""
    task = tasks.modular_addition(jr.key(0))
    model = task.model
    assert task.loss.labels.size == int(0.4 * 97**2) == 3763
    shapes = [(97, 64), (97, 64), (64, 64), (97, 64)]
    assert [w.shape for w in jax.tree.leaves(model)] == shapes
    deviations = [float(jnp.std(w)) for w in jax.tree.leaves(model)]
    assert_allclose(deviations, [0.125, 0.125, 0.125, 97**-0.5], rtol=0.03)
    assert isinstance(task.penalty, gf.L1)


def test_accuracy():
    logits = {0: [0.0, 1.0], 1: [2.0, 1.0], 2: [0.0, 3.0]}
    table = jnp.array([logits[i] for i in range(3)])
    accuracy = gf.Accuracy(jnp.arange(3), jnp.array([1, 1, 1]))
    assert_allclose(accuracy(lambda i: table[i]), 2 / 3)
    assert accuracy(lambda i: table[i].astype(jnp.float32)).dtype == jnp.float32
    with pytest.raises(ValueError, match="labels"):
        gf.Accuracy(jnp.arange(3), jnp.array([1, 1]))


def test_a_small_table_is_learnt_by_descent(addition):
    """Pairs that are seen are learnt; the task, its penalty and its metrics go through
    `descent` as they are."""
    import optax

    path = gf.descent(
        addition.flow,
        addition.model,
        weight_decay=1e-5,
        learning_rate=1e-2,
        optimiser=optax.adam,
        steps=300,
        saves=5,
        batch_size=10,
        key=jr.key(3),
        metrics=addition.metrics,
    )
    assert path.metrics["train"][-1] == 1.0
    norm = sum(np.abs(w[-1]).sum() for w in jax.tree.leaves(path.params))
    assert_allclose(path.penalty[-1], norm, rtol=1e-12)


def test_network_without_biases():
    inner, outer = jr.normal(jr.key(4), (5, 3)), jr.normal(jr.key(5), (2, 5))
    x = jr.normal(jr.key(6), (3,))
    bare = TwoLayer(inner, None, outer, "relu")
    assert_allclose(bare(x), outer @ np.maximum(inner @ x, 0), rtol=1e-13)
    assert_array_equal(bare.biases, np.zeros(5))
    zero = TwoLayer(inner, jnp.zeros(5), outer, "relu")
    assert_allclose(zero(x), bare(x), rtol=1e-14)
    assert len(jax.tree.leaves(bare)) == 2


def test_wide_teacher(wide):
    teacher = wide.truth.teacher
    assert float(wide.loss(teacher)) == 0
    x, y = np.asarray(wide.loss.x), np.asarray(wide.loss.y)
    active = np.maximum(x @ teacher.inner.T, 0)
    assert_allclose(y, active @ teacher.outer.T, rtol=1e-12)
    # With two outputs the loss is the mean over all numbers.
    z = jax.vmap(wide.model)(wide.loss.x)
    assert_allclose(wide.loss(wide.model), np.mean((z - y) ** 2), rtol=1e-13)
    assert_allclose(jnp.std(wide.model.inner), 2 / 3, rtol=0.2)
    assert_allclose(wide.truth.jacobian(wide.loss.x), jax.vmap(jax.jacfwd(teacher))(x))


def test_the_sobolev_penalty_vanishes_at_the_teacher(wide):
    assert float(wide.penalty(wide.truth.teacher)) < 1e-28
    gap = jax.vmap(jax.jacfwd(wide.model))(wide.loss.x)
    gap = gap - wide.truth.jacobian(wide.loss.x)
    expected = np.sum(np.asarray(gap) ** 2) / 4
    assert_allclose(wide.penalty(wide.model), expected, rtol=1e-12)


@pytest.fixture
def mnist_folder(tmp_path):
    return write_mnist(tmp_path, samples=40, test_samples=10)


@pytest.mark.slow
def test_images_from_files(mnist_folder, monkeypatch):
    make = lambda **options: tasks.image_classification(
        jr.key(7), samples=30, width=4, published=False, **options
    )
    task = make(data=mnist_folder)
    assert task.truth.data == "images from unchecked files"
    assert task.loss.x.shape == (30, 6) and task.metrics["test"].fn.x.shape == (10, 6)
    for x, labels in (
        (task.loss.x, task.loss.labels),
        (task.metrics["test"].fn.x, task.metrics["test"].fn.labels),
    ):
        assert_allclose(x[:, 0] * 255, labels)
    assert len(np.unique(task.loss.x, axis=0)) == 30
    monkeypatch.setenv("GRADFLOW_DATA", str(mnist_folder))
    assert eqx.tree_equal(make(), task)
    assert make(test_samples=5).metrics["test"].fn.labels.size == 5


def test_files_that_are_not_right(mnist_folder, tmp_path):
    labels = mnist_folder / "MNIST/raw/train-labels-idx1-ubyte"
    whole = labels.read_bytes()
    for content, match in {whole[:-1]: "39 entries", b"abc": "IDX format"}.items():
        labels.write_bytes(content)
        with pytest.raises(ValueError, match=match):
            read_idx(labels)
    labels.write_bytes(whole)
    # Whole files, but not those of MNIST.
    for make in (tasks.image_classification, tasks.image_mlp):
        with pytest.raises(ValueError, match=f"SHA-256 {MNIST_SHA256['images']}.*http"):
            make(jr.key(0), data=mnist_folder)
    labels.unlink()
    with pytest.raises(ValueError, match="expected a folder"):
        tasks.image_classification(jr.key(0), data=mnist_folder)


def test_images_of_scikit_learn(monkeypatch):
    monkeypatch.delenv("GRADFLOW_DATA", raising=False)
    pytest.importorskip("sklearn")
    task = tasks.image_classification(jr.key(8))
    assert task.truth.data == "scikit-learn digits"
    assert task.loss.x.shape == (1000, 64)
    assert task.metrics["test"].fn.x.shape == (797, 64)
    assert task.loss.x.min() == 0 and task.loss.x.max() == 1


def test_without_images(monkeypatch):
    monkeypatch.delenv("GRADFLOW_DATA", raising=False)
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match="GRADFLOW_DATA"):
        tasks.image_classification(jr.key(0))


def test_bad_settings_are_named():
    key = jr.key(0)
    flat = jnp.zeros((4, 9))
    for match, call in {
        "modulus": lambda: tasks.modular_addition(key, modulus=1),
        "fraction: expected a num": lambda: tasks.modular_addition(key, fraction=2.0),
        "fraction: expected some": lambda: tasks.modular_addition(key, fraction=1.0),
        "init_scale": lambda: tasks.wide_teacher(key, init_scale=0.0),
        "samples": lambda: tasks.wide_teacher(key, samples=0),
        "left": lambda: PairProduct(*[flat[:, :8]] * 4),
        "right": lambda: PairProduct(flat, flat[:, :4], flat, flat[:, :4]),
        "outer": lambda: PairProduct(flat, flat, flat, flat[:, :3]),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
