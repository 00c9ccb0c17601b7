"""Derivatives of per-example losses by `tf.GradientTape`, for many vectors in one pass.

The first argument of most functions is `losses`. `losses(theta, x, y)` returns the n losses of a
batch. All arrays are tensors. The m vectors are the rows of V (m, d). `each(f, V)` maps a function
over these rows, by `tf.vectorized_map` or by `looped`. Unconnected gradients count as zero. The
second derivative of a linear function is therefore zero and not an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

_ZERO = tf.UnconnectedGradients.ZERO
Losses = Callable[[Any, Any, Any], Any]
Each = Callable[[Callable, Any], Any]

# Prefixes of operations for which `looped` replaces `tf.vectorized_map`. `tf.vectorized_map` is
# wrong for grouped convolutions. It fails for recurrent layers, and for gradients of branches such
# as `tf.cond`. For other convolutions, it is no faster than a loop over the m vectors, and takes m
# times the memory of the loop.
_LOOPED_OPS = (
    *("Conv", "DepthwiseConv", "While", "StatelessWhile", "TensorList", "CudnnRNN"),
    *("If", "StatelessIf", "Case", "StatelessCase"),
)


def needs_loop(graph: Any) -> bool:
    """Return True if a traced function contains an operation that must not be vectorised."""
    return any(op.type.startswith(_LOOPED_OPS) for op in operations(graph))


def operations(graph: Any) -> list[Any]:
    """Return the operations of a traced function and its inner functions, such as loop bodies."""
    inside = [f.graph for f in graph._functions.values() if hasattr(f, "graph")]
    return [op for part in (graph, *inside) for op in part.get_operations()]


def looped(function: Callable, elements: Any, dtype: Any) -> Any:
    """Apply a function to one element after the other. Stack its results, of the dtype `dtype`."""
    return tf.map_fn(function, elements, fn_output_signature=tf.as_dtype(dtype))


def gradient(function: Callable, at: Any) -> Any:
    """Return the gradient of a scalar function at the tensor `at`."""
    return value_and_gradient(function, at)[1]


def value_and_gradient(function: Callable, at: Any) -> tuple[Any, Any]:
    """Return the value and gradient of a scalar function at the tensor `at`."""
    with tf.GradientTape() as tape:
        tape.watch(at)
        value = function(at)
    return value, tape.gradient(value, at, unconnected_gradients=_ZERO)


def hessian_map(function: Callable, at: Any) -> Callable:
    """Return the map v -> H v, by reverse over reverse (Pearlmutter 1994).

    H is the Hessian of a scalar function at the tensor `at`.
    """
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(at)
        g = gradient(function, at)
    return lambda v: tape.gradient(g, at, output_gradients=v, unconnected_gradients=_ZERO)


def mean_loss(losses: Losses, x: Any, y: Any) -> Callable:
    """Return the batch's mean loss as a function of theta."""
    return lambda theta: tf.reduce_mean(losses(theta, x, y))


def hvp(losses: Losses, each: Each, theta: Any, x: Any, y: Any, V: Any) -> Any:
    """Multiply the mean loss's Hessian by each row of V (m, d)."""
    return each(hessian_map(mean_loss(losses, x, y), theta), V)


def over_batches(products: Callable, theta: Any, x: Any, y: Any, V: Any) -> Any:
    """Return `products(theta, x[j], y[j], V[j])` for each of r batches j, stacked to (r, m, d)."""
    return tf.map_fn(lambda part: products(theta, *part), (x, y, V), fn_output_signature=V.dtype)


def gradients(losses: Losses, each: Each, theta: Any, x: Any, y: Any) -> Any:
    """Return the gradient of each example's loss at theta, (n, d)."""
    return each(lambda part: _alone(losses, theta, *part), (x, y))


def gradient_each(losses: Losses, each: Each, thetas: Any, x: Any, y: Any) -> Any:
    """Return the gradient (r, d) of the mean loss of each batch (x[j], y[j]) at thetas[j]."""
    return each(lambda part: gradient(mean_loss(losses, *part[:2]), part[2]), (x, y, thetas))


def _num_rows(y: Any) -> Any:
    """Return the shape tensor [n] of y's n rows. y is a tensor or a dict of tensors."""
    return tf.shape(tf.nest.flatten(y)[0])[:1]


def _alone(losses: Losses, theta: Any, x: Any, y: Any) -> Any:
    x, y = tf.nest.map_structure(lambda t: tf.expand_dims(t, 0), (x, y))
    return gradient(mean_loss(losses, x, y), theta)


