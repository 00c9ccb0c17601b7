"""Questions about one batch of rows at one theta, answered by automatic differentiation.

Every answer is a NumPy array or number in the dtype of theta. The model is not changed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from influence.examples.examples import check_differentiable
from influence.net import tape
from influence.net.flat import FlatModel, like
from influence.net.losses import PerExampleLoss


class Derivatives:
    """Losses, outputs and derivatives of one batch: the base class of GenericNeuralNet.

    Attributes:
      model: the Keras model.
      flat: the model as functions of a flat theta.
      loss: its per-example loss.
      dtype: dtype of theta and of every result.
      convex: True if the risk is known to be smooth and strictly convex in theta.
      fixed: (d,) theta of a view that `at` made; None: theta is the model's own weights.
      memo: cache of a view, for the current batch; None: nothing is cached.
    """

    model: keras.Model
    flat: FlatModel
    loss: PerExampleLoss
    dtype: np.dtype
    convex = False
    fixed: NDArray | None = None
    memo: dict[str, NDArray] | None = None

    @property
    def num_parameters(self) -> int:
        """Length of theta, d."""
        return sum(self.flat.sizes)

    def theta_tensor(self) -> Any:
        """Return theta as a tensor: a view's own theta, or else the model's current weights."""
        return self.flat.theta() if self.fixed is None else self.flat.tensor(self.fixed)

    # --- questions about one batch -----------------------------------------------------------

    def outputs(self, x: Any) -> NDArray:
        """Return the model's outputs for a batch, in inference mode: (n, ...)."""
        t = self.flat
        return t.run("outputs", t.output, self.theta_tensor(), t.inputs(x))

    def losses(self, x: Any, y: Any, thetas: NDArray | None = None) -> NDArray:
        """Return the loss of each example, without the penalty.

        Args:
          x: (n, ...) inputs, or a dict of them.
          y: (n, ...) labels.
          thetas: (d, k) other parameter vectors, used instead of the model's own.

        Returns: (n,), or (n, k) with `thetas`; nats for log losses.
        """
        return self._at("losses", self.flat.losses, thetas, x, y)

    def gradient(self, x: Any, y: Any, thetas: NDArray | None = None) -> NDArray:
        """Return the gradient of the batch's mean loss, without the penalty.

        Returns: (d,), or (d, k) at k other parameter vectors `thetas` (d, k).
        """

        def mean_gradient(theta, x, y):
            return tape.gradient(tape.mean_loss(self.flat.losses, x, y), theta)

        return self._at("gradient", mean_gradient, thetas, x, y)

    def loss_and_gradient(self, x: Any, y: Any) -> tuple[float, NDArray]:
        """Return the batch's mean loss and its gradient, (), (d,), without the penalty."""

        def both(theta, x, y):
            return tape.value_and_gradient(tape.mean_loss(self.flat.losses, x, y), theta)

        t = self.flat
        loss, gradient = t.run("both", both, self.theta_tensor(), t.inputs(x), t.tensor(y))
        return float(loss), gradient

    def gradients(self, x: Any, y: Any) -> NDArray:
        """Return the gradient of each example's loss, without the penalty: (n, d).

        Only this method forms a vector of length d for each example; `directional` forms none.
        """
        return self._mapped("gradients", tape.gradients, x, y)

    def each_batch(
        self, question: Literal["gradient", "hvp", "gauss_newton"], x: Any, y: Any, V: NDArray
    ) -> NDArray:
        """Ask the same question about r small batches, each with its own vectors.

        Args:
          question: "hvp" or "gauss_newton" for products of each batch's matrix with vectors at this
            theta; "gradient" for gradients of each batch's mean loss at other parameters.
          x: (r, b, ...) inputs of r batches of b examples.
          y: (r, b, ...) labels.
          V: (r, d, m) the vectors, or the other parameters, of each batch.

        Returns: (r, d, m), without the penalty.
        Raises: ValueError for another question; for "gauss_newton", as `gauss_newton_product`.
        """
        t = self.flat
        x, y = t.inputs(x), t.tensor(y)
        each = t.each(*tf.nest.map_structure(lambda part: part[0], (x, y)))
        if question == "gradient":
            at = partial(tape.gradient_each, t.losses, each)
            columns = (np.ascontiguousarray(column.T) for column in np.moveaxis(V, 2, 0))
            found = [
                t.run("gradient each", at, t.rows(thetas, "V"), x, y, leading=2)
                for thetas in columns
            ]
            return np.stack(found, axis=2)
        if question == "hvp":
            products = partial(tape.hvp, t.losses, each)
        elif question == "gauss_newton":
            self.loss.check_logits("a Gauss-Newton matrix")
            products = partial(tape.gauss_newton, t.output, self.loss.curved, each)
        else:
            raise ValueError(f"question must be gradient, hvp or gauss_newton, got {question!r}.")
        rows = t.tensor(np.ascontiguousarray(np.moveaxis(V, 2, 1)).astype(self.dtype, copy=False))
        over = partial(tape.over_batches, products)
        found = t.run(f"{question} each", over, self.theta_tensor(), x, y, rows, leading=2)
        return np.moveaxis(found, 1, 2)

    def bregman_gradient(self, x: Any, y: Any, thetas: NDArray) -> NDArray:
        """Return the gradient of the mean Bregman divergence from theta, at other parameters.

        D_i = loss(y_i, z) - loss(y_i, z_i) - loss'(y_i, z_i) . (z - z_i), where z_i is the model's
        output at its own theta and z at the other one (Bae et al. 2022). The gradient is zero at
        theta, and its derivative there is the Gauss-Newton matrix.

        Args: x and y as in `losses`; thetas: (d, k) parameter vectors.
        Returns: (d, k).
        """

        def gradients(losses, each, theta, x, y, thetas):
            output, loss = self.flat.output, self.loss.function
            return tape.bregman_gradient(output, loss, each, theta, x, y, thetas)

        return self._mapped("bregman", gradients, x, y, self.flat.rows(thetas, "thetas")).T

    def hvp(self, x: Any, y: Any, V: NDArray) -> NDArray:
        """Multiply the Hessian of the batch's mean loss by m vectors, in one pass.

        H = (1/n) sum_i d2 loss_i / d theta2. The penalty is not included; see `penalty_hvp`.

        Args: x and y as in `losses`; V: (d, m) vectors, or (d,).
        Returns: the shape of V.
        """
        return like(self._mapped("hvp", tape.hvp, x, y, self.flat.rows(V, "V")), V)

    def gauss_newton_product(self, x: Any, y: Any, V: NDArray) -> NDArray:
        """Multiply the batch's generalised Gauss-Newton matrix (Schraudolph 2002) by m vectors.

        G = (1/n) sum_i J_i' (d2 loss_i / d output2) J_i; J_i is the Jacobian of the model's output.

        Args: as `hvp`.
        Returns: the shape of V.
        Raises: ValueError for a cross-entropy of probabilities. At a softmax or sigmoid output, G
          would be the empirical Fisher, not the Gauss-Newton matrix of the logits.
        """
        self.loss.check_logits()

        def products(losses, each, theta, x, y, V):
            return tape.gauss_newton(self.flat.output, self.loss.curved, each, theta, x, y, V)

        return like(self._mapped("gauss_newton", products, x, y, self.flat.rows(V, "V")), V)

    def directional(self, x: Any, y: Any, V: NDArray, *, dtype: Any = None) -> NDArray:
        """Return each example's derivative along m vectors, in one pass: grad loss_i . v_j.

        Args:
          x: (n, ...) inputs, or a dict of them.
          y: (n, ...) labels.
          V: (d,) or (d, m) directions.
          dtype: dtype of the result; None: the net's. A model with a closed form also multiplies
            in this dtype, so float32 is faster.

        Returns: (n, m), or (n,) for a vector V. The penalty is not included.
        """
        rows = self._mapped("directional", tape.directional, x, y, self.flat.rows(V, "V"))
        return like(rows.astype(dtype or self.dtype, copy=False), V)

    def curvatures(self, x: Any, y: Any, v: NDArray) -> NDArray:
        """Return v' H_i v, with H_i the Hessian of each example's loss, in one pass: (n,).

        Args: x and y as in `losses`; v: (d,) direction in parameter space.
        """
        return self._along("curvatures", tape.curvatures, x, y, v)

    def curvature_gradient(self, x: Any, y: Any, v: NDArray) -> NDArray:
        """Return d/dtheta of v' H v, with H the Hessian of the batch's mean loss: (d,).

        This is the third derivative of the mean loss, twice along v, without the penalty.

        Args: as `curvatures`.
        """
        return self._along("curvature_gradient", tape.curvature_gradient, x, y, v)

    def input_gradient(self, x: Any, y: Any, v: NDArray) -> Any:
        """Return d/dx_i of (grad loss_i . v) for each example.

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
        return self._along("input_gradient", tape.input_gradient, x, y, v)

    # --- the penalty, which needs no data ---------------------------------------------------------

    def penalty(self) -> float:
        """Return the sum of the model's own Keras regularisers at theta: ()."""
        return float(self.flat.run("penalty", self.flat.penalty, self.theta_tensor()))

    @property
    def strong_convexity(self) -> float:
        """Lower bound on the eigenvalues of the risk's Hessian at any theta; NaN if unknown.

        The bound is 0 for a net declared `convex`. A subclass may know a larger bound.
        """
        return 0.0 if self.convex else np.nan

    @property
    def penalty_convexity(self) -> float:
        """Lower bound on the eigenvalues of the penalty's Hessian: the minimum over all weights.

        L2(l) is l |w|^2, with second derivative 2 l. A weight without L2 gives 0. The bound is NaN
        if a weight has a regulariser other than Keras' own L1, L2 and L1L2.
        """
        # np.min returns NaN if any entry is NaN; Python's min does so only if the first is.
        return float(np.min([_convexity(weight.regularizer) for weight in self.flat.weights]))

    def penalty_gradient(self, thetas: NDArray | None = None) -> NDArray:
        """Return the penalty's gradient: (d,), or (d, k) at other parameters `thetas` (d, k)."""
        t = self.flat
        rows = self.theta_tensor()[None] if thetas is None else t.rows(thetas, "thetas")

        def at_each(thetas):
            return tf.vectorized_map(partial(tape.gradient, t.penalty), thetas)

        gradients = t.run("penalty_gradient", at_each, rows)
        return gradients[0] if thetas is None else like(gradients, thetas)

    def penalty_hvp(self, V: NDArray) -> NDArray:
        """Multiply the penalty's Hessian by m vectors: the shape of V."""
        t = self.flat

        def products(theta, V):
            return tf.vectorized_map(tape.hessian_map(t.penalty, theta), V)

        return like(t.run("penalty_hvp", products, self.theta_tensor(), t.rows(V, "V")), V)

    def penalty_curvature_gradient(self, v: NDArray) -> NDArray:
        """Return d/dtheta of v' H v, with H the penalty's Hessian: (d,); zero for L2."""
        t = self.flat

        def at(theta, v):
            along = lambda theta: tf.tensordot(tape.hessian_map(t.penalty, theta)(v), v, 1)  # noqa: E731
            return tape.gradient(along, theta)

        return t.run("penalty_curvature_gradient", at, self.theta_tensor(), t.rows(v, "v")[0])

    def _along(self, name: str, function: Callable, x: Any, y: Any, v: NDArray) -> Any:
        """Run `function(losses, theta, x, y, v)` for one direction v (d,)."""
        t = self.flat
        tensors = self.theta_tensor(), t.inputs(x), t.tensor(y), t.rows(v, "v")[0]
        return t.run(name, partial(function, t.losses), *tensors)

    def _mapped(self, name: str, function: Callable, x: Any, y: Any, *tensors: Any) -> Any:
        """Run `function(losses, each, theta, x, y, *tensors)`, with `each` as its map."""
        t = self.flat
        batch = t.inputs(x), t.tensor(y)
        each = t.each(*batch)
        return t.run(name, partial(function, t.losses, each), self.theta_tensor(), *batch, *tensors)

    def _at(self, name: str, function: Callable, thetas: NDArray | None, x: Any, y: Any) -> Any:
        """Run `function(theta, x, y)` at the model's theta, or at each of thetas (last axis)."""
        t = self.flat
        if thetas is None:
            return t.run(name, function, self.theta_tensor(), t.inputs(x), t.tensor(y))

        def at_each(losses, each, theta, x, y, thetas):
            return each(lambda theta: function(theta, x, y), thetas)

        return self._mapped(f"{name} at", at_each, x, y, t.rows(thetas, "thetas")).T


def _convexity(regularizer: Any) -> float:
    """Return a lower bound on the second derivative of one regulariser; NaN if unknown."""
    if regularizer is None or type(regularizer) is keras.regularizers.L1:
        return 0.0
    if type(regularizer) in (keras.regularizers.L2, keras.regularizers.L1L2):
        return 2 * float(regularizer.l2)
    return np.nan
