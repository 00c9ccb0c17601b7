"""Inputs of a model's affine layers, and derivatives with respect to these layers' outputs.

An affine layer is a Dense or Conv2D layer without activation. At each position t, such as a pixel
or a time step, it computes z_t = a_t W + b. The derivative of a scalar L with respect to its
weights is

    dL / d[W; b] = sum_t [a_t, 1]' (dL / dz_t).

EK-FAC (influence.solvers.ekfac) uses the two factors [a_t, 1] and dL / dz_t.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import keras
import numpy as np
import tensorflow as tf
from keras.layers import Conv2D, Dense
from numpy.typing import NDArray

from influence.net import tape
from influence.net.flat import FlatModel
from influence.net.net import GenericNeuralNet

# Derivatives count as equal up to this relative difference. Float32 rounding is far smaller.
_GAP = 1e-3
_ZERO = tf.UnconnectedGradients.ZERO
_REMEDY = "set its trainable = False before making the net, or use CG without EKFAC"


@dataclass(frozen=True, eq=False)
class Affine:
    """Affine layer and the positions of its weights in theta.

    Attributes:
      layer: a Dense or Conv2D layer of Keras.
      has_kernel: True if theta contains its kernel.
      has_bias: True if theta contains its bias.
      entries: (f, c) positions in theta of the weights of f inputs and c outputs. A bias is last.
    """

    layer: Any
    has_kernel: bool
    has_bias: bool
    entries: NDArray[np.int64]

    def inputs(self, inputs: Any, z: Any) -> Any:
        """Return the factors [a_t, 1] that multiply the weights in z, (n, t, f) for n rows."""
        n, c = tf.shape(z)[0], self.entries.shape[1]
        positions = tf.size(z) // (n * c)
        parts = []
        if self.has_kernel:
            a = tf.cast(inputs, z.dtype)
            if isinstance(self.layer, Conv2D):
                a = _patches(self.layer, a)
            parts.append(tf.reshape(a, [n, positions, len(self.entries) - self.has_bias]))
        if self.has_bias:
            parts.append(tf.ones([n, positions, 1], z.dtype))
        return parts[0] if len(parts) == 1 else tf.concat(parts, 2)


class AffineLayers:
    """List of the layers that contain theta, in the order of theta. All must be affine.

    Args:
      traced: the model as functions of theta.
      x: input tensors of a few rows. On them, the formula of this file is compared with the tape.

    Raises: ValueError naming a layer that is neither Dense nor Conv2D, has its own activation, is
      grouped, has channels first, is called more than once, does not keep one row per example, or
      uses its weights for anything other than z = a W + b.
    """

    def __init__(self, traced: FlatModel, x: Any):
        self.traced = traced
        self.layers = _find(traced)
        self._check(x)

    def pseudo_gradients(self, x: Any, y: Any, theta: Any = None) -> list[tuple[NDArray, NDArray]]:
        """Compute the two factors of each vector p_is, for every layer.

        Let J_i be the Jacobian of row i's output with respect to theta. Let H_i = S_i S_i' be the
        loss's Hessian with respect to that output. Let p_is = J_i' S_i[:, s]. The Gauss-Newton
        matrix is (1/n) sum_i sum_s p_is p_is'. A layer's part of p_is is sum_t a_it' g_its. The
        method returns these a and g. Negative eigenvalues of H_i are replaced by zero.

        Args: x and y of a batch, and theta as a tensor (d,). None means the model's weights.
        Returns: a pair (a, g) for each layer. a (n, t, f) holds the inputs and a one for the bias.
          g (n, t, s, c) holds the derivatives of output . S_i[:, s] by the layer's output.
        """
        t = self.traced
        batch = t.inputs(x), t.tensor(y)
        theta = t.theta() if theta is None else theta
        return t.run("pseudo gradients", partial(self._factors, t.each(*batch)), theta, *batch)

    def roots(self, x: Any, y: Any, theta: Any = None) -> NDArray:
        """Compute the vectors p_is of `pseudo_gradients`, with shape (n, s, d)."""
        parts = self.pseudo_gradients(x, y, theta)
        n, _, s, _ = parts[0][1].shape
        roots = np.zeros((n, s, sum(self.traced.sizes)), parts[0][1].dtype)
        for affine, (a, g) in zip(self.layers, parts, strict=True):
            f, c = affine.entries.shape
            products = a.transpose(0, 2, 1) @ g.reshape(n, -1, s * c)  # (n, f, s c)
            products = products.reshape(n, f, s, c).transpose(0, 2, 1, 3)
            roots[:, :, affine.entries.ravel()] = products.reshape(n, s, f * c)
        return roots

    # --- inside -----------------------------------------------------------------------------------

    def _factors(self, each: tape.Each, theta: Any, x: Any, y: Any) -> list[tuple[Any, Any]]:
        with tf.GradientTape(persistent=True) as by_z:
            by_z.watch(theta)
            output, calls = self._forward(theta, x)
        outputs = [z for ((_, z),) in calls]
        n = tf.shape(output)[0]

        def pulled_back(column):
            parts: Any = by_z.gradient(output, outputs, column, unconnected_gradients=_ZERO)
            return tf.concat([tf.reshape(g, [n, -1]) for g in parts], 1)

        pulled = each(pulled_back, _root(self.traced.loss.curved, each, y, output))  # (s, n, ...)
        pulled = tf.split(pulled, [tf.size(z) // n for z in outputs], axis=2)
        found = []
        for affine, ((inputs, z),), g in zip(self.layers, calls, pulled, strict=True):
            g = tf.reshape(g, [tf.shape(g)[0], n, -1, affine.entries.shape[1]])
            found.append((affine.inputs(inputs, z), tf.transpose(g, [1, 2, 0, 3])))
        return found

    def _forward(self, theta: Any, x: Any) -> tuple[Any, list[list[tuple[Any, Any]]]]:
        """Return the model's output, and a pair (input, output) for each call of each layer."""
        with _recording([affine.layer for affine in self.layers]) as calls:
            return self.traced.output(theta, x), calls

    def _check(self, x: Any) -> None:
        """Check that each layer is called once, and that sum_t a_t' g_t is the derivative."""
        theta = self.traced.theta()
        with tf.GradientTape(persistent=True) as by_z:
            by_z.watch(theta)
            output, calls = self._forward(theta, x)
        n = len(output)
        for affine, seen in zip(self.layers, calls, strict=True):
            name = affine.layer.name
            if len(seen) != 1:
                raise ValueError(
                    f"model must call each layer once for EK-FAC, got {len(seen)} calls of layer "
                    f"{name!r}; {_REMEDY}."
                )
            if seen[0][1].shape[0] != n:
                raise ValueError(
                    f"model must keep one row per example for EK-FAC, got shape "
                    f"{tuple(seen[0][1].shape)} for {n} examples in layer {name!r}; {_REMEDY}."
                )
        column: Any = np.random.default_rng(0).standard_normal(output.shape)
        column = tf.constant(column, output.dtype)
        sources: Any = [theta, *(z for ((_, z),) in calls)]
        both: Any = by_z.gradient(output, sources, column, unconnected_gradients=_ZERO)
        true = both[0].numpy()
        for affine, ((inputs, z),), g in zip(self.layers, calls, both[1:], strict=True):
            a = affine.inputs(inputs, z).numpy()
            ours = a.reshape(-1, a.shape[2]).T @ np.reshape(g, (-1, affine.entries.shape[1]))
            gap = float(np.abs(ours - true[affine.entries]).max())
            if not gap <= _GAP * max(np.abs(ours).max(), np.abs(true[affine.entries]).max()):
                raise ValueError(
                    f"model must use the weights of layer {affine.layer.name!r} for a W + b alone "
                    f"for EK-FAC, got a derivative by them that is off by {gap:.1e}: its call does "
                    f"more, or they are shared; {_REMEDY}."
                )


