"""Batches of a `tf.data.Dataset` or a `keras.utils.PyDataset`, checked one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from influence.common.numbers import refuse_mask
from influence.examples.arrays import check_finite, converted, label_parts, parts_of
from influence.examples.labels import packed
from influence.examples.tables import is_text

# The key of y in `Batch.parts`. A single input array has the key "".
_LABELS = None
_REMEDY = "keras' fit takes the same; use dataset.map(lambda ...: (x, y)) to make it so"


@dataclass(frozen=True)
class Batch:
    """Rows of one batch. `x` is an array or a dict of arrays, and `y` is an array."""

    x: Any
    y: NDArray

    @property
    def parts(self) -> list[tuple[Any, NDArray]]:
        """List of (key, array) for the arrays of the batch. `structured` uses the same keys."""
        inputs = list(self.x.items()) if isinstance(self.x, dict) else [("", self.x)]
        return [(_LABELS, self.y), *inputs]

    def structured(self, arrays: dict[Any, NDArray]) -> tuple[Any, NDArray]:
        """Return (x, y) in the structure of this batch, filled with the given arrays.

        `arrays` has the keys of `parts`. Its arrays may hold other rows than this batch.
        """
        x = {k: arrays[k] for k in self.x} if isinstance(self.x, dict) else arrays[""]
        return x, arrays[_LABELS]

    def rows(self, numbers: NDArray) -> Batch:
        """Return a batch of the rows with the given numbers."""
        return Batch(*self.structured({key: part[numbers] for key, part in self.parts}))


def is_dataset(value: Any) -> bool:
    """Return True for a `tf.data.Dataset` or a `keras.utils.PyDataset`."""
    return isinstance(value, tf.data.Dataset | keras.utils.PyDataset)


def whole(dataset: Any, max_rows: int) -> tuple[Any, NDArray]:
    """Return x and y of all rows of a dataset, from one pass.

    Raises: the errors of `check_kind`, `batches_of` and `checked`. ValueError for an empty dataset.
    """
    check_kind(dataset)
    batches = [batch for batch in checked(batches_of(dataset), max_rows) if len(batch.y)]
    if not batches:
        raise ValueError("dataset must hold at least one row, got an empty one.")
    parts = [dict(batch.parts) for batch in batches]
    return batches[0].structured({key: np.concatenate([p[key] for p in parts]) for key in parts[0]})


def check_kind(dataset: Any) -> None:
    """Refuse an object that is not a dataset, or a dataset that reports an infinite size.

    Raises: TypeError for another type of object, ValueError for an infinite dataset.
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


def batches_of(
    dataset: Any, numbers: NDArray | None = None, outputs: Sequence[str] = ()
) -> Iterator[Batch]:
    """Yield the dataset's batches in order. Check that inputs, row shapes and dtypes agree.

    Args:
      dataset: an object that `check_kind` accepts.
      numbers: (b,) increasing numbers of the batches to read, or None for all batches.
      outputs: the names of the model's outputs, for batches with a tuple of labels.

    Raises: TypeError or ValueError if an element is not a batch (x, y) of arrays of numbers.
    """
    count, first = 0, None
    for element in _elements(dataset, numbers):
        batch = _batch(element, count, outputs)
        first = first or batch
        _check_alike(batch, first, count)
        count += len(batch.y)
        yield batch


def checked(batches: Iterable[Batch], max_rows: int) -> Iterator[Batch]:
    """Yield the given batches. Check that all values are finite, and limit the number of rows.

    Raises: ValueError for a NaN or infinity, or for more than `max_rows` rows.
    """
    count = 0
    for batch in batches:
        for name, part in {**label_parts(batch.y), **parts_of(batch.x)}.items():
            check_finite(part, name, count)
        count += len(batch.y)
        if count > max_rows:
            raise ValueError(
                f"dataset must end, got more than max_rows = {max_rows} rows; use .take(n), or "
                "give a larger max_rows."
            )
        yield batch


def row_hashes(batch: Batch) -> NDArray[np.int64]:
    """Return a 64-bit hash of each row, (b,). Hashes are comparable within one process."""
    parts = [part for _, part in batch.parts]
    rows = (b"".join(_bytes(part[row]) for part in parts) for row in range(len(batch.y)))
    return np.fromiter(map(hash, rows), np.int64, len(batch.y))


def _bytes(row: Any) -> bytes:
    """Return the bytes of one row. For strings, use their text, not their memory addresses."""
    array = np.asarray(row)
    return repr(array.tolist()).encode() if array.dtype.kind == "O" else array.tobytes()


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


def _batch(element: Any, first_row: int, outputs: Sequence[str]) -> Batch:
    """Convert an element of the dataset to a Batch.

    Raises: TypeError or ValueError if the element is not a batch (x, y).
    """
    if not isinstance(element, tuple | list) or len(element) not in (2, 3):
        raise TypeError(f"dataset must give batches (x, y), got {_kind(element)}; {_REMEDY}.")
    x, y = element[:2]
    weight = element[2] if len(element) == 3 else None
    if isinstance(x, tuple | list):
        if not all(hasattr(part, "shape") for part in x):
            raise TypeError(
                f"x must be an array, or a dict or tuple of arrays, got {_kind(x)}; {_REMEDY}."
            )
        x = dict(enumerate(x))
    if isinstance(y, tuple | list) and len(y) == len(outputs) > 1:
        y = dict(zip(outputs, y, strict=True))
        if isinstance(weight, tuple | list):
            weight = dict(zip(outputs, weight, strict=True))
    if isinstance(y, tuple | list):
        raise TypeError(
            f"y must be an array of labels or a dict of arrays by output name, got {_kind(y)}; "
            f"{_REMEDY}."
        )
    x, y = converted(x, _array), packed(y if isinstance(y, Mapping) else _array(y, "y"), weight)
    for name, part in parts_of(x).items():
        if len(part) != len(y):
            raise ValueError(
                f"x and y must have as many rows as each other, got {len(part)} in {name} and "
                f"{len(y)} in y, in the batch that begins with row {first_row}; is the dataset "
                "cut into batches, by .batch(size)?"
            )
    return Batch(x, y)


def _array(value: Any, name: str) -> NDArray:
    refuse_mask(value, name)
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):  # the rows have different lengths: the dtype is refused below
        array = np.empty(0, object)
    if is_text(array) and name != "y":
        array = array.astype(object)
    elif array.dtype.kind not in "biuf":
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
