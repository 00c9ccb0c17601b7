"""Results kept on disk under names that say what they were computed from."""

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
    """Two folders of named results. Both may be None.

    Attributes:
      index: a folder that `index` filled. It is only read, unless it is also `work`.
      work: a folder for the results of this run, so that the run can be continued.
    """

    index: Path | None = None
    work: Path | None = None

    def find(self, name: str) -> dict[str, NDArray] | None:
        """Return the arrays of a name, or None.

        Raises: ValueError if a file was altered.
        """
        for folder in (self.index, self.work):
            path = folder and folder / f"{name}.npz"
            if path and path.exists():
                return checkpoint.load(path)
        return None

    def kept(self, name: str, compute: Callable[[], Arrays]) -> dict[str, NDArray]:
        """Return the arrays of a name. Compute them if they are in no folder, and keep them.

        Raises: ValueError if a file was altered.
        """
        found = self.find(name)
        if found is not None:
            return found
        path = self.work and self.work / f"{name}.npz"
        return checkpoint.kept(path, compute)

    @property
    def size(self) -> int:
        """Bytes of all files in `work`."""
        files = self.work.glob("*.npz") if self.work is not None else ()
        return sum(file.stat().st_size for file in files)


def name_of(what: str, *parts: object) -> str:
    """Return the name of a result that depends on `parts`: what it is, and a hash of the parts."""
    return f"{what}-{joblib.hash(parts)[:16]}"


def texts(values: list[str]) -> NDArray:
    """Return strings as an array that can be stored."""
    return np.array(values, dtype=np.str_)
