from dataclasses import replace

import keras
import numpy as np
import pytest
import scipy.sparse
import tensorflow as tf

from influence import Examples, GenericNeuralNet
from influence.preflight import rows
from tests.influence.problems import dense_net, logistic, ridge, sequential, tanh_net

L = keras.layers
D64 = {"dtype": "float64"}


def twice(net, examples):
    return rows.same_twice(net, rows.Answers.of(net, examples, None))


def squares(y, output):
    return (tf.cast(y, output.dtype) - output[:, 0]) ** 2


def with_layer(layer):
    """Return (net, examples) of a linear model with the given layer before it."""
    model = sequential((2,), layer, L.Dense(1, **D64), **D64)
    x = np.random.default_rng(0).standard_normal((20, 2)) + 3
    return GenericNeuralNet(model, "mse"), Examples(x, x[:, 0])


# --- whether each row has its own loss ------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        (lambda y, z: tf.reduce_sum(squares(y, z)), "gives shape () for 40 rows"),
        (lambda y, z: tf.reduce_mean(squares(y, z), keepdims=True), "gives shape (1,) for 40"),
    ],
)
def test_a_loss_reduced_over_rows_is_found(loss, what):
    p = ridge()
    line = rows.separate(GenericNeuralNet(p.net.model, loss), p.train)
    assert line.verdict == "fail" and np.isnan(line.value) and what in line.meaning
    assert line.remedy.startswith("Leave out the sum or mean over rows")


@pytest.mark.parametrize(
    "loss",
    [
        lambda y, z: squares(y, z) * tf.cast(tf.shape(y)[0], z.dtype),
        lambda y, z: tf.reduce_mean((y - z) ** 2, axis=1),  # (n,) - (n, 1) broadcasts to (n, n)
        lambda y, z: squares(y, z) + tf.reduce_max(y) / 1e6,
        # The loss depends on the row's position in the batch, but only after position 20.
        lambda y, z: squares(y, z) + 1e-6 * tf.cast(tf.range(tf.shape(y)[0]) > 20, z.dtype),
    ],
)
def test_a_loss_of_several_rows_is_found(loss):
    p = ridge()
    line = rows.separate(GenericNeuralNet(p.net.model, loss), p.train)
    assert line.verdict == "fail" and line.value > 1e-8
    assert "changes with the company it is in" in line.meaning


class TrainingMode(L.BatchNormalization):
    def call(self, inputs, training=False):
        return super().call(inputs, training=True)


def test_batch_normalisation_left_in_training_mode_is_found():
    net, examples = with_layer(TrainingMode(**D64))
    line = rows.separate(net, examples)
    assert line.verdict == "fail" and line.value > 0.1 and "training=True" in line.remedy
    # The check compares the outputs too. If the loss is almost 0 in every row, only the outputs
    # show the fault.
    silent = GenericNeuralNet(net.model, lambda y, z: 1e-12 * squares(y, z))
    assert rows.separate(silent, examples).value == pytest.approx(line.value)
    assert twice(net, examples).verdict == "ok"
    net, examples = with_layer(L.BatchNormalization(**D64))
    assert rows.separate(net, examples).verdict == "ok"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rounding_is_no_fault(dtype):
    p = logistic("softmax", num_rows=100, dtype=dtype)
    line = rows.separate(p.net, p.train)
    assert line.verdict == "ok" and line.value < 1e-5 and line.remedy == ""
    sparse = Examples(scipy.sparse.csr_matrix(p.train.x), p.train.y)
    assert rows.separate(p.net, sparse).verdict == "ok" and twice(p.net, sparse).verdict == "ok"


# --- whether two passes agree ---------------------------------------------------------------------


class LeftOn(L.Dropout):
    def call(self, inputs, training=False):
        return super().call(inputs, training=True)


class Noise(L.Layer):
    def call(self, inputs):
        return inputs + tf.random.normal(tf.shape(inputs), dtype=inputs.dtype)


