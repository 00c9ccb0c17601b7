"""Examples: the rows a risk is a mean over, and how they are cut into batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike, NDArray

_CHECK_ROWS = 4096  # rows read at a time when looking for NaN, so that a memmap stays on disk


def check_rows(rows: ArrayLike, num_examples: int, name: str = "rows") -> NDArray[np.int64]:
    """Row numbers as an int64 vector, or an error that says which one is wrong.

    Args:
      rows: integers in [0, num_examples), each at most once.
      num_examples: how many rows there are.
      name: the argument's name, for the message.

    Returns: (k,) int64.
    Raises: TypeError if they are not integers, IndexError if one is out of range, ValueError if
      there is none, one occurs twice, or the array is not one-dimensional.
    """
    array = np.asarray(rows)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(
            f"{name} must be a one-dimensional, non-empty list of row numbers, "
            f"got shape {array.shape}."
        )
    if array.dtype.kind not in "iu":
        hint = "; np.flatnonzero turns a mask into row numbers" if array.dtype.kind == "b" else ""
        raise TypeError(f"{name} must be integers, got dtype {array.dtype}{hint}.")
    outside = (array < 0) | (array >= num_examples)
    if outside.any():
        raise IndexError(
            f"{name} must lie in [0, {num_examples}), got {array[outside][0]} "
            f"at position {np.flatnonzero(outside)[0]}."
        )
    values, counts = np.unique(array, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"{name} must name each row once, got {values[counts > 1][0]} twice.")
    return array.astype(np.int64)


def check_differentiable(x: Any) -> None:
    """Refuse inputs that have no derivative.

    Args:
      x: an array, or a dict of them.

    Raises: TypeError naming the array that is not floating.
    """
    parts = {f"x[{k!r}]": p for k, p in x.items()} if isinstance(x, Mapping) else {"x": x}
    for name, part in parts.items():
        if part.dtype.kind != "f":
            raise TypeError(f"{name} must be floating to be differentiated, got {part.dtype}.")


@dataclass(frozen=True, eq=False)
class Examples:
    """Rows of inputs and labels; immutable.

    Args:
      x: (n, ...) array, memmap, scipy sparse matrix, or a dict of such arrays (one per model
        input). Kept as it is, dtype included; only views are taken, nothing is copied.
      y: (n, ...) labels.

    Raises: TypeError for arrays of objects, ValueError for an empty set, lengths that differ, or a
      NaN or infinity (the message names the array and the row).
    """

    x: Any
    y: Any

    def __post_init__(self):
        """Check once, here, so that nothing later needs to."""
        x = (
            {k: _array(v, f"x[{k!r}]") for k, v in self.x.items()}
            if isinstance(self.x, Mapping)
            else _array(self.x, "x")
        )
        y = _array(self.y, "y")
        parts = {f"x[{k!r}]": v for k, v in x.items()} if isinstance(x, dict) else {"x": x}
        if not parts:
            raise ValueError("x must hold at least one array, got an empty dict.")
        for name, part in {"y": y, **parts}.items():
            if part.ndim == 0:
                raise ValueError(f"{name} must have one row per example, got a scalar.")
            if part.shape[0] == 0:
                raise ValueError(f"{name} must have at least one row, got shape {part.shape}.")
            if part.shape[0] != y.shape[0]:
                raise ValueError(
                    f"x and y must have as many rows as each other, got {part.shape[0]} "
                    f"in {name} and {y.shape[0]} in y."
                )
            _check_finite(part, name)
        object.__setattr__(self, "x", x)
        object.__setattr__(self, "y", y)

    def __len__(self) -> int:
        """The number of rows, n."""
        return self.y.shape[0]

    def __repr__(self) -> str:
        """Shapes and dtypes, not contents."""
        show = lambda a: f"{a.dtype}{list(a.shape)}"  # noqa: E731
        x = {k: show(v) for k, v in self.x.items()} if isinstance(self.x, dict) else show(self.x)
        return f"Examples(x={x}, y={show(self.y)})"

    def take(self, rows: ArrayLike | slice) -> Examples:
        """The given rows, in the given order (a row may be taken twice)."""
        if not isinstance(rows, slice):
            rows = np.asarray(rows)
            if rows.dtype.kind not in "iu":
                raise TypeError(f"rows must be integers, got dtype {rows.dtype}.")
            if rows.size == 0:
                raise ValueError("rows must name at least one row, got none.")
            if rows.min() < 0 or rows.max() >= len(self):
                raise IndexError(
                    f"rows must lie in [0, {len(self)}), got {rows.min()} to {rows.max()}."
                )
        elif not range(*rows.indices(len(self))):
            raise ValueError(f"rows must name at least one row, got {rows} of {len(self)}.")
        return self._trusted(_select(self.x, rows), self.y[rows])

    def without(self, rows: ArrayLike) -> Examples:
        """All rows but the given ones, in their order."""
        keep = np.ones(len(self), bool)
        keep[check_rows(rows, len(self))] = False
        if not keep.any():
            raise ValueError(f"rows must leave at least one example, got all {len(self)}.")
        return self._trusted(_select(self.x, np.flatnonzero(keep)), self.y[keep])

    def batches(self, size: int | None = None) -> Iterator[tuple[Any, NDArray]]:
        """(x, y) in order, `size` rows at a time; the last batch may be smaller.

        Whoever averages over batches weights them by their rows.
        """
        size = len(self) if size is None else size
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise ValueError(f"size must be a positive integer, got {size!r}.")
        if size >= len(self):  # a slice of sparse rows would copy them
            yield self.x, self.y
            return
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield _select(self.x, part), self.y[part]

    @classmethod
    def _trusted(cls, x: Any, y: Any) -> Examples:
        """Parts of a checked set need no second check."""
        self = object.__new__(cls)
        for name, part in (("x", x), ("y", y)):
            object.__setattr__(self, name, part)
        for part in (*(x.values() if isinstance(x, dict) else (x,)), y):
            if isinstance(part, np.ndarray):
                part.setflags(write=False)
        return self


def _array(value: Any, name: str) -> Any:
    """A read-only view of an array, CSR rows for anything sparse."""
    if scipy.sparse.issparse(value):
        return value.tocsr()
    array = (value if isinstance(value, np.ndarray) else np.asarray(value)).view()
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be an array of numbers, got dtype {array.dtype}.")
    array.setflags(write=False)
    return array


def _select(x: Any, rows: Any) -> Any:
    return {name: part[rows] for name, part in x.items()} if isinstance(x, dict) else x[rows]


def _check_finite(part: Any, name: str) -> None:
    if part.dtype.kind != "f":
        return
    for start in range(0, part.shape[0], _CHECK_ROWS):
        block = part[start : start + _CHECK_ROWS]
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
            f"{name} must be finite, got NaN or infinity in row {start + row}; "
            "drop the row or fill the value in first."
        )
