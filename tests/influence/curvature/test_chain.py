"""Tests of a chain's Hessian against products by the tape, for every kind of layer."""

from functools import partial

import keras
import numpy as np
import pytest

from influence import AllCNN, Examples, GenericNeuralNet, Hessian
from influence.curvature.chain import Chain, chain_hessian
from influence.curvature.operators import Curvature
from tests.influence.problems import sequential, traced_once


class _Float64:
    """The namespace keras.layers with every layer in float64."""

    def __getattr__(self, name):
        return partial(getattr(keras.layers, name), dtype="float64")


L = _Float64()
_X = np.random.default_rng(0).normal(size=(7, 6, 6, 2))
_LABELS = Examples(_X, np.array([0, 2, 1, 1, 0, 2, 2]))


_LOG_LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")


def _net(*layers, loss=_LOG_LOSS):
    keras.utils.set_random_seed(0)
    net = traced_once(GenericNeuralNet(sequential((6, 6, 2), *layers, dtype="float64"), loss), loss)
    rng = np.random.default_rng(1)
    # Keras starts with biases of zero. Move all weights, so that an error in biases shows.
    net.theta = net.theta + 0.1 * rng.normal(size=net.num_parameters)
    return net


def _tanh():
    return L.Activation("tanh")


CHAINS = {
    "strided, padded, without bias": lambda: (
        *(L.Conv2D(3, 3, padding="same", strides=2, use_bias=False), L.Activation("softplus")),
        *(L.Conv2D(2, 2, kernel_regularizer="l2"), L.ELU(), L.Flatten(), L.Dropout(0.5)),
        L.Dense(3),
    ),
    "linear layers between": lambda: (
        *(L.Conv2D(2, 3), L.AveragePooling2D(2), L.Activation("gelu"), L.ZeroPadding2D(1)),
        *(L.Conv2D(2, (1, 3)), L.Activation("sigmoid"), L.Reshape((-1, 2)), L.Dense(2)),
        *(_tanh(), L.Flatten(), L.Dense(3)),
    ),
    "two affine layers in a row": lambda: (
        *(L.Flatten(), L.Dense(3), L.Dense(4), _tanh(), L.Dense(3)),
    ),
    "dense at every pixel": lambda: (L.Dense(2), _tanh(), L.Dense(3), L.GlobalAveragePooling2D()),
    "kinked": lambda: (
        *(L.Conv2D(3, 3), L.ReLU(), L.Conv2D(2, 2), L.LeakyReLU(), L.GlobalAveragePooling2D()),
        L.Dense(3),
    ),
    "an activation before any weight": lambda: (_tanh(), L.Flatten(), L.Dense(3)),
}


@pytest.fixture(autouse=True)
def _always(monkeypatch):
    """Use the chain's Hessian for small nets too, although products are faster there."""
    monkeypatch.setattr(Chain, "beats_products", lambda self, x: True)


def closed(net, examples, batch_size=None):
    matrix = chain_hessian(net, examples, batch_size)
    assert matrix is not None
    return matrix + net.penalty_hvp(np.eye(len(matrix), dtype=matrix.dtype))


def _matches_products(net, examples):
    closed_form = closed(net, examples)
    by_products = Curvature._formed(Hessian(net, examples))
    scale = np.abs(by_products).max()
    np.testing.assert_allclose(closed_form, by_products, atol=1e-12 * scale)
    return closed_form


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_s_hessian_is_that_of_the_products(name):
    _matches_products(_net(*CHAINS[name]()), _LABELS)


def test_the_paper_s_network_in_both_dtypes():
    settings = {"filters": 2, "strides": (1, 2)}
    net = AllCNN((9, 9, 2), 3, dtype="float64", **settings)
    net.theta = net.theta + 0.1 * np.random.default_rng(1).normal(size=net.num_parameters)
    x = np.random.default_rng(2).normal(size=(7, 9, 9, 2))
    exact = _matches_products(net, Examples(x, _LABELS.y))
    single = AllCNN((9, 9, 2), 3, **settings)
    single.theta = net.theta.astype(np.float32)
    found = closed(single, Examples(x.astype(np.float32), _LABELS.y))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("frozen", [0, 2])
