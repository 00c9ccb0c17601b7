"""The questions about one batch of rows at one theta, answered by the tape.

Every answer is NumPy's, in the dtype of theta, and leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from influence.curvature.layers import AffineLayers
from influence.examples.examples import check_differentiable
from influence.net import tape
from influence.net.flat import like
from influence.net.losses import PerExampleLoss
from influence.net.penalty import Penalty


class Derivatives(Penalty):
    """Losses, outputs and their derivatives: the part of GenericNeuralNet that knows one batch.

    Attributes:
      model: the Keras model.
      loss: its per-example loss.
      dtype: of theta and of every result.
    """

    model: keras.Model
    loss: PerExampleLoss
    dtype: np.dtype

    @property
    def num_parameters(self) -> int:
        """The length of theta, d."""
        return sum(self._tf.sizes)

    # --- questions about one batch -----------------------------------------------------------

    def outputs(self, x: Any) -> NDArray:
        """What the model answers for a batch, in inference mode: (n, ...)."""
        t = self._tf
        return t.run("outputs", t.output, t.theta(), t.inputs(x))

    def losses(self, x: Any, y: Any, thetas: NDArray | None = None) -> NDArray:
        """The data term of each example, without the penalty.

        Args:
          x: (n, ...) inputs, or a dict of them.
          y: (n, ...) labels.
          thetas: (d, k) other parameter vectors to ask about instead of the model's own.

        Returns: (n,), or (n, k) with `thetas`; nats for log losses.
        """
        return self._at("losses", self._tf.losses, thetas, x, y)

    def gradient(self, x: Any, y: Any, thetas: NDArray | None = None) -> NDArray:
        """Gradient of the batch's mean loss, without the penalty.

        Returns: (d,), or (d, k) at k other parameter vectors `thetas` (d, k).
        """

        def mean_gradient(theta, x, y):
            return tape.gradient(tape.mean_loss(self._tf.losses, x, y), theta)

        return self._at("gradient", mean_gradient, thetas, x, y)

    def loss_and_gradient(self, x: Any, y: Any) -> tuple[float, NDArray]:
        """The batch's mean loss and its gradient from one pass, without the penalty: (), (d,)."""

        def both(theta, x, y):
            return tape.value_and_gradient(tape.mean_loss(self._tf.losses, x, y), theta)

        t = self._tf
        loss, gradient = t.run("both", both, t.theta(), t.inputs(x), t.tensor(y))
        return float(loss), gradient

    def gradients(self, x: Any, y: Any) -> NDArray:
        """Gradient of each example's loss, without the penalty: (n, d).

        The one method with a vector of length d for each example; `directional` needs none.
        """
        return self._mapped("gradients", tape.gradients, x, y)

    def gradient_each(self, x: Any, y: Any, thetas: NDArray) -> NDArray:
        """Gradient of each of r small batches' mean loss, each at its own parameters.

        Args:
          x: (r, b, ...) inputs of r batches of b examples.
          y: (r, b, ...) labels.
          thetas: (d, r) the parameters of each batch.

        Returns: (d, r), without the penalty.
        """
        t = self._tf
        x, y = t.inputs(x), t.tensor(y)
        first = tf.nest.map_structure(lambda part: part[0], (x, y))
        function = partial(tape.gradient_each, t.losses, t.each(*first))
        return t.run("gradient_each", function, t.rows(thetas, "thetas"), x, y, leading=2).T

    def bregman_gradient(self, x: Any, y: Any, thetas: NDArray) -> NDArray:
        """Gradient of the batch's mean Bregman divergence from theta, at other parameters.

        D_i = loss(y_i, z) - loss(y_i, z_i) - loss'(y_i, z_i) . (z - z_i), where z_i is the model's
        output at its own theta and z at the other one (Bae et al. 2022). Zero at theta, where its
        derivative is the Gauss-Newton matrix.

        Args:
          x: (n, ...) inputs.
          y: (n, ...) labels.
          thetas: (d, k) parameter vectors.

        Returns: (d, k).
        """

        def gradients(losses, each, theta, x, y, thetas):
            output, loss = self._tf.output, self.loss.function
            return tape.bregman_gradient(output, loss, each, theta, x, y, thetas)

        return self._mapped("bregman", gradients, x, y, self._tf.rows(thetas, "thetas")).T

    def hvp(self, x: Any, y: Any, V: NDArray) -> NDArray:
        """Products of the Hessian of the batch's mean loss with m vectors, in one pass.

        H V with H = (1/n) sum_i d2 loss_i / d theta2. The penalty's share is `penalty_hvp`.

        Args:
          x: (n, ...) inputs.
          y: (n, ...) labels.
          V: (d, m) vectors, or (d,).

        Returns: the shape of V.
        """
        return like(self._mapped("hvp", tape.hvp, x, y, self._tf.rows(V, "V")), V)

    def hvp_each(self, x: Any, y: Any, V: NDArray) -> NDArray:
        """Hessian products of r small batches, each with its own vectors.

        Args:
          x: (r, b, ...) inputs of r batches of b examples.
          y: (r, b, ...) labels.
          V: (r, d, m) the vectors of each batch.

        Returns: (r, d, m): batch j's mean-loss Hessian times V[j].
        """
        return self._for_each("hvp_each", partial(tape.hvp, self._tf.losses), x, y, V)

    def gauss_newton_each(self, x: Any, y: Any, V: NDArray) -> NDArray:
        """Gauss-Newton products of r small batches, each with its own vectors.

        Args: as `hvp_each`.
        Returns: (r, d, m): batch j's Gauss-Newton matrix times V[j].
        Raises: ValueError as `gauss_newton_product`.
        """
        self.loss.check_logits("a Gauss-Newton matrix")
        t = self._tf
        function = partial(tape.gauss_newton, t.output, self.loss.function)
        return self._for_each("gauss_newton_each", function, x, y, V)

    def gauss_newton_product(self, x: Any, y: Any, V: NDArray) -> NDArray:
        """Products with the batch's generalised Gauss-Newton matrix (Schraudolph 2002).

        G = (1/n) sum_i J_i' (d2 loss_i / d output2) J_i, J_i the Jacobian of the model's output.

        Args: as `hvp`.
        Returns: the shape of V.
        Raises: ValueError for a cross-entropy of probabilities: at a softmax or sigmoid output this
          matrix is the empirical Fisher, not the Gauss-Newton matrix.
        """
        self.loss.check_logits()

        def products(losses, each, theta, x, y, V):
            return tape.gauss_newton(self._tf.output, self.loss.function, each, theta, x, y, V)

        return like(self._mapped("gauss_newton", products, x, y, self._tf.rows(V, "V")), V)

    def directional(self, x: Any, y: Any, V: NDArray, *, dtype: Any = None) -> NDArray:
        """Gradient of each example's loss along m vectors, in one pass: grad loss_i . v_j.

        Args:
          x: (n, ...) inputs, or a dict of them.
          y: (n, ...) labels.
          V: (d,) or (d, m) directions.
          dtype: of the result; a model with a closed form multiplies in it, at float32's speed.
            None: the net's.

        Returns: (n, m), or (n,) for a vector V. The penalty is not included.
        """
        rows = self._mapped("directional", tape.directional, x, y, self._tf.rows(V, "V"))
        return like(rows.astype(dtype or self.dtype, copy=False), V)

    def curvatures(self, x: Any, y: Any, v: NDArray) -> NDArray:
        """v' H_i v, with H_i the Hessian of each example's loss, in one pass: (n,).

        Args:
          x: (n, ...) inputs.
          y: (n, ...) labels.
          v: (d,) direction in parameter space.
        """
        t = self._tf
        function = partial(tape.curvatures, t.losses)
        return t.run("curvatures", function, t.theta(), t.inputs(x), t.tensor(y), t.rows(v, "v")[0])

    def curvature_gradient(self, x: Any, y: Any, v: NDArray) -> NDArray:
        """Gradient by theta of v' H v, with H the Hessian of the batch's mean loss: (d,).

        The third derivative of the mean loss, twice along v. The penalty is not included.

        Args: as `curvatures`.
        """
        t = self._tf
        function = partial(tape.curvature_gradient, t.losses)
        tensors = t.theta(), t.inputs(x), t.tensor(y), t.rows(v, "v")[0]
        return t.run("curvature_gradient", function, *tensors)

    def input_gradient(self, x: Any, y: Any, v: NDArray) -> Any:
        """d/dx_i of (grad loss_i . v), for each example.

        Args:
          x: (n, ...) floating inputs, or a dict of them.
          y: (n, ...) labels.
          v: (d,) direction in parameter space.

        Returns: arrays of x's shape.
        Raises: TypeError for integer inputs, which have no gradient.
        """
        check_differentiable(x)
        if np.shape(v) != (self.num_parameters,):
            raise ValueError(f"v must have shape ({self.num_parameters},), got {np.shape(v)}.")
        t = self._tf
        function = partial(tape.input_gradient, t.losses)
        batch = t.inputs(x), t.tensor(y)
        return t.run("input_gradient", function, t.theta(), *batch, t.rows(v, "v")[0])

    def affine_layers(self, x: Any) -> AffineLayers:
        """The layers that hold theta, if all are plain Dense or Conv2D: what EK-FAC needs.

        Args:
          x: a few rows of inputs, on which the layers are tried.

        Raises: ValueError naming the layer that is of another kind, and what to do.
        """
        return AffineLayers(self._tf, self._tf.inputs(x))

    # --- inside ----------------------------------------------------------------------------------

    def _mapped(self, name: str, function: Callable, x: Any, y: Any, *tensors: Any) -> Any:
        """`function(losses, each, theta, x, y, *tensors)`, mapping over vectors or examples."""
        t = self._tf
        return t.mapped(name, partial(function, t.losses), t.inputs(x), t.tensor(y), *tensors)

    def _for_each(self, name: str, function: Callable, x: Any, y: Any, V: NDArray) -> NDArray:
        """`function(each, theta, x[j], y[j], V[j])` of every batch j: (r, d, m), as V."""
        t = self._tf
        x, y = t.inputs(x), t.tensor(y)
        first = tf.nest.map_structure(lambda part: part[0], (x, y))
        rows = t.tensor(np.ascontiguousarray(np.moveaxis(V, 2, 1)).astype(self.dtype, copy=False))
        over = partial(tape.over_batches, partial(function, t.each(*first)))
        return np.moveaxis(t.run(name, over, t.theta(), x, y, rows, leading=2), 1, 2)

    def _at(self, name: str, function: Callable, thetas: NDArray | None, x: Any, y: Any) -> Any:
        """`function(theta, x, y)` at the model's theta or, as last axis, at each of thetas."""
        t = self._tf
        if thetas is None:
            return t.run(name, function, t.theta(), t.inputs(x), t.tensor(y))

        def at_each(losses, each, theta, x, y, thetas):
            return each(lambda theta: function(theta, x, y), thetas)

        return self._mapped(f"{name} at", at_each, x, y, t.rows(thetas, "thetas")).T
