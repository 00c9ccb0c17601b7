"""Measurements: functions of a test example whose change is predicted in place of its loss's.

A measurement is a function (labels y, model's output) -> one number per example, made of TensorFlow
operations. Pass one of these, or your own, to `Influence.scores` and similar methods. The functions
below take the logits z of a classification model, its outputs before softmax or sigmoid:

- labels y (n,) or (n, 1) of class numbers, or (n, c) one-hot, with outputs (n, c);
- labels y (n,) or (n, 1), either 1 or not (0 or -1), with outputs (n, 1) or (n,): z is the log odds
  of label 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf


def _of_logits(function: Callable) -> Callable:
    """Mark a function, so that a model that outputs probabilities is refused."""
    vars(function)["takes_logits"] = True
    return function


@_of_logits
def margin(y: Any, output: Any) -> Any:
    """Return the log odds that the model gives the label.

    z_y - log sum_{k != y} exp z_k = log p_y / (1 - p_y), the model output function of TRAK (Park et
    al. 2023, section 3). With one logit for two classes: z or -z. Positive if p_y > 1/2.
    Unlike a loss, the margin does not saturate.

    A positive score: the margin rises without the row, so the row hurt. For a loss, a positive
    score means that the row helped.

    Args:
      y: labels as above.
      output: logits as above.

    Returns: (n,), in nats.
    Raises: ValueError for outputs of another shape.
    """
    z = _logits(output)
    if z.shape[1] == 1:
        return tf.where(tf.reshape(y, [-1]) > 0, z[:, 0], -z[:, 0])
    label = _is_label(y, z)
    own = tf.reduce_sum(tf.where(label, z, tf.zeros_like(z)), axis=1)
    others = tf.where(label, tf.constant(-np.inf, z.dtype), z)
    return own - tf.reduce_logsumexp(others, axis=1)


@_of_logits
def adversarial_loss(y: Any, output: Any) -> Any:
    """Return the loss that falls when the label becomes less probable: -log(1 - p_y).

    It is computed as log(1 + exp(margin)), which is accurate also for p_y near 0 or 1. The 2017
    release uses it to measure how close a test point is to misclassification. For two classes it
    is the log loss of the other label.

    A positive score: this loss rises without the row. The label becomes more probable, so the row
    hurt. For an ordinary loss, a positive score means that the row helped.

    Args:
      y: labels as above.
      output: logits as above.

    Returns: (n,), in nats.
    Raises: ValueError for outputs of another shape.
    """
    return tf.math.softplus(margin(y, output))


def logit(label: int) -> Callable[[Any, Any], Any]:
    """Return a measurement: the logit of one class, whatever label the example has.

    z_label; with one logit for two classes, z for label 1 and -z for label 0. A positive score:
    the logit rises without the row, so the row was evidence against the class.

    Args:
      label: the class number.

    Returns: the measurement, (y, output) -> (n,), in nats.
    Raises: TypeError for a label that is no integer, ValueError for a negative one. When called,
      the measurement raises IndexError for a class that the model does not have.
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


def _logits(output: Any) -> Any:
    """Return the output as (n, c), or (n, 1) for one logit."""
    if len(output.shape) == 1:
        output = tf.expand_dims(output, 1)
    if len(output.shape) != 2:
        raise ValueError(f"output must be logits (n, c) or (n,), got shape {output.shape}.")
    return output


def _is_label(y: Any, z: Any) -> Any:
    """Return a mask (n, c) that is True at each example's label."""
    if len(y.shape) == 2 and y.shape[1] == z.shape[1]:
        return y > 0.5
    return tf.one_hot(
        tf.cast(tf.reshape(y, [-1]), tf.int32), z.shape[1], True, False, dtype=tf.bool
    )
