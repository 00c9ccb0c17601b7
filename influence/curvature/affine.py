"""Layers that are affine in their own weights, and the inputs that multiply these weights.

At each position t, such as a pixel or a time step, an affine layer computes z_t = a_t W + b. Its
activation, if the layer has one, acts on z. Some layers have separate weights for G groups of
channels. Such layers are grouped and depthwise convolutions, and normalisations with a scale W and
an offset b. In a normalisation, each channel is a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from numpy.typing import NDArray

REMEDY = "set its trainable = False before making the net, or use CG without EKFAC"
_NORMALISATIONS = (
    layers.BatchNormalization,
    layers.LayerNormalization,
    layers.GroupNormalization,
    layers.RMSNormalization,
)
_CONVOLUTIONS = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
# An embedding is treated as a product with one-hot vectors of at most this many entries.
_MOST_IDS = 4096


@dataclass(frozen=True, eq=False)
class Affine:
    """Affine layer and the positions of its weights in theta.

    Attributes:
      layer: the Keras layer.
      has_kernel: True if theta contains its kernel W.
      has_bias: True if theta contains its bias b.
      entries: (f, c) positions of the layer's weights in theta, for f inputs and c outputs. For G
        groups the shape is (G, f, c). A bias counts as the last input.
      expanded: function from the layer's input to the factors a_t. Up to a reshape, the last axes
        of the result are positions t, groups and inputs f.
      outputs: function that reorders z (n, ...), or a derivative with respect to z. The axes of the
        result are rows, positions, groups and outputs.
    """

    layer: Any
    has_kernel: bool
    has_bias: bool
    entries: NDArray[np.int64]
    expanded: Callable[[Any], Any]
    outputs: Callable[[Any], Any]

    def observed(self, call: Callable, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the layer's input. For a normalisation, return the normalised input instead.

        The normalised input is the layer's output with scale 1 and offset 0.
        """
        if not isinstance(self.layer, _NORMALISATIONS):
            return inputs
        names = (("gamma", tf.ones), ("scale", tf.ones), ("beta", tf.zeros))
        held: list[tuple[Any, Callable]] = [(getattr(self.layer, n, None), f) for n, f in names]
        plain = [
            (weight, fill(tuple(weight.shape), weight.dtype))
            for weight, fill in held
            if isinstance(weight, keras.Variable)
        ]
        with keras.StatelessScope(state_mapping=plain):
            return call(inputs, *args, **kwargs)

    def inputs(self, observed: Any, z: Any) -> Any:
        """Return the factors [a_t, 1], (n, t, f) or (n, t, G, f), for n rows.

        Args:
          observed: the result of `Affine.observed`.
          z: (n, ...) the values of a W + b.
        """
        *groups, f, c = self.entries.shape
        n, per_position = tf.shape(z)[0], int(np.prod([*groups, c]))
        positions = tf.size(z) // (n * per_position)
        parts = []
        if self.has_kernel:
            a = tf.cast(self.expanded(tf.cast(observed, z.dtype)), z.dtype)
            parts.append(tf.reshape(a, [n, positions, *groups, f - self.has_bias]))
        if self.has_bias:
            parts.append(tf.ones([n, positions, *groups, 1], z.dtype))
        return parts[0] if len(parts) == 1 else tf.concat(parts, -1)

    def by_position(self, g: Any) -> Any:
        """Reshape a derivative with respect to z, (n, ...), to (n, t, c) or (n, t, G, c)."""
        *groups, _, c = self.entries.shape
        return tf.reshape(self.outputs(g), [tf.shape(g)[0], -1, *groups, c])


def affine(layer: Any, parts: list[tuple[Any, NDArray]]) -> Affine:
    """Return the `Affine` of a Keras layer that is affine in its weights.

    Args:
      layer: a Keras layer.
      parts: a pair for each weight of the layer that theta contains. The pair holds the weight and
        the positions (size,) of its entries in theta.

    Raises: ValueError if the layer is not affine in its weights, or has an unsupported form. The
      message names the layer.
    """
    kind = _kind(layer)
    if kind is None:
        raise ValueError(
            f"model must hold theta in layers that are affine in their weights for EK-FAC, such as "
            f"Dense and Conv2D, got the weight {parts[0][0].name!r} of {type(layer).__name__} "
            f"layer {layer.name!r}; {REMEDY}."
        )
    by_name = {
        name: getattr(layer, name, None)
        for name in ("kernel", "embeddings", "gamma", "scale", "bias", "beta")
    }
    own = {name: w for name, w in by_name.items() if isinstance(w, keras.Variable)}
    found = {}
    for weight, positions in parts:
        name = next((name for name, held in own.items() if held is weight), None)
        if name is None:
            raise ValueError(
                f"model must hold theta in kernels and biases for EK-FAC, got the weight "
                f"{weight.name!r} of layer {layer.name!r}; {REMEDY}."
            )
        found["bias" if name in ("bias", "beta") else "kernel"] = positions.reshape(weight.shape)
    shaped, expanded, outputs = kind
    entries = [shaped(found[key], key) for key in ("kernel", "bias") if key in found]
    joined = np.concatenate(entries, axis=-2)
    return Affine(layer, "kernel" in found, "bias" in found, joined, expanded, outputs)


