import keras
import numpy as np
import pytest
import tensorflow as tf

from influence import Examples, GenericNeuralNet, Hessian
from influence.preflight import hessian
from influence.solvers.spectrum import Spectrum, spectrum
from tests.influence.preflight.test_rows import squares
from tests.influence.problems import dense_net, logistic, ridge, sequential, tanh_net

EPS = {dtype: float(np.finfo(dtype).eps) for dtype in ("float32", "float64")}


@pytest.fixture(scope="module")
def tanh():
    """Return (net, examples), with the net away from a minimum."""
    return tanh_net()


@pytest.fixture(scope="module")
def linear():
    """Yield a least-squares problem at its minimum. No test may change theta."""
    p = ridge(num_rows=60)
    theta = p.theta
    yield p
    np.testing.assert_array_equal(p.theta, theta)


def lines(net, examples, damping=0.0, batch_size=None):
    return hessian.derivatives(net, Hessian(net, examples, damping, batch_size=batch_size))


# --- whether the Hessian is the gradient's derivative ---------------------------------------------


@tf.custom_gradient
def cube_of_wrong_curvature(x):
    return x**3, lambda upstream: upstream * 3 * tf.stop_gradient(x) ** 2


@tf.custom_gradient
def sum_of_squares_of_no_gradient(x):
    wrong = tf.roll(x, 1, axis=-1)
    return tf.reduce_sum(x**2, -1), lambda upstream: upstream[:, None] * 2 * (x + wrong)


def test_right_products_agree_with_differences_of_the_gradient(tanh):
    for line in (*lines(*tanh, 0.3), *lines(*tanh, batch_size=7)):
        assert line.verdict == "ok" and line.value < 1e-8
    p = logistic("softmax", dtype="float32")
    for line in lines(p.net, p.train):
        assert line.verdict == "ok" and line.value < 1e-3


def test_products_with_another_matrix_are_found(linear, monkeypatch):
    p = linear
    product = p.net.hvp
    monkeypatch.setattr(p.net, "hvp", lambda x, y, V: 1.01 * product(x, y, V))
    difference, asymmetry = lines(p.net, p.train)
    # The fault makes the loss's part of the products 1 % too large. The penalty's part is right and
    # is a few per cent of the whole. So the relative difference is a little below 1 %.
    assert difference.verdict == "fail" and 0.009 < difference.value < 0.01 / 1.01 + 1e-6
    assert asymmetry.verdict == "ok"


def test_a_wrong_second_derivative_is_found(linear):
    p = linear
    right = GenericNeuralNet(p.net.model, lambda y, z: squares(y, z) ** 3)
    wrong = GenericNeuralNet(p.net.model, lambda y, z: cube_of_wrong_curvature(squares(y, z)))
    difference, asymmetry = lines(wrong, p.train)
    assert difference.verdict == "fail" and "second derivatives are wrong" in difference.meaning
    assert "tf.custom_gradient" in difference.remedy and asymmetry.verdict == "ok"
    x, y, V = p.train.x, p.train.y, np.eye(5)
    true, got = (net.hvp(x, y, V) + p.net.penalty_hvp(V) for net in (right, wrong))
    largest = np.linalg.norm(np.linalg.solve(got, true - got), 2)
    assert 1e-2 < difference.value <= largest


def test_a_hessian_that_is_not_symmetric_is_found():
    net = dense_net(3, 2, lambda y, output: sum_of_squares_of_no_gradient(output))
    x = np.random.default_rng(0).standard_normal((20, 2))
    line = lines(net, Examples(x, x[:, 0]))[1]
    assert line.verdict == "fail" and line.value > 1e-3
    assert "no second derivative of any function" in line.meaning


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_kinks_are_crossed_by_the_steps_of_float32(dtype):
    keras.utils.set_random_seed(0)
    hidden = keras.layers.Dense(20, activation="relu", dtype=dtype)
    last = keras.layers.Dense(1, dtype=dtype)
    net = GenericNeuralNet(sequential((3,), hidden, last, dtype=dtype), "mse")
    x = np.random.default_rng(0).standard_normal((2000, 3)).astype(dtype)
    line = lines(net, Examples(x, np.abs(x).sum(axis=1)))[0]
    assert line.verdict == ("warn" if dtype == "float32" else "ok")
    if dtype == "float32":
        assert line.value > 0.02 and "cross kinks (Relu)" in line.meaning
        assert line.remedy.startswith("Check again in float64")


