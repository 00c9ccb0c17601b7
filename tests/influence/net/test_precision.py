"""Tests of float64 and float32 copies against models that are built in that dtype."""

import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf

from influence import (
    AllCNN,
    Direct,
    GenericNeuralNet,
    Hessian,
    Influence,
    MulticlassLogisticRegression,
    check,
    measurements,
)
from influence.net.precision import recast
from tests.influence.dense_scores import dense_scores

L = keras.layers
N, M, L2 = 24, 3, 0.05
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(N, 3)), RNG.normal(size=(N, 1))
HOW = {"solver": Direct(), "damping": 2.0, "curvature": Hessian}


def square(y, z):
    return tf.square(y - z)[:, 0]


def small(policy, l2=L2):
    """Return a model that is built under the global dtype policy `policy`."""
    keras.utils.set_random_seed(0)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        penalty = {f"{kind}_regularizer": keras.regularizers.L2(l2) for kind in ("kernel", "bias")}
        penalty = penalty if l2 else {}
        last = "float64" if policy == "float64" else "float32"
        model = keras.Sequential(
            [
                keras.Input((3,), dtype=last),
                L.Dense(4, "tanh", **penalty),
                L.Dropout(0.5),
                L.Dense(1, dtype=last, **penalty),
            ]
        )
    finally:
        keras.config.set_dtype_policy(before)
    model.compile("sgd", "mse")
    return model


@pytest.fixture(scope="module")
def expected():
    plain = small("float64", l2=0)
    weights = small("float32").get_weights()
    plain.set_weights(weights)
    return weights, dense_scores(plain, square, (X, Y), (X[:M], Y[:M]), L2, damping=2.0)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_a_float64_copy_has_the_scores_of_a_dense_matrix(policy, expected):
    weights, want = expected
    model = small(policy)
    model.set_weights(weights)
    net = GenericNeuralNet(model, dtype="float64")
    assert net.dtype == np.float64
    scores = Influence(net, (X, Y), **HOW).scores((X[:M], Y[:M]))
    np.testing.assert_allclose(scores, want, rtol=1e-9, atol=1e-14)
    again = GenericNeuralNet(model).astype("float64")
    np.testing.assert_array_equal(again.gradients(X, Y), net.gradients(X, Y))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_is_answered_in_float32(policy, expected):
    weights, want = expected
    model = small(policy)
    model.set_weights(weights)
    net = GenericNeuralNet(model)
    assert net.dtype == np.float32
    note = f"A float32 copy of the {policy} model: fit and theta change only the copy."
    assert net.notes == (note,) and note in repr(net)
    scores = Influence(model, (X, Y), **HOW).scores((X[:M], Y[:M]))
    np.testing.assert_allclose(scores, want, rtol=1e-3, atol=1e-6)


def test_a_copy_and_the_model_change_apart():
    model = small("float32")
    kept = [w.copy() for w in model.get_weights()]
    net = GenericNeuralNet(model)
    copy = net.astype("float64")
    assert np.array_equal(copy.theta, net.theta)
    copy.theta = np.zeros(net.num_parameters)
    assert all(map(np.array_equal, model.get_weights(), kept))
    assert net.theta.any()
    assert copy.astype("float64") is copy
    assert copy.astype(np.float32).dtype == np.float32
    there = np.arange(net.num_parameters, dtype=float)
    assert np.array_equal(net.at(there).astype("float64").theta, there)
    again = pickle.loads(pickle.dumps(copy))
    assert np.array_equal(again.losses(X, Y), copy.losses(X, Y))
    assert copy.loss.name == net.loss.name and copy.model.loss == model.loss
    of_output = copy.measuring(lambda y, z: z[:, 0])
    assert np.array_equal(of_output.losses(X, Y), copy.outputs(X)[:, 0])


class Doubled(L.Layer):
    """A user's layer that creates an inner layer and has no `get_config` of its own."""

    def __init__(self, **options):
        super().__init__(**options)
        self.inner = L.Dense(2)

    def call(self, x):
        return 2 * self.inner(x)


class Own(keras.Model):
    """A user's subclassed model with a `get_config`."""

    def __init__(self, width, **options):
        super().__init__(**options)
        self.width, self.one, self.two = width, L.Dense(width, "tanh"), L.Dense(1)

    def call(self, x):
        return self.two(self.one(x if self.width < 4 else x[0] + x[1]))

    def get_config(self):
        return {"width": self.width}


def of_rows(*layers):
    return keras.Sequential([keras.Input((3,)), *layers, L.Dense(1)])


def of_sequences(*layers):
    return keras.Sequential([keras.Input((5, 3)), *layers, L.Dense(1)])


def nested():
    inner = keras.Sequential([keras.Input((3,)), L.Dense(2, "tanh"), L.Rescaling(0.5)])
    inputs, other = keras.Input((3,)), keras.Input((3,))
    h = L.Add()([inner(inputs), inner(other)])  # both calls use the same weights
    last = keras.ops.cast(h[:, 1:], "float32")
    return keras.Model([inputs, other], keras.ops.tanh(h)[:, :1] + last)


def normalised():
    layer = L.Normalization()
    layer.adapt(X + 5)
    model = keras.Sequential(
        [keras.Input((3,)), layer, L.Dense(4), L.BatchNormalization(), L.Activation("softplus")]
    )
    model.layers[2].set_weights([RNG.uniform(1, 2, 4) for _ in range(4)])
    return model


