"""The exact Hessian of a chain of layers, from matrix products instead of Hessian products.

Along a chain, z = a W + b in an affine layer and a' = phi(z) in an activation, so the second
derivative of a row's loss by theta (with d. the change of a quantity along a change of theta) is

    d2 loss = sum over activations of    (d loss / d a') phi''(z) (dz)^2
            + sum over affine layers of  2 (d loss / d z) . (da dW)
            + (d output)' (d2 loss / d output2) (d output).

The first and the last are J' D J, with J the Jacobian of z or of the output by the parameters
before it, which is carried forward through the chain; the middle one pairs J with the layer's own
parameters. The last alone is the Gauss-Newton matrix. One product of d vectors with the Hessian
would take d backward passes; this takes one backward pass and products of large matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from numpy.typing import NDArray

from influence.curvature import jacobian
from influence.curvature.jacobian import Jacobian
from influence.curvature.layers import Affine, AffineLayers
from influence.examples.examples import Examples
from influence.net.flat import FlatModel
from influence.net.net import GenericNeuralNet

_BYTES = 1 << 30  # what the Jacobians of one batch may take,
_COPIES = 8  # in as many copies
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
_IDENTITY = (layers.InputLayer, layers.Dropout)


@dataclass(frozen=True, eq=False)
class _Step:
    """A layer of the chain; `own` is where its weights are in theta, or None if it has none."""

    layer: Any
    kind: str  # "affine", "activation" or "linear"
    own: Affine | None = None


class Chain:
    """A model whose layers follow one another, each affine, elementwise, or linear and weightless.

    Args:
      traced: the model.
      steps: its layers.
    """

    def __init__(self, traced: FlatModel, steps: tuple[_Step, ...]):
        self.traced, self.steps = traced, steps

    @classmethod
    def of(cls, traced: FlatModel, x: Any) -> Chain | None:
        """The model as a chain, or None if it is none.

        Args:
          traced: the model.
          x: a few rows of input tensors, on which the layers are tried.
        """
        model = traced.model
        if isinstance(x, dict) or not _in_a_row(model):
            return None
        try:
            own = {id(affine.layer): affine for affine in AffineLayers(traced, x).layers}
        except ValueError:  # theta is in other layers too
            return None
        steps = []
        for layer in model.layers:
            if type(layer) in _IDENTITY:
                continue
            kind = _kind(layer)
            if kind is None or layer.compute_dtype != traced.dtype.name:
                return None
            steps.append(_Step(layer, kind, own.pop(id(layer), None)))
        return None if own else cls(traced, tuple(steps))

    def rows_per_batch(self, x: Any) -> int:
        """Rows whose Jacobians fit into memory; bounds memory, changes no result.

        Args:
          x: a row of inputs.
        """
        numbers, columns = 1, 0
        for step, z in zip(self.steps, self._forward(self.traced.theta(), x)[1:], strict=True):
            if step.own is not None:
                columns += step.own.entries.size
            numbers = max(numbers, int(tf.size(z)) * columns)
        return max(_BYTES // (numbers * self.traced.dtype.itemsize * _COPIES), 1)

    def beats_products(self, x: Any) -> bool:
        """Whether a row takes fewer multiplications here than d Hessian products do.

        Few outputs and many parameters of convolutions, shared by many positions, speak for this;
        a wide last layer for products.

        Args:
          x: a row of inputs.
        """
        squares, forward, before, own = 0, 0, 0, None
        values = self._forward(self.traced.theta(), x)[1:]
        for step, z in zip(self.steps, values, strict=True):
            width = int(tf.size(z))
            if step.kind == "affine":
                forward += width * int(np.prod(step.layer.kernel.shape[:-1]))
            elif step.kind == "activation":
                # A channel knows its own weights only: f rows of the layer's f x c.
                f = 0 if own is None else len(own.entries)
                squares += width * (before**2 + before * f + f**2)
            before += 0 if own is None else own.entries.size
            own = step.own
        squares += int(tf.size(values[-1])) * sum(self.traced.sizes) ** 2
        # Reverse over reverse: forward and back, twice.
        return squares <= 4 * forward * sum(self.traced.sizes)

    def hessian(self, x: Any, y: Any, theta: Any = None) -> NDArray:
        """The Hessian (d, d) of a batch's mean loss, without the penalty.

        Args:
          x: (n, ...) inputs.
          y: (n, ...) labels.
          theta: (d,) tensor; None: the model's weights as they are.
        """
        t = self.traced
        theta = t.theta() if theta is None else theta
        matrix = t.run("chain", self._hessian, theta, t.inputs(x), t.tensor(y))
        order = np.concatenate([s.own.entries.ravel() for s in self.steps if s.own is not None])
        if np.array_equal(order, np.arange(len(order))):  # as it mostly is: no second copy
            return matrix
        whole = np.empty_like(matrix)
        whole[np.ix_(order, order)] = matrix
        return whole

    # --- inside -----------------------------------------------------------------------------------

    def _forward(self, theta: Any, x: Any) -> list[Any]:
        """The input, and the output of every layer."""
        t = self.traced
        parts = zip(t.weights, tf.split(theta, t.sizes), strict=True)
        mapping = [(w, tf.reshape(part, w.shape)) for w, part in parts]
        values = [tf.cast(x, theta.dtype)]
        with keras.StatelessScope(state_mapping=mapping):
            for step in self.steps:
                values.append(step.layer(values[-1]))
        return values

    def _hessian(self, theta: Any, x: Any, y: Any) -> Any:
        """(d, d), its parameters in the order of the chain."""
        loss = self.traced.loss.function
        with tf.GradientTape() as tape:
            tape.watch(theta)
            values = self._forward(theta, x)
            total = tf.reduce_sum(tf.cast(loss(y, values[-1]), theta.dtype))
        slopes = tape.gradient(
            total, values[1:], unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        matrix: Any = tf.zeros([0, 0], theta.dtype)
        J = Jacobian()
        for step, before, after, slope in zip(
            self.steps, values[:-1], values[1:], slopes, strict=True
        ):
            if step.kind == "activation":
                first, second = jacobian.derivatives(step.layer, before)
                matrix = J.add_square(matrix, slope * second)
                J = J.scaled(first)
            elif step.kind == "linear":
                J = Jacobian(jacobian.folded(step.layer, J.scaled(tf.ones_like(before)).dense))
            else:
                dense = J.scaled(tf.ones_like(before)).dense
                pushed = jacobian.pushed(step.layer, self._kernel(step, theta), dense)
                J = Jacobian(pushed)
                if step.own is not None:
                    matrix = jacobian.widened(matrix, step.own, dense, slope)
                    J = Jacobian(pushed, step.own.inputs(before, after))
        matrix = jacobian.add_output(
            matrix, J.scaled(tf.ones_like(values[-1])).dense, loss, y, values[-1]
        )
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
    """The Hessian (d, d) of the mean loss, without the penalty, if a chain is the faster way.

    Args:
      net: the net.
      examples: the training set.
      batch_size: rows at a time at most.

    Returns: the matrix; None for a net that is no chain, or whose products take less time.
    """
    row = net.flat.inputs(examples.take([0]).x)
    chain = Chain.of(net.flat, row)
    if chain is None or not chain.beats_products(row):
        return None
    size = min(batch_size or len(examples), chain.rows_per_batch(row))
    matrix = np.zeros((net.num_parameters, net.num_parameters))  # float32 sums in float64
    parts = examples.map_over(_hessian_sum, net, batch_size=size, what="forming the matrix")
    for part in parts:
        matrix += part
        del part  # not beside the next batch's
    matrix /= len(examples)
    return matrix.astype(net.dtype, copy=False)


def _hessian_sum(net: GenericNeuralNet, theta: NDArray | None, x: Any, y: NDArray) -> NDArray:
    """Sum of the Hessians (d, d) of a batch's losses, of a net that is a chain: a question."""
    if net.flat not in _KNOWN:
        chain = Chain.of(net.flat, net.flat.inputs(x))
        assert chain is not None  # who asks has looked
        _KNOWN[net.flat] = chain
    matrix = _KNOWN[net.flat].hessian(x, y, net.at(theta).theta_tensor())
    matrix *= len(y)
    return matrix


