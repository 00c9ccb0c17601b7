"""Sets of examples, and passes over their rows in batches. A risk averages over these rows."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterator
from dataclasses import InitVar, dataclass
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike, NDArray

from influence.common.memory import CACHE
from influence.common.numbers import is_integer, numbers, refuse_mask
from influence.common.progress import progress
from influence.examples.arrays import (
    CHECK_ROWS,
    Fingerprint,
    check_finite,
    converted,
    label_parts,
    parts_of,
)
from influence.examples.dataset import is_dataset, whole
from influence.examples.labels import check_weights, is_packed, packed, sample_weights
from influence.examples.tables import readable, structured


def check_rows(rows: ArrayLike, num_examples: int, name: str = "rows") -> NDArray[np.int64]:
    """Check row numbers and return them as an int64 vector.

    Args:
      rows: (k,) integers in [0, num_examples). No integer may occur twice.
      num_examples: the number of rows that exist.
      name: the argument's name in error messages.

    Returns: the rows, (k,) int64.
    Raises: TypeError if the rows are not integers, IndexError if a row is out of range, ValueError
      if the array is empty or not one-dimensional, or if a row occurs twice.
    """
    array = _row_numbers(rows, num_examples, name)
    values, counts = np.unique(array, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"{name} must name each row once, got {values[counts > 1][0]} twice.")
    return array.astype(np.int64)


def _row_numbers(rows: ArrayLike, num_examples: int, name: str) -> NDArray:
    """Check row numbers like `check_rows`, but let rows repeat."""
    refuse_mask(rows, name)
    array = np.asarray(rows)
    if array.ndim != 1 or array.size == 0:
        got = f"{array}; use [{array}]" if array.ndim == 0 else f"shape {array.shape}"
        raise ValueError(
            f"{name} must be a one-dimensional, non-empty list of row numbers, got {got}."
        )
    if array.dtype.kind not in "iu":
        hint = "; np.flatnonzero turns a mask into row numbers" if array.dtype.kind == "b" else ""
        raise TypeError(f"{name} must be integers, got dtype {array.dtype}{hint}.")
    if array.min() < 0 or array.max() >= num_examples:
        position = np.flatnonzero((array < 0) | (array >= num_examples))[0]
        raise IndexError(
            f"{name} must lie in [0, {num_examples}), got {array[position]} at position {position}."
        )
    return array


def check_increasing(rows: ArrayLike, num_examples: int) -> NDArray[np.int64]:
    """Check row numbers like `check_rows`. Also check that they increase.

    Raises: the errors of `check_rows`. ValueError if the rows do not increase.
    """
    array = check_rows(rows, num_examples)
    falls = np.flatnonzero(np.diff(array) < 0)
    if falls.size:
        before, after = array[falls[0]], array[falls[0] + 1]
        raise ValueError(f"rows must increase, got {before} before {after}; use np.sort(rows).")
    return array


def check_differentiable(x: Any) -> None:
    """Refuse inputs that are not floating-point: a loss has no derivative with respect to them.

    Args:
      x: an array, or a dict of arrays.

    Raises: TypeError naming the first array that is not floating-point.
    """
    for name, part in parts_of(x).items():
        if part.dtype.kind != "f":
            raise TypeError(f"{name} must be floating to be differentiated, got {part.dtype}.")


Question = Callable[[Any, NDArray | None, Any, NDArray], Any]
# A set holds caches for this many batch sizes, because solvers alternate between a few sizes.
_MOST_SIZES = 4
# A dataset with more rows than this is assumed to be infinite.
_MOST_ROWS = 10**7


class _Memos:
    """Cache for one net at one theta and one batch size. Each batch has its own dict."""

    def __init__(self, net: Any, theta: NDArray, size: int):
        self._flat, self._theta, self.size = weakref.ref(net.flat), theta.copy(), size
        self._of_batch: list[dict[str, NDArray]] | None = []
        self._held = 0

    def belongs_to(self, net: Any, theta: NDArray) -> bool:
        return self._flat() is net.flat and np.array_equal(self._theta, theta)

    def of_batch(self, number: int) -> dict[str, NDArray] | None:
        """Return the dict of a batch.

        If the cached arrays together exceed `CACHE` bytes, delete all of them and return None.
        """
        if self._of_batch is not None and number == len(self._of_batch):
            if number:
                self._held += sum(array.nbytes for array in self._of_batch[-1].values())
            if self._held <= CACHE:
                self._of_batch.append({})
            else:
                self._of_batch = None
        return None if self._of_batch is None else self._of_batch[number]


@dataclass(frozen=True, eq=False)
class Examples:
    """Immutable set of rows, each with inputs and a label.

    Args:
      x: the inputs, as an (n, ...) array, memmap or scipy sparse matrix, or as a dict, list or
        tuple with one such array per model input. A list or tuple becomes a dict by position. A
        data frame of numbers becomes one array, and a data frame with strings becomes a dict by
        column. Strings are for a model with lookup layers, such as StringLookup. The dtype of
        numbers is not changed, and an array of numbers is not copied. Instead of inputs, x may be a
        dataset of batches (x, y) or (x, y, sample_weight), as for `fit`. All its rows are read into
        memory, in the order of one pass. `Stream` reads them again in each pass instead.
      y: (n, ...) labels, or a dict of such arrays by output name. Omit y if x is a dataset.
      sample_weight: (n,) weights w_i >= 0 as in Keras' `fit`, or a dict of them by output name.
        Row i's loss is w_i times its loss without weight. The risk still divides by the number of
        rows, as Keras does, and not by the sum of the weights. The weights of test rows count in
        the same way. None means no weights.

    Attributes:
      y: the labels (n, ...). Labels by output name and labels with weights are one structured
        array (n,) instead. `influence.examples.labels` lists its fields.
      sample_weight: the weights (n,), a dict of them by output name, or None.

    Raises: TypeError if an array of inputs holds neither numbers nor strings, if labels are not
      numbers or are missing, or if labels are given in addition to a dataset. ValueError if the set
      is empty, if arrays differ in length, if an array contains a NaN or infinity, or if weights
      are negative or all zero. The message names the array. For a dataset, also the errors of
      Stream.
    """

    x: Any
    y: Any = None
    sample_weight: InitVar[Any] = None

    def __post_init__(self, sample_weight: Any):
        if is_dataset(self.x):
            self._read_whole(sample_weight)
            return
        if self.y is None:
            raise TypeError(f"y must be given beside x, got x of type {type(self.x).__name__}.")
        x = converted(structured(self.x, self.y), _input)
        y = packed(self.y, sample_weight)
        y = _view(y) if is_packed(y) else _array(y, "y")
        for name, part in {**label_parts(y), **parts_of(x)}.items():
            if part.ndim == 0:
                raise ValueError(f"{name} must have one row per example, got a scalar.")
            if part.shape[0] == 0:
                raise ValueError(f"{name} must have at least one row, got shape {part.shape}.")
            if part.shape[0] != y.shape[0]:
                raise ValueError(
                    f"x and y must have as many rows as each other, got {part.shape[0]} "
                    f"in {name} and {y.shape[0]} in y."
                )
            check_finite(part, name)
        check_weights(y)
        object.__setattr__(self, "x", x)
        object.__setattr__(self, "y", y)

    def _read_whole(self, sample_weight: Any) -> None:
        """Read all rows of the dataset that was given as x."""
        if self.y is not None or sample_weight is not None:
            raise TypeError("y and sample_weight must be left out beside a dataset: it holds them.")
        x, y = whole(self.x, _MOST_ROWS)
        check_weights(y)
        for part in (*parts_of(x).values(), y):
            part.setflags(write=False)
        object.__setattr__(self, "x", x)
        object.__setattr__(self, "y", y)

    def __len__(self) -> int:
        """Return the number of rows, n."""
        return self.y.shape[0]

    def __repr__(self) -> str:
        """Show shapes and dtypes instead of contents."""
        first = self._taken(slice(0, 1))
        show = lambda a: f"{a.dtype}{[len(self), *a.shape[1:]]}"  # noqa: E731
        x = first.x
        x = {k: show(v) for k, v in x.items()} if isinstance(x, dict) else show(x)
        y = {name: show(part) for name, part in label_parts(first.y).items()}
        y = y if is_packed(first.y) else y["y"]
        return f"{type(self).__name__}(x={x}, y={y})"

    def take(self, rows: ArrayLike | slice) -> Examples:
        """Read the given rows into memory, in the given order. A row may be taken twice."""
        if not isinstance(rows, slice):
            rows = _row_numbers(rows, len(self), "rows")
        elif not range(*rows.indices(len(self))):
            raise ValueError(f"rows must name at least one row, got {rows} of {len(self)}.")
        return self._taken(rows)

    def stacked(self, rows: NDArray) -> tuple[Any, NDArray]:
        """Return dense x and y, (r, b, ...). `rows` (r, b) are the row numbers of r batches."""
        chosen = self.take(rows.ravel())

        def shaped(part: Any) -> NDArray:
            part = part.toarray() if scipy.sparse.issparse(part) else part
            return part.reshape(*rows.shape, *part.shape[1:])

        x = chosen.x
        x = {name: shaped(part) for name, part in x.items()} if isinstance(x, dict) else shaped(x)
        return x, shaped(chosen.y)

    def without(self, rows: ArrayLike) -> Examples:
        """Return all rows except the given ones, in order. Rows on disk stay on disk."""
        keep = np.ones(len(self), bool)
        keep[check_rows(rows, len(self))] = False
        if not keep.any():
            raise ValueError(f"rows must leave at least one example, got all {len(self)}.")
        return self._remaining(np.flatnonzero(keep))

    def batches(
        self, size: int | None = None, rows: ArrayLike | None = None
    ) -> Iterator[tuple[Any, NDArray]]:
        """Yield batches (x, y) of `size` rows, in order. The last batch may be smaller.

        To average over batches, weight each batch by its number of rows.

        Args:
          size: the number of rows per batch, or None for all rows in one batch.
          rows: (k,) increasing row numbers, or None for all rows. Unlike `take`, this method holds
            only one batch of these rows in memory.

        Raises: ValueError for a bad size. The errors of `check_increasing` for bad rows.
        """
        if rows is not None:
            rows = check_increasing(rows, len(self))
        count = len(self) if rows is None else len(rows)
        size = count if size is None else size
        if not is_integer(size, 1):
            raise ValueError(f"size must be a positive integer, got {size!r}.")
        yield from self._read(int(size), rows)

    # --- passes over all rows: they call a question for each batch --------------------------------

    def sum_over(
        self,
        question: Question,
        net: Any,
        theta: NDArray | None = None,
        *,
        batch_size: int | None = None,
        what: str = "",
    ) -> Any:
        """Call a question for each batch of rows, and return the sum of its results.

        Args: the arguments of `map_over`. The question must return the sum over a batch's rows.
        Returns: the sum over all batches, in order. Tuples of arrays are summed entry by entry.
        """
        total: Any = None
        for answer in self.map_over(question, net, theta, batch_size=batch_size, what=what):
            if total is None:
                total = answer
            elif isinstance(answer, tuple):
                total = tuple(map(operator.add, total, answer))
            else:
                total = total + answer
        return total

    def map_over(
        self,
        question: Question,
        net: Any,
        theta: NDArray | None = None,
        rows: ArrayLike | None = None,
        *,
        batch_size: int | None = None,
        what: str = "",
    ) -> Iterator[Any]:
        """Call a question for each batch of rows, in order, and yield its results.

        A question is a function of a net, theta and a batch. It can be pickled, and it holds no
        rows and no net. If the rows of a set are on another machine, the set can send the question
        there.

        A question may have two attributes. `num_vectors` (default 1) is the number of vectors of
        theta's length that it processes with each batch, such as the vectors of a Hessian product.
        With more vectors, the net chooses fewer rows per batch. `keeps` (default False) is True if
        the question will be called again at this theta. The net may then cache intermediate results
        of each batch in `net.memo`.

        Args:
          question: a function (net, theta, x, y), as in `influence.net.questions`.
          net: the net that is passed to the question.
          theta: (d,) parameters that are passed to the question. None means the net's own theta.
          rows: (k,) increasing row numbers, or None for all rows.
          batch_size: the number of rows per batch. If it is None, the net chooses it.
          what: the label of the progress bar. An empty label shows no bar.

        Yields: the question's result for each batch, in the order of the rows.
        Raises: the errors of `batches`.
        """
        size = batch_size or net.rows_per_batch(self, getattr(question, "num_vectors", 1))
        count = len(self) if rows is None else len(np.asarray(rows))
        batches: Any = self.batches(size, rows)
        if what:
            batches = progress(batches, what, -(-count // size))
        keeps = rows is None and getattr(question, "keeps", False)
        memos = self._memos(net, theta, size) if keeps else None
        for number, (x, y) in enumerate(batches):
            asked = net if memos is None else net.remembering(memos.of_batch(number))
            yield question(asked, theta, x, y)

    def each_row(
        self,
        question: Question,
        net: Any,
        theta: NDArray | None = None,
        rows: ArrayLike | None = None,
        *,
        batch_size: int | None = None,
        what: str = "",
    ) -> Any:
        """Call a question for each batch of rows, and join its results along their first axis.

        Args: the arguments of `map_over`. `rows` (k,) may have any order. The question must return
          an array with one entry per row of the batch.
        Returns: the joined array (k, ...), in the order of `rows`.
        """
        order = None if rows is None else np.argsort(np.asarray(rows), kind="stable")
        asked = rows if order is None else np.asarray(rows)[order]
        answers = self.map_over(question, net, theta, asked, batch_size=batch_size, what=what)
        joined = np.concatenate(list(answers))
        if order is None or (np.diff(order) > 0).all():
            return joined
        found = np.empty_like(joined)
        found[order] = joined
        return found

    def _memos(self, net: Any, theta: NDArray | None, size: int) -> _Memos:
        """Return the cache of this net, theta and batch size. Delete caches of other thetas."""
        at: NDArray = net.theta if theta is None else theta
        known = [m for m in self.__dict__.get("_cached", ()) if m.belongs_to(net, at)]
        found = next((m for m in known if m.size == size), None)
        if found is None:
            found = _Memos(net, at, size)
            known = [*known[1 - _MOST_SIZES :], found]
        object.__setattr__(self, "_cached", known)
        return found

    def __getstate__(self) -> dict:
        """Pickle everything except the caches."""
        caches = ("_cached", "_featured")
        return {name: value for name, value in self.__dict__.items() if name not in caches}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all rows. Dense rows have the same digest in memory and on disk."""
        seen = Fingerprint()
        for x, y in self.batches(CHECK_ROWS):
            seen.add(x, y)
        return seen.hexdigest()

    @property
    def num_entries(self) -> int:
        """Number of entries in x. Of a sparse matrix, only the stored entries count."""
        parts = parts_of(self.x).values()
        return sum(p.nnz if scipy.sparse.issparse(p) else p.size for p in parts)

    # --- overridden by sets with other storage: the callers have checked the arguments ------------

    # `in_memory` is False if some rows are not in memory. Then x is not available.
    in_memory = True

    def _taken(self, rows: NDArray | slice) -> Examples:
        return Examples._trusted(_select(self.x, rows), self.y[rows])

    def _remaining(self, kept: NDArray[np.int64]) -> Examples:
        if any(isinstance(part, np.memmap) for part in parts_of(self.x).values()):
            return Remaining(self, kept)
        return self._taken(kept)

    def _read(self, size: int, rows: NDArray[np.int64] | None) -> Iterator[tuple[Any, NDArray]]:
        if rows is None and size >= len(self):  # slicing a sparse matrix would copy it
            yield self.x, self.y
            return
        for start in range(0, len(self) if rows is None else len(rows), size):
            part: Any = slice(start, start + size)
            if rows is not None:
                part = rows[part]
                if part[-1] - part[0] == len(part) - 1:  # unlike row numbers, a slice makes no copy
                    part = slice(part[0], part[-1] + 1)
            yield _select(self.x, part), self.y[part]

    @classmethod
    def _trusted(cls, x: Any, y: Any) -> Examples:
        """Make a set from parts of a checked set, without checking them again."""
        self = object.__new__(cls)
        for name, part in (("x", x), ("y", y)):
            object.__setattr__(self, name, part)
        for part in (*(x.values() if isinstance(x, dict) else (x,)), y):
            if isinstance(part, np.ndarray):
                part.setflags(write=False)
        return self