class SeededNoise(L.Layer):
    """A layer of noise from Keras' global random state, which is not a variable of the model."""

    def call(self, inputs):
        return inputs + keras.random.normal(tf.shape(inputs), dtype=inputs.dtype)


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (lambda: LeftOn(0.5, name="left_on", **D64), True),
        (lambda: Noise(**D64), False),
        (lambda: SeededNoise(**D64), False),
    ],
)
def test_a_random_layer_that_is_on_in_inference_mode_is_found(layer, named):
    net, examples = with_layer(layer())
    before = [v.numpy() for v in net.model.variables]
    line = twice(net, examples)
    assert line.verdict == "fail" and line.value > 0.1
    assert line.remedy.endswith("Layers with a random state: 'left_on'.") == named
    for variable, value in zip(net.model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


@pytest.mark.parametrize("layer", [L.Dropout(0.5, **D64), L.GaussianNoise(1.0, **D64)])
def test_a_random_layer_that_obeys_is_no_fault(layer):
    net, examples = with_layer(layer)
    line = twice(net, examples)
    assert line.verdict == "ok" and line.value == 0 and "to the last bit" in line.meaning
    assert rows.random_layers(net.model) == [layer.name]


def test_a_random_loss_is_found():
    p = ridge()
    noise = lambda z: tf.random.uniform(tf.shape(z)[:1], dtype=z.dtype)  # noqa: E731
    net = GenericNeuralNet(p.net.model, lambda y, z: squares(y, z) + noise(z))
    line = twice(net, p.train)
    assert line.verdict == "fail" and "Two passes over the same rows differ" in line.meaning
    answers = rows.Answers.of(p.net, p.train, None)
    gap = 1e-14 * np.abs(answers.losses).max()
    line = rows.same_twice(p.net, replace(answers, losses=answers.losses + gap))
    assert line.verdict == "ok" and 0 < line.value < 1e-13 and "but for rounding" in line.meaning


def test_inputs_by_name():
    a, b = (keras.Input((2,), name=name, **D64) for name in "ab")
    net = GenericNeuralNet(keras.Model([a, b], L.Dense(1, **D64)(L.Add(**D64)([a, b]))), "mse")
    x = np.random.default_rng(0).standard_normal((9, 2))
    examples = Examples({"a": x, "b": 2 * x}, x[:, 0])
    assert twice(net, examples).verdict == rows.separate(net, examples).verdict == "ok"


# --- finite values --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        (lambda y, z: -tf.math.log(tf.nn.relu(z[:, 0])), "loss"),
        (lambda y, z: tf.sqrt(tf.abs(z[:, 0])), "gradient"),
    ],
)
def test_rows_that_are_not_finite_are_found(loss, what):
    net = dense_net(1, 2, loss)
    net.theta = np.array([1.0, 1, 0])
    x = np.random.default_rng(0).uniform(1, 2, (30, 2))
    good = Examples(x.copy(), np.ones(30))
    x[[4, 17]] = [[1.0, -1], [2, -2]]  # the output of these rows is exactly 0
    examples = Examples(x, np.ones(30))
    line = rows.finite(net, rows.Answers.of(net, examples, 7), "train")
    assert line.name == "finite train rows" and line.verdict == "fail" and line.value == 2
    assert f"The {what} of 2 of 30 rows is NaN or infinite (row 4, 17)" in line.meaning
    line = rows.finite(net, rows.Answers.of(net, good, None), "test")
    assert line.name == "finite test rows" and line.verdict == "ok" and line.value == 0
    # The other checks ignore rows that are not finite, so they find no fault.
    assert rows.separate(net, examples).verdict == twice(net, examples).verdict == "ok"


def test_many_bad_rows_are_not_all_listed():
    net, examples = tanh_net()
    answers = replace(rows.Answers.of(net, examples, None), losses=np.full(20, np.nan))
    line = rows.finite(net, answers, "train")
    assert line.value == 20 and "(row 0, 1, 2, 3, 4 and 15 more)" in line.meaning


# --- rows that do not fit, and the choice of rows -------------------------------------------------


def test_examples_that_do_not_fit_are_a_line():
    p = ridge()
    assert rows.fits(p.net, p.train, "train").verdict == "ok"
    line = rows.fits(p.net, Examples(np.ones((4, 9)), np.ones(4)), "test")
    assert line.name == "test fits the net" and line.verdict == "fail"
    assert line.meaning.startswith("test.x must have rows of shape (4,)")


def test_samples_are_fixed():
    np.testing.assert_array_equal(rows.sample(5, 64), np.arange(5))
    few = rows.sample(1000, 64)
    np.testing.assert_array_equal(few, rows.sample(1000, 64))
    assert len(few) == 64 and (np.diff(few) > 0).all() and few[-1] > 900
