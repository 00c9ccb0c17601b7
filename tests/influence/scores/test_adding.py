"""Influence.adding against refits with the row added, and closed forms."""

import numpy as np
import pytest
import scipy.stats

from influence import Direct, Examples, Influence
from influence.net.measurements import margin
from tests.influence.problems import logistic, relative_error, ridge, through_keras


def refitted(problem, new):
    """(m, k): test losses after refitting with each new row, minus before."""
    p = problem
    before = p.measured.losses(p.theta)
    columns = []
    for features, y in zip(new.features, new.y, strict=True):
        grown = p.oracle.on(np.vstack([p.oracle.features, features]), np.append(p.oracle.y, y))
        columns.append(p.measured.losses(grown.minimum(p.theta)) - before)
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "ridge", "softmax by the tape"])
def test_is_the_change_of_a_refit_with_the_row(kind):
    # Outside rows: those of another draw from the same problem.
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
    # An added row takes 1 / (1 + leverage) of what is predicted: d/n on average is at most 0.03.
    assert 0.9 < line.slope < 1.01 and line.rvalue > 0.995
    assert abs(line.intercept) < 0.02 * actual.std()


def test_is_minus_the_removal_of_the_same_row():
    p = logistic("softmax", intercept=True)
    influence = Influence(p.net, p.train, solver=Direct())
    rows = [3, 50, 8]
    again = p.train.take(rows)
    for measurement in (None, margin):
        added = influence.adding(p.test, again, measurement=measurement)
        removed = influence.scores(p.test, rows, measurement=measurement)
        assert relative_error(added.change_if_added, -removed.change_if_removed) < 1e-12
        assert added.measurement == removed.measurement
        assert relative_error(added.solution.x, removed.solution.x) < 1e-12


def test_a_second_row_like_the_test_point_helps_it():
    p = ridge(50)
    assert abs(p.measured.losses(p.theta)[2]) > 0.1
    change = Influence(p.net, p.train, solver=Direct()).adding(p.test, p.test.take([2]))[2, 0]
    actual = refitted(p, p.measured.on(p.measured.features[[2]], p.measured.y[[2]]))[2, 0]
    assert change < 0 and change == pytest.approx(actual, rel=0.3)


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_batch_size_changes_nothing(batch_size):
    p = ridge()
    expected = Influence(p.net, p.train, solver=Direct()).adding(p.test, p.train)
    influence = Influence(p.net, p.train, solver=Direct(), batch_size=batch_size)
    assert relative_error(influence.adding(p.test, p.train)[:], expected[:]) < 1e-11


@pytest.mark.parametrize(
    ("new", "error", "message"),
    [
        ((1, 2), TypeError, r"^new must be Examples\(x, y\), got tuple"),
        (Examples(np.ones((2, 3)), np.zeros(2)), ValueError, r"^new\.x must have rows of shape"),
        (Examples(np.ones((2, 5)), np.full(2, 3)), ValueError, r"^new\.y must hold class numbers"),
    ],
)
def test_bad_rows_are_refused_before_any_work(new, error, message, monkeypatch):
    p = logistic("softmax")
    influence = Influence(p.net, p.train)
    monkeypatch.setattr(Influence, "_solve", lambda *_: pytest.fail("the work had begun"))
    with pytest.raises(error, match=message):
        influence.adding(p.test, new)
