"""The batches of a dataset as NumPy arrays, each checked: what a Stream is made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from influence.examples.arrays import check_finite, parts_of

_LABELS = None  # the key of y among a batch's parts; inputs have names or, if there is one, ""
_REMEDY = "keras' fit takes the same; use dataset.map(lambda ...: (x, y)) to make it so"


@dataclass(frozen=True)
class Batch:
    """Some rows: x an array or a dict of arrays, y an array."""

    x: Any
    y: NDArray

    @property
    def parts(self) -> list[tuple[Any, NDArray]]:
        """Its arrays, each with a key that `structured` understands."""
        inputs = list(self.x.items()) if isinstance(self.x, dict) else [("", self.x)]
        return [(_LABELS, self.y), *inputs]

    def structured(self, arrays: dict[Any, NDArray]) -> tuple[Any, NDArray]:
        """(x, y) of other rows, from arrays by key."""
        x = {k: arrays[k] for k in self.x} if isinstance(self.x, dict) else arrays[""]
        return x, arrays[_LABELS]

    def rows(self, numbers: NDArray) -> Batch:
        """Some of its rows."""
        return Batch(*self.structured({key: part[numbers] for key, part in self.parts}))


def check_kind(dataset: Any) -> None:
    """Refuse what is no finite dataset, as far as it says itself.

    Raises: TypeError for another kind, ValueError for an infinite one.
    """
    if isinstance(dataset, keras.utils.PyDataset):
        infinite = dataset.num_batches is None
    elif isinstance(dataset, tf.data.Dataset):
        infinite = int(dataset.cardinality()) == tf.data.INFINITE_CARDINALITY
    else:
        raise TypeError(
            "dataset must be a tf.data.Dataset or a keras.utils.PyDataset, got "
            f"{type(dataset).__name__}; arrays and memmaps go into Examples(x, y)."
        )
    if infinite:
        raise ValueError("dataset must end, got an infinite one; use .take(n), or no .repeat().")


def batches_of(dataset: Any, numbers: NDArray | None = None) -> Iterator[Batch]:
    """The dataset's batches in order, alike in all but their values and number of rows.

    Args:
      dataset: of a kind that `check_kind` lets pass.
      numbers: (b,) increasing batch numbers to read; all if omitted.

    Raises: TypeError or ValueError for what is no batch (x, y) of arrays of numbers.
    """
    count, first = 0, None
    for element in _elements(dataset, numbers):
        batch = _batch(element, count)
        first = first or batch
        _check_alike(batch, first, count)
        count += len(batch.y)
        yield batch


def checked(batches: Iterable[Batch], max_rows: int) -> Iterator[Batch]:
    """The same batches, as long as they are finite in value and number.

    Raises: ValueError for a NaN or infinity, or for more rows than max_rows.
    """
    count = 0
    for batch in batches:
        for name, part in {"y": batch.y, **parts_of(batch.x)}.items():
            check_finite(part, name, count)
        count += len(batch.y)
        if count > max_rows:
            raise ValueError(
                f"dataset must end, got more than max_rows = {max_rows} rows; use .take(n), or "
                "give a larger max_rows."
            )
        yield batch


def row_hashes(batch: Batch) -> NDArray[np.int64]:
    """64 bits for each row, equal for equal rows within one process: (b,)."""
    parts = [part for _, part in batch.parts]
    rows = (b"".join(part[row].tobytes() for part in parts) for row in range(len(batch.y)))
    return np.fromiter(map(hash, rows), np.int64, len(batch.y))


def _elements(dataset: Any, numbers: NDArray | None) -> Iterable[Any]:
    if isinstance(dataset, keras.utils.PyDataset):
        return (
            dataset[int(i)] for i in (range(dataset.num_batches) if numbers is None else numbers)
        )
    every = dataset.as_numpy_iterator()
    if numbers is None:
        return every
    wanted = set(numbers.tolist())
    upto = zip(range(numbers[-1] + 1), every, strict=False)
    return (element for i, element in upto if i in wanted)


def _batch(element: Any, first_row: int) -> Batch:
    """An element of the dataset as (x, y).

    Raises: TypeError or ValueError naming what is wrong.
    """
    if not isinstance(element, tuple | list) or len(element) not in (2, 3):
        raise TypeError(f"dataset must give batches (x, y), got {_kind(element)}; {_REMEDY}.")
    if len(element) == 3 and element[2] is not None:
        raise TypeError(
            "dataset must give batches (x, y) without sample weights, got (x, y, sample_weight): "
            "the risk is a plain mean over rows; drop them, and put what they say into the loss."
        )
    x, y = element[:2]
    if isinstance(x, tuple | list) and not isinstance(x, np.ndarray):
        raise TypeError(
            f"x must be an array or a dict of arrays by input name, got {_kind(x)}; {_REMEDY}."
        )
    if isinstance(y, Mapping | tuple | list):
        raise TypeError(f"y must be one array of labels, got {_kind(y)}; {_REMEDY}.")
    x = (
        {key: _array(part, f"x[{key!r}]") for key, part in x.items()}
        if isinstance(x, Mapping)
        else _array(x, "x")
    )
    y = _array(y, "y")
    parts = parts_of(x)
    if not parts:
        raise ValueError("x must hold at least one array, got an empty dict.")
    for name, part in parts.items():
        if len(part) != len(y):
            raise ValueError(
                f"x and y must have as many rows as each other, got {len(part)} in {name} and "
                f"{len(y)} in y, in the batch that begins with row {first_row}; is the dataset "
                "cut into batches, by .batch(size)?"
            )
    return Batch(x, y)


def _array(value: Any, name: str) -> NDArray:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):  # what has no rows of equal length
        array = np.empty(0, object)
    if array.dtype.kind not in "biuf":
        raise TypeError(
            f"{name} must be a dense array of numbers, got {type(value).__name__} of dtype "
            f"{array.dtype}."
        )
    if array.ndim == 0:
        raise ValueError(
            f"{name} must have one row per example, got a scalar; cut the dataset into batches "
            "first, by .batch(size)."
        )
    return array


def _check_alike(batch: Batch, like: Batch, first_row: int) -> None:
    parts, others = parts_of(batch.x), parts_of(like.x)
    if parts.keys() != others.keys():
        raise ValueError(
            f"x must have the same inputs in every batch, got {sorted(others)} in the first and "
            f"{sorted(parts)} in the one that begins with row {first_row}."
        )
    for name, part in {"y": batch.y, **parts}.items():
        first = like.y if name == "y" else others[name]
        if (part.shape[1:], part.dtype) != (first.shape[1:], first.dtype):
            raise ValueError(
                f"{name} must have rows of one shape and dtype, got {first.dtype} "
                f"{first.shape[1:]} in row 0 and {part.dtype} {part.shape[1:]} in row {first_row}; "
                "pad or convert them alike in all batches."
            )


def _kind(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
