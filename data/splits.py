"""A data set before it is read (DataSet) and after (Splits)."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

from data.files import DataFile

Split = tuple[Any, np.ndarray]  # (x, y), one row per example; x is an array or CSR


@dataclass(frozen=True, eq=False)  # eq of arrays is an array, not a bool
class Splits:
    """A data set in memory, split as the experiments use it.

    The arrays are made read-only: an experiment that changes labels or pixels works on a copy.

    Attributes:
      name: name of the data set.
      train: (x, y): x of shape (n, ...) in the requested dtype, an array or a CSR matrix; y of
        shape (n,) int64.
      test: likewise.
      stand_in: True if it replaces another data set that needs files; results then say so.
      sha256: one digest of the digests of the files read, or of the arrays if there are no files.
      feature_names: names of the columns of x, empty if they have none.
      folder: the data folder that it was read from, None if it is embedded or generated.
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
        """Select the rows of some classes, in their order.

        Args:
          classes: labels, each once; classes[k] becomes label k.
        Returns: new Splits with the digest of the same files.
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
    """The files, the licence and the reader of one data set, each in a file beside this one.

    Attributes:
      name: its name for `load`.
      what: a line that describes it.
      terms: its licence.
      read: (folder, dtype) -> (train, test), or (train, test, feature_names); called after the
        files in the folder have been checked.
      files: the files that it is read from; empty if it is embedded or generated.
      stand_in: True if it replaces another data set.
    """

    name: str
    what: str
    terms: str
    read: Callable[[Path, np.dtype], tuple[Split, Split] | tuple[Split, Split, tuple[str, ...]]]
    files: tuple[DataFile, ...] = ()
    stand_in: bool = False


def sha256_of_arrays(arrays: Iterable[Any]) -> str:
    """Compute the SHA-256 in hex of the shapes and values of real arrays and CSR matrices.

    Values are converted to little-endian float64. So a change of dtype or machine that changes no
    value does not change the digest.
    """
    digest = hashlib.sha256()
    for whole in arrays:
        digest.update(repr(whole.shape).encode())
        for array in _arrays(whole):
            digest.update(np.ascontiguousarray(array, dtype="<f8").tobytes())
    return digest.hexdigest()


def _arrays(part: Any) -> tuple[np.ndarray, ...]:
    """Return an array, or the three arrays of a CSR matrix."""
    if scipy.sparse.issparse(part):
        return part.data, part.indices, part.indptr
    return (part,)
