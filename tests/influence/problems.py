"""Small problems whose closed-form answers are in `tests.oracles`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from influence import (
    BinaryLogisticRegression,
    Examples,
    GenericNeuralNet,
    MulticlassLogisticRegression,
)
from tests import oracles


@dataclass(frozen=True)
class Problem:
    """A net at the minimum of its risk, with its data and with oracles of its losses."""

    net: GenericNeuralNet
    train: Examples
    test: Examples
    oracle: oracles.Risk  # closed form of the risk of the training rows
    measured: oracles.Risk  # closed form of the losses of the test rows

    @property
    def theta(self) -> NDArray:
        return self.net.theta


def relative_error(got: Any, expected: Any) -> float:
    """Return |got - expected| / |expected| over all entries. The shapes must be equal."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


class _Traced(dict):
    """Dictionary of a net's traced functions, in two parts.

    `penalty` has the functions that compute the penalty, and `losses` has all others. Each part may
    be shared with other nets.
    """

    def __init__(self, losses: dict[str, Any], penalty: dict[str, Any]):
        self.losses, self.penalty = losses, penalty

    def _part(self, name: str) -> dict[str, Any]:
        return self.penalty if name.startswith("penalty") else self.losses

    def __contains__(self, name: Any) -> bool:
        return name in self._part(name)

    def __getitem__(self, name: str) -> Any:
        return self._part(name)[name]

    def __setitem__(self, name: str, function: Any) -> None:
        self._part(name)[name] = function


# _LOSSES has the traced functions that compute losses. Nets with the same layers and loss share
# them. _PENALTIES has those that compute penalties. Nets with the same layers and regularisers
# share them.
_LOSSES: dict[tuple, dict[str, Any]] = {}
_PENALTIES: dict[str, dict[str, Any]] = {}
# The last net of each kind. If it has measured the memory of its activations, the next one uses it.
_LAST: dict[tuple, Any] = {}


def traced_once(net: GenericNeuralNet, loss: Any) -> GenericNeuralNet:
    """Return the net with the functions traced for other nets of the same layers and loss.

    A trace takes up to a second, and the tests would need thousands of traces. Traced functions
    take theta as an argument, but they contain the values of all other variables. So a net that has
    variables outside theta is returned unchanged.

    Args:
      net: a net without traced functions.
      loss: the net's loss. Functions are compared by identity, and Keras' losses by value.
    """
    model, traced = net.model, net.flat
    if type(model) is not keras.Sequential or len(model.variables) != len(traced.weights):
        return net
    if getattr(loss, "__module__", "").startswith("keras.") and hasattr(loss, "_fn_kwargs"):
        loss = type(loss), str(loss._fn_kwargs)
    layers = [str(model.inputs[0].dtype)]
    regularised = layers.copy()
    for layer in model._flatten_layers(include_self=False):
        config = {k: v for k, v in layer.get_config().items() if "initializer" not in k}
        del config["name"]
        regularised.append(f"{type(layer)} {config}")
        plain = {k: v for k, v in config.items() if "regularizer" not in k}
        layers.append(f"{type(layer)} {plain}")
    key, penalty = (*layers, loss), " ".join(regularised)
    traced._functions = _Traced(_LOSSES.setdefault(key, {}), _PENALTIES.setdefault(penalty, {}))
    traced._seen = _LAST.get(key, traced)._seen
    _LAST[key] = traced
    return net


def untraced(net: GenericNeuralNet) -> GenericNeuralNet:
    """Return the net after dropping its traced functions, also those shared with other nets."""
    net.flat._functions, net.flat._seen = {}, None
    return net


def sequential(shape: Any, *layers: Any, dtype: Any = None, name: str | None = None) -> Any:
    """Return a Keras model that applies the layers one after the other."""
    return keras.Sequential([keras.Input(shape, dtype=dtype), *layers], name=name)


class Calls(keras.Model):
    """A subclassed model that calls function(model, x). Keyword arguments become attributes."""

    def __init__(self, function: Any, name: str | None = None, dtype: Any = None, **layers: Any):
        super().__init__(name=name, dtype=dtype)
        self.function = function
        for attribute, layer in layers.items():
            setattr(self, attribute, layer)

    def call(self, x: Any) -> Any:
        return self.function(self, x)


def dense_net(
    units: int, num_inputs: int, loss: Any, *, l2: float = 0.0, dtype: str = "float64"
) -> GenericNeuralNet:
    """Return the net of a linear Keras model with bias. The penalty applies only to the kernel."""
    last = keras.layers.Dense(units, kernel_regularizer=keras.regularizers.L2(l2), dtype=dtype)
    model = sequential((num_inputs,), last, dtype=dtype)
    return traced_once(GenericNeuralNet(model, loss), loss)


