"""Small problems for attacks: a linear model, a network, and a linear model on a frozen trunk."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from influence import BinaryLogisticRegression, Examples, GenericNeuralNet
from tests import oracles
from tests.influence.problems import traced_once

RADIUS = 0.3


class OnTrunk(BinaryLogisticRegression):
    """Logistic regression on the features tanh(x A).

    The number of features differs from the number of inputs.
    """

    def __init__(self, A: NDArray, weight_decay: float):
        super().__init__(A.shape[1], weight_decay=weight_decay)
        self.A, self.seen_inputs = A, 0

    def featured(self, examples: Examples) -> Examples:
        seen = self.features(examples.x)
        return examples if seen is examples.x else Examples(seen, examples.y)

    def features(self, x: Any) -> Any:
        if np.shape(x)[1] == self.num_features:
            return x
        self.seen_inputs += len(x)
        return np.tanh(x @ self.A)

    def input_gradient(self, x: Any, y: Any, v: NDArray) -> NDArray:
        if np.shape(x)[1] == self.num_features:
            return super().input_gradient(x, y, v)
        features = np.tanh(x @ self.A)
        return (super().input_gradient(features, y, v) * (1 - features**2)) @ self.A.T


def logistic(num_rows: int = 40, num_inputs: int = 4, weight_decay: float = 0.02) -> Any:
    """Return (net, train, test, oracle), with the net at its minimum and overlapping classes."""
    x, y, x_test, y_test = _rows(num_rows, num_inputs)
    net = BinaryLogisticRegression(num_inputs, weight_decay=weight_decay)
    train = Examples(x, y)
    net.fit(train, gradient_tolerance=1e-12)
    oracle = oracles.logistic_regression(x, y, weight_decay)
    return net, train, Examples(x_test, y_test), oracle


def on_trunk(num_rows: int = 40, num_inputs: int = 6, num_features: int = 4) -> Any:
    """Return (net, train, test, inputs).

    `train` and `test` hold features. `inputs` are the inputs that belong to the rows of `train`.
    """
    x, y, x_test, y_test = _rows(num_rows, num_inputs)
    A = np.random.default_rng(5).standard_normal((num_inputs, num_features)) / 2
    net = OnTrunk(A, 0.02)
    train = Examples(net.features(x), y)
    net.fit(train, gradient_tolerance=1e-12)
    return net, train, Examples(net.features(x_test), y_test), x


def network(num_rows: int = 30, num_inputs: int = 3) -> Any:
    """Return (net, train, test): tanh units at a minimum, with an L2 penalty on each weight."""
    x, y, x_test, y_test = _rows(num_rows, num_inputs)
    keras.utils.set_random_seed(3)
    l2 = keras.regularizers.L2(0.02)
    options: Any = {"dtype": "float64", "kernel_regularizer": l2, "bias_regularizer": l2}
    model = keras.Sequential(
        [
            keras.Input((num_inputs,), dtype="float64"),
            keras.layers.Dense(3, activation="tanh", **options),
            keras.layers.Dense(1, **options),
        ]
    )
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    net = traced_once(GenericNeuralNet(model, loss), loss)
    train = Examples(x, y[:, None].astype(float))
    tight(net, train)
    return net, train, Examples(x_test, y_test[:, None].astype(float))


def tight(net: GenericNeuralNet, train: Examples) -> None:
    """Fit until the gradient is as small as its rounding error: by L-BFGS, then by Newton steps."""
    if net.gradient_norm(train) > 1e-4:  # near the minimum, Newton steps alone are enough
        net.fit(train, gradient_tolerance=1e-6)
    for _ in range(6):
        H = net.hvp(train.x, train.y, np.eye(net.num_parameters))
        H += net.penalty_hvp(np.eye(net.num_parameters))
        net.theta = net.theta - np.linalg.solve(H, net.risk_gradient(train))
    assert net.gradient_norm(train) < 1e-12


def replaced(train: Examples, rows: Any, x: NDArray) -> Examples:
    """Return the training set with other inputs in some rows."""
    inputs = np.array(train.x)
    inputs[rows] = x
    return Examples(inputs, train.y)


def mean_loss(net: GenericNeuralNet, test: Examples) -> float:
    return float(net.losses(test.x, test.y).mean())


def refitted_loss(net, train, test, rows, x):
    theta = net.theta
    tight(net, replaced(train, rows, x))
    loss = mean_loss(net, test)
    net.theta = theta
    return loss


def _rows(num_rows: int, num_inputs: int) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((num_rows + 3, num_inputs))
    y = (x.sum(axis=1) + rng.logistic(size=len(x)) > 0).astype(int)
    return x[:num_rows], y[:num_rows], x[num_rows:], y[num_rows:]


def by_refit(oracle, net, train, test, rows, x):
    """Return changes of the test losses, (m,), by an exact refit with other inputs in `rows`."""
    theta = oracle.on(replaced(train, rows, x).x, train.y).minimum(net.theta)
    measured = oracle.on(test.x, test.y)
    return measured.losses(theta) - measured.losses(net.theta)
