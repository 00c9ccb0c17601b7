"""Tests of comparisons against values by hand: numbers, panels, choices of rows and points."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments.shared import compare


@pytest.fixture
def axis():
    figure, axis = plt.subplots()
    yield axis
    plt.close(figure)


def test_agreement_with_values_by_hand():
    """Compare predicted values -1, -1, 2 with actual values -2, 0, 2. Both have the mean 0."""
    found = compare.agreement(np.array([-1.0, -1.0, 2.0]), np.array([-2.0, 0.0, 2.0]))
    assert found["slope"] == pytest.approx(6 / 8)
    assert found["intercept"] == pytest.approx(0, abs=1e-15)
    assert found["pearson"] == pytest.approx(6 / np.sqrt(8 * 6))
    # Spearman's coefficient is Pearson's r of the ranks 1.5, 1.5, 3 and 1, 2, 3.
    assert found["spearman"] == pytest.approx(np.sqrt(3) / 2)
    # The middle pair is (-1, 0). Zero has no sign, so this pair does not agree.
    assert found["sign_agreement"] == pytest.approx(2 / 3)
    assert found["largest_difference"] == 1


def test_agreement_sees_scale_sign_and_offset():
    actual = np.array([-1.0, 0.5, 2.0, 4.0])
    found = compare.agreement(-2 * actual + 3, actual)
    for name, value in (("pearson", -1), ("spearman", -1), ("slope", -2), ("intercept", 3)):
        assert found[name] == pytest.approx(value)
    # The predictions are 5, 2, -1 and -5. Only the second one has the sign of the actual value.
    assert found["sign_agreement"] == 0.25
    assert found["largest_difference"] == 9


@pytest.mark.parametrize("largest", [0.3, -0.4])
def test_predicted_against_actual(axis, largest):
    actual, predicted = np.array([0.1, largest, -0.2]), np.array([0.15, 0.25, -0.1])
    compare.predicted_against_actual(axis, actual, predicted)
    points = np.asarray(axis.collections[0].get_offsets())
    np.testing.assert_array_equal(points, np.column_stack([actual, predicted]))
    reach = pytest.approx(1.08 * abs(largest))
    assert axis.get_aspect() == 1
    assert axis.get_xlim() == axis.get_ylim() and axis.get_xlim()[1] == reach
    (line,) = axis.lines
    for drawn in (line.get_xdata(), line.get_ydata()):
        np.testing.assert_array_equal(drawn, axis.get_xlim())
    assert axis.get_xlabel() == "Actual change in loss (nats)"
    assert axis.get_ylabel() == "Predicted change in loss (nats)"


def test_predictions_that_are_all_zero_can_be_drawn(axis):
    compare.predicted_against_actual(axis, np.zeros(3), np.zeros(3))
    assert axis.get_xlim()[1] > 0


def test_largest_bars(axis):
    names, values = np.array(["a", "b", "c", "d"]), np.array([1.0, -3.0, 0.5, 2.0])
    order = compare.largest_bars(axis, names, values, marked="d", count=3)
    assert order.tolist() == [1, 3, 0]
    assert [bar.get_width() for bar in axis.patches] == [-3, 2, 1]
    assert [bar.get_y() + bar.get_height() / 2 for bar in axis.patches] == pytest.approx([0, 1, 2])
    labels = axis.get_yticklabels()
    assert [label.get_text() for label in labels] == ["b", "d", "a"]
    assert [label.get_fontweight() for label in labels] == ["normal", "bold", "normal"]
    colours = [bar.get_facecolor() for bar in axis.patches]
    assert colours[0] == colours[2] != colours[1]
    low, high = axis.get_ylim()
    assert low > high  # the axis is inverted, so the largest bar is on top
    assert len(compare.largest_bars(axis, names, values)) == 4


@pytest.mark.parametrize(
    ("correlation", "text"),
    [
        (0.86, "0.86"),
        (0.366, "0.37"),
        (0.8699, "0.87"),
        (0.995, "0.99"),  # the nearest float is below .995
        (0.9951, "0.995"),
        (0.999, "0.999"),
        (0.99999, "0.99999"),
        (0.9999915, "0.99999"),
        (0.999996, "0.999996"),
        (1 - 1e-9, "0.999999"),
        (1.0, "1.000000"),
        (-0.126, "-0.13"),
    ],
)
def test_rounded(correlation, text):
    assert compare.rounded(correlation) == text


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
    # Point 50 is in the result, although the others are chosen among the points 0, 1 and 2 only.
    assert 50 in compare.with_others(50, np.arange(3), 2, seed=0)
    with pytest.raises(ValueError, match="count must be at most 9, the other points, got 10"):
        compare.with_others(7, np.arange(10), 10, seed=0)
