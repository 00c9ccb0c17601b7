"""Generated word counts, which replace Enron1. A few mails are far longer than most."""

from pathlib import Path

import numpy as np
import scipy.sparse

from data.splits import DataSet, Split

NUM_TRAIN, NUM_TEST = 1_000, 300
NUM_WORDS = 1_500
SPAM_SHARE = 0.3
MIN_TRAINING_MAILS = 5  # the vocabulary has the words of at least this many training mails
SEED = 0

# The log of a word's rate in spam over its rate in ham has this standard deviation.
_CONTRAST = 2.0
_BURSTINESS = 0.3  # a gamma factor of this shape scales each word's rate in each mail
_LENGTH, _SPREAD = 60, 1.0  # median length of a mail in words; deviation of its logarithm


def read(folder: Path, dtype: np.dtype) -> tuple[Split, Split]:
    """Draw the word counts of mails.

    Word frequencies follow Zipf's law. Each word has its own ratio of the rates in spam and ham.

    Args:
      folder: ignored; every reader has this argument.
      dtype: dtype of x, float32 or float64.
    Returns: (train, test), each (x, y): x a CSR matrix (n, d), y (n,) int64, 1 for spam.
    """
    # RandomState, unlike default_rng, gives the same numbers in every version of NumPy.
    rng = np.random.RandomState(SEED)
    num_mails = NUM_TRAIN + NUM_TEST
    y = (rng.random_sample(num_mails) < SPAM_SHARE).astype(np.int64)
    frequency = 1 / np.arange(1, NUM_WORDS + 1)
    contrast = np.exp(_CONTRAST * rng.standard_normal(NUM_WORDS) / 2)
    rates = np.stack([frequency / contrast, frequency * contrast])
    rates /= rates.sum(axis=1, keepdims=True)
    lengths = _LENGTH * np.exp(_SPREAD * rng.standard_normal(num_mails))
    bursts = rng.gamma(_BURSTINESS, 1 / _BURSTINESS, (num_mails, NUM_WORDS))
    x = rng.poisson(lengths[:, None] * rates[y] * bursts)
    x = x[:, (x[:NUM_TRAIN] > 0).sum(axis=0) >= MIN_TRAINING_MAILS]
    x = scipy.sparse.csr_matrix(x.astype(dtype))
    return (x[:NUM_TRAIN], y[:NUM_TRAIN]), (x[NUM_TRAIN:], y[NUM_TRAIN:])


DATASET = DataSet(
    name="spam",
    what="stand-in for enron1, generated: 1,000 train, 300 test",
    terms="none needed",
    read=read,
    stand_in=True,
)