def ridge(
    num_rows: int = 40, num_inputs: int = 4, l2: float = 0.1, seed: int = 0, dtype: str = "float64"
) -> Problem:
    """Return least squares in Keras at its exact minimum: Dense(1), "mse", L2 on the kernel."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num_rows, num_inputs)) + 0.5
    y = x @ rng.standard_normal(num_inputs) + 0.7 + rng.standard_normal(num_rows)
    x_test = rng.standard_normal((7, num_inputs))
    y_test = x_test.sum(axis=1)
    net = dense_net(1, num_inputs, "mse", l2=l2, dtype=dtype)
    penalty = np.array([2 * l2] * num_inputs + [0.0])  # Keras' L2 has no factor 1/2
    oracle = oracles.LeastSquares(oracles.with_ones(x), y, penalty)
    net.theta = oracle.minimum(np.zeros(num_inputs + 1))
    return Problem(
        net,
        Examples(x.astype(dtype), y.astype(dtype)),
        Examples(x_test.astype(dtype), y_test.astype(dtype)),
        oracle,
        oracle.on(oracles.with_ones(x_test), y_test),
    )


def logistic(
    kind: str,
    num_rows: int = 60,
    num_inputs: int = 5,
    weight_decay: float = 0.05,
    *,
    intercept: bool = False,
    dtype: str = "float64",
    seed: int = 0,
) -> Problem:
    """Return the library's softmax (three classes) or sigmoid model as a problem at its minimum."""
    rng = np.random.default_rng(seed)
    num_classes = 3 if kind == "softmax" else 2
    x = rng.standard_normal((num_rows + 7, num_inputs)) + 0.3
    logits = 1.5 * x @ rng.standard_normal((num_inputs, num_classes))
    y = np.argmax(logits + rng.gumbel(size=logits.shape), axis=1)
    options: Any = {"weight_decay": weight_decay, "intercept": intercept, "dtype": dtype}
    A = oracles.with_ones(x) if intercept else x
    if kind == "softmax":
        net = MulticlassLogisticRegression(num_inputs, num_classes, **options)
        oracle = oracles.softmax_regression(A, y, num_classes, weight_decay)
    else:
        net = BinaryLogisticRegression(num_inputs, **options)
        oracle = oracles.logistic_regression(A, y, weight_decay)
    net = traced_once(net, type(net))
    train, test = slice(0, num_rows), slice(num_rows, None)
    risk = oracle.on(A[train], y[train])
    net.theta = risk.minimum(np.zeros(net.num_parameters))
    return Problem(
        net,
        Examples(x[train].astype(dtype), y[train]),
        Examples(x[test].astype(dtype), y[test]),
        risk,
        oracle.on(A[test], y[test]),
    )


def through_keras(problem: Problem) -> Problem:
    """Return the same problem and the same Keras model, in a net without closed forms."""
    loss = _KERAS_LOSSES[type(problem.net)]()
    net = traced_once(GenericNeuralNet(problem.net.model, loss), loss)
    return Problem(net, problem.train, problem.test, problem.oracle, problem.measured)


_KERAS_LOSSES = {
    MulticlassLogisticRegression: lambda: keras.losses.SparseCategoricalCrossentropy(
        from_logits=True
    ),
    BinaryLogisticRegression: lambda: keras.losses.BinaryCrossentropy(from_logits=True),
}


def tanh_net(
    num_inputs: int = 3, hidden: int = 4, l2: float = 0.0, seed: int = 0, dtype: str = "float64"
) -> Any:
    """Return (net, examples): a small network, not at a minimum, with an indefinite Hessian."""
    rng = np.random.default_rng(seed)
    first = keras.layers.Dense(hidden, activation="tanh", dtype=dtype)
    last = keras.layers.Dense(1, kernel_regularizer=keras.regularizers.L2(l2), dtype=dtype)
    model = sequential((num_inputs,), first, last, dtype=dtype)
    net = traced_once(GenericNeuralNet(model, "mse"), "mse")
    net.theta = rng.standard_normal(net.num_parameters)
    x = rng.standard_normal((20, num_inputs))
    return net, Examples(x.astype(dtype), rng.standard_normal(20).astype(dtype))


def symmetric(eigenvalues: Any, seed: int = 0) -> NDArray:
    """Return a dense symmetric matrix with these eigenvalues and random eigenvectors."""
    d = len(eigenvalues)
    Q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))
    A = (Q * np.asarray(eigenvalues, float)) @ Q.T
    return (A + A.T) / 2
