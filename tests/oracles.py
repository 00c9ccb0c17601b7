"""Expected answers: closed forms in NumPy, written independently of the library.

    R(theta) = mean_i loss_i(theta) + sum_j p_j theta_j^2 / 2

Each class gives the losses with their first and second derivatives, derived by hand. All other
properties of the risk follow from these by dense linear algebra. The last functions compute finite
differences, and derivatives of a plain Keras model by `tf.GradientTape`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import keras
import numpy as np
import scipy.optimize
import scipy.special
import tensorflow as tf
from numpy.typing import NDArray


@dataclass(frozen=True)
class Risk:
    """Risk of features (n, f), labels y and penalty p, as the module defines it.

    An intercept is the weight of a feature of ones.
    """

    features: NDArray
    y: NDArray
    penalty: NDArray | float

    def losses(self, theta: NDArray) -> NDArray:
        raise NotImplementedError

    def gradients(self, theta: NDArray) -> NDArray:
        """Return the gradients of the losses, (n, d)."""
        raise NotImplementedError

    def hessians(self, theta: NDArray) -> NDArray:
        """Return the Hessians of the losses, (n, d, d)."""
        raise NotImplementedError

    def value(self, theta: NDArray) -> float:
        return self.losses(theta).mean() + np.sum(self.penalty * theta**2) / 2

    def gradient(self, theta: NDArray) -> NDArray:
        return self.gradients(theta).mean(axis=0) + self.penalty * theta

    def hessian(self, theta: NDArray) -> NDArray:
        return self.hessians(theta).mean(axis=0) + np.diag(
            np.broadcast_to(self.penalty, theta.shape)
        )

    def on(self, features: NDArray, y: NDArray) -> Any:
        """Return the risk of other rows with the same penalty."""
        return replace(self, features=features, y=y)

    def without(self, rows: Any) -> Any:
        return self.on(np.delete(self.features, rows, axis=0), np.delete(self.y, rows, axis=0))

    def minimum(self, start: NDArray) -> NDArray:
        """Return theta at the minimum, to a gradient norm of 1e-12."""
        found = scipy.optimize.minimize(
            self.value, start, jac=self.gradient, hess=self.hessian, method="trust-exact",
            options={"gtol": 1e-5},
        ).x  # fmt: skip
        # The search compares values of the risk, so rounding stops it early. Newton steps need
        # only gradients and come closer.
        for _ in range(3):
            found = found - np.linalg.solve(self.hessian(found), self.gradient(found))
        assert np.linalg.norm(self.gradient(found)) < 1e-12
        return found

    def predicted_parameters(self, theta: NDArray, rows: Any) -> NDArray:
        """Return the predicted changes of theta, (k, d): H^-1 (grad loss_i + p theta) / n."""
        own = self.gradients(theta)[rows] + self.penalty * theta
        return np.linalg.solve(self.hessian(theta), own.T).T / len(self.y)

    def predicted_changes(self, theta: NDArray, test: Risk, rows: Any) -> NDArray:
        """Return the predicted changes of the test losses, (m, k), to first order."""
        return test.gradients(theta) @ self.predicted_parameters(theta, rows).T

    def one_step_changes(self, theta: NDArray, test: Risk, rows: Any) -> NDArray:
        """Return the changes of the test losses, (m, k), by one Newton step without each row."""
        rests = [self.without([row]) for row in rows]
        after = [theta - np.linalg.solve(r.hessian(theta), r.gradient(theta)) for r in rests]
        return np.stack([test.losses(t) - test.losses(theta) for t in after], axis=1)

    def actual_parameters(self, theta: NDArray, rows: Any) -> NDArray:
        """Return the changes of theta, (k, d), by refits without each row."""
        return np.stack([self.without([row]).minimum(theta) - theta for row in rows])

    def actual_changes(self, theta: NDArray, test: Risk, rows: Any) -> NDArray:
        """Return the changes of the test losses, (m, k), by refits without each row."""
        after = theta + self.actual_parameters(theta, rows)
        return np.stack([test.losses(t) - test.losses(theta) for t in after], axis=1)


@dataclass(frozen=True)
class LeastSquares(Risk):
    """Risk with loss_i = (x_i w - y_i)^2, as Keras' "mse" of one output.

    The penalty of keras.regularizers.L2(l) is sum_j l theta_j^2, so it corresponds to p_j = 2 l.
    """

    def losses(self, theta: NDArray) -> NDArray:
        return (self.features @ theta - self.y) ** 2

    def gradients(self, theta: NDArray) -> NDArray:
        return 2 * (self.features @ theta - self.y)[:, None] * self.features

    def hessians(self, theta: NDArray) -> NDArray:
        return 2 * self.features[:, :, None] * self.features[:, None, :]

    def minimum(self, start: NDArray) -> NDArray:
        A, n = self.features, len(self.y)
        p = np.diag(np.broadcast_to(self.penalty, start.shape))
        return np.linalg.solve(2 * A.T @ A / n + p, 2 * A.T @ self.y / n)


@dataclass(frozen=True)
class Logistic(Risk):
    """Risk with loss_i = log sum_k exp(z_ik) - z_iy and z = x W M.

    For softmax regression of c classes, M is the (c, c) identity. For logistic regression with one
    weight vector w, M = [[0, 1]]: class 1 has the logit x w, and class 0 has the logit 0.
    """

    M: NDArray

    def _weights(self, theta: NDArray) -> NDArray:
        return theta.reshape(self.features.shape[1], len(self.M)) @ self.M

    def _labels(self) -> NDArray:
        return np.eye(self.M.shape[1])[self.y.astype(int)]

    def losses(self, theta: NDArray) -> NDArray:
        Z = self.features @ self._weights(theta)
        return scipy.special.logsumexp(Z, axis=1) - np.sum(self._labels() * Z, axis=1)

    def gradients(self, theta: NDArray) -> NDArray:
        P = scipy.special.softmax(self.features @ self._weights(theta), axis=1)
        by_weight = np.einsum("nf,nk,ck->nfc", self.features, P - self._labels(), self.M)
        return by_weight.reshape(len(P), -1)

    def hessians(self, theta: NDArray) -> NDArray:
        P = scipy.special.softmax(self.features @ self._weights(theta), axis=1)
        at_logits = np.einsum("nk,kl->nkl", P, np.eye(P.shape[1])) - P[:, :, None] * P[:, None, :]
        at_outputs = np.einsum("ck,nkl,dl->ncd", self.M, at_logits, self.M)
        A = self.features
        return np.einsum("nf,ncd,ng->nfcgd", A, at_outputs, A).reshape(len(P), theta.size, -1)

    def input_gradients(self, theta: NDArray, v: NDArray, num_inputs: int) -> NDArray:
        """Return d/dx_i of grad loss_i . v, (n, num_inputs), without the intercept's feature."""
        W, D = self._weights(theta), self._weights(v)
        P = scipy.special.softmax(self.features @ W, axis=1)
        along = self.features @ D  # the change of z along v
        curved = P * (along - np.sum(P * along, axis=1, keepdims=True))
        return ((P - self._labels()) @ D.T + curved @ W.T)[:, :num_inputs]


