"""The penalty of a Keras model's risk, and what its derivatives are worth to a solver."""

from __future__ import annotations

from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from influence.net import tape
from influence.net.flat import Traced, like


class Penalty:
    """The sum of the model's own Keras regularisers: the part of GenericNeuralNet without data.

    Attributes:
      convex: True if the risk is known to be smooth and strictly convex in theta.
    """

    convex = False
    _tf: Traced

    def penalty(self) -> float:
        """Sum of the model's own Keras regularisers at theta: ()."""
        return float(self._tf.run("penalty", self._tf.penalty, self._tf.theta()))

    @property
    def strong_convexity(self) -> float:
        """What no eigenvalue of the risk's Hessian is below, at any theta; NaN if nothing is known.

        0 for a net that is declared `convex`, more where a model knows more.
        """
        return 0.0 if self.convex else np.nan

    @property
    def penalty_convexity(self) -> float:
        """What no eigenvalue of the penalty's Hessian is below: the least L2 of any weight.

        L2(l) is l |w|^2, with second derivative 2 l, and none is 0. NaN where a weight has a
        regulariser other than Keras' own L1, L2 and L1L2.
        """
        # np.min, since Python's own keeps a NaN only where it comes first.
        return float(np.min([_convexity(weight.regularizer) for weight in self._tf.weights]))

    def penalty_gradient(self, thetas: NDArray | None = None) -> NDArray:
        """Gradient of the penalty: (d,), or (d, k) at other parameter vectors `thetas` (d, k)."""
        t = self._tf
        rows = t.theta()[None] if thetas is None else t.rows(thetas, "thetas")

        def at_each(thetas):
            return tf.vectorized_map(partial(tape.gradient, t.penalty), thetas)

        gradients = t.run("penalty_gradient", at_each, rows)
        return gradients[0] if thetas is None else like(gradients, thetas)

    def penalty_hvp(self, V: NDArray) -> NDArray:
        """Products of the penalty's Hessian with m vectors: the shape of V."""
        t = self._tf

        def products(theta, V):
            return tf.vectorized_map(tape.hessian_map(t.penalty, theta), V)

        return like(t.run("penalty_hvp", products, t.theta(), t.rows(V, "V")), V)

    def penalty_curvature_gradient(self, v: NDArray) -> NDArray:
        """Gradient by theta of v' H v, with H the penalty's Hessian: (d,); zero for L2."""
        t = self._tf

        def at(theta, v):
            along = lambda theta: tf.tensordot(tape.hessian_map(t.penalty, theta)(v), v, 1)  # noqa: E731
            return tape.gradient(along, theta)

        return t.run("penalty_curvature_gradient", at, t.theta(), t.rows(v, "v")[0])


def _convexity(regularizer: Any) -> float:
    """Of one weight's penalty: its second derivative."""
    if regularizer is None or type(regularizer) is keras.regularizers.L1:
        return 0.0
    if type(regularizer) in (keras.regularizers.L2, keras.regularizers.L1L2):
        return 2 * float(regularizer.l2)
    return np.nan
