"""Tests of the box-constrained quadratic by its optimality conditions, which prove a minimum."""

import numpy as np
import pytest

from influence.minimisers.box_qp import boxed_minimum


def violation(G, b, a):
    """Return by how much `a` violates the conditions of a minimum in the box, relative to max |b|.

    This is the largest rate of descent along one entry of `a` that does not leave the box.
    """
    assert (a >= 0).all() and (a <= 1).all()
    slope = G @ a - b
    inwards = np.where(a == 0, -slope, np.where(a == 1, slope, np.abs(slope)))
    return max(inwards.max(), 0) / np.abs(b).max()


@pytest.mark.parametrize("seed", range(10))
def test_minimum_of_a_definite_quadratic(seed):
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((12, 20))
    G, b = A @ A.T, 5 * rng.standard_normal(12)
    a = boxed_minimum(G, b, rng.uniform(size=12))
    # Some entries are at a bound and some are inside.
    assert {0.0, 1.0} & set(a) and ((a > 0) & (a < 1)).any()
    assert violation(G, b, a) < 1e-13


def test_inside_the_box_it_is_the_linear_system():
    rng = np.random.default_rng(0)
    A = rng.standard_normal((6, 9))
    wanted = rng.uniform(0.1, 0.9, 6)
    a = boxed_minimum(A @ A.T, A @ A.T @ wanted, np.zeros(6))
    np.testing.assert_allclose(a, wanted, rtol=1e-12)


def test_singular_quadratic_from_one_answer_to_the_next():
    # G has order 40 and rank 5, and b is not in its range. A minimum exists only because of the
    # box.
    rng = np.random.default_rng(3)
    A = rng.standard_normal((40, 5))
    G, b = A @ A.T, np.ones(40)
    a, start = np.zeros(40), np.zeros(40)
    for _ in range(4):
        start, a = a, boxed_minimum(G, b, a)
    value = lambda a: a @ G @ a / 2 - b @ a  # noqa: E731
    assert value(a) <= value(start) + 1e-12 * abs(value(a))
    assert violation(G, b, a) < 1e-12


def test_ridge_pulls_towards_the_start():
    # With two equal rows, only the sum of the entries is determined. The difference of the entries
    # stays that of the start.
    G, b = np.ones((2, 2)), np.array([1.0, 1.0])
    np.testing.assert_allclose(boxed_minimum(G, b, np.array([0.9, 0.1])), [0.9, 0.1], rtol=1e-6)
    np.testing.assert_allclose(boxed_minimum(G, b, np.array([0.6, 0.4])), [0.6, 0.4], rtol=1e-6)


@pytest.mark.parametrize(
    ("G", "start", "message"),
    [
        (np.eye(3), np.zeros(2), r"shapes \(2, 2\) and \(2,\) .*, got \(3, 3\) and \(2,\)"),
        (np.eye(2), np.zeros(3), r"shapes \(2, 2\) and \(2,\) .*, got \(2, 2\) and \(3,\)"),
        (np.eye(2), np.array([0, 1.5]), r"^start must lie in \[0, 1\], got 0 to 1.5"),
        (np.eye(2), np.array([np.nan, 0]), r"^start must lie in \[0, 1\], got nan"),
        (np.zeros((2, 2)), np.zeros(2), "^G must have a positive diagonal entry, got 0 at most"),
    ],
)
def test_bad_arguments(G, start, message):
    with pytest.raises(ValueError, match=message):
        boxed_minimum(G, np.ones(2), start)


def test_a_negative_eigenvalue_is_refused():
    with pytest.raises(np.linalg.LinAlgError):
        boxed_minimum(np.array([[1, 2], [2.0, 1]]), np.ones(2), np.zeros(2))
