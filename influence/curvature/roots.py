"""Roots of the rows' Gauss-Newton matrices, and the sum of the roots' squares.

Let J_i be the Jacobian of row i's output with respect to theta. Let H_i = S_i S_i' be the Hessian
of the row's loss with respect to that output. The Gauss-Newton matrix of n rows is

    G = (1/n) sum_i sum_s p_is p_is'    with the roots    p_is = J_i' S_i[:, s].

A row with s outputs has s roots. Computing the roots takes s backward passes, while products of G
with unit vectors take d passes. In a layer with one position per row, the root is a_i' g_is, with
the factors of influence.curvature.layers. Let two such layers have the factors a, g and b, h. The
block of G for these two layers is 1/n times

    sum_is (a_i' g_is) (b_i' h_is)' = sum_i (a_i' b_i) (x) (sum_s g_is' h_is).

(x) is the Kronecker product. The right side takes s times fewer multiplications than the left side.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from influence.common.memory import ACTIVATIONS, VECTORS, fitting
from influence.curvature.layers import AffineLayers, affine_layers, loss_roots, unit_columns
from influence.examples.examples import Examples
from influence.net import tape
from influence.net.flat import FlatModel
from influence.net.net import GenericNeuralNet

Part = tuple[NDArray, NDArray, NDArray]

# Memory holds this many arrays of the size of the factors or roots while they are computed.
_COPIES = 4


def roots(net: GenericNeuralNet, x: Any, y: NDArray) -> NDArray:
    """Return the roots p_is of a batch, (n, s, d), at the net's theta.

    If all layers are affine, the roots are products of inputs and pseudo-gradients. For other
    models, TensorFlow differentiates the outputs row by row. The loss must be convex in the output.
    """
    t, theta = net.flat, net.theta_tensor()
    try:
        return affine_layers(net, x).roots(x, y, theta)
    except ValueError:  # some weights of theta are in layers that are not affine
        pass
    batch = t.batch(x, y, weighed=True)
    columns = partial(loss_roots, t.loss.curved)
    return t.run("roots", partial(_by_rows, t, columns, t.each(*batch)), theta, *batch)


def jacobian_parts(net: GenericNeuralNet, x: Any, y: NDArray) -> tuple[list[Part], NDArray]:
    """Return the Jacobian J_i of each row's c outputs, in parts, at the net's theta.

    In a layer with one position per row, the part of J_i for output s is a_i' g_is, with the
    factors of influence.curvature.layers.

    Returns: a triple (entries, a, g) for each such layer, and an array (n, c, e) with the other e
      columns of J_i, in the order of theta. `entries` (f, k) are the layer's positions in theta. a
      is (n, f) and g is (n, c, k).
    """
    closed_form = getattr(net, "jacobian_parts", None)
    if closed_form is not None:
        return closed_form(x, y)
    t, theta = net.flat, net.theta_tensor()
    try:
        layers = affine_layers(net, x)
    except ValueError:
        batch = t.batch(x, y)
        found = partial(_by_rows, t, unit_columns, t.each(*batch))
        return [], t.run("jacobians", found, theta, *batch)
    factors, rest = layers.jacobian_parts(x, y, theta)
    pairs = zip(layers.single, factors, strict=True)
    return [(layer.entries, a, g) for layer, (a, g) in pairs], rest


def joined(parts: list[Part], rest: NDArray) -> NDArray:
    """Return the Jacobians (n, c, d), from the result of `jacobian_parts`."""
    n, c, e = rest.shape
    d = e + sum(entries.size for entries, _, _ in parts)
    J = np.empty((n, c, d), rest.dtype)
    others = np.ones(d, bool)
    for entries, a, g in parts:
        others[entries.ravel()] = False
        J[:, :, entries.ravel()] = np.einsum("nf,nck->ncfk", a, g).reshape(n, c, -1)
    J[:, :, others] = rest
    return J


def rows_per_batch(net: GenericNeuralNet, one: Examples, at_most: int) -> int:
    """Return the largest number of rows for which `sum_of_squares` fits into memory.

    `one` holds one row.
    """
    s = net.output_size(one.x)
    try:
        single = affine_layers(net, one.x).single
    except ValueError:
        return fitting(VECTORS, _COPIES * s * net.num_parameters * net.dtype.itemsize, at_most)
    sizes = [layer.entries.size for layer in single]
    numbers = 2 * s * (net.num_parameters - sum(sizes)) + 2 * max(sizes, default=0)
    # Each batch writes the whole matrix, so few large batches are faster.
    return fitting(ACTIVATIONS, numbers * net.dtype.itemsize, at_most)


def sum_of_lengths(net: GenericNeuralNet, theta: NDArray | None, x: Any, y: NDArray) -> float:
    """Return sum_is |p_is|^2 over a batch. Over all rows, this sum is n times the trace of G.

    This is a question (influence.net.questions). All weights of theta must be in affine layers, and
    the loss must be convex in the output.
    """
    layers = affine_layers(net, x)
    single, rest = layers.parts(x, y, net.at(theta).theta_tensor())
    total = float(np.square(rest, dtype=np.float64).sum())
    for a, g in single:
        lengths = np.square(a, dtype=np.float64).sum(1) * np.square(g, dtype=np.float64).sum((1, 2))
        total += float(lengths.sum())
    return total


def sum_of_squares(net: GenericNeuralNet, theta: NDArray | None, x: Any, y: NDArray) -> NDArray:
    """Return sum_is p_is p_is' (d, d) over a batch.

    This is a question (influence.net.questions). The loss must be convex in the output.
    """
    view = net.at(theta)
    try:
        layers = affine_layers(net, x)
    except ValueError:
        return _square(roots(view, x, y))
    # A traced function holds the factors, their copies in other orders, and activations.
    rows = fitting(ACTIVATIONS, _COPIES * layers.numbers * net.dtype.itemsize, len(y))
    found = [
        layers.parts(*_cut(x, y, slice(start, start + rows)), view.theta_tensor())
        for start in range(0, len(y), rows)
    ]
    rest = np.concatenate([rest for _, rest in found])
    single = [
        tuple(map(np.concatenate, zip(*pairs, strict=True)))
        for pairs in zip(*(pairs for pairs, _ in found), strict=True)
    ]
    return _summed(layers, single, rest)


def _summed(layers: AffineLayers, single: list[tuple[NDArray, ...]], rest: NDArray) -> NDArray:
    """Return sum_is p_is p_is' (d, d), from the parts that `AffineLayers.parts` computes."""
    d = sum(layers.traced.sizes)
    matrix = np.empty((d, d), rest.dtype if rest.size else single[0][0].dtype)
    others = np.ones(d, bool)
    for layer in layers.single:
        others[layer.entries.ravel()] = False
    where = np.flatnonzero(others)
    if where.size:
        matrix[np.ix_(where, where)] = _square(rest)
    for i, (one, (a, g)) in enumerate(zip(layers.single, single, strict=True)):
        for k in range(g.shape[2]):  # fill the matrix's rows for the weights of output k
            rows = one.entries[:, k]
            if where.size:
                _set(matrix, rows, where, a.T @ np.einsum("ns,nse->ne", g[:, :, k], rest))
            for other, (b, h) in zip(layers.single[i:], single[i:], strict=True):
                # The matrix is symmetric. So within one layer, only outputs from k on are computed.
                first = k if other is one else 0
                pairs = np.einsum("ns,nsc->nc", g[:, :, k], h[:, :, first:])
                product = a.T @ (pairs[:, :, None] * b[:, None, :]).reshape(len(b), -1)
                product = product.reshape(len(rows), -1, b.shape[1]).transpose(0, 2, 1)
                columns = other.entries[:, first:].ravel()
                _set(matrix, rows, columns, product.reshape(len(rows), -1))
    return matrix


