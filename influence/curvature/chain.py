"""Exact Hessian of a chain of layers, computed without Hessian-vector products.

An affine layer computes z = a W + b. An activation layer computes phi(z). When theta changes, z, a
and W change by dz, da and dW. The second-order change of a row's loss is then

    d2 loss = sum over activations of    (d loss / d phi) phi''(z) (dz)^2
            + sum over affine layers of  2 (d loss / d z) . (da dW)
            + (d output)' (d2 loss / d output2) (d output).

Let J be the Jacobian of z, a or the output with respect to all parameters of earlier layers. J is
computed forward through the chain. The first and the last term have the form J' D J. The middle
term couples the parameters of earlier layers with the layer's own weights. The last term is the
Gauss-Newton matrix. Forming the Hessian from products with d unit vectors takes at least d backward
passes. The chain takes one backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from numpy.typing import NDArray

from influence.common.memory import ACTIVATIONS, fitting
from influence.curvature.affine import Affine
from influence.curvature.layers import AffineLayers
from influence.examples.examples import Examples, Question
from influence.net.flat import FlatModel
from influence.net.heads import peeled
from influence.net.net import GenericNeuralNet

# While the Hessian is formed, memory holds this many arrays as large as a batch's largest Jacobian.
_COPIES = 8
_ELEMENTWISE = frozenset(
    "elu exponential gelu linear mish relu selu sigmoid silu softplus softsign tanh".split()
)
_LINEAR = (
    layers.Flatten,
    layers.Reshape,
    layers.Permute,
    layers.ZeroPadding2D,
    layers.AveragePooling2D,
    layers.GlobalAveragePooling2D,
)
_HEADS = (layers.Activation, layers.Softmax)
_IDENTITY = (layers.InputLayer, layers.Dropout)


@dataclass(frozen=True, eq=False)
class _Step:
    """Layer of a chain. `own` is None if theta contains no weights of the layer."""

    layer: Any
    kind: str  # "affine", "activation" or "linear"
    own: Affine | None = None


class Chain:
    """Model of successive layers. Each layer is affine, elementwise, or linear without weights.

    If the loss uses the logits before the model's final softmax or sigmoid, the chain ends with
    these logits. `peels` is True if the last layer contains that softmax or sigmoid as its
    activation.
    """

    def __init__(self, traced: FlatModel, steps: tuple[_Step, ...], peels: bool = False):
        self.traced, self.steps, self.peels = traced, steps, peels

    @classmethod
    def of(cls, traced: FlatModel, x: Any) -> Chain | None:
        """Convert a model to a chain, or return None if it is none. x holds a few input rows."""
        model = traced.model
        if isinstance(x, dict) or not traced.loss.takes_one_output or not _in_a_row(model):
            return None
        try:
            own = {id(affine.layer): affine for affine in AffineLayers(traced, x).layers}
        except ValueError:  # some weights of theta are in layers that are not affine
            return None
        steps, peels = [], False
        for layer in model.layers:
            head = traced.loss.head if layer is model.layers[-1] else None
            if type(layer) in _IDENTITY or (head and type(layer) in _HEADS):
                continue
            kind = _kind(layer, head)
            peels = head is not None
            if kind is None or layer.compute_dtype != traced.dtype.name:
                return None
            steps.append(_Step(layer, kind, own.pop(id(layer), None)))
        return None if own else cls(traced, tuple(steps), peels)

    def rows_per_batch(self, x: Any, at_most: int) -> int:
        """Return the number of rows that fit into memory with their Jacobians. x is one row."""
        numbers, columns = 1, 0
        for step, z in zip(self.steps, self._forward(self.traced.theta(), x)[1:], strict=True):
            if step.own is not None:
                columns += step.own.entries.size
            numbers = max(numbers, int(tf.size(z)) * columns)
        bytes_each = numbers * self.traced.dtype.itemsize * _COPIES
        return fitting(ACTIVATIONS, bytes_each, at_most)

    def beats_products(self, x: Any) -> bool:
        """Return True if the chain needs at most as many multiplications as d Hessian products.

        x is one row. The chain is usually faster for few outputs, and for convolutions over many
        positions. Products are faster for a wide last layer.
        """
        squares, forward, before, own = 0, 0, 0, None
        values = self._forward(self.traced.theta(), x)[1:]
        for step, z in zip(self.steps, values, strict=True):
            width = int(tf.size(z))
            if step.kind == "affine":
                forward += width * int(np.prod(step.layer.kernel.shape[:-1]))
            elif step.kind == "activation":
                # An affine layer with c channels has f x c weights. A channel uses f of these.
                f = 0 if own is None else len(own.entries)
                squares += width * (before**2 + before * f + f**2)
            before += 0 if own is None else own.entries.size
            own = step.own
        squares += int(tf.size(values[-1])) * sum(self.traced.sizes) ** 2
        # A Hessian product takes two forward and two backward passes.
        return squares <= 4 * forward * sum(self.traced.sizes)

    def hessian(self, x: Any, y: Any, theta: Any = None) -> NDArray:
        """Compute the Hessian (d, d) of a batch's mean loss, without the penalty.

        `theta` is a tensor (d,). None means the model's current weights.
        """
        t = self.traced
        theta = t.theta() if theta is None else theta
        matrix = t.run("chain", self._hessian, theta, *t.batch(x, y, weighed=True))
        order = np.concatenate([s.own.entries.ravel() for s in self.steps if s.own is not None])
        if np.array_equal(order, np.arange(len(order))):  # usually true, so no copy is made
            return matrix
        whole = np.empty_like(matrix)
        whole[np.ix_(order, order)] = matrix
        return whole

    # --- inside -----------------------------------------------------------------------------------

    def _forward(self, theta: Any, x: Any) -> list[Any]:
        """Return a list of the input x and the output of every layer."""
        t = self.traced
        parts = zip(t.weights, tf.split(theta, t.sizes), strict=True)
        mapping = [(w, tf.reshape(part, w.shape)) for w, part in parts]
        values = [tf.cast(x, theta.dtype)]
        with keras.StatelessScope(state_mapping=mapping):
            for step in self.steps:
                values.append(step.layer(values[-1]))
        # A loss that recognises the final activation uses the logits before it. Its derivative with
        # respect to the activation's result would be zero.
        values[-1] = peeled(values[-1]) if self.peels else tf.identity(values[-1])
        return values

    def _hessian(self, theta: Any, x: Any, y: Any) -> Any:
        """Compute the Hessian (d, d), with parameters in the order of the layers."""
        loss = self.traced.loss.function
        with tf.GradientTape() as tape:
            tape.watch(theta)
            values = self._forward(theta, x)
            total = tf.reduce_sum(tf.cast(loss(y, values[-1]), theta.dtype))
        slopes = tape.gradient(
            total, values[1:], unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        matrix: Any = tf.zeros([0, 0], theta.dtype)
        J = _Jacobian()
        for step, before, after, slope in zip(
            self.steps, values[:-1], values[1:], slopes, strict=True
        ):
            if step.kind == "activation":
                first, second = _derivatives(step.layer, before)
                matrix = J.add_square(matrix, slope * second)
                J = J.scaled(first)
            elif step.kind == "linear":
                J = _Jacobian(_folded(step.layer, J.scaled(tf.ones_like(before)).dense))
            else:
                dense = J.scaled(tf.ones_like(before)).dense
                pushed = _pushed(step.layer, self._kernel(step, theta), dense)
                J = _Jacobian(pushed)
                if step.own is not None:
                    matrix = _widened(matrix, step.own, dense, slope)
                    J = _Jacobian(pushed, step.own.inputs(before, after))
        matrix = _add_output(matrix, J.scaled(tf.ones_like(values[-1])).dense, loss, y, values[-1])
        return matrix / tf.cast(tf.shape(x)[0], theta.dtype)

    def _kernel(self, step: _Step, theta: Any) -> Any:
        if step.own is None or not step.own.has_kernel:
            return step.layer.kernel.value
        rows = len(step.own.entries) - step.own.has_bias
        return tf.reshape(tf.gather(theta, step.own.entries[:rows]), step.layer.kernel.shape)


_KNOWN: WeakKeyDictionary[FlatModel, Chain] = WeakKeyDictionary()


def chain_hessian(
    net: GenericNeuralNet, examples: Examples, batch_size: int | None = None
) -> NDArray | None:
    """Compute the Hessian (d, d) of the mean loss, without the penalty, if a chain is faster.

    Returns: the matrix, or None if the net is not a chain or products take less time.
    """
    row = net.flat.inputs(examples.take([0]).x)
    chain = Chain.of(net.flat, row)
    if chain is None or not chain.beats_products(row):
        return None
    size = chain.rows_per_batch(row, batch_size or len(examples))
    return mean_matrix(_hessian_sum, net, examples, size)


def mean_matrix(
    question: Question, net: GenericNeuralNet, examples: Examples, batch_size: int
) -> NDArray:
    """Return the mean of a matrix (d, d) over all rows, weighted by the rows' masses.

    `question` returns the weighted sum over one batch.
    """
    # The sums are in float64, even if the net is in float32.
    matrix = np.zeros((net.num_parameters, net.num_parameters))
    parts = examples.map_over(question, net, batch_size=batch_size, what="forming the matrix")
    for part in parts:
        matrix += part
        del part  # free its memory before the next part is computed
    matrix /= net.mass(examples)
    return matrix.astype(net.dtype, copy=False)


def _hessian_sum(net: GenericNeuralNet, theta: NDArray | None, x: Any, y: NDArray) -> NDArray:
    """Return the sum of the Hessians (d, d) of a batch's losses. The net must be a chain."""
    if net.flat not in _KNOWN:
        chain = Chain.of(net.flat, net.flat.inputs(x))
        assert chain is not None  # chain_hessian has checked this
        _KNOWN[net.flat] = chain
    matrix = _KNOWN[net.flat].hessian(x, y, net.at(theta).theta_tensor())
    matrix *= len(y)
    return matrix


