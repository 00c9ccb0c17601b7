"""Penultimate features: the input of the last layer with weights in a model."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import scipy.sparse
import tensorflow as tf
from numpy.typing import NDArray

from influence.net import ops
from influence.net.graph import is_functional, nodes_of
from influence.net.inputs import for_call

_AFFINE = (
    keras.layers.Dense,
    keras.layers.EinsumDense,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
)


class Penultimate:
    """Question that returns the penultimate features of a batch, (n, f) in float32.

    The model must be functional or sequential, with one output. Its last layer with weights must be
    dense or a convolution. If this layer is applied to many positions, such as pixels, the features
    are averaged over the positions, because such models pool their outputs over the positions too.

    Args:
      model: a Keras model that returns the features, or None if the net's inputs are the features.
    """

    def __init__(self, model: keras.Model | None):
        self.model = model
        self._traced: Any = None

    def __getstate__(self) -> dict:
        """Pickle the model without its traced function."""
        return {**self.__dict__, "_traced": None}

    @classmethod
    def of(cls, net: Any) -> Penultimate | None:
        """Return the question for a net, or None if the model's last layer is not recognised."""
        model = net.flat.model
        graph = getattr(model, "_functional", None) or model
        if not is_functional(graph) or len(graph.outputs) != 1:
            return None
        tensor = _last_input(graph)
        if tensor is None:
            return None
        if any(tensor is given for given in graph.inputs):
            return cls(None) if len(graph.inputs) == 1 and tensor.dtype != "string" else None
        inputs = graph._inputs_struct
        if isinstance(inputs, list | tuple) and len(inputs) == 1:
            (inputs,) = inputs  # a Sequential model has one input, but stores a list of it
        return cls(keras.Model(inputs, tensor, name=f"{model.name}_penultimate"))

    def __call__(self, net: Any, theta: NDArray | None, x: Any, y: NDArray) -> NDArray:
        """Return the features of one batch."""
        if self.model is None:
            found = next(iter(x.values())) if isinstance(x, dict) else x
        else:
            x = tf.nest.map_structure(tf.convert_to_tensor, x)
            if self._traced is None:
                any_rows = tf.nest.map_structure(
                    lambda t: tf.TensorSpec([None, *t.shape[1:]], t.dtype), x
                )
                made = tf.function(self._features, autograph=False)
                self._traced = made.get_concrete_function(any_rows)
            found = self._traced(x).numpy()
        if scipy.sparse.issparse(found):
            found = found.toarray()
        found = np.asarray(found, np.float32)
        while found.ndim > 2:
            found = found.mean(axis=1)
        return found

    def _features(self, x: Any) -> Any:
        with keras.StatelessScope(), ops.exact():
            return self.model(for_call(self.model, x), training=False)  # type: ignore[misc, arg-type]


def _last_input(graph: Any) -> Any:
    """Return the symbolic input of the last dense or convolution layer in a graph.

    The result is None if there is no such layer, or if it or an operation after it has several
    inputs or its channels in the first axis. It is also None if another layer with a matrix or a
    kernel comes after it.
    """
    for node in reversed(nodes_of(graph)):
        operation = node.operation
        if len(node.input_tensors) > 1:
            return None  # such as a sum, which may combine several last layers
        inner = getattr(operation, "_functional", None) or operation
        if isinstance(operation, keras.Model):
            if not is_functional(inner) or len(inner.inputs) != 1:
                return None
            found = _last_input(inner)
            if found is None:
                continue
            if found is inner.inputs[0]:
                return node.input_tensors[0]
            return keras.Model(inner.inputs, found)(node.input_tensors[0])
        if getattr(operation, "data_format", None) == "channels_first":
            return None  # `Penultimate` averages over all axes except the last
        if isinstance(operation, _AFFINE) and node.input_tensors:
            return node.input_tensors[0]
        if any(len(weight.shape) > 1 for weight in getattr(operation, "weights", ())):
            return None  # such as a recurrent layer, which is not affine in its input
    return None
