"""Tests of measurements against closed forms, finite differences and exact refits."""

from functools import partial

import keras
import numpy as np
import pytest
import scipy.special
import scipy.stats
import tensorflow as tf

from influence import Direct, Examples, GenericNeuralNet, Influence, SmoothHinge
from influence.net.measurements import adversarial_loss, logit, margin
from tests import oracles
from tests.influence.problems import dense_net, logistic, relative_error, ridge, through_keras

RNG = np.random.default_rng(0)
LOGITS = 3 * RNG.standard_normal((6, 4))
CLASSES = np.array([0, 3, 1, 2, 2, 0])
PROBABILITY = scipy.special.softmax(LOGITS, axis=1)[np.arange(6), CLASSES]
LOGIT = LOGITS[:, :1]
BITS = np.array([0, 1, 1, 0, 1, 0])
SIGMOID = scipy.special.expit(LOGIT[:, 0])
BIT_PROBABILITY = np.where(BITS == 1, SIGMOID, 1 - SIGMOID)


def log_odds(p):
    return np.log(p) - np.log1p(-p)


def call(measurement, y, output):
    return measurement(tf.constant(y), tf.constant(output)).numpy()


# --- the measurements as functions -----------------------------------------------------------


@pytest.mark.parametrize(
    "y", [CLASSES, CLASSES[:, None], CLASSES.astype(float), np.eye(4)[CLASSES]]
)
def test_of_many_classes(y):
    np.testing.assert_allclose(call(margin, y, LOGITS), log_odds(PROBABILITY), rtol=1e-12)
    got = call(adversarial_loss, y, LOGITS)
    np.testing.assert_allclose(got, -np.log1p(-PROBABILITY), rtol=1e-12)
    np.testing.assert_array_equal(call(logit(2), y, LOGITS), LOGITS[:, 2])


@pytest.mark.parametrize("output", [LOGIT, LOGIT[:, 0]])
@pytest.mark.parametrize("y", [BITS, BITS[:, None], BITS.astype(float), 2 * BITS - 1])
def test_of_two_classes_by_one_logit(y, output):
    np.testing.assert_allclose(call(margin, y, output), log_odds(BIT_PROBABILITY), rtol=1e-12)
    got = call(adversarial_loss, y, output)
    np.testing.assert_allclose(got, -np.log1p(-BIT_PROBABILITY), rtol=1e-12)
    np.testing.assert_array_equal(call(logit(1), y, output), LOGIT[:, 0])
    np.testing.assert_array_equal(call(logit(0), y, output), -LOGIT[:, 0])


def test_two_logits_and_one_agree():
    two = np.column_stack([np.zeros(6), LOGIT[:, 0]])
    np.testing.assert_allclose(call(margin, BITS, two), call(margin, BITS, LOGIT), rtol=1e-12)


def test_certainty_does_not_saturate():
    sure = np.array([[800.0, 0.0, 1.0], [-800.0, 0.0, 1.0]])
    first = np.zeros(2, int)
    others = np.logaddexp(0, 1)
    np.testing.assert_allclose(call(margin, first, sure), [800 - others, -800 - others])
    np.testing.assert_allclose(call(adversarial_loss, first, sure), [800 - others, 0.0])
    z = tf.constant(sure)
    with tf.GradientTape() as tape:
        tape.watch(z)
        value = margin(tf.constant(first), z)
    slope = np.array([1, -1 / (1 + np.e), -np.e / (1 + np.e)])
    np.testing.assert_allclose(tape.gradient(value, z), [slope, slope], rtol=1e-12)


# --- influence on measurements ---------------------------------------------------------------

# These functions take logits Z (n, c). A single logit gets a column of zeros for class 0.
NUMPY = {
    "margin": lambda y, Z: log_odds(scipy.special.softmax(Z, axis=1)[np.arange(len(y)), y]),
    "adversarial_loss": lambda y, Z: (
        -np.log1p(-scipy.special.softmax(Z, axis=1)[np.arange(len(y)), y])
    ),
    "logit(1)": lambda y, Z: Z[:, 1],
}
OURS = {"margin": margin, "adversarial_loss": adversarial_loss, "logit(1)": logit(1)}


def measured(problem, name, theta):
    """Return the measurement at the given theta, (m,), computed by NumPy."""
    return NUMPY[name](problem.test.y, problem.measured.features @ problem.measured._weights(theta))


