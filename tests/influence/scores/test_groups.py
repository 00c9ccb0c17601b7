"""Tests of Influence.group against exact refits without the group, and against dense matrices."""

import keras
import numpy as np
import pytest
import scipy.sparse
import tensorflow as tf

from influence import CG, Direct, Examples, GaussNewton, Hessian, Influence
from influence.net.measurements import margin
from tests.influence.problems import (
    logistic,
    relative_error,
    ridge,
    tanh_net,
    through_keras,
    untraced,
)

N = 200
PERCENT = (1, 5, 10, 25)


@pytest.fixture(scope="module")
def problems():
    return {
        "softmax": logistic("softmax", N, weight_decay=0.01),
        "sigmoid": logistic("sigmoid", N, weight_decay=0.01, intercept=True, seed=3),
    }


def groups(problem, percent):
    """Return {name: rows} of six groups with the given percentage of the rows.

    They are random rows, rows of one class, rows near row 0, the most helpful rows, the most
    harmful rows, and the rows with the largest losses.
    """
    p, k = problem, N * percent // 100
    own = p.oracle.gradients(p.theta) + p.oracle.penalty * p.theta
    influence = own @ np.linalg.solve(
        p.oracle.hessian(p.theta), p.measured.gradients(p.theta).sum(0)
    )
    order = np.argsort(influence)
    apart = np.linalg.norm(p.train.x - p.train.x[0], axis=1)
    return {
        "random": np.random.default_rng(percent).choice(N, k, replace=False),
        "one class": np.flatnonzero(p.train.y == p.train.y[0])[:k],
        "neighbours": np.argsort(apart)[:k],
        "most helpful": order[::-1][:k],
        "most harmful": order[:k],
        "largest loss": np.argsort(-p.oracle.losses(p.theta))[:k],
    }


def refitted(problem, rows):
    p = problem
    return p.measured.losses(p.oracle.without(rows).minimum(p.theta)) - p.measured.losses(p.theta)


def second_order(problem, rows):
    """Return the second-order changes of the test losses without the group, by dense matrices.

    T = (d/dt H(theta + t D1)) D1, at t = 0, has the third derivatives of the risk. It is computed
    by differences of the Hessian H.
    """
    p, n, k = problem, len(problem.train), len(rows)
    theta, H = p.theta, p.oracle.hessian(p.theta)
    penalty = np.diag(np.broadcast_to(p.oracle.penalty, theta.shape))
    g = (p.oracle.gradients(theta) + p.oracle.penalty * theta)[rows].sum(axis=0)
    own = p.oracle.hessians(theta)[rows].mean(axis=0) + penalty
    D1 = np.linalg.solve(H, g) / (n - k)
    step = 1e-3
    near = p.oracle.hessian(theta + step * D1) - p.oracle.hessian(theta - step * D1)
    far = p.oracle.hessian(theta + 2 * step * D1) - p.oracle.hessian(theta - 2 * step * D1)
    T = (8 * near - far) @ D1 / (12 * step)
    D2 = D1 + np.linalg.solve(H, k / (n - k) * (own - H) @ D1 - T / 2)
    curved = np.einsum("i,nij,j->n", D1, p.measured.hessians(theta), D1)
    return p.measured.gradients(theta) @ D2 + curved / 2


# --- against exact refits --------------------------------------------------------------------

# For a problem and a group's percentage of the rows: the relative errors of order 1 and of order 2.
# An error is over all test losses. Each number is the median over six groups.
MEDIANS = {
    ("softmax", 1): (0.098, 0.0036),
    ("softmax", 5): (0.146, 0.0151),
    ("softmax", 10): (0.183, 0.0192),
    ("softmax", 25): (0.361, 0.0846),
    ("sigmoid", 1): (0.050, 0.0054),
    ("sigmoid", 5): (0.109, 0.0133),
    ("sigmoid", 10): (0.119, 0.0392),
    ("sigmoid", 25): (0.350, 0.0810),
}


