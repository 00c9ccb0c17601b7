"""Logistic regression with L2 penalty, in closed form: the paper's convex model.

With W (f, c) the weights, z = x W, p = softmax(z) or sigmoid(z), e = p - onehot(y):

    loss = -log p_y        grad = x' e        Hessian = x' x (diag(p) - p p')        (one example)

and R = mean loss + weight_decay/2 |W|^2. theta is W flattened row by row, the intercept last. Every
closed form overrides the tape's answer to the same question and is tested against it.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.special
from numpy.typing import NDArray

from influence.convergence import warn_unconverged
from influence.examples import Examples, check_rows
from influence.net import GenericNeuralNet
from influence.operators import Hessian
from influence.solvers import CG, Direct, Solver, solve

_BLOCK_NUMBERS = 1 << 21  # entries of one batch's (rows, c, m) block: about the size of a cache
_HESSIAN_ROWS = 1024  # rows weighted at a time when the Hessian is formed
_DENSE_PARAMETERS = 2000  # up to here a Newton step factors the Hessian, beyond it iterates


class _LogisticRegression(GenericNeuralNet):
    """What the softmax and the sigmoid have in common; `c` is 1 for the sigmoid."""

    convex = True

    def __init__(
        self,
        num_features: int,
        num_outputs: int,
        loss: Any,
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
        model = keras.Sequential(
            [
                keras.Input((num_features,), dtype=dtype),
                keras.layers.Dense(
                    num_outputs,
                    use_bias=intercept,
                    kernel_initializer="zeros",
                    dtype=dtype,
                    # Keras' L2 has no 1/2.
                    kernel_regularizer=keras.regularizers.L2(weight_decay / 2),
                    # Unpenalised, a constant added to all classes' intercepts would change nothing
                    # and leave the Hessian singular.
                    bias_regularizer=keras.regularizers.L2(weight_decay / 2),
                ),
            ]
        )
        super().__init__(model, loss)

    # What differs between softmax and sigmoid, on blocks (n, c, k).

    def _probabilities(self, Z: NDArray) -> NDArray:
        raise NotImplementedError

    def _log_loss(self, Z: NDArray, y: NDArray) -> NDArray:
        raise NotImplementedError

    def _minus_labels(self, P: NDArray, y: NDArray) -> NDArray:
        raise NotImplementedError

    def _curved(self, P: NDArray, U: NDArray) -> NDArray:
        """(diag(p) - p p') u for every row and column."""
        raise NotImplementedError

    # --- the questions of GenericNeuralNet in closed form ------------------------------------

    def outputs(self, x: Any) -> NDArray:
        """The logits, (n, c)."""
        return self._times(x, self.theta)[:, :, 0]

    def losses(self, x: Any, y: Any, thetas: NDArray | None = None) -> NDArray:
        """See GenericNeuralNet.losses."""
        values = self._log_loss(self._times(x, self._at_theta(thetas)), np.asarray(y))
        return values[:, 0] if thetas is None else values

    def gradient(self, x: Any, y: Any, thetas: NDArray | None = None) -> NDArray:
        """See GenericNeuralNet.gradient."""
        E = self._errors(x, y, thetas)
        G = self._transposed_times(x, E) / len(E)
        return G[:, 0] if thetas is None else G

    def loss_and_gradient(self, x: Any, y: Any) -> tuple[float, NDArray]:
        """See GenericNeuralNet.loss_and_gradient."""
        Z = self._times(x, self.theta)
        loss = float(self._log_loss(Z, np.asarray(y)).mean())
        E = self._minus_labels(self._probabilities(Z), np.asarray(y))
        return loss, self._transposed_times(x, E)[:, 0] / len(E)

    def gradients(self, x: Any, y: Any, thetas: NDArray | None = None) -> NDArray:
        """See GenericNeuralNet.gradients: x_i outer e_i."""
        errors = self._errors(x, y, None)[:, :, 0] if thetas is None else None
        x = self._dense_rows(x)
        if errors is not None:
            E = errors
        else:
            W = np.asarray(thetas, self.dtype).T.reshape(len(x), -1, self.num_outputs)
            Z = np.einsum("nf,nfc->nc", x, W)[:, :, None]
            E = self._minus_labels(self._probabilities(Z), np.asarray(y))[:, :, 0]
        return (x[:, :, None] * E[:, None, :]).reshape(len(x), -1)

    def hvp(self, x: Any, y: Any, V: NDArray) -> NDArray:
        """See GenericNeuralNet.hvp: X' (diag(p) - p p') X V / n."""
        P = self._probabilities(self._times(x, self.theta))
        U = self._times(x, self._column_block(V))
        product = self._transposed_times(x, self._curved(P, U)) / len(U)
        return product if np.ndim(V) == 2 else product[:, 0]

    def hvp_each(self, x: Any, y: Any, V: NDArray) -> NDArray:
        """See GenericNeuralNet.hvp_each."""
        num_batches, batch_size = np.shape(y)[:2]
        flat = np.reshape(x, (num_batches * batch_size, -1))
        P = self._probabilities(self._times(flat, self.theta))[:, :, 0]
        x = self._dense_rows(flat).reshape(num_batches, batch_size, -1)
        W = V.reshape(num_batches, x.shape[2], -1)  # (r, f, c m)
        U = (x @ W).reshape(num_batches * batch_size, self.num_outputs, -1)
        C = self._curved(P[:, :, None], U).reshape(num_batches, batch_size, -1)
        return (x.transpose(0, 2, 1) @ C).reshape(V.shape) / batch_size

    def directional(self, x: Any, y: Any, V: NDArray) -> NDArray:
        """See GenericNeuralNet.directional: sum_c e_c (X V)_c."""
        along = np.einsum(
            "nck,ncm->nm", self._errors(x, y, None), self._times(x, self._column_block(V))
        )
        return along if np.ndim(V) == 2 else along[:, 0]

    def hessian(self, examples: Examples) -> NDArray:
        """The risk's Hessian, (d, d), class block by class block.

        The block of two classes is -X' diag(p_a p_b) X / n: a symmetric rank-n update of
        sqrt(p_a p_b) X, which does half the work of a product.
        """
        c = self.num_outputs
        f = self.num_features + self.intercept
        pairs = [(a, b) for a in range(c) for b in range(a)] if c > 1 else [(0, 0)]
        syrk = scipy.linalg.get_blas_funcs("syrk", dtype=self.dtype)
        blocks = {pair: np.zeros((f, f), self.dtype, order="F") for pair in pairs}
        for x, _ in examples.batches(_HESSIAN_ROWS):
            P = self._probabilities(self._times(x, self.theta))[:, :, 0]
            rows = self._dense_rows(x)
            for a, b in pairs:
                weighted = (
                    rows * np.sqrt(P[:, a] * P[:, b] if c > 1 else P[:, 0] * (1 - P[:, 0]))[:, None]
                )
                syrk(
                    1 / len(examples),
                    weighted.T,
                    beta=1.0,
                    c=blocks[a, b],
                    overwrite_c=True,
                    lower=True,
                )
        H = np.zeros((f, c, f, c), self.dtype)
        for (a, b), block in blocks.items():
            block = np.tril(block) + np.tril(block, -1).T
            if a == b:
                H[:, a, :, a] = block
                continue
            H[:, a, :, b] = H[:, b, :, a] = -block
            # Probabilities add up to one, so a class's own block is minus the sum of the others.
            H[:, a, :, a] += block
            H[:, b, :, b] += block
        H = H.reshape(f * c, f * c)
        H[np.diag_indices_from(H)] += self.weight_decay
        return H

    def input_gradient(self, x: Any, y: Any, v: NDArray) -> NDArray:
        """See GenericNeuralNet.input_gradient: v e + W (diag(p) - p p') x v."""
        W, D = (np.reshape(t, (-1, self.num_outputs))[: self.num_features] for t in (self.theta, v))
        P = self._probabilities(self._times(x, self.theta))
        E = self._minus_labels(P.copy(), np.asarray(y))[:, :, 0]
        U = self._times(x, self._column_block(v))
        return E @ D.T + self._curved(P, U)[:, :, 0] @ W.T

    def penalty(self) -> float:
        """See GenericNeuralNet.penalty: weight_decay/2 |W|^2."""
        return self.weight_decay / 2 * float(self.theta @ self.theta)

    def penalty_gradient(self, thetas: NDArray | None = None) -> NDArray:
        """See GenericNeuralNet.penalty_gradient: weight_decay W."""
        return self.weight_decay * (self.theta if thetas is None else thetas)

    def penalty_hvp(self, V: NDArray) -> NDArray:
        """See GenericNeuralNet.penalty_hvp: weight_decay V."""
        return self.weight_decay * V

    def rows_per_batch(self, examples: Examples, num_vectors: int = 1) -> int:
        """See GenericNeuralNet.rows_per_batch: blocks that stay in the cache are fastest."""
        width = max(self.num_outputs * num_vectors, 1)
        return int(np.clip(_BLOCK_NUMBERS // width, min(256, len(examples)), len(examples)))

    # --- fitting and oracles --------------------------------------------------------------------

    def fit(
        self, examples: Examples, *, gradient_tolerance: float = 1e-10, max_iterations: int = 10_000
    ) -> _LogisticRegression:
        """Minimise the risk: L-BFGS to a hundred-thousandth, then Newton steps to the tolerance.

        Args: as GenericNeuralNet.fit.
        Returns: self. Warns with ConvergenceWarning when the norm reached is larger.
        """
        coarse = max(gradient_tolerance, 1e-5 if self.dtype == np.float64 else 1e-3)
        super().fit(examples, gradient_tolerance=coarse, max_iterations=max_iterations)
        norm = np.inf
        while True:
            gradient = self.risk_gradient(examples)
            before, norm = norm, float(np.linalg.norm(gradient))
            if norm <= gradient_tolerance:
                return self
            if norm > before / 2:
                warn_unconverged(
                    f"Newton's steps stopped at a gradient norm of {norm:.1e}, above "
                    f"{gradient_tolerance:.1e}: use float64 or a larger tolerance."
                )
                return self
            small = self.num_parameters <= _DENSE_PARAMETERS
            solver: Solver = Direct() if small else CG(rtol=1e-4)
            step = solve(Hessian(self, examples), gradient, solver)
            self.theta = self.theta - step.x

    def one_step_leave_one_out(self, examples: Examples, rows: Any) -> NDArray:
        """theta after one exact Newton step on the risk without each row; closed form.

        H_-i = (n H - x_i' x_i (x) (diag(p_i) - p_i p_i')) / (n - 1) + the penalty's share, inverted
        by Woodbury's identity from one factorisation of H: an oracle for `leave_one_out`.

        Args:
          examples: the training set that theta minimises the risk of.
          rows: (k,) rows, each removed alone.

        Returns: (k, d).
        """
        rows = check_rows(rows, len(examples))
        n, c = len(examples), self.num_outputs
        H = self.hessian(examples) * (n / (n - 1))
        H[np.diag_indices_from(H)] -= self.weight_decay / (n - 1)
        factor = scipy.linalg.cho_factor(H)
        gradient = self.risk_gradient(examples) - self.penalty_gradient()
        chosen = examples.take(rows)
        row_gradients = self.gradients(chosen.x, chosen.y)
        P = self._probabilities(self._times(chosen.x, self.theta))[:, :, 0]
        stepped = np.empty((len(rows), self.num_parameters))
        for j, x in enumerate(self._with_one(self._dense_rows(chosen.x))):
            # A = x (x) I_c, so that the row's Hessian is A S A' with S (c, c).
            A = np.kron(x[:, None], np.eye(c))
            S = self._curved(P[j][None, :, None], np.eye(c)[None])[0] / (n - 1)
            g = (n * gradient - row_gradients[j]) / (n - 1) + self.penalty_gradient()
            Z = scipy.linalg.cho_solve(factor, np.column_stack([g, A]))
            inner = np.eye(c) - S @ (A.T @ Z[:, 1:])
            stepped[j] = (
                self.theta - Z[:, 0] - Z[:, 1:] @ np.linalg.solve(inner, S @ (A.T @ Z[:, 0]))
            )
        return stepped

    # --- inside -----------------------------------------------------------------------------------

    def _at_theta(self, thetas: NDArray | None) -> NDArray:
        return self.theta[:, None] if thetas is None else self._column_block(thetas)

    def _column_block(self, V: NDArray) -> NDArray:
        V = np.asarray(V, self.dtype)
        if V.ndim not in (1, 2) or V.shape[0] != self.num_parameters:
            raise ValueError(
                f"V must have shape ({self.num_parameters},) or ({self.num_parameters}, m), "
                f"got {V.shape}."
            )
        return V.reshape(self.num_parameters, -1)

    def _errors(self, x: Any, y: Any, thetas: NDArray | None) -> NDArray:
        P = self._probabilities(self._times(x, self._at_theta(thetas)))
        return self._minus_labels(P, np.asarray(y))

    def _times(self, x: Any, V: NDArray) -> NDArray:
        """x V for a block of parameter vectors: (n, c, k)."""
        W = np.reshape(V, (-1, self.num_outputs * (V.size // self.num_parameters)))
        x = self._as_dtype(x)
        Z = x @ (W[: self.num_features] if self.intercept else W)
        if self.intercept:
            Z += W[self.num_features]
        return Z.reshape(Z.shape[0], self.num_outputs, -1)

    def _transposed_times(self, x: Any, E: NDArray) -> NDArray:
        """x' E for a block (n, c, k): (d, k)."""
        flat = E.reshape(len(E), -1)
        G = self._as_dtype(x).T @ flat
        if self.intercept:
            G = np.vstack([G, flat.sum(axis=0)])
        return G.reshape(self.num_parameters, -1)

    def _as_dtype(self, x: Any) -> Any:
        return x if x.dtype == self.dtype else x.astype(self.dtype)

    def _dense_rows(self, x: Any) -> NDArray:
        return self._with_one(self._as_dtype(x.toarray() if scipy.sparse.issparse(x) else x))

    def _with_one(self, x: NDArray) -> NDArray:
        if not self.intercept or x.shape[-1] == self.num_features + 1:
            return x
        return np.concatenate([x, np.ones((*x.shape[:-1], 1), x.dtype)], axis=-1)


class MulticlassLogisticRegression(_LogisticRegression):
    """Softmax regression on class numbers 0 to num_classes - 1 (the paper's Figure 2, left).

    Args:
      num_features: f.
      num_classes: c.
      weight_decay: lambda of lambda/2 |W|^2, the intercept included.
      intercept: whether there is one; the paper has none.
      dtype: "float64", because leave-one-out changes are 1e-3 to 1e-5 of a loss; or "float32".
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        weight_decay: float = 0.01,
        intercept: bool = False,
        dtype: str = "float64",
    ):
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}.")
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
        super().__init__(num_features, num_classes, loss, weight_decay, intercept, dtype)

    def _probabilities(self, Z: NDArray) -> NDArray:
        Z = Z - Z.max(axis=1, keepdims=True)
        np.exp(Z, out=Z)
        Z /= Z.sum(axis=1, keepdims=True)
        return Z

    def _log_loss(self, Z: NDArray, y: NDArray) -> NDArray:
        return scipy.special.logsumexp(Z, axis=1) - Z[np.arange(len(Z)), y.astype(int).ravel()]

    def _minus_labels(self, P: NDArray, y: NDArray) -> NDArray:
        P[np.arange(len(P)), y.astype(int).ravel()] -= 1
        return P

    def _curved(self, P: NDArray, U: NDArray) -> NDArray:
        U = U - np.einsum("nck,ncm->nm", P, U)[:, None, :]
        U *= P
        return U


class BinaryLogisticRegression(_LogisticRegression):
    """Logistic regression on labels 0 and 1 with one vector of weights.

    Args:
      num_features: f.
      weight_decay: lambda of lambda/2 |w|^2, the intercept included.
      intercept: whether there is one; the paper has none.
      dtype: "float64" or "float32".
    """

    def __init__(
        self,
        num_features: int,
        *,
        weight_decay: float = 0.01,
        intercept: bool = False,
        dtype: str = "float64",
    ):
        loss = keras.losses.BinaryCrossentropy(from_logits=True, reduction="none")
        super().__init__(num_features, 1, loss, weight_decay, intercept, dtype)

    def _probabilities(self, Z: NDArray) -> NDArray:
        return scipy.special.expit(Z)

    def _log_loss(self, Z: NDArray, y: NDArray) -> NDArray:
        z = Z[:, 0]
        return np.logaddexp(0, z) - y.reshape(-1, 1).astype(z.dtype) * z

    def _minus_labels(self, P: NDArray, y: NDArray) -> NDArray:
        return P - y.reshape(-1, 1, 1).astype(P.dtype)

    def _curved(self, P: NDArray, U: NDArray) -> NDArray:
        return P * (1 - P) * U
