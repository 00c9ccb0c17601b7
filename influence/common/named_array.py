"""Base classes of the tables that the library returns. A table is a dataclass with an array."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class NamedArray:
    """Base class of tables. The first field of a subclass holds the table's array.

    NumPy functions, indexing and `.mean(axis)` act on this array.
    """

    def _array(self) -> NDArray:
        return getattr(self, fields(self)[0].name)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray:
        array = np.asarray(self._array(), dtype=dtype)
        return array.copy() if copy else array

    def __getitem__(self, key: Any) -> Any:
        return self._array()[key]

    def __len__(self) -> int:
        """Return the number of test examples, m."""
        return len(self._array())

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array, (m, k) for m test examples and k rows, or (m,) for one group."""
        return self._array().shape

    def mean(self, axis: int | None = None) -> Any:
        """Average over test examples (axis=0), training rows (axis=1), or both (None)."""
        return self._array().mean(axis=axis)


@dataclass(frozen=True, eq=False)
class Estimand(NamedArray):
    """Table of the changes in the test losses when training rows are removed.

    Attributes:
      change_if_removed: (m, k) array. Entry (i, j) is the change of test loss i when training row
        j is removed, in nats for log losses. A row with a positive change helped.
      rows: (k,) row numbers. Column j of `change_if_removed` belongs to the training row rows[j].
      measurement: the name of the quantity measured on each test example, usually "loss".
    """

    change_if_removed: NDArray
    rows: NDArray[np.int64]
    measurement: str = field(default="loss", kw_only=True)