def directional(losses: Losses, each: Each, theta: Any, x: Any, y: Any, V: Any) -> Any:
    """Return grad loss_i . v_j for every row v_j of V and every example i, (m, n).

    Entry (j, i) is the derivative of (sum_k u_k grad loss_k) . v_j with respect to the weight u_i.
    The gradient of a single example is never computed.
    """
    u = tf.ones(_num_rows(y), theta.dtype)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(u)
        g = gradient(lambda t: tf.tensordot(u, losses(t, x, y), 1), theta)
    return each(lambda v: tape.gradient(g, u, output_gradients=v, unconnected_gradients=_ZERO), V)


def input_gradient(losses: Losses, theta: Any, x: Any, y: Any, v: Any) -> Any:
    """Return the derivative of grad loss_i . v with respect to x_i, in the structure of x."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        g = gradient(lambda t: tf.reduce_sum(losses(t, x, y)), theta)
        along = tf.tensordot(g, v, 1)
    return tape.gradient(along, x, unconnected_gradients=_ZERO)


def output_terms(
    output: Callable, loss: Callable, curved: Callable, each: Each, theta: Any, x: Any, y: Any
) -> tuple[Any, Any, Any]:
    """Return the outputs z (n, c) of all rows, and the derivatives of each row's loss.

    These are the gradients (n, c) and the Hessians (n, c, c) with respect to z. `curved` is the
    method `PerExampleLoss.curved`. Each row of z is flattened.
    """
    z = output(theta, x)
    slope = gradient(lambda z: tf.reduce_sum(loss(y, z)), z)
    n, size = tf.shape(z)[0], tf.size(z) // tf.shape(z)[0]
    return (
        tf.reshape(z, [n, size]),
        tf.reshape(slope, [n, size]),
        output_hessians(curved(y, z), each, z),
    )


def output_hessians(product: Callable, each: Each, z: Any) -> Any:
    """Return the Hessian of each row's loss with respect to the row's c outputs, (n, c, c).

    `product(u)` multiplies the Hessians of all rows by u, which has the shape of the outputs z.
    """
    n = tf.shape(z)[0]
    size = tf.size(z) // n

    def column(unit):
        along = tf.reshape(tf.broadcast_to(unit, [n, size]), tf.shape(z))
        return tf.reshape(product(along), [n, size])

    H = tf.transpose(each(column, tf.eye(size, dtype=z.dtype)), [1, 0, 2])
    return (H + tf.linalg.matrix_transpose(H)) / 2


def bregman_gradient(
    output: Callable, loss: Callable, each: Each, theta: Any, x: Any, y: Any, thetas: Any
) -> Any:
    """Return gradients of the mean Bregman divergence from theta, at each of `thetas` (k, d).

    Row i's divergence is loss(y_i, z) - loss(y_i, z_i) - loss'(y_i, z_i) . (z - z_i). z_i is the
    output at theta, and z is the output at the other parameters. Near theta, the slopes loss' at z
    and at z_i are almost equal. Their difference is taken before the backward pass, because a
    difference of two gradients would lose more digits.
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
    """Return v' H_i v (n,). H_i is the Hessian of example i's loss.

    v' H_i v is the derivative of v' (sum_k u_k H_k) v with respect to the weight u_i.
    """
    u = tf.ones(_num_rows(y), theta.dtype)
    return gradient(lambda u: _along_twice(losses, theta, x, y, v, u), u)


def curvature_gradient(losses: Losses, theta: Any, x: Any, y: Any, v: Any) -> Any:
    """Return the gradient (d,) of v' H v with respect to theta. H is the mean loss's Hessian."""
    u = tf.ones(_num_rows(y), theta.dtype)
    u /= tf.reduce_sum(u)
    return gradient(lambda t: _along_twice(losses, t, x, y, v, u), theta)


def _along_twice(losses: Losses, theta: Any, x: Any, y: Any, v: Any, u: Any) -> Any:
    product = hessian_map(lambda t: tf.tensordot(u, losses(t, x, y), 1), theta)
    return tf.tensordot(product(v), v, 1)


def gauss_newton(
    output: Callable, curved: Callable, each: Each, theta: Any, x: Any, y: Any, V: Any
) -> Any:
    """Return J' H J v / n for each row v of V (m, d).

    J is the Jacobian of the outputs z of all n rows with respect to theta. H is the Hessian of the
    sum of the losses with respect to z. `curved(y, z)` returns the map u -> H u. J v is the
    derivative of (J'u) . v with respect to u, so two reverse passes compute it.
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