@pytest.mark.parametrize("percent", PERCENT)
@pytest.mark.parametrize("problem", ["softmax", "sigmoid"])
def test_order_two_is_closer_to_the_refit_than_order_one(problem, percent, problems):
    p = problems[problem]
    influence = Influence(p.net, p.train, solver=Direct())
    errors = {}
    for name, rows in groups(p, percent).items():
        actual = refitted(p, rows)
        errors[name] = [
            relative_error(influence.group(p.test, rows, order)[:], actual) for order in (1, 2)
        ]
        assert errors[name][1] < 0.75 * errors[name][0], name
    medians = np.median(list(errors.values()), axis=0)
    assert medians == pytest.approx(MEDIANS[problem, percent], rel=0.05)
    assert errors["random"][1] < 0.2 * errors["random"][0]


def test_the_terms_that_others_leave_out_decide(problems):
    """Check that order 2 without two of its terms can be worse than order 1.

    Basu, You & Feizi (2020) leave out the third derivative T and the second derivative of the test
    loss.
    """
    p = problems["sigmoid"]
    rows = groups(p, 25)["most harmful"]
    n, k, theta, H = N, len(rows), p.theta, p.oracle.hessian(p.theta)
    own = p.oracle.hessians(theta)[rows].mean(axis=0) + p.oracle.penalty * np.eye(len(theta))
    g = (p.oracle.gradients(theta) + p.oracle.penalty * theta)[rows].sum(axis=0)
    D1 = np.linalg.solve(H, g) / (n - k)
    newton = D1 + k / (n - k) * np.linalg.solve(H, (own - H) @ D1)
    actual = refitted(p, rows)
    influence = Influence(p.net, p.train, solver=Direct())
    first, second = (relative_error(influence.group(p.test, rows, o)[:], actual) for o in (1, 2))
    theirs = relative_error(p.measured.gradients(theta) @ newton, actual)
    assert (first, second, theirs) == pytest.approx((0.293, 0.068, 0.660), rel=0.02)


def test_the_refit_is_that_of_the_nets_own_fit(problems):
    p = problems["softmax"]
    rows = groups(p, 10)["one class"]
    theta, before = p.theta, p.net.losses(p.test.x, p.test.y)
    try:
        p.net.fit(p.train.without(rows))
        actual = p.net.losses(p.test.x, p.test.y) - before
    finally:
        p.net.theta = theta
    assert relative_error(refitted(p, rows), actual) < 1e-7


@pytest.mark.parametrize("order", [1, 2])
def test_the_error_falls_with_the_power_of_the_groups_weight(order, problems):
    """Reduce the group's share of the data tenfold. Order r's error must fall by 10^(r + 1)."""
    errors = []
    for num_rows in (400, 4000):  # the group is 20 of 400 rows, then 20 of 4,000
        p = logistic("sigmoid", num_rows, weight_decay=0.1)
        rows = np.arange(20)
        got = Influence(p.net, p.train, solver=Direct()).group(p.test, rows, order)
        errors.append(np.linalg.norm(got[:] - refitted(p, rows)))
    power = np.log10(errors[0] / errors[1])
    # The two data sets have different rows, so the power is not exact.
    assert power == pytest.approx(order + 1, abs=0.4)


def test_positive_means_that_the_group_helped(problems):
    p = problems["sigmoid"]
    chosen = groups(p, 10)
    influence = Influence(p.net, p.train, solver=Direct())
    for order in (1, 2):
        assert influence.group(p.test, chosen["most helpful"], order).mean() > 0
        assert influence.group(p.test, chosen["most harmful"], order).mean() < 0
    assert (
        refitted(p, chosen["most helpful"]).mean() > 0 > refitted(p, chosen["most harmful"]).mean()
    )


# --- against the formula ---------------------------------------------------------------------


