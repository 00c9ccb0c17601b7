"""Tests of many Keras layers and losses against derivatives taken without the library.

Each model is small, with weights far from a minimum. The expected values come from TensorFlow's
tape on the plain model: first derivatives example by example, and the Hessian row by row.
TensorFlow's second derivatives of some layers are wrong. There, the expected second derivatives
are central differences of first derivatives on the plain model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import keras
import numpy as np
import pytest
import scipy.linalg
import scipy.special
import tensorflow as tf

from influence import CG, Direct, Examples, GenericNeuralNet, Hessian, Influence
from tests import oracles
from tests.influence.problems import relative_error, sequential

L = keras.layers
K = keras.losses
N = 6
# Both sides are computed by the tape in float64. The rounding error is about 1e-15 times the size
# of the terms that cancel.
AUTODIFF = 1e-9
# Fourth-order central differences have an error of about 1e-9.
DIFFERENCES = 1e-7


# --- losses in TensorFlow, written from their definitions -----------------------------------------


def log_softmax(y, z, smoothing=0.0):
    """Return losses for class numbers or one-hot labels, averaged over any time steps."""
    log_p = z - tf.reduce_logsumexp(z, axis=-1, keepdims=True)
    target = tf.one_hot(y, z.shape[-1], dtype=z.dtype) if y.ndim < len(z.shape) else y
    target = (1 - smoothing) * tf.cast(target, z.dtype) + smoothing / z.shape[-1]
    values = -tf.reduce_sum(target * log_p, axis=-1)
    return tf.reduce_mean(values, axis=list(range(1, len(values.shape))))


def log_probability(y, p):
    return -tf.math.log(tf.gather(p, y, axis=1, batch_dims=1))


def log_sigmoid(y, z):
    return tf.math.softplus(z[:, 0]) - tf.cast(y, z.dtype) * z[:, 0]


def squares(y, z):
    return tf.reduce_mean((tf.reshape(y, z.shape) - z) ** 2, axis=1)


def log_probability_of_one(y, p):
    return -tf.math.log(tf.where(y == 1, p[:, 0], 1 - p[:, 0]))


def huber(y, z):
    gap = tf.abs(y - z[:, 0])
    return tf.where(gap <= 1, gap**2 / 2, gap - 0.5)


def poisson(y, z):
    return z[:, 0] - tf.cast(y, z.dtype) * tf.math.log(z[:, 0] + 1e-7)  # Keras adds 1e-7


def quartic(y, z):
    return tf.reduce_sum((y - z) ** 4, axis=-1)


# --- models with their losses ---------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """Recipe for a model and a batch.

    `loss` is given to the net. `plain` is the same loss, written in plain TensorFlow.
    """

    make: Callable
    loss: Any
    plain: Callable
    x: Callable  # maps a random generator to inputs
    y: Callable  # maps a random generator to labels
    by_autodiff: bool = True  # False if TensorFlow's second derivatives of `make()` are wrong


def normal(*shape):
    return lambda rng: rng.standard_normal((N, *shape))


def classes(c, *shape):
    return lambda rng: rng.integers(0, c, (N, *shape))


def regularised():
    R = keras.regularizers
    hidden = L.Dense(3, activation="softplus", kernel_regularizer=R.L2(0.1))
    last = L.Dense(3, activation="gelu", bias_regularizer=R.L1L2(0, 0.2))
    return sequential((3,), hidden, last, L.Dense(3, activation="silu"))


def skip_connection():
    a, b = keras.Input((2,), name="a"), keras.Input((3,), name="b")
    hidden = L.Dense(3, activation="tanh")(L.Concatenate()([a, b]))
    skip = L.Add()([hidden, b])
    return keras.Model([a, b], L.Dense(3)(L.Concatenate()([skip, a])))


class SharedTwice(keras.Model):
    """A subclassed model that uses one layer twice and freezes another layer."""

    def __init__(self):
        super().__init__()
        self.shared = L.Dense(2, activation="tanh")
        self.frozen = L.Dense(2, trainable=False)
        self.last = L.Dense(1)

    def call(self, x, training=None):
        return self.last(self.shared(self.frozen(self.shared(x))) + x)


class NoTraining(SharedTwice):
    """A subclassed model without a `training` argument and without a declared input."""

    def call(self, x):
        return tf.sigmoid(super().call(x))


def shared(kind=SharedTwice):
    model = kind()
    model(np.zeros((1, 2)))
    return model


def batch_normalised():
    norm = L.BatchNormalization()
    model = sequential((3,), L.Dense(3), norm, L.Activation("elu"), L.Dropout(0.4), L.Dense(1))
    norm.moving_mean.assign([1.0, -1, 0.5])
    norm.moving_variance.assign([0.5, 2, 1])
    return model


def normalised():
    hidden = L.Dense(4), L.GroupNormalization(2), L.RMSNormalization(), L.Flatten()
    last = L.Dense(1, activation="exponential")
    return sequential((2, 4), L.LayerNormalization(epsilon=0.1), *hidden, last)


def masked_ids():
    hidden = L.GlobalAveragePooling1D(), L.Dense(2, activation="tanh")
    return sequential((3,), L.Embedding(5, 2, mask_zero=True), *hidden, L.Dense(3), dtype="int32")


def steps():
    # The layer is unrolled, because TensorFlow traces a loop slowly. The case "recurrent" tests a
    # loop.
    lstm = L.LSTM(2, return_sequences=True, unroll=True)
    return sequential((2, 2), lstm, L.Dense(3))


def recurrent():
    return sequential((2, 2), L.SimpleRNN(2), L.Dense(1))


def attention():
    x = keras.Input((3, 2))
    attended = L.MultiHeadAttention(2, 2)(x, x, use_causal_mask=True)
    pooled = L.GlobalAveragePooling1D()(L.Add()([x, attended]))
    return keras.Model(x, L.Dense(2, activation="softmax")(pooled))


def sequence_convolved():
    first = L.Conv1D(2, 3, padding="causal", dilation_rate=2), L.Activation("tanh")
    last = L.SeparableConv1D(2, 2), L.GlobalMaxPooling1D(), L.Dense(1)
    return sequential((8, 2), *first, L.MaxPooling1D(2), *last)


def convolved():
    first = L.Conv2D(2, 3, strides=2, padding="same"), L.Activation("tanh"), L.DepthwiseConv2D(2)
    hidden = L.SeparableConv2D(2, 2, activation="softplus"), L.Conv2DTranspose(1, 2, strides=2)
    return sequential((5, 5, 1), *first, *hidden, L.AveragePooling2D(2), L.Flatten(), L.Dense(1))


def pooled():
    first = L.Conv2D(2, 2), L.PReLU(), L.MaxPooling2D(2, strides=1)
    last = L.ZeroPadding2D(1), L.UpSampling2D(2), L.Flatten(), L.Dense(1)
    return sequential((4, 4, 2), *first, *last)


def grouped():
    hidden = L.Conv2D(2, 2, groups=2), L.Activation("tanh")
    return sequential((3, 3, 2), *hidden, L.Flatten(), L.Dense(1))


def volume():
    """Return a model for volumes. Its first layer has no weights."""
    hidden = L.ZeroPadding3D(1), L.Conv3D(2, 2), L.LeakyReLU(0.3), L.GlobalAveragePooling3D()
    last = L.EinsumDense("nf,fg->ng", 2, activation="selu"), L.Dense(1)
    return sequential((3, 3, 3, 1), *hidden, *last)


def one_hot(rng):
    return np.eye(3)[rng.integers(0, 3, N)]


def some_ids(rng):
    """Return ids, where 0 is masked. No row is all zeros, because its mean would be 0 / 0."""
    return np.column_stack([rng.integers(1, 5, N), rng.integers(0, 5, (N, 2))])


def pair(rng):
    return {"a": rng.standard_normal((N, 2)), "b": rng.standard_normal((N, 3))}


SPARSE = partial(K.SparseCategoricalCrossentropy, from_logits=True)
SMOOTHED = partial(K.CategoricalCrossentropy, from_logits=True, label_smoothing=0.2)
BINARY = partial(K.BinaryCrossentropy, from_logits=True)
SMOOTH = partial(log_softmax, smoothing=0.2)
KINDS = {
    "regularised": Kind(regularised, SPARSE(), log_softmax, normal(3), classes(3)),
    "skip_connection": Kind(skip_connection, SMOOTHED(), SMOOTH, pair, one_hot),
    "shared": Kind(shared, BINARY(), log_sigmoid, normal(2), classes(2)),
    "no_training": Kind(partial(shared, NoTraining), "binary_crossentropy", log_probability_of_one,
                        normal(2), classes(2)),
    "batch_normalised": Kind(batch_normalised, K.Huber(), huber, normal(3), normal()),
    "normalised": Kind(normalised, "poisson", poisson, normal(2, 4), classes(4), False),
    "masked_ids": Kind(masked_ids, SPARSE(), log_softmax, some_ids, classes(3)),
    "steps": Kind(steps, SPARSE(), log_softmax, normal(2, 2), classes(3, 2)),
    "attention": Kind(attention, "sparse_categorical_crossentropy", log_probability,
                      normal(3, 2), classes(2)),
    "sequence_convolved": Kind(sequence_convolved, BINARY(), log_sigmoid, normal(8, 2), classes(2)),
    "convolved": Kind(convolved, "mse", squares, normal(5, 5, 1), normal()),
    "pooled": Kind(pooled, quartic, quartic, normal(4, 4, 2), normal(1)),
    "volume": Kind(volume, K.MeanSquaredError(), squares, normal(3, 3, 3, 1), normal()),
}  # fmt: skip
# These cases take seconds per test: Keras compiles "grouped" with XLA, and "recurrent" has a loop
# that TensorFlow traces slowly.
SLOW = {
    "grouped": Kind(grouped, "mse", squares, normal(3, 3, 2), normal()),
    "recurrent": Kind(recurrent, "mse", squares, normal(2, 2), normal()),
}


@cache
def build(name, dtype="float64"):
    """Return (net, plain loss, x, y) with random weights."""
    rng, kind = np.random.default_rng(7), (KINDS | SLOW)[name]
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    try:
        model = kind.make()
    finally:
        keras.config.set_floatx(before[0])
        keras.config.set_dtype_policy(before[1])
    for weight in model.weights:
        if "moving" not in weight.path:
            weight.assign(rng.standard_normal(weight.shape) / 2)
    return GenericNeuralNet(model, kind.loss), kind.plain, kind.x(rng), kind.y(rng)


@dataclass(frozen=True)
class Case:
    net: GenericNeuralNet
    plain: Callable
    x: Any
    y: Any
    by_autodiff: bool
    dense: oracles.Dense
    hessian: np.ndarray  # the Hessian of the mean loss
    V: np.ndarray

    @property
    def second(self) -> float:
        return AUTODIFF if self.by_autodiff else DIFFERENCES


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    net, plain, x, y = build(request.param)
    by_autodiff = KINDS[request.param].by_autodiff
    dense = oracles.dense_derivatives(net.model, plain, x, y)
    if by_autodiff:
        hessian = oracles.dense_hessian(net.model, plain, x, y)
    else:
        at = oracles.plain_gradient_at(net.model, plain, x, y)
        rows = np.eye(net.num_parameters)
        hessian = np.stack([oracles.central_difference(at, net.theta, row) for row in rows])
    V = np.random.default_rng(8).standard_normal((net.num_parameters, N))
    return Case(net, plain, x, y, by_autodiff, dense, hessian, V)


def test_losses_and_first_derivatives(case):
    net, x, y, V = case.net, case.x, case.y, case.V
    net.validate(Examples(x, y), "train")
    assert relative_error(net.losses(x, y), case.dense.losses) < AUTODIFF
    assert relative_error(net.gradients(x, y), case.dense.gradients) < AUTODIFF
    assert relative_error(net.directional(x, y, V), case.dense.gradients @ V) < AUTODIFF
    assert relative_error(net.outputs(x), net.model(x, training=False).numpy()) < AUTODIFF


def test_second_derivatives(case):
    net, x, y, V = case.net, case.x, case.y, case.V
    assert relative_error(net.hvp(x, y, V), case.hessian @ V) < case.second
    # In the other cases the plain loss takes probabilities. The library uses logits, or refuses,
    # so the two matrices cannot be compared.
    if net.loss.from_logits and net.loss.head is None:
        product = net.gauss_newton_product(x, y, V)
        assert relative_error(product, case.dense.gauss_newton @ V) < AUTODIFF
        assert np.linalg.norm(case.hessian - case.dense.gauss_newton) > 1e-3
    results = [net.theta, net.losses(x, y), net.gradients(x, y), net.hvp(x, y, V.astype("f4"))]
    assert {r.dtype for r in results} == {np.dtype("float64")}


def elsewhere(net, question):
    """Return the function that maps theta to the value of `question()` at theta."""
    here = net.theta

    def at(theta):
        net.theta = theta
        try:
            return question()
        finally:
            net.theta = here

    return at


THIRD = ["skip_connection", "no_training", "batch_normalised", "masked_ids", "convolved"]


@pytest.mark.parametrize("case", THIRD, indirect=True)
def test_third_derivatives_against_differences_of_second(case):
    net, x, y, v = case.net, case.x, case.y, case.V[:, 0]
    for question, second in ((net.curvatures, net.directional), (net.curvature_gradient, net.hvp)):
        at = elsewhere(net, partial(second, x, y, v))
        expected = oracles.central_difference(at, net.theta, v)
        assert relative_error(question(x, y, v), expected) < DIFFERENCES


@pytest.mark.slow
def test_other_derivatives_where_maps_must_loop():
    net, _, x, y = build("recurrent")
    v = np.random.default_rng(8).standard_normal(net.num_parameters)
    losses = elsewhere(net, partial(net.losses, x, y))
    theta, h = net.theta, 1e-3
    near, far = (losses(theta + t * v) + losses(theta - t * v) for t in (h, 2 * h))
    # This is the second derivative along v by differences. Its rounding error is about 1e-16 / h^2,
    # here 1e-10.
    expected = (16 * near - far - 30 * losses(theta)) / (12 * h**2)
    assert relative_error(net.curvatures(x, y, v), expected) < 1e-6
    one = np.random.default_rng(9).standard_normal(x.shape)

    def mixed(x):  # the derivative of the losses along v in theta
        here = elsewhere(net, lambda: net.losses(x, y))
        return (here(theta + h * v) - here(theta - h * v)) / (2 * h)

    slope = (mixed(x + h * one) - mixed(x - h * one)) / (2 * h)  # the error is of order h^2
    got = np.sum(net.input_gradient(x, y, v) * one, axis=(1, 2))
    assert relative_error(got, slope) < 1e-4


def test_grouped_convolutions():
    net, plain, x, y = build("grouped")
    V = np.random.default_rng(8).standard_normal((net.num_parameters, 2))
    at = oracles.plain_gradient_at(net.model, plain, x, y)
    rows = [oracles.central_difference(at, net.theta, v) for v in V.T]
    assert relative_error(net.hvp(x, y, V), np.stack(rows, axis=1)) < DIFFERENCES


def plain_input_gradient(case):
    """Return the derivative of grad loss_i . v by the inputs of row i, by two nested tapes."""
    weights = case.net.model.trainable_weights
    parts = np.split(case.V[:, 0], np.cumsum([int(np.prod(w.shape)) for w in weights])[:-1])
    x = tf.nest.map_structure(tf.constant, case.x)
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            total = tf.reduce_sum(case.plain(case.y, case.net.model(x, training=False)))
        by_weight = inner.gradient(total, [w.value for w in weights])
        terms = zip(by_weight, weights, parts, strict=True)
        along = tf.add_n([tf.reduce_sum(g * part.reshape(w.shape)) for g, w, part in terms])
    return outer.gradient(along, x)


def test_input_gradients(case):
    if all(part.dtype.kind == "i" for part in tf.nest.flatten(case.x)):
        return  # there is no gradient with respect to integers
    got = case.net.input_gradient(case.x, case.y, case.V[:, 0])
    tf.nest.assert_same_structure(got, case.x)
    if case.by_autodiff:
        for part, true in zip(
            *map(tf.nest.flatten, (got, plain_input_gradient(case))), strict=True
        ):
            assert relative_error(part, true.numpy()) < AUTODIFF
        return

    def along(x):
        gradients = oracles.dense_derivatives(case.net.model, case.plain, x, case.y).gradients
        return np.sum(gradients @ case.V[:, 0])

    for direction in np.random.default_rng(9).standard_normal((2, *case.x.shape)):
        true = oracles.central_difference(along, case.x, direction)
        assert abs(np.sum(got * direction) - true) < DIFFERENCES * abs(true)


def test_scores(case):
    """Compare CG and Direct with the dense matrix. Damping makes it positive definite."""
    net, train = case.net, Examples(case.x, case.y)
    H = case.hessian + net.penalty_hvp(np.eye(net.num_parameters))
    values = scipy.linalg.eigvalsh(H)
    damping = float(max(-1.5 * values[0], 0) + 0.1 * values[-1])
    G = case.dense.gradients
    inverse = np.linalg.inv(H + damping * np.eye(len(H)))
    expected = G @ inverse @ (G + net.penalty_gradient()).T / N
    condition = (values[-1] + damping) / (values[0] + damping)
    for solver in (CG(rtol=1e-12), Direct()):
        influence = Influence(net, train, solver=solver, damping=damping, curvature=Hessian)
        scores = influence.scores(train)
        assert relative_error(scores, expected) < condition * case.second


def test_float32_models_answer_in_float32():
    net, _, x, y = build("convolved", "float32")
    exact, *_ = build("convolved")
    V = np.random.default_rng(8).standard_normal((net.num_parameters, 2))
    for question in (
        lambda net: net.losses(x, y),
        lambda net: net.gradients(x, y),
        lambda net: net.hvp(x, y, V),
        lambda net: net.directional(x, y, V),
        lambda net: net.gauss_newton_product(x, y, V),
    ):
        got = question(net)
        assert got.dtype == np.float32
        # An answer sums a few hundred float32 numbers, each addition with an error of up to 6e-8.
        assert relative_error(got, question(exact)) < 1e-4
