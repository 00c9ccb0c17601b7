"""Connectionist temporal classification (Graves et al. 2006), with derivatives of every order."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

# This number replaces the logarithm of zero. Minus infinity would make the loss's derivatives NaN.
_IMPOSSIBLE = -1e30
_BLANK = 0


def ctc_loss(y: Any, z: Any) -> Any:
    """Return -log p(y | z) for each row, as `keras.losses.ctc` does.

    TensorFlow's function has no second derivative. This function therefore computes the forward
    recursion over the T time steps. Let l be the labels with a blank before and after each label,
    and p_t the softmax of z_t. a_t(s) is the probability of all paths over the first t steps that
    are at l_s in step t. The bracket [...] is 1 if its condition holds, else 0:

        a_t(s) = p_t(l_s) (a_{t-1}(s) + a_{t-1}(s - 1) + [l_s differs from l_{s-2}] a_{t-1}(s - 2))

    p(y | z) is the sum of a_T at the last label and at the blank after it.

    Args:
      y: (n, m) class numbers. Class 0 is the blank. It also pads shorter label sequences.
      z: (n, T, c) logits.

    Returns: the losses (n,), in nats. If a row's labels do not fit into T steps, its loss is 1e30.
    """
    y = tf.cast(y, tf.int32)
    n, m = tf.shape(y)[0], y.shape[1]
    log_p = tf.nn.log_softmax(z)
    blanks = tf.fill([n, m + 1], _BLANK)
    extended = tf.reshape(tf.stack([blanks[:, :m], y], axis=2), [n, 2 * m])
    extended = tf.concat([extended, blanks[:, :1]], 1)  # (n, 2 m + 1)
    log_p = tf.gather(log_p, tf.tile(extended[:, None], [1, z.shape[1], 1]), axis=2, batch_dims=2)
    skips = tf.concat(
        [
            tf.zeros([n, 2], tf.bool),
            (extended != _BLANK)[:, 2:] & (extended[:, 2:] != extended[:, :-2]),
        ],
        1,
    )
    none = tf.fill([n, 2 * m + 1], tf.constant(_IMPOSSIBLE, z.dtype))
    a = tf.where(tf.range(2 * m + 1) < 2, log_p[:, 0], none)
    for t in range(1, z.shape[1]):
        before = tf.concat([none[:, :1], a[:, :-1]], 1)
        over = tf.where(skips, tf.concat([none[:, :2], a[:, :-2]], 1), none)
        a = log_p[:, t] + _log_sum(tf.stack([a, before, over]), 0)
        a = tf.maximum(a, none)  # no entry falls below _IMPOSSIBLE
    last = 2 * tf.reduce_sum(tf.cast(y != _BLANK, tf.int32), axis=1)[:, None]
    place = tf.range(2 * m + 1)[None]
    return -_log_sum(tf.where((place == last) | (place == last - 1), a, none), 1)


def _log_sum(values: Any, axis: int) -> Any:
    """Return log(sum(exp(values))). Its derivative is finite even if all values are _IMPOSSIBLE."""
    top = tf.stop_gradient(tf.reduce_max(values, axis=axis, keepdims=True))
    total = tf.reduce_sum(tf.exp(values - top), axis=axis)
    return tf.squeeze(top, axis) + tf.math.log(total)