# The dataclass stores the argument's default, None, as a class attribute. A property that returns
# the weights replaces this attribute.
setattr(Examples, "sample_weight", property(lambda examples: sample_weights(examples.y)))  # noqa: B010


class Remaining(Examples):
    """View of some rows of another set, its parent. It reads inputs from the parent."""

    def __init__(self, whole: Examples, kept: NDArray[np.int64]):
        y = whole.y[kept]
        y.setflags(write=False)
        object.__setattr__(self, "y", y)
        self._whole, self._kept = whole, kept
        self.in_memory = whole.in_memory

    @property
    def x(self) -> Any:
        """Inputs of the view. Each access reads them from the parent."""
        return self._whole._taken(self._kept).x if self.in_memory else self._whole.x

    @property
    def num_entries(self) -> int:
        """Number of entries in x, estimated as len(self) times the parent's mean number per row."""
        return self._whole.num_entries // len(self._whole) * len(self)

    def _taken(self, rows: NDArray | slice) -> Examples:
        return self._whole._taken(self._kept[rows])

    def _remaining(self, kept: NDArray[np.int64]) -> Examples:
        return Remaining(self._whole, self._kept[kept])

    def _read(self, size: int, rows: NDArray[np.int64] | None) -> Iterator[tuple[Any, NDArray]]:
        return self._whole._read(size, self._kept if rows is None else self._kept[rows])


def _input(value: Any, name: str) -> Any:
    """Convert a dense value to a read-only view, and a sparse matrix to CSR format."""
    array = readable(value, name)
    return array if scipy.sparse.issparse(array) else _view(array)


def _array(value: Any, name: str) -> Any:
    """Convert numeric labels to a read-only view, or a sparse matrix to CSR format."""
    return value.tocsr() if scipy.sparse.issparse(value) else _view(numbers(value, name))


def _view(array: NDArray) -> NDArray:
    array = array.view()
    array.setflags(write=False)
    return array


def _select(x: Any, rows: Any) -> Any:
    return {name: part[rows] for name, part in x.items()} if isinstance(x, dict) else x[rows]
