"""Inputs in the forms that Keras' `fit` takes: lists of inputs, data frames, and strings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from influence.common.numbers import numbers

# A message shows at most this many characters of a value.
_SHOWN = 20


def structured(x: Any, y: Any) -> Any:
    """Return inputs as one array, or as a dict of arrays.

    A list or tuple with one array per model input becomes a dict by position. A list of rows is
    returned unchanged. A data frame of numbers becomes one array (n, columns), as in `fit`. A data
    frame with strings becomes a dict by column, because a model has one input for each such column.
    A single column becomes an array (n, 1).

    Args:
      x: the inputs.
      y: the labels. Their length distinguishes a list of inputs from a list of rows.
    """
    if is_frame(x):
        columns = {str(name): _plain(x[name]) for name in x.columns}
        if len(columns) == 1:
            return next(iter(columns.values()))[:, None]
        if all(column.dtype.kind in "biuf" for column in columns.values()):
            return np.column_stack(list(columns.values())) if columns else np.empty((len(x), 0))
        return columns
    if is_list_of_inputs(x, y):
        return dict(enumerate(x))
    return x


def is_list_of_inputs(x: Any, y: Any) -> bool:
    """Return True for a list or tuple that holds one array per model input, instead of rows."""
    if not isinstance(x, list | tuple) or isinstance(y, str):
        return False
    y = next(iter(y.values()), None) if isinstance(y, Mapping) else y
    if not hasattr(y, "__len__") or len(x) in (0, len(y)):
        return False
    return all(tuple(getattr(part, "shape", ()))[:1] == (len(y),) for part in x)


def readable(value: Any, name: str) -> Any:
    """Return an array of numbers, a sparse matrix, or an object array of strings.

    Raises: TypeError naming `name` for other values.
    """
    if scipy.sparse.issparse(value):
        return value.tocsr()
    value = _plain(value)
    if not np.ma.isMaskedArray(value):
        array = value if isinstance(value, np.ndarray) else _array(value)
        if array is not None and is_text(array):
            return array.astype(object)
        if array is not None and array.dtype.kind in "biuf":
            return array
        if array is not None:
            _check_no_gap(array, name)
    return numbers(value, name)


def is_text(array: Any) -> bool:
    """Return True for an array of strings. Each entry is a `str` or `bytes` object."""
    kind = getattr(getattr(array, "dtype", None), "kind", "")
    if kind != "O" or not isinstance(array, np.ndarray):
        return kind in ("U", "S", "T")
    return array.size > 0 and all(isinstance(entry, str | bytes) for entry in array.flat)


def is_frame(value: Any) -> bool:
    """Return True for a data frame. It is recognised by attributes, so pandas is not imported."""
    return hasattr(value, "columns") and hasattr(value, "dtypes") and hasattr(value, "to_numpy")


def is_series(value: Any) -> bool:
    """Return True for one column of a data frame."""
    return hasattr(value, "dtype") and hasattr(value, "to_numpy") and not is_frame(value)


def _plain(value: Any) -> Any:
    """Convert a pandas series to an array, numeric if possible. Return other values unchanged."""
    if is_frame(value) or not is_series(value):
        return value
    kind = getattr(value.dtype, "kind", "O")
    if isinstance(value.dtype, np.dtype) or kind not in "biuf" or value.isna().any():
        return np.asarray(value)
    return value.to_numpy(value.dtype.numpy_dtype)  # a dtype of pandas, such as Int64


def _array(value: Any) -> NDArray | None:
    try:
        return np.asarray(value)
    except ValueError:  # the rows have different lengths: `numbers` then raises an error
        return None


def _check_no_gap(array: NDArray, name: str) -> None:
    """Raise TypeError if only some entries of a column are strings: the others may be gaps."""
    other = [row for row, entry in enumerate(array.flat) if not isinstance(entry, str | bytes)]
    if array.dtype.kind != "O" or array.ndim != 1 or not 0 < len(other) < len(array):
        return
    raise TypeError(
        f"{name} must have a string in every row, got {str(array[other[0]])[:_SHOWN]} in row "
        f"{other[0]}; fill it, as by .fillna('')."
    )
