"""Derivatives of per-example losses by `tf.GradientTape`, many vectors in one pass.

Every function takes `losses(theta, x, y) -> (n,)`, tensors, and blocks of vectors as rows (m, d),
over which it maps with `each`: `tf.vectorized_map`, or `looped`. Unconnected gradients are zero:
the second derivative of a linear function is no error.
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

# TensorFlow's vectoriser is wrong for grouped convolutions, cannot do recurrences, and on any
# convolution is no faster than the loop, which needs no m-fold memory.
_LOOPED_OPS = ("Conv", "DepthwiseConv", "While", "StatelessWhile", "TensorList", "CudnnRNN")


def needs_loop(graph: Any) -> bool:
    """Whether a traced function holds an operation that is not to be vectorised."""
    return any(op.type.startswith(_LOOPED_OPS) for op in operations(graph))


def operations(graph: Any) -> list[Any]:
    """The operations of a traced function and of the functions inside it, such as loop bodies."""
    inside = [f.graph for f in graph._functions.values() if hasattr(f, "graph")]
    return [op for part in (graph, *inside) for op in part.get_operations()]


def looped(function: Callable, elements: Any, dtype: Any) -> Any:
    """As tf.vectorized_map, one element after the other; the results, of `dtype`, are stacked."""
    return tf.map_fn(function, elements, fn_output_signature=tf.as_dtype(dtype))


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """While tracing: moments without TensorFlow's stop_gradient on the mean.

    `tf.nn.moments` stops the gradient at the mean inside the variance, where the first derivative
    is zero and the second is not: under layer or group normalisation Hessians would be wrong,
    without an error.
    """

    def moments(x, axes, shift=None, keepdims=False, name=None):
        mean = tf.reduce_mean(x, axes, keepdims=True)
        variance = tf.reduce_mean(tf.square(x - mean), axes, keepdims=keepdims)
        return (mean if keepdims else tf.squeeze(mean, axes)), variance

    with mock.patch.object(tf.nn, "moments", moments):
        yield


def gradient(function: Callable, at: Any) -> Any:
    """Gradient of a scalar function."""
    return value_and_gradient(function, at)[1]


def value_and_gradient(function: Callable, at: Any) -> tuple[Any, Any]:
    """Value and gradient of a scalar function."""
    with tf.GradientTape() as tape:
        tape.watch(at)
        value = function(at)
    return value, tape.gradient(value, at, unconnected_gradients=_ZERO)


def hessian_map(function: Callable, at: Any) -> Callable:
    """v -> Hessian of a scalar function times v, by reverse over reverse (Pearlmutter 1994)."""
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(at)
        g = gradient(function, at)
    return lambda v: tape.gradient(g, at, output_gradients=v, unconnected_gradients=_ZERO)


def mean_loss(losses: Losses, x: Any, y: Any) -> Callable:
    """theta -> the batch's mean loss."""
    return lambda theta: tf.reduce_mean(losses(theta, x, y))


def hvp(losses: Losses, each: Each, theta: Any, x: Any, y: Any, V: Any) -> Any:
    """(m, d) products of the mean loss's Hessian with the rows of V (m, d)."""
    return each(hessian_map(mean_loss(losses, x, y), theta), V)


def over_batches(products: Callable, theta: Any, x: Any, y: Any, V: Any) -> Any:
    """(r, m, d): `products(theta, x[j], y[j], V[j])` of batch x[j] (b, ...), V[j] (m, d), j < r."""
    return tf.map_fn(lambda part: products(theta, *part), (x, y, V), fn_output_signature=V.dtype)


def gradients(losses: Losses, each: Each, theta: Any, x: Any, y: Any) -> Any:
    """(n, d): the gradient of each example's loss, all at one theta."""
    return each(lambda part: _alone(losses, theta, *part), (x, y))


def gradient_each(losses: Losses, each: Each, thetas: Any, x: Any, y: Any) -> Any:
    """(r, d): the gradient of the mean loss of batch x[j] (b, ...) at thetas[j]."""
    return each(lambda part: gradient(mean_loss(losses, *part[:2]), part[2]), (x, y, thetas))


