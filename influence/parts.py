"""The arrays that examples consist of: their names, their values checked, their fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

CHECK_ROWS = 4096  # rows looked at together, so that a memmap stays on disk


def parts_of(x: Any) -> dict[str, Any]:
    """The arrays that inputs consist of, by the names that messages give them."""
    return {f"x[{k!r}]": v for k, v in x.items()} if isinstance(x, Mapping) else {"x": x}


class Fingerprint:
    """SHA-256 of rows as they come by; where batches begin and end does not count."""

    def __init__(self):
        self._parts: dict[str, Any] = {}

    def add(self, x: Any, y: NDArray) -> None:
        """The next rows."""
        for name, part in {"y": y, **parts_of(x)}.items():
            self._update(f"{name} {part.dtype.str} {part.shape[1:]}", part)

    def hexdigest(self) -> str:
        """Of all rows so far."""
        parts = sorted((name, part.hexdigest()) for name, part in self._parts.items())
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _update(self, name: str, part: Any) -> None:
        if scipy.sparse.issparse(part):
            self._update(f"{name} lengths", np.diff(part.indptr).astype(np.int64))
            self._update(f"{name} columns", part.indices.astype(np.int64))
            self._update(f"{name} values", part.data)
            return
        known = self._parts.setdefault(name, hashlib.sha256())
        known.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)


def check_finite(part: Any, name: str, first_row: int = 0) -> None:
    """Refuse a NaN or infinity.

    Raises: ValueError with `name` and the row, the first one counted as `first_row`.
    """
    if part.dtype.kind != "f":
        return
    for start in range(0, part.shape[0], CHECK_ROWS):
        block = part[start : start + CHECK_ROWS]
        values = block.data if scipy.sparse.issparse(block) else block
        if np.isfinite(values).all():
            continue
        if scipy.sparse.issparse(block):
            row = (
                np.searchsorted(block.indptr, np.flatnonzero(~np.isfinite(values))[0], "right") - 1
            )
        else:
            row = np.argwhere(~np.isfinite(values))[0][0]
        raise ValueError(
            f"{name} must be finite, got NaN or infinity in row {first_row + start + row}; "
            "drop the row or fill the value in first."
        )
