"""MNIST, split as in Koh & Liang (2017, section 4.1): 55,000 training and 10,000 test digits."""

from pathlib import Path

import numpy as np

from data.files import DataFile
from data.idx import read_idx
from data.splits import DataSet, Split

_MIRRORS = (
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
)

# The authors' code uses the first 5,000 of the 60,000 training rows as a validation set (8ca7b4f,
# scripts/load_mnist.py). This module leaves them out.
NUM_SET_ASIDE = 5_000


def read(folder: Path, dtype: np.dtype) -> tuple[Split, Split]:
    """Read both splits from the four idx files.

    Args:
      folder: the data folder, with `mnist/*.gz` in it.
      dtype: dtype of x, float32 or float64.
    Returns: (train, test), each (x, y). x has shape (n, 784) and the value k/255, rounded to
      `dtype`, for a pixel of value k. y has shape (n,), int64 in 0..9.
    Raises: ValueError naming a file that is not the expected idx file.
    """
    x, y = _read_pair(folder / "mnist", "train", 60_000)
    train = _scaled(x[NUM_SET_ASIDE:], dtype), y[NUM_SET_ASIDE:].astype(np.int64)
    x, y = _read_pair(folder / "mnist", "t10k", 10_000)
    return train, (_scaled(x, dtype), y.astype(np.int64))


def _read_pair(folder: Path, prefix: str, num_rows: int) -> Split:
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", (num_rows, 28, 28))
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", (num_rows,))
    return images.reshape(num_rows, 28 * 28), labels


def _scaled(pixels: np.ndarray, dtype: np.dtype) -> np.ndarray:
    # The division rounds only once, because k and 255 are exact in both dtypes.
    return np.divide(pixels, 255, dtype=dtype)


def _file(name: str, size: int, digest: str) -> DataFile:
    return DataFile(f"mnist/{name}", size, (digest,), tuple(base + name for base in _MIRRORS))


DATASET = DataSet(
    name="mnist",
    what="handwritten digits, 28x28: 55,000 train, 10,000 test",
    terms="CC BY-SA 3.0 (LeCun, Cortes)",
    read=read,
    files=(
        _file(
            "train-images-idx3-ubyte.gz",
            9_912_422,
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        ),
        _file(
            "train-labels-idx1-ubyte.gz",
            28_881,
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        ),
        _file(
            "t10k-images-idx3-ubyte.gz",
            1_648_877,
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        ),
        _file(
            "t10k-labels-idx1-ubyte.gz",
            4_542,
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    ),
)
