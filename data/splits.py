"""What a data set is before it is read (DataSet) and after (Splits)."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.files import DataFile

Split = tuple[np.ndarray, np.ndarray]  # (x, y), an example a row in each


@dataclass(frozen=True, eq=False)  # eq of arrays is an array, not a bool
class Splits:
    """A data set in memory, split as the experiments use it.

    The arrays are made read-only: an experiment that changes labels or pixels works on a copy.

    Attributes:
      name: of the data set.
      train: (x, y), x of shape (n, ...) in the dtype asked for, y of shape (n,) int64.
      test: likewise.
      stand_in: True if this stands in for another data set that needs files; results then say so.
      sha256: one digest over the digests of the files read, or of the arrays if there were none.
    """

    name: str
    train: Split = field(repr=False)
    test: Split = field(repr=False)
    stand_in: bool
    sha256: str

    def __post_init__(self):
        """Make the arrays read-only."""
        for array in (*self.train, *self.test):
            array.setflags(write=False)


@dataclass(frozen=True)
class DataSet:
    """How one data set is found, checked and read; each has a file of its own beside this one.

    Attributes:
      name: what `load` is asked for.
      what: a line describing it.
      terms: its licence.
      read: (folder, dtype) -> (train, test), called once the files there are known to be good.
      files: what it is read from; empty if it is embedded or generated.
      stand_in: whether it stands in for another.
    """

    name: str
    what: str
    terms: str
    read: Callable[[Path, np.dtype], tuple[Split, Split]]
    files: tuple[DataFile, ...] = ()
    stand_in: bool = False


def sha256_of_arrays(arrays: Iterable[np.ndarray]) -> str:
    """SHA-256 in hex of the shapes and values of real arrays.

    Values are taken as little-endian float64, so that a change of dtype or machine that leaves
    every value what it was leaves the digest what it was.
    """
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(repr(array.shape).encode())
        digest.update(np.ascontiguousarray(array, dtype="<f8").tobytes())
    return digest.hexdigest()