def _in_a_row(model: keras.Model) -> bool:
    """Whether each layer takes what the one before it gives, and nothing else."""
    try:
        row = [layer for layer in model.layers if not isinstance(layer, layers.InputLayer)]
        inputs = [model.inputs[0], *(layer.output for layer in row[:-1])]
        return (
            len(model.inputs) == 1
            and all(layer.input is given for layer, given in zip(row, inputs, strict=True))
            and row[-1].output is model.outputs[0]
        )
    except (AttributeError, IndexError, ValueError):  # not functional, or a layer called twice
        return False


def _kind(layer: Any) -> str | None:
    channels_last = getattr(layer, "data_format", None) in (None, "channels_last")
    kind = type(layer)  # not isinstance: a subclass may do anything
    if kind in (layers.Dense, layers.Conv2D):
        plain = layer.activation is keras.activations.linear and channels_last
        # TensorFlow has no transpose of a dilated convolution on a CPU.
        if kind is layers.Conv2D:
            plain = plain and layer.groups == 1 and max(layer.dilation_rate) == 1
        return "affine" if plain else None
    if kind is layers.Activation:
        return "activation" if layer.activation.__name__ in _ELEMENTWISE else None
    if kind in (layers.ReLU, layers.LeakyReLU, layers.ELU):
        return "activation"
    return "linear" if kind in _LINEAR and channels_last else None
