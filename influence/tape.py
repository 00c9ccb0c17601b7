"""Derivatives of per-example losses by `tf.GradientTape`, many vectors in one pass.

Every function takes `losses(theta, x, y) -> (n,)`, tensors, and blocks of vectors as rows (m, d),
because `tf.vectorized_map` runs over the first axis. Unconnected gradients are zero: the second
derivative of a linear function is no error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

_ZERO = tf.UnconnectedGradients.ZERO
Losses = Callable[[Any, Any, Any], Any]


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


def hvp(losses: Losses, theta: Any, x: Any, y: Any, V: Any) -> Any:
    """(m, d) products of the mean loss's Hessian with the rows of V (m, d)."""
    return tf.vectorized_map(hessian_map(mean_loss(losses, x, y), theta), V)


def hvp_each(losses: Losses, theta: Any, x: Any, y: Any, V: Any) -> Any:
    """(r, d): the Hessian of batch x[j] (b, ...) times V[j], for r batches."""
    return tf.vectorized_map(
        lambda part: hessian_map(mean_loss(losses, part[0], part[1]), theta)(part[2]), (x, y, V)
    )


def gradients(losses: Losses, thetas: Any, x: Any, y: Any) -> Any:
    """(n, d): the gradient of example i's loss at thetas[i]."""

    def one(part):
        theta, x, y = part
        alone = tf.nest.map_structure(lambda t: tf.expand_dims(t, 0), x)
        return gradient(mean_loss(losses, alone, tf.expand_dims(y, 0)), theta)

    return tf.vectorized_map(one, (thetas, x, y))


def directional(losses: Losses, theta: Any, x: Any, y: Any, V: Any) -> Any:
    """(m, n): grad loss_i . v_j.

    sum_i u_i loss_i is differentiated by theta, and the result, linear in u, pulled back along v_j:
    no per-example gradient is ever formed.
    """
    u = tf.ones(tf.shape(y)[:1], theta.dtype)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(u)
        g = gradient(lambda t: tf.tensordot(u, losses(t, x, y), 1), theta)
    return tf.vectorized_map(
        lambda v: tape.gradient(g, u, output_gradients=v, unconnected_gradients=_ZERO), V
    )


def input_gradient(losses: Losses, theta: Any, x: Any, y: Any, v: Any) -> Any:
    """d/dx_i of grad loss_i . v, in the structure of x."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        g = gradient(lambda t: tf.reduce_sum(losses(t, x, y)), theta)
        along = tf.tensordot(g, v, 1)
    return tape.gradient(along, x, unconnected_gradients=_ZERO)


def gauss_newton(output: Callable, loss: Callable, theta: Any, x: Any, y: Any, V: Any) -> Any:
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

    return tf.vectorized_map(product, V)
