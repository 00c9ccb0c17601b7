"""Losses and their derivatives for one batch of rows, by automatic differentiation.

Every result is a NumPy array or a number, in the dtype of theta unless its type says otherwise. The
model is not changed. J_i is the Jacobian of row i's output with respect to theta. H_i is the
Hessian of row i's loss with respect to theta.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from influence.common.numbers import numbers
from influence.examples.examples import check_differentiable
from influence.net import tape
from influence.net.flat import FlatModel, like
from influence.net.losses import PerExampleLoss


class Derivatives:
    """Base class of GenericNeuralNet. It computes losses, outputs and derivatives of one batch.

    A loss may mask positions of a row, such as time steps. The mass v_i of row i is its number of
    valid positions, and loss_i is the mean over these positions. Without masks, all v_i are 1.

    The mean loss of a batch of n rows is (1/n) sum_i v_i loss_i. Its derivatives use the same
    factors v_i / n. The division is by n and not by sum_i v_i, because the masses of the whole set
    are known only later: `GenericNeuralNet` sums over all batches, and divides by the set's masses.

    Attributes:
      model: the Keras model.
      flat: the model as functions of a flat vector theta.
      loss: the model's per-example loss.
      dtype: the dtype of theta and of every result.
      convex: True if the risk is known to be smooth and strictly convex in theta.
      takes_weights: True for a subclass with its own `losses` that also takes sample weights.
      fixed: (d,) theta of a view that `at` made. If it is None, theta is the model's weights.
      memo: the cache of a view that `remembering` made. If it is None, nothing is cached.
      weighs: False for a view that `by_row` made. Its means over rows use 1 in place of v_i.
    """

    model: keras.Model
    flat: FlatModel
    loss: PerExampleLoss
    dtype: np.dtype
    convex = False
    takes_weights = False
    fixed: NDArray | None = None
    memo: dict[str, NDArray] | None = None
    weighs = True

    @property
    def num_parameters(self) -> int:
        """Length of theta, d."""
        return sum(self.flat.sizes)

    def theta_tensor(self) -> Any:
        """Return theta as a tensor (d,), from `fixed` if set, else from the model's weights."""
        return self.flat.theta() if self.fixed is None else self.flat.tensor(self.fixed)

    # --- questions about one batch -----------------------------------------------------------

    def outputs(self, x: Any) -> NDArray:
        """Return the model's outputs (n, ...) for a batch, in inference mode.

        If the model returns probabilities, these are not replaced by logits. A model with several
        outputs returns a list or dict of arrays.
        """
        t = self.flat
        return t.run("outputs", t.model_output, self.theta_tensor(), t.inputs(x))

    def output_size(self, x: Any) -> int:
        """Return the number of entries in the model's outputs for a batch, summed over outputs."""
        return sum(part.size for part in tf.nest.flatten(self.outputs(x)))

    def masses(self, x: Any, y: Any) -> NDArray[np.float64]:
        """Return each row's mass v_i, (n,): its number of valid positions, or 1 without masks."""
        if not self.loss.has_masses:
            return np.ones(len(y))
        valid = self.flat.valid(self.flat.inputs(x), self.flat.tensor(y)).numpy()
        return valid.reshape(len(valid), -1).sum(axis=1, dtype=np.float64)

    def times_masses(self, table: NDArray, x: Any, y: Any) -> NDArray:
        """Multiply each row of a table (n, m) by its mass, in place. Return the table."""
        if self.loss.has_masses:
            table *= self.masses(x, y)[:, None]
        return table

    def losses(self, x: Any, y: Any, thetas: NDArray | None = None) -> NDArray:
        """Return the loss of each example, without the penalty.

        Args:
          x: (n, ...) inputs, or a dict of them.
          y: (n, ...) labels.
          thetas: (d, k) parameter vectors as columns, at which to compute the losses. None means
            the net's theta.

        Returns: (n,), or (n, k) with `thetas`. Log losses are in nats.
        """
        return self._at("losses", self.flat.losses, thetas, x, y)

    def gradient(self, x: Any, y: Any, thetas: NDArray | None = None) -> NDArray:
        """Return the gradient of the batch's mean loss, without the penalty.

        Returns: (d,) at theta, or (d, k) at the k columns of `thetas` (d, k).
        """

        def mean_gradient(theta, x, y):
            return tape.gradient(tape.mean_loss(self.flat.losses, x, y), theta)

        return self._at("gradient", mean_gradient, thetas, x, y, weighed=True)

    def loss_and_gradient(self, x: Any, y: Any) -> tuple[float, NDArray]:
        """Return the batch's mean loss and its gradient (d,), without the penalty."""

        def both(theta, x, y):
            return tape.value_and_gradient(tape.mean_loss(self.flat.losses, x, y), theta)

        t = self.flat
        batch = t.batch(x, y, weighed=self.weighs)
        loss, gradient = t.run("both", both, self.theta_tensor(), *batch)
        return float(loss), gradient

    def gradients(self, x: Any, y: Any) -> NDArray:
        """Return the gradient (n, d) of each example's loss, without the penalty.

        The result takes memory for n d numbers. If only the products of the gradients with m
        vectors are needed, `directional` returns them in n m numbers.
        """
        return self._mapped("gradients", tape.gradients, x, y)

    def each_batch(
        self, question: Literal["gradient", "hvp", "gauss_newton"], x: Any, y: Any, V: NDArray
    ) -> NDArray:
        """Compute matrix products or gradients for r small batches, each with its own m vectors.

        Args:
          question: "hvp" to multiply the Hessian of each batch's mean loss at theta by the batch's
            vectors. "gauss_newton" to multiply each batch's Gauss-Newton matrix instead. "gradient"
            to compute the gradients of each batch's mean loss at the batch's m parameter vectors.
          x: (r, b, ...) inputs of r batches of b examples.
          y: (r, b, ...) labels.
          V: (r, d, m). The columns of V[j] are the m vectors of batch j. For "gradient", they are
            parameter vectors at which the gradients are taken.

        Returns: the products or gradients, (r, d, m), without the penalty.
        Raises: ValueError for another question, or if `gauss_newton_product` refuses the loss.
        """
        t, V = self.flat, numbers(V, "V")
        x, y = t.batches(x, y, weighed=self.weighs)
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
        """Return the gradient of a batch's mean Bregman divergence from theta, at other parameters.

        Row i's divergence is D_i = loss(y_i, z) - loss(y_i, z_i) - loss'(y_i, z_i) . (z - z_i).
        z_i is row i's output at theta, and z is its output at the other parameters (Bae et al.
        2022). loss' is the loss's derivative with respect to the output. The mean divergence has
        gradient zero at theta. Its Hessian at theta is the Gauss-Newton matrix.

        Args: x and y as in `losses`, and other parameters `thetas` (d, k).
        Returns: the gradients at the columns of `thetas`, (d, k).
        """

        def gradients(losses, each, theta, x, y, thetas):
            output, loss = self.flat.output, self.loss.function
            return tape.bregman_gradient(output, loss, each, theta, x, y, thetas)

        rows = self.flat.rows(thetas, "thetas")
        return self._mapped("bregman", gradients, x, y, rows, weighed=True).T

    def hvp(self, x: Any, y: Any, V: NDArray) -> NDArray:
        """Multiply the Hessian of the batch's mean loss by m vectors, in one pass.

        H = (1/n) sum_i d2 loss_i / d theta2, without the penalty. `penalty_hvp` multiplies the
        penalty's Hessian.

        Args: x and y as in `losses`, and vectors V (d, m) or one vector (d,).
        Returns: the products, in the shape of V.
        """
        return like(self._mapped("hvp", tape.hvp, x, y, self.flat.rows(V, "V"), weighed=True), V)

    def gauss_newton_product(self, x: Any, y: Any, V: NDArray) -> NDArray:
        """Multiply the batch's generalised Gauss-Newton matrix (Schraudolph 2002) by m vectors.

        G = (1/n) sum_i J_i' (d2 loss_i / d output2) J_i.

        Args: the arguments of `hvp`.
        Returns: the products, in the shape of V.
        Raises: ValueError for a cross-entropy of probabilities. G would then be the empirical
          Fisher, and not the Gauss-Newton matrix that belongs to the logits.
        """
        self.loss.check_logits()

        def products(losses, each, theta, x, y, V):
            return tape.gauss_newton(self.flat.output, self.loss.curved, each, theta, x, y, V)

        rows = self.flat.rows(V, "V")
        return like(self._mapped("gauss_newton", products, x, y, rows, weighed=True), V)

    def directional(self, x: Any, y: Any, V: NDArray, *, dtype: Any = None) -> NDArray:
        """Return grad loss_i . v_j for every example i and every vector v_j, in one pass.

        Args:
          x: (n, ...) inputs, or a dict of them.
          y: (n, ...) labels.
          V: (d, m) directions, or one direction (d,).
          dtype: the dtype of the result, or None for the net's dtype. A subclass with a closed
            form also computes in this dtype. Float32 is then faster than float64.

        Returns: (n, m), or (n,) for a vector V. The penalty is not included.
        """
        rows = self._mapped("directional", tape.directional, x, y, self.flat.rows(V, "V"))
        return like(rows.astype(dtype or self.dtype, copy=False), V)

    def output_terms(self, x: Any, y: Any) -> tuple[NDArray, NDArray, NDArray]:
        """Return each row's c outputs z, and the derivatives of its loss with respect to them.

        z is what the loss takes. If the model ends in a softmax or sigmoid, z can be the logits
        before it. A model's several outputs are concatenated. Each row of z is flattened.

        Returns: z (n, c), the slopes d loss / dz (n, c), and the Hessians d2 loss / dz2 (n, c, c).
        """
        t = self.flat

        def terms(losses, each, theta, x, y):
            return tape.output_terms(t.output, t.loss.function, t.loss.curved, each, theta, x, y)

        return self._mapped("output_terms", terms, x, y)

    def output_moves(self, x: Any, y: Any, v: NDArray) -> NDArray:
        """Return J_i v, (n, c): the derivative of each row's outputs along a direction v (d,).

        The outputs are those of `output_terms`. The result does not depend on the labels y.
        """
        t = self.flat

        def moves(losses, theta, x, y, v):
            z = t.output(theta, x)
            u = tf.zeros_like(z)
            with tf.GradientTape() as by_u:
                by_u.watch(u)
                pulled = tape.gradient(lambda theta: tf.reduce_sum(u * t.output(theta, x)), theta)
            along = by_u.gradient(
                pulled, u, output_gradients=v, unconnected_gradients=tf.UnconnectedGradients.ZERO
            )
            return tf.reshape(along, [tf.shape(z)[0], -1])

        return self._along("output_moves", moves, x, y, v)

    def seen_shape(self, x: Any) -> tuple[int, ...]:
        """Return the shape of one row of z, without flattening. z is as in `output_terms`.

        x must have at least one row.
        """
        t = self.flat
        row = tf.nest.map_structure(lambda part: part[:1], t.inputs(x))
        return t.run("z", t.output, self.theta_tensor(), row).shape[1:]

    def losses_of(self, x: Any, y: Any, z: NDArray) -> NDArray:
        """Return the losses (n,) for given outputs z (n, c) in place of the model's outputs.

        z is as in `output_terms`. The inputs x are used only to find the shape that one row of z
        had before it was flattened. The number of rows of x may therefore differ from that of z.
        """
        t = self.flat
        found = t.tensor(z.reshape(len(z), *self.seen_shape(x)))
        return t.run("losses_of", lambda z, y: t.loss.function(y, z), found, t.tensor(y))

    def curvatures(self, x: Any, y: Any, v: NDArray) -> NDArray:
        """Return v' H_i v (n,) for every example i, in one pass.

        Args: x and y as in `losses`, and a direction v (d,) in parameter space.
        """
        return self._along("curvatures", tape.curvatures, x, y, v)

    def curvature_gradient(self, x: Any, y: Any, v: NDArray) -> NDArray:
        """Return the gradient (d,) of v' H v with respect to theta.

        H is the Hessian of the batch's mean loss. It does not include the penalty.

        Args: the arguments of `curvatures`.
        """
        return self._along("curvature_gradient", tape.curvature_gradient, x, y, v, weighed=True)

    def input_gradient(self, x: Any, y: Any, v: NDArray) -> Any:
        """Return the derivative of grad loss_i . v with respect to x_i, for each example.

        Args:
          x: (n, ...) floating inputs, or a dict of them.
          y: (n, ...) labels.
          v: (d,) direction in parameter space.

        Returns: an array of x's shape, or a dict of such arrays.
        Raises: TypeError for integer inputs. ValueError for another shape of v.
        """
        check_differentiable(x)
        if np.shape(v) != (self.num_parameters,):
            raise ValueError(f"v must have shape ({self.num_parameters},), got {np.shape(v)}.")
        trunk = self.flat.trunk
        t = self.flat if trunk is None or trunk.gave(x) else self.flat.uncut
        return self._along("input_gradient", tape.input_gradient, x, y, v, flat=t)

    # --- the penalty, which needs no data ---------------------------------------------------------

    def penalty(self) -> float:
        """Return the sum of the model's own Keras regularisers at theta."""
        return float(self.flat.run("penalty", self.flat.penalty, self.theta_tensor()))

    @property
    def strong_convexity(self) -> float:
        """Lower bound on the eigenvalues of the risk's Hessian at any theta, or NaN if unknown.

        In this class, the bound is 0 if `convex` is True. A subclass may know a larger bound.
        """
        return 0.0 if self.convex else np.nan

    @property
    def penalty_convexity(self) -> float:
        """Lower bound on the eigenvalues of the penalty's Hessian.

        The penalty is the sum of one regulariser for each weight tensor w, so the bound is the
        smallest bound of a tensor. The regulariser L2(l) is l |w|^2, so its bound is 2 l. A tensor
        without a regulariser, or with L1 only, has the bound 0. For a regulariser other than Keras'
        L1, L2 and L1L2, no bound is known, and the result is NaN.
        """
        # np.min returns NaN if any entry is NaN. Python's min may not.
        return float(np.min([_convexity(weight.regularizer) for weight in self.flat.weights]))

    def penalty_gradient(self, thetas: NDArray | None = None) -> NDArray:
        """Return the penalty's gradient (d,) at theta, or (d, k) at the columns of `thetas`."""
        t = self.flat
        rows = self.theta_tensor()[None] if thetas is None else t.rows(thetas, "thetas")

        def at_each(thetas):
            return tf.vectorized_map(partial(tape.gradient, t.penalty), thetas)

        gradients = t.run("penalty_gradient", at_each, rows)
        return gradients[0] if thetas is None else like(gradients, thetas)

    def penalty_hvp(self, V: NDArray) -> NDArray:
        """Multiply the penalty's Hessian by vectors V (d, m) or by one vector (d,)."""
        t = self.flat

        def products(theta, V):
            return tf.vectorized_map(tape.hessian_map(t.penalty, theta), V)

        return like(t.run("penalty_hvp", products, self.theta_tensor(), t.rows(V, "V")), V)

    def penalty_curvature_gradient(self, v: NDArray) -> NDArray:
        """Return the gradient (d,) of v' H v with respect to theta. H is the penalty's Hessian."""
        t = self.flat

        def at(theta, v):
            along = lambda theta: tf.tensordot(tape.hessian_map(t.penalty, theta)(v), v, 1)  # noqa: E731
            return tape.gradient(along, theta)

        return t.run("penalty_curvature_gradient", at, self.theta_tensor(), t.rows(v, "v")[0])

    def _along(
        self,
        name: str,
        function: Callable,
        x: Any,
        y: Any,
        v: NDArray,
        *,
        weighed: bool = False,
        flat: Any = None,
    ) -> Any:
        """Run `function(losses, theta, x, y, v)` on a batch and one direction v (d,).

        `weighed` is as in `_mapped`. `flat` replaces `self.flat`, if it is not None.
        """
        t = flat or self.flat
        batch = t.batch(x, y, weighed=weighed and self.weighs)
        t.facts(*batch)  # raises for losses that TensorFlow differentiates wrongly
        tensors = self.theta_tensor(), *batch, t.rows(v, "v")[0]
        return t.run(name, partial(function, t.losses), *tensors)

    def _mapped(
        self,
        name: str,
        function: Callable,
        x: Any,
        y: Any,
        *tensors: Any,
        weighed: bool = False,
    ) -> Any:
        """Run `function(losses, each, theta, x, y, *tensors)` on the tensors of a batch.

        `each(f, V)` applies f to each vector of V. If `weighed` and `self.weighs` are True, each
        row's loss is multiplied by the row's mass.
        """
        t = self.flat
        batch = t.batch(x, y, weighed=weighed and self.weighs)
        each = t.each(*batch)
        return t.run(name, partial(function, t.losses, each), self.theta_tensor(), *batch, *tensors)

    def _at(
        self,
        name: str,
        function: Callable,
        thetas: NDArray | None,
        x: Any,
        y: Any,
        *,
        weighed: bool = False,
    ) -> Any:
        """Run `function(theta, x, y)` at the net's theta, or at each column of `thetas`.

        `weighed` is as in `_mapped`.
        """
        t = self.flat
        if thetas is None:
            batch = t.batch(x, y, weighed=weighed and self.weighs)
            return t.run(name, function, self.theta_tensor(), *batch)

        def at_each(losses, each, theta, x, y, thetas):
            return each(lambda theta: function(theta, x, y), thetas)

        rows = t.rows(thetas, "thetas")
        return self._mapped(f"{name} at", at_each, x, y, rows, weighed=weighed).T


def _convexity(regularizer: Any) -> float:
    """Return a lower bound on the second derivative of a regulariser, or NaN if unknown."""
    if regularizer is None or type(regularizer) is keras.regularizers.L1:
        return 0.0
    if type(regularizer) in (keras.regularizers.L2, keras.regularizers.L1L2):
        return 2 * float(regularizer.l2)
    return np.nan