def _in_a_row(model: keras.Model) -> bool:
    """Return True if the only input of each layer is the output of the preceding layer."""
    try:
        row = [layer for layer in model.layers if not isinstance(layer, layers.InputLayer)]
        inputs = [model.inputs[0], *(layer.output for layer in row[:-1])]
        return (
            len(model.inputs) == 1
            and all(layer.input is given for layer, given in zip(row, inputs, strict=True))
            and len(model.outputs) == 1
            and row[-1].output is model.outputs[0]
        )
    except (AttributeError, IndexError, ValueError):  # not a functional model, or a repeated layer
        return False


def _kind(layer: Any, head: str | None = None) -> str | None:
    """Return "affine", "activation" or "linear", or None for any other layer.

    `head` is the model's final activation if the loss uses the logits before it, or None.
    """
    channels_last = getattr(layer, "data_format", None) in (None, "channels_last")
    kind = type(layer)  # a subclass may compute something else, so isinstance is not used
    if kind in (layers.Dense, layers.Conv2D):
        fused = getattr(layer.activation, "__name__", None)
        plain = channels_last and (layer.activation is keras.activations.linear or fused == head)
        # TensorFlow has no transpose of a dilated convolution on a CPU.
        if kind is layers.Conv2D:
            plain = plain and layer.groups == 1 and max(layer.dilation_rate) == 1
        return "affine" if plain else None
    if kind is layers.Activation:
        return "activation" if layer.activation.__name__ in _ELEMENTWISE else None
    if kind in (layers.ReLU, layers.LeakyReLU, layers.ELU):
        return "activation"
    return "linear" if kind in _LINEAR and channels_last else None


