"""Influence.perturbation against the derivative of an actual refit, and against closed forms."""

from dataclasses import replace

import keras
import numpy as np
import pytest

from influence import CG, Direct, Examples, GenericNeuralNet, Influence
from tests import oracles
from tests.influence.problems import logistic, relative_error, ridge, tanh_net, through_keras

ROWS = [3, 17, 0]


@pytest.fixture(scope="module")
def problems():
    """By the tape and in closed form, with and without an intercept; weak and strong penalties."""
    softmax = logistic("softmax", intercept=True)
    return {
        "ridge": ridge(),
        "ridge, strong penalty": ridge(l2=5.0),
        "sigmoid": logistic("sigmoid"),
        "sigmoid, weak penalty": logistic("sigmoid", weight_decay=1e-4),
        "sigmoid, strong penalty": logistic("sigmoid", weight_decay=5.0),
        "softmax": softmax,
        "softmax by the tape": through_keras(softmax),
    }


PROBLEMS = [
    "ridge", "ridge, strong penalty", "sigmoid", "sigmoid, weak penalty",
    "sigmoid, strong penalty", "softmax", "softmax by the tape",
]  # fmt: skip


def refitted_derivative(problem, row, j):
    """(m,): d(test losses)/d(x[row, j]) by differences of refits to a gradient norm of 1e-12."""
    at = problem.oracle.features[row, j]

    def test_losses(value):
        features = problem.oracle.features.copy()
        features[row, j] = value[0]
        theta = replace(problem.oracle, features=features).minimum(problem.theta)
        return problem.measured.losses(theta)

    return oracles.central_difference(test_losses, np.array([at]), np.array([1.0]))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_is_the_derivative_of_an_actual_refit(problem, problems):
    p = problems[problem]
    num_inputs = p.train.x.shape[1]
    got = Influence(p.net, p.train, solver=Direct()).perturbation(p.test, ROWS)
    expected = np.array(
        [[refitted_derivative(p, row, j) for j in range(num_inputs)] for row in ROWS]
    )
    # Fourth-order differences of refits exact to 1e-12, a step of 1e-3: errors near 1e-9.
    assert relative_error(got, np.moveaxis(expected, 2, 0)) < 1e-7
    for i in range(len(p.test)):  # no small test loss hides behind a large one
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


def test_rows_and_batches_do_not_change_the_numbers(problems):
    p = problems["softmax by the tape"]
    every = np.arange(len(p.train))
    whole = Influence(p.net, p.train, solver=Direct()).perturbation(p.test, every)
    for size in (1, 7, 1000):
        influence = Influence(p.net, p.train, solver=Direct(), batch_size=size)
        assert relative_error(influence.perturbation(p.test, ROWS), whole[:, ROWS]) < 1e-12


def test_damping_is_that_of_the_operator():
    net, examples = tanh_net()
    influence = Influence(net, examples, solver=Direct(), damping=50.0)
    s = influence.s_test(examples.take([4])).x[:, 0]
    expected = -net.input_gradient(examples.x[ROWS], examples.y[ROWS], s) / len(examples)
    got = influence.perturbation(examples.take([4]), ROWS)
    np.testing.assert_array_equal(got[0], expected)


def test_single_precision_stays_single():
    p = logistic("sigmoid", dtype="float32")
    got = Influence(p.net, p.train, solver=Direct()).perturbation(p.test, ROWS)
    double = logistic("sigmoid")
    expected = Influence(double.net, double.train, solver=Direct()).perturbation(double.test, ROWS)
    assert got.dtype == np.float32
    assert relative_error(got, expected) < 1e-4  # theta and x are rounded to 6e-8


@pytest.mark.parametrize("problem", ["ridge", "sigmoid"])
def test_integers_are_refused_before_the_solve(problem, problems, monkeypatch):
    p = problems[problem]
    counts = Examples(np.round(p.train.x).astype(int), p.train.y)
    influence = Influence(p.net, counts, solver=Direct())
    monkeypatch.setattr(influence, "s_test", None)  # would fail otherwise
    with pytest.raises(TypeError, match="^x must be floating to be differentiated, got int64"):
        influence.perturbation(p.test, ROWS)
    with pytest.raises(TypeError, match="^x must be floating to be differentiated, got int64"):
        p.net.input_gradient(counts.x, counts.y, p.theta)


@pytest.mark.parametrize(
    ("rows", "error"), [([40], IndexError), ([0.5], TypeError), ([], ValueError)]
)
def test_rows_are_checked(rows, error):
    p = ridge()
    with pytest.raises(error, match="^rows must"):
        Influence(p.net, p.train, solver=Direct()).perturbation(p.test, rows)