# --- eigenvalues ----------------------------------------------------------------------------------


def found(low, high, error=0.0, converged=True, complete=False):
    one = np.ones(1)
    return Spectrum(low * one, error * one, high * one, 0 * one, 0, converged, complete)


@pytest.mark.parametrize(
    ("low", "error", "known", "damping", "verdict", "says"),
    [
        (0.5, 0.0, np.nan, 0.0, "ok", "Positive, 0.5"),
        (0.5, 0.6, np.nan, 0.0, "warn", "a negative one may have been missed"),
        (0.5, 0.6, 0.1, 0.0, "ok", "Positive, 0.5, known to 0.6"),
        (0.5, 0.0, np.nan, 0.4, "ok", "Positive, 0.5"),
        (0.5, 0.0, np.nan, 0.5, "warn", "but 0 without the damping"),
        (0.5, 0.0, np.nan, 0.8, "warn", "but -0.3 without the damping"),
        (1e-9, 0.0, np.nan, 0.0, "fail", "zero but for rounding (1e-06)"),
        (-1e-9, 0.0, np.nan, 0.0, "fail", "zero but for rounding (1e-06)"),
        (-0.5, 0.0, np.nan, 0.0, "fail", "a saddle, not a minimum"),
        (-0.5, 0.0, np.nan, 0.4, "fail", "a saddle, not a minimum"),
    ],
)
def test_the_smallest_eigenvalue_decides(low, error, known, damping, verdict, says):
    line = hessian.smallest(found(low, 10.0, error), known, damping, 1e-6)
    assert line.verdict == verdict and line.value == low and says in line.meaning
    if verdict == "fail":  # with the damping that the remedy names, the eigenvalue is positive
        enough = float(line.remedy.split("damping=")[1].split(" ")[0])
        assert low - damping + enough > 1e-3


@pytest.mark.parametrize(
    ("error", "converged", "complete", "known", "verdict"),
    [
        (0.05, True, False, np.nan, "ok"),
        # With such an error, or without convergence, the value may belong to another eigenvalue
        # than the smallest.
        (0.06, True, False, np.nan, "warn"),
        (0.01, False, False, np.nan, "warn"),
        (0.01, False, False, 0.1, "ok"),
        (0.06, True, True, np.nan, "ok"),  # `complete`: the search has found all eigenvalues
        (0.6, True, True, np.nan, "warn"),
    ],
)
def test_one_eigenvalue_that_is_positive_is_not_all(error, converged, complete, known, verdict):
    line = hessian.smallest(found(0.5, 10.0, error, converged, complete), known, 0.0, 1e-6)
    assert line.verdict == verdict
    assert ("a negative one may have been missed" in line.meaning) == (verdict == "warn")


def test_the_largest_eigenvalue_should_be_positive():
    for value, verdict in ((3, "ok"), (-1, "fail")):
        line = hessian.largest(found(-2.0, value))
        assert line.verdict == verdict and line.value == value


@pytest.mark.parametrize(
    ("low", "error", "known", "dtype", "verdict", "condition"),
    [
        (1e-3, 0.0, np.nan, "float32", "ok", 1e4),
        (1e-5, 0.0, np.nan, "float32", "warn", 1e6),
        (1e-7, 0.0, np.nan, "float32", "fail", 1e8),
        (1e-7, 0.0, np.nan, "float64", "ok", 1e8),
        (1e-2, 5e-3, np.nan, "float64", "warn", 2e3),  # the eigenvalue may be as small as 5e-3
        (1e-2, 2e-2, 1e-3, "float64", "ok", 1e4),
        (1e-2, 1e-4, 1e-3, "float64", "ok", 10 / 9.9e-3),
        (1e-2, 2e-2, np.nan, "float64", "warn", 1e3),
    ],
)
def test_the_condition_number_decides_about_the_dtype(low, error, known, dtype, verdict, condition):
    line = hessian.precision(found(low, 10.0, error), known, np.dtype(dtype))
    assert line.verdict == verdict
    assert line.value == pytest.approx(condition * EPS[dtype], rel=1e-9)
    assert ("Use float64" in line.remedy) == (dtype == "float32" and verdict != "ok")


