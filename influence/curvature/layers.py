"""Inputs of a model's affine layers, and derivatives with respect to these layers' outputs.

An affine layer computes z_t = a_t W + b at each position t (influence.curvature.affine). Its
activation, if the layer has one, acts on z. The derivative of a scalar L with respect to the
layer's weights is

    dL / d[W; b] = sum_t [a_t, 1]' (dL / dz_t).

EK-FAC (influence.solvers.ekfac) uses the two factors [a_t, 1] and dL / dz_t.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from influence.curvature.affine import REMEDY, Affine, affine
from influence.net import tape
from influence.net.flat import FlatModel
from influence.net.net import GenericNeuralNet

# Two derivatives count as equal up to this relative difference. Float32 rounding is far smaller.
_GAP = 1e-3
_ZERO = tf.UnconnectedGradients.ZERO


class AffineLayers:
    """List of the layers whose weights are in theta, in the order of theta. All must be affine.

    Args:
      traced: the model as functions of theta.
      x: input tensors of a few rows. For these rows, the formula at the top of this file is checked
        against automatic differentiation.

    Attributes:
      layers: the layers.
      single: the layers that have a single position t and no groups.
      numbers: the total size of the two factors of one row, over all layers.

    Raises: ValueError if `affine` refuses a layer, or if a layer is called more than once. Also if
      a layer does not keep one row per example, or uses its weights for more than z = a W + b. The
      message names the layer.
    """

    def __init__(self, traced: FlatModel, x: Any):
        self.traced = traced
        self.layers = _find(traced)
        self.single: tuple[Affine, ...] = ()
        self.numbers = 0
        self._check(x)

    def pseudo_gradients(self, x: Any, y: Any, theta: Any = None) -> list[tuple[NDArray, NDArray]]:
        """Compute the two factors of each vector p_is, for every layer.

        Let J_i be the Jacobian of row i's output with respect to theta. Let H_i = S_i S_i' be the
        loss's Hessian with respect to that output. Let p_is = J_i' S_i[:, s]. The Gauss-Newton
        matrix is (1/n) sum_i sum_s p_is p_is'. For a masked loss, H_i contains the mass v_i, and 1
        / sum_i v_i replaces 1/n. A layer's part of p_is is sum_t a_it' g_its. The method returns
        these a and g. Negative eigenvalues of H_i count as zero.

        Args: x and y of a batch, and theta as a tensor (d,). None means the model's weights.
        Returns: a pair (a, g) for each layer. a (n, t, f) holds the inputs, and 1 for the bias. g
          (n, t, s, c) holds the derivatives of output . S_i[:, s] with respect to z. For a layer
          with G groups a is (n, t, G, f) and g is (n, t, s, G, c).
        """
        t = self.traced
        batch = t.batch(x, y, weighed=True)
        theta = t.theta() if theta is None else theta
        found = partial(self._factors, self._columns, t.each(*batch))
        return t.run("pseudo gradients", found, theta, *batch)

    def gradient_factors(self, x: Any, y: Any, theta: Any = None) -> list[tuple[NDArray, NDArray]]:
        """Compute the two factors of each row's loss gradient, for every layer.

        Returns: pairs (a, g) as in `pseudo_gradients`, with s = 1. A layer's part of row i's
          gradient is sum_t a_it' g_it1.
        """
        t = self.traced
        batch = t.batch(x, y)
        theta = t.theta() if theta is None else theta
        found = partial(self._factors, self._slopes, t.each(*batch))
        return t.run("gradient factors", found, theta, *batch)

    def jacobian_factors(self, x: Any, y: Any, theta: Any = None) -> list[tuple[NDArray, NDArray]]:
        """Compute the two factors of the Jacobian of each row's outputs, for every layer.

        Returns: pairs (a, g) as in `pseudo_gradients`. The index s counts the outputs. The labels y
          have no effect.
        """
        t = self.traced
        batch = t.batch(x, y)
        theta = t.theta() if theta is None else theta
        found = partial(self._factors, unit_columns, t.each(*batch))
        return t.run("jacobian factors", found, theta, *batch)

    def roots(self, x: Any, y: Any, theta: Any = None) -> NDArray:
        """Compute the vectors p_is of `pseudo_gradients`, with shape (n, s, d)."""
        t = self.traced
        batch = t.batch(x, y, weighed=True)
        theta = t.theta() if theta is None else theta
        return t.run("roots", partial(self._roots, t.each(*batch)), theta, *batch)

    def parts(self, x: Any, y: Any, theta: Any = None) -> tuple[list, NDArray]:
        """Compute the roots in parts: factors for the layers `single`, roots for all other layers.

        Returns: a list with a pair (a, g) for each layer of `single`, and the roots (n, s, e) with
          respect to the e weights of all other layers, in the order of theta. a is (n, f) and g is
          (n, s, c). The layer's part of p_is is a_i' g_is.
        """
        return self._in_parts("parts", self._columns, x, y, theta)

    def jacobian_parts(self, x: Any, y: Any, theta: Any = None) -> tuple[list, NDArray]:
        """Compute the Jacobian J_i of each row's outputs in parts.

        The result is that of `parts`, with the s-th row of J_i in place of the root p_is. The
        labels y have no effect.
        """
        return self._in_parts("jacobian parts", unit_columns, x, y, theta)

    # --- inside -----------------------------------------------------------------------------------

    def _slopes(self, each: tape.Each, y: Any, output: Any) -> Any:
        """Return the derivative of each row's loss with respect to its output, (1, n, ...)."""
        total = lambda z: tf.reduce_sum(self.traced.loss.function(y, z))  # noqa: E731
        return tape.gradient(total, tf.stop_gradient(output))[None]

    def _in_parts(
        self, name: str, columns: Callable, x: Any, y: Any, theta: Any
    ) -> tuple[list, NDArray]:
        t = self.traced
        batch = t.batch(x, y, weighed=True)
        theta = t.theta() if theta is None else theta
        found = partial(self._parts, columns, t.each(*batch))
        single, rest = t.run(name, found, theta, *batch)
        return single, rest if len(rest) else np.zeros((len(y), single[0][1].shape[1], 0))

    def _columns(self, each: tape.Each, y: Any, output: Any) -> Any:
        return loss_roots(self.traced.loss.curved, each, y, output)

    def _factors(
        self, columns: Callable, each: tape.Each, theta: Any, x: Any, y: Any
    ) -> list[tuple[Any, Any]]:
        """Return the factors (a, g) of every layer.

        `columns(each, y, output)` returns s vectors (s, n, ...) of the output's shape. g is the
        derivative of output . vector with respect to the layer's z.
        """
        with tf.GradientTape(persistent=True) as by_z:
            by_z.watch(theta)
            output, calls = self._forward(theta, x)
        outputs = [z for ((_, z),) in calls]
        n = tf.shape(output)[0]
        sizes = [tf.size(z) // n for z in outputs]

        def pulled_back(column):
            parts: Any = by_z.gradient(output, outputs, column, unconnected_gradients=_ZERO)
            return tf.concat([tf.reshape(g, [n, -1]) for g in parts], 1)

        pulled = each(pulled_back, columns(each, y, output))  # (s, n, ...)
        pulled = tf.split(pulled, sizes, axis=2)
        found = []
        for layer, ((inputs, z),), g in zip(self.layers, calls, pulled, strict=True):
            s = tf.shape(g)[0]
            g = layer.by_position(tf.reshape(g, tf.concat([[s * n], tf.shape(z)[1:]], 0)))
            g = tf.reshape(g, tf.concat([[s, n], tf.shape(g)[1:]], 0))
            # (s, n, t, ...) becomes (n, t, s, ...).
            order = [1, 2, 0, *range(3, len(g.shape))]
            found.append((layer.inputs(inputs, z), tf.transpose(g, order)))
        return found

    def _roots(self, each: tape.Each, theta: Any, x: Any, y: Any) -> Any:
        return _joined(
            zip(self.layers, self._factors(self._columns, each, theta, x, y), strict=True)
        )

    def _parts(
        self, columns: Callable, each: tape.Each, theta: Any, x: Any, y: Any
    ) -> tuple[list, Any]:
        found = list(zip(self.layers, self._factors(columns, each, theta, x, y), strict=True))
        single = [(a[:, 0], g[:, 0]) for layer, (a, g) in found if layer in self.single]
        rest = [pair for pair in found if pair[0] not in self.single]
        return single, _joined(rest) if rest else []

    def _forward(self, theta: Any, x: Any) -> tuple[Any, list[list[tuple[Any, Any]]]]:
        """Return the model's output, and a pair (input, z) for each call of each layer."""
        with _recording(self.layers) as calls:
            return self.traced.output(theta, x), calls

    def _check(self, x: Any) -> None:
        """Raise ValueError unless all layers are called once with derivatives sum_t a_t' g_t."""
        theta = self.traced.theta()
        with tf.GradientTape(persistent=True) as by_z:
            by_z.watch(theta)
            output, calls = self._forward(theta, x)
        n = len(output)
        for layer, seen in zip(self.layers, calls, strict=True):
            name = layer.layer.name
            if len(seen) != 1:
                raise ValueError(
                    f"model must call each layer once for EK-FAC, got {len(seen)} calls of layer "
                    f"{name!r}; {REMEDY}."
                )
            if seen[0][1].shape[0] != n:
                raise ValueError(
                    f"model must keep one row per example for EK-FAC, got shape "
                    f"{tuple(seen[0][1].shape)} for {n} examples in layer {name!r}; {REMEDY}."
                )
        column: Any = np.random.default_rng(0).standard_normal(output.shape)
        column = tf.constant(column, output.dtype)
        sources: Any = [theta, *(z for ((_, z),) in calls)]
        both: Any = by_z.gradient(output, sources, column, unconnected_gradients=_ZERO)
        true = both[0].numpy()
        for layer, ((inputs, z),), g in zip(self.layers, calls, both[1:], strict=True):
            a, g = layer.inputs(inputs, z).numpy(), layer.by_position(g).numpy()
            self.numbers += (a.size + g.size * int(tf.size(output)) // n) // n
            ours = np.einsum("nt...f,nt...c->...fc", a, g)
            wanted = true[layer.entries]
            gap = float(np.abs(ours - wanted).max())
            if not gap <= _GAP * max(np.abs(ours).max(), np.abs(wanted).max()):
                raise ValueError(
                    f"model must use the weights of layer {layer.layer.name!r} for a W + b alone "
                    f"for EK-FAC, got a derivative by them that is off by {gap:.1e}: its call does "
                    f"more, or they are shared; {REMEDY}."
                )
            if a.ndim == 3 and a.shape[1] == 1 and len(z.shape) == 2:
                self.single += (layer,)


_KNOWN: WeakKeyDictionary[FlatModel, AffineLayers] = WeakKeyDictionary()


def affine_layers(net: GenericNeuralNet, x: Any) -> AffineLayers:
    """Return the `AffineLayers` of a net. The result is cached for each net.

    The layers are tested on a few rows x of inputs.

    Raises: ValueError if a layer is not affine. The message names the layer.
    """
    if net.flat not in _KNOWN:
        _KNOWN[net.flat] = AffineLayers(net.flat, net.flat.inputs(x))
    return _KNOWN[net.flat]


def _find(traced: FlatModel) -> tuple[Affine, ...]:
    """Find the layers that own the weights in theta. The innermost layer with a weight owns it."""
    owners = {id(w): layer for layer in traced.model._flatten_layers() for w in layer.weights}
    ends = np.cumsum(traced.sizes)
    parts: dict[int, list] = {}
    layers = {}
    for weight, end, size in zip(traced.weights, ends, traced.sizes, strict=True):
        layer = owners[id(weight)]
        layers[id(layer)] = layer
        parts.setdefault(id(layer), []).append((weight, np.arange(end - size, end)))
    return tuple(affine(layers[key], parts[key]) for key in layers)


@contextmanager
def _recording(layers: tuple[Affine, ...]) -> Iterator[list[list[tuple[Any, Any]]]]:
    """Context manager that records the input and z of every call of each layer.

    Keras calls `layer.call` and `layer.activation`. Recording functions with these names are set on
    the layer object, and override the methods of its class. z is the input of the activation, or
    the output of a layer without activation.
    """
    calls: list[list[tuple[Any, Any]]] = [[] for _ in layers]

    def recorder(layer: Affine, seen: list) -> tuple[Callable, Callable | None]:
        call, activation = layer.layer.call, getattr(layer.layer, "activation", None)
        before: list[Any] = []

        def activated(z):
            before.append(z)
            return activation(z)  # pyright: ignore[reportOptionalCall]

        def recorded(inputs, *args, **kwargs):
            before.clear()
            output = call(inputs, *args, **kwargs)
            z = before[0] if len(before) == 1 else output
            seen.append((layer.observed(call, inputs, *args, **kwargs), z))
            return output

        return recorded, None if activation is None else activated

    kept = [{k: v for k, v in vars(a.layer).items() if k in ("call", "activation")} for a in layers]
    try:
        for layer, seen in zip(layers, calls, strict=True):
            call, activation = recorder(layer, seen)
            vars(layer.layer)["call"] = call
            if activation is not None:
                vars(layer.layer)["activation"] = activation
        yield calls
    finally:
        for layer, before in zip(layers, kept, strict=True):
            vars(layer.layer).pop("call", None)
            vars(layer.layer).update(before)


def _joined(found: Any) -> Any:
    """Return roots (n, s, e) for the e weights of the given layers, in the order of theta."""
    parts, entries = [], []
    for layer, (a, g) in found:
        subscripts = "ntf,ntsc->nsfc" if len(a.shape) == 3 else "ntkf,ntskc->nskfc"
        products = tf.einsum(subscripts, a, g)
        parts.append(tf.reshape(products, tf.concat([tf.shape(products)[:2], [-1]], 0)))
        entries.append(layer.entries.ravel())
    joined, order = tf.concat(parts, 2), np.concatenate(entries)
    in_order = (np.diff(order) > 0).all()
    return joined if in_order else tf.gather(joined, np.argsort(order), axis=2)


def unit_columns(each: tape.Each, y: Any, output: Any) -> Any:
    """Return c unit vectors, one for each output, repeated for n rows: (c, n, ...)."""
    n = tf.shape(output)[0]
    size = tf.size(output) // n
    units = tf.eye(size, dtype=output.dtype)[:, None, :]
    shape = tf.concat([[size], tf.shape(output)], 0)
    return tf.reshape(tf.broadcast_to(units, [size, n, size]), shape)


def loss_roots(curved_at: Callable, each: tape.Each, y: Any, output: Any) -> Any:
    """Return the columns of all S_i, (s, n, ...). `AffineLayers.pseudo_gradients` defines S_i.

    `curved_at(y, z)` is `PerExampleLoss.curved`, and `output` (n, ...) holds the model's outputs.
    """
    size = tf.size(output) // tf.shape(output)[0]
    H = tape.output_hessians(curved_at(y, tf.stop_gradient(output)), each, output)
    # eigh fails on a NaN, so zeros replace NaNs here. A later sum puts the NaNs into the result.
    values, vectors = tf.linalg.eigh(tf.where(tf.math.is_finite(H), H, tf.zeros_like(H)))
    S = vectors * tf.sqrt(tf.maximum(values, 0))[:, None, :]
    S += 0 * tf.reduce_sum(H, axis=[1, 2], keepdims=True)
    return tf.reshape(tf.transpose(S, [2, 0, 1]), tf.concat([[size], tf.shape(output)], 0))