# --- derivatives with respect to the parameters of earlier layers -------------------------------


@dataclass(frozen=True, eq=False)
class _Jacobian:
    """Derivative of a layer's output with respect to the parameters up to this layer.

    The output (n, ..., c) has n rows and c channels.

    Attributes:
      dense: (n, ..., c, q) derivative with respect to the q weights that `inputs` does not cover,
        or None.
      inputs: (n, t, f) inputs at t positions, or None if the layer is not affine. They are the
        derivative of channel j with respect to column j of the layer's weights (f, c). The
        derivative with respect to all other columns is zero.
    """

    dense: Any = None
    inputs: Any = None

    def scaled(self, first: Any) -> _Jacobian:
        """Return the product with an activation's derivative `first`, (n, ..., c).

        The result has only `dense`, without `inputs`.
        """
        dense = None if self.dense is None else tf.expand_dims(first, -1) * self.dense
        if self.inputs is None:
            return _Jacobian(dense)
        c, f = first.shape[-1], self.inputs.shape[-1]
        by_position = tf.reshape(first, [tf.shape(first)[0], -1, c])
        own = tf.expand_dims(by_position, -1) * tf.expand_dims(self.inputs, 2)  # (n, t, c, f)
        own = tf.expand_dims(own, -1) * tf.eye(c, dtype=first.dtype)[:, None, :]
        own = tf.reshape(own, [-1, *first.shape[1:], f * c])
        return _Jacobian(own if dense is None else tf.concat([dense, own], -1))

    def add_square(self, matrix: Any, weights: Any) -> Any:
        """Return matrix + J' diag(weights) J, for `weights` (n, ..., c)."""
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