def test_without_an_inverse_there_is_no_condition_number():
    line = hessian.precision(found(-1.0, 10.0), np.nan, np.dtype("float64"))
    assert line.verdict == "warn" and np.isnan(line.value)


# --- whether theta is the minimum -----------------------------------------------------------------


@pytest.mark.parametrize("with_test", [False, True])
@pytest.mark.parametrize(
    ("distance", "verdict"), [(0.1, "fail"), (1e-2, "warn"), (1e-3, "ok"), (1e-6, "ok")]
)
def test_drift_and_removals_are_those_of_the_closed_form(linear, with_test, distance, verdict):
    p, theta = linear, linear.theta
    watched = p.measured if with_test else p.oracle
    moved = theta + distance * np.array([1.0, -1, 2, 0, 1])
    try:
        p.net.theta = moved
        A = Hessian(p.net, p.train)
        line = hessian.stationary(p.net, A, p.test if with_test else None, 0.0)
    finally:
        p.net.theta = theta
    gradient = p.oracle.gradient(moved)
    drift = watched.gradients(moved) @ np.linalg.solve(p.oracle.hessian(moved), gradient)
    removals = p.oracle.predicted_changes(moved, watched, np.arange(60))
    ratio = np.sqrt(np.mean(drift**2)) / np.sqrt(np.mean(removals**2))
    # The check estimates the ratio from two random sums over rows, and solves by CG to a residual
    # of 0.1. So its result is right only within a factor of two.
    assert 0.5 < line.value / ratio < 2
    assert line.verdict == verdict
    assert f"gradient norm {np.linalg.norm(gradient):.1e}" in line.meaning


def test_a_solve_that_stopped_early_is_no_proof_of_a_minimum(linear, monkeypatch):
    p = linear
    A = Hessian(p.net, p.train)
    assert hessian.stationary(p.net, A, None, 0.0).verdict == "ok"
    monkeypatch.setattr(hessian, "_ITERATIONS", 1)
    line = hessian.stationary(p.net, A, None, 0.0)
    assert line.verdict == "warn" and line.value < 0.1
    residual = float(line.meaning.split("relative residual of ")[1].split(" ")[0])
    assert 0.1 < residual < 1 and "in 1 iterations" in line.meaning


def test_a_saddle_is_judged_with_a_shift(tanh):
    net, examples = tanh
    A = Hessian(net, examples)
    low = spectrum(A).smallest[0]
    assert low < -0.1
    line = hessian.stationary(net, A, None, -30 * low)
    H = A.dense() - 30 * low * np.eye(net.num_parameters)
    G = net.gradients(examples.x, examples.y)
    drift = G @ np.linalg.solve(H, net.risk_gradient(examples))
    removals = G @ np.linalg.solve(H, G.T) / 20
    ratio = np.sqrt(np.mean(drift**2)) / np.sqrt(np.mean(removals**2))
    assert line.verdict == "fail" and 0.5 < line.value / ratio < 2
    size = float(line.meaning.split("losses by ")[1].split(" ")[0])
    assert size == pytest.approx(np.sqrt(np.mean(drift**2)), rel=0.1)


def test_nothing_moves_where_there_is_no_gradient():
    net = dense_net(1, 2, "mse")
    net.theta = np.array([1.0, 2, 3])
    x = np.eye(2)
    line = hessian.stationary(net, Hessian(net, Examples(x, x @ [1, 2] + 3), 1.0), None, 0.0)
    assert line.verdict == "ok" and line.value == 0
