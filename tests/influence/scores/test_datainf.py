"""Tests of datainf against its formula in dense matrices, and against exact values."""

import keras
import numpy as np
import pytest

from influence import Direct, Examples, GenericNeuralNet, Influence
from influence.scores.datainf import datainf
from tests.influence.problems import logistic, relative_error, tanh_net


@pytest.fixture(scope="module")
def network():
    """Return (net, examples). The net has two layers with 16 and 5 parameters, biases included."""
    return tanh_net(l2=0.1)


def dense(net, train, test, damping, layers):
    """Return DataInf's scores (m, n) by its definition in dense matrices.

    For each layer, DataInf takes the mean over rows i of (g_i g_i' + damping I)^-1 as the inverse.
    g_i is the part of row i's gradient that belongs to the layer.
    """
    G, V = net.gradients(train.x, train.y), net.gradients(test.x, test.y)
    n = len(train)
    S = np.zeros_like(V)
    for part, own in zip(layers, damping, strict=True):
        identity = np.eye(part.stop - part.start)
        inverses = [np.linalg.inv(np.outer(g, g) + own * identity) for g in G[:, part]]
        S[:, part] = V[:, part] @ np.mean(inverses, axis=0)
    return S @ (G + net.penalty_gradient()).T / n


TWO = (slice(0, 16), slice(16, 21))


@pytest.mark.parametrize("damping", [0.5, [0.5, 0.02]])
def test_is_the_formula_layer_by_layer(damping, network):
    net, train = network
    test = train.take([3, 5])
    got = datainf(net, train, test, damping=damping)
    each = tuple(np.broadcast_to(damping, 2))
    assert relative_error(got.change_if_removed, dense(net, train, test, each, TWO)) < 1e-10
    assert got.damping == each and got.measurement == "loss"
    np.testing.assert_array_equal(got.rows, np.arange(20))
    some = datainf(net, train, test, [7, 2], damping=damping)
    assert relative_error(some[:], got[:, [7, 2]]) < 1e-12


def test_for_a_linear_model_there_is_one_layer():
    p = logistic("softmax", intercept=True)
    got = datainf(p.net, p.train, p.test, damping=0.3)
    expected = dense(p.net, p.train, p.test, [0.3], [slice(0, 18)])
    assert relative_error(got[:], expected) < 1e-11


def test_one_row_is_exact(network):
    """Check a training set of one row, with the gradient g.

    The mean of one inverse is exact, so DataInf solves with g g' + damping I in each layer.
    """
    net, train = network
    one, test = train.take([8]), train.take([3, 5])
    g = net.gradients(one.x, one.y)[0]
    M = 0.2 * np.eye(21)
    for part in TWO:
        M[part, part] += np.outer(g[part], g[part])
    s = np.linalg.solve(M, net.gradients(test.x, test.y).T)
    expected = s.T @ (g + net.penalty_gradient())[:, None]
    assert relative_error(datainf(net, one, test, damping=0.2)[:], expected) < 1e-11


def test_with_much_damping_it_is_influence_with_that_damping():
    """Check the sign and scale of scores with a damping so large that curvature does not matter.

    DataInf and damped influence are then equal: g . grad L(z_i) / (n damping). g is the gradient of
    the test loss, and L is a training row's loss plus the penalty.
    """
    p = logistic("sigmoid")
    got = datainf(p.net, p.train, p.test, damping=1e6)
    damped = Influence(p.net, p.train, solver=Direct(), damping=1e6).scores(p.test)
    assert relative_error(got[:], damped[:]) < 1e-5
    near = datainf(p.net, p.train, p.test, damping=1.0)
    assert np.corrcoef(near[:].ravel(), damped[:].ravel())[0, 1] > 0.9


@pytest.mark.parametrize("batch_size", [1, 7, 20])
def test_batch_size_changes_nothing(batch_size, network):
    net, train = network
    expected = datainf(net, train, train, damping=0.1)
    got = datainf(net, train, train, damping=0.1, batch_size=batch_size)
    assert relative_error(got[:], expected[:]) < 1e-11


def test_a_frozen_layer_is_no_layer():
    net, train = tanh_net()
    net.model.layers[0].trainable = False
    try:
        head = GenericNeuralNet(net.model, "mse")
        got = datainf(head, train, train, damping=[0.3])
        expected = dense(head, train, train, [0.3], [slice(0, 5)])
    finally:
        net.model.layers[0].trainable = True
    assert relative_error(got[:], expected) < 1e-11


def test_layers_are_keras_layers():
    inputs = keras.Input((4, 2), dtype="float64")
    x = keras.layers.SimpleRNN(3, dtype="float64")(inputs)
    outputs = keras.layers.Dense(1, use_bias=False, dtype="float64")(x)
    net = GenericNeuralNet(keras.Model(inputs, outputs), "mse")
    rng = np.random.default_rng(0)
    train = Examples(rng.standard_normal((6, 4, 2)), rng.standard_normal(6))
    # The first layer has 2 x 3 + 3 x 3 + 3 = 18 weights, and the other has 3.
    got = datainf(net, train, train, damping=(0.3, 0.1))
    expected = dense(net, train, train, (0.3, 0.1), (slice(0, 18), slice(18, 21)))
    assert relative_error(got[:], expected) < 1e-10


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"net": "net"}, TypeError, "^net must be a GenericNeuralNet, got str"),
        ({"train": 1}, TypeError, r"^train must be Examples\(x, y\), got int"),
        ({"test": 1}, TypeError, r"^test must be Examples\(x, y\), got int"),
        ({"rows": [20]}, IndexError, r"^rows must lie in \[0, 20\), got 20"),
        ({"damping": 0.0}, ValueError, r"^damping must be positive, got 0\.0"),
        ({"damping": [1.0, np.inf]}, ValueError, "^damping must be positive, got"),
        ({"damping": [1.0] * 3}, ValueError, "^damping must be a number or one for each of 2 lay"),
        ({"damping": "auto"}, TypeError, "^damping must be an array of numbers, got dtype <U4"),
        (
            {"damping": [0.1, 0.2, 0.3, 0.4, 0.5]},
            ValueError,
            "^damping must be a number or one for",
        ),
        ({"batch_size": 0}, ValueError, "^batch_size must be a positive integer or None, got 0"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(options, error, message, network, monkeypatch):
    net, train = network
    monkeypatch.setattr(type(net), "gradients", lambda *_: pytest.fail("the work had begun"))
    given = {"net": net, "train": train, "test": train, "damping": 0.1, **options}
    with pytest.raises(error, match=message):
        datainf(**given)
