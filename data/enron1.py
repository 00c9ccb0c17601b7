"""Enron1 as in Koh & Liang (2017, section 5.4): 4,137 training and 1,035 test mails as word counts.

The mails are those of Metsis, Androutsopoulos & Paliouras (2006). They are from real people, for
research use. This module returns only counts, no text.
"""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np

from data.archive import read_folder, read_tar
from data.files import DataFile, located
from data.splits import DataSet, Split

TRAIN_SHARE = 0.8  # release 8ca7b4f, scripts/load_spam.py
MIN_TRAINING_MAILS = 5  # with a word of the vocabulary (release, nlprocessor.py: min_df=5)
# The release's seed. The release shuffles the order of os.listdir, which differs between machines.
SHUFFLE_SEED = 0

_FILE = DataFile(
    path="enron1/enron1.tar.gz",
    size=5_425_224,
    # Digest of the folder, as printed there by
    # `find . -type f | sed 's|^./||' | LC_ALL=C sort | xargs sha256sum | sha256sum`.
    digests=("72aed9a0dd857da762488f03852902c11ae43d6f968dde3836cc12af2921406b",),
    urls=("http://www.aueb.gr/users/ion/data/enron-spam/preprocessed/enron1.tar.gz",),
    unpacked="enron1/enron1",
)


def read(folder: Path, dtype: np.dtype) -> tuple[Split, Split]:
    """Read, shuffle, split and count.

    Args:
      folder: the data folder, with `enron1/enron1.tar.gz` or the folder `enron1/enron1` in it.
      dtype: dtype of x, float32 or float64.
    Returns: (train, test), each (x, y): x (n, d) CSR, the count of each word in each mail; y (n,)
      int64, 1 for spam.
    Raises: ValueError naming the archive if it is not one.
    """
    place = located(_FILE, folder)
    assert place is not None  # `load` found it
    files = read_folder(place) if place.is_dir() else read_tar(place, _FILE.size)
    names = [name for name in sorted(files) if name.startswith(("ham/", "spam/"))]
    # RandomState, unlike default_rng, gives the same permutation in every version of NumPy.
    names = [names[i] for i in np.random.RandomState(SHUFFLE_SEED).permutation(len(names))]
    y = np.array([name.startswith("spam/") for name in names], dtype=np.int64)
    num_train = int(TRAIN_SHARE * len(names))
    texts = [files[name].decode("latin-1") for name in names]
    x, x_test = counts(texts[:num_train], texts[num_train:], dtype)
    return (x, y[:num_train]), (x_test, y[num_train:])


def counts(train: Iterable[str], test: Iterable[str], dtype: np.dtype) -> tuple:
    """Count in each mail the words that enough training mails contain.

    Args:
      train: texts, which also determine the vocabulary.
      test: texts.
      dtype: dtype of the counts.
    Returns: two CSR matrices, columns in alphabetical order of the words.
    """
    from sklearn.feature_extraction.text import CountVectorizer  # this import takes a second

    vectorizer = CountVectorizer(analyzer=words, min_df=MIN_TRAINING_MAILS, dtype=dtype)  # pyright: ignore[reportArgumentType]
    parts = vectorizer.fit_transform(train), vectorizer.transform(test)
    for part in parts:
        part.sort_indices()  # now, because the arrays are read-only later
    return parts


def words(text: str) -> list[str]:
    """List the lemmas of a text's words of two letters or more, without stop words.

    Args:
      text: any text.
    Returns: lower-case lemmas, in order, with repetitions.
    """
    tokens = re.findall(r"\w+", text.lower())
    lemmas = (_lemma(token) for token in tokens if len(token) > 1 and token.isalpha())
    return [lemma for lemma in lemmas if lemma]


@cache
def _lemma(word: str) -> str:
    """Return the dictionary form of a word, "" for a stop word."""
    import simplemma
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return "" if word in ENGLISH_STOP_WORDS else simplemma.lemmatize(word, lang="en").lower()


DATASET = DataSet(
    name="enron1",
    what="mails as word counts: 4,137 train, 1,035 test, 29 % spam",
    terms="free for research (Metsis et al. 2006)",
    read=read,
    files=(_FILE,),
)
