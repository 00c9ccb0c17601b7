"""Measurements: functions whose change influence scores can predict, in place of the test loss.

A measurement takes labels y and the model's outputs. It returns one number per example, computed by
TensorFlow operations. Pass a function from this file, or your own, to `Influence.scores`. The
functions in this file need logits z as outputs. Logits are the values before softmax or sigmoid.

- Outputs (n, c) need class numbers y (n,) or (n, 1), or one-hot labels y (n, c).
- Outputs (n, 1) or (n,) need labels y (n,) or (n, 1), which are 1 and 0, or 1 and -1. The logit z
  is the log odds of label 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from influence.common.numbers import numbers


def _of_logits(function: Callable) -> Callable:
    """Mark a measurement that needs logits. Models whose logits are unknown are then refused."""
    vars(function)["takes_logits"] = True
    return function


@_of_logits
def margin(y: Any, output: Any) -> Any:
    """Return the margin, which is the log odds of the label y in the model's prediction.

    For the label's probability p_y, the margin is
    log p_y / (1 - p_y) = z_y - log sum_{k != y} exp z_k. TRAK uses it as model output function
    (Park et al. 2023, section 3). With one logit z for two classes, the margin is z for label 1
    and -z for the other label. Unlike a loss, the margin does not saturate.

    A positive score means that the margin rises if the training row is removed, so the row hurt.
    For a loss, a positive score means that the row helped.

    Args:
      y: labels, in a form that the description of this module lists.
      output: logits, in the form that belongs to these labels.

    Returns: the margins (n,), in nats.
    Raises: ValueError for outputs of another shape.
    """
    z, y = _logits(output), _tensor(y, "y")
    if z.shape[1] == 1:
        return tf.where(tf.reshape(y, [-1]) > 0, z[:, 0], -z[:, 0])
    label = _is_label(y, z)
    own = tf.reduce_sum(tf.where(label, z, tf.zeros_like(z)), axis=1)
    others = tf.where(label, tf.constant(-np.inf, z.dtype), z)
    return own - tf.reduce_logsumexp(others, axis=1)


@_of_logits
def adversarial_loss(y: Any, output: Any) -> Any:
    """Return -log(1 - p_y), a loss that falls when the label y becomes less probable.

    p_y is the label's probability. The loss is computed as log(1 + exp(margin)), which is also
    accurate for p_y near 0 or 1. The code of Koh & Liang (2017) uses this loss to measure how close
    a test point is to misclassification. For two classes, it is the log loss of the other label.

    A positive score means that this loss rises if the training row is removed. Then the label
    becomes more probable, so the row hurt. For an ordinary loss, a positive score means that the
    row helped.

    Args:
      y: labels, as in `margin`.
      output: logits, as in `margin`.

    Returns: the losses (n,), in nats.
    Raises: ValueError for outputs of another shape.
    """
    return tf.math.softplus(margin(y, output))


def logit(label: int) -> Callable[[Any, Any], Any]:
    """Return a measurement that is the logit of one class. It ignores the example's label.

    With one logit z for two classes, the measurement is z for class 1 and -z for class 0. A
    positive score means that the logit rises if the training row is removed. The row was then
    evidence against the class.

    Args:
      label: the class number.

    Returns: the measurement, a function (y, output) -> (n,) in nats.
    Raises: TypeError if the label is not an integer, ValueError if it is negative. The measurement
      raises IndexError if the model does not have the class.
    """
    if isinstance(label, bool) or not isinstance(label, int | np.integer):
        raise TypeError(f"label must be a class number, got {label!r}.")
    if label < 0:
        raise ValueError(f"label must be a class number from 0 up, got {label}.")

    def measurement(y: Any, output: Any) -> Any:
        z = _logits(output)
        num_classes = max(z.shape[1], 2)
        if label >= num_classes:
            raise IndexError(f"label must lie in [0, {num_classes}) for this model, got {label}.")
        if z.shape[1] == 1:
            return z[:, 0] if label == 1 else -z[:, 0]
        return z[:, label]

    measurement.__name__ = f"logit({label})"
    return _of_logits(measurement)


def product(y: Any, output: Any) -> Any:
    """Return y_i . output_i for each row i. y_i is a vector, given in place of the row's label.

    The gradient of this number with respect to theta is J_i' y_i, where J_i is the Jacobian of the
    row's outputs with respect to theta. The outputs are reshaped to the shape of y.
    """
    both = tf.cast(y, output.dtype) * tf.reshape(output, tf.shape(y))
    return tf.reduce_sum(tf.reshape(both, [tf.shape(y)[0], -1]), axis=1)


def _tensor(value: Any, name: str) -> Any:
    return value if tf.is_tensor(value) else tf.constant(numbers(value, name))


def _logits(output: Any) -> Any:
    """Return the output with shape (n, c), or (n, 1) for one logit."""
    output = _tensor(output, "output")
    if len(output.shape) == 1:
        output = tf.expand_dims(output, 1)
    if len(output.shape) != 2:
        raise ValueError(f"output must be logits (n, c) or (n,), got shape {output.shape}.")
    return output


def _is_label(y: Any, z: Any) -> Any:
    """Return a mask (n, c). Entry (i, k) is True if k is the label of example i."""
    if len(y.shape) == 2 and y.shape[1] == z.shape[1]:
        return y > 0.5
    return tf.one_hot(
        tf.cast(tf.reshape(y, [-1]), tf.int32), z.shape[1], True, False, dtype=tf.bool
    )