@pytest.mark.parametrize("solver", [Direct(), CG(rtol=1e-11)])
def test_order_one_is_the_sum_of_the_scores(solver, problems):
    p = problems["softmax"]
    influence = Influence(p.net, p.train, solver=solver)
    rows = [7, 2, 90, 31]
    for measurement in (None, margin):
        got = influence.group(p.test, rows, measurement=measurement)
        expected = influence.scores(p.test, rows, measurement=measurement)[:].sum(axis=1)
        assert relative_error(got.change_if_removed_together, expected) < 1e-9
    assert got.shape == (7,) and got.rows.tolist() == rows
    assert (got.order, got.measurement) == (1, "margin")


@pytest.mark.parametrize("problem", ["softmax", "sigmoid", "softmax by the tape", "ridge"])
def test_order_two_is_the_formula(problem, problems):
    if problem == "ridge":
        p = ridge(N)
    else:
        p = problems[problem.split()[0]]
        p = through_keras(p) if problem.endswith("tape") else p
    rows = np.arange(0, 90, 3)
    got = Influence(p.net, p.train, solver=Direct()).group(p.test, rows, 2)
    assert got.order == 2 and got.measurement == "loss"
    # The only error of `second_order` is that of T, from differences of fourth order.
    assert relative_error(got[:], second_order(p, rows)) < 1e-9
    solved = Influence(p.net, p.train, solver=CG(rtol=1e-12), batch_size=13)
    assert relative_error(solved.group(p.test, rows, order=2)[:], got[:]) < 1e-9


def test_sparse_rows_change_nothing(problems):
    p = problems["softmax"]
    train = Examples(scipy.sparse.csr_matrix(p.train.x), p.train.y)
    test = Examples(scipy.sparse.csr_matrix(p.test.x), p.test.y)
    rows = np.arange(0, 90, 3)
    got = Influence(p.net, train, solver=Direct()).group(test, rows, 2)
    assert relative_error(got[:], second_order(p, rows)) < 1e-9


def test_a_single_row_of_least_squares_to_second_order():
    """Compare with the exact move of theta, first / (1 - leverage), expanded to second order.

    `first` = H^-1 g / n is the move to first order.
    """
    p = ridge(N, l2=0.0)
    row = [11]
    moved = p.oracle.without(row).minimum(p.theta) - p.theta
    first = p.oracle.predicted_parameters(p.theta, row)[0]
    leverage = (
        np.trace(p.oracle.hessians(p.theta)[11] @ np.linalg.inv(p.oracle.hessian(p.theta))) / N
    )
    np.testing.assert_allclose(moved, first / (1 - leverage), rtol=1e-10)

    def prediction(y, output):
        return output[:, 0]

    influence = Influence(p.net, p.train, solver=Direct())
    got = influence.group(p.test, row, 2, measurement=prediction)
    # Order 2 is the expansion of 1 / (1 - h) about h = 1 / N, up to the first power of h - 1 / N.
    about = N / (N - 1) * (1 + (leverage - 1 / N) * N / (N - 1))
    np.testing.assert_allclose(got[:], p.measured.features @ first * about, rtol=1e-9)


def test_damping_counts_for_the_group_too():
    """Compare with the formula for a damped H. The group's Hessian H_U is damped as well.

    The damping therefore cancels in H_U - H.
    """
    p = ridge(N)
    rows = np.arange(40)
    damped = Influence(p.net, p.train, solver=Direct(), damping=0.7).group(p.test, rows, 2)[:]
    H, n, k = p.oracle.hessian(p.theta), N, 40
    own = p.oracle.hessians(p.theta)[rows].mean(0) + np.diag(p.oracle.penalty)
    g = (p.oracle.gradients(p.theta) + p.oracle.penalty * p.theta)[rows].sum(axis=0)
    D1 = np.linalg.solve(H + 0.7 * np.eye(5), g) / (n - k)
    D2 = D1 + k / (n - k) * np.linalg.solve(H + 0.7 * np.eye(5), (own - H) @ D1)
    curved = np.einsum("i,nij,j->n", D1, p.measured.hessians(p.theta), D1)
    assert relative_error(damped, p.measured.gradients(p.theta) @ D2 + curved / 2) < 1e-11


