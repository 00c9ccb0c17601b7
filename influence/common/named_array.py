"""Arrays that carry the name of the quantity they hold: the base of all returned tables."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class NamedArray:
    """Array named after its quantity: the array is the first field of a subclass.

    NumPy functions, indexing and `.mean(axis)` act on that array.
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
        """Shape (m, k), or (m,) for a group."""
        return self._array().shape

    def mean(self, axis: int | None = None) -> Any:
        """Average over test examples (axis=0) or training rows (axis=1)."""
        return self._array().mean(axis=axis)


@dataclass(frozen=True, eq=False)
class Estimand(NamedArray):
    """Table of the changes in the test losses when training rows are removed.

    Attributes:
      change_if_removed: (m, k) change of each test loss (nats for log losses) when each training
        row is removed. Positive: the loss rises without the row, so the row helped.
      rows: (k,) the training rows.
      measurement: the quantity measured on each test example: "loss", or a measurement's name.
    """

    change_if_removed: NDArray
    rows: NDArray[np.int64]
    measurement: str = field(default="loss", kw_only=True)
