"""Roots of the rows' Gauss-Newton matrices, from which the whole matrix is one matrix product.

Let J_i be the Jacobian of row i's output with respect to theta. Let H_i = S_i S_i' be the Hessian
of the row's loss with respect to that output. The Gauss-Newton matrix of n rows is

    G = (1/n) sum_i sum_s p_is p_is'    with the roots    p_is = J_i' S_i[:, s].

A row with s outputs has s roots. Computing the roots takes s backward passes, while products of G
with unit vectors take d passes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import tensorflow as tf
from numpy.typing import NDArray

from influence.curvature.layers import affine_layers, loss_roots
from influence.net import tape
from influence.net.flat import FlatModel
from influence.net.net import GenericNeuralNet


def roots(net: GenericNeuralNet, x: Any, y: NDArray) -> NDArray:
    """Return the roots p_is of a batch, (n, s, d), at the net's theta.

    For affine layers, the roots are products of inputs and pseudo-gradients. For other models, the
    outputs of one row after another are differentiated. The loss must be convex in the output.
    """
    t, theta = net.flat, net.theta_tensor()
    try:
        return affine_layers(net, x).roots(x, y, theta)
    except ValueError:  # theta is also in layers of other kinds
        pass
    batch = t.inputs(x), t.tensor(y)
    return t.run("roots", partial(_by_rows, t, t.each(*batch)), theta, *batch)


def _by_rows(flat: FlatModel, each: tape.Each, theta: Any, x: Any, y: Any) -> Any:
    S = loss_roots(flat.loss.curved, each, y, flat.output(theta, x))  # (s, n, ...)

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