@pytest.fixture(scope="module")
def problems():
    softmax = logistic("softmax", 400, weight_decay=0.2, intercept=True)
    return {
        "softmax": softmax,
        "sigmoid": logistic("sigmoid", 400, weight_decay=0.2),
        "softmax by the tape": through_keras(softmax),
    }


PROBLEMS = ["softmax", "sigmoid", "softmax by the tape"]


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_scores_are_the_measurements_slope_along_the_change(problem, name, problems):
    p = problems[problem]
    rows = [5, 0, 77]
    moves = p.oracle.predicted_parameters(p.theta, rows)
    slope = partial(oracles.central_difference, partial(measured, p, name), p.theta, step=0.1)
    expected = np.stack([slope(move) for move in moves], axis=1)
    scores = Influence(p.net, p.train, solver=Direct()).scores(p.test, rows, measurement=OURS[name])
    assert scores.measurement == name
    # The finite differences have an error of about 1e-8 of their size.
    assert relative_error(scores[:], expected) < 1e-8


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("problem", ["softmax", "sigmoid"])
def test_scores_are_the_changes_of_exact_refits(problem, name, problems):
    p = problems[problem]
    rows = np.arange(0, 400, 16)
    influence = Influence(p.net, p.train, solver=Direct())
    predicted = influence.scores(p.test, rows, measurement=OURS[name])
    before = measured(p, name, p.theta)
    moves = p.oracle.actual_parameters(p.theta, rows)
    after = [measured(p, name, p.theta + move) for move in moves]
    actual = (np.stack(after, axis=1) - before[:, None]).ravel()
    line = scipy.stats.linregress(predicted[:].ravel(), actual)
    # First order predicts too small a change: the actual change is about 1 / (1 - leverage) times
    # as large. The leverages are near 0.01, so the slope is a little above 1.
    assert 0.98 < line.slope < 1.06 and line.rvalue > 0.998
    assert abs(line.intercept) < 0.02 * actual.std()


def test_the_loss_as_a_measurement_is_the_loss(problems):
    p = problems["softmax"]
    influence = Influence(p.net, p.train, solver=Direct())
    expected = influence.scores(p.test)
    assert expected.measurement == "loss"
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    got = influence.scores(p.test, measurement=loss)
    assert got.measurement == "sparse_categorical_crossentropy"
    assert relative_error(got[:], expected[:]) < 1e-10
    s_test = influence.s_test(p.test, measurement=loss).x
    assert relative_error(s_test, expected.solution.x) < 1e-10


def prediction(y, output):
    return output[:, 0]


def test_any_function_of_the_output_will_do():
    p = ridge()
    influence = Influence(p.net, p.train, solver=Direct(), approximation="first_order")
    got = influence.scores(p.test, measurement=prediction)
    every = np.arange(len(p.train))
    expected = p.measured.features @ p.oracle.predicted_parameters(p.theta, every).T
    assert got.measurement == "prediction"
    assert relative_error(got[:], expected) < 1e-11


@pytest.mark.parametrize("problem", ["sigmoid", "softmax by the tape"])
def test_perturbation_takes_them_too(problem, problems):
    p = problems[problem]
    influence = Influence(p.net, p.train, solver=Direct())
    got = influence.perturbation(p.test, [4], measurement=margin)
    assert got.shape == (7, 1, 5)
    features = p.oracle.features.copy()

    def after(value):
        features[4, 2] = value[0]
        return measured(p, "margin", p.oracle.on(features, p.oracle.y).minimum(p.theta))

    at = np.array([features[4, 2]])
    expected = oracles.central_difference(after, at, np.ones(1))
    assert relative_error(got[:, 0, 2], expected) < 1e-7


def test_labels_of_an_svm():
    net = SmoothHinge(3, t=0.5, weight_decay=0.1)
    x = RNG.standard_normal((30, 3))
    train = Examples(x, np.where(x[:, 0] > 0, 1, -1))
    net.fit(train)
    influence = Influence(net, train, solver=Direct(), approximation="first_order")
    moves = influence.parameters([3, 8])
    # The margin of a row is y x w, so a move of w changes it by y x times the move.
    expected = (train.y[:, None] * train.x) @ moves.T
    got = influence.scores(train, [3, 8], measurement=margin)
    assert relative_error(got[:], expected) < 1e-11


def test_a_layer_frozen_later_is_still_part_of_theta():
    p = through_keras(logistic("softmax"))
    influence = Influence(p.net, p.train, solver=Direct())
    expected = influence.scores(p.test, measurement=margin)
    p.net.model.layers[-1].trainable = False
    assert relative_error(influence.scores(p.test, measurement=margin)[:], expected[:]) < 1e-12


