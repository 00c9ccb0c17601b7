"""Results stored on disk. Each file name contains a hash of the inputs of the computation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import joblib
import numpy as np
from numpy.typing import NDArray

from influence.common import checkpoint

Arrays = Mapping[str, NDArray]


@dataclass(frozen=True)
class Store:
    """Two folders of stored results, each optional.

    Attributes:
      index: a folder that the function `index` filled, or None. It is read and not written, unless
        it is also `work`.
      work: a folder for the results of this run, or None. An interrupted run continues from them.
    """

    index: Path | None = None
    work: Path | None = None

    def find(self, name: str) -> dict[str, NDArray] | None:
        """Return the stored arrays of a result by its name, or None if neither folder has it.

        Raises: ValueError if the file was altered.
        """
        for folder in (self.index, self.work):
            path = folder and folder / f"{name}.npz"
            if path and path.exists():
                return checkpoint.load(path)
        return None

    def kept(self, name: str, compute: Callable[[], Arrays]) -> dict[str, NDArray]:
        """Return the stored arrays of a result by its name.

        If neither folder has the result, it is computed, and stored in `work` if `work` is given.

        Raises: ValueError if the file was altered.
        """
        found = self.find(name)
        if found is not None:
            return found
        path = self.work and self.work / f"{name}.npz"
        return checkpoint.kept(path, compute)

    @property
    def size(self) -> int:
        """Total size of the files in `work`, in bytes; 0 without `work`."""
        files = self.work.glob("*.npz") if self.work is not None else ()
        return sum(file.stat().st_size for file in files)


def name_of(what: str, *parts: object) -> str:
    """Return a name for a stored result: `what`, and a hash of `parts`, the result's inputs."""
    return f"{what}-{joblib.hash(parts)[:16]}"


def texts(values: list[str]) -> NDArray:
    """Return strings as an array of fixed-width strings, which `checkpoint` can store."""
    return np.array(values, dtype=np.str_)
