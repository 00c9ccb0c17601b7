"""Derivatives of per-example losses by `tf.GradientTape`, for many vectors in one pass.

Every function takes `losses(theta, x, y) -> (n,)`, tensors, and blocks of vectors as rows (m, d).
It maps over the rows with `each`, either `tf.vectorized_map` or `looped`. Unconnected gradients
count as zero, so the second derivative of a linear function is zero and not an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import tensorflow as tf

_ZERO = tf.UnconnectedGradients.ZERO
Losses = Callable[[Any, Any, Any], Any]
Each = Callable[[Callable, Any], Any]

# TensorFlow's vectorised map is wrong for grouped convolutions and impossible for recurrences. For
# any convolution it is no faster than a loop, and it takes m times the memory.
_LOOPED_OPS = ("Conv", "DepthwiseConv", "While", "StatelessWhile", "TensorList", "CudnnRNN")


def needs_loop(graph: Any) -> bool:
    """Return True if a traced function holds an operation that must not be vectorised."""
    return any(op.type.startswith(_LOOPED_OPS) for op in operations(graph))


def operations(graph: Any) -> list[Any]:
    """Return the operations of a traced function and its inner functions, such as loop bodies."""
    inside = [f.graph for f in graph._functions.values() if hasattr(f, "graph")]
    return [op for part in (graph, *inside) for op in part.get_operations()]


def looped(function: Callable, elements: Any, dtype: Any) -> Any:
    """Map like tf.vectorized_map, but one element at a time; stack the results, of `dtype`."""
    return tf.map_fn(function, elements, fn_output_signature=tf.as_dtype(dtype))


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Replace `tf.nn.moments`, while tracing, by a version with correct second derivatives.

    TensorFlow's version stops the gradient at the mean inside the variance. The first derivative
    there is zero, but the second is not. With layer or group normalisation, Hessians would be
    wrong without an error.
    """

    def moments(x, axes, shift=None, keepdims=False, name=None):
        mean = tf.reduce_mean(x, axes, keepdims=True)
        variance = tf.reduce_mean(tf.square(x - mean), axes, keepdims=keepdims)
        return (mean if keepdims else tf.squeeze(mean, axes)), variance

    with mock.patch.object(tf.nn, "moments", moments):
        yield


def gradient(function: Callable, at: Any) -> Any:
    """Return the gradient of a scalar function."""
    return value_and_gradient(function, at)[1]


def value_and_gradient(function: Callable, at: Any) -> tuple[Any, Any]:
    """Return the value and gradient of a scalar function."""
    with tf.GradientTape() as tape:
        tape.watch(at)
        value = function(at)
    return value, tape.gradient(value, at, unconnected_gradients=_ZERO)


def hessian_map(function: Callable, at: Any) -> Callable:
    """Return v -> H v, H a function's Hessian, by reverse over reverse mode (Pearlmutter 1994)."""
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(at)
        g = gradient(function, at)
    return lambda v: tape.gradient(g, at, output_gradients=v, unconnected_gradients=_ZERO)


def mean_loss(losses: Losses, x: Any, y: Any) -> Callable:
    """Return the function theta -> the batch's mean loss."""
    return lambda theta: tf.reduce_mean(losses(theta, x, y))


def hvp(losses: Losses, each: Each, theta: Any, x: Any, y: Any, V: Any) -> Any:
    """Multiply the mean loss's Hessian by the rows of V (m, d): (m, d)."""
    return each(hessian_map(mean_loss(losses, x, y), theta), V)


def over_batches(products: Callable, theta: Any, x: Any, y: Any, V: Any) -> Any:
    """Stack `products(theta, x[j], y[j], V[j])` for x[j] (b, ...) and V[j] (m, d): (r, m, d)."""
    return tf.map_fn(lambda part: products(theta, *part), (x, y, V), fn_output_signature=V.dtype)


def gradients(losses: Losses, each: Each, theta: Any, x: Any, y: Any) -> Any:
    """Return the gradient of each example's loss, all at one theta: (n, d)."""
    return each(lambda part: _alone(losses, theta, *part), (x, y))


def gradient_each(losses: Losses, each: Each, thetas: Any, x: Any, y: Any) -> Any:
    """Return the gradient of the mean loss of each batch x[j] (b, ...) at thetas[j]: (r, d)."""
    return each(lambda part: gradient(mean_loss(losses, *part[:2]), part[2]), (x, y, thetas))


