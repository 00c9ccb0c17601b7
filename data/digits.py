"""The small data set of digits that comes with scikit-learn. It can replace MNIST."""

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
    Returns: (train, test), each (x, y), of 1,297 and 500 rows. x has shape (n, 64) and the value
      k/16 for grey level k, which is exact in both dtypes. y has shape (n,), int64 in 0..9.
    """
    from sklearn.datasets import load_digits  # this import is slow, and MNIST does not need it

    pixels, labels = load_digits(return_X_y=True)
    x, y = np.asarray(pixels / 16, dtype=dtype), np.asarray(labels, dtype=np.int64)
    # The rows are ordered by writer, so we shuffle them before the split. RandomState gives the
    # same permutation in every version of NumPy.
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