def _alone(losses: Losses, theta: Any, x: Any, y: Any) -> Any:
    x, y = tf.nest.map_structure(lambda t: tf.expand_dims(t, 0), (x, y))
    return gradient(mean_loss(losses, x, y), theta)


def directional(losses: Losses, each: Each, theta: Any, x: Any, y: Any, V: Any) -> Any:
    """(m, n): grad loss_i . v_j.

    sum_i u_i loss_i is differentiated by theta, and the result, linear in u, pulled back along v_j:
    no per-example gradient is ever formed.
    """
    u = tf.ones(tf.shape(y)[:1], theta.dtype)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(u)
        g = gradient(lambda t: tf.tensordot(u, losses(t, x, y), 1), theta)
    return each(lambda v: tape.gradient(g, u, output_gradients=v, unconnected_gradients=_ZERO), V)


def input_gradient(losses: Losses, theta: Any, x: Any, y: Any, v: Any) -> Any:
    """d/dx_i of grad loss_i . v, in the structure of x."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        g = gradient(lambda t: tf.reduce_sum(losses(t, x, y)), theta)
        along = tf.tensordot(g, v, 1)
    return tape.gradient(along, x, unconnected_gradients=_ZERO)


def bregman_gradient(
    output: Callable, loss: Callable, each: Each, theta: Any, x: Any, y: Any, thetas: Any
) -> Any:
    """(k, d): gradient, at each of thetas, of the mean Bregman divergence of the loss from theta.

    D_i = loss(y_i, z) - loss(y_i, z_i) - loss'(y_i, z_i) . (z - z_i) in the output z, z_i being
    what the model says at theta. The two slopes are subtracted before they are pulled back, so that
    near theta, where they almost cancel, the digits of the difference are kept.
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
    """(n,): v' H_i v with H_i the Hessian of each example's loss.

    As in `directional`: v' (sum_i u_i H_i) v is linear in u, so its gradient by u is the answer.
    """
    u = tf.ones(tf.shape(y)[:1], theta.dtype)
    return gradient(lambda u: _along_twice(losses, theta, x, y, v, u), u)


def curvature_gradient(losses: Losses, theta: Any, x: Any, y: Any, v: Any) -> Any:
    """(d,): gradient by theta of v' H v, H the mean loss's Hessian: its third derivative."""
    u = tf.ones(tf.shape(y)[:1], theta.dtype)
    u /= tf.reduce_sum(u)
    return gradient(lambda t: _along_twice(losses, t, x, y, v, u), theta)


def _along_twice(losses: Losses, theta: Any, x: Any, y: Any, v: Any, u: Any) -> Any:
    product = hessian_map(lambda t: tf.tensordot(u, losses(t, x, y), 1), theta)
    return tf.tensordot(product(v), v, 1)


def gauss_newton(
    output: Callable, loss: Callable, each: Each, theta: Any, x: Any, y: Any, V: Any
) -> Any:
    """(m, d) products with J' H J / n, J the Jacobian of the output, H the loss's Hessian at it.

    J v comes from two reverse passes: J'u is linear in u, so its pullback along v is J v.
    """
    with tf.GradientTape(persistent=True) as by_u:
        with tf.GradientTape(persistent=True) as by_theta:
            by_theta.watch(theta)
            z = output(theta, x)
        u = tf.zeros_like(z)
        by_u.watch(u)
        transposed = by_theta.gradient(z, theta, output_gradients=u, unconnected_gradients=_ZERO)
    at_output = hessian_map(lambda z: tf.reduce_mean(loss(y, z)), tf.stop_gradient(z))

    def product(v):
        forward = by_u.gradient(transposed, u, output_gradients=v, unconnected_gradients=_ZERO)
        return by_theta.gradient(
            z, theta, output_gradients=at_output(forward), unconnected_gradients=_ZERO
        )

    return each(product, V)