def _widened(matrix: Any, own: Affine, before: Any, slope: Any) -> Any:
    """Extend the matrix (q, q) by rows and columns for an affine layer's weights.

    `before` is the Jacobian of the layer's input. `slope` is d loss / d output of the layer.
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
    """Return the middle term of the Hessian, (q, f, c), summed over rows and positions."""
    i, q = before.shape[-2:]
    J = tf.reshape(before, [-1, i, q])
    c = slope.shape[-1]
    if isinstance(layer, layers.Dense):
        return tf.einsum("mc,miq->qic", tf.reshape(slope, [-1, c]), J)
    # For an input pixel and a kernel entry, `slopes` is the slope at the output pixel they affect.
    k = int(np.prod(layer.kernel_size))
    spread = tf.reshape(tf.eye(k * c, dtype=slope.dtype), [*layer.kernel_size, c, k * c])
    shape = tf.concat([tf.shape(before)[:3], [k * c]], 0)
    transposed = tf.transpose(spread, [0, 1, 3, 2])
    padding = layer.padding.upper()
    slopes = tf.nn.conv2d_transpose(slope, transposed, shape, list(layer.strides), padding)
    return tf.einsum("mkc,miq->qkic", tf.reshape(slopes, [-1, k, c]), J)


def _pushed(layer: Any, kernel: Any, before: Any) -> Any:
    """Compute the Jacobian of an affine layer's output from the Jacobian of its input."""
    if before is None:
        return None
    if isinstance(layer, layers.Dense):
        return tf.einsum("...iq,io->...oq", before, kernel)

    def convolved(x):
        return tf.nn.conv2d(x, kernel, list(layer.strides), layer.padding.upper())

    return _folded(convolved, before)


def _folded(linear: Callable, before: Any) -> Any:
    """Apply a linear layer to each of q columns of the Jacobian (n, ..., q) of its input."""
    if before is None:
        return None
    *inner, q = before.shape[1:]
    rank = len(before.shape)
    folded = tf.transpose(before, [0, rank - 1, *range(1, rank - 1)])
    found = linear(tf.reshape(folded, [-1, *inner]))
    found = tf.reshape(found, [-1, q, *found.shape[1:]])
    rank = len(found.shape)
    return tf.transpose(found, [0, *range(2, rank), 1])


def _add_output(matrix: Any, before: Any, loss: Any, y: Any, output: Any) -> Any:
    """Return matrix + J' (d2 loss / d output2) J. `before` is J, the Jacobian of the output."""
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


def _derivatives(layer: Any, z: Any) -> tuple[Any, Any]:
    """Compute phi'(z) and phi''(z) of an elementwise layer phi."""
    zero = tf.UnconnectedGradients.ZERO
    with tf.GradientTape() as outer:
        outer.watch(z)
        with tf.GradientTape() as inner:
            inner.watch(z)
            value = layer(z)
        first = inner.gradient(value, z, unconnected_gradients=zero)
    return first, outer.gradient(first, z, unconnected_gradients=zero)
