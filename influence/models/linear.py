"""A linear model with L2 penalty, every question of GenericNeuralNet answered in closed form.

With W (f, c) the weights and z = x W, a loss l(z, y) that is convex in z gives for one example

    grad = x' (x) dl/dz        Hessian = x' x (x) d2l/dz2

and R = mean loss + weight_decay/2 |W|^2. theta is W flattened row by row, the intercept last: an
intercept is a feature that is always one. The closed forms override the tape's answers, are tested
against them, and read x in NumPy, where float64 products are three times as fast as in TensorFlow.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from influence.common.convergence import warn_unconverged
from influence.examples.examples import Examples, check_differentiable
from influence.models import design, leverage, newton
from influence.net.net import GenericNeuralNet

_BLOCK_NUMBERS = 1 << 21  # entries of one batch's (rows, c, m) block: about the size of a cache
_BATCH_BYTES = 1 << 30  # what a batch of inputs may take
_GRADIENT_BYTES = 1 << 26  # what its gradients may, where `directional` forms them


class LinearModel(GenericNeuralNet):
    """Base of the convex models. A subclass gives the loss and its two derivatives by z.

    Args:
      num_features: f.
      num_outputs: c.
      loss: the Keras loss that the three closed forms below belong to.
      weight_decay: lambda of lambda/2 |W|^2, the intercept included.
      intercept: whether there is one.
      dtype: "float64" or "float32".

    Raises: ValueError for fewer than one feature or a negative weight decay.
    """

    convex = True

    def __init__(
        self,
        num_features: int,
        num_outputs: int,
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
        self.num_features, self.num_outputs = num_features, num_outputs
        self.weight_decay, self.intercept = float(weight_decay), bool(intercept)
        # Keras' L2 has no 1/2. The intercept is penalised too: otherwise a constant added to all
        # classes' intercepts would change nothing and leave softmax' Hessian singular.
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

    # --- what a subclass gives ------------------------------------------------------------------

    def _loss(self, Z: NDArray, y: NDArray) -> NDArray:
        """The loss, (n, k), of outputs Z (n, c, k)."""
        raise NotImplementedError

    def _slope(self, Z: NDArray, y: NDArray) -> NDArray:
        """dl/dz, (n, c, k), of outputs Z (n, c, k)."""
        raise NotImplementedError

    def _curved(self, Z: NDArray, y: NDArray, U: NDArray) -> NDArray:
        """d2l/dz2 at Z (n, c, 1) times U (n, c, m)."""
        raise NotImplementedError

    # --- the questions of GenericNeuralNet in closed form ---------------------------------------

    def outputs(self, x: Any) -> NDArray:
        """The linear outputs z, (n, c)."""
        return self._times(x, self.theta)[:, :, 0]

    def losses(self, x: Any, y: Any, thetas: NDArray | None = None) -> NDArray:
        """See GenericNeuralNet.losses."""
        values = self._loss(self._times(x, self._thetas(thetas)), np.asarray(y))
        return values[:, 0] if thetas is None else values

    def gradient(self, x: Any, y: Any, thetas: NDArray | None = None) -> NDArray:
        """See GenericNeuralNet.gradient: X' dl/dz / n."""
        E = self._slope(self._times(x, self._thetas(thetas)), np.asarray(y))
        G = self._transposed_times(x, E) / len(E)
        return G[:, 0] if thetas is None else G

    def loss_and_gradient(self, x: Any, y: Any) -> tuple[float, NDArray]:
        """See GenericNeuralNet.loss_and_gradient."""
        Z, y = self._times(x, self.theta), np.asarray(y)
        gradient = self._transposed_times(x, self._slope(Z, y))[:, 0] / len(y)
        return float(self._loss(Z, y).mean()), gradient

    def gradients(self, x: Any, y: Any) -> NDArray:
        """See GenericNeuralNet.gradients: x_i (x) dl_i/dz."""
        rows = self._with_one(self._dense(x))
        E = self._slope(self._times(x, self.theta), np.asarray(y))[:, :, 0]
        return (rows[:, :, None] * E[:, None, :]).reshape(len(rows), -1)

    def bregman_gradient(self, x: Any, y: Any, thetas: NDArray) -> NDArray:
        """See GenericNeuralNet.bregman_gradient: outputs linear in theta have a constant slope."""
        Z, y = self._times(x, np.column_stack([self.theta, self._columns(thetas)])), np.asarray(y)
        E = self._slope(Z[:, :, 1:], y) - self._slope(Z[:, :, :1], y)
        return self._transposed_times(x, E) / len(E)

    def hvp(self, x: Any, y: Any, V: NDArray) -> NDArray:
        """See GenericNeuralNet.hvp: X' (d2l/dz2) X V / n."""
        Z, U = self._outputs_and(x, V)
        product = self._transposed_times(x, self._curved(Z, np.asarray(y), U)) / len(U)
        return product if np.ndim(V) == 2 else product[:, 0]

    def each_batch(self, question: Any, x: Any, y: Any, V: NDArray) -> NDArray:
        """See GenericNeuralNet.each_batch."""
        num_batches, batch_size = np.shape(y)[:2]
        flat, labels = np.reshape(x, (num_batches * batch_size, -1)), np.reshape(y, -1)
        rows = self._with_one(self._dense(flat)).reshape(num_batches, batch_size, -1)
        W = V.reshape(num_batches, rows.shape[2], -1)  # (r, f, c m)
        U = (rows @ W).reshape(num_batches * batch_size, self.num_outputs, -1)
        if question == "gradient":
            C = self._slope(U, labels)
        elif question in ("hvp", "gauss_newton"):
            C = self._curved(self._times(flat, self.theta), labels, U)
        else:
            raise ValueError(f"question must be gradient, hvp or gauss_newton, got {question!r}.")
        C = C.reshape(num_batches, batch_size, -1)
        return (rows.transpose(0, 2, 1) @ C).reshape(V.shape) / batch_size

    # The output is linear in theta, so the Hessian has nothing besides its Gauss-Newton part.
    gauss_newton_product = hvp

    def directional(self, x: Any, y: Any, V: NDArray, *, dtype: Any = None) -> NDArray:
        """See GenericNeuralNet.directional: sum_c (dl/dz)_c (X V)_c."""
        if dtype is not None and np.dtype(dtype) != self.dtype:
            return design.directional(self, dtype, x, y, V)
        Z, U = self._outputs_and(x, V)
        along = np.einsum("nc,ncm->nm", self._slope(Z, np.asarray(y))[:, :, 0], U)
        return along if np.ndim(V) == 2 else along[:, 0]

    def input_gradient(self, x: Any, y: Any, v: NDArray) -> NDArray:
        """See GenericNeuralNet.input_gradient: v dl/dz + W (d2l/dz2) x v."""
        check_differentiable(x)
        if np.shape(v) != (self.num_parameters,):
            raise ValueError(f"v must have shape ({self.num_parameters},), got {np.shape(v)}.")
        f, c = self.num_features, self.num_outputs
        W, D = (np.reshape(t, (-1, c))[:f] for t in (self.theta, v))
        Z, U = self._outputs_and(x, v)
        y = np.asarray(y)
        return self._slope(Z, y)[:, :, 0] @ D.T + self._curved(Z, y, U)[:, :, 0] @ W.T

    def penalty(self) -> float:
        """See GenericNeuralNet.penalty: weight_decay/2 |W|^2."""
        return self.weight_decay / 2 * float(self.theta @ self.theta)

    @property
    def strong_convexity(self) -> float:
        """See GenericNeuralNet.strong_convexity: weight_decay."""
        return self.weight_decay

    def penalty_gradient(self, thetas: NDArray | None = None) -> NDArray:
        """See GenericNeuralNet.penalty_gradient: weight_decay W."""
        return self.weight_decay * (self.theta if thetas is None else self._columns(thetas))

    def penalty_hvp(self, V: NDArray) -> NDArray:
        """See GenericNeuralNet.penalty_hvp: weight_decay V."""
        return self.weight_decay * V

    def hessian(self, examples: Examples, batch_size: int | None = None) -> NDArray:
        """The risk's Hessian (d, d) in closed form, for one output: X' diag(d2l/dz2) X / n."""
        block = design.weighted_gram(
            self, examples, 1, lambda Z, y: self._curved(Z, y, np.ones_like(Z))[:, :, 0]
        )[0]
        block[np.diag_indices_from(block)] += self.weight_decay
        return block

    def rows_per_batch(self, examples: Examples, num_vectors: int = 1, *, dtype: Any = None) -> int:
        """See GenericNeuralNet.rows_per_batch: blocks that stay in the cache are fastest."""
        if dtype is not None and np.dtype(dtype) != self.dtype:
            of_row = self.num_parameters * np.dtype(dtype).itemsize
            return int(np.clip(_GRADIENT_BYTES // of_row, 1, len(examples)))
        width = max(self.num_outputs * num_vectors, 1)
        of_row = examples.num_entries * self.dtype.itemsize / len(examples)
        fits = max(_BATCH_BYTES // max(of_row, 1), 1)
        size = np.clip(_BLOCK_NUMBERS // width, min(256, len(examples)), len(examples))
        return int(min(size, fits))

    # --- fitting and oracles --------------------------------------------------------------------

    def fit(
        self, examples: Examples, *, gradient_tolerance: float = 1e-10, max_iterations: int = 1000
    ) -> LinearModel:
        """Minimise the risk from the present theta by Newton's method; deterministic.

        Args:
          examples: the training set.
          gradient_tolerance: Euclidean norm of the risk's gradient to stop at.
          max_iterations: Newton steps at most.

        Returns: self. Warns with ConvergenceWarning when the norm reached is larger.
        Raises: DivergenceError for a risk that is not finite.
        """
        self.validate(examples, "examples")
        norm, reason = newton.minimise(self, examples, gradient_tolerance, max_iterations)
        if reason:
            warn_unconverged(
                f"Newton's steps stopped at a gradient norm of {norm:.1e}, above "
                f"{gradient_tolerance:.1e}: {reason}."
            )
        return self

    def self_influence(self, examples: Examples, rows: NDArray) -> NDArray | None:
        """See GenericNeuralNet.self_influence: by one factorisation, of order n or d."""
        return leverage.self_influence(self, examples, rows)

    def one_step_leave_one_out(self, examples: Examples, rows: Any) -> NDArray:
        """theta after one exact Newton step on the risk without each row; closed form.

        H_-i = (n H - x_i' x_i (x) d2l_i/dz2 - weight_decay I) / (n - 1) + weight_decay I, inverted
        by Woodbury's identity from one factorisation: an oracle for `leave_one_out`.

        Args:
          examples: the training set that theta minimises the risk of.
          rows: (k,) rows, each removed alone.

        Returns: (k, d).
        """
        return leverage.one_step_leave_one_out(self, examples, rows)

    # --- inside -----------------------------------------------------------------------------------

    def _thetas(self, thetas: NDArray | None) -> NDArray:
        return self.theta[:, None] if thetas is None else self._columns(thetas)

    def _columns(self, V: NDArray) -> NDArray:
        V = np.asarray(V, self.dtype)
        if V.ndim not in (1, 2) or V.shape[0] != self.num_parameters:
            raise ValueError(
                f"V must have shape ({self.num_parameters},) or ({self.num_parameters}, m), "
                f"got {V.shape}."
            )
        return V.reshape(self.num_parameters, -1)

    def _outputs_and(self, x: Any, V: NDArray) -> tuple[NDArray, NDArray]:
        """X theta (n, c, 1) and X V (n, c, m) from one reading of x, which is what costs."""
        both = self._times(x, np.column_stack([self.theta, self._columns(V)]))
        return both[:, :, :1], both[:, :, 1:]

    def _times(self, x: Any, V: NDArray) -> NDArray:
        """X V for a block of parameter vectors: (n, c, k)."""
        W = np.reshape(V, (-1, self.num_outputs * (V.size // self.num_parameters)))
        Z = self._as_dtype(x) @ W[: self.num_features]
        if self.intercept:
            Z += W[self.num_features]
        return Z.reshape(Z.shape[0], self.num_outputs, -1)

    def _transposed_times(self, x: Any, E: NDArray) -> NDArray:
        """X' E for a block (n, c, k): (d, k)."""
        flat = E.reshape(len(E), -1)
        G = self._as_dtype(x).T @ flat
        if self.intercept:
            G = np.vstack([G, flat.sum(axis=0)])
        return G.reshape(self.num_parameters, -1)

    def _as_dtype(self, x: Any) -> Any:
        return x if x.dtype == self.dtype else x.astype(self.dtype)

    def _dense(self, x: Any) -> NDArray:
        return self._as_dtype(x.toarray() if scipy.sparse.issparse(x) else x)

    def _with_one(self, x: NDArray) -> NDArray:
        if not self.intercept:
            return x
        return np.concatenate([x, np.ones((len(x), 1), x.dtype)], axis=1)
