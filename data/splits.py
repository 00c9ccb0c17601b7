"""A data set before it is read (DataSet) and after (Splits)."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

from data.files import DataFile

Split = tuple[Any, np.ndarray]  # (x, y) with one row per example; x is an array or a CSR matrix


@dataclass(frozen=True, eq=False)  # == of two arrays gives an array, not a bool
class Splits:
    """A data set in memory, split as the experiments use it.

    The arrays are read-only. An experiment that changes labels or pixels works on a copy.

    Attributes:
      name: name of the data set.
      train: the training set (x, y). x has shape (n, ...) and is an array or a CSR matrix. y has
        shape (n,) and dtype int64.
      test: the test set, in the same form.
      stand_in: True if the data set replaces another one that needs files.
      sha256: the digest of all files read, in hex, or of the arrays if there are no files.
      feature_names: names of the columns of x; empty if they have no names.
      folder: the data folder of the files; None if there are no files.
    """

    name: str
    train: Split = field(repr=False)
    test: Split = field(repr=False)
    stand_in: bool
    sha256: str
    feature_names: tuple[str, ...] = field(default=(), repr=False)
    folder: Path | None = field(default=None, repr=False)

    def __post_init__(self):
        """Make the arrays read-only."""
        for part in (*self.train, *self.test):
            for array in _arrays(part):
                array.setflags(write=False)

    def of_classes(self, *classes: int) -> "Splits":
        """Select the rows of some classes. The order of the rows does not change.

        Args:
          classes: labels, each once. The rows of classes[k] get label k.
        Returns: new Splits with the same digest.
        Raises: ValueError if a class is named twice or has no row in one of the splits.
        """
        if len(set(classes)) < len(classes):
            raise ValueError(f"classes must name each label once, got {classes}.")
        parts = []
        for name, (x, y) in (("train", self.train), ("test", self.test)):
            missing = set(classes) - set(y.tolist())
            if missing:
                raise ValueError(f"classes must have rows in {name}, {min(missing)} has none.")
            rows = np.flatnonzero(np.isin(y, classes))
            order = np.argsort(classes)
            numbers = order[np.searchsorted(np.asarray(classes)[order], y[rows])]
            parts.append((x[rows], numbers.astype(np.int64)))
        return replace(self, train=parts[0], test=parts[1])


@dataclass(frozen=True)
class DataSet:
    """The files, the licence and the reader of one data set.

    Every data set has its own module in this folder.

    Attributes:
      name: the name that `load` accepts.
      what: a short description, shown by `python -m data list`.
      terms: the licence.
      read: a function of the data folder and the dtype of x. It returns (train, test) or (train,
        test, feature_names). `load` calls it after checking the files.
      files: the files of the data set; empty if it is embedded or generated.
      stand_in: True if the data set replaces another one.
    """

    name: str
    what: str
    terms: str
    read: Callable[[Path, np.dtype], tuple[Split, Split] | tuple[Split, Split, tuple[str, ...]]]
    files: tuple[DataFile, ...] = ()
    stand_in: bool = False


def sha256_of_arrays(arrays: Iterable[Any]) -> str:
    """Compute the SHA-256 of the shapes and values of real arrays and CSR matrices, in hex.

    Values are converted to little-endian float64, so equal values give the same digest in every
    dtype and on every machine.
    """
    digest = hashlib.sha256()
    for whole in arrays:
        digest.update(repr(whole.shape).encode())
        for array in _arrays(whole):
            digest.update(np.ascontiguousarray(array, dtype="<f8").tobytes())
    return digest.hexdigest()


def _arrays(part: Any) -> tuple[np.ndarray, ...]:
    """Return a tuple of the array, or of the three arrays of a CSR matrix."""
    if scipy.sparse.issparse(part):
        return part.data, part.indices, part.indptr
    return (part,)
