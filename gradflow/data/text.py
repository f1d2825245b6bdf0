"""Reviews that praise or blame: IMDb's, from files at hand, and their words."""

import csv
import io
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ._files import find, how, problem, read

IMDB_SHA256 = "dfc447764f82be365fa9c2beef4e8df89d3919e3da95f5088004797d79695aa2"
"""Checksum of "IMDB Dataset.csv", of 50 000 reviews."""

_HOW = how(
    'The reviews of IMDb (Maas et al., 2011) are published as "IMDB Dataset.csv", at '
    "https://www.kaggle.com/datasets/lakshmi25npathi/"
    "imdb-dataset-of-50k-movie-reviews, and as the folder aclImdb, unpacked from "
    "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz; no package that "
    "we know of, of PyPI, npm or Debian, has them.",
    "texts= and labels=",
)
_LABELS = {"negative": 0, "positive": 1}
_KINDS = {"neg": 0, "pos": 1}
# Words that say little: articles, pronouns, prepositions, auxiliaries.
_STOP_WORDS = frozenset(
    """a about above after again all am an and any are as at be because been before
    being below between both but by can did do does doing down during each few for from
    further had has have having he her here hers herself him himself his how i if in
    into is it its itself just me more most my myself now of off on once only or other
    our ours ourselves out over own same she should so some such than that the their
    theirs them themselves then there these they this those through to too under until
    up very was we were what when where which while who whom why will with you your
    yours yourself yourselves""".split()
)


class Reviews(NamedTuple):
    """Texts, and whether each praises (1) or blames (0)."""

    texts: list[str]
    """One for each review."""
    labels: np.ndarray
    """Integers, of shape (n,)."""
    data: str
    """Which they are: for titles."""


def imdb_path(folder: str | Path | None) -> Path | None:
    """Where the reviews of IMDb are: "IMDB Dataset.csv", or the folder aclImdb, in
    `folder`, else in the folder that GRADFLOW_DATA names, or in its IMDb or imdb.

    **Returns:** the path of either, or `None` where no folder is named, or the one that
    GRADFLOW_DATA names has none.

    **Raises:** `ValueError` where `folder` is given and has neither.
    """

    def at(place: Path) -> Path | None:
        if place.suffix == ".csv" and place.is_file():
            return place
        for path in (place / "IMDB Dataset.csv", place / "aclImdb"):
            if path.exists():
                return path
        return place if (place / "train" / "pos").is_dir() else None

    expected = '"IMDB Dataset.csv" or the folder aclImdb'
    return find(folder, at, ("", "IMDb", "imdb"), expected, _HOW)


def imdb(path: Path, *, sha256: str | None = IMDB_SHA256) -> Reviews:
    """The reviews of IMDb (Maas et al., ACL 2011).

    **Arguments:**

    - `path`: of the CSV file, with columns review and sentiment, or of the folder
        aclImdb, with a text file for each review in train and test, pos and neg.
    - `sha256`: the checksum of the CSV file; the folder, which has none, must have
        12 500 reviews in each of its four parts. `None` takes any reviews, and says so
        in `data`.

    **Returns:** the reviews; those of the folder alternate between praise and blame.

    **Raises:** `ValueError` where the files are damaged, or not those.
    """
    name = "IMDb" if sha256 is not None else "reviews from unchecked files"
    if path.is_dir():
        return Reviews(*_read_folder(path, 12_500 if sha256 else None), name)
    return Reviews(*_read_csv(path, sha256), name)


def _read_csv(path: Path, sha256: str | None) -> tuple[list[str], np.ndarray]:
    content = read(path, _HOW, sha256)
    try:
        lines = io.StringIO(content.decode("utf-8"), newline="")
    except UnicodeDecodeError as error:
        raise problem(path, "text in UTF-8", str(error), _HOW) from error
    rows = csv.reader(lines, strict=True)
    texts, labels = [], []
    try:
        header = next(rows, [])
        if header != ["review", "sentiment"]:
            expected = "the columns review and sentiment"
            raise problem(path, expected, f"{header}"[:60], _HOW)
        for row in rows:
            if len(row) != 2 or row[1] not in _LABELS:
                expected = "a review, and positive or negative"
                got = f"{row[1:]} after it in line {rows.line_num}"
                raise problem(path, expected, got, _HOW)
            texts.append(row[0])
            labels.append(_LABELS[row[1]])
    except csv.Error as error:
        got = f"{error} in line {rows.line_num}"
        raise problem(path, "a whole CSV file", got, _HOW) from error
    if not texts:
        raise problem(path, "reviews", "none", _HOW)
    return texts, np.array(labels)


def _read_folder(path: Path, count: int | None) -> tuple[list[str], np.ndarray]:
    texts, labels = [], []
    for part in ("train", "test"):
        names = {kind: sorted((path / part / kind).glob("*.txt")) for kind in _KINDS}
        for kind, files in names.items():
            if not files or (count is not None and len(files) != count):
                expected = f"{count or 'some'} reviews, each a file .txt"
                raise problem(path / part / kind, expected, str(len(files)), _HOW)
        # By their place in the list, so that praise and blame take turns.
        turns = sorted((n, kind) for kind in _KINDS for n in range(len(names[kind])))
        for n, kind in turns:
            file = names[kind][n]
            try:
                texts.append(read(file, _HOW).decode("utf-8"))
            except UnicodeDecodeError as error:
                raise problem(file, "text in UTF-8", str(error), _HOW) from error
            if not texts[-1].strip():
                raise problem(file, "a review", "an empty file", _HOW)
            labels.append(_KINDS[kind])
    return texts, np.array(labels)


def words_of(text: str) -> list[str]:
    """The words of `text` that count: in small letters, without markup, numbers and
    words that say little."""
    plain = re.sub(r"<[^>]*>", " ", text.lower())
    found = re.findall(r"[a-z]+", re.sub(r"['’]", "", plain))
    return [word for word in found if word not in _STOP_WORDS]


class Vocabulary(NamedTuple):
    """The numbers of the words that are known, from 1 on."""

    numbers: dict[str, int]
    """By the words."""

    @classmethod
    def of(cls, texts: Sequence[str], *, words: int) -> "Vocabulary":
        """That of the `words` most frequent words of `texts`; of equally frequent ones,
        the first in the alphabet."""
        counts = Counter(word for text in texts for word in words_of(text))
        order = sorted(counts, key=lambda word: (-counts[word], word))[:words]
        return cls({word: n for n, word in enumerate(order, start=1)})

    def encode(self, texts: Sequence[str], *, length: int) -> np.ndarray:
        """The first `length` known words of each of `texts`, by their numbers, after as
        many zeros as it takes to make `length` of them. Shape (texts, length)."""
        out = np.zeros((len(texts), length), int)
        for row, text in zip(out, texts, strict=True):
            known = [self.numbers[w] for w in words_of(text) if w in self.numbers]
            known = known[:length]
            row[length - len(known) :] = known
        return out