def _alone(losses: Losses, theta: Any, x: Any, y: Any) -> Any:
    x, y = tf.nest.map_structure(lambda t: tf.expand_dims(t, 0), (x, y))
    return gradient(mean_loss(losses, x, y), theta)


def directional(losses: Losses, each: Each, theta: Any, x: Any, y: Any, V: Any) -> Any:
    """Return grad loss_i . v_j: (m, n).

    g(u) = sum_i u_i grad loss_i is linear in u, so d/du of g . v_j is the answer. No per-example
    gradient is formed.
    """
    u = tf.ones(tf.shape(y)[:1], theta.dtype)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(u)
        g = gradient(lambda t: tf.tensordot(u, losses(t, x, y), 1), theta)
    return each(lambda v: tape.gradient(g, u, output_gradients=v, unconnected_gradients=_ZERO), V)


def input_gradient(losses: Losses, theta: Any, x: Any, y: Any, v: Any) -> Any:
    """Return d/dx_i of grad loss_i . v, in the structure of x."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        g = gradient(lambda t: tf.reduce_sum(losses(t, x, y)), theta)
        along = tf.tensordot(g, v, 1)
    return tape.gradient(along, x, unconnected_gradients=_ZERO)


def bregman_gradient(
    output: Callable, loss: Callable, each: Each, theta: Any, x: Any, y: Any, thetas: Any
) -> Any:
    """Return the gradient, at each of thetas, of the mean Bregman divergence from theta: (k, d).

    D_i = loss(y_i, z) - loss(y_i, z_i) - loss'(y_i, z_i) . (z - z_i), with outputs z_i at theta and
    z at the other parameters. The two slopes loss' are subtracted before the backward pass: near
    theta they almost cancel, and this order loses fewer digits.
    """

    def slope(z):
        return gradient(lambda z: tf.reduce_mean(loss(y, z)), z)

    before = slope(output(theta, x))

    def at(there):
        with tf.GradientTape() as tape:
            tape.watch(there)
            z = output(there, x)
        rise = slope(tf.stop_gradient(z)) - before
        return tape.gradient(z, there, output_gradients=rise, unconnected_gradients=_ZERO)

    return each(at, thetas)


def curvatures(losses: Losses, theta: Any, x: Any, y: Any, v: Any) -> Any:
    """Return v' H_i v, with H_i the Hessian of each example's loss: (n,).

    As in `directional`, v' (sum_i u_i H_i) v is linear in u, so its derivative d/du is the answer.
    """
    u = tf.ones(tf.shape(y)[:1], theta.dtype)
    return gradient(lambda u: _along_twice(losses, theta, x, y, v, u), u)


def curvature_gradient(losses: Losses, theta: Any, x: Any, y: Any, v: Any) -> Any:
    """Return d/dtheta of v' H v, with H the mean loss's Hessian: (d,)."""
    u = tf.ones(tf.shape(y)[:1], theta.dtype)
    u /= tf.reduce_sum(u)
    return gradient(lambda t: _along_twice(losses, t, x, y, v, u), theta)


def _along_twice(losses: Losses, theta: Any, x: Any, y: Any, v: Any, u: Any) -> Any:
    product = hessian_map(lambda t: tf.tensordot(u, losses(t, x, y), 1), theta)
    return tf.tensordot(product(v), v, 1)


def gauss_newton(
    output: Callable, curved: Callable, each: Each, theta: Any, x: Any, y: Any, V: Any
) -> Any:
    """Return J' H J v / n for each row v of V: (m, d).

    `curved(y, z)` returns the map u -> H u of the sum of the losses by the outputs z.

    J is the output's Jacobian, H the loss's Hessian at the output. Two reverse passes give J v:
    J'u is linear in u, so d/du of (J'u) . v is J v.
    """
    with tf.GradientTape(persistent=True) as by_u:
        with tf.GradientTape(persistent=True) as by_theta:
            by_theta.watch(theta)
            z = output(theta, x)
        u = tf.zeros_like(z)
        by_u.watch(u)
        transposed = by_theta.gradient(z, theta, output_gradients=u, unconnected_gradients=_ZERO)
    at_output, n = curved(y, tf.stop_gradient(z)), tf.cast(tf.shape(z)[0], z.dtype)

    def product(v):
        forward = by_u.gradient(transposed, u, output_gradients=v, unconnected_gradients=_ZERO)
        return by_theta.gradient(
            z, theta, output_gradients=at_output(forward) / n, unconnected_gradients=_ZERO
        )

    return each(product, V)