def softmax_regression(features: NDArray, y: NDArray, num_classes: int, penalty: Any) -> Logistic:
    return Logistic(features, y, penalty, np.eye(num_classes))


def logistic_regression(features: NDArray, y: NDArray, penalty: Any) -> Logistic:
    return Logistic(features, y, penalty, np.array([[0.0, 1.0]]))


def with_ones(x: NDArray) -> NDArray:
    """Return x with a column of ones for the intercept."""
    return np.column_stack([x, np.ones(len(x))])


# --- finite differences -----------------------------------------------------------------------


def central_difference(function: Any, at: NDArray, along: NDArray, step: float = 1e-3) -> NDArray:
    """Return the derivative of `function` along `along`, by fourth-order differences at `at`.

    The truncation error is about step^4, the rounding error 1e-16 / step. Their sum is near 1e-11.
    """
    near = function(at + step * along) - function(at - step * along)
    far = function(at + 2 * step * along) - function(at - 2 * step * along)
    return (8 * near - far) / (12 * step)


# --- derivatives of a plain Keras model by the tape -------------------------------------------


@dataclass(frozen=True)
class Dense:
    """Losses (n,), gradients (n, d) and J'HJ / n (d, d) of a plain model, as dense arrays."""

    losses: NDArray
    gradients: NDArray
    gauss_newton: NDArray


