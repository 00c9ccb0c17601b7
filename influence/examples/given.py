"""Convert data that Keras' `fit` takes to Examples, and class weights to sample weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike, NDArray

from influence.common.numbers import numbers
from influence.examples.dataset import is_dataset
from influence.examples.examples import Examples
from influence.examples.stream import Stream
from influence.examples.tables import is_frame, is_series

# The types of data that `as_examples` accepts.
Data = Examples | tuple | list | tf.data.Dataset | keras.utils.PyDataset
# A dataset with at most this many entries of x is held in memory.
_SMALL = 1 << 26


def as_examples(
    value: Any, name: str, inputs: Sequence[Any] = (), outputs: Sequence[str] = ()
) -> Examples:
    """Convert data in any form that `fit` takes to Examples. Examples are returned unchanged.

    Args:
      value: Examples, a tuple or list (x, y) or (x, y, sample_weight), or a dataset of such
        batches. A dataset must give the same rows in every pass. A small dataset is read into
        memory.
      name: the argument's name in error messages.
      inputs: the names of the model's inputs, if the model declares them. The names show whether a
        list x of two arrays holds two inputs or two rows. They also select the columns of a data
        frame with one column per input.
      outputs: the names of the model's outputs, if the model has several. They name the entries of
        a list y.

    Raises: TypeError naming `name` for another kind of data. The errors of Examples and Stream.
    """
    if isinstance(value, Examples):
        return value
    if is_dataset(value):
        stream = Stream(value, outputs=outputs)
        return stream.take(slice(None)) if stream.num_entries <= _SMALL else stream
    if not isinstance(value, tuple | list) or len(value) not in (2, 3) or not _are_rows(value[1]):
        kind = type(value).__name__
        kind += f" of {len(value)}" if isinstance(value, tuple | list) else ""
        raise TypeError(
            f"{name} must be Examples(x, y), got {kind}; (x, y), (x, y, sample_weight) and a "
            "dataset of such batches will do too."
        )
    x, y, *weight = value
    several = len(inputs) > 1
    if several and isinstance(x, list | tuple) and len(x) == len(inputs):
        x = dict(zip(inputs, x, strict=True))
    elif several and is_frame(x) and all(key in getattr(x, "columns", ()) for key in inputs):
        x = {key: x[key] for key in inputs}
    elif several and isinstance(x, Mapping) and all(key in x for key in inputs):
        x = {key: x[key] for key in inputs}  # like `fit`, ignore other entries
    elif is_series(x):
        x = np.asarray(x)[:, None]
    if len(outputs) > 1 and isinstance(y, list | tuple) and len(y) == len(outputs):
        y = dict(zip(outputs, y, strict=True))
        if weight and isinstance(weight[0], list | tuple):
            weight = [dict(zip(outputs, weight[0], strict=True))]
    return Examples(x, y, *weight)


def class_weights(y: ArrayLike, class_weight: Mapping[int, float]) -> NDArray[np.float64]:
    """Return the sample weights that `fit` makes from `class_weight`: w_i = class_weight[y_i].

    `Examples(x, y, class_weights(y, class_weight))` has the risk that
    `model.fit(x, y, class_weight=class_weight)` minimises. As in `fit`, a class without an entry
    has the weight 1, and the risk still divides by the number of rows.

    Args:
      y: (n,) or (n, 1) class numbers, or (n, c) one-hot labels.
      class_weight: a dict from class numbers to weights.

    Returns: the weights, (n,).
    Raises: TypeError for labels that are not numbers or weights that are no dict. ValueError for
      labels of another shape, or a class that occurs in no row.
    """
    array = numbers(y, "y")
    if not isinstance(class_weight, Mapping):
        raise TypeError(
            f"class_weight must be a dict such as {{0: 1.0, 1: 5.0}}, got {class_weight!r}."
        )
    if array.ndim not in (1, 2):
        raise ValueError(f"y must have shape (n,), (n, 1) or (n, c), got {array.shape}.")
    if array.ndim == 2:
        array = array[:, 0] if array.shape[1] == 1 else array.argmax(axis=1)
    classes = np.round(array).astype(np.int64)
    known = set(np.unique(classes).tolist())
    unknown = [name for name in class_weight if name not in known]
    if unknown:
        raise ValueError(
            f"class_weight must name classes of y, got {unknown[0]!r}, which is none of "
            f"{sorted(known)[:10]}."
        )
    weights = np.ones(len(classes))
    for name, weight in class_weight.items():
        weights[classes == name] = weight
    return weights


def _are_rows(y: Any) -> bool:
    return isinstance(y, Mapping) or (hasattr(y, "__len__") and not isinstance(y, str | bytes))
