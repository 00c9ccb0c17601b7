"""scikit-learn's digits, the stand-in of MNIST: small, and part of every scikit-learn."""

from pathlib import Path

import numpy as np

from data.splits import DataSet, Split

NUM_TEST = 500
SPLIT_SEED = 0


def read(folder: Path, dtype: np.dtype) -> tuple[Split, Split]:
    """Read and split the 1,797 digits that come with scikit-learn.

    Args:
      folder: ignored; every reader has this argument.
      dtype: dtype of x, float32 or float64.
    Returns: (train, test), each (x, y): 1,297 and 500 rows; x (n, 64), k/16 for grey level k, exact
      in both dtypes; y (n,) int64 in 0..9.
    """
    from sklearn.datasets import load_digits  # this import takes a second, not needed for MNIST

    pixels, labels = load_digits(return_X_y=True)
    x, y = np.asarray(pixels / 16, dtype=dtype), np.asarray(labels, dtype=np.int64)
    # The rows are ordered by writer, so the split is shuffled. RandomState, unlike default_rng,
    # gives the same permutation in every version of NumPy.
    order = np.random.RandomState(SPLIT_SEED).permutation(len(x))
    train, test = order[NUM_TEST:], order[:NUM_TEST]
    return (x[train], y[train]), (x[test], y[test])


DATASET = DataSet(
    name="digits",
    what="stand-in for mnist, 8x8: 1,297 train, 500 test",
    terms="CC BY 4.0 (Alpaydin, Kaynak)",
    read=read,
    stand_in=True,
)
