"""The derivative of a layer's output by all parameters before it, carried through a chain.

Arrays are (n, ..., c, q): n rows, positions, c channels, q parameters. What
`influence.curvature.chain` adds up to a Hessian is made here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from keras import layers

from influence.curvature.layers import Affine


@dataclass(frozen=True, eq=False)
class Jacobian:
    """The derivative of a layer's output (n, ..., c) by the parameters before it.

    Attributes:
      dense: (n, ..., c, q) by the weights of all layers before, or None if they have none.
      inputs: (n, t, f) of the affine layer that has just been passed, or None. Channel c's
        derivative by that layer's weights (f, c') is `inputs` for c' = c, else zero.
    """

    dense: Any = None
    inputs: Any = None

    def scaled(self, first: Any) -> Jacobian:
        """Behind an activation whose derivative is `first` (n, ..., c): all of it dense."""
        dense = None if self.dense is None else tf.expand_dims(first, -1) * self.dense
        if self.inputs is None:
            return Jacobian(dense)
        c, f = first.shape[-1], self.inputs.shape[-1]
        by_position = tf.reshape(first, [tf.shape(first)[0], -1, c])
        own = tf.expand_dims(by_position, -1) * tf.expand_dims(self.inputs, 2)  # (n, t, c, f)
        own = tf.expand_dims(own, -1) * tf.eye(c, dtype=first.dtype)[:, None, :]
        own = tf.reshape(own, [-1, *first.shape[1:], f * c])
        return Jacobian(own if dense is None else tf.concat([dense, own], -1))

    def add_square(self, matrix: Any, weights: Any) -> Any:
        """The matrix plus J' diag(weights) J, weights (n, ..., c)."""
        c = weights.shape[-1]
        w = tf.reshape(weights, [-1, c])
        square = border = corner = None
        if self.dense is not None:
            q = self.dense.shape[-1]
            J = tf.reshape(self.dense, [-1, c, q])
            weighted = w[:, :, None] * J
            square = _gram(J, weighted)
        if self.inputs is not None:
            f = self.inputs.shape[-1]
            A = tf.reshape(self.inputs, [-1, f])
            own = tf.einsum("mcf,mg->cfg", w[:, :, None] * A[:, None, :], A)
            eye = tf.eye(c, dtype=A.dtype)
            corner = tf.reshape(tf.einsum("cfg,cd->fcgd", own, eye), [f * c, f * c])
            if self.dense is not None:
                border = tf.reshape(tf.einsum("mcq,mf->qfc", weighted, A), [q, f * c])
        if square is not None and corner is not None:
            return matrix + _bordered(square, border, corner)
        return matrix if square is corner else matrix + (square if corner is None else corner)


def widened(matrix: Any, own: Affine, before: Any, slope: Any) -> Any:
    """The matrix with an affine layer's weights added to its columns: the pairs da dW.

    Args:
      matrix: (q, q).
      own: the layer and where its weights are.
      before: (n, ..., c, q) derivative of its input, or None.
      slope: of the loss by its output.
    """
    f, c = own.entries.shape
    q = matrix.shape[0]
    parts = []
    if own.has_kernel:
        rows = f - own.has_bias
        parts.append(
            tf.zeros([q, rows * c], matrix.dtype)
            if before is None
            else tf.reshape(_paired(own.layer, before, slope), [q, rows * c])
        )
    if own.has_bias:
        parts.append(tf.zeros([q, c], matrix.dtype))
    return _bordered(matrix, tf.concat(parts, 1), tf.zeros([f * c, f * c], matrix.dtype))


def _paired(layer: Any, before: Any, slope: Any) -> Any:
    """(q, f, c): sum over rows and positions of d(input of weight f) times the slope at c."""
    i, q = before.shape[-2:]
    J = tf.reshape(before, [-1, i, q])
    c = slope.shape[-1]
    if isinstance(layer, layers.Dense):
        return tf.einsum("mc,miq->qic", tf.reshape(slope, [-1, c]), J)
    # What each input pixel is to each kernel entry: the slope at the output pixel they make.
    k = int(np.prod(layer.kernel_size))
    spread = tf.reshape(tf.eye(k * c, dtype=slope.dtype), [*layer.kernel_size, c, k * c])
    shape = tf.concat([tf.shape(before)[:3], [k * c]], 0)
    slopes = tf.nn.conv2d_transpose(
        slope, tf.transpose(spread, [0, 1, 3, 2]), shape, list(layer.strides),
        layer.padding.upper(),
    )  # fmt: skip
    return tf.einsum("mkc,miq->qkic", tf.reshape(slopes, [-1, k, c]), J)


def pushed(layer: Any, kernel: Any, before: Any) -> Any:
    """The derivative of an affine layer's output, from that of its input."""
    if before is None:
        return None
    if isinstance(layer, layers.Dense):
        return tf.einsum("...iq,io->...oq", before, kernel)

    def convolved(x):
        return tf.nn.conv2d(x, kernel, list(layer.strides), layer.padding.upper())

    return folded(convolved, before)


def folded(linear: Callable, before: Any) -> Any:
    """A linear map of activations, taken of each column of their derivative (n, ..., q)."""
    if before is None:
        return None
    *inner, q = before.shape[1:]
    rank = len(before.shape)
    folded = tf.transpose(before, [0, rank - 1, *range(1, rank - 1)])
    found = linear(tf.reshape(folded, [-1, *inner]))
    found = tf.reshape(found, [-1, q, *found.shape[1:]])
    rank = len(found.shape)
    return tf.transpose(found, [0, *range(2, rank), 1])


def add_output(matrix: Any, before: Any, loss: Any, y: Any, output: Any) -> Any:
    """The matrix plus J' (d2 loss / d output2) J, the Gauss-Newton part."""
    with tf.GradientTape() as outer:
        outer.watch(output)
        with tf.GradientTape() as inner:
            inner.watch(output)
            total = tf.reduce_sum(loss(y, output))
        slope = inner.gradient(total, output)
    curved = outer.batch_jacobian(slope, output, experimental_use_pfor=False)
    s, q = int(np.prod(output.shape[1:])), before.shape[-1]
    J = tf.reshape(before, [-1, s, q])
    return matrix + _gram(J, tf.matmul(tf.reshape(curved, [-1, s, s]), J))


def _gram(J: Any, weighted: Any) -> Any:
    q = J.shape[-1]
    return tf.matmul(tf.reshape(J, [-1, q]), tf.reshape(weighted, [-1, q]), transpose_a=True)


def _bordered(square: Any, border: Any, corner: Any) -> Any:
    right = tf.concat([tf.transpose(border), corner], 1)
    return tf.concat([tf.concat([square, border], 1), right], 0)


def derivatives(layer: Any, z: Any) -> tuple[Any, Any]:
    """phi'(z) and phi''(z) of an elementwise layer."""
    zero = tf.UnconnectedGradients.ZERO
    with tf.GradientTape() as outer:
        outer.watch(z)
        with tf.GradientTape() as inner:
            inner.watch(z)
            value = layer(z)
        first = inner.gradient(value, z, unconnected_gradients=zero)
    return first, outer.gradient(first, z, unconnected_gradients=zero)
