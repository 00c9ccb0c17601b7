"""Tests of Newton's method for linear models, from any start.

Each step solves a linear system, by a Cholesky factor or by CG. Both ways are tested.
"""

import numpy as np
import pytest
import scipy.sparse

from influence import BinaryLogisticRegression, Examples
from influence.models import newton
from tests import oracles
from tests.influence.problems import logistic


@pytest.fixture(params=["cholesky", "conjugate gradients"])
def way(request, monkeypatch):
    """Force one of the two solvers for problems of any size."""
    monkeypatch.setattr(newton, "_FACTOR_COST", {"cholesky": 1e9}.get(request.param, 0))
    if request.param == "cholesky":
        monkeypatch.setattr(newton, "CG", None)  # calling it would raise an error


def wide(num_rows=12, num_inputs=30):
    """Return sparse counts with more words than rows, and the oracle of their risk."""
    rng = np.random.default_rng(0)
    x = rng.poisson(0.4, (num_rows, num_inputs)).astype(float)
    y = (np.arange(num_rows) % 3 == 0).astype(int)
    return Examples(scipy.sparse.csr_matrix(x), y), oracles.logistic_regression(x, y, 1e-3)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_both_ways_reach_the_minimum(way, kind):
    p = logistic(kind)
    expected = p.theta
    p.net.theta = np.zeros_like(expected)
    p.net.fit(p.train)
    # |theta - minimum| <= |gradient| / smallest eigenvalue. This eigenvalue is at least the weight
    # decay, 0.05.
    assert np.linalg.norm(p.theta - expected) <= 1e-10 / 0.05


def test_more_features_than_rows(way):
    examples, oracle = wide()
    net = BinaryLogisticRegression(30, weight_decay=1e-3).fit(examples)
    assert np.linalg.norm(oracle.gradient(net.theta)) <= 1e-10


def test_a_start_from_which_full_steps_diverge(way):
    # The labels are balanced and the only feature is constant. At theta = 8 the loss has almost no
    # curvature.
    x, y = np.ones((4, 1)), np.array([0, 0, 1, 1])
    oracle = oracles.logistic_regression(x, y, 1e-6)
    start = np.array([8.0])
    full = start - oracle.gradient(start) / oracle.hessian(start)[0]
    assert oracle.value(full) > oracle.value(start)
    net = BinaryLogisticRegression(1, weight_decay=1e-6)
    net.theta = start
    net.fit(Examples(x, y))
    assert abs(net.theta[0]) <= 1e-9  # the minimum is at 0, where the curvature is 1/4


def test_features_of_very_different_scale(way):
    p = logistic("sigmoid", num_rows=200)
    scales = np.array([1e-2, 1, 10, 100, 1e3])
    x, y = p.train.x * scales, p.train.y
    net = BinaryLogisticRegression(5, weight_decay=1e-4)
    net.fit(Examples(x, y), gradient_tolerance=1e-9)
    oracle = oracles.logistic_regression(x, y, 1e-4)
    assert np.linalg.norm(oracle.gradient(net.theta)) <= 1.1e-9


def test_the_cheaper_way_is_taken(monkeypatch):
    """Check that a small dense Hessian is factored and a large sparse problem uses CG."""
    p = logistic("sigmoid", num_rows=200)
    p.net.theta = np.zeros(5)
    monkeypatch.setattr(newton, "CG", None)
    p.net.fit(p.train)
    rng = np.random.default_rng(0)
    x = scipy.sparse.random(50, 3000, 0.01, "csr", rng=rng)
    y = rng.integers(2, size=50)
    with pytest.raises(TypeError, match="not callable"):
        BinaryLogisticRegression(3000).fit(Examples(x, y))


def test_the_tolerance_is_not_overshot_by_much(monkeypatch):
    """Check that the last step is solved only as accurately as the tolerance requires."""
    monkeypatch.setattr(newton, "_FACTOR_COST", 0)
    examples, oracle = wide(40, 60)
    net = BinaryLogisticRegression(60, weight_decay=1e-3)
    net.fit(examples, gradient_tolerance=1e-3)
    assert 1e-6 < np.linalg.norm(oracle.gradient(net.theta)) <= 1e-3
