"""What the experiments share: which rows and test points are looked at."""

import numpy as np
import pytest

from experiments.shared import compare


def test_largest_by_size_of_either_sign():
    scores = np.array([[1.0, -3.0, 2.0, 3.0], [0.0, 0.0, -1.0, 0.5]])
    assert compare.largest(scores, 3).tolist() == [[1, 3, 2], [2, 3, 0]]
    assert compare.largest(scores[0], 1).tolist() == [1]


def test_with_others_draws_without_repetition():
    points = compare.with_others(7, np.arange(10), 9, seed=3)
    assert points[0] == 7 and sorted(points) == list(range(10))
    again = compare.with_others(7, np.arange(10), 4, seed=3)
    np.testing.assert_array_equal(again, compare.with_others(7, np.arange(10), 4, seed=3))
    assert (again != compare.with_others(7, np.arange(10), 4, seed=4)).any()
    assert 50 in compare.with_others(50, np.arange(3), 2, seed=0)  # it need not be among them
    with pytest.raises(ValueError, match="count must be at most 9, the other points, got 10"):
        compare.with_others(7, np.arange(10), 10, seed=0)
