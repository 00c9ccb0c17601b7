"""Tests of tracin against its formula in closed form and against actual training."""

import sys

import keras
import numpy as np
import pytest

from influence import History
from influence.scores.tracin import tracin
from tests.influence import recorded
from tests.influence.problems import logistic, relative_error, ridge, tanh_net, through_keras

# `influence.scores.tracin` is the function that the package exports, not the module.
MODULE = sys.modules["influence.scores.tracin"]

RATES = [0.1, 0.05, 0.2]


@pytest.fixture(scope="module")
def problems():
    softmax = logistic("softmax", intercept=True)
    return {"ridge": ridge(), "softmax": softmax, "softmax by the tape": through_keras(softmax)}


def checkpoints(problem):
    start = np.random.default_rng(0).standard_normal((3, len(problem.theta)))
    return start + problem.theta


@pytest.mark.parametrize("problem", ["ridge", "softmax", "softmax by the tape"])
def test_is_the_sum_over_checkpoints(problem, problems):
    p = problems[problem]
    thetas, before = checkpoints(p), p.theta
    expected = sum(
        rate * p.measured.gradients(theta) @ p.oracle.gradients(theta).T
        for rate, theta in zip(RATES, thetas, strict=True)
    )
    got = tracin(p.net, p.train, p.test, thetas=thetas, learning_rates=RATES)
    assert relative_error(got.reduction_by_training, expected) < 1e-11
    np.testing.assert_array_equal(got.rows, np.arange(len(p.train)))
    np.testing.assert_array_equal(p.net.theta, before)
    some = tracin(p.net, p.train, p.test, [7, 2], thetas=thetas, learning_rates=RATES)
    assert relative_error(some[:], np.asarray(expected)[:, [7, 2]]) < 1e-11
    assert some.rows.tolist() == [7, 2]


@pytest.mark.parametrize(("steps", "tolerance"), [(20, 0.1), (200, 0.01)])
def test_is_what_training_on_the_row_took_off_the_loss(steps, tolerance):
    """Train by small gradient steps on one row at a time.

    The scores of all steps must sum to the fall of each test loss, in sign, scale and unit.
    """
    net, train = tanh_net()
    order = np.arange(steps) % 4  # steps on rows 0, 1, 2, 3 in turn
    rate = 0.4 / steps
    test = train.take([10, 11, 12])
    first = net.losses(test.x, test.y)
    theta, thetas = net.theta, []
    start = theta
    try:
        for row in order:
            thetas.append(theta)
            net.theta = theta
            theta = theta - rate * net.gradients(train.x[[row]], train.y[[row]])[0]
        net.theta = theta
        last = net.losses(test.x, test.y)
    finally:
        net.theta = start
    total = np.zeros(3)
    for row in range(4):  # `own` holds the thetas before each step on this row
        own = np.array(thetas)[order == row]
        got = tracin(net, train, test, [row], thetas=own, learning_rates=np.full(len(own), rate))
        total += got[:, 0]
    # The relative error is proportional to the step size.
    assert relative_error(total, first - last) < tolerance
    assert np.linalg.norm(first - last) > 1


def test_a_row_like_the_test_point_is_a_proponent(problems):
    p = problems["ridge"]
    got = tracin(p.net, p.train, p.train, thetas=checkpoints(p), learning_rates=RATES)
    assert (np.diag(got[:]) > 0).all()


def test_blocks_and_batches_change_nothing(problems, monkeypatch):
    p = problems["softmax by the tape"]
    thetas = checkpoints(p)
    expected = tracin(p.net, p.train, p.test, thetas=thetas, learning_rates=RATES)
    monkeypatch.setattr(MODULE, "VECTORS", 3 * 8 * p.net.num_parameters)
    got = tracin(p.net, p.train, p.test, thetas=thetas, learning_rates=RATES, batch_size=7)
    assert relative_error(got[:], expected[:]) < 1e-11


def test_the_net_stays_at_its_theta(problems, monkeypatch):
    p = problems["ridge"]
    directional, thetas = type(p.net).directional, checkpoints(p)
    before, asked = p.net.theta, []

    def watched(net, *batch):
        asked.append(net.theta)
        np.testing.assert_array_equal(p.net.theta, before)
        return directional(net, *batch)

    monkeypatch.setattr(type(p.net), "directional", watched)
    tracin(p.net, p.train, p.test, thetas=thetas, learning_rates=RATES)
    np.testing.assert_array_equal(asked, thetas)


def test_single_precision_stays_single():
    p = ridge(dtype="float32")
    thetas = checkpoints(p)
    got = tracin(p.net, p.train, p.test, thetas=thetas, learning_rates=RATES)
    assert got[:].dtype == np.float32
    double = ridge()
    expected = tracin(double.net, double.train, double.test, thetas=thetas, learning_rates=RATES)
    assert relative_error(got[:], expected[:]) < 1e-5


