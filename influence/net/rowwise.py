"""Functions that call a loss and return one value per row, for labels with or without weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from influence.examples import labels as packing


def labels_of(y: Any, output: str | None, several: bool = False) -> Any:
    """Return the labels of one output, without weights.

    `output` is the output's name, or None for a model with one output. If `several` is True and y
    has labels for several outputs, all these labels are returned as a dict.

    Raises: ValueError if y has no labels for the output.
    """
    found = packing.labels(y)
    if not isinstance(found, Mapping):
        return found
    if output is None and len(found) == 1:
        return next(iter(found.values()))
    if several:
        return found
    if output not in found:
        what = "one array of labels" if output is None else f"labels for the output {output!r}"
        raise ValueError(f"y must have {what}, got labels for {sorted(found)}.")
    return found[output]


def weight_of(y: Any, output: str | None) -> Any:
    """Return the sample weights (n,) of one output, or None if y has no weights."""
    found = packing.sample_weights(y)
    if not isinstance(found, Mapping):
        return found
    return next(iter(found.values())) if output is None else found.get(output)


def of_rows(
    call: Callable, own: bool, keeps_labels: bool, y: Any, output: Any, positions: Any = None
) -> Any:
    """Return the value of a Keras loss for each row, (n,).

    Args:
      call: the loss as a function of labels and outputs.
      own: True for Keras' own losses. They average over the last axis, so they would average
        outputs (n,) over the examples. Some of them broadcast labels (n,) and outputs (n, 1) to
        (n, n). Outputs and labels (n,) therefore get a second axis.
      keeps_labels: True if labels stay unchanged. If it is False, labels are converted to the
        dtype of the outputs.
      y: the labels.
      output: the model's outputs.
      positions: (n, ...) weights of time steps or pixels. A row's value is then the weighted sum
        over its time steps or pixels. None means the mean over them.
    """
    if not keeps_labels:
        y = tf.cast(y, output.dtype)
    if own and len(output.shape) == 1:
        output = tf.expand_dims(output, -1)
    if own and len(output.shape) == len(y.shape) + 1 and output.shape[-1] == 1:
        y = tf.expand_dims(y, -1)
    return _over_positions(call(y, output), positions)


def of_callable(function: Callable, y: Any, output: Any) -> Any:
    """Call a user's function. If it fails for integer labels, cast them and call it again.

    The labels are cast to the dtype of the outputs. Keras always does this for a compiled function.
    """
    try:
        return function(y, output)
    except (TypeError, ValueError, tf.errors.InvalidArgumentError):
        if not hasattr(y, "dtype") or tf.as_dtype(y.dtype).is_floating:
            raise
    return function(tf.cast(y, output.dtype), output)


def as_keras_calls(function: Callable, y: Any, output: Any, positions: Any = None) -> Any:
    """Call a user's compiled function as Keras does, and average the values of each row.

    `positions` has the same meaning as in `of_rows`.
    """
    y = tf.cast(y, output.dtype)
    if abs(len(y.shape) - len(output.shape)) == 1:  # make the ranks equal, as Keras does
        if len(y.shape) == 1 and output.shape[-1] == 1:
            y = tf.expand_dims(y, -1)
        elif len(output.shape) == 1 and y.shape[-1] == 1:
            output = tf.expand_dims(output, -1)
        elif len(y.shape) < len(output.shape) and output.shape[-1] == 1:
            output = tf.squeeze(output, -1)
        elif len(y.shape) > len(output.shape) and y.shape[-1] == 1:
            y = tf.squeeze(y, -1)
    return _over_positions(function(y, output), positions)


def one_by_one(loss: keras.losses.Loss, y: Any, output: Any) -> Any:
    """Return the values (n,) of a loss that overrides `__call__`, from one call for each row.

    The loss may return for a whole batch another value than the mean of these n values.
    `GenericNeuralNet.validate` compares the two.
    """
    loss = in_dtype(loss, output.dtype.name)

    def of_row(part: Any) -> Any:
        y, output = (tf.expand_dims(t, 0) for t in part)
        return tf.reduce_mean(tf.cast(loss(y, output), output.dtype))

    # Without this reshape, the gradient with respect to `output` would be an IndexedSlices.
    output = tf.reshape(output, tf.shape(output))
    return tf.vectorized_map(of_row, (tf.convert_to_tensor(y), output))


def in_dtype(loss: keras.losses.Loss, dtype: str) -> keras.losses.Loss:
    """Return a copy of a Keras loss that computes in `dtype`. Keras' default is float32."""
    view = object.__new__(type(loss))  # copy.copy would serialise the loss
    vars(view).update({**vars(loss), "_dtype": dtype})
    return view


def _over_positions(values: Any, positions: Any) -> Any:
    """Average each example's losses over its time steps or pixels, or sum them with weights.

    Raises: ValueError if there is not exactly one loss for each weight of a position.
    """
    rank = len(values.shape)
    if positions is not None:
        if len(positions.shape) == rank + 1 and positions.shape[-1] == 1:
            positions = tf.squeeze(positions, -1)
        if len(positions.shape) != rank:
            raise ValueError(
                "loss must give one number for each masked position, of shape "
                f"{tuple(positions.shape)}, got shape {tuple(values.shape)}."
            )
        weighed = values * tf.cast(positions, values.dtype)
        return weighed if rank == 1 else tf.reduce_sum(weighed, axis=list(range(1, rank)))
    return values if rank <= 1 else tf.reduce_mean(values, axis=list(range(1, rank)))
