"""What every returned table of numbers shares: an array that says which quantity it holds."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class NamedArray:
    """An array under the name of what it holds: a subclass's first field.

    Behaves as that array in NumPy functions, indexing and `.mean(axis)`.
    """

    def _array(self) -> NDArray:
        return getattr(self, fields(self)[0].name)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray:
        """The array itself, for NumPy."""
        array = np.asarray(self._array(), dtype=dtype)
        return array.copy() if copy else array

    def __getitem__(self, key: Any) -> Any:
        """Index the array."""
        return self._array()[key]

    def __len__(self) -> int:
        """The number of test examples, m."""
        return len(self._array())

    @property
    def shape(self) -> tuple[int, ...]:
        """(m, k), or (m,) for a group."""
        return self._array().shape

    def mean(self, axis: int | None = None) -> Any:
        """Mean over test examples (axis=0) or training rows (axis=1)."""
        return self._array().mean(axis=axis)


@dataclass(frozen=True, eq=False)
class Estimand(NamedArray):
    """An array of changes under the name of what is changed: `change_if_removed`.

    Attributes:
      change_if_removed: (m, k) change of each test loss (nats for log losses) were each training
        row removed. Positive: the loss rises without the row, so the row helped.
      rows: (k,) the training rows.
      measurement: what was measured on each test example: "loss", or the name of a measurement.
    """

    change_if_removed: NDArray
    rows: NDArray[np.int64]
    measurement: str = field(default="loss", kw_only=True)
