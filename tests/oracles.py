"""Closed forms in NumPy, written independently of the library: what its answers must be.

    R(theta) = mean_i loss_i(theta) + sum_j p_j theta_j^2 / 2

A class gives the losses with their first and second derivatives, written down by hand; everything
else about a risk follows from those, by dense linear algebra. The last functions are the tape's own
answers about a plain Keras model, and finite differences.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import scipy.optimize
import scipy.special
import tensorflow as tf
from numpy.typing import NDArray


@dataclass(frozen=True)
class Risk:
    """Features (n, f), a column of ones among them if there is an intercept; labels; penalty p."""

    features: NDArray
    y: NDArray
    penalty: NDArray | float

    def losses(self, theta: NDArray) -> NDArray:
        raise NotImplementedError

    def gradients(self, theta: NDArray) -> NDArray:
        """(n, d)."""
        raise NotImplementedError

    def hessians(self, theta: NDArray) -> NDArray:
        """(n, d, d)."""
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
        """The same losses of other rows."""
        return replace(self, features=features, y=y)

    def without(self, rows: Any) -> Any:
        return self.on(np.delete(self.features, rows, axis=0), np.delete(self.y, rows, axis=0))

    def minimum(self, start: NDArray) -> NDArray:
        """theta of the smallest risk, to a gradient norm of 1e-12."""
        found = scipy.optimize.minimize(
            self.value, start, jac=self.gradient, hess=self.hessian, method="trust-exact",
            options={"gtol": 1e-5},
        ).x  # fmt: skip
        for _ in range(3):  # to the last digits, which differences of the value cannot show
            found = found - np.linalg.solve(self.hessian(found), self.gradient(found))
        assert np.linalg.norm(self.gradient(found)) < 1e-12
        return found

    def predicted_parameters(self, theta: NDArray, rows: Any) -> NDArray:
        """(k, d): H^-1 (grad loss_i + p theta) / n."""
        own = self.gradients(theta)[rows] + self.penalty * theta
        return np.linalg.solve(self.hessian(theta), own.T).T / len(self.y)

    def predicted_changes(self, theta: NDArray, test: Risk, rows: Any) -> NDArray:
        """(m, k): each test loss's gradient along the predicted change of theta."""
        return test.gradients(theta) @ self.predicted_parameters(theta, rows).T

    def actual_parameters(self, theta: NDArray, rows: Any) -> NDArray:
        """(k, d): theta refitted without each row, minus theta."""
        return np.stack([self.without([row]).minimum(theta) - theta for row in rows])

    def actual_changes(self, theta: NDArray, test: Risk, rows: Any) -> NDArray:
        """(m, k): each test loss after refitting without each row, minus before."""
        after = theta + self.actual_parameters(theta, rows)
        return np.stack([test.losses(t) - test.losses(theta) for t in after], axis=1)


@dataclass(frozen=True)
class LeastSquares(Risk):
    """loss_i = (x_i w - y_i)^2: Keras' "mse" of one output. Its L2(l) has p = 2 l."""

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
    """loss_i = log sum_k exp(z_ik) - z_iy with z = x W M.

    M is the identity of c classes for softmax regression. M = [[0, 1]] gives class 1 the logit x w
    and class 0 none: logistic regression with one vector of weights.
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
        """(n, num_inputs): d/dx_i of grad loss_i . v, the intercept's feature left out."""
        W, D = self._weights(theta), self._weights(v)
        P = scipy.special.softmax(self.features @ W, axis=1)
        along = self.features @ D  # z's change along v
        curved = P * (along - np.sum(P * along, axis=1, keepdims=True))
        return ((P - self._labels()) @ D.T + curved @ W.T)[:, :num_inputs]


def softmax_regression(features: NDArray, y: NDArray, num_classes: int, penalty: Any) -> Logistic:
    return Logistic(features, y, penalty, np.eye(num_classes))


def logistic_regression(features: NDArray, y: NDArray, penalty: Any) -> Logistic:
    return Logistic(features, y, penalty, np.array([[0.0, 1.0]]))


def with_ones(x: NDArray) -> NDArray:
    """x with the intercept's column."""
    return np.column_stack([x, np.ones(len(x))])


# --- finite differences -----------------------------------------------------------------------


def central_difference(function: Any, at: NDArray, along: NDArray, step: float = 1e-3) -> NDArray:
    """Derivative of `function` at `at` along `along`, relative error about 1e-11 in float64.

    Fourth order: truncation is of the order step^4, rounding of 1e-16 / step.
    """
    near = function(at + step * along) - function(at - step * along)
    far = function(at + 2 * step * along) - function(at - 2 * step * along)
    return (8 * near - far) / (12 * step)


# --- the tape's own answers about a plain Keras model, one example and one entry at a time ----


@dataclass(frozen=True)
class Dense:
    """First derivatives of a plain model, as dense arrays.

    losses (n,); gradients (n, d); gauss_newton (d, d), J'HJ / n.
    """

    losses: NDArray
    gradients: NDArray
    gauss_newton: NDArray


def dense_derivatives(model: keras.Model, loss: Any, x: Any, y: Any) -> Dense:
    """By `tape.jacobian` on the model as it stands, called as its owner would call it.

    Args:
      model: called on x with training=False.
      loss: (y, output) -> (n,), in plain TensorFlow.
      x, y: a batch, NumPy.
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
    """(d, d) of the mean loss, by a tape in a tape.

    Not for normalising layers: TensorFlow's moments have a second derivative that is wrong.
    """
    weights = [w.value for w in model.trainable_weights]
    with tf.GradientTape(persistent=True) as outer:
        g = plain_gradient(model, loss, x, y)
    return _columns(_jacobian(outer, g, weights), g.shape, weights)


def plain_gradient(model: keras.Model, loss: Any, x: Any, y: Any) -> Any:
    """(d,) of the mean loss, by a tape on the model as it stands."""
    weights = [w.value for w in model.trainable_weights]
    with tf.GradientTape() as tape:
        mean = tf.reduce_mean(loss(y, model(x, training=False)))
    return tf.concat([tf.reshape(p, [-1]) for p in tape.gradient(mean, weights)], 0)


def plain_gradient_at(model: keras.Model, loss: Any, x: Any, y: Any, theta: NDArray) -> NDArray:
    """The same with other weights, which are put back."""
    weights = model.trainable_weights
    before = [w.numpy() for w in weights]
    ends = np.cumsum([b.size for b in before])[:-1]
    try:
        for weight, part in zip(weights, np.split(theta, ends), strict=True):
            weight.assign(part.reshape(weight.shape))
        return plain_gradient(model, loss, x, y).numpy()
    finally:
        for weight, part in zip(weights, before, strict=True):
            weight.assign(part)


def _jacobian(tape: Any, of: Any, by: Any) -> Any:
    return tape.jacobian(of, by, experimental_use_pfor=False)


def _columns(parts: list, shape: tuple, weights: list) -> NDArray:
    """Jacobians by weight as one array (*shape, d)."""
    flat = [
        np.zeros((*shape, int(np.prod(w.shape)))) if p is None else np.reshape(p, (*shape, -1))
        for p, w in zip(parts, weights, strict=True)
    ]
    return np.concatenate(flat, axis=-1)
