"""Measurements: what to predict the change of on a test example, instead of its loss.

Each is a function of (labels y, the model's output) -> one number per example, of TensorFlow
operations, for the `measurement` of `Influence.scores` and its kin; a function of one's own serves
as well. These take logits z, the outputs before any softmax or sigmoid, of classification models:

- y (n,) or (n, 1) class numbers, or (n, c) with a 1 for the class, against outputs (n, c);
- y (n,) or (n, 1), 0 or -1 against 1, against outputs (n, 1) or (n,): z is the log odds of 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf


def _of_logits(function: Callable) -> Callable:
    """Marked, so that a model that ends in probabilities is refused."""
    vars(function)["takes_logits"] = True
    return function


@_of_logits
def margin(y: Any, output: Any) -> Any:
    """The log odds that the model gives the label.

    z_y - log sum_{k != y} exp z_k = log p_y / (1 - p_y), the model output function of TRAK (Park et
    al. 2023, section 3); for two classes by one logit, z or -z. Above zero where the label has more
    than half of the probability. Unlike a loss it does not saturate.

    A positive score: the margin rises without the row, so the row hurt; the sign of a loss's score
    turned round.

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
    """The loss that falls as the model leaves the label: -log(1 - p_y).

    log(1 + exp(margin)), exact wherever p_y is near 0 or 1. The 2017 release's measurement for how
    near a test point is to being misclassified; for two classes it is the log loss of the other
    label.

    A positive score: it rises without the row, so the model gets surer of the label, and the row
    hurt; the sign of a loss's score turned round.

    Args:
      y: labels as above.
      output: logits as above.

    Returns: (n,), in nats.
    Raises: ValueError for outputs of another shape.
    """
    return tf.math.softplus(margin(y, output))


def logit(label: int) -> Callable[[Any, Any], Any]:
    """The logit of one class, whatever the example's own label.

    z_label; for two classes by one logit, z for label 1 and -z for label 0. A positive score: the
    logit rises without the row, so the row spoke against the class.

    Args:
      label: the class number.

    Returns: the measurement, (y, output) -> (n,), in nats.
    Raises: TypeError for a label that is no integer, ValueError for a negative one; when used,
      IndexError for one that the model does not have.
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
    """(n, c), or (n, 1) for one logit."""
    if len(output.shape) == 1:
        output = tf.expand_dims(output, 1)
    if len(output.shape) != 2:
        raise ValueError(f"output must be logits (n, c) or (n,), got shape {output.shape}.")
    return output


def _is_label(y: Any, z: Any) -> Any:
    """(n, c): True at each example's label."""
    if len(y.shape) == 2 and y.shape[1] == z.shape[1]:
        return y > 0.5
    return tf.one_hot(
        tf.cast(tf.reshape(y, [-1]), tf.int32), z.shape[1], True, False, dtype=tf.bool
    )
