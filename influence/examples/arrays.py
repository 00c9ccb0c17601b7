"""Names, value checks and fingerprints of the arrays in a set of examples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from influence.examples.labels import called, fields, is_packed
from influence.examples.tables import is_text

# Checks and fingerprints read this many rows at a time, so that a memmap is never in memory as a
# whole.
CHECK_ROWS = 4096


def parts_of(x: Any) -> dict[str, Any]:
    """Return a dict of the input arrays. Its keys are the arrays' names in error messages."""
    return {f"x[{k!r}]": v for k, v in x.items()} if isinstance(x, Mapping) else {"x": x}


def label_parts(y: NDArray) -> dict[str, NDArray]:
    """Return a dict of the label arrays. Its keys are the arrays' names in error messages."""
    return {called(name): part for name, part in fields(y).items()} if is_packed(y) else {"y": y}


def converted(x: Any, array: Callable[[Any, str], Any]) -> Any:
    """Return the inputs with each array replaced by `array(part, name)`.

    Raises: ValueError if the inputs are an empty dict.
    """
    if not isinstance(x, Mapping):
        return array(x, "x")
    if not x:
        raise ValueError("x must hold at least one array, got an empty dict.")
    return {key: array(part, f"x[{key!r}]") for key, part in x.items()}


class Fingerprint:
    """SHA-256 of rows that are added in batches. The digest does not depend on batch sizes."""

    def __init__(self):
        self._parts: dict[str, Any] = {}

    def add(self, x: Any, y: NDArray) -> None:
        """Add the next rows to the digest. It also covers sample weights and output names."""
        for name, part in {**label_parts(y), **parts_of(x)}.items():
            self._update(f"{name} {part.dtype.str} {part.shape[1:]}", part)

    def hexdigest(self) -> str:
        """Return the digest of all rows that were added so far."""
        parts = sorted((name, part.hexdigest()) for name, part in self._parts.items())
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _update(self, name: str, part: Any) -> None:
        if scipy.sparse.issparse(part):
            self._update(f"{name} lengths", np.diff(part.indptr).astype(np.int64))
            self._update(f"{name} columns", part.indices.astype(np.int64))
            self._update(f"{name} values", part.data)
            return
        if is_text(part):
            lengths, joined = _encoded(part)
            self._update(f"{name} lengths", lengths)
            self._parts.setdefault(f"{name} text", hashlib.sha256()).update(joined)
            return
        known = self._parts.setdefault(name, hashlib.sha256())
        known.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)


def _encoded(strings: NDArray) -> tuple[NDArray[np.int64], bytes]:
    """Return the length of each string in bytes, and the joined UTF-8 bytes of all strings."""
    texts = [s.encode() if isinstance(s, str) else bytes(s) for s in strings.flat]
    return np.array([len(text) for text in texts], np.int64), b"".join(texts)


def check_finite(part: Any, name: str, first_row: int = 0) -> None:
    """Refuse an array that contains a NaN or an infinity.

    Raises: ValueError with `name` and the number of the row. `first_row` is the number of the
      array's first row.
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
