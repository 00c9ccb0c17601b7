"""Tests of scores, additions and perturbations against closed forms and exact refits."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
import scipy.sparse
import scipy.stats

from influence import CG, Direct, Examples, GaussNewton, GenericNeuralNet, Influence, LiSSA, Scores
from influence.net.measurements import margin
from tests import oracles
from tests.influence.problems import logistic, relative_error, ridge, tanh_net, through_keras

ROOT = Path(__file__).resolve().parents[3]
EXACT = {"Direct": Direct(), "CG": CG(rtol=1e-11)}
ROWS = [30, 2, 17]


@pytest.fixture(scope="module")
def problems():
    """Return problems by name. Some have closed forms, and some penalise the intercept."""
    softmax = logistic("softmax", intercept=True)
    return {
        "ridge": ridge(),
        "ridge, strong penalty": ridge(l2=5.0),
        "softmax": softmax,
        "sigmoid": logistic("sigmoid"),
        "sigmoid, weak penalty": logistic("sigmoid", weight_decay=1e-4),
        "sigmoid, strong penalty": logistic("sigmoid", weight_decay=5.0),
        "softmax by the tape": through_keras(softmax),
    }


PROBLEMS = ["ridge", "softmax", "sigmoid", "softmax by the tape"]
PENALTIES = ["ridge, strong penalty", "sigmoid, weak penalty", "sigmoid, strong penalty"]


@pytest.fixture(scope="module")
def tanh():
    """Return (net, train), a network with a penalty, far from a minimum."""
    return tanh_net(l2=0.05)


# --- closed forms ----------------------------------------------------------------------------


@pytest.mark.parametrize("solver", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_scores_are_those_of_the_closed_form(problem, solver, problems):
    p = problems[problem]
    rows = np.arange(len(p.train))
    expected = p.oracle.predicted_changes(p.theta, p.measured, rows)
    scores = Influence(p.net, p.train, solver=solver, approximation="first_order").scores(p.test)
    # The solver's tolerance, 1e-11, times the condition number, below 100, is at most 1e-9.
    assert relative_error(scores.change_if_removed, expected) < 1e-9
    np.testing.assert_array_equal(scores.rows, rows)
    s_test = np.linalg.solve(p.oracle.hessian(p.theta), p.measured.gradients(p.theta).T)
    assert relative_error(scores.solution.x, s_test) < 1e-9
    assert scores.solution.converged.all() and len(scores.solution.residual) == len(p.test)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_chosen_rows_come_in_the_order_chosen(problem, problems):
    p = problems[problem]
    influence = Influence(p.net, p.train, solver=Direct())
    some = influence.scores(p.test, ROWS)
    assert some.shape == (len(p.test), 3) and some.rows.tolist() == ROWS
    assert relative_error(some[:], influence.scores(p.test)[:, ROWS]) < 1e-12
    reverse = np.arange(len(p.train))[::-1]
    backwards = influence.scores(p.test, reverse)
    assert relative_error(backwards[:], influence.scores(p.test)[:, ::-1]) < 1e-12
    derivatives = influence.perturbation(p.test, np.arange(len(p.train)))[:, ROWS]
    assert relative_error(influence.perturbation(p.test, ROWS), derivatives) < 1e-12


@pytest.mark.parametrize("problem", PROBLEMS)
def test_parameters_are_those_of_the_closed_form(problem, problems):
    p = problems[problem]
    got = Influence(p.net, p.train, solver=Direct()).parameters(ROWS)
    assert got.shape == (3, p.net.num_parameters)
    assert relative_error(got, p.oracle.predicted_parameters(p.theta, ROWS)) < 1e-11


@pytest.mark.parametrize("problem", PROBLEMS)
def test_self_influence_is_the_diagonal_of_scores(problem, problems):
    p = problems[problem]
    influence = Influence(p.net, p.train, solver=Direct(), approximation="first_order")
    table = influence.scores(p.train)
    got = influence.self_influence()
    assert relative_error(got, np.diag(table[:])) < 1e-11
    assert relative_error(influence.self_influence([7, 3]), got[[7, 3]]) < 1e-12
    # Removing a row increases its own loss, for most rows.
    assert (got > 0).mean() > 0.8


def test_damping_and_gauss_newton_enter_as_said(tanh):
    net, train = tanh
    G = GaussNewton(net, train).dense() + 0.3 * np.eye(net.num_parameters)
    test = Examples(train.x[:3] + 0.1, train.y[:3])
    own = net.gradients(train.x, train.y) + net.penalty_gradient()
    expected = net.gradients(test.x, test.y) @ np.linalg.solve(G, own.T) / len(train)
    how = {"damping": 0.3, "curvature": GaussNewton, "approximation": "first_order"}
    influence = Influence(net, train, solver=CG(rtol=1e-11), **how)
    assert relative_error(influence.scores(test)[:], expected) < 1e-8


# --- sign, scale and bias against exact refits -----------------------------------------------


@pytest.mark.parametrize(
    ("kind", "weight_decay"),
    [("softmax", 0.01), ("softmax", 1.0), ("sigmoid", 0.01), ("sigmoid", 1.0), ("ridge", 1.0)],
)
def test_scores_are_the_changes_of_exact_refits(kind, weight_decay):
    n = 1000
    if kind == "ridge":
        p = ridge(n, l2=weight_decay / 2)
    else:
        p = logistic(kind, n, weight_decay=weight_decay, intercept=True)
    rows = np.arange(0, n, 20)
    predicted = Influence(p.net, p.train, solver=Direct()).scores(p.test, rows)[:].ravel()
    actual = p.oracle.actual_changes(p.theta, p.measured, rows).ravel()
    line = scipy.stats.linregress(predicted, actual)
    # First order predicts too small a change, because it ignores the row's leverage. This raises
    # the slope above 1 by about the mean leverage, which is at most d/n = 18/1000. If L(z) lacked
    # the penalty, every predicted change would be shifted, and the intercept would not be 0.
    assert 0.99 < line.slope < 1.03
    assert line.rvalue > 0.999
    assert abs(line.intercept) < 0.01 * actual.std()
    large = np.abs(actual) > 0.05 * actual.std()
    assert (np.sign(predicted) == np.sign(actual))[large].all() and large.sum() > 100


def test_positive_means_the_row_helped(problems):
    """Check that the loss of a row rises if this row is removed from training."""
    p = problems["ridge"]
    twin = Examples(p.train.x[[4]], p.train.y[[4]])
    assert abs(p.net.losses(twin.x, twin.y)[0]) > 0.1
    change = Influence(p.net, p.train, solver=Direct()).scores(twin, [4])[0, 0]
    before = p.oracle.losses(p.theta)[4]
    after = p.oracle.losses(p.oracle.without([4]).minimum(p.theta))[4]
    assert after > before and change > 0
    # In least squares, removing a row multiplies its residual by exactly 1 / (1 - leverage). The
    # tolerance allows for this factor.
    H = p.oracle.hessian(p.theta)
    leverage = p.oracle.hessians(p.theta)[4] @ np.linalg.inv(H) / len(p.train)
    assert change == pytest.approx(after - before, rel=4 * np.trace(leverage))


def test_the_error_of_parameters_falls_with_the_square_of_n():
    errors = {}
    for n in (100, 400):
        p = logistic("softmax", n, weight_decay=0.2)
        rows = np.arange(20)
        predicted = Influence(p.net, p.train, solver=Direct()).parameters(rows)
        actual = p.oracle.actual_parameters(p.theta, rows)
        errors[n] = np.linalg.norm(predicted - actual, axis=1).mean()
        assert errors[n] < 0.25 * np.linalg.norm(actual, axis=1).mean()
    # The error is of order 1 / n^2, so four times the rows should divide it by about 16. The mean
    # is over only twenty rows, so the ratio may differ from 16 by a factor of two.
    assert 8 < errors[100] / errors[400] < 32


# --- added rows ------------------------------------------------------------------------------


def refitted(problem, new):
    """Return test losses after a refit with each new row, minus the losses before: (m, k)."""
    p = problem
    before = p.measured.losses(p.theta)
    columns = []
    for features, y in zip(new.features, new.y, strict=True):
        grown = p.oracle.on(np.vstack([p.oracle.features, features]), np.append(p.oracle.y, y))
        columns.append(p.measured.losses(grown.minimum(p.theta)) - before)
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "ridge", "softmax by the tape"])
def test_adding_is_the_change_of_a_refit_with_the_row(kind):
    # The new rows come from another random draw of the same kind.
    if kind == "ridge":
        p, q = ridge(600, l2=0.05), ridge(40, seed=1)
    else:
        p = logistic(kind.split()[0], 600, weight_decay=0.1, intercept=True)
        q = logistic(kind.split()[0], 40, weight_decay=0.1, intercept=True, seed=1)
    if kind.endswith("tape"):
        p = through_keras(p)
    predicted = Influence(p.net, p.train, solver=Direct()).adding(p.test, q.train)
    assert predicted.shape == (7, 40) and predicted.measurement == "loss"
    actual = refitted(p, q.oracle).ravel()
    line = scipy.stats.linregress(predicted[:].ravel(), actual)
    # The actual change is 1 / (1 + leverage) times the prediction. The mean leverage, d/n, is at
    # most 0.03.
    assert 0.9 < line.slope < 1.01 and line.rvalue > 0.995
    assert abs(line.intercept) < 0.02 * actual.std()


def test_adding_is_minus_the_removal_of_the_same_row(problems):
    p = problems["softmax"]
    influence = Influence(p.net, p.train, solver=Direct(), approximation="first_order")
    rows = [3, 50, 8]
    again = p.train.take(rows)
    for measurement in (None, margin):
        added = influence.adding(p.test, again, measurement=measurement)
        removed = influence.scores(p.test, rows, measurement=measurement)
        assert relative_error(added.change_if_added, -removed.change_if_removed) < 1e-12
        assert added.measurement == removed.measurement
        assert relative_error(added.solution.x, removed.solution.x) < 1e-12


# --- derivatives with respect to inputs ------------------------------------------------------


def refitted_derivative(problem, row, j):
    """Return d(test losses)/d(x[row, j]), (m,), by differences of refits accurate to 1e-12."""
    at = problem.oracle.features[row, j]

    def test_losses(value):
        features = problem.oracle.features.copy()
        features[row, j] = value[0]
        theta = replace(problem.oracle, features=features).minimum(problem.theta)
        return problem.measured.losses(theta)

    return oracles.central_difference(test_losses, np.array([at]), np.array([1.0]))


@pytest.mark.parametrize(
    "problem",
    [*PROBLEMS, "ridge, strong penalty", "sigmoid, weak penalty", "sigmoid, strong penalty"],
)
def test_perturbation_is_the_derivative_of_an_actual_refit(problem, problems):
    p = problems[problem]
    num_inputs = p.train.x.shape[1]
    got = Influence(p.net, p.train, solver=Direct()).perturbation(p.test, ROWS)
    expected = np.array(
        [[refitted_derivative(p, row, j) for j in range(num_inputs)] for row in ROWS]
    )
    # The refits are accurate to 1e-12. Fourth-order differences with a step of 1e-3 then have
    # errors near 1e-9.
    assert relative_error(got, np.moveaxis(expected, 2, 0)) < 1e-7
    for i in range(len(p.test)):  # compare each test loss separately
        assert relative_error(got[i], expected[:, :, i]) < 1e-5


def test_two_inputs_come_back_by_name_and_are_those_of_one():
    p = ridge()
    left = keras.Input((1,), name="a", dtype="float64")
    right = keras.Input((3,), name="b", dtype="float64")
    joined = keras.layers.Concatenate(dtype="float64")([left, right])
    (dense,) = p.net.model.layers
    two = GenericNeuralNet(keras.Model({"a": left, "b": right}, dense(joined)), "mse")

    def cut(examples):
        return Examples({"a": examples.x[:, :1], "b": examples.x[:, 1:]}, examples.y)

    got = Influence(two, cut(p.train), solver=Direct()).perturbation(cut(p.test), ROWS)
    whole = Influence(p.net, p.train, solver=Direct()).perturbation(p.test, ROWS)
    assert sorted(got) == ["a", "b"]
    assert relative_error(got["a"], whole[:, :, :1]) < 1e-12
    assert relative_error(got["b"], whole[:, :, 1:]) < 1e-12


def test_inputs_of_any_shape_and_any_solver():
    p = ridge()
    flatten = keras.layers.Flatten(dtype="float64")
    model = keras.Sequential([keras.Input((2, 2), dtype="float64"), flatten, *p.net.model.layers])
    square = GenericNeuralNet(model, "mse")

    def folded(examples):
        return Examples(examples.x.reshape(-1, 2, 2), examples.y)

    influence = Influence(square, folded(p.train), solver=CG(rtol=1e-12))
    got = influence.perturbation(folded(p.test), ROWS)
    expected = Influence(p.net, p.train, solver=Direct()).perturbation(p.test, ROWS)
    assert relative_error(got, expected.reshape(len(p.test), len(ROWS), 2, 2)) < 1e-10


def test_perturbation_damps_as_the_operator_does(tanh):
    (net, examples), rows = tanh, [3, 17, 0]
    influence = Influence(net, examples, solver=Direct(), damping=50.0)
    s = influence.s_test(examples.take([4])).x[:, 0]
    expected = -net.input_gradient(examples.x[rows], examples.y[rows], s) / len(examples)
    got = influence.perturbation(examples.take([4]), rows)
    np.testing.assert_array_equal(got[0], expected)


# --- changes that must not matter ------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 59, 60, 64])
@pytest.mark.parametrize("problem", ["softmax", "softmax by the tape"])
def test_batch_size_changes_nothing(problem, batch_size, problems):
    p = problems[problem]

    def answers(size):
        influence = Influence(p.net, p.train, solver=Direct(), batch_size=size)
        every = influence.perturbation(p.test, np.arange(60))
        return influence.scores(p.test)[:], influence.adding(p.test, p.train)[:], every

    for got, expected in zip(answers(batch_size), answers(None), strict=True):
        assert relative_error(got, expected) < 1e-10


@pytest.mark.parametrize("problem", ["softmax", "softmax by the tape"])
def test_row_order_permutes_the_scores(problem, problems):
    p = problems[problem]
    rng = np.random.default_rng(0)
    order, test_order = rng.permutation(len(p.train)), rng.permutation(len(p.test))
    expected = Influence(p.net, p.train, solver=CG(rtol=1e-12)).scores(p.test)
    shuffled = Influence(p.net, p.train.take(order), solver=CG(rtol=1e-12))
    got = shuffled.scores(p.test.take(test_order))
    assert relative_error(got[:], expected[:][np.ix_(test_order, order)]) < 1e-10
    own = Influence(p.net, p.train, solver=Direct()).self_influence()
    shuffled = Influence(p.net, p.train.take(order), solver=Direct())
    assert relative_error(shuffled.self_influence(), own[order]) < 1e-10


def test_sparse_rows_and_memmaps_change_nothing(problems, tmp_path):
    p = problems["softmax"]
    expected = Influence(p.net, p.train, solver=Direct()).scores(p.test)
    stored = np.memmap(tmp_path / "x", np.float64, "w+", shape=p.train.x.shape)
    stored[:] = p.train.x
    for net in (p.net, problems["softmax by the tape"].net):
        for x in (scipy.sparse.csr_matrix(p.train.x), stored):
            influence = Influence(net, Examples(x, p.train.y), solver=Direct())
            test = Examples(scipy.sparse.csr_matrix(p.test.x), p.test.y)
            assert relative_error(influence.scores(test)[:], expected[:]) < 1e-10
            rows = [5, 1]
            assert relative_error(influence.scores(test, rows)[:], expected[:, rows]) < 1e-10
            own = influence.self_influence([3])
            assert own == pytest.approx(Influence(p.net, p.train).self_influence([3]), rel=1e-5)


THREADS = """
import sys
import numpy as np
import tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[2]))
tf.config.threading.set_inter_op_parallelism_threads(int(sys.argv[2]))
from tests.influence.scores.test_influence import results_that_use_threads
np.savez(sys.argv[1], **results_that_use_threads())
"""


def results_that_use_threads():
    p = logistic("softmax", 3000, 10, 0.1)
    taped = through_keras(p)
    exact, walk = CG(rtol=1e-12), LiSSA(depth=50, rtol=10)
    return {
        "closed form": Influence(p.net, p.train, solver=exact).scores(p.test)[:],
        "tape": Influence(taped.net, taped.train, solver=exact).scores(p.test)[:],
        "LiSSA": Influence(p.net, p.train, solver=walk).scores(p.test, [0, 1])[:],
    }


@pytest.mark.slow
def test_the_number_of_threads_changes_nothing(tmp_path):
    path = tmp_path / "there.npz"
    one_here = os.environ.get("OMP_NUM_THREADS") == os.environ.get("TF_NUM_INTRAOP_THREADS") == "1"
    threads = "2" if one_here else "1"
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **dict.fromkeys(names, threads)}
    command = [sys.executable, "-c", THREADS, str(path), threads]
    subprocess.run(command, env=environment, check=True, cwd=tmp_path, capture_output=True)
    with np.load(path) as there:
        for name, value in results_that_use_threads().items():
            assert relative_error(there[name], value) < 1e-10, name


def test_float32_in_float32_out():
    exact = ridge()
    expected = exact.oracle.predicted_changes(exact.theta, exact.measured, np.arange(40))
    p = ridge(dtype="float32")
    influence = Influence(p.net, p.train, solver=CG(rtol=1e-5), approximation="first_order")
    scores = influence.scores(p.test)
    assert scores[:].dtype == influence.self_influence().dtype == np.float32
    assert influence.parameters([0]).dtype == np.float32
    # There are two errors: the gradients are in float32, and the solver has rtol = 1e-5.
    assert relative_error(scores[:], expected) < 1e-3
    derivatives = influence.perturbation(p.test, ROWS)
    assert derivatives.dtype == np.float32
    expected = Influence(exact.net, exact.train).perturbation(exact.test, ROWS)
    assert relative_error(derivatives, expected) < 1e-3


# --- the returned table ----------------------------------------------------------------------


def test_scores_behave_as_their_array(problems):
    p = problems["ridge"]
    scores = Influence(p.net, p.train, solver=Direct()).scores(p.test, [3, 1])
    table = scores.change_if_removed
    assert isinstance(scores, Scores) and len(scores) == 7 and scores.shape == (7, 2)
    np.testing.assert_array_equal(np.asarray(scores), table)
    np.testing.assert_array_equal(np.abs(scores), np.abs(table))
    assert np.asarray(scores, dtype=np.float32).dtype == np.float32
    copy = np.array(scores)
    copy[:] = 0
    assert np.any(scores.change_if_removed)
    np.testing.assert_array_equal(scores.mean(axis=0), table.mean(axis=0))
    np.testing.assert_array_equal(scores.mean(axis=1), table.mean(axis=1))
    assert scores.mean() == table.mean()
    np.testing.assert_array_equal(scores[2, :], table[2])


# --- the model is left unchanged -------------------------------------------------------------


def test_no_question_changes_the_model():
    p = through_keras(logistic("softmax"))
    model = p.net.model
    model.compile("adam", loss="mse")
    model.layers[-1].trainable = True
    state = lambda: (  # noqa: E731
        [v.numpy().tobytes() for v in model.variables],
        [(layer.trainable, layer.built) for layer in model.layers],
        (model.optimizer, model.loss, model.compiled),
    )
    before = state()
    influence = Influence(p.net, p.train, damping=0.1)
    influence.scores(p.test)
    influence.self_influence([0, 1])
    influence.parameters([0])
    assert state() == before


# --- arguments that are refused --------------------------------------------------------------

Y = np.zeros(4)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([60], IndexError, r"^rows must lie in \[0, 60\), got 60 at position 0"),
        ([-1], IndexError, r"^rows must lie in \[0, 60\), got -1"),
        ([1, 1], ValueError, "^rows must name each row once, got 1 twice"),
        ([], ValueError, "^rows must be a one-dimensional, non-empty list"),
        (np.ones(60, bool), TypeError, "^rows must be integers, got dtype bool; np.flatnonzero"),
        ([0.5], TypeError, "^rows must be integers, got dtype float64"),
    ],
)
def test_bad_rows_are_refused_before_any_work(rows, error, message, problems, monkeypatch):
    p = problems["softmax"]
    influence = Influence(p.net, p.train)
    monkeypatch.setattr(
        "influence.scores.inverse.Inverse.solve", lambda *_: pytest.fail("the work had begun")
    )
    for question in (
        lambda: influence.scores(p.test, rows),
        lambda: influence.parameters(rows),
        lambda: influence.self_influence(rows),
        lambda: influence.perturbation(p.test, rows),
    ):
        with pytest.raises(error, match=message):
            question()


@pytest.mark.parametrize("name", ["test", "new"])
@pytest.mark.parametrize(
    ("examples", "error", "message"),
    [
        ((np.ones((4, 5)),), TypeError, r"^{} must be Examples\(x, y\), got tuple of 1; \(x, y\)"),
        (Examples(np.ones((4, 3)), Y), ValueError, r"^{}\.x must have rows of shape \(5,\)"),
        (Examples(np.ones((4, 5)), Y - 1), ValueError, r"^{}\.y must hold class numbers 0 to 2,"),
    ],
)
def test_bad_sets_are_refused_before_any_work(
    name, examples, error, message, problems, monkeypatch
):
    p = problems["softmax"]
    influence = Influence(p.net, p.train)
    monkeypatch.setattr(
        "influence.scores.inverse.Inverse.solve", lambda *_: pytest.fail("the work had begun")
    )
    with pytest.raises(error, match=message.format(name)):
        influence.adding(**{"test": p.test, "new": p.train, name: examples})


@pytest.mark.parametrize("problem", ["ridge", "sigmoid"])
def test_integers_are_refused_before_the_solve(problem, problems, monkeypatch):
    p = problems[problem]
    counts = Examples(np.round(p.train.x).astype(int), p.train.y)
    influence = Influence(p.net, counts, solver=Direct())
    monkeypatch.setattr(
        "influence.scores.inverse.Inverse.solve", lambda *_: pytest.fail("the work had begun")
    )
    with pytest.raises(TypeError, match="^x must be floating to be differentiated, got int64"):
        influence.perturbation(p.test, ROWS)
    with pytest.raises(TypeError, match="^x must be floating to be differentiated, got int64"):
        p.net.input_gradient(counts.x, counts.y, p.theta)
