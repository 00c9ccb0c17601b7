"""Tests of models that end in a softmax or sigmoid. Their answers equal those with logits."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from influence import (
    EKFAC,
    Direct,
    Examples,
    GaussNewton,
    GenericNeuralNet,
    Hessian,
    Influence,
    measurements,
)
from influence.curvature.chain import Chain
from tests.influence.problems import Calls, relative_error

K, L = keras.losses, keras.layers
N = 20
RNG = np.random.default_rng(0)
X, CLASSES, BITS = RNG.standard_normal((N, 4)), RNG.integers(0, 3, N), RNG.integers(0, 2, N)
ROUNDING = 1e-12
F8 = {"dtype": "float64"}


def filled(model):
    rng = np.random.default_rng(1)
    for weight in model.weights:
        weight.assign(rng.standard_normal(weight.shape))
    return model


def sequential(units, *last, activation=None):
    hidden = [L.Dense(3, **F8), L.Activation("tanh", **F8)]
    top = [L.Dense(units, activation=activation, **F8), *last]
    return filled(keras.Sequential([keras.Input((4,), **F8), *hidden, *top]))


def functional(units, activation):
    """Return a model that is not a chain of layers, because it has a skip connection."""
    x = keras.Input((4,), **F8)
    both = L.Concatenate(**F8)([x, L.Dense(3, activation="tanh", **F8)(x)])
    return filled(keras.Model(x, L.Dense(units, activation=activation, **F8)(both)))


def subclassed(units, activation):
    def call(model, x):
        return (
            getattr(tf.nn, activation)(model.b(tf.tanh(model.a(x))))
            if activation
            else (model.b(tf.tanh(model.a(x))))
        )

    model = Calls(call, "own", a=L.Dense(3, **F8), b=L.Dense(units, **F8))
    model(X[:1])
    return filled(model)


pytestmark = pytest.mark.usefixtures("float64")


SPARSE = ("sparse_categorical_crossentropy", K.SparseCategoricalCrossentropy(from_logits=True))
BINARY = ("binary_crossentropy", K.BinaryCrossentropy(from_logits=True))
ENDS = {
    "fused softmax": (sequential(3, activation="softmax"), sequential(3), SPARSE, CLASSES),
    "Activation": (sequential(1, L.Activation("sigmoid", **F8)), sequential(1), BINARY, BITS),
    "functional": (functional(3, "softmax"), functional(3, None), SPARSE, CLASSES),
}


@pytest.mark.parametrize("end", ENDS)
def test_everything_is_answered_as_for_the_logits(end):
    model, plain, losses, y = ENDS[end]
    net, logits = (
        GenericNeuralNet(m, loss) for m, loss in zip((model, plain), losses, strict=True)
    )
    weighted = Examples(X, y, np.linspace(0.5, 2, N))
    y = weighted.y
    V = np.random.default_rng(2).standard_normal((net.num_parameters, 2))
    for method, arguments in (
        ("losses", ()),
        ("directional", (V,)),
        ("bregman_gradient", (net.theta[:, None] + V,)),
    ):
        got, expected = (getattr(n, method)(X, y, *arguments) for n in (net, logits))
        assert relative_error(got, expected) < ROUNDING, method
    for measurement in (measurements.margin, measurements.logit(1)):
        got, expected = (n.measuring(measurement).losses(X, y) for n in (net, logits))
        assert relative_error(got, expected) < ROUNDING
    np.testing.assert_array_equal(net.outputs(X), model(X).numpy())
    is_chain = [Chain.of(n.flat, n.flat.inputs(X[:1])) is not None for n in (net, logits)]
    assert is_chain == [end != "functional"] * 2
    for kind in (Hessian, GaussNewton):
        products = kind(logits, weighted) @ np.eye(net.num_parameters)
        assert relative_error(kind(net, weighted).dense(), products) < ROUNDING


def test_ekfac_of_a_layer_with_its_own_softmax():
    model, plain, losses, y = ENDS["fused softmax"]
    train = Examples(X, y, np.linspace(0.5, 2, N))
    got, expected = (
        Influence(
            GenericNeuralNet(m, loss), train, solver=EKFAC(), damping=0.1, curvature=GaussNewton
        ).scores(train.take([0, 1]))
        for m, loss in zip((model, plain), losses, strict=True)
    )
    assert relative_error(np.asarray(got), np.asarray(expected)) < 1e-9


def test_scores_with_weights_against_a_dense_plain_matrix():
    """Compare with w_t grad loss_t' (H + 2 I)^-1 w_i grad loss_i / n, from plain tapes.

    w_t is the weight of test row t, and w_i that of training row i. The damping is 2.
    """
    model, w = functional(3, "softmax"), np.linspace(0, 2, N)
    train, test = Examples(X, CLASSES, w), Examples(X[:2] + 1, CLASSES[:2], [3.0, 0.5])
    net = GenericNeuralNet(model, "sparse_categorical_crossentropy")
    variables = [weight.value for weight in model.trainable_weights]
    with tf.GradientTape(persistent=True) as outer:
        with tf.GradientTape(persistent=True) as inner:
            # p (N + 2,) are the probabilities of the labels of all training and both test rows.
            p = tf.gather(model(np.concatenate([X, X[:2] + 1])), np.r_[CLASSES, CLASSES[:2]],
                          axis=1, batch_dims=1)  # fmt: skip
            losses = -tf.math.log(p) * np.r_[w, 3.0, 0.5]
            risk = tf.reduce_mean(losses[:N])
        slopes: Any = inner.gradient(risk, variables)
        gradient = tf.concat([tf.reshape(g, [-1]) for g in slopes], 0)
    zero = tf.UnconnectedGradients.ZERO
    flat = lambda parts: np.concatenate(  # noqa: E731
        [np.reshape(part, (part.shape[0], -1)) for part in parts], axis=1
    )
    H = flat(outer.jacobian(gradient, variables, zero, experimental_use_pfor=False))
    G = flat(inner.jacobian(losses, variables, zero, experimental_use_pfor=False))
    expected = G[N:] @ np.linalg.solve(H + 2.0 * np.eye(len(H)), G[:N].T) / N
    got = Influence(net, train, solver=Direct(), damping=2.0, curvature=Hessian).scores(test)
    assert relative_error(np.asarray(got), expected) < 1e-9
    assert (np.asarray(got)[:, 0] == 0).all()  # row 0 has weight 0 and no penalty is added


def test_a_subclassed_model_that_ends_in_a_function():
    """Check that the library recognises a final softmax operation in a graph, like Keras."""
    net = GenericNeuralNet(subclassed(3, "softmax"), SPARSE[0])
    logits = GenericNeuralNet(subclassed(3, None), SPARSE[1])
    V = np.eye(net.num_parameters)
    assert net.loss.head == "softmax"
    net.validate(Examples(X, CLASSES), "train")
    got, expected = (n.gauss_newton_product(X, CLASSES, V) for n in (net, logits))
    assert relative_error(got, expected) < ROUNDING


@pytest.mark.parametrize(
    ("loss", "head", "from_logits"),
    [
        ("sparse_categorical_crossentropy", "softmax", True),
        (K.SparseCategoricalCrossentropy(from_logits=True), "softmax", True),
        (K.SparseCategoricalCrossentropy(ignore_class=9), "softmax", True),
        (K.SparseCategoricalCrossentropy(True, ignore_class=9), None, True),
        (K.CategoricalFocalCrossentropy(), "softmax", True),
        (K.CategoricalFocalCrossentropy(from_logits=True), None, True),
        ("kl_divergence", "softmax", True),
        ("mse", None, True),
        (lambda y, p: p[:, 0], None, True),
    ],
)
def test_what_a_loss_takes_from_a_softmax(loss, head, from_logits):
    found = GenericNeuralNet(ENDS["fused softmax"][0], loss).loss
    assert (found.head, found.from_logits) == (head, from_logits)


def test_a_softmax_layer_is_read_off_the_layers():
    net = GenericNeuralNet(sequential(3, L.Softmax(**F8)), SPARSE[0])
    other = GenericNeuralNet(ENDS["fused softmax"][0], SPARSE[0])
    assert net.loss.head == "softmax"
    V = np.ones((net.num_parameters, 1))
    got, expected = (n.gauss_newton_product(X, CLASSES, V) for n in (net, other))
    assert relative_error(got, expected) < ROUNDING


def test_probabilities_without_a_known_softmax_are_refused_where_logits_are_needed():
    mixed = sequential(3, L.Softmax(**F8), L.Reshape((3,), **F8))
    net = GenericNeuralNet(mixed, SPARSE[0])
    assert net.loss.head is None and not net.loss.from_logits
    net.validate(Examples(X, CLASSES), "train")
    with pytest.raises(ValueError, match="^loss must take logits for a Gauss-Newton matrix"):
        GaussNewton(net, Examples(X, CLASSES))
    with pytest.raises(ValueError, match="^loss must take logits for the measurement 'margin'"):
        net.measuring(measurements.margin)


def test_logits_that_do_not_give_the_models_output_are_refused(monkeypatch):
    net = GenericNeuralNet(ENDS["fused softmax"][0], SPARSE[0])
    monkeypatch.setattr("influence.net.losses.peeled", lambda raw: 2 * raw._keras_logits)
    with pytest.raises(ValueError, match="^model must end in its softmax, got an output of 'seq"):
        net.validate(Examples(X, CLASSES), "train")