def test_frozen_layers_are_passed_through(frozen):
    layers = [L.Conv2D(2, 3), _tanh(), L.Conv2D(2, 2), _tanh(), L.Flatten(), L.Dense(3)]
    layers[frozen].trainable = False
    # Without `uncut`, a frozen first layer would be split off as a trunk and not be in the chain.
    _matches_products(_net(*layers).uncut(), _LABELS)


def test_a_loss_with_full_curvature_in_the_output():
    def loss(y, z):
        return keras.ops.log1p(keras.ops.sum(z, axis=1) ** 2) + keras.ops.sum(z**4, axis=1)

    _matches_products(_net(*CHAINS["two affine layers in a row"](), loss=loss), _LABELS)


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_batch_size_changes_nothing(batch_size):
    net = _net(*CHAINS["kinked"]())
    whole = closed(net, _LABELS)
    np.testing.assert_allclose(closed(net, _LABELS, batch_size), whole, rtol=1e-12, atol=1e-15)


def test_the_faster_way_is_taken(monkeypatch):
    monkeypatch.undo()
    x = np.zeros((1, 28, 28, 1), np.float32)
    convolutional = AllCNN()
    assert Chain.of(convolutional.flat, convolutional.flat.inputs(x)).beats_products(x)
    wide = _net(L.Flatten(), L.Dense(50))
    assert not Chain.of(wide.flat, wide.flat.inputs(_X[:1])).beats_products(_X[:1])
    assert chain_hessian(wide, _LABELS) is None


def test_memory_bounds_the_rows_of_a_batch(monkeypatch):
    net = _net(*CHAINS["kinked"]())
    x = net.flat.inputs(_X[:1])
    chain = Chain.of(net.flat, x)
    # The widest layer has 4 * 4 * 3 = 48 outputs. Their Jacobian has 57 columns, one per weight.
    # The chain counts 8 arrays of this size for each row, in numbers of 8 bytes.
    widest = 48 * 57 * 8 * 8
    for budget, at_most, rows in ((5 * widest, 7, 5), (5 * widest, 3, 3), (1, 7, 1)):
        monkeypatch.setattr("influence.curvature.chain.ACTIVATIONS", budget)
        assert chain.rows_per_batch(x, at_most) == rows


class _Left(keras.layers.Dropout):
    """A dropout layer that is active in inference too."""

    def call(self, inputs, training=None):
        return super().call(inputs, training=True)


@pytest.mark.parametrize(
    "first",
    [
        lambda: L.Conv2D(2, 2, activation="tanh"),
        lambda: L.Conv2D(2, 2, dilation_rate=2),
        lambda: L.Conv2D(2, 2, groups=2),
        lambda: L.Activation("softmax"),
        lambda: _Left(0.5, dtype="float64"),
        lambda: L.LayerNormalization(),
        lambda: L.MaxPooling2D(2),
    ],
    ids="fused dilated grouped softmax dropout normalised pooled".split(),
)
def test_what_is_no_chain_is_left_to_products(first):
    assert chain_hessian(_net(first(), L.Flatten(), L.Dense(3)), _LABELS) is None


def test_a_functional_chain_is_one_and_branches_are_left_to_products():
    inputs = keras.Input((6, 6, 2), dtype="float64")
    flat = L.Flatten()(inputs)
    z = L.Dense(3)(_tanh()(L.Dense(2)(flat)))
    _matches_products(GenericNeuralNet(keras.Model(inputs, z), _LOG_LOSS), _LABELS)
    branched = keras.Model(inputs, L.Add()([L.Dense(3)(flat), L.Dense(3)(flat)]))
    assert chain_hessian(GenericNeuralNet(branched, _LOG_LOSS), _LABELS) is None
