"""Linear models with an L2 penalty, whose losses and derivatives have closed forms.

A model has weights W (f, c) and outputs z = x W. Its loss l(z, y) is convex in z. The loss of one
example x, a row vector, has these derivatives in theta (kron is the Kronecker product):

    gradient = kron(x', dl/dz)        Hessian = kron(x' x, d2l/dz2)

The risk is the mean loss plus weight_decay/2 |W|^2. theta is W flattened row by row. The intercept
is a last feature that is always one. The closed forms replace automatic differentiation, and tests
compare both. NumPy computes the closed forms, because its float64 products are three times as fast
as TensorFlow's.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import keras
import numpy as np
from numpy.typing import ArrayLike, NDArray

from influence.common.convergence import warn_unconverged
from influence.common.memory import ACTIVATIONS, VECTORS, fitting
from influence.common.numbers import numbers
from influence.examples import labels as packing
from influence.examples.examples import Examples, check_differentiable
from influence.examples.given import Data
from influence.models import leverage, newton
from influence.models.design import Design, Link, Product
from influence.net.net import GenericNeuralNet

# The outputs (rows, c, m) of one batch for m vectors have at most this many entries, so that they
# fit into the processor's cache.
_BLOCK_NUMBERS = 1 << 21


class LinearModel(GenericNeuralNet):
    """Base class of the convex models.

    Args:
      num_features: number f of features.
      num_outputs: number c of outputs.
      link: the loss of outputs and its derivatives, in NumPy.
      loss: the same loss for Keras.
      weight_decay: lambda of the penalty lambda/2 |W|^2, where W includes the intercept.
      intercept: True if the model has an intercept.
      dtype: "float64" or "float32".

    Attributes:
      design: the `Design` that multiplies inputs by parameters.
      link, weight_decay, intercept, num_features, num_outputs: the arguments.

    Raises: ValueError for fewer than one feature or a negative weight decay.
    """

    convex = True

    def __init__(
        self,
        num_features: int,
        num_outputs: int,
        link: Link,
        loss: Any,
        *,
        weight_decay: float,
        intercept: bool,
        dtype: str,
    ):
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, got {num_features}.")
        if not (np.isfinite(weight_decay) and weight_decay >= 0):
            raise ValueError(f"weight_decay must be non-negative, got {weight_decay}.")
        self.num_features, self.num_outputs, self.link = num_features, num_outputs, link
        self.weight_decay, self.intercept = float(weight_decay), bool(intercept)
        # Keras' L2 has no factor 1/2. The intercept is penalised too. Otherwise the softmax Hessian
        # would be singular, because a constant added to all intercepts changes no loss.
        l2 = keras.regularizers.L2(weight_decay / 2)
        dense = keras.layers.Dense(
            num_outputs,
            use_bias=intercept,
            kernel_initializer="zeros",
            kernel_regularizer=l2,
            bias_regularizer=l2,
            dtype=dtype,
        )
        super().__init__(keras.Sequential([keras.Input((num_features,), dtype=dtype), dense]), loss)
        self.design = Design(num_features, num_outputs, self.intercept, self.dtype)

    # --- the methods of GenericNeuralNet in closed form -----------------------------------------

    def outputs(self, x: Any) -> NDArray:
        """Return the outputs z, (n, c); see GenericNeuralNet.outputs."""
        return self._outputs(x)[:, :, 0]

    def losses(self, x: Any, y: Any, thetas: NDArray | None = None) -> NDArray:
        """Return the losses of the rows; see GenericNeuralNet.losses."""
        values = self.link.loss(self._outputs(x, thetas), _labels(y))
        return values[:, 0] if thetas is None else values

    def gradient(self, x: Any, y: Any, thetas: NDArray | None = None) -> NDArray:
        """Return X' dl/dz / n; see GenericNeuralNet.gradient."""
        E = self.link.slope(self._outputs(x, thetas), _labels(y))
        G = self.design.transposed_times(x, E) / len(E)
        return G[:, 0] if thetas is None else G

    def loss_and_gradient(self, x: Any, y: Any) -> tuple[float, NDArray]:
        """Return the mean loss and its gradient; see GenericNeuralNet.loss_and_gradient."""
        Z, y = self._outputs(x), _labels(y)
        gradient = self.design.transposed_times(x, self.link.slope(Z, y))[:, 0] / len(y)
        return float(self.link.loss(Z, y).mean(dtype=np.float64)), gradient

    def gradients(self, x: Any, y: Any) -> NDArray:
        """Return the gradient kron(x_i, dl_i/dz) of each row i; see GenericNeuralNet.gradients."""
        rows = self.design.with_one(self.design.dense(x))
        E = self.link.slope(self._outputs(x), _labels(y))[:, :, 0]
        return (rows[:, :, None] * E[:, None, :]).reshape(len(rows), -1)

    def bregman_gradient(self, x: Any, y: Any, thetas: NDArray) -> NDArray:
        """Return X' (dl/dz at `thetas` - dl/dz at theta) / n; see GenericNeuralNet."""
        E = self.link.slope(self._outputs(x, thetas), _labels(y)) - self._slope(x, y)
        return self.design.transposed_times(x, E) / len(E)

    def hvp(self, x: Any, y: Any, V: NDArray) -> NDArray:
        """Return X' (d2l/dz2) X V / n; see GenericNeuralNet.hvp."""
        K = self._curvature(x, y)
        curved = lambda U, rows: self.link.multiplied(K[rows], U)  # noqa: E731
        product = self.design.there_and_back(x, self._columns(V), curved) / len(K)
        return product if np.ndim(V) == 2 else product[:, 0]

    # Outputs are linear in theta, so the Gauss-Newton matrix is the Hessian.
    gauss_newton_product = hvp

    def each_batch(self, question: Any, x: Any, y: Any, V: NDArray) -> NDArray:
        """Return gradients or products of several batches; see GenericNeuralNet.each_batch."""
        x, y = numbers(x, "x"), _labels(y)
        num_batches, batch_size = y.shape[:2]
        flat, y = x.reshape(num_batches * batch_size, -1), y.ravel()
        rows = self.design.with_one(self.design.dense(flat)).reshape(num_batches, batch_size, -1)
        W = (
            numbers(V, "V").astype(self.dtype, copy=False).reshape(num_batches, rows.shape[2], -1)
        )  # (r, f, c m) for r batches
        U = (rows @ W).reshape(len(flat), self.num_outputs, -1)
        if question == "gradient":
            E = self.link.slope(U, y)
        elif question in ("hvp", "gauss_newton"):
            E = self.link.curved(self.design.times(flat, self.theta), y, U)
        else:
            return super().each_batch(question, x, y, V)  # raises an error
        E = E.reshape(num_batches, batch_size, -1)
        return (rows.transpose(0, 2, 1) @ E).reshape(V.shape) / batch_size

    def directional(self, x: Any, y: Any, V: NDArray, *, dtype: Any = None) -> NDArray:
        """Return sum_c (dl/dz)_c (X V)_c of each row; see GenericNeuralNet.directional."""
        E = self._slope(x, y)[:, :, 0]
        if dtype is not None and np.dtype(dtype) != self.dtype:
            along = self.design.along(x, E, self._columns(V, dtype))
        else:
            along = np.einsum("nc,ncm->nm", E, self.design.times(x, self._columns(V)))
        return along if np.ndim(V) == 2 else along[:, 0]

    def output_terms(self, x: Any, y: Any) -> tuple[NDArray, NDArray, NDArray]:
        """Return z, dl/dz and d2l/dz2 of each row; see GenericNeuralNet.output_terms."""
        Z, y = self._outputs(x), _labels(y)
        units = np.repeat(np.eye(self.num_outputs, dtype=Z.dtype)[None], len(Z), axis=0)
        return Z[:, :, 0], self.link.slope(Z, y)[:, :, 0], self.link.curved(Z, y, units)

    def jacobian_parts(self, x: Any, y: Any) -> tuple[list, NDArray]:
        """Return each row's Jacobian kron(x_i, I_c), in the form of `influence.curvature.roots`."""
        a, c = self.design.with_one(self.design.dense(x)), self.num_outputs
        entries = np.arange(self.num_parameters).reshape(-1, c)
        g = np.broadcast_to(np.eye(c, dtype=a.dtype), (len(a), c, c))
        return [(entries, a, g)], np.zeros((len(a), c, 0), a.dtype)

    def output_moves(self, x: Any, y: Any, v: NDArray) -> NDArray:
        """Return X v, the outputs for parameters v; see GenericNeuralNet.output_moves."""
        return self.design.times(x, self._columns(v))[:, :, 0]

    def pulling(self) -> LinearModel:
        """Return this model with the loss y . z; see GenericNeuralNet.pulling."""
        view = copy.copy(self)
        view.link, view.memo = Product(), None
        return view

    def losses_of(self, x: Any, y: Any, z: NDArray) -> NDArray:
        """Return the losses of given outputs z; see GenericNeuralNet.losses_of."""
        return self.link.loss(z.reshape(len(z), -1, 1), _labels(y))[:, 0]

    def input_gradient(self, x: Any, y: Any, v: NDArray) -> NDArray:
        """Return V dl/dz + W (d2l/dz2) V'x of each row x; see GenericNeuralNet.input_gradient.

        V is the direction v in the shape of W.
        """
        check_differentiable(x)
        if np.shape(v) != (self.num_parameters,):
            raise ValueError(f"v must have shape ({self.num_parameters},), got {np.shape(v)}.")
        return self._input_gradient(self.theta, x, _labels(y), v)

    def _input_gradient(self, theta: NDArray, x: Any, y: NDArray, v: NDArray) -> NDArray:
        """Return `input_gradient` at any theta, without its checks."""
        W, D = (np.reshape(t, (-1, self.num_outputs))[: self.num_features] for t in (theta, v))
        Z, U = (self.design.times(x, self._columns(t)) for t in (theta, v))
        slope, curved = self.link.slope(Z, y), self.link.curved(Z, y, U)
        return slope[:, :, 0] @ D.T + curved[:, :, 0] @ W.T

    def penalty(self) -> float:
        """Return weight_decay/2 |W|^2; see GenericNeuralNet.penalty."""
        return self.weight_decay / 2 * float(self.theta @ self.theta)

    @property
    def strong_convexity(self) -> float:
        """The weight decay; see GenericNeuralNet.strong_convexity."""
        return self.weight_decay

    def penalty_gradient(self, thetas: NDArray | None = None) -> NDArray:
        """Return weight_decay theta; see GenericNeuralNet.penalty_gradient."""
        return self.weight_decay * (self.theta if thetas is None else self._columns(thetas))

    def penalty_hvp(self, V: NDArray) -> NDArray:
        """Return weight_decay V; see GenericNeuralNet.penalty_hvp."""
        return self.weight_decay * numbers(V, "V")

    def hessian(self, examples: Examples, batch_size: int | None = None) -> NDArray:
        """Return the risk's Hessian for one output, X' diag(d2l/dz2) X / n + weight_decay I."""
        (block,) = self._weighted_grams(examples)
        block[np.diag_indices_from(block)] += self.weight_decay
        return block

    def rows_per_batch(self, examples: Examples, num_vectors: int = 1, *, dtype: Any = None) -> int:
        """Return the rows per batch that fit the cache; see GenericNeuralNet.rows_per_batch."""
        n = len(examples)
        if dtype is not None and np.dtype(dtype) != self.dtype:
            return fitting(VECTORS, self.num_parameters * np.dtype(dtype).itemsize, n)
        size = np.clip(_BLOCK_NUMBERS // max(self.num_outputs * num_vectors, 1), min(256, n), n)
        return fitting(ACTIVATIONS, examples.num_entries * self.dtype.itemsize / n, int(size))

    # --- fitting and closed forms for single rows -----------------------------------------------

    def fit(
        self, examples: Data, *, gradient_tolerance: float = 1e-10, max_iterations: int = 1000
    ) -> LinearModel:
        """Minimise the risk by Newton's method from the present theta, without randomness.

        Args:
          examples: the training set.
          gradient_tolerance: the fit stops at a gradient of the risk with at most this norm.
          max_iterations: largest number of Newton steps.

        Returns: self. Warns with ConvergenceWarning if the final norm is above the tolerance.
        Raises: DivergenceError for a risk that is not finite.
        """
        examples = self.given(examples, "examples")
        self.validate(examples, "examples")
        norm, reason = newton.minimise(
            self, self.design, examples, gradient_tolerance, max_iterations
        )
        if reason:
            warn_unconverged(
                f"Newton's steps stopped at a gradient norm of {norm:.1e}, above "
                f"{gradient_tolerance:.1e}: {reason}."
            )
        return self

    def self_influence(self, examples: Examples, rows: NDArray) -> NDArray | None:
        """Return exact self-influences (k,) or None; see GenericNeuralNet.self_influence."""
        return leverage.self_influence(self, examples, rows)

    def leverages(
        self, examples: Examples, rows: ArrayLike | None = None, *, gram: NDArray | None = None
    ) -> NDArray:
        """Compute the leverages x_i' H^-1 x_i of rows, for a model with one output.

        H is the risk's Hessian at theta. The self-influence of a row is (dl/dz)^2 / n times its
        leverage, plus a penalty term.

        Args:
          examples: the training set.
          rows: (k,) row numbers; all n if omitted.
          gram: (n, n) `design.gram(examples.x)`, computed if omitted. It does not depend on labels
            or theta, and is used only if d > n.

        Returns: (k,).
        Raises: ValueError if the model has several outputs or if `gram` is not (n, n).
          DivergenceError if the Hessian is singular.
        """
        return leverage.leverages(self, examples, rows, gram)

    def one_step_leave_one_out(self, examples: Examples, rows: Any) -> NDArray:
        """Compute theta after one exact Newton step on the risk without each row.

        H is the Hessian of the risk on all n rows. The Hessian of the risk without row i is

            (n H - kron(x_i' x_i, d2l_i/dz2) - weight_decay I) / (n - 1) + weight_decay I

        With Woodbury's identity, one factorisation is enough to invert this matrix for all rows.
        The result serves as a check of `leave_one_out`.

        Args:
          examples: the training set. theta should be at the minimum of its risk.
          rows: (k,) rows; each step leaves out one of them.

        Returns: (k, d).
        """
        return leverage.one_step_leave_one_out(self, examples, rows)

    # --- inside -----------------------------------------------------------------------------------

    def _columns(self, V: NDArray, dtype: Any = None) -> NDArray:
        V = numbers(V, "V").astype(dtype or self.dtype, copy=False)
        if V.ndim not in (1, 2) or V.shape[0] != self.num_parameters:
            raise ValueError(
                f"V must have shape ({self.num_parameters},) or ({self.num_parameters}, m), "
                f"got {V.shape}."
            )
        return V.reshape(self.num_parameters, -1)

    def _outputs(self, x: Any, thetas: NDArray | None = None) -> NDArray:
        """Return the outputs (n, c, k) at parameters (d, k), or (n, c, 1) at the net's theta."""
        return self.design.times(x, self.theta if thetas is None else self._columns(thetas))

    def _slope(self, x: Any, y: Any) -> NDArray:
        """Return dl/dz (n, c, 1) at the net's theta, from `memo` if it is cached there."""
        return self._at_theta("slope", x, y)

    def _curvature(self, x: Any, y: Any) -> NDArray:
        """Return `link.curvature` at the net's theta, from `memo` if it is cached there."""
        return self._at_theta("curvature", x, y)

    def _at_theta(self, name: Literal["slope", "curvature"], x: Any, y: Any) -> NDArray:
        """Return the link's slope or curvature at theta. If there is a `memo`, cache both in it."""
        if self.memo is not None and name in self.memo:
            return self.memo[name]
        Z, y = self._outputs(x), _labels(y)
        if self.memo is None:
            return getattr(self.link, name)(Z, y)
        self.memo.update(slope=self.link.slope(Z, y), curvature=self.link.curvature(Z, y))
        return self.memo[name]

    def _weighted_grams(self, examples: Examples) -> NDArray:
        """Return X' diag(w) X / n for each column w of the link's weights at theta: (k, f, f)."""
        total = examples.sum_over(_weighted_grams, self)
        total /= len(examples)
        return total


def _labels(y: Any) -> NDArray:
    """Return labels as an array. Labels packed with sample weights are returned unchanged."""
    return y if packing.is_packed(y) else numbers(y, "y")


def _weighted_grams(net: Any, theta: NDArray | None, x: Any, y: NDArray) -> NDArray:
    """Return X' diag(w) X of a batch for each column w of the link's weights: (k, f, f)."""
    net = net.at(theta)
    return net.design.weighted_gram(x, net.link.weights(net.design.times(x, net.theta), y))