def _set(matrix: NDArray, rows: NDArray, columns: NDArray, block: NDArray) -> None:
    """Write a block and its transpose into a symmetric matrix."""
    matrix[np.ix_(rows, columns)] = block
    matrix[np.ix_(columns, rows)] = block.T


def _square(R: NDArray) -> NDArray:
    R = R.reshape(-1, R.shape[-1])
    return R.T @ R


def _cut(x: Any, y: NDArray, rows: slice) -> tuple[Any, NDArray]:
    return tf.nest.map_structure(lambda part: part[rows], x), y[rows]


def _by_rows(
    flat: FlatModel, columns: Callable, each: tape.Each, theta: Any, x: Any, y: Any
) -> Any:
    S = columns(each, y, flat.output(theta, x))  # (s, n, ...)

    def of_row(part):
        x, columns = part
        with tf.GradientTape(persistent=True) as by_theta:
            by_theta.watch(theta)
            z = flat.output(theta, tf.nest.map_structure(lambda t: tf.expand_dims(t, 0), x))

        def pulled_back(column):
            return by_theta.gradient(
                z, theta, column[None], unconnected_gradients=tf.UnconnectedGradients.ZERO
            )

        return each(pulled_back, columns)

    return each(of_row, (x, tf.einsum("sn...->ns...", S)))