def dense_derivatives(model: keras.Model, loss: Any, x: Any, y: Any) -> Dense:
    """Return losses, gradients and J'HJ / n by `tape.jacobian` on the model's own weights.

    Args:
      model: called on x with training=False.
      loss: (y, output) -> (n,), in plain TensorFlow.
      x, y: a batch of NumPy arrays.
    """
    weights = [w.value for w in model.trainable_weights]
    with tf.GradientTape(persistent=True) as tape:
        output = model(x, training=False)
        losses = loss(y, output)
    gradients = _columns(_jacobian(tape, losses, weights), losses.shape, weights)
    J = _columns(_jacobian(tape, output, weights), output.shape, weights)
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(output)
        with tf.GradientTape() as inner:
            inner.watch(output)
            total = tf.reduce_sum(loss(y, output))
        at_output = inner.gradient(total, output)
    size = int(np.prod(output.shape))
    H = np.reshape(_jacobian(outer, at_output, output), (size, size))
    J = J.reshape(size, -1)
    return Dense(losses.numpy(), gradients, J.T @ H @ J / len(y))


def dense_hessian(model: keras.Model, loss: Any, x: Any, y: Any) -> NDArray:
    """Return the Hessian (d, d) of the mean loss by nested tapes.

    It is wrong for normalising layers, because TensorFlow's second derivatives of these are wrong.
    """
    weights = model.trainable_weights

    @partial(tf.function, autograph=False)
    def row(v):
        values = [w.value for w in weights]
        with tf.GradientTape() as outer:
            g = plain_gradient(model, loss, x, y)
        parts = outer.gradient(g, values, output_gradients=v, unconnected_gradients="zero")
        return tf.concat([tf.reshape(part, [-1]) for part in parts], 0)

    d = sum(int(np.prod(w.shape)) for w in weights)
    return np.stack([row(v).numpy() for v in np.eye(d)])


def plain_gradient(model: keras.Model, loss: Any, x: Any, y: Any) -> Any:
    """Return the gradient of the mean loss, (d,), by a tape on the model's own weights."""
    weights = [w.value for w in model.trainable_weights]
    with tf.GradientTape() as tape:
        mean = tf.reduce_mean(loss(y, model(x, training=False)))
    return tf.concat([tf.reshape(p, [-1]) for p in tape.gradient(mean, weights)], 0)


def plain_gradient_at(model: keras.Model, loss: Any, x: Any, y: Any) -> Any:
    """Return a function from theta to the plain gradient at this theta.

    TensorFlow traces the function once. Each call restores the model's weights.
    """
    weights = model.trainable_weights
    ends = np.cumsum([int(np.prod(w.shape)) for w in weights])[:-1]
    here = tf.function(lambda: plain_gradient(model, loss, x, y), autograph=False)

    def at(theta):
        before = [w.numpy() for w in weights]
        try:
            for weight, part in zip(weights, np.split(theta, ends), strict=True):
                weight.assign(part.reshape(weight.shape))
            return here().numpy()
        finally:
            for weight, part in zip(weights, before, strict=True):
                weight.assign(part)

    return at


def _jacobian(tape: Any, of: Any, by: Any) -> Any:
    return tape.jacobian(of, by, experimental_use_pfor=False)


def _columns(parts: list, shape: tuple, weights: list) -> NDArray:
    """Return the Jacobians for all weights, joined into one array (*shape, d)."""
    flat = [
        np.zeros((*shape, int(np.prod(w.shape)))) if p is None else np.reshape(p, (*shape, -1))
        for p, w in zip(parts, weights, strict=True)
    ]
    return np.concatenate(flat, axis=-1)
