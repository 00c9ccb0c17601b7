"""Enron1 as in Koh & Liang (2017, section 5.4): 4,137 training and 1,035 test mails as word counts.

Metsis, Androutsopoulos & Paliouras (2006) published the mails for research. Real people wrote
them, so this module returns only counts of words.
"""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np

from data.archive import read_folder, read_tar
from data.files import DataFile, located
from data.splits import DataSet, Split

# This share of the mails is for training (authors' 2017 code, 8ca7b4f, scripts/load_spam.py).
TRAIN_SHARE = 0.8
# The vocabulary consists of the words that occur in at least this many training mails
# (nlprocessor.py).
MIN_TRAINING_MAILS = 5
# This is the shuffle seed of the authors' 2017 code. The order there also depends on os.listdir,
# so ours differs.
SHUFFLE_SEED = 0

_FILE = DataFile(
    path="enron1/enron1.tar.gz",
    size=5_425_224,
    # The digest of the unpacked folder. In that folder, this command prints it:
    # `find . -type f | sed 's|^./||' | LC_ALL=C sort | xargs sha256sum | sha256sum`.
    digests=("72aed9a0dd857da762488f03852902c11ae43d6f968dde3836cc12af2921406b",),
    urls=("http://www.aueb.gr/users/ion/data/enron-spam/preprocessed/enron1.tar.gz",),
    unpacked="enron1/enron1",
)


def read(folder: Path, dtype: np.dtype) -> tuple[Split, Split]:
    """Read and shuffle the mails, split them, and count their words.

    Args:
      folder: the data folder, with `enron1/enron1.tar.gz` or the folder `enron1/enron1` in it.
      dtype: dtype of x, float32 or float64.
    Returns: (train, test), each (x, y). x is a CSR matrix (n, d) with the count of each word in
      each mail. y has shape (n,), int64, 1 for spam.
    Raises: ValueError naming the archive if it is not a valid gzipped tar archive.
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
    """Count the words of the vocabulary in each mail.

    Args:
      train: texts of the training mails, which determine the vocabulary.
      test: texts of the test mails.
      dtype: dtype of the counts.
    Returns: the CSR matrices of train and test, columns in alphabetical order of the words.
    """
    from sklearn.feature_extraction.text import CountVectorizer  # this import takes a second

    vectorizer = CountVectorizer(analyzer=words, min_df=MIN_TRAINING_MAILS, dtype=dtype)  # pyright: ignore[reportArgumentType]
    parts = vectorizer.fit_transform(train), vectorizer.transform(test)
    for part in parts:
        part.sort_indices()  # later the arrays are read-only and cannot be sorted
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
    """Return the dictionary form of a word, or "" for a stop word."""
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