_KNOWN: WeakKeyDictionary[FlatModel, AffineLayers] = WeakKeyDictionary()


def affine_layers(net: GenericNeuralNet, x: Any) -> AffineLayers:
    """Return the affine layers that contain theta. The result is cached for each net.

    The layers are tested on a few rows x of inputs.

    Raises: ValueError if a layer is not affine. The message names the layer.
    """
    if net.flat not in _KNOWN:
        _KNOWN[net.flat] = AffineLayers(net.flat, net.flat.inputs(x))
    return _KNOWN[net.flat]


def _find(traced: FlatModel) -> tuple[Affine, ...]:
    """Find the layers that own the weights in theta. The innermost layer owns a weight."""
    owners = {id(w): layer for layer in traced.model._flatten_layers() for w in layer.weights}
    ends = np.cumsum(traced.sizes)
    parts: dict[int, list] = {}
    layers = {}
    for weight, end, size in zip(traced.weights, ends, traced.sizes, strict=True):
        layer = owners[id(weight)]
        layers[id(layer)] = layer
        parts.setdefault(id(layer), []).append((weight, np.arange(end - size, end)))
    return tuple(_affine(layers[key], parts[key], traced.loss.head) for key in layers)


def _affine(layer: Any, parts: list, head: str | None) -> Affine:
    """Locate the weights of a layer. `head` is the activation that the loss goes round, or None."""
    name = layer.name
    if not isinstance(layer, Dense | Conv2D):
        raise ValueError(
            f"model must hold theta in Dense and Conv2D layers for EK-FAC, got the weight "
            f"{parts[0][0].name!r} of {type(layer).__name__} layer {name!r}; {_REMEDY}."
        )
    own = {"kernel": getattr(layer, "kernel", None), "bias": getattr(layer, "bias", None)}
    found = {
        key: positions.reshape(-1, weight.shape[-1])
        for key in own
        for weight, positions in parts
        if weight is own[key]
    }
    if len(found) != len(parts):
        other = next(w for w, _ in parts if all(w is not mine for mine in own.values()))
        raise ValueError(
            f"model must hold theta in kernels and biases for EK-FAC, got the weight "
            f"{other.name!r} of layer {name!r}; {_REMEDY}."
        )
    fused = getattr(layer.activation, "__name__", None)
    if layer.activation not in (None, keras.activations.linear) and (not head or fused != head):
        activation = getattr(layer.activation, "__name__", repr(layer.activation))
        raise ValueError(
            f"model must keep activations in layers of their own for EK-FAC, got "
            f"activation={activation!r} in layer {name!r}; give it none and put "
            f"keras.layers.Activation({activation!r}) after it: theta stays the same."
        )
    if isinstance(layer, Conv2D):
        if layer.groups != 1:
            raise ValueError(
                f"model must have no grouped convolution for EK-FAC, got groups={layer.groups} in "
                f"layer {name!r}; {_REMEDY}."
            )
        if layer.data_format != "channels_last":
            raise ValueError(
                f"model must keep channels last for EK-FAC, got data_format={layer.data_format!r} "
                f"in layer {name!r}; {_REMEDY}."
            )
    entries = np.concatenate([found[key] for key in own if key in found])
    return Affine(layer, "kernel" in found, "bias" in found, entries)


