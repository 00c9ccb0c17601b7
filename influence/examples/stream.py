"""A set of examples that reads its dataset again in every pass."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from influence.common.numbers import is_integer
from influence.common.progress import progress
from influence.examples.arrays import Fingerprint
from influence.examples.dataset import Batch, batches_of, check_kind, checked, row_hashes
from influence.examples.examples import Examples, Remaining
from influence.examples.labels import check_weights

# A stream holds this many of its first rows in memory, for tests of a model on a few rows.
_FIRST_ROWS = 8
# Labels of at most this many bytes stay in memory. Larger labels are stored on disk.
_LABEL_BYTES = 1 << 26


class Stream(Examples):
    """Set of examples that reads its dataset again in every pass. It never holds all of x.

    A Stream can replace Examples everywhere. It cuts the rows into batches of the requested size,
    so it gives the same results as Examples of the same rows. The constructor reads the dataset
    twice and compares both passes row by row. It needs memory for one batch, the labels and 8 bytes
    per row. `take` reads a tf.data.Dataset from its start to the last row taken. This makes LiSSA
    slow, because it takes random rows. From a PyDataset, `take` reads only the batches that contain
    the rows.

    Args:
      dataset: a `tf.data.Dataset` or `keras.utils.PyDataset` of batches (x, y) or
        (x, y, sample_weight), as for `fit`. x is an array, or a dict or tuple with one array per
        model input. y is an array of labels, or a dict of them by output name, or a tuple of them.
      max_rows: the maximum number of rows. A dataset with more rows is refused as infinite.
      outputs: the names of the model's outputs, for a tuple of labels.

    Attributes:
      y: (n, ...) labels, as in Examples. Above 64 MiB, a temporary file on disk holds them.

    Raises: TypeError for another kind of dataset, or batches that are not (x, y) of arrays of
      numbers. ValueError for an infinite or empty dataset, a NaN or infinity, or rows of
      different shapes. ValueError if a shuffle or augmentation changes rows between passes.
    """

    def __init__(
        self,
        dataset: tf.data.Dataset | keras.utils.PyDataset,
        *,
        max_rows: int = 10**7,
        outputs: Sequence[str] = (),
    ):
        if not is_integer(max_rows, 1):
            raise ValueError(f"max_rows must be a positive integer, got {max_rows!r}.")
        check_kind(dataset)
        self._dataset, self._outputs = dataset, tuple(outputs)
        hashes = self._first_pass(max_rows)
        if isinstance(dataset, keras.utils.PyDataset):
            dataset.on_epoch_end()  # shuffling datasets do it here: the second pass would show it
            dataset.on_epoch_begin()
        self._second_pass(hashes)

    in_memory = False

    @property
    def x(self) -> Any:
        """Inputs of all rows. A Stream does not hold them, so this raises an error.

        Raises: TypeError, always.
        """
        raise TypeError(
            "x of a Stream is not held in memory; use batches(size), or take(slice(None)) for "
            "Examples that hold all rows."
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all rows, as in Examples. The first pass computes it."""
        return self._fingerprint

    @property
    def num_entries(self) -> int:
        """Number of entries in x. Each row has the same number of entries."""
        return self._first.num_entries // len(self._first) * len(self)

    # --- overridden methods of Examples ---------------------------------------------------------

    def _taken(self, rows: NDArray | slice) -> Examples:
        numbers = np.arange(len(self))[rows]
        if numbers.max() < len(self._first):
            return self._first._taken(numbers)
        wanted, places = np.unique(numbers, return_inverse=True)
        ((x, y),) = self._read(len(wanted), wanted)
        found = Examples._trusted(x, y)
        return found if np.array_equal(numbers, wanted) else found._taken(places)

    def _remaining(self, kept: NDArray[np.int64]) -> Examples:
        return Remaining(self, kept)

    def _read(self, size: int, rows: NDArray[np.int64] | None) -> Iterator[tuple[Any, NDArray]]:
        missing = len(self) if rows is None else len(rows)
        arrays: dict[Any, NDArray] = {}
        filled = 0
        for piece in self._pieces(rows):
            used, length = 0, len(piece.y)
            while used < length:
                if not arrays:
                    room = min(size, missing)
                    arrays = {k: np.empty((room, *p.shape[1:]), p.dtype) for k, p in piece.parts}
                step = min(room - filled, length - used)
                for key, part in piece.parts:
                    arrays[key][filled : filled + step] = part[used : used + step]
                used, filled = used + step, filled + step
                if filled == room:
                    yield piece.structured(arrays)
                    arrays, filled, missing = {}, 0, missing - room

    def _first_pass(self, max_rows: int) -> NDArray[np.int64]:
        """Store labels, fingerprint and first rows. Return a hash of each row, (n,)."""
        seen, hashes, starts, first = Fingerprint(), [], [0], []
        with tempfile.TemporaryFile() as file:
            batches = checked(batches_of(self._dataset, outputs=self._outputs), max_rows)
            for batch in progress(batches, "reading the stream"):
                seen.add(batch.x, batch.y)
                hashes.append(row_hashes(batch))
                starts.append(starts[-1] + len(batch.y))
                file.write(np.ascontiguousarray(batch.y).data)
                if starts[-2] < _FIRST_ROWS and len(batch.y):
                    first.append(batch)
            if not starts[-1]:
                raise ValueError("dataset must hold at least one row, got an empty one.")
            file.flush()
            y = first[0].y
            shape = (starts[-1], *y.shape[1:])
            y = np.memmap(file, y.dtype, "r", shape=shape)
            y = y if y.nbytes > _LABEL_BYTES else np.array(y)
        check_weights(y)
        y.setflags(write=False)
        object.__setattr__(self, "y", y)
        self._fingerprint, self._starts = seen.hexdigest(), np.array(starts)
        keys = [key for key, _ in first[0].parts]
        rows = [np.concatenate([dict(b.parts)[key] for b in first])[:_FIRST_ROWS] for key in keys]
        self._first = Examples._trusted(*first[0].structured(dict(zip(keys, rows, strict=True))))
        return np.concatenate(hashes)

    def _second_pass(self, expected: NDArray[np.int64]) -> None:
        """Read the dataset again. Raise ValueError if rows differ from the first pass."""
        count = 0
        batches = batches_of(self._dataset, outputs=self._outputs)
        for batch in progress(batches, "reading the stream again", len(self._starts) - 1):
            got = row_hashes(batch)
            before = expected[count : count + len(got)]
            differ = np.flatnonzero(got[: len(before)] != before)
            if differ.size:
                row = count + differ[0]
                elsewhere = np.flatnonzero(expected == got[differ[0]])
                what = (
                    f"row {elsewhere[0]} of the first at the place of row {row}: it is shuffled; "
                    "use shuffle(..., reshuffle_each_iteration=False), or none"
                    if elsewhere.size
                    else f"values in row {row} that the first does not have: it is random; leave "
                    "out random augmentation and dropout"
                )
                raise ValueError(
                    f"dataset must give the same rows in every pass, got in the second {what}."
                )
            count += len(got)
            if count > len(expected):
                break
        if count != len(expected):
            more = "more" if count > len(expected) else f"only {count}"
            raise ValueError(
                f"dataset must give the same rows in every pass, got {len(expected)} in the first "
                f"and {more} in the second; a generator must start anew when it is called."
            )

    def _pieces(self, rows: NDArray[np.int64] | None) -> Iterator[Batch]:
        """Yield the wanted rows batch by batch. Check that their labels have not changed."""
        if rows is None:
            rows = np.arange(len(self))
        of_batch = np.searchsorted(self._starts, rows, "right") - 1
        numbers, begins = np.unique(of_batch, return_index=True)
        count = 0
        found = batches_of(self._dataset, numbers, self._outputs)
        for number, wanted, batch in zip(numbers, np.split(rows, begins[1:]), found, strict=False):
            inside = wanted - self._starts[number]
            whole = len(batch.y) == self._starts[number + 1] - self._starts[number]
            piece = batch.rows(inside) if whole and len(inside) < len(batch.y) else batch
            if not whole or not np.array_equal(piece.y, self.y[wanted]):
                break
            yield piece
            count += 1
        if count < len(numbers):
            raise RuntimeError(
                "dataset must stay as it was when the Stream was made, got other labels or fewer "
                f"rows in its batch {numbers[count]}; make a new Stream after changing or "
                "reshuffling it."
            )
