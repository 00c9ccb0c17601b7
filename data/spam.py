"""Generated word counts of mails, which can replace Enron1. A few mails are very long."""

from pathlib import Path

import numpy as np
import scipy.sparse

from data.splits import DataSet, Split

NUM_TRAIN, NUM_TEST = 1_000, 300
NUM_WORDS = 1_500
SPAM_SHARE = 0.3
# The vocabulary consists of the words that occur in at least this many training mails.
MIN_TRAINING_MAILS = 5
SEED = 0

# log(rate in spam / rate in ham) of a word is random and has this standard deviation.
_CONTRAST = 2.0
# In each mail, a gamma variable with this shape parameter multiplies the rate of each word.
_BURSTINESS = 0.3
# The length of a mail in words has this median, and its logarithm this standard deviation.
_LENGTH, _SPREAD = 60, 1.0


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