def test_a_network_with_a_penalty_that_is_not_quadratic():
    """Compare with the formula, for a net whose penalty has a third derivative.

    The third derivatives T come from differences of the library's Hessian.
    """
    net, train = tanh_net(l2=0.1)
    net.model.layers[-1].kernel.regularizer = Quartic()
    untraced(net)
    influence = Influence(net, train, solver=Direct(), damping=20.0, curvature=Hessian)
    rows, test = np.array([4, 9, 1]), train.take([0, 5])
    got = influence.group(test, rows, 2)
    n, k, theta = len(train), 3, net.theta
    H = influence.operator.dense()
    own = type(influence.operator)(net, train.take(rows), 20.0).dense()
    g = (net.gradients(train.x, train.y) + net.penalty_gradient())[rows].sum(axis=0)
    D1 = np.linalg.solve(H, g) / (n - k)

    def hessian_at(shift):
        net.theta = theta + shift
        matrix = type(influence.operator)(net, train).dense()
        each = [type(influence.operator)(net, test.take([j])).dense() for j in range(2)]
        plain = [m - penalty_hessian(net) for m in each]
        net.theta = theta
        return matrix, plain

    step = 1e-3
    T = (hessian_at(step * D1)[0] - hessian_at(-step * D1)[0]) @ D1 / (2 * step)
    D2 = D1 + np.linalg.solve(H, k / (n - k) * (own - H) @ D1 - T / 2)
    curved = np.array([D1 @ m @ D1 for m in hessian_at(0 * D1)[1]])
    expected = net.gradients(test.x, test.y) @ D2 + curved / 2
    assert np.linalg.norm(T) > 1e-3 * np.linalg.norm(own @ D1)
    # T comes from differences of second order, with a relative error of about step^2 = 1e-6.
    assert relative_error(got[:], expected) < 1e-6


class Quartic(keras.regularizers.Regularizer):
    """A regulariser whose third derivative is not zero: 0.05 times the sum of w^4."""

    def __call__(self, x):
        return 0.05 * tf.reduce_sum(x**4)


def penalty_hessian(net):
    return net.penalty_hvp(np.eye(net.num_parameters))


# --- arguments that are refused --------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "order", "error", "message"),
    [
        ([0], 3, ValueError, "^order must be 1, 2, 'one_step' or None, got 3"),
        ([0], "2", ValueError, "^order must be 1, 2, 'one_step' or None, got '2'"),
        (np.arange(40), 1, ValueError, "^rows must leave at least one example, got all 40"),
        (np.arange(20), 2, ValueError, "^rows must be fewer than half .* order 2, got 20 of 40"),
        ([40], 1, IndexError, r"^rows must lie in \[0, 40\), got 40"),
    ],
)
def test_bad_groups_are_refused_before_any_work(rows, order, error, message, monkeypatch):
    p = ridge()
    influence = Influence(p.net, p.train)
    monkeypatch.setattr(
        "influence.scores.inverse.Inverse.solve", lambda *_: pytest.fail("the work had begun")
    )
    with pytest.raises(error, match=message):
        influence.group(p.test, rows, order)


def test_order_two_is_the_hessians():
    p = ridge()
    influence = Influence(p.net, p.train, curvature=GaussNewton, solver=Direct())
    expected = Influence(p.net, p.train, solver=Direct()).group(p.test, [1, 2])
    assert relative_error(influence.group(p.test, [1, 2])[:], expected[:]) < 1e-10
    with pytest.raises(ValueError, match="^order must be 1 with GaussNewton, got 2"):
        influence.group(p.test, [1, 2], 2)