def frozen():
    model = keras.Sequential([keras.Input((3,)), L.Dense(4), L.Dense(2), L.Dense(1)])
    model.layers[1].trainable = False
    model.layers[0].bias.trainable = False
    return model


def built(model, x):
    model(x)
    return model


IDS = np.arange(20).reshape(4, 5)
SERIES = RNG.normal(size=(4, 5, 3))
MODELS = {
    "normalised": (normalised, X),
    "nested and shared": (nested, [X, 2 * X]),
    "frozen": (frozen, X),
    "own layer": (lambda: of_rows(Doubled()), X),
    "own model": (lambda: built(Own(3), X), X),
    "own model of two inputs": (lambda: built(Own(4), [X, 2 * X]), [X, 2 * X]),
    "own activation": (lambda: of_rows(L.Dense(2, activation=lambda t: tf.tanh(3 * t))), X),
    "lambda": (lambda: of_rows(L.Lambda(lambda t: t * 3)), X),
    "recurrent": (lambda: of_sequences(L.Bidirectional(L.LSTM(2)), L.Dropout(0.1)), SERIES),
    "distributed": (lambda: of_sequences(L.TimeDistributed(L.Dense(2)), L.Flatten()), SERIES),
    "ids": (
        lambda: keras.Sequential(
            [keras.Input((5,), dtype="int32"), L.Embedding(20, 3), L.GlobalAveragePooling1D()]
        ),
        IDS,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_layers_keep_their_outputs_and_weights(name):
    keras.utils.set_random_seed(1)
    make, x = MODELS[name]
    model = make()
    copy = recast(model, "float64")
    assert [w.path.split("/")[-1] for w in copy.trainable_weights] == [
        w.path.split("/")[-1] for w in model.trainable_weights
    ]
    for one, two in zip(copy.weights, model.weights, strict=True):
        assert one.dtype == ("float64" if two.dtype == "float32" else two.dtype)
        assert np.array_equal(one.numpy(), two.numpy())
    for weight in copy.trainable_weights:  # float32 could not represent a change of 1e-10
        weight.assign_add(np.full(weight.shape, 1e-10))
    moved = np.asarray(copy(x, training=False))
    recast_again = recast(model, "float64")
    at = np.asarray(recast_again(x, training=False))
    assert at.dtype == np.float64
    np.testing.assert_allclose(at, model(x, training=False), rtol=1e-4, atol=1e-5)
    assert 1e-13 < np.abs(moved - at).max() < 1e-6
    assert keras.config.floatx() == "float32" and keras.config.dtype_policy().name == "float32"


def test_the_check_of_a_float64_copy_is_precise():
    model = keras.Sequential([keras.Input((3,)), L.Dense(1, kernel_regularizer="l2")])
    model.compile("sgd", "mse")
    net = GenericNeuralNet(model, dtype="float64")
    net.fit((X, Y), gradient_tolerance=1e-10)
    assert check(net, (X, Y))["precision"].verdict == "ok"
    inside = np.column_stack([X, np.ones(N)])
    penalty = 2 * 0.01 * N * np.diag([1.0, 1, 1, 0]) / 2
    theta = np.linalg.solve(inside.T @ inside + penalty, inside.T @ Y)[:, 0]
    np.testing.assert_allclose(net.theta, theta, rtol=1e-8)


class Unknown(keras.Model):
    def __init__(self, width):
        super().__init__()
        self.dense = L.Dense(width)

    def call(self, x):
        return self.dense(x)


def changed():
    model = keras.Sequential([keras.Input((3,)), L.Dense(2, name="first"), L.Dense(1)])
    model.layers[0].call = lambda x, **_: keras.ops.matmul(x, model.layers[0].kernel) + 7
    return model


def test_models_that_keras_cannot_rebuild():
    with pytest.raises(ValueError, match="^model must be one that Keras can rebuild .*'unknown'"):
        GenericNeuralNet(built(Unknown(1), X), "mse", dtype="float64")
    constant = of_rows(L.Lambda(lambda t: t + tf.constant([1.0, 2.0, 3.0])))
    with pytest.raises(ValueError, match="^model must be one that Keras can rebuild .*the copy h"):
        GenericNeuralNet(constant, "mse", dtype="float64")
    with pytest.raises(ValueError, match="^model must be what its configuration says for a copy"):
        GenericNeuralNet(changed(), "mse", dtype="float64")
    for dtype in ("float16", "int32", "text", 3):
        with pytest.raises(ValueError, match="^dtype must be 'float32' or 'float64', got"):
            GenericNeuralNet(small("float32"), dtype=dtype)


def test_closed_forms_have_one_dtype():
    net = MulticlassLogisticRegression(3, 2, weight_decay=0.1)
    assert net.astype("float64") is net
    with pytest.raises(ValueError, match="^dtype must be float64 for MulticlassLogisticRegression"):
        net.astype("float32")
    cnn = AllCNN()
    with pytest.raises(ValueError, match="^dtype must be float32 for AllCNN, got float64; Generic"):
        cnn.astype("float64")


def test_logits_behind_a_softmax_stay_known_in_a_copy():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), L.Dense(2, activation="softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    y = (Y[:, 0] > 0).astype(int)
    copy = GenericNeuralNet(model).astype("float64")
    probabilities = copy.model(X, training=False).numpy()
    margins = copy.measuring(measurements.margin).losses(X, y)
    odds = np.log(probabilities[:, 1] / probabilities[:, 0])
    np.testing.assert_allclose(margins, np.where(y == 1, odds, -odds), rtol=1e-9)