def test_measuring_shares_the_model_and_its_penalty():
    p = logistic("softmax")
    view = p.net.measuring(margin)
    assert type(view) is GenericNeuralNet and view.model is p.net.model
    assert view.penalty() == pytest.approx(p.net.penalty(), rel=1e-12)
    p.net.theta = p.theta + 0.5
    np.testing.assert_array_equal(view.theta, p.net.theta)
    expected = NUMPY["margin"](p.test.y, p.measured.features @ p.measured._weights(p.theta))
    np.testing.assert_allclose(view.losses(p.test.x, p.test.y), expected, rtol=1e-10)


# --- arguments that are refused --------------------------------------------------------------


def total(y, output):
    return tf.reduce_sum(output)


def mixing(y, output):
    return output[:, 0] * tf.reduce_sum(output[:, 1])


def accuracy(y, output):
    return tf.cast(tf.argmax(output, axis=1) == tf.cast(y, tf.int64), output.dtype)


def misfit(y, output):
    return output[:, 0] * tf.ones(17, output.dtype)


@pytest.mark.parametrize(
    ("measurement", "error", "message"),
    [
        (3, TypeError, r"^measurement must be a Keras loss, its name or a callable .*, got int\."),
        (
            "margin",
            ValueError,
            "^measurement must be .* Keras loss or a function such as influence"
            r"\.measurements\.margin or logit\(label\), got 'margin'",
        ),
        (logit, TypeError, r"^measurement must be logit\(label\) of a class number, got logit its"),
        (
            keras.losses.MeanSquaredError(reduction="sum"),
            ValueError,
            "^measurement must not be reduced by a sum",
        ),
        (total, ValueError, r"^measurement must give one number per example, got shape \(\)"),
        (mixing, ValueError, "^measurement must depend on its own row alone"),
        (accuracy, ValueError, "^measurement must be differentiable .* from 'accuracy'; argmax"),
        (misfit, ValueError, "^test.y does not fit the measurement 'misfit'"),
        (logit(3), IndexError, r"^label must lie in \[0, 3\) for this model, got 3\."),
    ],
)
def test_bad_measurements_are_refused_before_any_work(
    measurement, error, message, problems, monkeypatch
):
    p = problems["softmax"]
    influence = Influence(p.net, p.train)
    monkeypatch.setattr(
        "influence.scores.inverse.Inverse.solve", lambda *_: pytest.fail("the work had begun")
    )
    for question in (
        lambda: influence.scores(p.test, measurement=measurement),
        lambda: influence.adding(p.test, p.test, measurement=measurement),
        lambda: influence.perturbation(p.test, [0], measurement=measurement),
        lambda: influence.group(p.test, [0], measurement=measurement),
        lambda: influence.relative(p.test, [0], measurement=measurement),
    ):
        with pytest.raises(error, match=message):
            question()


def test_a_loss_without_a_gradient_is_refused():
    p = through_keras(logistic("softmax"))
    with pytest.raises(ValueError, match="^loss must be differentiable by the model's output"):
        Influence(GenericNeuralNet(p.net.model, accuracy), p.train)


@pytest.mark.parametrize("measurement", [margin, adversarial_loss, logit(0)])
def test_probabilities_are_refused(measurement):
    net = dense_net(3, 5, "sparse_categorical_crossentropy")
    message = "^loss must take logits for the measurement '.*', got 'sparse_categorical_crossentro"
    with pytest.raises(ValueError, match=message):
        net.measuring(measurement)


@pytest.mark.parametrize(
    ("question", "error", "message"),
    [
        (
            lambda: margin(tf.zeros((2, 3)), tf.zeros((2, 3, 4))),
            ValueError,
            r"^output must be logits \(n, c\) or \(n,\), got shape ",
        ),
        (
            lambda: logit(2)(tf.zeros(3), tf.zeros((3, 1))),
            IndexError,
            r"^label must lie in \[0, 2\)",
        ),
        (lambda: logit(1.0), TypeError, r"^label must be a class number, got 1\.0"),
        (lambda: logit(True), TypeError, "^label must be a class number, got True"),
        (lambda: logit(-1), ValueError, "^label must be a class number from 0 up, got -1"),
    ],
)
def test_bad_outputs_and_labels(question, error, message):
    with pytest.raises(error, match=message):
        question()
