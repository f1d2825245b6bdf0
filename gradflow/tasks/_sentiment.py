"""Praise or blame, told from the words of a review."""

from pathlib import Path

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import PRNGKeyArray

from .._checks import check_positive
from .._typing import Given
from ..data import (
    imdb,
    imdb_path,
    IMDB_SHA256,
    own_reviews,
    synthetic_reviews,
    Vocabulary,
    words_of,
)
from ..flow.flow import scaled
from ..losses import Logistic
from ..metrics import Accuracy, Metric
from ..models import LSTMClassifier
from ._checks import check_count
from ._image_mlp import DataTruth
from ._own import own
from ._task import Task


def sentiment(
    key: PRNGKeyArray,
    *,
    samples: int = 1000,
    words: int = 1000,
    length: int | None = None,
    embedding: int = 64,
    state: int = 128,
    init_scale: float = 1.0,
    data: str | Path | None = None,
    published: bool = True,
    texts: Given = None,
    labels: Given = None,
) -> Task:
    """Whether a review praises or blames, by an `LSTMClassifier` of two layers; the
    mean logistic loss (Liu, Michaud, Tegmark, arXiv 2210.01117, figure 4).

    The reviews are those that are given, or else IMDb's where they are at hand (no
    package that we know of has them), and else made up by the grammar of
    `gradflow.data.synthetic_reviews`: synthetic, as `truth.data` says. Three quarters
    of the first `samples` of them, chosen at random, are learnt, the others are for the
    test. Known are the most frequent words of those that are learnt; others are left
    out, and zeros before the words fill a review up.

    The metrics are accuracies: on the training samples, with threshold 0.99, and on the
    test samples, with threshold 0.65 (with 750 of IMDb's to learn from, the paper's
    networks reach about 0.7).

    **Arguments:**

    - `key`: of the choice of training samples, and of the initial weights.
    - `samples`: reviews, for training and test.
    - `words`: how many are known.
    - `length`: words that are read: 500 unless given, or 64 of made-up reviews, or as
        many as the longest of your own has, if those are fewer.
    - `embedding`, `state`: numbers for each word, and of the state of each layer.
    - `init_scale`: α, by which the initial weights are multiplied; 6 in the paper.
    - `data`: the folder with "IMDB Dataset.csv" or aclImdb, or a file .npz of the two
        arrays below; unless given, the folder named by the environment variable
        GRADFLOW_DATA.
    - `published`: whether they must be the published reviews, by their checksum or
        number; others are named "reviews from unchecked files".
    - `texts`, `labels`: reviews of your own, a list of n words or sentences, and n
        numbers, 1 for praise and 0 for blame.

    **Returns:** a task whose truth is a `DataTruth`.

    **Raises:** `ValueError` where an argument is out of range, or a file or an array
    is not right.
    """
    check_count(samples, "samples", least=4)
    check_count(words, "words")
    check_positive(init_scale, "init_scale")
    split_key, text_key, init_key = jr.split(key, 3)
    given = own(data, "reviews", texts=texts, labels=labels)
    path = None if given is not None else imdb_path(data)
    made_up = given is None and path is None
    if given is not None:
        found = own_reviews(given.arrays, given.name, given.where)
    elif path is not None:
        found = imdb(path, sha256=IMDB_SHA256 if published else None)
    else:
        seed = int(jr.randint(text_key, (), 0, 2**31 - 1))
        found = synthetic_reviews(seed, samples)
    check_count(samples, "samples", most=len(found.texts))
    texts, labels = found.texts, found.labels
    if length is None:
        length = 64 if made_up else 500
    if given is not None:
        length = min(length, max(1, *(len(words_of(text)) for text in texts)))
    check_count(length, "length")
    order = np.asarray(jr.permutation(split_key, samples))
    cut = samples - samples // 4
    train, test = order[:cut], order[cut:]
    vocabulary = Vocabulary.of([texts[i] for i in train], words=words)
    encode = lambda places: jnp.asarray(
        vocabulary.encode([texts[i] for i in places], length=length)
    )
    x, x_test = encode(train), encode(test)
    y, y_test = jnp.asarray(labels[train]), jnp.asarray(labels[test])
    model = LSTMClassifier(
        words=words + 1, embedding=embedding, state=state, key=init_key
    )
    high = lambda x, y, level: Metric(
        Accuracy(x, y), threshold=level, higher_is_better=True
    )
    return Task(
        name="sentiment",
        model=scaled(model, init_scale),
        loss=Logistic(x, y),
        metrics={"train": high(x, y, 0.99), "test": high(x_test, y_test, 0.65)},
        truth=DataTruth(
            found.data,
            f"{found.data}, {cut} for training",
            None if made_up else len(texts),
        ),
        codimension=None,
        slow_time=10.0,
    )
