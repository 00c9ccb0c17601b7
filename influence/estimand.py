"""What every returned table of numbers shares: an array that says which quantity it holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Estimand:
    """An array of changes under the name of what is changed: `change_if_removed`.

    Attributes:
      change_if_removed: (m, k) change of each test loss (nats for log losses) were each training
        row removed. Positive: the loss rises without the row, so the row helped.
      rows: (k,) the training rows.

    Behaves as its array in NumPy functions, indexing and `.mean(axis)`.
    """

    change_if_removed: NDArray
    rows: NDArray[np.int64]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray:
        """The array itself, for NumPy."""
        array = np.asarray(self.change_if_removed, dtype=dtype)
        return array.copy() if copy else array

    def __getitem__(self, key: Any) -> Any:
        """Index the array."""
        return self.change_if_removed[key]

    def __len__(self) -> int:
        """The number of test examples, m."""
        return len(self.change_if_removed)

    @property
    def shape(self) -> tuple[int, ...]:
        """(m, k)."""
        return self.change_if_removed.shape

    def mean(self, axis: int | None = None) -> Any:
        """Mean over test examples (axis=0) or training rows (axis=1)."""
        return self.change_if_removed.mean(axis=axis)