THETAS = np.zeros((2, 5))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"net": "net"}, TypeError, "^net must be a GenericNeuralNet, got str"),
        ({"train": 1}, TypeError, r"^train must be Examples\(x, y\), got int"),
        ({"test": 1}, TypeError, r"^test must be Examples\(x, y\), got int"),
        ({"rows": [40]}, IndexError, r"^rows must lie in \[0, 40\), got 40"),
        ({"thetas": np.zeros(5)}, ValueError, r"^thetas must have shape \(t, 5\), .* got \(5,\)"),
        ({"thetas": THETAS.T}, ValueError, r"^thetas must have shape \(t, 5\), .* got \(5, 2\)"),
        ({"thetas": THETAS[:0]}, ValueError, r"^thetas must have shape .* got \(0, 5\)"),
        (
            {"thetas": THETAS + [[0], [np.nan]]},
            ValueError,
            "^thetas must be finite, .* checkpoint 1",
        ),
        ({"learning_rates": [1.0]}, ValueError, "^learning_rates must have one for each of 2 che"),
        ({"learning_rates": 0.1}, ValueError, r"^learning_rates must have one .* got shape \(\)"),
        ({"learning_rates": [1, -1]}, ValueError, "^learning_rates must be finite and not negati"),
        ({"batch_size": 0}, ValueError, "^batch_size must be a positive integer or None, got 0"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(options, error, message, problems, monkeypatch):
    p = problems["ridge"]
    monkeypatch.setattr(type(p.net), "gradients", lambda *_: pytest.fail("the work had begun"))
    given = {"net": p.net, "train": p.train, "test": p.test, "thetas": THETAS}
    with pytest.raises(error, match=message):
        tracin(**{**given, "learning_rates": [0.1, 0.1], **options})


# --- the history of a training --------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("history")
    return recorded.train(folder, epochs=4, batch_size=16), folder


@pytest.mark.parametrize(
    ("chosen", "epochs", "steps"),
    [(None, [0, 1, 2, 3], [1, 1, 1, 1]), ([0, 3, 4], [0, 3], [3, 1]), ([2], [2], [2])],
)
def test_a_history_is_summed_over_its_checkpoints(trained, chosen, epochs, steps):
    model, folder = trained
    x, y = recorded.rows()
    x_test, y_test = recorded.rows(7, seed=1)
    history = History.load(folder)
    expected = sum(
        recorded.RATE
        * count
        * recorded.gradients(theta, x_test, y_test)
        @ recorded.gradients(theta, x, y).T
        for theta, count in zip(history.thetas[epochs], steps, strict=True)
    )
    for given in (history, folder):
        got = tracin(model, (x, y), (x_test, y_test), history=given, checkpoints=chosen)
        # The history has the learning rate in float32, so the scores have an error of about 1e-7.
        assert relative_error(got.reduction_by_training, expected) < 1e-6


def test_a_history_says_what_full_batches_took_off_the_loss(tmp_path):
    """Compare with the fall of each test loss in a training by small steps on all rows."""
    sgd = keras.optimizers.SGD(0.01)
    model = recorded.train(tmp_path, epochs=3, found=recorded.model(sgd))
    history = History.load(tmp_path)
    x, y = recorded.rows()
    test = recorded.rows(7, seed=1)
    first, last = (recorded.losses(history.theta(epoch), *test) for epoch in (0, 3))
    got = tracin(model, (x, y), test, history=history)[:].sum(axis=1) / history.batch_size
    # The steps also followed the gradient of the penalty, which TracIn leaves out. Add this part.
    l2 = np.append(np.full(12, 2 * recorded.PENALTY), np.zeros(3))
    for theta in history.thetas[:3]:
        got = got + 0.01 * recorded.gradients(theta, *test) @ (l2 * theta)
    assert relative_error(got, first - last) < 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "^thetas and learning_rates must be given, or the history"),
        ({"thetas": THETAS}, "^thetas and learning_rates must be given, or the history"),
        ({"history": 1, "thetas": THETAS}, "^thetas and learning_rates must be left out beside h"),
        ({"checkpoints": [9]}, r"^checkpoints must be epochs .* \[0, 1, 2, 3, 4\], got \[9\]"),
        ({"checkpoints": [4]}, "^checkpoints must have one before the last epoch, 4, got"),
        (
            {"thetas": THETAS, "learning_rates": [1, 1], "checkpoints": [0], "history": None},
            "^checkpoints must be left out beside thetas",
        ),
    ],
)
def test_a_bad_choice_of_a_history_is_refused(trained, options, message):
    model, folder = trained
    given = {"history": folder} | options if "checkpoints" in options else options
    with pytest.raises(ValueError, match=message):
        tracin(model, recorded.rows(), recorded.rows(7, seed=1), **given)


def test_the_history_of_other_rows_or_another_net_is_refused(trained, problems):
    model, folder = trained
    x, y = recorded.rows()
    with pytest.raises(ValueError, match="^train must have the labels of the history"):
        tracin(model, (x, np.roll(y, 1)), (x, y), history=folder)
    p = problems["ridge"]
    with pytest.raises(ValueError, match="^net must have the 15 weights of the history"):
        tracin(p.net, p.train, p.test, history=folder)