def _kind(layer: Any) -> tuple[Callable, Callable, Callable] | None:
    """Return (shaped, expanded, outputs) of a layer, or None if it is not supported.

    `shaped(positions, key)` arranges the positions of a kernel or bias like `Affine.entries`.
    """
    if isinstance(layer, layers.Dense):
        return _matrix, _same, _same
    if isinstance(layer, layers.EinsumDense):
        return _einsum(layer)
    if isinstance(layer, layers.Embedding):
        if layer.input_dim > _MOST_IDS:
            return None
        return _matrix, lambda ids: tf.one_hot(tf.cast(ids, tf.int32), layer.input_dim), _same
    if isinstance(layer, _NORMALISATIONS):
        axis = layer.axis if isinstance(layer.axis, list | tuple) else [layer.axis]
        weights = [w for w in layer._trainable_variables if len(w.shape) == 1]
        last = len(axis) == 1 and (axis[0] == -1 or _rank(layer) == axis[0] + 1)
        return (_each_channel, _same, _same) if last and weights else None
    if getattr(layer, "data_format", None) != "channels_last":
        return None
    if isinstance(layer, _CONVOLUTIONS):
        if isinstance(layer, layers.Conv3D) and max(layer.dilation_rate) > 1:
            return None
        return _convolution(layer)
    if isinstance(layer, _DEPTHWISE):
        return _depthwise(layer)
    return None


def _rank(layer: Any) -> int:
    try:
        return len(layer.input.shape)
    except (AttributeError, ValueError):  # the layer is not part of a functional model
        return 0


def _same(value: Any) -> Any:
    return value


def _matrix(positions: NDArray, key: str) -> NDArray:
    return positions.reshape(-1, positions.shape[-1])


def _each_channel(positions: NDArray, key: str) -> NDArray:
    return positions.reshape(-1, 1, 1)


def _convolution(layer: Any) -> tuple[Callable, Callable, Callable]:
    groups = layer.groups
    if groups == 1:
        return _matrix, lambda a: _patches(layer, a), _same

    def shaped(positions: NDArray, key: str) -> NDArray:
        return positions.reshape(-1, groups, layer.filters // groups).transpose(1, 0, 2)

    def expanded(a: Any) -> Any:
        channels = a.shape[-1] // groups
        patches = _patches(layer, a)
        apart = tf.reshape(patches, [tf.shape(a)[0], -1, _window(layer), groups, channels])
        return tf.transpose(apart, [0, 1, 3, 2, 4])

    return shaped, expanded, _same


def _depthwise(layer: Any) -> tuple[Callable, Callable, Callable]:
    def shaped(positions: NDArray, key: str) -> NDArray:
        rows = _window(layer) if key == "kernel" else 1
        return positions.reshape(rows, -1, layer.depth_multiplier).transpose(1, 0, 2)

    def expanded(a: Any) -> Any:
        channels = a.shape[-1]
        patches = _patches(layer, a)
        apart = tf.reshape(patches, [tf.shape(a)[0], -1, _window(layer), channels])
        return tf.transpose(apart, [0, 1, 3, 2])

    return shaped, expanded, _same


def _window(layer: Any) -> int:
    return int(np.prod(layer.kernel_size))


def _patches(layer: Any, a: Any) -> Any:
    """Return the input patch of each output pixel, (n, ..., f), ordered like the kernel's rows."""
    kernel, strides, rates = layer.kernel_size, layer.strides, layer.dilation_rate
    padding = layer.padding
    if len(kernel) == 3:
        return tf.raw_ops.ExtractVolumePatches(
            input=a, ksizes=[1, *kernel, 1], strides=[1, *strides, 1], padding=padding.upper()
        )
    if len(kernel) == 1:  # treat the sequence as an image with one row of pixels
        if padding == "causal":
            a = tf.pad(a, [[0, 0], [rates[0] * (kernel[0] - 1), 0], [0, 0]])
            padding = "valid"
        a = a[:, None]
        kernel, strides, rates = (1, *kernel), (1, *strides), (1, *rates)
    if len(strides) == 1:
        strides = (*strides, *strides)
    return tf.image.extract_patches(
        a, [1, *kernel, 1], [1, *strides, 1], [1, *rates, 1], padding.upper()
    )


def _einsum(layer: Any) -> tuple[Callable, Callable, Callable] | None:
    """Return (shaped, expanded, outputs) of an EinsumDense layer.

    The result is None unless the layer's equation is a matrix product at each position. Axes of the
    kernel are inputs f (not in the output), outputs c (not in the input) or groups (in both). The
    other axes of the output are rows and positions.
    """
    equation = layer.equation.replace(" ", "")
    if "." in equation or "->" not in equation:
        return None
    left, out = equation.split("->")
    inner, kernel = left.split(",")
    f = [axis for axis in kernel if axis not in out]
    c = [axis for axis in kernel if axis not in inner]
    groups = [axis for axis in kernel if axis in inner and axis in out]
    positions = [axis for axis in out if axis not in kernel]
    contracted = [axis for axis in inner if axis not in out and axis not in kernel]
    regular = positions[:1] == [inner[0]] == [out[0]] and not contracted and not groups and f and c
    if not regular:
        return None
    bias = layer.bias
    width = int(np.prod([layer.kernel.shape[kernel.index(axis)] for axis in c]))
    if bias is not None and int(np.prod(bias.shape)) != width:
        return None  # the bias depends on the position, or outputs share it

    def shaped(entries: NDArray, key: str) -> NDArray:
        if key == "kernel":
            order = [kernel.index(axis) for axis in (*f, *c)]
            sizes = [entries.shape[i] for i in order]
            return entries.transpose(order).reshape(int(np.prod(sizes[: len(f)])), -1)
        axes = [axis for axis in out if axis in c]  # the bias has the order of the output
        tight = entries.reshape([layer.kernel.shape[kernel.index(axis)] for axis in axes])
        return tight.transpose([axes.index(axis) for axis in c]).reshape(1, -1)

    def expanded(a: Any) -> Any:
        return tf.einsum(f"{inner}->{''.join([*positions, *f])}", a)

    def outputs(z: Any) -> Any:
        return tf.einsum(f"{out}->{''.join([*positions, *c])}", z)

    return shaped, expanded, outputs