@contextmanager
def _recording(layers: list) -> Iterator[list[list[tuple[Any, Any]]]]:
    """Record the input and the output of every call of each layer inside the `with` block.

    Keras calls `layer.call`. An attribute of the instance overrides this method.
    """
    calls: list[list[tuple[Any, Any]]] = [[] for _ in layers]

    def recorder(call: Callable, seen: list) -> Callable:
        def recorded(inputs, *args, **kwargs):
            output = call(inputs, *args, **kwargs)
            # An affine layer's own softmax or sigmoid at the model's end does not belong to it.
            seen.append((inputs, getattr(output, "_keras_logits", output)))
            return output

        return recorded

    before = [vars(layer).get("call") for layer in layers]
    try:
        for layer, seen in zip(layers, calls, strict=True):
            vars(layer)["call"] = recorder(layer.call, seen)
        yield calls
    finally:
        for layer, call in zip(layers, before, strict=True):
            if call is None:
                vars(layer).pop("call", None)
            else:
                vars(layer)["call"] = call


def _patches(layer: Conv2D, a: Any) -> Any:
    """Return each output pixel's input patch, (n, height, width, f), ordered like kernel rows."""
    square = lambda pair: [1, *pair, 1]  # noqa: E731
    return tf.image.extract_patches(
        a,
        square(layer.kernel_size),
        square(layer.strides),
        square(layer.dilation_rate),
        layer.padding.upper(),
    )


def _root(curved_at: Callable, each: tape.Each, y: Any, output: Any) -> Any:
    """Return the columns of all S_i, (s, n, ...). `pseudo_gradients` defines S_i."""
    n = tf.shape(output)[0]
    size = tf.size(output) // n
    curved = curved_at(y, tf.stop_gradient(output))

    def column(unit):
        along = tf.reshape(tf.broadcast_to(unit, [n, size]), tf.shape(output))
        return tf.reshape(curved(along), [n, size])

    H = tf.transpose(each(column, tf.eye(size, dtype=output.dtype)), [1, 0, 2])
    H = (H + tf.linalg.matrix_transpose(H)) / 2
    # eigh fails on a NaN, so it gets zeros for NaNs. A later sum puts the NaNs into the result.
    values, vectors = tf.linalg.eigh(tf.where(tf.math.is_finite(H), H, tf.zeros_like(H)))
    S = vectors * tf.sqrt(tf.maximum(values, 0))[:, None, :]
    S += 0 * tf.reduce_sum(H, axis=[1, 2], keepdims=True)
    return tf.reshape(tf.transpose(S, [2, 0, 1]), tf.concat([[size], tf.shape(output)], 0))
