import keras
import numpy as np
import pytest
import tensorflow as tf

from influence import (
    BinaryLogisticRegression,
    Examples,
    GenericNeuralNet,
    MulticlassLogisticRegression,
    SmoothHinge,
)
from influence.preflight import labels, rows
from tests.influence.problems import dense_net, ridge


def blobs(c=3, n=60, spread=1 / 3):
    """Return (x, y): c well separated classes of points in the plane."""
    rng = np.random.default_rng(0)
    y = np.arange(n) % c
    angle = 2 * np.pi * y / c
    return 2 * np.stack([np.cos(angle), np.sin(angle)], 1) + spread * rng.standard_normal((n, 2)), y


def softmax(c=3, outputs=None):
    x, y = blobs(c)
    return MulticlassLogisticRegression(2, outputs or c, weight_decay=1e-3), x, y


def plausible(net, train, test=None, batch_size=None):
    of_test = None if test is None else rows.Answers.of(net, test, batch_size)
    return labels.plausible(net, rows.Answers.of(net, train, batch_size), of_test)


def test_class_numbers_from_one_are_found_where_no_output_is_left():
    net, x, y = softmax()
    assert labels.in_range(net, Examples(x, y)) is None
    line = labels.in_range(net, Examples(x, y + 1))
    assert line.verdict == "fail" and line.value == np.count_nonzero(y == 2)
    assert "from 1 to 3 against 3 outputs" in line.meaning and "off by one" in line.meaning
    assert line.remedy == "Subtract 1 from the labels."
    line = labels.in_range(net, Examples(x, y - 1))
    assert line.value == np.count_nonzero(y == 0) and "off by one" not in line.meaning
    assert line.remedy == "Number the classes from 0."


def test_only_class_numbers_have_a_range():
    p = ridge()
    assert labels.in_range(p.net, p.train) is None
    net, x, y = softmax()
    assert labels.in_range(net, Examples(x, np.eye(3)[y] * 7)) is None
    assert labels.in_range(net, Examples(x, y + 0.5)) is None


def test_class_numbers_from_one_are_found_where_an_output_was_added_for_them():
    net, x, y = softmax(outputs=4)
    train = Examples(x, y + 1)
    net.fit(train)
    line = plausible(net, train)
    assert line.verdict == "warn" and line.value == 1
    assert "class 0 of the model's 4: labels that begin at 1 look off by one" in line.meaning
    line = plausible(net, Examples(x, 2 * (y > 0)))
    assert line.verdict == "warn" and line.value == 2 and "class 1, 3 of the" in line.meaning
    assert "off by one" not in line.meaning


@pytest.mark.parametrize(("by", "says"), [(1, "-1 added it is 100%"), (2, "+1 added it is 100%")])
@pytest.mark.parametrize("one_hot", [False, True])
def test_labels_coded_otherwise_than_in_training_are_found(by, says, one_hot):
    net, x, y = softmax()
    net.fit(Examples(x, y))
    if one_hot:
        loss = keras.losses.CategoricalCrossentropy(from_logits=True)
        net = GenericNeuralNet(net.model, loss)

    def coded(y):
        return Examples(x, np.eye(3)[y] if one_hot else y)

    line = plausible(net, coded(y), batch_size=7)
    assert line.verdict == "ok" and line.value == np.mean(net.outputs(x).argmax(axis=1) == y) == 1
    line = plausible(net, coded((y + by) % 3))
    assert line.verdict == "fail" and line.value == 0 and says in line.meaning


@pytest.mark.parametrize("kind", ["logits", "probabilities", "squares", "signs"])
def test_swapped_labels_are_found(kind):
    x, y = blobs(2)
    if kind == "signs":
        net, y = SmoothHinge(2, 0.1), 2 * y - 1
    else:
        net = BinaryLogisticRegression(2)
    net.fit(Examples(x, y))
    theta = net.theta
    if kind == "logits":
        # The outputs are then near 0, with both signs. They are logits, not probabilities.
        net.theta = 0.01 * theta
    if kind == "probabilities":
        outputs = keras.layers.Activation("sigmoid", dtype="float64")(net.model.outputs[0])
        net = GenericNeuralNet(keras.Model(net.model.inputs, outputs), "binary_crossentropy")
    elif kind == "squares":
        net = dense_net(1, 2, "mse")
        net.theta = np.append(theta, 0.5)
    line = plausible(net, Examples(x, y))
    assert line.verdict == "ok" and line.value == 1
    line = plausible(net, Examples(x, -y if kind == "signs" else 1 - y))
    assert line.verdict == "fail" and line.value == 0 and "look swapped" in line.meaning


def test_what_is_no_class_is_compared_to_nothing():
    p = ridge()
    counts = GenericNeuralNet(p.net.model, "poisson")
    bits = GenericNeuralNet(p.net.model, lambda y, z: (tf.cast(y, z.dtype) - z[:, 0]) ** 2)
    for net, y in (
        (p.net, p.train.y),
        (counts, np.arange(40) % 5),
        # The labels are 0 and 1. But for a loss given as a function, the check does not know which
        # outputs mean class 1, so it compares no accuracy.
        (bits, np.arange(40) % 2),
        (p.net, 2 + np.arange(40) % 2),
    ):
        line = plausible(net, Examples(p.train.x, y))
        assert line.verdict == "ok" and np.isnan(line.value) and "not classes" in line.meaning


def test_a_loss_above_that_of_guessing_is_found():
    net, x, y = softmax()
    net.theta = 3 * np.array([1.0, -1, 0, 1, -1, 0])
    train = Examples(x, y)
    line = plausible(net, train)
    mean = net.losses(x, y).mean()
    assert mean > np.log(3)
    assert line.verdict == "warn" and line.value == pytest.approx(mean, rel=1e-12)
    assert "above the 1.1 of guessing among 3 classes" in line.meaning
    net.theta = np.zeros(6)  # with theta = 0 the net guesses
    assert plausible(net, train).verdict == "ok"


def test_a_class_of_the_test_rows_alone_is_found():
    x, y = blobs()
    net = dense_net(2, 2, lambda y, z: tf.reduce_logsumexp(z, 1) - z[:, 0])
    train = Examples(x[y < 2], y[y < 2])
    net.theta = np.array([1.0, -1, 0, 0, 0, 0])
    assert plausible(net, train, train.take([0])).verdict == "ok"
    line = plausible(net, train, Examples(x[:3], np.array([0, 1, 7])))
    assert line.verdict == "warn" and line.value == 1 and "Test rows have class 7" in line.meaning


def test_a_class_for_every_step_counts_every_step():
    net = dense_net(6, 2, "mse")
    outputs = keras.layers.Reshape((2, 3), dtype="float64")(net.model.outputs[0])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    net = GenericNeuralNet(keras.Model(net.model.inputs, outputs), loss)
    x, _ = blobs()
    y = net.outputs(x).argmax(axis=-1)
    y[:, 1] = (y[:, 1] + 1) % 3
    seen = len(np.unique(y))
    line = plausible(net, Examples(x, y))
    assert y.shape == (60, 2) and seen == 3
    assert "50% of the rows' labels are the predicted class" in line.meaning.lower()


def test_sample_weights_do_not_make_a_loss_look_like_guessing():
    net, x, y = softmax()
    net.fit(Examples(x, y))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    net = GenericNeuralNet(net.model, loss)
    line = plausible(net, Examples(x, y, np.full(len(y), 1000.0)))
    assert line.verdict == "ok"
